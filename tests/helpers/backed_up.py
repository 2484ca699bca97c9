"""A training that backs itself up, and processes to kill it in: for the tests and for `make torture`."""

import multiprocessing
import os
import resource
import signal
import sys

import keras
import numpy as np
import tensorflow as tf

import tf_adam_variants as tav
from tf_adam_variants.callbacks import backup_folder, model_optimizers

RNG = np.random.default_rng(0)
X = RNG.normal(size=(40, 3)).astype("float32")
Y = (X @ RNG.normal(size=(3, 1))).astype("float32")
STEPS, EPOCHS = 7, 3  # of 6 examples; the last one is of 4

# Children are forked from a process that has imported TensorFlow, and has not started its runtime.
processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload(["keras", "tensorflow", "tf_adam_variants"])


def model(optimizer=lambda: tav.QHAdamW(0.05), width=4, **compiled):
    """With Dropout, whose masks depend on the seeds' state, and averages that are not trained."""
    keras.utils.set_random_seed(1)
    layers = [
        keras.Input((3,)),
        keras.layers.Dense(width, "tanh"),
        keras.layers.BatchNormalization(),
        keras.layers.Dropout(0.5),
        keras.layers.Dense(1),
    ]
    made = keras.Sequential(layers)
    made.compile(optimizer(), "mse", metrics=["mae"], **compiled)
    return made


class Adversarial(keras.Model):
    """Two networks, each with an optimizer that the first step builds, and no `call`."""

    def __init__(self):
        super().__init__()
        self.makes = keras.Sequential([keras.Input((3,)), keras.layers.Dense(3), keras.layers.Dropout(0.5)])
        self.judges = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)])
        self.noise = keras.random.SeedGenerator(1)

    def compile(self, optimizers, **options):
        super().compile(**options)
        self.of_its_own = optimizers

    def optimizers(self):
        return model_optimizers.find(self)[1:]

    def train_step(self, data):
        for part, sign, optimizer in zip((self.judges, self.makes), (1, -1), self.optimizers(), strict=False):
            with tf.GradientTape() as tape:
                noise = data[0] if self.noise is None else keras.random.normal((6, 3), seed=self.noise)
                made = self.makes(noise, training=self.noise is not None)
                loss = sign * tf.reduce_mean(tf.nn.softplus(self.judges(made)))
                loss += sign * tf.reduce_mean(tf.nn.softplus(-self.judges(data[0])))
            trained = part.trainable_variables[::sign]  # in another order than the model has them
            optimizer.apply_gradients(zip(tape.gradient(loss, trained), trained, strict=True))
        return {"loss": loss}


def adversarial(optimizers=lambda: [tav.LAMB(0.05), tav.QHAdam(0.05)], **compiled):
    keras.utils.set_random_seed(1)
    made = Adversarial()
    made.compile(optimizers(), **compiled)
    return made


def fit(made, *callbacks, epochs=EPOCHS, **options):
    options = {"x": X, "y": Y, "batch_size": 6, "shuffle": False} | options
    return made.fit(epochs=epochs, verbose=0, callbacks=list(callbacks), **options).history


def state(made):
    optimizers = [made.optimizer, *(made.optimizers() if hasattr(made, "optimizers") else [])]
    return [v.numpy() for v in [*made.variables, *(v for one in optimizers for v in one.variables)]]


def same(one, other):
    return len(one) == len(other) and all(map(np.array_equal, one, other))


def die_at(calls):
    """Let this process be killed at a call, counted from 0, of one of the functions that write a backup.

    Returns:
        A list that the names of calls are added to.
    """
    made = []

    def dying(name, function):
        def call(*arguments, **options):
            if len(made) == calls:
                os.kill(os.getpid(), signal.SIGKILL)
            made.append(name)
            return function(*arguments, **options)

        return call

    for name in ("mkdir", "fsync", "rename", "rmdir"):
        setattr(os, name, dying(name, getattr(os, name)))
    return made


def train(folder, calls=-1, limit=None, error=None, make=model, save_freq=1):
    """Train in this process; be killed at a call, or have files that cannot become larger than a limit.

    An OSError is written to the file `error`.
    """
    made = make()
    backup = tav.callbacks.AtomicBackupAndRestore(folder, save_freq)

    class Fault(keras.callbacks.Callback):
        def on_train_batch_begin(self, batch, logs=None):
            if batch == 3:
                if calls >= 0:
                    die_at(calls)
                if limit:
                    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    try:
        fit(made, Fault(), backup)
    except OSError as raised:
        error.write_text(f"{raised.errno} {raised}")
        sys.exit(1)


def write_another(folder, calls):
    """Back up what is backed up there once more, and exit with the number of calls."""
    backups = backup_folder.BackupFolder(folder)
    with backups.find_whole().open() as file:
        array = np.frombuffer(file.read(), np.uint8)
    made = die_at(calls)
    backups.write({"of": "a child"}, [array])
    sys.exit(len(made))


def run(function, *arguments, **options):
    """Run a function in a process of its own. Returns its exit code: -9 where it was killed."""
    process = processes.Process(target=function, args=arguments, kwargs=options)
    process.start()
    process.join()
    return process.exitcode
