"""Milliseconds of an optimizer's step, seconds of the first one, and memory, compared with other libraries.

    python -m tf_adam_variants.fused build
    python examples/benchmarks/benchmark.py
    python examples/benchmarks/benchmark.py --sets resnet50 --rules AdamW LAMB --no-memory --json numbers.json

Timed is one update of all variables, float32 on the CPU, by a rule (AdamW, QHAdamW, LAMB), of a set:
BERT-base's 199 variables, ResNet-50's 161, or 500 small ones, where operations count rather than bytes.
The contestants of a set and a rule run in one process and take turns (A B C A B C ...), so that a noisy
machine disturbs them alike. Before each turn 256 MiB of something else are read: a step finds its data in
memory, not in a cache. Each contestant has slots of its own, made beforehand. All have the same gradients,
and TensorFlow's contestants the same weights. Functions capture the gradients: 500 arguments would cost 15 ms
a call in Python.

    Keras              keras.optimizers.AdamW, for LAMB Lamb, in a tf.function, without and with jit_compile;
                       with QHAdamW, which Keras does not have, its AdamW
    pure, fused        this package's optimizer with fused=False and with fused=True
    ResourceApplyAdam  TensorFlow's kernel after an assign_sub for the decay: two ops a variable, no Keras
    torch              torch.optim.AdamW(fused=True)                 where PyTorch is installed
    optax              adamw and lamb, jax.jit with donated buffers  where JAX and optax are installed
    C loop             plain_loop.c, the floor                       where there is a C compiler with OpenMP

    ms         the median of the rounds, after warm-up rounds
    x Keras    how many times faster than Keras in a graph
    % floor    of the C loop's speed
    GB/s       the bytes a step must move over the time: 28 a parameter (read w, m, v, g; write w, m, v), LAMB
               40 (no w can be written before the norm of all u is known: w, m and v are read once more)
    first s    the first call: tracing, compiling, one step; a single measurement
    MiB        how far the process's memory grows in the first three steps, tracing and compiling included;
               weights, gradients and slots are there before. Each contestant in a process of its own

First of all, every contestant takes three steps with small variables and must end at this package's weights,
so that none does less work. Keras's are given more room: AdamW for its other epsilon, Lamb for its decay
outside the trust ratio. (Next to QHAdamW, Keras's AdamW is another rule and is not compared.)

A full run takes some 40 minutes on two cores, much less with --no-memory, and 16 GB.
"""

from __future__ import annotations

import argparse
import ctypes
import functools
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

# OpenMP's threads, the C loop's and PyTorch's, spin some milliseconds by default while they wait for more
# work: the next contestant would find a processor taken.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # read when TensorFlow is imported
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # examples/

import keras
import memory
import numpy as np
import shapes
import tensorflow as tf
from rich import box
from rich.console import Console
from rich.table import Table

import tf_adam_variants as tav

try:
    import torch
except ImportError:
    torch = None
try:
    import jax
    import optax
except ImportError:
    jax = None

Floats = dict[str, float]
FLOOR = "C loop"
WARM_UP_ROUNDS = 3


SETS = {"bert-base": shapes.bert(), "resnet50": shapes.resnet50(), "small": shapes.small()}


class Rule(NamedTuple):
    hyperparameters: Floats
    ours: type[keras.optimizers.Optimizer]
    keras: type[keras.optimizers.Optimizer]
    keras_tolerance: float
    bytes_per_parameter: int = 28
    nu_1: float = 1.0


HYPERPARAMETERS = {
    "learning_rate": 1e-3,
    "weight_decay": 0.004,
    "beta_1": 0.9,
    "beta_2": 0.999,
    "epsilon": 1e-8,
}
RULES = {
    "AdamW": Rule(HYPERPARAMETERS, tav.AdamW, keras.optimizers.AdamW, 3e-3),
    "QHAdamW": Rule(HYPERPARAMETERS, tav.QHAdamW, keras.optimizers.AdamW, math.inf, nu_1=0.7),
    "LAMB": Rule(
        HYPERPARAMETERS | {"weight_decay": 0.01, "epsilon": 1e-6}, tav.LAMB, keras.optimizers.Lamb, 3e-2, 40
    ),
}
TOLERANCE = 1e-3  # of the weights' change: float32 comes to 1e-4, a step without decay would to 1e-2


class Model:
    def __init__(self, shapes: shapes.Shapes) -> None:
        random = np.random.default_rng(0)
        self.variables = [keras.Variable(random.standard_normal(shape, np.float32)) for shape in shapes]
        self.gradients = [tf.constant(random.standard_normal(shape, np.float32)) for shape in shapes]


class Contestant(NamedTuple):
    """Its slots are made, its step is not yet run."""

    step: Callable[[], Any]  # returns when it is done
    weights: Callable[[], list[np.ndarray]]


def with_keras(make: Callable[[], keras.optimizers.Optimizer], mode: str, model: Model) -> Contestant:
    optimizer = make()
    optimizer.build(model.variables)

    def step() -> None:
        optimizer.apply(model.gradients, model.variables)

    if mode != "eager":
        step = tf.function(step, jit_compile=mode == "XLA")
    return Contestant(step, lambda: [v.numpy() for v in model.variables])


def with_resource_apply_adam(hyperparameters: Floats, model: Model) -> Contestant:
    rate, decay, beta_1, beta_2, epsilon = hyperparameters.values()
    iterations = tf.Variable(0, dtype=tf.int64)
    variables = [v.value for v in model.variables]
    momentums, velocities = ([tf.Variable(tf.zeros_like(v)) for v in variables] for _ in "mv")

    @tf.function
    def step() -> None:
        t = tf.cast(iterations.assign_add(1), tf.float64)
        root = tf.sqrt(-tf.math.expm1(t * math.log(beta_2)))
        lr = tf.cast(rate * root / -tf.math.expm1(t * math.log(beta_1)), tf.float32)
        eps = tf.cast(epsilon * root, tf.float32)
        betas = {"beta1": beta_1, "beta2": beta_2, "beta1_power": 0.0, "beta2_power": 0.0}
        for w, m, v, g in zip(variables, momentums, velocities, model.gradients, strict=True):
            w.assign_sub(rate * decay * w)
            handles = {"var": w.handle, "m": m.handle, "v": v.handle}
            tf.raw_ops.ResourceApplyAdam(**handles, **betas, lr=lr, epsilon=eps, grad=g)

    return Contestant(step, lambda: [v.numpy() for v in variables])


def with_torch(hyperparameters: Floats, model: Model) -> Contestant:
    torch.set_num_threads(os.cpu_count())
    warnings.filterwarnings("ignore", "The given NumPy array is not writable")  # gradients are not written
    rate, decay, *betas, epsilon = hyperparameters.values()
    weights = [torch.tensor(v.numpy(), requires_grad=True) for v in model.variables]
    optimizer = torch.optim.AdamW(weights, rate, betas, epsilon, decay, fused=True)
    for w, gradient in zip(weights, model.gradients, strict=True):
        w.grad = torch.from_numpy(memory_of(gradient))
        slots = {name: torch.zeros_like(w) for name in ("exp_avg", "exp_avg_sq")}
        optimizer.state[w] = {"step": torch.tensor(0.0), **slots}
    return Contestant(optimizer.step, lambda: [w.detach().numpy() for w in weights])


def with_optax(rule_name: str, hyperparameters: Floats, model: Model) -> Contestant:
    rate, decay, *betas, epsilon = hyperparameters.values()
    optimizer = getattr(optax, rule_name.lower())(rate, *betas, epsilon, weight_decay=decay)
    weights = [jax.numpy.array(v.numpy()) for v in model.variables]
    gradients = [jax.dlpack.from_dlpack(gradient) for gradient in model.gradients]
    now = weights, jax.block_until_ready(jax.jit(optimizer.init)(weights))

    @partial(jax.jit, donate_argnums=(0, 1))
    def update(weights: Any, state: Any, gradients: Any) -> Any:
        updates, state = optimizer.update(gradients, state, weights)
        return optax.apply_updates(weights, updates), state

    def step() -> None:
        nonlocal now
        now = jax.block_until_ready(update(*now, gradients))

    return Contestant(step, lambda: [np.asarray(w) for w in now[0]])


def with_plain_loop(rule_name: str, model: Model) -> Contestant:
    rule, loop = RULES[rule_name], getattr(plain_loops(), rule_name.lower())
    rate, decay, beta_1, beta_2, epsilon = rule.hyperparameters.values()
    adam_rate = 1.0 if rule_name == "LAMB" else rate  # LAMB's rate waits for the trust ratio
    # Tensors, because NumPy takes its memory in larger pages than the others do.
    weights = [tf.constant(v.numpy()) for v in model.variables]
    slots = ([tf.constant(np.zeros_like(v)) for v in model.variables] for _ in "mv")
    sizes = (ctypes.c_long * len(weights))(*(math.prod(w.shape) for w in weights))
    kept = weights, *slots, model.gradients  # by the step, which knows only addresses
    arrays = [(ctypes.c_void_p * len(sizes))(*(memory_of(t).ctypes.data for t in row)) for row in kept]
    t = 0

    def step() -> None:
        nonlocal t
        t += 1
        root = math.sqrt(1 - beta_2**t)
        momentum, gradient = rule.nu_1 / (1 - beta_1**t), 1 - rule.nu_1
        direction = adam_rate * root * momentum, adam_rate * root * gradient, root * epsilon
        s = 1 - beta_1, 1 - beta_2, *direction, adam_rate * decay, rate
        loop(len(kept[0]), sizes, *arrays, (ctypes.c_float * len(s))(*s))

    return Contestant(step, lambda: [memory_of(t) for t in kept[0]])


@functools.cache
def plain_loops() -> ctypes.CDLL | None:
    """plain_loop.c, compiled; no flag changes more than rounding. None where it cannot be."""
    source = Path(__file__).with_name("plain_loop.c")
    flags = ["-std=c11", "-O3", "-march=native", "-fno-math-errno", "-fopenmp", "-shared", "-fPIC"]
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder, "plain_loop.so")
        try:
            subprocess.run([os.environ.get("CC", "cc"), *flags, source, "-o", library, "-lm"], check=True)
            return ctypes.CDLL(str(library))
        except (OSError, subprocess.CalledProcessError):
            return None


def memory_of(tensor: tf.Tensor) -> np.ndarray:
    return np.asarray(memoryview(tensor))  # .numpy() would copy


def contestants(rule_name: str) -> dict[str, Callable[[Model], Contestant]]:
    """Those that can run here, by their names in the table. The first is everybody's rival."""
    rule = RULES[rule_name]
    adam, theirs = rule_name == "AdamW", partial(rule.keras, **rule.hyperparameters)
    nus = {"nu_1": rule.nu_1} if rule.nu_1 != 1 else {}
    pure, fused = (partial(rule.ours, **rule.hyperparameters, **nus, fused=fused) for fused in (False, True))
    # Each: its name, what the machine must have, prepare.
    rows = [
        (f"Keras {rule.keras.__name__}, graph", True, partial(with_keras, theirs, "graph")),
        (f"Keras {rule.keras.__name__}, XLA", True, partial(with_keras, theirs, "XLA")),
        ("pure, graph", True, partial(with_keras, pure, "graph")),
        ("pure, XLA", True, partial(with_keras, pure, "XLA")),
        ("fused, graph", tav.fused.is_available(), partial(with_keras, fused, "graph")),
        ("fused, eager", tav.fused.is_available(), partial(with_keras, fused, "eager")),
        ("ResourceApplyAdam, graph", adam, partial(with_resource_apply_adam, rule.hyperparameters)),
        ("torch, fused", adam and torch, partial(with_torch, rule.hyperparameters)),
        ("optax, jit", jax and not nus, partial(with_optax, rule_name, rule.hyperparameters)),
        (FLOOR, plain_loops(), partial(with_plain_loop, rule_name)),
    ]
    return {name: prepare for name, possible, prepare in rows if possible}


def check(rule: Rule, prepares: dict[str, Callable[[Model], Contestant]]) -> None:
    """Three steps, the gradients changing under way, must take everybody to the same weights."""
    shapes, end = [(3, 3, 8, 16), (1000,), (7,), (64, 33)], {}
    for name, prepare in prepares.items():
        model, random = Model(shapes), np.random.default_rng(1)
        contestant = prepare(model)
        for _ in range(3):
            for gradient in model.gradients:  # at the address where everybody reads it
                new = random.standard_normal(gradient.shape, np.float32)
                ctypes.memmove(memory_of(gradient).ctypes.data, new.ctypes.data, new.nbytes)
            contestant.step()
        end[name] = np.concatenate([np.ravel(w) for w in contestant.weights()])
    begin = np.concatenate([np.ravel(v) for v in Model(shapes).variables])
    for name, weights in end.items():
        off = np.abs(weights - end["pure, graph"]).max() / np.abs(end["pure, graph"] - begin).max()
        if not off <= (rule.keras_tolerance if name.startswith("Keras") else TOLERANCE):
            raise SystemExit(f"{name} takes another step than this package's optimizer: off by {off:.1e}")


def seconds(step: Callable[[], Any]) -> float:
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def measure(set_name: str, rule_name: str, rounds: int) -> dict[str, Floats]:
    """All contestants, in this process."""
    prepares = contestants(rule_name)
    check(RULES[rule_name], prepares)  # what happens once a process has happened then, too
    model = Model(SETS[set_name])
    steps = {name: prepare(model).step for name, prepare in prepares.items()}
    results = {name: {"first": seconds(step)} for name, step in steps.items()}
    times: dict[str, list[float]] = {name: [] for name in steps}
    elsewhere = np.ones(2**26, np.float32)  # larger than caches are
    for _ in range(WARM_UP_ROUNDS + rounds):
        for name, step in steps.items():
            elsewhere.max()
            times[name].append(seconds(step))
    for name, own in times.items():
        results[name]["ms"] = 1e3 * statistics.median(own[WARM_UP_ROUNDS:])
    return results


def mebibytes(set_name: str, rule_name: str, name: str) -> float:
    """One contestant, in this process."""
    prepare = contestants(rule_name)[name]
    prepare(Model([(2, 2)])).step()  # what happens once a process
    step = prepare(Model(SETS[set_name])).step
    return memory.growth(lambda: [step() for _ in range(3)])


def in_its_own_process(set_name: str, rule_name: str, what: str) -> Any:
    """`what` is the number of rounds for all contestants, or the one whose memory is measured."""
    print(f"{time.strftime('%X')} {set_name}, {rule_name}: {what}", file=sys.stderr, flush=True)
    command = [sys.executable, __file__, "--one", set_name, rule_name, what]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{done.stderr}\nExit status {done.returncode}")
    return json.loads(done.stdout.splitlines()[-1])


def table(results: dict[str, Floats], megabytes: float) -> Table:
    """The measured, and what follows from it where a step moves so many megabytes."""
    rival, floor = next(iter(results.values()))["ms"], results.get(FLOOR, {"ms": math.nan})["ms"]
    grid = Table(box=box.SIMPLE_HEAD, show_edge=False)
    grid.add_column("contestant", min_width=24)
    for header in "ms", "x Keras", "% floor", "GB/s", "first s", "MiB":
        grid.add_column(header, justify="right", min_width=7)
    for name, result in results.items():
        ms, mib = result["ms"], f"{result['mib']:.0f}" if "mib" in result else ""
        speed = f"{ms:.2f}", f"{rival / ms:.2f}", f"{100 * floor / ms:.0f}", f"{megabytes / ms:.1f}"
        grid.add_row(name, *speed, f"{result['first']:.2f}", mib)
    return grid


def keep(path: Path, set_name: str, rule_name: str, results: dict[str, Floats]) -> None:
    numbers = json.loads(path.read_text()) if path.exists() else {}
    numbers.setdefault(set_name, {})[rule_name] = results
    path.write_text(json.dumps(numbers, indent=1) + "\n")


ROWS = {  # of the tables of the docs: a row's name, and those of the contestants
    "Keras, graph": ("Keras AdamW, graph", "Keras Lamb, graph"),
    "Keras, XLA": ("Keras AdamW, XLA", "Keras Lamb, XLA"),
    "**fused, graph**": ("fused, graph",),
    "fused, eager": ("fused, eager",),
    "pure, graph": ("pure, graph",),
    "pure, XLA": ("pure, XLA",),
    "`ResourceApplyAdam` a variable": ("ResourceApplyAdam, graph",),
    "torch, fused": ("torch, fused",),
    "optax, jit": ("optax, jit",),
    FLOOR: (FLOOR,),
}
SUMMARY = {
    "Keras, graph": "Keras, graph",
    "Keras, XLA": "Keras, XLA",
    "**fused, graph**": "**ours with fused kernels**",
    "pure, graph": "ours without them, graph",
    "torch, fused": "torch, fused",
    "optax, jit": "optax, jit",
    FLOOR: FLOOR,
}
SUMMARY_COLUMNS = {
    "BERT-base, AdamW": ("bert-base", "AdamW"),
    "BERT-base, LAMB": ("bert-base", "LAMB"),
    "ResNet-50, AdamW": ("resnet50", "AdamW"),
    "ResNet-50, LAMB": ("resnet50", "LAMB"),
    "500 small, AdamW": ("small", "AdamW"),
}


def markdown(numbers: dict[str, dict[str, dict[str, Floats]]], part: str) -> str:
    """A table of the docs: that of a set, or the summary."""
    if part == "summary":
        return summary(numbers)
    rules = numbers[part]
    with_floor = part != "small"  # where the loop is done before the others have begun
    headings = ["ms", "x", *(["%"] if with_floor else []), "first"]
    columns = [f"{rule} ms" if heading == "ms" else heading for rule in rules for heading in headings]
    lines = [f"| | {' | '.join(columns)} |", f"| --- |{' ---: |' * len(columns)}"]
    for row in ROWS:
        if row == FLOOR and not with_floor:
            continue
        cells = []
        for results in rules.values():
            rival, own = find(results, "Keras, graph"), find(results, row)
            if not own:
                cells += [""] * len(headings)
                continue
            floor = [f"{100 * results[FLOOR]['ms'] / own['ms']:.0f}"] if with_floor else []
            cells += [
                shown(own["ms"], part),
                f"{rival['ms'] / own['ms']:.1f}",
                *floor,
                f"{own['first']:.1f}",
            ]
        bold = "**" * row.startswith("**")
        lines.append(
            f"| {row} | " + " | ".join(f"{bold}{cell}{bold}" if cell else "" for cell in cells) + " |"
        )
    return "\n".join(lines).replace("|  |", "| |").replace("|  |", "| |")


def summary(numbers: dict[str, dict[str, dict[str, Floats]]]) -> str:
    lines = [f"| | {' | '.join(SUMMARY_COLUMNS)} |", f"| --- |{' ---: |' * len(SUMMARY_COLUMNS)}"]
    for row, name in SUMMARY.items():
        cells = []
        for set_name, rule_name in SUMMARY_COLUMNS.values():
            results = numbers[set_name][rule_name]
            rival, own = find(results, "Keras, graph"), find(results, row)
            if not own or (row == FLOOR and set_name == "small"):
                cells.append("")
                continue
            factor = "" if own is rival else f" ({rival['ms'] / own['ms']:.1f})"
            bold = "**" * row.startswith("**")
            cells.append(f"{bold}{shown(own['ms'], set_name)}{factor}{bold}")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines).replace("|  |", "| |").replace("|  |", "| |")


def shown(ms: float, set_name: str) -> str:
    return f"{ms:.1f}" if set_name == "small" else f"{ms:.0f}"


def find(results: dict[str, Floats], row: str) -> Floats | None:
    return next((results[name] for name in ROWS[row] if name in results), None)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=21, help="steps of each contestant (default: 21)")
    parser.add_argument("--sets", nargs="+", choices=SETS, default=SETS)
    parser.add_argument("--rules", nargs="+", choices=RULES, default=RULES)
    parser.add_argument("--no-memory", action="store_true", help="leave out the MiB, which take long")
    parser.add_argument("--json", type=Path, help="where to keep the numbers; others in there are kept too")
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    tf.config.set_visible_devices([], "GPU")
    tf.get_logger().setLevel("ERROR")  # it takes many fresh functions for one that is traced again
    if options.one:
        *names, what = options.one
        print(json.dumps(measure(*names, int(what)) if what.isdigit() else mebibytes(*names, what)))
        return
    there = {"fused kernels": tav.fused.is_available(), "torch": torch, "optax": jax, FLOOR: plain_loops()}
    missing = [name for name, found in there.items() if not found]
    print(f"TensorFlow {tf.__version__}, Keras {keras.__version__}, {os.cpu_count()} CPUs", end=", ")
    print(f"medians of {options.rounds} rounds; missing: {', '.join(missing) or 'nothing'}\n", flush=True)
    for set_name in options.sets:
        for rule_name in options.rules:
            results = in_its_own_process(set_name, rule_name, str(options.rounds))
            if not options.no_memory:
                for name in results:
                    results[name]["mib"] = in_its_own_process(set_name, rule_name, name)
            parameters = sum(map(math.prod, SETS[set_name]))
            print(f"{rule_name}, {set_name}: {len(SETS[set_name])} variables, {parameters:,} parameters")
            grid = table(results, 1e-6 * RULES[rule_name].bytes_per_parameter * parameters)
            Console(width=110).print(grid)
            if options.json:
                keep(options.json, set_name, rule_name, results)


if __name__ == "__main__":
    main()
