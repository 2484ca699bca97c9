"""What a training step costs with Keras's optimizer and with ours, and how much of it the optimizer does.

A model is trained several times over from the same weights, on the same batches, by `fit`, as Keras compiles
it on a CPU: a graph, no XLA. The trainings take turns of a few steps in one process (A B C A B C ...), so
that a noisy machine disturbs them alike. One has an optimizer that waits for the gradients and does nothing
with them; what the others take longer is what their optimizers cost.

    ms a step     the median, without the first turn and each turn's first step, which waits for its data
    optimizer ms  the median, over the turns, of how much longer a step takes than with the gradients alone
    share         of the step, in per cent
    first, last   the mean loss of the first and of the last turn; no batch is seen twice
    MiB           how far a process's memory grows in the first turn: activations, gradients, slots,
                  temporaries, and the graph, which is traced then. The weights are there before
    first step s  from the call of `fit` to the end of its first step, traced and compiled; measured once

The last two are each training's in a process of its own; --quick leaves them out.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
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
Numbers = dict[str, float]


class Problem(NamedTuple):
    """What is trained, and by whom.

    `theirs` makes Keras's optimizer, `ours` this package's, of its argument `fused`; `model` makes a compiled
    model of an optimizer, and `batches` a turn's batches of the turn's number.
    """

    title: str
    theirs: Callable[[], keras.optimizers.Optimizer]
    ours: Callable[..., keras.optimizers.Optimizer]
    model: Callable[[keras.optimizers.Optimizer], keras.Model]
    batches: Callable[[int], tf.data.Dataset]
    turns: int


class GradientsAlone(keras.optimizers.Optimizer):
    """Computes the gradients and changes no weight."""

    def __init__(self) -> None:
        super().__init__(learning_rate=0.0)

    def apply(self, grads: Any, trainable_variables: Any = None) -> None:
        # One element of each is used: TensorFlow computes nothing for a control dependency alone.
        values = [g.values if isinstance(g, tf.IndexedSlices) else g for g in grads if g is not None]
        used = tf.add_n([tf.cast(tf.reshape(v, [-1])[0], tf.float32) for v in values])
        self.iterations.assign_add(tf.where(tf.math.is_nan(used), tf.constant(2, tf.int64), 1))


class Turn(NamedTuple):
    loss: float
    first_step: float  # seconds from the call of fit to its end
    milliseconds: list[float]  # of the other steps


class Training:
    """`make` makes a compiled model, with the same weights and the same dropout in every training."""

    def __init__(self, make: Callable[[], keras.Model]) -> None:
        keras.utils.set_random_seed(0)
        self.model = make()
        self.turns: list[Turn] = []

    def take_turn(self, batches: tf.data.Dataset) -> None:
        times, begin = StepTimes(), time.perf_counter()
        loss = self.model.fit(batches, callbacks=[times], shuffle=False, verbose=0).history["loss"][-1]
        seconds, others = time.perf_counter() - begin, times.milliseconds[1:]
        self.turns.append(Turn(loss, seconds - sum(others) / 1e3, others))

    @property
    def step_ms(self) -> float:
        return statistics.median(ms for turn in self.turns[1:] for ms in turn.milliseconds)

    def results(self, alone: Training) -> Numbers:
        step = self.step_ms
        optimizer = statistics.median(
            statistics.median(own.milliseconds) - statistics.median(other.milliseconds)
            for own, other in zip(self.turns[1:], alone.turns[1:], strict=True)
        )
        losses = {"first_loss": self.turns[0].loss, "last_loss": self.turns[-1].loss}
        return {"step_ms": step, "optimizer_ms": optimizer, "share": 100 * optimizer / step} | losses


def models(problem: Problem) -> dict[str, Callable[[], keras.Model]]:
    """A model for each optimizer that can run here, by its name in the table."""
    found: dict[str, Callable[[], keras.optimizers.Optimizer]] = {
        ALONE: GradientsAlone,
        f"keras {type(problem.theirs()).__name__}": problem.theirs,
    }
    for fused in (False, True) if tav.fused.is_available() else (False,):
        name = f"tav.{type(problem.ours(fused=False)).__name__}, fused={fused}"
        found[name] = partial(problem.ours, fused=fused)
    return {name: lambda optimizer=optimizer: problem.model(optimizer()) for name, optimizer in found.items()}


def in_turns(
    makers: dict[str, Callable[[], keras.Model]],
    batches_of: Callable[[int], tf.data.Dataset],
    turns: int,
    progress: Progress,
) -> dict[str, Training]:
    """The trainings of these models by their names, all turns taken."""
    trainings = {name: Training(make) for name, make in makers.items()}
    bar = progress.add_task("", total=turns * len(trainings))
    for turn in range(turns):
        batches = batches_of(turn)
        for name, training in trainings.items():
            progress.update(bar, description=f"turn {turn + 1}, {name}")
            training.take_turn(batches)
            progress.advance(bar)
            if not progress.console.is_terminal:  # bars that move are for terminals, a log needs lines
                progress.console.print(f"turn {turn + 1}, {name}: loss {training.turns[-1].loss:.4f}")
    return trainings


def first_turn(problem: Problem, small: Problem, name: str) -> Numbers:
    """Memory and the first step of one training, in this process."""
    Training(lambda: small.model(GradientsAlone())).take_turn(small.batches(0))  # what happens once a process
    training, batches = Training(models(problem)[name]), problem.batches(0)
    mib = memory.growth(lambda: training.take_turn(batches))
    return {"mib": mib, "first_step_s": training.turns[0].first_step}


def in_its_own_process(name: str) -> Numbers:
    """The first turn of one training, by this same program."""
    done = subprocess.run([sys.executable, sys.argv[0], "--one", name], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{done.stderr}\nExit status {done.returncode}")
    return json.loads(done.stdout.splitlines()[-1])


COLUMNS = {
    "ms a step": "{step_ms:.1f}",
    "optimizer ms": "{optimizer_ms:.1f}",
    "share": "{share:.0f} %",
    "first loss": "{first_loss:.4f}",
    "last loss": "{last_loss:.4f}",
}
OF_A_PROCESS = {"MiB": "{mib:.0f}", "first step s": "{first_step_s:.1f}"}


def table(title: str, results: dict[str, Numbers]) -> Table:
    columns = COLUMNS | (OF_A_PROCESS if "mib" in results[ALONE] else {})
    grid = Table(title=title)
    grid.add_column("optimizer")
    for heading in columns:
        grid.add_column(heading, justify="right")
    for name, own in results.items():
        grid.add_row(name, *(cell.format(**own) for cell in columns.values()))
    return grid


def markdown(numbers: dict[str, Any]) -> str:
    """The table of docs/examples.md."""
    lines = [
        "| | ms a step | of it the optimizer | MiB | first step, s | last loss |",
        f"| --- |{' ---: |' * 5}",
    ]
    for name, own in numbers["results"].items():
        optimizer, _, option = name.replace("keras ", "keras.optimizers.").partition(", ")
        shown, cells = f"`{optimizer}`" + (f", {option}" if option else ""), ["", ""]
        if name == ALONE:
            shown = name
        else:
            ms = own["optimizer_ms"]
            cells = [f"{ms:.{0 if ms >= 10 else 1}f} ({own['share']:.0f} %)", f"{own['last_loss']:.3f}"]
        step, first = f"{own['step_ms']:.0f}", f"{own['first_step_s']:.1f}"
        cells = [shown, step, cells[0], f"{own['mib']:,.0f}", first, cells[1]]
        lines.append("| " + " | ".join(cells).replace("|  |", "| |") + " |")
    return "\n".join(lines).replace("  |", " |")


def main(description: str, problem: Callable[[bool], Problem]) -> None:
    """The command line of an example. `problem` makes it, or with True a small one."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a small model and few steps: under a minute")
    parser.add_argument("--turns", type=int, help="how often each training takes its turn")
    parser.add_argument("--json", type=Path, help="where to keep the numbers")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    tf.config.set_visible_devices([], "GPU")  # the memory measured is the process's own
    asked = problem(options.quick)
    if options.one:
        print(json.dumps(first_turn(asked, problem(True), options.one)))
        return
    asked = asked._replace(turns=options.turns or asked.turns)

    console = Console(width=None if Console().is_terminal else 110)
    console.print(f"TensorFlow {tf.__version__}, Keras {keras.__version__}, {os.cpu_count()} CPUs")
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    results: dict[str, Numbers] = {name: {} for name in models(asked)}
    with Progress(*columns, console=console) as progress:
        if not options.quick:  # before there is much in this process
            for name in progress.track(results, description="each in a process of its own"):
                results[name] = in_its_own_process(name)
        trainings = in_turns(models(asked), asked.batches, asked.turns, progress)
    for name, training in trainings.items():
        results[name] |= training.results(trainings[ALONE])
    console.print(table(asked.title, results))
    if options.json:
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
        options.json.write_text(json.dumps(about | {"results": results}, indent=2) + "\n")
