"""What the faster step is worth: the loss of real models against seconds, with Keras's optimizers and ours.

    BERT-mini     4 layers of width 256, 30,522 words, as in `bert_classifier.py`: AdamW, LAMB
    ResNet-50     as in `resnet50.py`: AdamW
    two towers    a million users, 200,000 items, as in `two_tower.py`: Adam, with us lazy sparse AdamW

The optimizers of a model take turns of a few steps in one process (A B B A ...), from the same weights and
on the same batches, so that a noisy machine disturbs them alike. All run as Keras runs them on a CPU: a
graph, no XLA. The loss is that in training, where no batch is seen twice: the mean of a turn and of up to
three before it. Printed is for each pair

    a step           milliseconds, and how many times as fast ours is: the median of the seeds' ratios
    last loss        the mean of the seeds after the same steps: whose is lower by step, not by second
    seconds          of the steps until the loss that all trainings of the pair reach, with the first turn, in
                     which the function is traced
    without tracing  the same without the first turn

    python examples/experiments/loss_against_seconds.py --json FILE --out FILE
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # examples/

import bert_classifier
import experiment
import keras
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import resnet50
import tensorflow as tf
import two_tower
from step_times import StepTimes

import tf_adam_variants as tav

Optimizers = dict[str, Callable[[], keras.optimizers.Optimizer]]


class Problem(NamedTuple):
    optimizers: Optimizers  # Keras's and ours by turns: pairs
    model: Callable[[keras.optimizers.Optimizer], keras.Model]
    batches: Callable[[int, int], tf.data.Dataset]  # of a seed and of a turn
    turns: int


def bert(quick: bool) -> Problem:
    size = bert_classifier.FULL._replace(layers=4, heads=4, width=256, length=32, learning_rate=5e-3)
    if quick:
        size = bert_classifier.QUICK
    decay = {"weight_decay": 0.01}
    optimizers: Optimizers = {
        "keras AdamW": partial(keras.optimizers.AdamW, 5e-4, **decay),
        "tav.AdamW": partial(tav.AdamW, 5e-4, **decay),
        "keras Lamb": partial(bert_classifier.keras_lamb, size),
        "tav.LAMB": partial(bert_classifier.lamb, size),
    }
    steps, tokens = 8, bert_classifier.preprocessor(size)

    def model(optimizer: keras.optimizers.Optimizer) -> keras.Model:
        made = bert_classifier.classifier(size, optimizer)
        made.preprocessor = None  # the batches are tokens: nobody's steps wait for them
        return made

    return Problem(
        optimizers,
        model,
        lambda seed, turn: bert_classifier.texts(size, steps, seed=1000 * seed + turn).map(tokens),
        turns=2 if quick else 8,
    )


def resnet(quick: bool) -> Problem:
    size, steps = (resnet50.QUICK if quick else resnet50.FULL), 8
    return Problem(
        {"keras AdamW": partial(resnet50.keras_adamw, size), "tav.AdamW": partial(resnet50.adamw, size)},
        partial(resnet50.classifier, size),
        lambda seed, turn: resnet50.images(size, steps, seed=1000 * seed + turn),
        turns=2 if quick else 4,
    )


def towers(quick: bool) -> Problem:
    size, steps = (two_tower.QUICK if quick else two_tower.FULL), 8
    batches = two_tower.interactions(size)
    turns = size.batches // steps
    return Problem(
        {"keras Adam": two_tower.keras_adam, "tav.AdamW": two_tower.adamw},
        partial(two_tower.two_towers, size),
        # The batches are the same for all seeds, in another order.
        lambda seed, turn: batches.skip((turn + 7 * seed) % turns * steps).take(steps),
        turns=2 if quick else 10,
    )


PROBLEMS = {"BERT-mini": bert, "ResNet-50": resnet, "two towers": towers}


def trials(quick: bool, _: pd.DataFrame) -> list[experiment.Trial]:
    return [
        {"problem": name, "seed": seed, "quick": quick}
        for seed in range(1 if quick else 5)
        for name in ([*PROBLEMS][::2] if quick else PROBLEMS)
    ]


class Training:
    """One optimizer's, with the mean loss and the milliseconds of each turn."""

    def __init__(self, problem: Problem, name: str, seed: int) -> None:
        keras.utils.set_random_seed(seed)
        self.model = problem.model(problem.optimizers[name]())
        self.losses: list[float] = []
        self.milliseconds: list[list[float]] = []

    def take_turn(self, batches: tf.data.Dataset) -> None:
        times = StepTimes()
        history = self.model.fit(batches, callbacks=[times], shuffle=False, verbose=0).history
        self.losses.append(history["loss"][0])
        self.milliseconds.append(times.milliseconds)


def run(problem: str, seed: int, quick: bool) -> dict[str, Any]:
    keras.utils.clear_session()
    asked = PROBLEMS[problem](quick)
    trainings = {name: Training(asked, name, seed) for name in asked.optimizers}
    for turn in range(asked.turns):
        batches = asked.batches(seed, turn).cache()
        for _ in batches:  # nobody waits for them to be made
            pass
        both_ways = list(trainings.values())[
            :: -1 if turn % 2 else 1
        ]  # the first in a turn may have it harder
        for training in both_ways:
            training.take_turn(batches)
    return {
        "optimizers": list(trainings),
        "losses": [one.losses for one in trainings.values()],
        "seconds": [[sum(turn) / 1e3 for turn in one.milliseconds] for one in trainings.values()],
        # The first step traces, the first of a turn waits for its data.
        "step_ms": [
            float(np.median([turn[1:] for turn in one.milliseconds[1:]])) for one in trainings.values()
        ],
    }


class Pair(NamedTuple):
    """Keras's trainings and ours: arrays [seed, turn] of losses and of seconds since the beginning."""

    problem: str
    names: tuple[str, str]
    losses: tuple[np.ndarray, np.ndarray]
    seconds: tuple[np.ndarray, np.ndarray]
    step_ms: tuple[np.ndarray, np.ndarray]

    @property
    def target(self) -> float:
        """The loss that all have reached."""
        return float(max(smooth(losses).min(axis=1).max() for losses in self.losses))

    def seconds_to_target(self, tracing: bool = True) -> tuple[np.ndarray, np.ndarray]:
        """NaN without tracing where the first turn was enough."""
        found = []
        for losses, seconds in zip(self.losses, self.seconds, strict=True):
            reached = (smooth(losses) <= self.target).argmax(axis=1)
            taken = seconds[np.arange(len(seconds)), reached]
            found.append(taken if tracing else np.where(reached > 0, taken - seconds[:, 0], np.nan))
        return tuple(found)


def smooth(losses: np.ndarray) -> np.ndarray:
    """The mean of each turn and up to three before it."""
    return np.array([[row[max(0, i - 3) : i + 1].mean() for i in range(len(row))] for row in losses])


def pairs(frame: pd.DataFrame) -> list[Pair]:
    found = []
    for problem, own in frame.groupby("problem", sort=False):
        names = own.optimizers.iloc[0]
        losses, seconds, step_ms = (np.array(own[key].tolist()) for key in ("losses", "seconds", "step_ms"))
        for i in range(0, len(names), 2):
            found.append(
                Pair(
                    problem,
                    (names[i], names[i + 1]),
                    (losses[:, i], losses[:, i + 1]),
                    (seconds[:, i].cumsum(axis=1), seconds[:, i + 1].cumsum(axis=1)),
                    (step_ms[:, i], step_ms[:, i + 1]),
                )
            )
    return found


def report(frame: pd.DataFrame) -> str:
    rows, sentences = [], []
    for pair in pairs(frame):
        (theirs, ours), (their_ms, our_ms) = pair.seconds_to_target(), pair.step_ms
        faster, steps_faster = theirs / ours, their_ms / our_ms
        faster_then = np.divide(*pair.seconds_to_target(tracing=False))
        last = [smooth(losses)[:, -1].mean() for losses in pair.losses]
        rows.append(
            [
                f"{pair.problem}: {pair.names[0]}, {pair.names[1]}",
                f"{np.median(their_ms):.1f}, {np.median(our_ms):.1f}",
                f"{np.median(steps_faster):.2f}",
                f"{last[0]:.3f}, {last[1]:.3f}",
                f"{pair.target:.3f}",
                f"{np.median(theirs):.1f}, {np.median(ours):.1f}",
                f"{np.median(faster):.2f} ({faster.min():.2f} to {faster.max():.2f})",
                f"{np.median(faster_then):.2f}",
            ]
        )
        sentences.append(f"{pair.problem} with {pair.names[1]} {np.median(faster):.2g}")
    headings = [
        "", "ms a step", "times as fast", "last loss", "target loss", "seconds to it",
        "times as fast (lowest to highest)", "without tracing",
    ]  # fmt: skip
    return (
        experiment.table(headings, rows)
        + f"\n\nTo the same loss, times as fast as with Keras's optimizer: {', '.join(sentences)}."
    )


def draw(frame: pd.DataFrame, path: Path) -> None:
    all_pairs = pairs(frame)
    figure, row = plt.subplots(1, len(all_pairs), figsize=(4.2 * len(all_pairs), 4), layout="constrained")
    for axes, pair in zip(row, all_pairs, strict=True):
        for name, losses, seconds, color in zip(
            pair.names, pair.losses, pair.seconds, ("#000000", "#D55E00"), strict=True
        ):
            for one, own in zip(smooth(losses), seconds, strict=True):
                axes.plot(own, one, color=color, alpha=0.25, lw=1)
            axes.plot(seconds.mean(axis=0), smooth(losses).mean(axis=0), color=color, lw=2, label=name)
        axes.axhline(pair.target, color="gray", ls=":", lw=1)
        axes.set(title=pair.problem, xlabel="seconds", ylabel="training loss", yscale="log", xlim=0)
        axes.grid(alpha=0.3, which="both")
        axes.legend()
    seeds = len(all_pairs[0].step_ms[0])
    figure.suptitle(f"Loss against seconds; seeds: {seeds} (thin lines), dotted: the loss that all reach")
    figure.savefig(path, dpi=110)


EXPERIMENT = experiment.Experiment(experiment.in_processes(run, trials, processes=1), report, draw)

if __name__ == "__main__":
    experiment.main(EXPERIMENT, __doc__)
