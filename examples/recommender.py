"""A matrix-factorisation recommender: what lazy sparse updates do for large embedding tables.

    python examples/recommender.py --out recommender.png [--json FILE]

Ratings are made from a fixed seed: each user and each item has 8 hidden factors, a rating is their product
plus noise, and users and items are drawn by a Zipf law, as real ones are: a batch names some 2,500 of the two
tables' 1,200,000 rows. The model, two embeddings and their dot product, is trained through `model.fit`, by
Keras's Adam and by AdamW with sparse_update "exact" and "lazy", each in a process of its own.

Printed are milliseconds a step (the median) and the peak memory of the process, both from the second epoch
on, and the losses reached: in training, and on ratings held out, of users and items that have 20 ratings or
more in training. The truth, which is the factors that the ratings were made from, has the loss of the noise,
and no model goes below that.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # read when TensorFlow is imported

import memory
import numpy as np

RUNS = ("Keras Adam", "AdamW exact", "AdamW lazy")
USERS, ITEMS, FACTORS, NOISE = 1_000_000, 200_000, 8, 0.1
WIDTH, BATCH, RATINGS, KNOWN = 32, 8192, 1_000_000, 20


def ratings(
    rows: tuple[int, int] = (USERS, ITEMS), count: int = RATINGS
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Users, items, ratings and what these are without the noise."""
    rng = np.random.default_rng(0)
    users, items = (rng.permutation(n)[np.minimum(rng.zipf(1.3, count) - 1, n - 1)] for n in rows)
    u, v = (rng.normal(size=(n, FACTORS)).astype("f4") / FACTORS**0.25 for n in rows)
    truth = np.sum(u[users] * v[items], axis=1)
    return users, items, truth + NOISE * rng.normal(size=count).astype("f4"), truth


def train(name: str, epochs: int) -> dict:
    """One run, in this process."""
    import keras
    from step_times import StepTimes

    import tf_adam_variants as tav

    keras.utils.set_random_seed(0)
    users, items, y, truth = ratings()
    held_out = np.random.default_rng(1).uniform(size=RATINGS) < 0.1
    trained = [users[~held_out], items[~held_out]]
    counts = [np.bincount(ids, minlength=n) for ids, n in zip(trained, (USERS, ITEMS), strict=True)]
    held_out_known = held_out & (counts[0][users] >= KNOWN) & (counts[1][items] >= KNOWN)
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

    class Meter(StepTimes):
        """Times and memory from the second epoch on."""

        def on_epoch_begin(self, epoch: int, logs: dict | None = None) -> None:
            if epoch <= 1:
                memory.reset_peak()
                self.milliseconds.clear()

    meter = Meter()
    history = model.fit(
        trained,
        y[~held_out],
        batch_size=BATCH,
        epochs=epochs,
        validation_data=([users[held_out_known], items[held_out_known]], y[held_out_known]),
        validation_batch_size=BATCH,
        callbacks=[meter],
        verbose=0,
    ).history
    return {
        "ms": statistics.median(meter.milliseconds),
        "gib": memory.mib("VmHWM") / 2**10,
        "loss": history["loss"],
        "val_loss": history["val_loss"],
        "truth": float(np.mean((y - truth)[held_out_known] ** 2)),
        "steps": -(-len(trained[0]) // BATCH),
    }


def picture(results: dict[str, dict], file: str | Path) -> None:
    """The held-out loss over epochs, and over the seconds that the steps took."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(11, 4.4), sharey=True, layout="constrained")
    for (name, run), style in zip(results.items(), ("-", "--", "-"), strict=True):
        epochs = np.arange(1, len(run["val_loss"]) + 1)
        seconds = epochs * run["steps"] * run["ms"] / 1e3
        label = f"{name}: {run['ms']:.1f} ms a step, {run['gib']:.2f} GiB, loss {run['val_loss'][-1]:.4f}"
        axes[0].plot(epochs, run["val_loss"], style, marker="o", ms=4, label=label)
        axes[1].plot(seconds, run["val_loss"], style, marker="o", ms=4)
        axes[1].annotate(
            name,
            (seconds[0], run["val_loss"][0]),
            xytext=(8, 0),
            textcoords="offset points",
            va="center",
            color=axes[1].lines[-1].get_color(),
        )
    for axis, what in zip(axes, ("epochs", "seconds of training steps (logarithmic)"), strict=True):
        axis.axhline(run["truth"], color="gray", ls=":")
        axis.set(xlabel=what, yscale="log")
        axis.yaxis.set_major_formatter(plt.FormatStrFormatter("%.2f"))
        axis.yaxis.set_minor_formatter(plt.FormatStrFormatter("%.2f"))
        axis.grid(alpha=0.3, which="both")
    axes[0].text(
        1,
        run["truth"] * 1.02,
        "the truth itself: what is left is the noise in the ratings",
        color="gray",
        va="bottom",
    )
    axes[0].set_ylabel("squared error on held-out ratings")
    axes[0].legend()
    axes[0].set_title("by epochs")
    axes[1].set_title("the same, by time")
    axes[1].set_xscale("log")
    figure.suptitle(
        f"{RATINGS:,} ratings of {ITEMS:,} items by {USERS:,} users: two embedding tables of width {WIDTH}"
    )
    figure.savefig(file, dpi=110)


def main() -> None:
    """Train three times, print a table, draw the picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", default="recommender.png", help="where to write the picture")
    parser.add_argument("--json", type=Path, help="where to keep the numbers")
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
    run = results[RUNS[0]]
    state = 3 * 4 * (USERS + ITEMS) * WIDTH / 2**30
    table = Table(title=f"{options.epochs} epochs of {run['steps']} steps; tables and slots: {state:.2f} GiB")
    for heading in ("optimizer", "ms a step", "peak GiB", "training loss", "held-out loss"):
        table.add_column(heading, justify="left" if heading == "optimizer" else "right")
    for name, run in results.items():
        row = f"{run['ms']:.1f}", f"{run['gib']:.2f}", f"{run['loss'][-1]:.4f}", f"{run['val_loss'][-1]:.4f}"
        table.add_row(name, *row)
    table.add_row("the truth", "", "", "", f"{run['truth']:.4f}")
    Console(width=100).print(table)
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n")
    picture(results, options.out)
    print(f"learning curves: {options.out}")


if __name__ == "__main__":
    main()
