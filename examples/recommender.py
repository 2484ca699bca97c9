"""A matrix-factorisation recommender: what lazy sparse updates do for large embedding tables.

    python examples/recommender.py --out recommender.png

Ratings are made from a fixed seed: each user and each item has 8 hidden factors, a rating is their product
plus noise, and users and items are drawn by a Zipf law, as real ones are: most of the two tables is not in a
batch. The model, two embeddings and their dot product, is trained through `model.fit`, by Keras's Adam and by
AdamW with sparse_update "exact" and "lazy", each in a process of its own so that peak memory is its own.

Printed are milliseconds a step (the median over the epochs after the first), the peak memory of the process
and the loss on ratings held out, beside that of the noise alone, which no model can go below.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # read when TensorFlow is imported

import numpy as np

RUNS = ("Keras Adam", "AdamW exact", "AdamW lazy")
USERS, ITEMS, FACTORS, NOISE = 1_500_000, 300_000, 8, 0.1
WIDTH, BATCH, RATINGS = 32, 2048, 200_000


def ratings(seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Users, items and ratings of known rank."""
    rng = np.random.default_rng(seed)
    users = rng.permutation(USERS)[np.minimum(rng.zipf(1.3, RATINGS) - 1, USERS - 1)]
    items = rng.permutation(ITEMS)[np.minimum(rng.zipf(1.3, RATINGS) - 1, ITEMS - 1)]
    u, v = (rng.normal(size=(n, FACTORS)).astype("f4") / FACTORS**0.25 for n in (USERS, ITEMS))
    truth = np.sum(u[users] * v[items], axis=1)
    return users, items, truth + NOISE * rng.normal(size=RATINGS).astype("f4")


def train(name: str, epochs: int) -> dict:
    """One run, in this process."""
    import keras

    import tf_adam_variants as tav

    keras.utils.set_random_seed(0)
    users, items, y = ratings()
    held_out = np.random.default_rng(1).uniform(size=RATINGS) < 0.1
    inputs = [keras.Input((), dtype="int64"), keras.Input((), dtype="int64")]
    small = keras.initializers.RandomNormal(stddev=0.1)
    tables = [keras.layers.Embedding(n, WIDTH, embeddings_initializer=small) for n in (USERS, ITEMS)]
    score = keras.layers.Dot(axes=1)([table(ids) for table, ids in zip(tables, inputs, strict=True)])
    model = keras.Model(inputs, score)
    model.compile(
        keras.optimizers.Adam(0.01)
        if name == "Keras Adam"
        else tav.AdamW(0.01, weight_decay=0.0, sparse_update=name.removeprefix("AdamW ")),
        "mse",
    )

    class Clock(keras.callbacks.Callback):
        """Milliseconds of each step, taken in the training loop."""

        def __init__(self) -> None:
            super().__init__()
            self.times: list[float] = []

        def on_train_batch_begin(self, batch: int, logs: dict | None = None) -> None:
            self.start = time.perf_counter()

        def on_train_batch_end(self, batch: int, logs: dict | None = None) -> None:
            self.times.append(1e3 * (time.perf_counter() - self.start))

    clock = Clock()
    history = model.fit(
        [users[~held_out], items[~held_out]],
        y[~held_out],
        batch_size=BATCH,
        epochs=epochs,
        validation_data=([users[held_out], items[held_out]], y[held_out]),
        validation_batch_size=BATCH,
        callbacks=[clock],
        verbose=0,
    ).history
    steps = len(clock.times) // epochs
    return {
        "ms": statistics.median(clock.times[steps:]),
        "gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        "loss": history["loss"],
        "val_loss": history["val_loss"],
        "steps": steps,
    }


def draw(results: dict[str, dict], file: str) -> None:
    """The held-out loss over epochs, and over the seconds that the steps took."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(11, 4.2), sharey=True, layout="constrained")
    for (name, run), style in zip(results.items(), ("-", "--", "-"), strict=True):
        epochs = np.arange(1, len(run["val_loss"]) + 1)
        seconds = epochs * run["steps"] * run["ms"] / 1e3
        label = f"{name}: {run['ms']:.1f} ms a step, {run['gib']:.1f} GiB"
        axes[0].plot(epochs, run["val_loss"], style, marker="o", ms=3, label=label)
        axes[1].plot(seconds, run["val_loss"], style, marker="o", ms=3)
    for axis, what in zip(axes, ("epochs", "seconds of training steps (logarithmic)"), strict=True):
        axis.axhline(NOISE**2, color="gray", lw=1, ls=":")
        axis.set(xlabel=what, yscale="log")
        axis.grid(alpha=0.3)
    axes[0].text(1, NOISE**2 * 1.05, "the noise", color="gray", fontsize=8)
    axes[0].set_ylabel("squared error on held-out ratings")
    axes[1].set_xscale("log")
    axes[0].legend(fontsize=8)
    figure.suptitle(
        f"{RATINGS:,} ratings of {USERS:,} users for {ITEMS:,} items, two tables of width {WIDTH}"
    )
    figure.savefig(file, dpi=110)


def main() -> None:
    """Train three times, print a table, draw the picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", default="recommender.png", help="where to write the picture")
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--run", choices=RUNS, help="only this one, and print its numbers as JSON")
    options = parser.parse_args()
    if options.run:
        print(json.dumps(train(options.run, options.epochs)))
        return
    from rich.console import Console
    from rich.progress import track
    from rich.table import Table

    results = {}
    for name in track(RUNS, "training"):
        command = [sys.executable, __file__, "--run", name, "--epochs", str(options.epochs)]
        output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        results[name] = json.loads(output.splitlines()[-1])
    table = Table(title=f"{options.epochs} epochs; the noise alone has {NOISE**2:.4f}")
    for heading in ("optimizer", "ms a step", "peak GiB", "training loss", "held-out loss"):
        table.add_column(heading, justify="left" if heading == "optimizer" else "right")
    for name, run in results.items():
        row = f"{run['ms']:.1f}", f"{run['gib']:.2f}", f"{run['loss'][-1]:.4f}", f"{run['val_loss'][-1]:.4f}"
        table.add_row(name, *row)
    Console(width=100).print(table)
    draw(results, options.out)
    print(f"learning curves: {options.out}")


if __name__ == "__main__":
    main()
