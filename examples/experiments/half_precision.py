"""Training with all variables in bfloat16: what becomes of steps that are too small for it.

Two models, a convolutional network on scikit-learn's digits and a small transformer on text that a Markov
chain makes, each trained in four ways from the same seeds:

    float32                     the reference
    bfloat16, to nearest        float32 moments and arithmetic; each new weight is rounded to nearest
    bfloat16, at random         stochastic_rounding=True
    bfloat16, master weights    master_weights=True

All losses are computed in float32 from the weights that the training came to, so that they differ by the
weights alone. The script prints a table and draws the losses:

    python examples/experiments/half_precision.py --out half_precision.png [--json FILE] [--seeds 5] [--quick]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # examples/

import keras
import matplotlib
import numpy as np
import small_tasks
import tensorflow as tf
from digits import load_data, make_model, mean_and_spread
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

import tf_adam_variants as tav

matplotlib.use("Agg")
import matplotlib.pyplot as plt


class Way(NamedTuple):
    """A type of variables, options of the optimizer, and the line in the picture."""

    dtype: str
    options: dict[str, bool]
    color: str
    style: Any


WAYS = {
    "float32": Way("float32", {}, "#000000", "-"),
    "bfloat16, to nearest": Way("bfloat16", {}, "#D55E00", ":"),
    "bfloat16, at random": Way("bfloat16", {"stochastic_rounding": True}, "#0072B2", "--"),
    "bfloat16, master weights": Way("bfloat16", {"master_weights": True}, "#009E73", "-."),
}


class Task(NamedTuple):
    """A model, made in the types of a policy, and data: x, y for training and for testing."""

    make: Callable[[str], keras.Model]
    data: tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]
    batch_size: int
    epochs: int
    learning_rate: float


def digits_network(dtype: str) -> keras.Model:
    keras.config.set_dtype_policy(dtype)
    return make_model()


def transformer(dtype: str) -> keras.Model:
    keras.config.set_dtype_policy(dtype)
    return small_tasks.transformer(width=48, blocks=2, activation="softmax")


def tasks(quick: bool) -> dict[str, Task]:
    digits = load_data()
    x, y = small_tasks.letters(512 if quick else 2048, seed=1)
    x_test, y_test = small_tasks.letters(512, seed=2)
    return {
        "digits": Task(
            digits_network,
            (digits.x_train, digits.y_train, digits.x_test, digits.y_test),
            batch_size=64,
            epochs=2 if quick else 16,
            learning_rate=2e-3,
        ),
        "transformer": Task(
            transformer, (x, y, x_test, y_test), batch_size=64, epochs=2 if quick else 12, learning_rate=2e-3
        ),
    }


class Run(NamedTuple):
    """The test loss after each epoch, and the bytes of weights and optimizer for each parameter."""

    losses: list[float]
    bytes_a_parameter: float


def train(task: Task, way: Way, seed: int, on_epoch: Callable[[], None]) -> Run:
    keras.utils.clear_session()
    keras.utils.set_random_seed(seed)
    judge = task.make("float32")  # sees the weights in float32
    judge.compile(loss="sparse_categorical_crossentropy")
    begin = judge.get_weights()
    model = task.make(way.dtype)
    model.set_weights(begin)  # all ways begin alike, but for rounding
    x, y, x_test, y_test = task.data
    steps = len(x) // task.batch_size * task.epochs
    rate = keras.optimizers.schedules.CosineDecay(task.learning_rate, steps)
    model.compile(tav.AdamW(rate, weight_decay=0.01, **way.options), "sparse_categorical_crossentropy")
    losses = []

    def at_end(epoch: int, logs: Any) -> None:
        judge.set_weights([np.asarray(w, "float32") for w in model.get_weights()])
        losses.append(float(judge.evaluate(x_test, y_test, batch_size=512, verbose=0)))
        on_epoch()

    model.fit(
        x, y, batch_size=task.batch_size, epochs=task.epochs, verbose=0,
        callbacks=[keras.callbacks.LambdaCallback(on_epoch_end=at_end)],
    )  # fmt: skip
    held = [*model.trainable_variables, *model.optimizer.variables]
    size = sum(w.value.dtype.size * np.prod(w.shape) for w in held)
    return Run(losses, float(size / model.count_params()))


def train_all(quick: bool, seeds: int, console: Console) -> dict[str, dict[str, list[Run]]]:
    """The runs of each task and way."""
    kept = keras.config.dtype_policy()
    chosen = tasks(quick)
    runs: dict[str, dict[str, list[Run]]] = {name: {way: [] for way in WAYS} for name in chosen}
    with Progress(console=console) as progress:
        for name, task in chosen.items():
            bar = progress.add_task(name, total=seeds * len(WAYS) * task.epochs)
            for seed in range(seeds):
                for label, way in WAYS.items():
                    run = train(task, way, seed, lambda bar=bar: progress.advance(bar))
                    runs[name][label].append(run)
                    if not console.is_terminal:
                        console.print(f"{name}, seed {seed}, {label}: test loss {run.losses[-1]:.4f}")
    keras.config.set_dtype_policy(kept)
    return runs


def milliseconds(quick: bool) -> dict[str, float]:
    """Of one optimizer step on 16 variables of a million elements each; all ways in turn, medians."""
    rng = np.random.default_rng(0)
    values = [rng.normal(size=2**16 if quick else 2**20).astype("float32") for _ in range(16)]
    steps: dict[str, Callable[[], None]] = {}
    for label, way in WAYS.items():
        weights = [tf.Variable(value, dtype=way.dtype) for value in values]
        gradients = [tf.constant(value, way.dtype) for value in values]
        optimizer = tav.AdamW(**way.options)
        optimizer.build(weights)
        steps[label] = tf.function(lambda o=optimizer, g=gradients, w=weights: o.apply(g, w))
    times: dict[str, list[float]] = {label: [] for label in steps}
    for _ in range(3 if quick else 31):
        for label, step in steps.items():
            begin = time.perf_counter()
            step()
            times[label].append(1e3 * (time.perf_counter() - begin))
    return {label: statistics.median(own[1:]) for label, own in times.items()}


def markdown(numbers: dict[str, Any]) -> str:
    """The table of docs/arguments.md."""
    lines = [
        "| | digits, test loss | transformer, test loss | bytes a parameter | ms a step |",
        "| --- |" + " ---: |" * 4,
    ]
    for label in WAYS:
        own = [task[label] for task in numbers["runs"].values()]
        losses = [mean_and_spread([run["losses"][-1] for run in runs], digits=4) for runs in own]
        size, ms = own[-1][0]["bytes_a_parameter"], numbers["milliseconds"][label]
        lines.append(f"| {label} | {losses[0]} | {losses[1]} | {size:.0f} | {ms:.1f} |")
    return "\n".join(lines)


def picture(numbers: dict[str, Any], path: Path) -> None:
    """The losses again, from the JSON."""
    runs = {
        task: {way: [Run(**run) for run in runs] for way, runs in own.items()}
        for task, own in numbers["runs"].items()
    }
    draw(runs, path)


def table(runs: dict[str, dict[str, list[Run]]], step_times: dict[str, float]) -> Table:
    seeds = len(next(iter(runs["digits"].values())))
    engine = "with fused kernels" if tav.fused.is_available() else "without fused kernels"
    result = Table(title=f"seeds: {seeds}; mean ± standard deviation; the optimizer's step {engine}")
    result.add_column("variables")
    for name in runs:
        result.add_column(f"{name}: test loss", justify="right")
    result.add_column("bytes a parameter", justify="right")
    result.add_column("ms a step of 16.8 million", justify="right")
    for label in WAYS:
        losses = [mean_and_spread([run.losses[-1] for run in own[label]], digits=4) for own in runs.values()]
        size = runs["transformer"][label][0].bytes_a_parameter
        result.add_row(label, *losses, f"{size:.1f}", f"{step_times[label]:.1f}")
    return result


def draw(runs: dict[str, dict[str, list[Run]]], path: Path) -> None:
    figure, both = plt.subplots(1, len(runs), figsize=(11, 5), layout="constrained")
    for axes, (name, own) in zip(both, runs.items(), strict=True):
        for label, way in WAYS.items():
            curves = np.array([run.losses for run in own[label]])
            epoch = np.arange(1, curves.shape[1] + 1)
            axes.plot(epoch, curves.mean(0), label=label, color=way.color, ls=way.style, lw=2)
            axes.fill_between(epoch, curves.min(0), curves.max(0), color=way.color, alpha=0.1, lw=0)
        axes.set(title=name, xlabel="epoch", ylabel="test loss (cross-entropy)", yscale="log")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("{x:g}")
        axes.grid(alpha=0.3, which="both")
    figure.legend(*both[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, handlelength=4)
    seeds = len(next(iter(runs["digits"].values())))
    figure.suptitle(f"AdamW, learning rate to zero by a cosine; seeds: {seeds} (band: lowest to highest)")
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("half_precision.png"), help="the picture to write")
    parser.add_argument("--json", type=Path, help="where to write all losses and times")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="one seed, few epochs: under a minute")
    arguments = parser.parse_args()
    console = Console()
    runs = train_all(arguments.quick, 1 if arguments.quick else arguments.seeds, console)
    step_times = milliseconds(arguments.quick)
    console.print(table(runs, step_times))
    if arguments.json:
        kept = {
            task: {way: [run._asdict() for run in own[way]] for way in WAYS} for task, own in runs.items()
        }
        arguments.json.write_text(json.dumps({"runs": kept, "milliseconds": step_times}, indent=1) + "\n")
    draw(runs, arguments.out)
    console.print(f"Losses by epoch: {arguments.out.resolve()}", soft_wrap=True)


if __name__ == "__main__":
    main()
