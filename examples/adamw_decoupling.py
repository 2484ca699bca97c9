"""Does AdamW decouple weight decay from the learning rate?

Loshchilov and Hutter ("Decoupled weight decay regularization", 2019, figure 2) trained over a grid of
learning rates and weight decays: with Adam and an L2 penalty the best of the one depends on the other, with
AdamW much less. Here the same on a problem where decay matters: a dense network on 256 of scikit-learn's
digits, two in five of them with a random label, and test digits with their own. Each rate falls to zero by a
cosine. Three kinds of decay:

    L2              a penalty l/2 |w|^2 in the loss of Adam: the gradient gets l w
    learning_rate   AdamW: w <- w - lr_t l w, as Keras, PyTorch and optax have it
    schedule        AdamW: w <- w - (lr_t / lr_0) l w, as in the paper: changing lr_0 changes no decay

    python examples/adamw_decoupling.py --json adamw_decoupling.json --out adamw_decoupling.png
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import experiment
import keras
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import small_tasks
from matplotlib.colors import LogNorm
from matplotlib.ticker import MultipleLocator
from sklearn.datasets import load_digits

import tf_adam_variants as tav

RATES = [2.0**k for k in range(-9, -2)]
DECAYS = {  # half a decade from one to the next
    "L2": [10 ** (k / 2) for k in range(-10, -1)],
    "learning_rate": [10 ** (k / 2) for k in range(-6, 3)],
    "schedule": [10 ** (k / 2) for k in range(-8, 1)],
}
SEEDS = 5
MATTERS = 0.98  # decay matters where the loss with the best is at most so many times the one without
EXAMPLES, BATCH_SIZE, EPOCHS = 256, 32, 100


def trials(quick: bool, _: pd.DataFrame) -> list[experiment.Trial]:
    rates, every, seeds, epochs = (RATES[2::2], 3, 1, 10) if quick else (RATES, 1, SEEDS, EPOCHS)
    return [
        {"kind": kind, "rate": rate, "decay": decay, "seed": seed, "epochs": epochs}
        for kind, decays in DECAYS.items()
        for rate in rates
        for decay in decays[::every]
        for seed in range(seeds)
    ]


def run(kind: str, rate: float, decay: float, seed: int, epochs: int) -> dict[str, Any]:
    """The test loss of a training."""
    keras.utils.clear_session()
    keras.utils.set_random_seed(seed)
    x, y, x_test, y_test = data(seed)
    penalty = keras.regularizers.L2(decay / 2) if kind == "L2" else None  # Keras leaves out the half
    model = keras.Sequential(
        [
            keras.Input((64,)),
            keras.layers.Dense(128, "relu", kernel_regularizer=penalty, bias_regularizer=penalty),
            keras.layers.Dense(10, kernel_regularizer=penalty, bias_regularizer=penalty),
        ]
    )
    steps = len(x) // BATCH_SIZE * epochs
    schedule = keras.optimizers.schedules.CosineDecay(rate, steps)
    optimizer = (
        tav.AdamW(schedule, weight_decay=0.0)
        if kind == "L2"
        else tav.AdamW(schedule, weight_decay=decay, weight_decay_mode=kind)
    )
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer, loss, steps_per_execution=steps)
    batches = small_tasks.batches(small_tasks.Split(x, y), BATCH_SIZE, seed)
    model.fit(batches, steps_per_epoch=steps, shuffle=False, verbose=0)
    return {"loss": float(loss(y_test, model(x_test)))}  # `evaluate` would add the penalty


def data(seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Each seed has its own examples and random labels."""
    digits = load_digits()
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(digits.target))
    x, y = digits.data[order].astype("float32") / 16, digits.target[order]
    wrong = rng.uniform(size=EXAMPLES) < 0.4
    y_train = np.where(wrong, rng.integers(10, size=EXAMPLES), y[:EXAMPLES])
    return x[:EXAMPLES], y_train, x[EXAMPLES:], y[EXAMPLES:]


def losses(frame: pd.DataFrame, kind: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rates, decays, and the test losses [rate, decay, seed]."""
    own = frame[frame.kind == kind]
    rates, decays = np.sort(own.rate.unique()), np.sort(own.decay.unique())
    return (
        rates,
        decays,
        own.sort_values(["rate", "decay", "seed"]).loss.to_numpy().reshape(len(rates), len(decays), -1),
    )


def best_decays(decays: np.ndarray, mean_losses: np.ndarray) -> np.ndarray:
    """The best decay of each rate, log10: the vertex of a parabola through the lowest loss and two others.

    NaN where there is none: the lowest loss is at the edge of the grid, or hardly lower than without decay.
    """
    logs = np.log10(decays)
    found = np.full(len(mean_losses), np.nan)
    for row, losses_of_rate in enumerate(mean_losses):
        i = int(losses_of_rate.argmin())
        if 0 < i < len(logs) - 1 and losses_of_rate[i] < MATTERS * losses_of_rate[0]:
            a, b, _ = np.polyfit(logs[i - 1 : i + 2], losses_of_rate[i - 1 : i + 2], 2)
            found[row] = -b / (2 * a)
    return found


def shift(rates: np.ndarray, best: np.ndarray) -> float:
    """The factor by which the best decay changes where the rate is 4 times as large: a line through all."""
    known = ~np.isnan(best)
    if known.sum() < 2:
        return float("nan")
    return float(4 ** np.polyfit(np.log10(rates[known]), best[known], 1)[0])


def shifts(frame: pd.DataFrame, kind: str) -> tuple[float, float, float]:
    """The shift, and the interval that holds 95 % of it when the seeds are drawn again."""
    rates, decays, of_seeds = losses(frame, kind)

    def of(draw: Any) -> float:
        return shift(rates, best_decays(decays, of_seeds[..., draw].mean(axis=-1)))

    draws = experiment.resampled(of_seeds.shape[-1])
    return of(slice(None)), *experiment.interval(of(draw) for draw in draws)


def cost(frame: pd.DataFrame, kind: str) -> float:
    """By how many per cent the loss is above the lowest at 4 times the rate, where the decay is kept."""
    _, _, of_seeds = losses(frame, kind)
    mean = of_seeds.mean(axis=-1)
    kept = [mean[i + 2, mean[i].argmin()] / mean[i + 2].min() - 1 for i in range(len(mean) - 2)]
    return 100 * float(np.mean(kept)) if kept else float("nan")


def report(frame: pd.DataFrame) -> str:
    rows, moved = [], {}
    for kind in DECAYS:
        rates, decays, of_seeds = losses(frame, kind)
        mean = of_seeds.mean(axis=-1)
        factor, low, high = shifts(frame, kind)
        moved[kind] = factor
        i, j = np.unravel_index(mean.argmin(), mean.shape)
        rows.append(
            [
                NAMES[kind],
                f"{factor:.2f} ({low:.2f} to {high:.2f})",
                f"{cost(frame, kind):.0f} %",
                f"{mean.min():.3f} ± {of_seeds[i, j].std(ddof=1) if of_seeds.shape[-1] > 1 else 0:.3f}",
                f"{rates[i]:.2g}, {decays[j]:.2g}",
            ]
        )
    headings = [
        "", "the best decay moves by a factor of", "loss above the lowest, decay kept",
        "lowest loss", "at rate, decay",
    ]  # fmt: skip
    moves = ", ".join(f"{moved[kind]:.2g} with {name}" for kind, name in NAMES.items())
    stays = min(moved, key=lambda kind: abs(np.log(moved[kind])))
    conclusion = (
        f"With 4 times the learning rate the best decay is larger by a factor of {moves}: on this problem "
        f"it depends least on the rate with {NAMES[stays]}. Where the decay is kept nevertheless, the loss "
        "is above the lowest of the new rate by the per cent of the second column."
    )
    return f"{experiment.table(headings, rows)}\n\n{conclusion}"


NAMES = {
    "L2": "Adam, L2",
    "learning_rate": 'AdamW, `"learning_rate"`',
    "schedule": 'AdamW, `"schedule"`',
}


def draw(frame: pd.DataFrame, path: Path) -> None:
    figure, maps = plt.subplots(1, len(DECAYS), figsize=(13, 5), layout="constrained", sharey=True)
    shown = {kind: losses(frame, kind) for kind in DECAYS}
    lowest = min(own.mean(axis=-1).min() for _, _, own in shown.values())
    for axes, (kind, (rates, decays, of_seeds)) in zip(maps, shown.items(), strict=True):
        mean = of_seeds.mean(axis=-1)
        x, y = np.log10(decays), np.log2(rates)
        colors = axes.pcolormesh(
            x, y, mean, norm=LogNorm(lowest, 2 * lowest), cmap="viridis_r", shading="nearest"
        )
        axes.plot(best_decays(decays, mean), y, "o-", color="#D55E00", label="the best decay of each rate")
        axes.set_title(NAMES[kind].replace("`", ""))
        axes.set_xlabel("weight decay")
        axes.xaxis.set_major_formatter(lambda value, _: f"$10^{{{value:g}}}$")
        axes.xaxis.set_major_locator(MultipleLocator(1))
    maps[0].set_ylabel("learning rate")
    maps[0].set_yticks(y, [f"$2^{{{power:g}}}$" for power in y])
    maps[0].legend(loc="upper left", framealpha=0.9)
    bar = figure.colorbar(colors, ax=maps, label="test loss", extend="max", pad=0.01)
    bar.ax.minorticks_off()
    bar.set_ticks(ticks := np.round(lowest * np.linspace(1, 2, 6), 2), labels=map(str, ticks))
    seeds = next(iter(shown.values()))[2].shape[-1]
    figure.suptitle(
        f"Digits with wrong labels: the mean test loss over learning rate and decay; seeds: {seeds}"
    )
    figure.savefig(path, dpi=110)


EXPERIMENT = experiment.Experiment(experiment.in_processes(run, trials), report, draw)

if __name__ == "__main__":
    experiment.main(EXPERIMENT, __doc__)
