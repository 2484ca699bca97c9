"""Does AdamW decouple weight decay from the learning rate?

Loshchilov and Hutter ("Decoupled weight decay regularization", 2019, figure 2) trained over a grid of
learning rates and weight decays: with Adam and an L2 penalty the best of the one depends on the other, with
AdamW much less. Here the same where decay matters: a dense network on scikit-learn's digits, two in five of
them with a random label, and test digits with their own. Two problems: 256 digits for 100 epochs, which it
learns by heart, and 1024 for 40. Each rate falls to zero by a cosine. Three kinds of decay:

    L2              a penalty l/2 |w|^2 in the loss of Adam: the gradient gets l w
    learning_rate   AdamW: w <- w - lr_t l w, as Keras, PyTorch and optax have it
    schedule        AdamW: w <- w - (lr_t / lr_0) l w, as in the paper: changing lr_0 changes no decay

Reported is by which factor the best decay is multiplied where the rate is 4 times as large, from a line
through those rates with which the network learns and where a decay in the grid helps; and how far the loss is
above the lowest, at 4 times the rate or a fourth of it, where the decay is kept.

    python examples/experiments/adamw_decoupling.py --json adamw_decoupling.json --out adamw_decoupling.png
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

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

RATES = [2.0**k for k in range(-11, -2)]
DECAYS = {  # half a decade from one to the next
    "L2": [10 ** (k / 2) for k in range(-8, -1)],
    "learning_rate": [10 ** (k / 2) for k in range(-5, 2)],
    "schedule": [10 ** (k / 2) for k in range(-7, 0)],
}
EPOCHS = {256: 100, 1024: 40}  # by how many digits there are
SEEDS = 5
MATTERS = 0.98  # decay matters where the lowest loss is at most so many times that of the least decay
LEARNS = 1.25  # and a rate where its lowest loss is at most so many times the lowest of all rates,
OTHERS = (1.1, 1.5)  # or so many: how far the factor hangs on it
BATCH_SIZE = 32


def trials(quick: bool, _: pd.DataFrame) -> list[experiment.Trial]:
    rates, every, seeds = (RATES[4::2], 3, 1) if quick else (RATES, 1, SEEDS)
    return [
        {
            "examples": examples,
            "kind": kind,
            "rate": rate,
            "decay": decay,
            "seed": seed,
            "epochs": 10 if quick else epochs,
        }
        for examples, epochs in list(EPOCHS.items())[: 1 if quick else None]
        for kind, decays in DECAYS.items()
        for rate in rates
        for decay in decays[::every]
        for seed in range(seeds)
    ]


def run(examples: int, kind: str, rate: float, decay: float, seed: int, epochs: int) -> dict[str, Any]:
    """The test loss of a training."""
    keras.utils.clear_session()
    keras.utils.set_random_seed(seed)
    x, y, x_test, y_test = data(examples, seed)
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
    value = float(loss(y_test, model(x_test)))  # `evaluate` would add the penalty
    return {"loss": value if np.isfinite(value) else float("inf")}


def data(examples: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Each seed has its own examples and random labels."""
    digits = load_digits()
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(digits.target))
    x, y = digits.data[order].astype("float32") / 16, digits.target[order]
    wrong = rng.uniform(size=examples) < 0.4
    y_train = np.where(wrong, rng.integers(10, size=examples), y[:examples])
    return x[:examples], y_train, x[examples:], y[examples:]


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

    NaN where there is none: the lowest loss is at the grid's edge, or hardly below that of the least decay.
    """
    logs = np.log10(decays)
    found = np.full(len(mean_losses), np.nan)
    for row, losses_of_rate in enumerate(mean_losses):
        i = int(losses_of_rate.argmin())
        if 0 < i < len(logs) - 1 and losses_of_rate[i] < MATTERS * losses_of_rate[0]:
            a, b, _ = np.polyfit(logs[i - 1 : i + 2], losses_of_rate[i - 1 : i + 2], 2)
            found[row] = -b / (2 * a)
    return found


def usable(decays: np.ndarray, mean_losses: np.ndarray, learns: float = LEARNS) -> np.ndarray:
    """Which rates learn and have a best decay."""
    near = mean_losses.min(axis=1) <= learns * mean_losses.min()
    return near & ~np.isnan(best_decays(decays, mean_losses))


def shift(rates: np.ndarray, best: np.ndarray, used: np.ndarray) -> float:
    """The factor of the best decay where the rate is 4 times as large, from a line through those used."""
    used = used & ~np.isnan(best)
    if used.sum() < 2:
        return float("nan")
    return float(4 ** np.polyfit(np.log10(rates[used]), best[used], 1)[0])


class Shift(NamedTuple):
    """The factor of the best decay, and what it is when the seeds are drawn again: alike for all kinds."""

    factor: float
    draws: np.ndarray

    @property
    def interval(self) -> tuple[float, float]:
        """That holds 95 % of the draws."""
        return tuple(np.percentile(self.draws, [2.5, 97.5]))


def shift_of(frame: pd.DataFrame, kind: str) -> Shift:
    rates, decays, of_seeds = losses(frame, kind)
    used = usable(decays, of_seeds.mean(axis=-1))

    def of(draw: Any) -> float:
        return shift(rates, best_decays(decays, of_seeds[..., draw].mean(axis=-1)), used)

    draws = [of(draw) for draw in experiment.resampled(of_seeds.shape[-1])]
    return Shift(of(slice(None)), np.array(draws))


def least_dependent(shifts: dict[str, Shift]) -> str | None:
    """The kind whose best decay moves least in 95 % of the draws; None where there is none."""
    moves = np.array([np.abs(np.log(own.draws)) for own in shifts.values()])
    least = np.where(np.isnan(moves).any(axis=0), -1, np.nan_to_num(moves).argmin(axis=0))
    return next((kind for i, kind in enumerate(shifts) if np.mean(least == i) >= 0.95), None)


def cost(frame: pd.DataFrame, kind: str) -> float:
    """How far, in per cent, the loss is above the lowest at 4 times the rate or a fourth, the decay kept."""
    rates, decays, of_seeds = losses(frame, kind)
    mean = of_seeds.mean(axis=-1)
    used = usable(decays, mean)
    kept = [
        mean[new, mean[old].argmin()] / mean[new].min() - 1
        for old in np.flatnonzero(used)
        for new in np.flatnonzero(used & np.isin(np.round(np.log2(rates / rates[old])), [-2, 2]))
    ]
    return 100 * float(np.mean(kept)) if kept else float("nan")


def report(frame: pd.DataFrame) -> str:
    rows, sentences = [], []
    for examples, problem in frame.groupby("examples"):
        moved = {kind: shift_of(problem, kind) for kind in NAMES}
        for kind, name in NAMES.items():
            rates, decays, of_seeds = losses(problem, kind)
            mean = of_seeds.mean(axis=-1)
            best, used = best_decays(decays, mean), np.flatnonzero(usable(decays, mean))
            low, high = moved[kind].interval
            i, j = np.unravel_index(mean.argmin(), mean.shape)
            ends = [f"{10 ** best[k]:.2g} at {rates[k]:.2g}" for k in used[[0, -1]]] if len(used) else []
            rows.append(
                [
                    f"{examples}, {name}",
                    f"{moved[kind].factor:.2f} ({low:.2f} to {high:.2f})",
                    *(f"{shift(rates, best, usable(decays, mean, other)):.2f}" for other in OTHERS),
                    ", ".join(ends),
                    f"+{cost(problem, kind):.0f} %",
                    f"{mean.min():.3f}",
                    f"{rates[i]:.2g}, {decays[j]:.2g}",
                ]
            )
        if np.isnan([own.factor for own in moved.values()]).any():
            sentences.append(f"With {examples} digits too few rates have a best decay in the grid.")
            continue
        moves = ", ".join(f"{own.factor:.2g} with {NAMES[kind]}" for kind, own in moved.items())
        least = least_dependent(moved)
        verdict = f"least with {NAMES[least]}" if least else "the seeds do not tell with which least"
        sentences.append(f"With {examples} digits: {moves}; {verdict}.")
    headings = [
        "digits", "factor of the best decay",
        *(f"of rates within {other}" for other in OTHERS), "the best decay", "loss where the decay is kept",
        "lowest loss", "at rate, decay",
    ]  # fmt: skip
    conclusion = "Where the learning rate is 4 times as large, the best decay is multiplied by a factor. "
    return f"{experiment.table(headings, rows)}\n\n{conclusion}{' '.join(sentences)}"


NAMES = {
    "L2": "Adam, L2",
    "learning_rate": 'AdamW, `"learning_rate"`',
    "schedule": 'AdamW, `"schedule"`',
}


def draw(frame: pd.DataFrame, path: Path) -> None:
    problems = frame.groupby("examples")
    figure, grid = plt.subplots(
        len(problems),
        len(DECAYS),
        figsize=(13, 0.6 + 4.2 * len(problems)),
        layout="constrained",
        squeeze=False,
    )
    for maps, (examples, problem) in zip(grid, problems, strict=True):
        shown = {kind: losses(problem, kind) for kind in DECAYS}
        lowest = min(own.mean(axis=-1).min() for _, _, own in shown.values())
        for axes, (kind, (rates, decays, of_seeds)) in zip(maps, shown.items(), strict=True):
            mean = of_seeds.mean(axis=-1)
            x, y = np.log10(decays), np.log2(rates)
            colors = axes.pcolormesh(
                x, y, mean, norm=LogNorm(lowest, 2 * lowest), cmap="viridis_r", shading="nearest"
            )
            best = np.where(usable(decays, mean), best_decays(decays, mean), np.nan)
            axes.plot(best, y, "o-", color="#D55E00", label="the best decay of each rate")
            axes.set_title(f"{examples} digits: {NAMES[kind].replace('`', '')}")
            axes.set_xlabel("weight decay")
            axes.xaxis.set_major_formatter(lambda value, _: f"$10^{{{value:g}}}$")
            axes.xaxis.set_major_locator(MultipleLocator(1))
            axes.set_yticks(y, [f"$2^{{{power:g}}}$" for power in y])
        maps[0].set_ylabel("learning rate")
        bar = figure.colorbar(colors, ax=maps, label="test loss", extend="max", pad=0.01)
        bar.ax.minorticks_off()
        bar.set_ticks(ticks := np.round(lowest * np.linspace(1, 2, 6), 2), labels=map(str, ticks))
    grid[0, 0].legend(loc="upper left", framealpha=0.9)
    seeds = frame.seed.nunique()
    figure.suptitle(
        f"Digits with wrong labels: the mean test loss over learning rate and decay; seeds: {seeds}"
    )
    figure.savefig(path, dpi=110)


EXPERIMENT = experiment.Experiment(experiment.in_processes(run, trials), report, draw)

if __name__ == "__main__":
    experiment.main(EXPERIMENT, __doc__)
