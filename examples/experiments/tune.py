"""KerasTuner chooses an optimizer by its name, with its weight decay and its nu_1.

The search is random, over the four optimizers of this package on scikit-learn's digits, with a small
convolutional network. A hyperparameter that an optimizer does not have is not drawn for it. Each trial is
trained twice, from different weights; its validation loss is the mean of the lowest of each.

    python examples/experiments/tune.py --json tune.json --out tune.png
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import experiment
import keras
import keras_tuner
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import small_tasks
from rich.console import Console
from rich.progress import Progress

import tf_adam_variants  # noqa: F401 - registers the names below

TRIALS, BEST = 60, 8
NUMBERS = ["learning_rate", "weight_decay", "nu_1"]
OPTIMIZERS = ["AdamW", "QHAdam", "QHAdamW", "LAMB"]


def build(hp: keras_tuner.HyperParameters) -> keras.Model:
    """A compiled model with the hyperparameters of a trial."""
    name = hp.Choice("optimizer", OPTIMIZERS)
    config = {"learning_rate": hp.Float("learning_rate", 1e-3, 1e-1, sampling="log")}
    with hp.conditional_scope("optimizer", ["AdamW", "QHAdamW", "LAMB"]):
        if name != "QHAdam":
            config["weight_decay"] = hp.Float("weight_decay", 1e-4, 1.0, sampling="log")
    with hp.conditional_scope("optimizer", ["QHAdam", "QHAdamW"]):
        if name.startswith("QH"):
            config["nu_1"] = hp.Float("nu_1", 0.0, 1.0)
    model = small_tasks.digits_logits()
    model.compile(
        keras.optimizers.get({"class_name": f"tf_adam_variants>{name}", "config": config}),
        small_tasks.crossentropy(),
        metrics=["accuracy"],
    )
    return model


def search(quick: bool, console: Console) -> pd.DataFrame:
    """The trials, the best first: their hyperparameters and validation losses."""
    task, count = small_tasks.images(), 4 if quick else TRIALS
    keras.utils.set_random_seed(0)
    with tempfile.TemporaryDirectory() as directory, Progress(console=console) as progress:
        bar = progress.add_task("trials", total=count)

        class Search(keras_tuner.RandomSearch):
            def on_trial_end(self, trial: Any) -> None:
                super().on_trial_end(trial)
                progress.advance(bar)

        tuner = Search(
            build,
            objective="val_loss",
            max_trials=count,
            executions_per_trial=1 if quick else 2,
            seed=0,
            directory=directory,
        )
        tuner.search(
            *task.train,
            batch_size=task.batch_size,
            epochs=2 if quick else 12,
            validation_data=tuple(task.validation),
            validation_batch_size=len(task.validation.y),
            verbose=0,
        )
        trials = tuner.oracle.get_best_trials(count)
    rows = [trial.hyperparameters.values | {"val_loss": trial.score} for trial in trials]
    return pd.DataFrame(rows, columns=["optimizer", *NUMBERS, "val_loss"])


def report(frame: pd.DataFrame) -> str:
    rows = [
        [
            row.optimizer,
            *(
                "" if pd.isna(value) else f"{value:.2g}"
                for value in (row.learning_rate, row.weight_decay, row.nu_1)
            ),
            f"{row.val_loss:.4f}",
        ]
        for row in frame.head(BEST).itertuples()
    ]
    best = frame.groupby("optimizer").val_loss.agg(["min", "size"]).sort_values("min")
    found = ", ".join(f"{row.Index} {row.min:.4f} of {row.size}" for row in best.itertuples())
    headings = ["optimizer", *(f"`{name}`" for name in NUMBERS), "validation loss"]
    return (
        f"{experiment.table(headings, rows)}\n\n"
        f"The best {len(rows)} of {len(frame)} trials. The lowest loss of each optimizer's trials: {found}."
    )


def draw(frame: pd.DataFrame, path: Path) -> None:
    """Parallel coordinates: a line a trial, from its optimizer to its loss."""
    figure, axes = plt.subplots(figsize=(11, 5), layout="constrained")
    scales = {name: Scale.of(frame[name], logarithmic=name != "nu_1") for name in [*NUMBERS, "val_loss"]}
    rng = np.random.default_rng(0)
    kinds = frame.optimizer.map(OPTIMIZERS.index) / (len(OPTIMIZERS) - 1)
    heights = pd.DataFrame({"optimizer": kinds + rng.uniform(-0.03, 0.03, len(frame))})
    for name, scale in scales.items():
        heights[name] = scale.height(frame[name]).fillna(ABSENT)
    color = plt.get_cmap("viridis_r")
    for i in reversed(range(len(frame))):  # the best are on top
        best = i < BEST
        axes.plot(
            range(heights.shape[1]),
            heights.iloc[i],
            color="#D55E00" if best else color(heights.val_loss.iloc[i]),
            alpha=1 if best else 0.45,
            lw=2 if best else 1,
        )
    for x, name in enumerate(heights):
        axes.axvline(x, color="black", lw=1)
        ticks = enumerate(OPTIMIZERS) if name == "optimizer" else scales[name].ticks()
        for where, label in ticks:
            height = where / (len(OPTIMIZERS) - 1) if name == "optimizer" else where
            axes.text(x - 0.02, height, label, ha="right", va="center", fontsize=9, bbox=WHITE)
        if name in NUMBERS and frame[name].isna().any():
            axes.text(x - 0.02, ABSENT, "none", ha="right", va="center", fontsize=9, bbox=WHITE)
    axes.set_xticks(range(heights.shape[1]), [*[*heights][:-1], "validation loss"])
    axes.set(xlim=(-0.5, heights.shape[1] - 0.95), ylim=(ABSENT - 0.06, 1.06))
    axes.set_yticks([])
    axes.spines[:].set_visible(False)
    axes.set_title(f"{len(frame)} trials of a random search; orange: the best {min(BEST, len(frame))}")
    figure.savefig(path, dpi=110)


ABSENT = -0.15
WHITE = {"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1}


class Scale(NamedTuple):
    """Of an axis from 0 to 1."""

    low: float
    high: float
    logarithmic: bool

    @classmethod
    def of(cls, values: pd.Series, logarithmic: bool) -> Scale:
        known = values.dropna()
        return cls(*(np.log10([known.min(), known.max()]) if logarithmic else (0.0, 1.0)), logarithmic)

    def height(self, values: pd.Series) -> pd.Series:
        values = np.log10(values.astype("float64")) if self.logarithmic else values
        return (values - self.low) / ((self.high - self.low) or 1)

    def ticks(self) -> list[tuple[float, str]]:
        """Five."""
        values = np.linspace(self.low, self.high, 5)
        shown = 10**values if self.logarithmic else values
        return [(i / 4, f"{value:.2g}") for i, value in enumerate(shown)]


EXPERIMENT = experiment.Experiment(search, report, draw)

if __name__ == "__main__":
    experiment.main(EXPERIMENT, __doc__)
