"""What a training step costs with Keras's optimizer and with ours, and how much of it the optimizer does.

A model is trained several times over from the same weights, on the same batches, by `fit`, as Keras compiles
it on a CPU: a graph, no XLA. The trainings take turns of a few steps in one process (A B C A B C ...), so
that a noisy machine disturbs them alike. One has an optimizer that waits for the gradients and does nothing
with them; what the others take longer is what their optimizers cost.

    ms a step     the median, without the first turn and each turn's first step, which waits for its data
    optimizer ms  the median, over the turns, of how much longer a step takes than with the gradients alone
    share         of the step, in per cent
    MiB           how far the process's memory grows in the first turn: activations, gradients, slots,
                  temporaries, and the graph, which is traced then. The weights are there before
    first step s  from the call of `fit` to the end of its first step; a single measurement
    first, last   the mean loss of the first and of the last turn; no batch is seen twice
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import keras
import memory
import tensorflow as tf
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from step_times import StepTimes

import tf_adam_variants as tav

ALONE = "the gradients alone"
MakeOptimizer = Callable[..., keras.optimizers.Optimizer]


class Problem(NamedTuple):
    """What is trained: a compiled model by its optimizer, a turn's batches by the turn's number."""

    title: str
    model: Callable[[keras.optimizers.Optimizer], keras.Model]
    batches: Callable[[int], tf.data.Dataset]
    turns: int


class GradientsAlone(keras.optimizers.Optimizer):
    """Waits for the gradients and changes no weight."""

    def __init__(self) -> None:
        super().__init__(learning_rate=0.0)

    def apply(self, grads: Any, trainable_variables: Any = None) -> None:
        with tf.control_dependencies(list(grads)):
            self.iterations.assign_add(1)


class Turn(NamedTuple):
    loss: float
    first_step: float  # seconds from the call of fit to its end
    milliseconds: list[float]  # of the other steps


class Training:
    def __init__(self, problem: Problem, optimizer: keras.optimizers.Optimizer) -> None:
        keras.utils.set_random_seed(0)  # the same weights and the same dropout in every training
        self.model = problem.model(optimizer)
        self.turns: list[Turn] = []
        self.mib = 0.0

    def take_turn(self, batches: tf.data.Dataset) -> None:
        times, begin = StepTimes(), time.perf_counter()
        loss = self.model.fit(batches, callbacks=[times], shuffle=False, verbose=0).history["loss"][-1]
        seconds, others = time.perf_counter() - begin, times.milliseconds[1:]
        self.turns.append(Turn(loss, seconds - sum(others) / 1e3, others))

    def take_first_turn(self, batches: tf.data.Dataset) -> None:
        self.mib = memory.growth(partial(self.take_turn, batches))

    def results(self, alone: Training) -> dict[str, float]:
        step, longer = (
            statistics.median(values)
            for values in (
                [ms for turn in self.turns[1:] for ms in turn.milliseconds],
                [
                    statistics.median(own.milliseconds) - statistics.median(other.milliseconds)
                    for own, other in zip(self.turns[1:], alone.turns[1:], strict=True)
                ],
            )
        )
        return {
            "step_ms": step,
            "optimizer_ms": longer,
            "share": 100 * longer / step,
            "mib": self.mib,
            "first_step_s": self.turns[0].first_step,
            "first_loss": self.turns[0].loss,
            "last_loss": self.turns[-1].loss,
        }


def compare(problem: Problem, optimizers: dict[str, MakeOptimizer], console: Console) -> dict[str, Training]:
    """The trainings by their optimizers' names, all turns taken."""
    trainings: dict[str, Training] = {}
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("", total=problem.turns * len(optimizers))
        for turn in range(problem.turns):
            batches = problem.batches(turn)
            for name, optimizer in optimizers.items():
                progress.update(bar, description=f"turn {turn + 1}, {name}")
                if turn == 0:
                    trainings[name] = Training(problem, optimizer())
                    trainings[name].take_first_turn(batches)
                else:
                    trainings[name].take_turn(batches)
                progress.advance(bar)
                if not console.is_terminal:  # bars that move are for terminals, a log needs lines
                    console.print(f"turn {turn + 1}, {name}: loss {trainings[name].turns[-1].loss:.4f}")
    return trainings


def table(title: str, results: dict[str, dict[str, float]]) -> Table:
    grid = Table(title=title)
    grid.add_column("optimizer")
    for heading in "ms a step", "optimizer ms", "share", "MiB", "first step s", "first loss", "last loss":
        grid.add_column(heading, justify="right")
    for name, own in results.items():
        ms, longer, share, mib, first_step, *losses = own.values()
        optimizer = ("", "") if name == ALONE else (f"{longer:.1f}", f"{share:.0f} %")
        losses = ("", "") if name == ALONE else (f"{loss:.4f}" for loss in losses)
        grid.add_row(name, f"{ms:.1f}", *optimizer, f"{mib:.0f}", f"{first_step:.1f}", *losses)
    return grid


def main(
    description: str, problem: Callable[[bool], Problem], theirs: MakeOptimizer, ours: MakeOptimizer
) -> None:
    """The command line of an example.

    Args:
        description: what `--help` prints.
        problem: makes the problem, or with True a small one.
        theirs: makes Keras's optimizer.
        ours: makes this package's, of its argument `fused`.
    """
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a small model and few steps: under a minute")
    parser.add_argument("--turns", type=int, help="how often each training takes its turn")
    parser.add_argument("--out", type=Path, help="where to write the numbers as JSON")
    options = parser.parse_args()
    tf.config.set_visible_devices([], "GPU")  # the memory measured is the process's own
    console = Console(width=None if Console().is_terminal else 110)

    small, asked = problem(True), problem(options.quick)
    if options.turns:
        asked = asked._replace(turns=options.turns)
    optimizers = {ALONE: GradientsAlone, f"keras {theirs().__class__.__name__}": theirs}
    for fused in (False, True) if tav.fused.is_available() else (False,):
        name = f"{type(ours(fused=False)).__name__}, fused={fused}"
        optimizers[f"tav.{name}"] = partial(ours, fused=fused)
    console.print(f"TensorFlow {tf.__version__}, Keras {keras.__version__}, {os.cpu_count()} CPUs")
    Training(small, GradientsAlone()).take_turn(
        small.batches(0).take(1)
    )  # what happens once a process has happened then
    trainings = compare(asked, optimizers, console)
    results = {name: training.results(trainings[ALONE]) for name, training in trainings.items()}
    console.print(table(asked.title, results))
    if options.out:
        weights = trainings[ALONE].model.trainable_variables
        about = {
            "problem": asked.title,
            "quick": options.quick,
            "turns": asked.turns,
            "steps_a_turn": 1 + len(trainings[ALONE].turns[0].milliseconds),
            "variables": len(weights),
            "parameters": sum(int(tf.size(w)) for w in weights),
            "cpus": os.cpu_count(),
            "versions": {module.__name__: module.__version__ for module in (tf, keras, tav)},
        }
        options.out.write_text(json.dumps(about | {"results": results}, indent=2) + "\n")
