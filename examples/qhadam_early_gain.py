"""Do QHAdam and QHAdamW gain in the early steps, and are their gradient estimates less noisy?

Ma and Yarats ("Quasi-hyperbolic momentum and Adam for deep learning", 2019) average the gradient over a long
time (beta_1 = 0.995) and put in a share of the newest (1 - nu_1 = 0.3). Here QHAdam against Adam, and QHAdamW
against AdamW with the same weight decay, on two small tasks. Each has the learning rate that is best for it
out of the same eight, by the validation loss of three seeds that the report does not use. Rates fall to zero
by a cosine. For each optimizer

    loss            in training, the mean over the first tenth of the steps and over all
    gradient error  |e - G|^2 / |G|^2, the median of 10 points of the training, where e is what the step has
                    instead of the gradient, (1 - nu_1) g + nu_1 m^, for 8 batches drawn anew, and G is the
                    gradient over all examples. Of it, noise is what depends on the batch drawn. The rest is
                    the noise of earlier batches, and lag: m^ is of weights that have moved on
    rates           how many of the eight reach a test loss within a tenth of the best

    python examples/qhadam_early_gain.py --json qhadam_early_gain.json --out qhadam_early_gain.png
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
import tensorflow as tf

import tf_adam_variants as tav

DECAY = 0.1
OPTIMIZERS = {
    "Adam": lambda rate: tav.AdamW(rate, weight_decay=0.0),
    "QHAdam": lambda rate: tav.QHAdam(rate),
    "AdamW": lambda rate: tav.AdamW(rate, weight_decay=DECAY),
    "QHAdamW": lambda rate: tav.QHAdamW(rate, weight_decay=DECAY),
}
RIVALS = {"QHAdam": "Adam", "QHAdamW": "AdamW"}
COLORS = {"Adam": "#000000", "QHAdam": "#D55E00", "AdamW": "#0072B2", "QHAdamW": "#009E73"}
TASKS = ("images", "text")
RATES = [2.0**k for k in range(-10, -2)]
SEEDS, TUNING_SEEDS = 5, 3
PIECES = 20
DRAWS = 8


def trials(quick: bool, _: pd.DataFrame) -> list[experiment.Trial]:
    rates, seeds = (
        (RATES[3:7:3], [0, 100]) if quick else (RATES, [*range(SEEDS), *range(100, 100 + TUNING_SEEDS)])
    )
    return [
        {"task": task, "optimizer": optimizer, "rate": rate, "seed": seed}
        for task in TASKS[: 1 if quick else None]
        for optimizer in OPTIMIZERS
        for rate in rates
        for seed in seeds
    ]


def run(task: str, optimizer: str, rate: float, seed: int) -> dict[str, Any]:
    """Losses, and the errors of the gradient estimates, which are left out where seeds are for tuning."""
    problem = small_tasks.TASKS[task]()
    schedule = keras.optimizers.schedules.CosineDecay(rate, problem.steps)
    estimates = GradientEstimates(problem, seed)
    model, losses = small_tasks.fit(
        problem,
        OPTIMIZERS[optimizer](schedule),
        seed,
        PIECES,
        callbacks=[] if seed >= 100 else [estimates],
    )
    return {
        "losses": losses,
        "validation": small_tasks.loss_of(problem, model, problem.validation),
        "test": small_tasks.loss_of(problem, model, problem.test),
        "error": estimates.error,
        "noise": estimates.noise,
        "batch_error": estimates.batch_error,
    }


class GradientEstimates(keras.callbacks.Callback):
    """How far from the gradient over all examples that is which the next step would use, relative to it."""

    def __init__(self, task: small_tasks.Task, seed: int) -> None:
        super().__init__()
        self._task, self._rng = task, np.random.default_rng(seed)
        self.error: list[float] = []
        self.noise: list[float] = []
        self.batch_error: list[float] = []  # of the batch's gradient itself

    def on_train_begin(self, logs: Any = None) -> None:
        self._gradient = tf.function(self._gradient_of, reduce_retracing=True)

    def _gradient_of(self, x: Any, y: Any) -> Any:
        with tf.GradientTape() as tape:
            loss = self._task.loss(y, self.model(x, training=True))
        return flat(tape.gradient(loss, self.model.trainable_variables))

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        if epoch % 2 == 0:
            return
        x, y = self._task.train
        exact = self._gradient(x, y).numpy()
        drawn = self._rng.integers(len(y), size=(DRAWS, self._task.batch_size))
        gradients = np.stack([self._gradient(x[ids], y[ids]).numpy() for ids in drawn])
        optimizer = self.model.optimizer
        beta, nu = optimizer.beta_1, getattr(optimizer, "nu_1", 1.0)
        momentum = flat([v for v in optimizer.variables if "momentum" in v.path]).numpy()
        moments = (beta * momentum + (1 - beta) * gradients) / (1 - beta ** (int(optimizer.iterations) + 1))
        estimates = (1 - nu) * gradients + nu * moments
        size = square(exact)
        self.error.append(float(np.mean(square(estimates - exact)) / size))
        self.noise.append(float(np.sum(square(estimates - estimates.mean(0))) / (DRAWS - 1) / size))
        self.batch_error.append(float(np.mean(square(gradients - exact)) / size))


def flat(tensors: Any) -> Any:
    return tf.concat([tf.reshape(tf.convert_to_tensor(t), [-1]) for t in tensors], 0)


def square(vectors: np.ndarray) -> Any:
    return np.sum(np.square(vectors), axis=-1)


def tuned(frame: pd.DataFrame) -> pd.DataFrame:
    """The trials of the report's seeds, at the rate that the tuning seeds found best."""
    keys = ["task", "optimizer", "rate"]
    validation = frame[frame.seed >= 100].groupby(keys).validation.mean()
    best = validation.groupby(keys[:2]).idxmin()
    return frame[(frame.seed < 100) & pd.MultiIndex.from_frame(frame[keys]).isin(best)]


def array(frame: pd.DataFrame, column: str) -> np.ndarray:
    """[seed, piece]"""
    return np.array(frame.sort_values("seed")[column].tolist())


EARLY = PIECES // 10


def report(frame: pd.DataFrame) -> str:
    chosen, rows, sentences = tuned(frame), [], []
    for (task, optimizer), own in chosen.groupby(["task", "optimizer"], sort=False):
        losses, error, noise = (array(own, column) for column in ("losses", "error", "noise"))
        final = frame[(frame.task == task) & (frame.optimizer == optimizer) & (frame.seed < 100)]
        final = final.groupby("rate").test.mean()
        rows.append(
            [
                f"{task}, {optimizer}",
                f"{own.rate.iloc[0]:.2g}",
                f"{losses[:, :EARLY].mean():.3f}",
                f"{losses.mean():.3f}",
                f"{own.test.mean():.4f} ± {own.test.std():.4f}",
                f"{np.median(error[:, :1]):.2f} ({np.median(noise[:, :1]):.2f})",
                f"{np.median(error):.2f} ({np.median(noise):.2f})",
                f"{(final < 1.1 * final.min()).sum()}",
            ]
        )
    headings = [
        "", "rate", "loss, first tenth", "loss, all", "test loss",
        "gradient error (noise), first tenth", "the same, all", "rates",
    ]  # fmt: skip
    for new, old in RIVALS.items():
        for task in chosen.task.unique():
            ours, theirs = (
                array(chosen[(chosen.task == task) & (chosen.optimizer == name)], "losses")
                for name in (new, old)
            )
            early, whole = gains(ours[:, :EARLY], theirs[:, :EARLY]), gains(ours, theirs)
            sentences.append(
                f"- {task}, {new} against {old}: {gain_text(early)} in the first tenth, "
                f"{gain_text(whole)} over all steps{share(ours, theirs)}."
            )
    return experiment.table(headings, rows) + "\n\nThe mean training loss:\n\n" + "\n".join(sentences)


def gains(ours: np.ndarray, theirs: np.ndarray) -> tuple[float, float, float]:
    """By how many per cent our mean loss is lower, and the interval over seeds, which are paired."""

    def gain(draw: Any) -> float:
        return 100 * float(1 - ours[draw].mean() / theirs[draw].mean())

    return gain(slice(None)), *experiment.interval(gain(draw) for draw in experiment.resampled(len(ours)))


def gain_text(gain: tuple[float, float, float]) -> str:
    value, low, high = gain
    return f"{abs(value):.1f} % {'lower' if value > 0 else 'higher'} ({-high:+.1f} to {-low:+.1f} %)"


def share(ours: np.ndarray, theirs: np.ndarray) -> str:
    """How much of the gain is in the first tenth, where there is one in both."""
    difference = (theirs - ours).mean(axis=0)
    early, whole = difference[:EARLY].sum(), difference.sum()
    return (
        f"; {100 * early / whole:.0f} % of the gain are in the first tenth" if min(early, whole) > 0 else ""
    )


def draw(frame: pd.DataFrame, path: Path) -> None:
    chosen = tuned(frame)
    tasks = list(chosen.task.unique())
    figure, rows = plt.subplots(
        len(tasks), 3, figsize=(14, 4.2 * len(tasks)), layout="constrained", squeeze=False
    )
    for (loss, error, rates), task in zip(rows, tasks, strict=True):
        for name, color in COLORS.items():
            own = chosen[(chosen.task == task) & (chosen.optimizer == name)]
            style = {
                "color": color,
                "ls": "-" if name in RIVALS else "--",
                "label": f"{name}, rate {own.rate.iloc[0]:.2g}",
            }
            steps = (np.arange(PIECES) + 1) * 100 / PIECES
            losses = array(own, "losses")
            loss.plot(steps, losses.mean(0), **style)
            loss.fill_between(steps, losses.min(0), losses.max(0), color=color, alpha=0.1, lw=0)
            error.plot(steps[1::2], np.median(array(own, "error"), axis=0), **style)
            final = frame[(frame.task == task) & (frame.optimizer == name) & (frame.seed < 100)]
            by_rate = final.groupby("rate").test.mean()
            rates.plot(by_rate.index, by_rate, marker="o", **style)
        batch = np.median(array(chosen[chosen.task == task], "batch_error"), axis=0)
        error.plot(steps[1::2], batch, color="gray", ls=":", label="the batch's gradient")
        loss.set(xlabel="% of the steps", ylabel=f"{task}: training loss", yscale="log")
        loss.axvspan(0, 10, color="gray", alpha=0.15, lw=0)
        error.set(xlabel="% of the steps", ylabel="relative squared error of the gradient", yscale="log")
        rates.set(xlabel="learning rate", ylabel="test loss", xscale="log", yscale="log")
        top = frame[(frame.task == task) & (frame.seed < 100)].groupby(["optimizer", "rate"]).test.mean()
        rates.set_ylim(top=min(top.max(), 10 * top.min()))
        for axes in (loss, error, rates):
            axes.grid(alpha=0.3, which="both")
            axes.legend(fontsize=8)
    figure.suptitle(
        f"QHAdam and QHAdamW at tuned rates; seeds: {chosen.seed.nunique()} (band: lowest to highest)"
    )
    figure.savefig(path, dpi=110)


EXPERIMENT = experiment.Experiment(experiment.in_processes(run, trials), report, draw)

if __name__ == "__main__":
    experiment.main(EXPERIMENT, __doc__)
