"""Two workers train together. One is killed, both start again, and they end with the same bits.

    python examples/multi_worker.py [--quick] [--fused auto] [--out DIRECTORY]

Two processes on this machine, on its CPUs and 127.0.0.1, train small text classifiers under
`tf.distribute.MultiWorkerMirroredStrategy`, one with LAMB and one with QHAdamW, in a loop over
`strategy.run`. They save a checkpoint every 10 steps. Between two checkpoints one of them is killed
(SIGKILL). The other waits for it, so it is ended too, as a cluster's manager would do it. Both start again
and go on from the newest checkpoint, to the end. Then they train the same once more, undisturbed, and all
weights and all of the optimizers' states are compared.

Why it comes out the same:

- The batch of a step is made from the number of the step: who starts again sees the same data.
- The workers all save, since TensorFlow may have to collect a value from all of them. Only worker 0, the
  chief, writes where checkpoints are read. The others write where nobody reads: two writers of one file
  spoil it.
- Optimizers are built in the strategy's scope before anything is restored.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # read when TensorFlow is imported

import local_cluster
import numpy as np

WORKERS, WORDS, LENGTH, BATCH, SAVE_EVERY = 2, 1000, 12, 64, 10
TRAININGS = ("killed", "undisturbed")
FUSED = {"auto": "auto", "true": True, "false": False}


# -- a worker ------------------------------------------------------------------------------------------------


def texts(step: int, replica: int) -> tuple[np.ndarray, np.ndarray]:
    """What a replica sees in a step: texts of Zipf-distributed words, and whether good words outweigh bad."""
    rng = np.random.default_rng([step, replica])
    words = np.minimum(rng.zipf(1.3, (BATCH, LENGTH)) - 1, WORDS - 1)
    goodness = np.random.default_rng(0).normal(size=WORDS)
    return words, (goodness[words].sum(axis=1, keepdims=True) > 0).astype("float32")


def classifier() -> Any:
    """The gradient of its table of words is sparse."""
    import keras

    words = keras.Input((LENGTH,), dtype="int64")
    text = keras.layers.GlobalAveragePooling1D()(keras.layers.Embedding(WORDS, 16)(words))
    return keras.Model(words, keras.layers.Dense(1)(keras.layers.Dense(16, "tanh")(text)))


def train(strategy: Any, directory: Path, steps: int, fused: str | bool, dies: str) -> None:
    """Train from the newest checkpoint on, and write the last state. Prints a line a step."""
    import keras
    import tensorflow as tf

    import tf_adam_variants as tav

    worker = strategy.cluster_resolver.task_id
    keras.utils.set_random_seed(0)
    with strategy.scope():
        optimizers = [tav.LAMB(0.02, fused=fused), tav.QHAdamW(0.01, nu_2=0.9, fused=fused)]
        models = [classifier() for _ in optimizers]
        for model, optimizer in zip(models, optimizers, strict=True):
            optimizer.build(model.trainable_variables)
    loss_of = keras.losses.BinaryCrossentropy(from_logits=True, reduction="sum")

    def replica(words: Any, labels: Any) -> Any:
        losses = []
        for model, optimizer in zip(models, optimizers, strict=True):
            with tf.GradientTape() as tape:
                # The optimizer adds up the replicas' gradients, so each has its part of the global mean.
                loss = loss_of(labels, model(words)) / (BATCH * strategy.num_replicas_in_sync)
            variables = model.trainable_variables
            optimizer.apply(tape.gradient(loss, variables), variables)
            losses.append(loss)
        return tf.stack(losses)

    @tf.function
    def step(words: Any, labels: Any) -> Any:
        return strategy.reduce("SUM", strategy.run(replica, (words, labels)), axis=None)

    def on_each_replica(number: int, what: int) -> Any:
        return strategy.experimental_distribute_values_from_function(
            lambda context: tf.constant(texts(number, context.replica_id_in_sync_group)[what])
        )

    readable = directory / "checkpoints"
    writable = readable if worker == 0 else directory / f"of-worker-{worker}-not-to-be-read"
    checkpoint = tf.train.Checkpoint(models=models, optimizers=optimizers)
    manager = tf.train.CheckpointManager(checkpoint, str(writable), max_to_keep=3)
    checkpoint.restore(tf.train.latest_checkpoint(str(readable)))  # None restores nothing
    line = {"training": directory.name, "worker": worker, "step": int(optimizers[0].iterations.numpy())}
    print(json.dumps(line), flush=True)
    for number in range(line["step"] + 1, steps + 1):
        losses = step(on_each_replica(number, 0), on_each_replica(number, 1)).numpy().tolist()
        print(json.dumps(line | {"step": number, "losses": losses}), flush=True)
        if dies == f"{worker}@{number}":
            os.kill(os.getpid(), signal.SIGKILL)
        if number % SAVE_EVERY == 0:
            manager.save()
    state = [v for owner in (*models, *optimizers) for v in owner.variables]
    np.savez(directory / f"worker-{worker}.npz", *(variable.numpy() for variable in state))


def work(out: Path, steps: int, fused: str | bool, dies: str) -> None:
    """Be the worker that TF_CONFIG says."""
    local_cluster.end_with_the_launcher()
    import tensorflow as tf

    strategy = tf.distribute.MultiWorkerMirroredStrategy()  # before TensorFlow runs anything
    for name in TRAININGS:
        train(strategy, out / name, steps, fused, dies)


# -- the launcher --------------------------------------------------------------------------------------------


class Bars:
    """A bar for each training of each start: how far all workers are."""

    def __init__(self, steps: int) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        columns = TextColumn("{task.description}"), BarColumn(20), MofNCompleteColumn(), TimeElapsedColumn()
        self.progress, self.steps = Progress(*columns), steps

    def begin(self, start: int) -> None:
        self.start, self.bars, self.reached = start, {}, {}

    def take(self, line: dict[str, Any]) -> None:
        """What a worker printed."""
        name = line["training"]
        if name not in self.bars:
            text = f"start {self.start}: {name}, from step {line['step']}"
            self.bars[name] = self.progress.add_task(text, total=self.steps)
            self.reached[name] = [line["step"]] * WORKERS
        self.reached[name][line["worker"]] = line["step"]
        self.progress.update(self.bars[name], completed=min(self.reached[name]))

    def stop(self) -> None:
        for bar in self.bars.values():
            self.progress.stop_task(bar)


def start_until_the_end(out: Path, deaths: list[str], options: argparse.Namespace) -> None:
    """Start the workers again after each of the deaths, of which "1@25" is worker 1's after step 25."""
    bars = Bars(options.steps)
    with bars.progress:
        for start, dies in enumerate([*deaths, ""], 1):
            bars.begin(start)
            command = [sys.executable, __file__, "--work", str(out), "--dies", dies]
            command += ["--steps", str(options.steps), "--fused", options.fused]
            codes = local_cluster.run(command, {"worker": WORKERS}, out, bars.take)
            dead = int(dies.split("@")[0]) if dies else 0
            if codes[dead] != (-signal.SIGKILL if dies else 0):
                logs = [(out / f"worker-{worker}.log").read_text()[-3000:] for worker in range(WORKERS)]
                raise SystemExit("\n".join([f"The workers ended with {codes}. Their logs:", *logs]))
            if dies:
                bars.stop()
                bars.progress.print(f"worker {dead} was killed after step {dies.split('@')[1]}")


def compare(out: Path) -> None:
    """Say whether all workers of both trainings ended with the same bits."""
    names = [f"{name}/worker-{worker}.npz" for name in TRAININGS for worker in range(WORKERS)]
    first, *others = (
        [state[key] for key in sorted(state)] for state in map(np.load, (out / n for n in names))
    )
    for name, other in zip(names[1:], others, strict=True):
        errors = [
            np.max(np.abs(a - b)) for a, b in zip(first, other, strict=True) if a.tobytes() != b.tobytes()
        ]
        if errors:
            raise SystemExit(f"{len(errors)} arrays of {name} differ from {names[0]}, by up to {max(errors)}")
    print(f"{len(first)} arrays are the same, bit for bit, in {', '.join(names)}")


def main() -> None:
    """Train with deaths and without, and compare."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="30 steps and one death, instead of 300 and two")
    parser.add_argument("--fused", choices=FUSED, default="auto", help="whether fused kernels take the steps")
    parser.add_argument("--out", type=Path, help="where checkpoints and logs are kept; nowhere if left out")
    for internal in ("--work", "--dies", "--steps"):  # for the workers
        parser.add_argument(internal, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        work(Path(options.work), int(options.steps), FUSED[options.fused], options.dies)
        return
    options.steps = 30 if options.quick else 300
    with tempfile.TemporaryDirectory() as temporary:
        out = options.out or Path(temporary)
        for name in TRAININGS:
            (out / name).mkdir(parents=True)
        start_until_the_end(out, ["1@15"] if options.quick else ["1@75", "0@215"], options)
        compare(out)


if __name__ == "__main__":
    main()
