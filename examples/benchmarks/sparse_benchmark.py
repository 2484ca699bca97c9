"""What a sparse gradient costs: milliseconds a step and peak memory, and how they grow with the table.

    python examples/benchmarks/sparse_benchmark.py [--json FILE]

A step is `optimizer.apply` on one float32 table of width 64 and 8,192 ids drawn by a Zipf law, under
`tf.function`. First, on a table of 1,000,000 rows, Keras's Adam, this package's optimizers with sparse_update
"exact" and "lazy", pure (fused=False) and, where the kernels are built, fused, and torch.optim.SparseAdam,
where PyTorch is installed (lazy, without decay), take turns in one process (medians; "Keras x" is the ratio).
Then the lazy AdamW step alone, on tables of 100,000 to 4,000,000 rows, each in a process of its own: how much
memory the steps need beyond the table and its slots is the growth of the process's peak while they run.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # read when TensorFlow is imported
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # examples/

import keras
import memory
import numpy as np
import tensorflow as tf
from rich.console import Console
from rich.progress import track
from rich.table import Table

import tf_adam_variants as tav

try:
    import torch
except ImportError:
    torch = None

WIDTH, IDS = 64, 8192
SIZES = (100_000, 300_000, 1_000_000, 4_000_000)
Step = Callable[[], Any]


def gradient(rows: int) -> tuple[tf.IndexedSlices, int]:
    """The slices, and how many different rows they name."""
    rng = np.random.default_rng(0)
    ids = rng.permutation(rows)[np.minimum(rng.zipf(1.2, IDS) - 1, rows - 1)]
    values = tf.constant(rng.normal(size=(IDS, WIDTH)), tf.float32)
    return tf.IndexedSlices(values, tf.constant(ids), (rows, WIDTH)), len(set(ids))


def prepare(make: Callable[[], keras.optimizers.Optimizer], rows: int) -> Step:
    optimizer, table, slices = make(), tf.Variable(tf.zeros((rows, WIDTH))), gradient(rows)[0]
    optimizer.build([table])
    return tf.function(lambda: optimizer.apply([slices], [table]))


def prepare_torch(rows: int) -> Step:
    torch.set_num_threads(os.cpu_count())
    table, slices = torch.zeros((rows, WIDTH), requires_grad=True), gradient(rows)[0]
    ids, values = (torch.tensor(tensor.numpy()) for tensor in (slices.indices, slices.values))
    table.grad = torch.sparse_coo_tensor(ids[None], values, (rows, WIDTH), check_invariants=False)
    optimizer = torch.optim.SparseAdam([table])
    slots = {name: torch.zeros_like(table) for name in ("exp_avg", "exp_avg_sq")}
    optimizer.state[table] = {"step": 0, **slots}  # else the first step makes them
    return optimizer.step


def contestants() -> dict[str, Callable[[int], Step]]:
    """Those that can run here, by name: the rows of the table -> a step."""
    found = {"keras Adam": partial(prepare, keras.optimizers.Adam)}
    for fused in (False, True) if tav.fused.is_available() else (False,):
        how = "fused" if fused else "pure"
        found[f"tav.AdamW exact, {how}"] = partial(prepare, partial(tav.AdamW, fused=fused))
        for ours in tav.AdamW, tav.QHAdamW, tav.LAMB:
            make = partial(ours, sparse_update="lazy", fused=fused)
            found[f"tav.{ours.__name__} lazy, {how}"] = partial(prepare, make)
    if torch:
        found["torch SparseAdam"] = prepare_torch
    return found


def milliseconds(step: Step) -> float:
    begin = time.perf_counter()
    step()
    return 1e3 * (time.perf_counter() - begin)


def alone(name: str, rows: int, rounds: int) -> dict[str, float]:
    """One contestant on one table, in this process."""
    make = contestants()[name]
    milliseconds(make(10))  # TensorFlow's own first-time costs
    step = make(rows)
    times: list[float] = []
    mib = memory.growth(lambda: times.extend(milliseconds(step) for _ in range(rounds)))
    return {"ms": statistics.median(times[2:]), "mib": mib}


def in_its_own_process(name: str, rows: int, rounds: int) -> dict[str, float]:
    command = [sys.executable, __file__, "--alone", name, "--rows", str(rows), "--rounds", str(rounds)]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return json.loads(output.splitlines()[-1])


def markdown(numbers: dict[str, Any]) -> str:
    """The table of docs/benchmarks.md."""
    results = numbers["results"]
    lines = [
        "| | ms a step | Keras's time over it | MiB beyond table and slots |",
        "| --- | ---: | ---: | ---: |",
    ]
    prefixes = {"keras ": "keras.optimizers.", "tav.": "", "torch ": "torch.optim."}
    for name, own in results.items():
        for short, long in prefixes.items():
            name = name.replace(short, long)
        optimizer, _, how = name.partition(" ")
        factor = results["keras Adam"]["ms"] / own["ms"]
        cells = (
            f"`{optimizer}`{f', {how}' if how else ''}",
            shown(own["ms"]),
            shown(factor),
            f"{own['mib']:.0f}",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def shown(number: float) -> str:
    return f"{number:.1f}" if number < 10 else f"{number:.0f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--json", type=Path, help="where to keep the numbers")
    parser.add_argument("--alone", help="only this one, and print its numbers as JSON")
    parser.add_argument("--rows", type=int, default=1_000_000)
    options = parser.parse_args()
    if options.alone:
        print(json.dumps(alone(options.alone, options.rows, options.rounds)))
        return
    console = Console(width=100)
    console.print(f"TensorFlow {tf.__version__}, Keras {keras.__version__}, {os.cpu_count()} CPUs")
    steps = {name: make(options.rows) for name, make in contestants().items()}
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in track(range(options.rounds + 2), "side by side", console=console):
        for name, step in steps.items():
            times[name].append(milliseconds(step))
    medians = {name: statistics.median(own[2:]) for name, own in times.items()}
    rows, named = options.rows, gradient(options.rows)[1]
    table = Table(title=f"{rows:,} x {WIDTH}, {IDS:,} ids that name {named:,} rows", box=None)
    for heading in ("optimizer", "ms", "Keras x", "MiB beyond table and slots"):
        table.add_column(heading, justify="left" if heading == "optimizer" else "right")
    del steps
    results: dict[str, dict[str, float]] = {}
    for name, ms in medians.items():
        mib = in_its_own_process(name, rows, 5)["mib"]
        results[name] = {"ms": ms, "mib": mib}
        table.add_row(name, f"{ms:.2f}", f"{medians['keras Adam'] / ms:.1f}", f"{mib:.0f}")
    console.print(table)
    growth = Table(title="the lazy AdamW step as the table grows", box=None)
    for heading in ("rows", "table MiB", "optimizer", "ms", "MiB beyond table and slots"):
        growth.add_column(heading, justify="right")
    names = [name for name in medians if name.startswith("tav.AdamW lazy")]
    growing: dict[str, dict[str, dict[str, float]]] = {}
    for rows, name in track(list(itertools.product(SIZES, names)), "growing", console=console):
        run = in_its_own_process(name, rows, options.rounds)
        growing.setdefault(name, {})[str(rows)] = run
        numbers = f"{run['ms']:.2f}", f"{run['mib']:.0f}"
        growth.add_row(f"{rows:,}", f"{rows * WIDTH / 2**18:.0f}", name, *numbers)
    console.print(growth)
    if options.json:
        options.json.write_text(json.dumps({"results": results, "growing": growing}, indent=1) + "\n")


if __name__ == "__main__":
    main()
