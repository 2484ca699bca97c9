"""Milliseconds an optimizer step takes, and seconds until the first one has run, beside Keras.

    python examples/benchmark.py
    python examples/benchmark.py --sets resnet50 --modes graph --rounds 51 --markdown

Timed is `optimizer.apply(gradients, variables)` and nothing else, under `tf.function` (mode "graph") and
under `tf.function(jit_compile=True)` (mode "xla"), on two sets of float32 variables: ResNet-50's, and 500
small ones, where the number of operations and variables counts rather than the bytes.

All contestants run in one process and take turns (A B C A B C ...), so that a noisy machine disturbs them
alike: the ratios are worth more than the milliseconds. Each has variables and gradients of its own, and
between two turns of one the others use more memory than caches hold: a step finds its data in memory.
Weight decay is 0.004 in AdamW and QHAdamW (Keras's default), 0.01 in both LAMBs; QHAdam has none.

    ms          the median of the rounds, after warm-up rounds
    floor ms    a perfect step, one that only waits for memory: the bytes that it must move over the
                measured bandwidth. For Adam 28 a parameter: read w, m, v, g; write w, m, v. For LAMB 40:
                the trust ratio needs all of the new m and v, so a second pass reads w, m, v and writes w
    GB/s        those same bytes over the measured time
    first s     the first call of a fresh function: tracing, compiling, one step; a single measurement.
                The slots are made beforehand
    x Keras     ms, or first s, over that of keras.optimizers.AdamW in the same mode; for LAMB, of Lamb

The bandwidth is the row "in-place add": `a.assign_add(b)`, TensorFlow's own multi-threaded addition, on
two tensors of 128 MiB, 12 bytes an element (read a, b; write a). It takes its turn like a contestant.

The functions capture the gradients: as arguments, 500 tensors would cost some 15 ms a call in Python.
A full run takes some 5 minutes on two cores, and 12 GB: what a traced `apply` has captured is not given
back before the process ends (TensorFlow's `all_reduce`, which Keras calls, keeps it).

To add an optimizer, add a row to CONTESTANTS; to add a set of variables, one to SETS.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import time
from collections.abc import Callable, Collection
from functools import partial
from typing import NamedTuple

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # read when TensorFlow is imported

import keras
import numpy as np
import tensorflow as tf
from rich import box
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

import tf_adam_variants as tav

Shapes = list[tuple[int, ...]]
Step = Callable[[], None]


def resnet50() -> Shapes:
    """torchvision's: convolutions without bias, batch norm's gamma and beta after each, a dense layer."""
    convolutions: Shapes = [(64, 3, 7, 7)]
    channels = 64
    for width, blocks in (64, 3), (128, 4), (256, 6), (512, 3):
        convolutions.append((4 * width, channels, 1, 1))  # the shortcut of a stage's first block
        for _ in range(blocks):
            convolutions += [(width, channels, 1, 1), (width, width, 3, 3), (4 * width, width, 1, 1)]
            channels = 4 * width
    return [s for kernel in convolutions for s in (kernel, kernel[:1], kernel[:1])] + [(1000, 2048), (1000,)]


def keras_step(
    optimizer_class: type[keras.optimizers.Optimizer], shapes: Shapes, mode: str, **arguments: float
) -> Step:
    """A fresh function that runs one step of a fresh Keras optimizer on fresh variables."""
    random = np.random.default_rng(0)
    variables = [keras.Variable(random.standard_normal(shape, np.float32)) for shape in shapes]
    gradients = [tf.constant(random.standard_normal(shape, np.float32)) for shape in shapes]
    optimizer = optimizer_class(**arguments)
    optimizer.build(variables)

    @tf.function(jit_compile=mode == "xla")
    def step() -> None:
        optimizer.apply(gradients, variables)

    return step


class Contestant(NamedTuple):
    """One row. `prepare(shapes, mode)` makes variables and gradients and returns a step not yet run."""

    name: str
    prepare: Callable[[Shapes, str], Step]
    rival: str  # the contestant that it is compared with
    bytes_per_parameter: int = 28


KERAS_ADAMW, KERAS_LAMB = "keras AdamW", "keras Lamb"
CONTESTANTS = (
    Contestant(KERAS_ADAMW, partial(keras_step, keras.optimizers.AdamW), KERAS_ADAMW),
    Contestant("tav.AdamW", partial(keras_step, tav.AdamW), KERAS_ADAMW),
    Contestant("tav.QHAdam", partial(keras_step, tav.QHAdam), KERAS_ADAMW),
    Contestant("tav.QHAdamW", partial(keras_step, tav.QHAdamW), KERAS_ADAMW),
    Contestant(KERAS_LAMB, partial(keras_step, keras.optimizers.Lamb, weight_decay=0.01), KERAS_LAMB, 40),
    Contestant("tav.LAMB", partial(keras_step, tav.LAMB, weight_decay=0.01), KERAS_LAMB, 40),
)
SETS: dict[str, Shapes] = {"resnet50": resnet50(), "small": [(64, 64)] * 250 + [(64,)] * 250}
MODES = ("graph", "xla")
WARM_UP_ROUNDS = 3
PROBE, PROBE_ELEMENTS = "in-place add", 2**25


def bandwidth_probe() -> Step:
    a, b = tf.Variable(tf.zeros(PROBE_ELEMENTS)), tf.ones(PROBE_ELEMENTS)

    @tf.function
    def step() -> None:
        a.assign_add(b)

    return step


def seconds(step: Step) -> float:
    start = time.perf_counter()
    step()
    tf.test.experimental.sync_devices()  # a GPU's work is only queued when the call returns
    return time.perf_counter() - start


class Timing(NamedTuple):
    """Seconds."""

    first: float
    step: float


def measure(
    shapes: Shapes, mode: str, probe: Step, rounds: int, advance: Callable[[], None]
) -> dict[str, Timing]:
    for contestant in CONTESTANTS:
        # What TensorFlow does once a process (imports, starting the compiler) is nobody's first step.
        contestant.prepare([(2, 2)], mode)()
    steps = {contestant.name: contestant.prepare(shapes, mode) for contestant in CONTESTANTS}
    steps[PROBE] = probe
    first, times = {}, {name: [] for name in steps}
    for name, step in steps.items():
        first[name] = seconds(step)
        advance()
    for _ in range(WARM_UP_ROUNDS + rounds):
        for name, step in steps.items():
            times[name].append(seconds(step))
        advance()
    return {name: Timing(first[name], statistics.median(times[name][WARM_UP_ROUNDS:])) for name in steps}


def rows(shapes: Shapes, timings: dict[str, Timing]) -> list[list[str]]:
    bandwidth = 12 * PROBE_ELEMENTS / timings[PROBE].step
    cells = [[PROBE, f"{1e3 * timings[PROBE].step:.2f}", "", "", f"{1e-9 * bandwidth:.2f}"]]
    for name, _, rival, bytes_per_parameter in CONTESTANTS:
        (first, step), (rival_first, rival_step) = timings[name], timings[rival]
        moved = bytes_per_parameter * sum(map(math.prod, shapes))
        speed = 1e3 * step, step / rival_step, 1e3 * moved / bandwidth, 1e-9 * moved / step
        cells.append([name, *map("{:.2f}".format, (*speed, first, first / rival_first))])
    return cells


def some_of(known: Collection[str], text: str) -> list[str]:
    names = text.split(",")
    if not set(names) <= set(known):
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of some of {','.join(known)}")
    return names


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=21, help="steps of each contestant (default: 21)")
    parser.add_argument("--sets", type=partial(some_of, SETS), default=SETS, help=",".join(SETS))
    parser.add_argument("--modes", type=partial(some_of, MODES), default=MODES, help=",".join(MODES))
    parser.add_argument("--markdown", action="store_true", help="print a table for GitHub")
    args = parser.parse_args()
    tf.get_logger().setLevel("ERROR")  # it takes many fresh functions for one that is traced again

    print(f"TensorFlow {tf.__version__}, Keras {keras.__version__}, {os.cpu_count()} CPUs", end=", ")
    print(f"medians of {args.rounds} rounds\n", flush=True)
    table = Table(box=box.MARKDOWN if args.markdown else box.SIMPLE_HEAD, show_edge=args.markdown)
    for header in "variables", "mode", "optimizer":
        table.add_column(header)
    for header in "ms", "x Keras", "floor ms", "GB/s", "first s", "x Keras":
        table.add_column(header, justify="right")
    probe = bandwidth_probe()  # one for the whole run: how fast memory is depends on where it lies
    # No refreshing in the background: it would compete with what is timed.
    with Progress(console=Console(stderr=True), auto_refresh=False, transient=True) as progress:
        for name in args.sets:
            for mode in args.modes:
                total = len(CONTESTANTS) + 1 + WARM_UP_ROUNDS + args.rounds
                task = progress.add_task(f"{name}, {mode}", total=total)
                advance = partial(progress.update, task, advance=1, refresh=True)
                timings = measure(SETS[name], mode, probe, args.rounds, advance)
                for cells in rows(SETS[name], timings):
                    table.add_row(name, mode, *cells)
                if not args.markdown:
                    table.add_section()
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
