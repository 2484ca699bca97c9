"""Models with every kind of state, and a training to continue, for the tests of saving."""

import pathlib
import subprocess
import sys

import cases
import keras
import numpy as np
import pytest

import tf_adam_variants as tav

RNG = np.random.default_rng(0)
X = RNG.normal(size=(48, 3)).astype("float32")
Y = X @ RNG.normal(size=(3, 2)).astype("float32")

schedule = keras.optimizers.schedules.CosineDecay(0.0, 40, warmup_target=0.25, warmup_steps=4)

OPTIMIZERS = {
    **{case.name: lambda case=case: case.cls(0.0625, **case.terms) for case in cases.CASES},
    "schedule": lambda: tav.QHAdamW(
        tav.schedules.LinearWarmup(keras.optimizers.schedules.ExponentialDecay(0.125, 5, 0.5), 3),
        weight_decay=0.25,
        weight_decay_mode="schedule",
    ),
    "callable-free warm-up": lambda: tav.LAMB(schedule, exclude_from_weight_decay=["bias"]),
    "everything": lambda: tav.AdamW(
        0.0625,
        weight_decay=0.5,
        amsgrad=True,
        exclude_from_weight_decay=["head/bias"],
        weight_decay_mode="schedule",
        use_ema=True,
        ema_momentum=0.75,
        ema_overwrite_frequency=5,
        gradient_accumulation_steps=2,
        global_clipnorm=0.5,
    ),
}


# What is saved depends on the slots alone: in the other tests these stand for all.
LAYOUTS = ["everything", "AdamW-amsgrad=True", "schedule", "LAMB"]
BUILT = {"built": True, "built later": False}


def in_turn(rows, columns, every=()):
    """All pairs as parameters. The suite without `slow` has one per row, the columns in turn, and `every`."""
    columns = list(columns)
    return [
        pytest.param(
            row,
            column,
            id="-".join(str(getattr(x, "name", x)) for x in (row, column)),
            marks=[] if j == i % len(columns) or row in every else pytest.mark.slow,
        )
        for i, row in enumerate(rows)
        for j, column in enumerate(columns)
    ]


def by_layout():
    """The optimizers, those of LAYOUTS first, the others `slow`, each built and built later."""
    others = [name for name in OPTIMIZERS if name not in LAYOUTS]
    return in_turn(LAYOUTS, [True, False], every=["everything"]) + [
        pytest.param(name, built, marks=pytest.mark.slow) for name in others for built in (True, False)
    ]


def model(optimizer, dtype="float32"):
    keras.utils.set_random_seed(1)
    layers = [
        keras.Input((3,)),
        keras.layers.Dense(4, "tanh", name="body"),
        keras.layers.Dense(2, name="head"),
    ]
    made = keras.Sequential(layers, name="net")
    made.compile(optimizer=optimizer, loss="mse")
    return made


def fit(made, epochs=2):
    """7 steps an epoch (an odd number: an accumulated gradient is waiting when we save)."""
    made.fit(X[:42], Y[:42], batch_size=6, epochs=epochs, shuffle=False, verbose=0)


def state(made):
    return [np.asarray(v) for v in [*made.weights, *made.optimizer.variables]]


def assert_same(actual, expected):
    assert len(actual) == len(expected)
    for a, b in zip(actual, expected, strict=True):
        np.testing.assert_array_equal(a, b)


def run_in_a_new_process(program, *arguments):
    code = f"import sys; sys.path.insert(0, {str(pathlib.Path(__file__).parent)!r})\n" + program
    result = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout
