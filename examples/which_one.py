"""Which optimizer? Six of them, tuned alike, on four small tasks.

Each optimizer gets the same number of trials of KerasTuner's random search for its learning rate and, where
it has one, its weight decay: two dimensions are harder to search than one. SGD has a range of rates of its
own. All else is at its default, and the rates fall to zero by a cosine. Trials are judged by the validation
loss of one seed. Then ten other seeds are trained with what was found; their test losses are the report.

    relative loss   the mean test loss over the lowest of that task: 1 is the best optimizer
    all             the geometric mean over the tasks
    rank            1 to 6 by the mean test loss of a task, the mean over the tasks

with 95 % intervals from drawing the seeds again. They leave out the tuning itself: another search would find
other rates. Whether an optimizer is told from the best is by Student's t, on the seeds' log losses in pairs.

    python examples/which_one.py --json which_one.json --out which_one.png
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import experiment
import keras
import keras_tuner
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import small_tasks

import tf_adam_variants as tav

OPTIMIZERS: dict[str, Callable[[Any, float], keras.optimizers.Optimizer]] = {
    "Adam": lambda rate, decay: keras.optimizers.Adam(rate),
    "SGD, momentum": lambda rate, decay: keras.optimizers.SGD(rate, momentum=0.9),
    "AdamW": lambda rate, decay: tav.AdamW(rate, weight_decay=decay),
    "QHAdam": lambda rate, decay: tav.QHAdam(rate),
    "QHAdamW": lambda rate, decay: tav.QHAdamW(rate, weight_decay=decay),
    "LAMB": lambda rate, decay: tav.LAMB(rate, weight_decay=decay),
}
DECAYING = ("AdamW", "QHAdamW", "LAMB")
COLORS = ["#000000", "#999999", "#0072B2", "#D55E00", "#009E73", "#CC79A7"]
TRIALS, SEEDS, TUNING_SEED = 12, 10, 100


def searches(quick: bool, _: pd.DataFrame) -> list[experiment.Trial]:
    return [
        {"task": task, "optimizer": name, "trials": 2 if quick else TRIALS}
        for task in (["tabular"] if quick else small_tasks.TASKS)
        for name in OPTIMIZERS
    ]


def final_trainings(quick: bool, found: pd.DataFrame) -> list[experiment.Trial]:
    return [
        {
            "task": row.task,
            "optimizer": row.optimizer,
            "seed": seed,
            "rate": row.found_rate,
            "decay": row.found_decay,
        }
        for row in found.itertuples()
        for seed in range(2 if quick else SEEDS)
    ]


def run(task: str, optimizer: str, **trial: Any) -> dict[str, Any]:
    """A search, or a final training."""
    problem = small_tasks.TASKS[task]()
    if "trials" in trial:
        return search(problem, optimizer, trial["trials"])
    model = train(problem, optimizer, **trial)
    return {"test": small_tasks.loss_of(problem, model, problem.test)}


def train(problem: small_tasks.Task, optimizer: str, seed: int, rate: float, decay: float) -> keras.Model:
    schedule = keras.optimizers.schedules.CosineDecay(rate, problem.steps)
    return small_tasks.fit(problem, OPTIMIZERS[optimizer](schedule, decay), seed).model


def search(problem: small_tasks.Task, optimizer: str, trials: int) -> dict[str, Any]:
    """KerasTuner's random search over the rate and, where there is one, the decay."""

    space = keras_tuner.HyperParameters()  # declared before, or the first trial would not be random
    low, high = (1e-3, 1.0) if optimizer.startswith("SGD") else (3e-4, 0.1)
    space.Float("rate", low, high, sampling="log")
    if optimizer in DECAYING:
        space.Float("decay", 1e-4, 1.0, sampling="log")

    class Search(keras_tuner.RandomSearch):
        def run_trial(self, trial: Any, **_: Any) -> float:
            found = trial.hyperparameters.values
            model = train(problem, optimizer, TUNING_SEED, found["rate"], found.get("decay", 0.0))
            loss = small_tasks.loss_of(problem, model, problem.validation)
            return min(loss, 1e6)  # KerasTuner fails at an infinite one

    with tempfile.TemporaryDirectory() as folder:
        tuner = Search(objective="loss", max_trials=trials, seed=0, hyperparameters=space, directory=folder)
        tuner.search(verbose=0)
        best = tuner.get_best_hyperparameters()[0].values
    return {"found_rate": best["rate"], "found_decay": best.get("decay", 0.0)}


class Losses(NamedTuple):
    """The test losses of the final trainings."""

    tasks: list[str]
    optimizers: list[str]
    values: np.ndarray  # [task, optimizer, seed]

    @classmethod
    def of(cls, frame: pd.DataFrame) -> Losses:
        own = frame[frame.test.notna()]
        tasks, optimizers = list(own.task.unique()), list(own.optimizer.unique())
        values = own.set_index(["task", "optimizer", "seed"]).test.unstack()
        return cls(tasks, optimizers, np.array([values.loc[task].loc[optimizers] for task in tasks]))

    def relative(self, draw: Any = slice(None)) -> np.ndarray:
        """[task, optimizer]: over the lowest of the task."""
        mean = self.values[..., draw].mean(axis=-1)
        return mean / mean.min(axis=1, keepdims=True)

    def intervals(self, statistic: Callable[[np.ndarray], np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """Of a statistic of the relative losses, when the seeds are drawn again."""
        draws = experiment.resampled(self.values.shape[-1])
        return np.percentile([statistic(self.relative(draw)) for draw in draws], [2.5, 97.5], axis=0)


def overall(relative: np.ndarray) -> np.ndarray:
    """The geometric mean over the tasks, of each optimizer."""
    return np.exp(np.log(relative).mean(axis=0))


def rank(relative: np.ndarray) -> np.ndarray:
    return (1 + relative.argsort(axis=1).argsort(axis=1)).mean(axis=0)


def report(frame: pd.DataFrame) -> str:
    losses = Losses.of(frame)
    relative = losses.relative()
    of_all, ranks = overall(relative), rank(relative)
    low, high = losses.intervals(overall)
    rank_low, rank_high = losses.intervals(rank)
    rows = [
        [
            losses.optimizers[i],
            *(f"{value:.2f}" for value in relative[:, i]),
            f"{of_all[i]:.2f} ({low[i]:.2f} to {high[i]:.2f})",
            f"{ranks[i]:.1f} ({rank_low[i]:.1f} to {rank_high[i]:.1f})",
        ]
        for i in of_all.argsort()
    ]
    best, *others = of_all.argsort()
    logs = np.log(losses.values).mean(axis=0)  # [optimizer, seed]
    alike = [losses.optimizers[i] for i in others if experiment.mean_interval(logs[i] - logs[best])[1] <= 0]
    winners = ", ".join(
        f"{losses.optimizers[int(row.argmin())]} on {task}"
        for task, row in zip(losses.tasks, relative, strict=True)
    )
    conclusion = (
        f"Over all tasks {losses.optimizers[best]} has the lowest relative loss; "
        + (
            f"these seeds cannot tell it from {', '.join(alike)}. "
            if alike
            else "the others are above it, beyond the seeds' doubt. "
        )
        + f"The lowest loss of each task: {winners}."
    )
    return f"{experiment.table(['relative test loss', *losses.tasks, 'all', 'rank'], rows)}\n\n{conclusion}"


def spread(value: np.ndarray, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """Of error bars."""
    return np.maximum([value - low, high - value], 0)


def draw(frame: pd.DataFrame, path: Path) -> None:
    losses = Losses.of(frame)
    relative, (low, high) = losses.relative(), losses.intervals(lambda values: values)
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(12, 4.8), layout="constrained", width_ratios=[3, 1], sharey=False
    )
    count = len(losses.optimizers)
    for i, (name, color) in enumerate(zip(losses.optimizers, COLORS, strict=True)):
        x = np.arange(len(losses.tasks)) + (i - (count - 1) / 2) * 0.12
        value = relative[:, i]
        left.errorbar(
            x, value, spread(value, low[:, i], high[:, i]), fmt="o", color=color, label=name, capsize=3
        )
    left.set_xticks(range(len(losses.tasks)), losses.tasks)
    left.set(ylabel="test loss over the lowest of the task", yscale="log")
    left.yaxis.set_major_formatter("{x:g}")
    left.yaxis.set_minor_formatter("{x:g}")
    left.legend(ncols=2)
    ranks, (low, high) = rank(relative), losses.intervals(rank)
    right.barh(range(count), ranks, xerr=spread(ranks, low, high), color=COLORS, alpha=0.7, capsize=3)
    right.set_yticks(range(count), losses.optimizers)
    right.invert_yaxis()
    right.set(xlabel="mean rank", xlim=(0, count))
    for axes in (left, right):
        axes.grid(alpha=0.3, which="both")
    seeds = losses.values.shape[-1]
    figure.suptitle(f"Six optimizers, tuned alike; seeds: {seeds} (intervals: 95 %, from drawing them again)")
    figure.savefig(path, dpi=110)


EXPERIMENT = experiment.Experiment(experiment.in_processes(run, searches, final_trainings), report, draw)

if __name__ == "__main__":
    experiment.main(EXPERIMENT, __doc__)
