"""Which optimizer? Six of them, tuned alike, on four small tasks.

Each optimizer gets the same number of trials of KerasTuner's random search for its learning rate and, where
it has one, its weight decay: two dimensions are harder to search than one. SGD has a range of rates of its
own. All else is at its default, and the rates fall to zero by a cosine. There are four such searches, each
with a seed of its own, by which its trials are judged. What each has found is trained with two other seeds;
their test losses are the report.

    relative loss   the geometric mean of the test losses over that of the best optimizer of the task
    all             the geometric mean over the tasks, over the lowest of the optimizers
    rank            1 to 6 by the loss of a task, the mean over the tasks

In brackets what holds 95 % of 2,000 draws of the searches, with replacement: chance in a search is in there,
four searches are few. An optimizer is alike with the best one where the interval of their log losses'
difference by Student's t, over the searches, holds 0.

    python examples/experiments/which_one.py --json which_one.json --out which_one.png
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
    "SGD with momentum": lambda rate, decay: keras.optimizers.SGD(rate, momentum=0.9),
    "AdamW": lambda rate, decay: tav.AdamW(rate, weight_decay=decay),
    "QHAdam": lambda rate, decay: tav.QHAdam(rate),
    "QHAdamW": lambda rate, decay: tav.QHAdamW(rate, weight_decay=decay),
    "LAMB": lambda rate, decay: tav.LAMB(rate, weight_decay=decay),
}
DECAYING = ("AdamW", "QHAdamW", "LAMB")
COLORS = ["#000000", "#999999", "#0072B2", "#D55E00", "#009E73", "#CC79A7"]
SEARCHES, TRIALS, SEEDS, TUNING_SEED = 4, 8, 2, 100


def searches(quick: bool, _: pd.DataFrame) -> list[experiment.Trial]:
    return [
        {"task": task, "optimizer": name, "search": number, "trials": 1 if quick else TRIALS}
        for task in (["tabular"] if quick else small_tasks.TASKS)
        for name in OPTIMIZERS
        for number in range(2 if quick else SEARCHES)
    ]


def final_trainings(quick: bool, found: pd.DataFrame) -> list[experiment.Trial]:
    return [
        {
            "task": row.task,
            "optimizer": row.optimizer,
            "search": row.search,
            "seed": SEEDS * row.search + number,
            "rate": row.found_rate,
            "decay": row.found_decay,
        }
        for row in found.itertuples()
        for number in range(1 if quick else SEEDS)
    ]


def run(task: str, optimizer: str, search: int, **trial: Any) -> dict[str, Any]:
    """A search, or a final training."""
    problem = small_tasks.TASKS[task]()
    if "trials" in trial:
        return best_of(problem, optimizer, search, trial["trials"])
    model = train(problem, optimizer, **trial)
    return {"test": small_tasks.loss_of(problem, model, problem.test)}


def train(problem: small_tasks.Task, optimizer: str, seed: int, rate: float, decay: float) -> keras.Model:
    schedule = keras.optimizers.schedules.CosineDecay(rate, problem.steps)
    return small_tasks.fit(problem, OPTIMIZERS[optimizer](schedule, decay), seed).model


def best_of(problem: small_tasks.Task, optimizer: str, search: int, trials: int) -> dict[str, Any]:
    """KerasTuner's random search over the rate and, where there is one, the decay."""

    space = keras_tuner.HyperParameters()  # declared before, or the first trial would not be random
    low, high = (1e-3, 1.0) if optimizer.startswith("SGD") else (3e-4, 0.1)
    space.Float("rate", low, high, sampling="log")
    if optimizer in DECAYING:
        space.Float("decay", 1e-4, 1.0, sampling="log")

    class Search(keras_tuner.RandomSearch):
        def run_trial(self, trial: Any, **_: Any) -> float:
            found = trial.hyperparameters.values
            model = train(problem, optimizer, TUNING_SEED + search, found["rate"], found.get("decay", 0.0))
            loss = small_tasks.loss_of(problem, model, problem.validation)
            return min(loss, 1e6)  # KerasTuner fails at an infinite one

    with tempfile.TemporaryDirectory() as folder:
        tuner = Search(
            objective="loss", max_trials=trials, seed=search, hyperparameters=space, directory=folder
        )
        tuner.search(verbose=0)
        best = tuner.get_best_hyperparameters()[0].values
    return {"found_rate": best["rate"], "found_decay": best.get("decay", 0.0)}


class Losses(NamedTuple):
    """The log test losses of the final trainings: of each search the mean."""

    tasks: list[str]
    optimizers: list[str]
    logs: np.ndarray  # [task, optimizer, search]

    @classmethod
    def of(cls, frame: pd.DataFrame) -> Losses:
        own = frame[frame.test.notna()]
        tasks, optimizers = list(own.task.unique()), list(own.optimizer.unique())
        logs = np.log(own.test).groupby([own.task, own.optimizer, own.search]).mean().unstack()
        return cls(tasks, optimizers, np.array([logs.loc[task].loc[optimizers] for task in tasks]))

    def relative(self, draw: Any = slice(None)) -> np.ndarray:
        """[task, optimizer]: over the lowest of the task. `draw` chooses searches."""
        mean = self.logs[..., draw].mean(axis=-1)
        return np.exp(mean - mean.min(axis=1, keepdims=True))

    def intervals(self, statistic: Callable[[np.ndarray], np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """Of a statistic of the relative losses, when the searches are drawn again."""
        draws = experiment.resampled(self.logs.shape[-1])
        return np.percentile([statistic(self.relative(draw)) for draw in draws], [2.5, 97.5], axis=0)

    def best(self) -> list[str]:
        """Of each task, then of all: the best optimizer, and after it those that are alike."""
        found = []
        for logs in [*self.logs, self.logs.mean(axis=0)]:  # [optimizer, search]
            first, *others = logs.mean(axis=1).argsort()
            alike = [i for i in others if experiment.mean_interval(logs[i] - logs[first])[1] <= 0]
            found.append(", ".join(self.optimizers[i] for i in (first, *alike)))
        return found


def overall(relative: np.ndarray) -> np.ndarray:
    """The geometric mean over the tasks of each optimizer, over the lowest."""
    mean = np.exp(np.log(relative).mean(axis=0))
    return mean / mean.min()


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
    *of_tasks, best = losses.best()
    conclusion = experiment.table(
        ["tasks", "lowest loss", "not told apart from it by these searches"],
        [
            [task, *(names.split(", ", 1) if ", " in names else (names, "none"))]
            for task, names in zip(["all", *losses.tasks], [best, *of_tasks], strict=True)
        ],
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
    searches = losses.logs.shape[-1]
    figure.suptitle(
        f"Six optimizers, tuned alike; searches: {searches} (intervals: 95 % of the draws when drawn again)"
    )
    figure.savefig(path, dpi=110)


EXPERIMENT = experiment.Experiment(experiment.in_processes(run, searches, final_trainings), report, draw)

if __name__ == "__main__":
    experiment.main(EXPERIMENT, __doc__)
