"""LAMB and AdamW where batches are large, with and without a warm-up.

You et al. ("Large batch optimization for deep learning: training BERT in 76 minutes", 2020) scale the
learning rate by the square root of the batch, and go on to save steps where other optimizers gain no more.
People say that LAMB needs no warm-up for it. Here a small transformer encoder tells which of four Markov
chains a line is of, with batches from 32 to 8192. Each optimizer has the rate that is best for it at a batch
of 32, by two seeds that the report does not use, times sqrt(batch / 32); the largest batch is tried at a
fourth of that too. A warm-up is linear and takes a tenth of the steps that the batch is given. Biases and
layer normalisation are excluded from weight decay and trust ratios. Batches of more than 1024 come by
gradient accumulation.

Counted are the steps until the loss on held-out lines is at most 0.6 (the untrained model has 1.4; from the
letters alone, without their order, 0.9). It is looked at 60 times or more in the steps that the batch is
given. An optimizer falls behind where it takes more than 1.5 times the steps of the best, or where most seeds
do not get there.

    python examples/experiments/lamb_large_batch.py --json lamb_large_batch.json --out lamb_large_batch.png
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

import tf_adam_variants as tav

SMALLEST, LARGEST_AT_ONCE = 32, 1024
STEPS = {32: 1200, 128: 600, 512: 300, 2048: 150, 8192: 90}  # at most, by the batch
TARGET, QUICK_TARGET = 0.6, 1.0
ADAM_RATES = [2.0**k for k in range(-12, -5)]
LAMB_RATES = [2.0**k for k in range(-10, -3)]
RATES = {
    "LAMB": LAMB_RATES,
    "LAMB, warm-up": LAMB_RATES,
    "AdamW": ADAM_RATES,
    "AdamW, warm-up": ADAM_RATES,
}
COLORS = {"LAMB": "#882255", "LAMB, warm-up": "#CC79A7", "AdamW": "#0072B2", "AdamW, warm-up": "#56B4E9"}
EXCLUDED = ["bias", "gamma", "beta"]
SEEDS, TUNING_SEEDS = range(5), range(100, 102)
LENGTH, LINES, EVALUATIONS = 8, 65_536, 60
LATE = 1.5


def tuning(quick: bool, _: pd.DataFrame) -> list[experiment.Trial]:
    return [
        {
            "optimizer": optimizer,
            "batch": SMALLEST,
            "rate": rate,
            "seed": seed,
            "steps": 120 if quick else STEPS[SMALLEST],
            "target": QUICK_TARGET if quick else TARGET,
        }
        for optimizer, rates in RATES.items()
        for rate in (rates[3:4] if quick else rates)
        for seed in TUNING_SEEDS[: 1 if quick else None]
    ]


def at_all_batches(quick: bool, tuned: pd.DataFrame) -> list[experiment.Trial]:
    """At the rate that gets there in the fewest steps."""
    cost = tuned.taken.where(tuned.reached, 10 * tuned.steps)
    order = tuned.assign(cost=cost).groupby(["optimizer", "rate"])[["cost", "loss"]].mean().reset_index()
    best = order.sort_values(["cost", "loss"]).groupby("optimizer").rate.first()
    return [
        {
            "optimizer": optimizer,
            "batch": batch,
            "rate": float(best[optimizer]) * (batch / SMALLEST) ** 0.5,
            "seed": seed,
            "scale": 1.0,
            "steps": 120 if quick else steps,
            "target": QUICK_TARGET if quick else TARGET,
        }
        for batch, steps in list(STEPS.items())[: 1 if quick else None]
        for optimizer in RATES
        for seed in SEEDS[: 1 if quick else None]
    ]


def at_a_fourth(quick: bool, before: pd.DataFrame) -> list[experiment.Trial]:
    """The largest batch again, at a fourth of the scaled rate."""
    scaled = before[(before.batch == before.batch.max()) & before.seed.isin(SEEDS)]
    arguments = ["optimizer", "batch", "rate", "seed", "steps", "target"]
    return [row | {"rate": row["rate"] / 4, "scale": 0.25} for row in scaled[arguments].to_dict("records")]


def run(
    optimizer: str, batch: int, rate: float, seed: int, steps: int, target: float, scale: float = 1.0
) -> dict[str, Any]:
    """Train until the target is reached, or for so many steps. `scale` is in the rate already."""
    keras.utils.clear_session()
    keras.utils.set_random_seed(seed)
    parts = max(1, batch // LARGEST_AT_ONCE)  # that one update's gradient is accumulated from
    schedule = rate
    if optimizer.endswith("warm-up"):  # schedules count the parts
        schedule = tav.schedules.LinearWarmup(rate, warmup_steps=parts * steps // 10)
    make = tav.LAMB if optimizer.startswith("LAMB") else tav.AdamW
    model = small_tasks.encoder(LENGTH)
    every = max(1, steps // EVALUATIONS)
    model.compile(
        make(
            schedule,
            weight_decay=0.01,
            exclude_from_weight_decay=EXCLUDED,
            gradient_accumulation_steps=parts if parts > 1 else None,
        ),
        small_tasks.crossentropy(),
        steps_per_execution=every * parts,
    )
    data = small_tasks.chains(LINES, seed=1, length=LENGTH)
    held_out = small_tasks.chains(1024, seed=2, length=LENGTH)
    stop = StopAt(target)
    model.fit(
        small_tasks.batches(data, batch // parts, seed),
        epochs=steps // every,
        steps_per_epoch=every * parts,
        validation_data=tuple(held_out),
        validation_batch_size=1024,
        shuffle=False,
        callbacks=[stop],
        verbose=0,
    )
    taken = every * len(stop.losses)
    reached = stop.losses[-1] <= target
    return {
        "reached": reached,
        "taken": taken,
        "loss": stop.losses[-1],
        "losses": stop.losses,
    }


class StopAt(keras.callbacks.Callback):
    def __init__(self, target: float) -> None:
        super().__init__()
        self._target = target
        self.losses: list[float] = []

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        loss = logs["val_loss"]
        self.losses.append(loss if np.isfinite(loss) else float("inf"))
        if not self._target < loss < float("inf"):
            self.model.stop_training = True


def medians(own: pd.DataFrame) -> pd.DataFrame:
    """The steps to the target [batch, optimizer]: the median of the seeds, infinite where most fail."""
    steps = own.taken.where(own.reached, np.inf)
    return steps.groupby([own.batch, own.optimizer], sort=False).median().unstack()[list(RATES)]


def saved_by_warm_up(own: pd.DataFrame, optimizer: str) -> str:
    """A sentence on the steps by which a warm-up is ahead, of seeds in pairs that both get there."""
    taken = own[own.reached].pivot(index="seed", columns="optimizer", values="taken")
    if not {optimizer, f"{optimizer}, warm-up"} <= set(taken):
        return ""
    saved = (taken[optimizer] - taken[f"{optimizer}, warm-up"]).dropna()
    if saved.empty:
        return ""
    return (
        f" A warm-up saves {optimizer} {saved.median():.0f} of them ({saved.min():.0f} to {saved.max():.0f}, "
        f"seeds in pairs: {len(saved)})."
    )


def report(frame: pd.DataFrame) -> str:
    own, slower = frame[frame.scale == 1], frame[frame.scale < 1]
    steps, rows = medians(own), []
    for optimizer in RATES:
        ours = own[own.optimizer == optimizer]
        cells = [optimizer, f"{ours.rate.min():.2g}"]
        for batch in steps.index:
            reached = ours[(ours.batch == batch) & ours.reached]
            count = f"{len(reached)} of {ours.seed.nunique()}"
            if np.isinf(steps.loc[batch, optimizer]):
                cells.append(f"- ({count})")
            else:
                low, high = reached.taken.min(), reached.taken.max()
                failures = "" if len(reached) == ours.seed.nunique() else f"; {count}"
                cells.append(f"{steps.loc[batch, optimizer]:.0f} ({low} to {high}{failures})")
        rows.append(cells)
    headings = ["steps (lowest to highest)", "rate at 32", *map(str, steps.index)]
    behind = steps.gt(LATE * steps.min(axis=1), axis=0) | np.isinf(steps)
    sentences = []
    for optimizer, late in behind.items():
        batches = list(late.index[late])
        sentences.append(f"{optimizer} " + (f"at {', '.join(map(str, batches))}" if batches else "nowhere"))
    conclusion = f"Falling behind: {'; '.join(sentences)}."
    for batch, fewer in medians(slower).iterrows():
        found = (
            f"{name} {'in most seeds not' if np.isinf(n) else f'in {n:.0f} steps'}"
            for name, n in fewer.items()
        )
        conclusion += f" At {batch} with a fourth of the scaled rate: {', '.join(found)}."
        for optimizer in ("LAMB", "AdamW"):
            conclusion += saved_by_warm_up(slower[slower.batch == batch], optimizer)
    return f"{experiment.table(headings, rows)}\n\n{conclusion}"


def draw(frame: pd.DataFrame, path: Path) -> None:
    own = frame[frame.scale == 1]
    steps = medians(own)
    batches = list(steps.index)
    figure, (left, *curves) = plt.subplots(1, 3, figsize=(14, 4.6), layout="constrained")
    for i, (optimizer, color) in enumerate(COLORS.items()):
        ours = own[own.optimizer == optimizer]
        reached = ours[ours.reached]
        left.plot(steps.index, steps[optimizer], color=color, label=optimizer)
        left.scatter(reached.batch * 1.08 ** (i - 1), reached.taken, color=color, s=14)
        failed = ours[~ours.reached].groupby("batch").size()
        for batch, count in failed.items():
            height = 1.1 * max(STEPS.values()) * 1.25**i
            left.text(batch, height, f"{count} not", color=color, ha="center", fontsize=8)
    ideal = steps.iloc[0].min() * batches[0] / np.array(batches)
    left.plot(batches, ideal, color="gray", ls=":", label="steps x batch constant")
    left.set(xscale="log", yscale="log", xlabel="batch", ylabel="steps to the loss", ylim=(5, 4000))
    left.set_xticks(batches, map(str, batches), minor=False)
    left.minorticks_off()
    left.legend(loc="lower left")
    left.grid(alpha=0.3, which="both")
    for axes, batch in zip(curves, (batches[0], batches[-1]), strict=True):
        for optimizer, color in COLORS.items():
            for row in own[(own.batch == batch) & (own.optimizer == optimizer)].itertuples():
                every = row.taken // len(row.losses)
                axes.plot(every * (1 + np.arange(len(row.losses))), row.losses, color=color, alpha=0.7, lw=1)
        axes.axhline(own.target.iloc[0], color="gray", ls=":")
        axes.set(title=f"batch {batch}", xlabel="steps", ylabel="loss on held-out lines", ylim=(0.5, 3))
        axes.grid(alpha=0.3)
    figure.suptitle(f"Rates scaled by the square root of the batch; seeds: {own.seed.nunique()}")
    figure.savefig(path, dpi=110)


EXPERIMENT = experiment.Experiment(
    experiment.in_processes(run, tuning, at_all_batches, at_a_fourth), report, draw
)

if __name__ == "__main__":
    experiment.main(EXPERIMENT, __doc__)
