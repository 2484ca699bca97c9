"""What XLA does for a training step, and where the fused kernels belong: `tav.fused.split_step` compared.

    python examples/benchmarks/split_step.py [--quick] [--models ...] [--json FILE]

Four trainings of a model, from the same weights and on the same batches, take turns of a few steps in one
process: Keras's AdamW, and ours without them, each with the whole step compiled by XLA; ours split, with
gradients by XLA and the update by the fused kernels; ours with these and without XLA. Milliseconds are
medians of a step in `fit`, without the first turn; the first step, measured once, has tracing and compiling
in it.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # read when TensorFlow is imported
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # examples/

import bert_classifier
import keras
import numpy as np
import resnet50
import side_by_side
import tensorflow as tf
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

import tf_adam_variants as tav


class Model(NamedTuple):
    make: Callable[[keras.optimizers.Optimizer], keras.Model]
    batches: Callable[[int], tf.data.Dataset]  # of a turn
    turns: int


def of_bert(size: bert_classifier.Size, steps: int, turns: int) -> Model:
    batches = partial(bert_classifier.texts, size, steps)
    return Model(partial(bert_classifier.classifier, size), batches, turns)


def of_resnet(size: resnet50.Size, steps: int, turns: int) -> Model:
    return Model(partial(resnet50.classifier, size), partial(resnet50.images, size, steps), turns)


def of_dense(layers: int, steps: int, turns: int) -> Model:
    def make(optimizer: keras.optimizers.Optimizer) -> keras.Model:
        hidden = [keras.layers.Dense(64, "relu") for _ in range(layers)]
        model = keras.Sequential([keras.Input((64,)), *hidden, keras.layers.Dense(1)])
        model.compile(optimizer, "mse")
        return model

    def batches(turn: int) -> tf.data.Dataset:
        x = np.random.default_rng(turn).normal(size=(steps, 32, 64)).astype("float32")
        return tf.data.Dataset.from_tensor_slices((x, x.mean(axis=2)))

    return Model(make, batches, turns)


MODELS = {
    "BERT, 4 layers": of_bert(bert_classifier.FULL._replace(layers=4, heads=4, width=256), 10, 16),
    "BERT, 12 layers": of_bert(bert_classifier.FULL, 3, 9),
    "ResNet-50": of_resnet(resnet50.FULL, 4, 9),
    "100 small dense layers": of_dense(100, 30, 16),
}
QUICK = {
    "BERT, 1 layer": of_bert(bert_classifier.QUICK, 4, 3),
    "MobileNet": of_resnet(resnet50.QUICK, 4, 3),
    "10 small dense layers": of_dense(10, 10, 3),
}
RATES = {"learning_rate": 1e-3, "weight_decay": 0.01}
CONTESTANTS: dict[str, tuple[Callable[[], keras.optimizers.Optimizer], str]] = {
    "Keras, all by XLA": (partial(keras.optimizers.AdamW, **RATES), "all"),
    "pure, all by XLA": (partial(tav.AdamW, **RATES, fused=False), "all"),
    "fused, split": (partial(tav.AdamW, **RATES, fused=True), "split"),
    "fused, no XLA": (partial(tav.AdamW, **RATES, fused=True), "none"),
}


def with_xla(model: Model, optimizer: Callable[[], keras.optimizers.Optimizer], xla: str) -> keras.Model:
    made = model.make(optimizer())
    made.compile(made.optimizer, made.loss, jit_compile=xla == "all")
    if xla == "split":
        tav.fused.split_step(made)
    return made


def measure(model: Model, progress: Progress) -> dict[str, dict[str, float]]:
    """The numbers of each contestant."""
    makers = {name: partial(with_xla, model, *contestant) for name, contestant in CONTESTANTS.items()}
    trainings = side_by_side.in_turns(makers, model.batches, model.turns, progress)
    return {
        name: {
            "step_ms": own.step_ms,
            "first_step_s": own.turns[0].first_step,
            "last_loss": own.turns[-1].loss,
        }
        for name, own in trainings.items()
    }


def markdown(numbers: dict[str, Any]) -> str:
    """The table of docs/benchmarks.md; bold: the fastest."""
    results = numbers["results"]
    lines = [f"| | {' | '.join(results)} |", f"| --- |{' ---: |' * len(results)}"]
    for contestant in CONTESTANTS:
        cells = [contestant]
        for own in results.values():
            ms, first = own[contestant]["step_ms"], own[contestant]["first_step_s"]
            shown = f"{ms:.1f}" if ms < 100 else f"{ms:.0f}"
            bold = "**" * (ms == min(numbers["step_ms"] for numbers in own.values()))
            cells.append(f"{bold}{shown}{bold} ({first:.0f})")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def table(results: dict[str, dict[str, dict[str, float]]]) -> Table:
    grid = Table("milliseconds a step, and seconds to the first", *results)
    for contestant in CONTESTANTS:
        cells = (
            f"{own[contestant]['step_ms']:.1f} ({own[contestant]['first_step_s']:.1f})"
            for own in results.values()
        )
        grid.add_row(contestant, *cells)
    return grid


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="small models, few steps")
    parser.add_argument("--models", nargs="+", help=f"some of {', '.join(MODELS)}")
    parser.add_argument("--json", type=Path, help="where to keep the numbers")
    options = parser.parse_args()
    models = QUICK if options.quick else MODELS
    console = Console(width=None if Console().is_terminal else 150)
    results = {}
    with Progress(console=console) as progress:
        for name in options.models or models:
            results[name] = measure(models[name], progress)
            keras.utils.clear_session()
    console.print(table(results))
    if options.json:
        versions = {module.__name__: module.__version__ for module in (tf, keras, tav)}
        numbers = {"cpus": os.cpu_count(), "versions": versions, "results": results}
        options.json.write_text(json.dumps(numbers, indent=2) + "\n")


if __name__ == "__main__":
    main()
