"""Do QHAdam and QHAdamW gain in the early steps, and are their gradient estimates less noisy?

Ma and Yarats ("Quasi-hyperbolic momentum and Adam for deep learning", 2019) average the gradient over a long
time (beta_1 = 0.995) and put in a share of the newest (1 - nu_1 = 0.3). Here QHAdam against Adam, and QHAdamW
against AdamW with the same weight decay, on two small tasks, 200 steps each. An optimizer has the learning
rate that is best for it out of the same eight, by three seeds that the report does not use: by their training
loss, and for its test loss by their validation loss. Rates fall to zero by a cosine.

    loss            in training, the mean over the first tenth of the steps and over the rest
    gradient error  |e - G|^2 / |G|^2, where e is what the step has instead of the gradient, which is
                    (1 - nu_1) g + nu_1 m^, for 8 batches drawn anew, and G is the gradient over all examples;
                    after a tenth of the steps, and the median of ten such points. Of it, noise is what
                    depends on the batch drawn. The rest is the noise of earlier batches, and lag: m^ is of
                    weights that have moved on
    rates           how many of the eight reach a test loss of at most 1.5 times the task's lowest

    python examples/experiments/qhadam_early_gain.py --json qhadam_early_gain.json --out qhadam_early_gain.png
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


def tuned(frame: pd.DataFrame, by: str) -> pd.DataFrame:
    """The report's seeds, at the rate where "training" or "validation" loss of the tuning seeds is best."""
    keys = ["task", "optimizer", "rate"]
    tuning = frame[frame.seed >= 100]
    loss = tuning.losses.map(np.mean) if by == "training" else tuning.validation
    means = loss.fillna(np.inf).groupby([tuning[key] for key in keys]).mean()
    best = means.groupby(keys[:2]).idxmin()
    return frame[(frame.seed < 100) & pd.MultiIndex.from_frame(frame[keys]).isin(best)]


def of(frame: pd.DataFrame, task: str, optimizer: str) -> pd.DataFrame:
    return frame[(frame.task == task) & (frame.optimizer == optimizer)].sort_values("seed")


def array(frame: pd.DataFrame, column: str) -> np.ndarray:
    """[seed, piece]"""
    return np.array(frame[column].tolist(), "float64")


EARLY = PIECES // 10
GOOD = 1.5


def good_rates(frame: pd.DataFrame, task: str, optimizer: str) -> int:
    """How many rates come near to the lowest test loss of the task."""
    own = frame[(frame.seed < 100) & (frame.task == task)]
    means = own.groupby(["optimizer", "rate"]).test.mean()
    return int((means[optimizer] <= GOOD * means.min()).sum())


def report(frame: pd.DataFrame) -> str:
    by_training, by_validation, rows = tuned(frame, "training"), tuned(frame, "validation"), []
    for task in frame.task.unique():
        for optimizer in OPTIMIZERS:
            own, final = of(by_training, task, optimizer), of(by_validation, task, optimizer)
            losses, error, noise = (array(own, column) for column in ("losses", "error", "noise"))
            rows.append(
                [
                    f"{task}, {optimizer}",
                    f"{own.rate.iloc[0]:.2g}",
                    f"{losses[:, :EARLY].mean():.3f}",
                    f"{losses[:, EARLY:].mean():.3f}",
                    f"{np.median(error[:, 0]):.2f} ({np.median(noise[:, 0]):.2f})",
                    f"{np.median(error):.2f} ({np.median(noise):.2f})",
                    f"{final.rate.iloc[0]:.2g}",
                    f"{final.test.mean():.4f}",
                    f"{good_rates(frame, task, optimizer)}",
                ]
            )
    headings = [
        "", "rate", "loss, first tenth", "loss, rest", "gradient error (noise) at 10 %", "at ten points",
        "rate by validation", "test loss", "rates",
    ]  # fmt: skip
    pairs = [(task, new) for new in RIVALS for task in frame.task.unique()]
    compared = [Comparison.of(by_training, by_validation, *pair) for pair in pairs]
    sentences = [
        f"- {task}, {new} against {RIVALS[new]}: {percent(one.early)} in the first tenth, "
        f"{percent(one.rest)} in the rest; the test loss {percent(one.test)}."
        for (task, new), one in zip(pairs, compared, strict=True)
    ]

    def lower(key: str) -> str:
        found = [getattr(one, key) for one in compared]
        below, above = sum(high < 0 for _, _, high in found), sum(low > 0 for _, low, _ in found)
        return f"lower in {below} and higher in {above}"

    earlier = sum(one.early[0] < one.rest[0] for one in compared)
    rates = ", ".join(
        f"{new} {sum(good_rates(frame, task, new) for task in frame.task.unique())}, "
        f"{rival} {sum(good_rates(frame, task, rival) for task in frame.task.unique())}"
        for new, rival in RIVALS.items()
    )
    conclusion = (
        f"Of {len(pairs)} comparisons, and beyond the seeds' doubt, the quasi-hyperbolic optimizer's "
        f"training loss is {lower('early')} in the first tenth, {lower('rest')} in the rest; its test loss "
        f"is {lower('test')}; its gradient error is {lower('error_early')} after a tenth of the steps, "
        f"{lower('error')} over ten points. The ratio of the training losses is lower in the first tenth "
        f"than in the rest in {earlier}. Good rates, of all tasks together: {rates}."
    )
    compare = "The mean training loss compared, with 95 % intervals by Student's t, of seeds in pairs:"
    return "\n\n".join([experiment.table(headings, rows), compare, "\n".join(sentences), conclusion])


Interval = tuple[float, float, float]


class Comparison(NamedTuple):
    """Of a quasi-hyperbolic optimizer and its rival: log ratios with their intervals."""

    early: Interval
    rest: Interval
    test: Interval
    error_early: Interval
    error: Interval

    @classmethod
    def of(cls, by_training: pd.DataFrame, by_validation: pd.DataFrame, task: str, new: str) -> Comparison:
        ours, theirs = (of(by_training, task, name) for name in (new, RIVALS[new]))
        losses, errors = ((array(ours, key), array(theirs, key)) for key in ("losses", "error"))
        tests = [of(by_validation, task, name).test.to_numpy() for name in (new, RIVALS[new])]
        return cls(
            log_ratio(*(own[:, :EARLY].mean(axis=1) for own in losses)),
            log_ratio(*(own[:, EARLY:].mean(axis=1) for own in losses)),
            log_ratio(*tests),
            log_ratio(*(own[:, 0] for own in errors)),
            log_ratio(*(np.median(own, axis=1) for own in errors)),
        )


def log_ratio(ours: np.ndarray, theirs: np.ndarray) -> Interval:
    return experiment.mean_interval(np.log(ours / theirs))


def percent(logs: Interval) -> str:
    value, low, high = 100 * np.expm1(logs)
    return f"{value:+.1f} % ({low:+.1f} to {high:+.1f} %)"


def draw(frame: pd.DataFrame, path: Path) -> None:
    chosen = tuned(frame, "training")
    tasks = list(chosen.task.unique())
    figure, rows = plt.subplots(
        len(tasks), 3, figsize=(14, 4.2 * len(tasks)), layout="constrained", squeeze=False
    )
    for (loss, error, rates), task in zip(rows, tasks, strict=True):
        for name, color in COLORS.items():
            own = of(chosen, task, name)
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
            final = of(frame[frame.seed < 100], task, name)
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
