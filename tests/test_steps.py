"""Every optimizer, with every option that changes a step, against the float64 oracle."""

import gc
import itertools
import weakref

import axes
import cases
import keras
import numpy as np
import pytest
import tensorflow as tf
from axes import ALL_CASES, MODES_XLA_SLOW

import tf_adam_variants as tav

STEPS = 7
RATE, DECAY = 0.0625, 0.25  # numbers that float32 holds exactly: Keras keeps rates in it
OPTIONS = {
    "case": cases.CASES,
    "mode": cases.MODES,
    "rate": ["float", "schedule"],
    "exclusions": ["none", "list", "method"],
    "decay_mode": ["learning_rate", "schedule", "independent"],
    "ema": [None, 3],
    "accumulate": [1, 2],
    "clipping": [{}, {"clipnorm": 0.5}, {"clipvalue": 0.125}, {"global_clipnorm": 0.75}],
}


def is_sensible(combination):
    """Without the rows that only repeat another one: a decay mode where there is none to choose."""
    return combination["case"].has_modes or combination["decay_mode"] == "learning_rate"


def name_row(row):
    return " ".join(value.name if key == "case" else f"{key}={value}" for key, value in row.items() if value)


def make_optimizer(row):
    """The optimizer of a row, and the arguments of the oracle."""
    case = row["case"]
    terms = case.oracle_kwargs | ({"weight_decay": DECAY} if case.decays else {})
    schedule = keras.optimizers.schedules.InverseTimeDecay(RATE, decay_steps=2, decay_rate=0.5)
    arguments = {"learning_rate": schedule if row["rate"] == "schedule" else RATE} | case.terms
    rates = [float(schedule(t)) if row["rate"] == "schedule" else RATE for t in range(STEPS)]
    oracle_kwargs = {"rates": rates, "clipping": row["clipping"], "accumulate": row["accumulate"]} | terms
    arguments |= row["clipping"]
    if case.decays:
        arguments["weight_decay"] = DECAY
    if case.has_modes:
        arguments["weight_decay_mode"] = oracle_kwargs["decay_mode"] = row["decay_mode"]
        oracle_kwargs["peak"] = RATE
    if row["exclusions"] != "none":
        oracle_kwargs["decayed"] = ["bias" not in path and "norm" not in path for path in cases.PATHS]
    if case.cls is tav.LAMB:
        oracle_kwargs["adapted"] = oracle_kwargs.get("decayed")
    if row["exclusions"] == "list":
        arguments["exclude_from_weight_decay"] = ["bias$", "^norm/"]
    if row["ema"]:
        arguments |= {"use_ema": True, "ema_momentum": 0.75, "ema_overwrite_frequency": row["ema"]}
        oracle_kwargs |= {"ema_momentum": 0.75, "ema_overwrite": row["ema"]}
    if row["accumulate"] > 1:
        arguments["gradient_accumulation_steps"] = row["accumulate"]
    optimizer = case.cls(**arguments)
    if row["exclusions"] == "method":
        optimizer.exclude_from_weight_decay(
            var_list=[tf.Variable(0.0, name="dense/bias")], var_names=["norm"]
        )
    return optimizer, oracle_kwargs


def check(row, dtype=tf.float64, tolerance=1e-12):
    optimizer, oracle_kwargs = make_optimizer(row)
    inits, grads = cases.problem(STEPS)
    history = cases.run(row["mode"], optimizer, inits, grads, dtype)
    assert (
        cases.worst(history, cases.oracle.train(row["case"].rule, inits, grads, **oracle_kwargs)) < tolerance
    )


ROWS = cases.product(OPTIONS, is_sensible)


@pytest.mark.parametrize("row", cases.cover_pairs(ROWS), ids=name_row)
def test_every_pair_of_options(row):
    check(row)


@pytest.mark.slow
@ALL_CASES
def test_every_combination_eagerly(case):
    rows = [row for row in ROWS if row["case"] is case and row["mode"] == "eager"]
    assert len(rows) in (96, 288)
    for row in rows:
        try:
            check(row)
        except AssertionError as error:
            raise AssertionError(name_row(row)) from error


@axes.pairwise(axes.few_graphs, case=cases.CASES, mode=cases.MODES)
def test_float32(case, mode):
    row = {axis: values[-1] for axis, values in OPTIONS.items()} | {"case": case, "mode": mode}
    row |= {"decay_mode": "learning_rate", "accumulate": 1, "ema": None}
    check(row, tf.float32, 2e-6)


def test_the_covering_array_covers():
    chosen = cases.cover_pairs(ROWS)
    assert len(chosen) < 60
    for one, other in itertools.combinations(OPTIONS, 2):
        every = {(repr(row[one]), repr(row[other])) for row in ROWS}
        assert every == {(repr(row[one]), repr(row[other])) for row in chosen}


@axes.pairwise(case=cases.CASES, shape=[(0,), (1,), (3, 0, 2), ()], mode=["eager", "fused eager"])
def test_odd_shapes(case, shape, mode):
    rng = np.random.default_rng(1)
    inits = [rng.normal(size=shape), rng.normal(size=(2,))]
    grads = [[rng.normal(size=shape), rng.normal(size=(2,))] for _ in range(3)]
    row = {key: values[0] for key, values in OPTIONS.items()} | {"case": case}
    optimizer, oracle_kwargs = make_optimizer(row)
    oracle_kwargs["rates"] = oracle_kwargs["rates"][:3]
    history = cases.run(mode, optimizer, inits, grads, paths=("a", "b"))
    expected = cases.oracle.train(case.rule, inits, grads, **oracle_kwargs)
    for step, expected_step in zip(history, expected, strict=True):
        np.testing.assert_allclose(step[0], expected_step[0], rtol=1e-12)
        np.testing.assert_allclose(step[1], expected_step[1], rtol=1e-12)


@MODES_XLA_SLOW
def test_bias_corrections_do_not_cancel(mode):
    """With beta_2 = 1 - 1e-7, 1 - beta_2^t in float32 is 0 or off by a tenth; here step 1 is lr sign(g)."""
    optimizer = tav.AdamW(0.125, weight_decay=0.0, beta_1=0.9999999, beta_2=0.9999999, epsilon=0.0)
    history = cases.run(mode, optimizer, [np.zeros(3)], [[np.array([1e-3, -2.0, 5.0])]], tf.float32, "a")
    np.testing.assert_allclose(history[0][0], [-0.125, 0.125, -0.125], rtol=5e-7)


@pytest.mark.parametrize("cls", [tav.AdamW, tav.QHAdam, tav.LAMB])
def test_a_beta_that_float32_rounds_to_1(cls):
    """1 - beta is then 0 in float32: the first step is still one of the learning rate's length."""
    optimizer = cls(0.125, beta_1=1 - 1e-9, beta_2=1 - 1e-9)
    history = cases.run("graph", optimizer, [np.ones(1)], [[np.ones(1)]], tf.float32, "a")
    np.testing.assert_allclose(history[0][0], 0.875, rtol=2e-3)


@MODES_XLA_SLOW
def test_the_first_step_is_exact_to_float32(mode):
    """The kernels' 1 - 0.999 is off by 1.3e-5: from zero moments d is 1 all the same."""
    optimizer = tav.AdamW(0.125, weight_decay=0.0, epsilon=0.0)
    history = cases.run(mode, optimizer, [np.zeros(3)], [[np.array([1e-3, -2.0, 5.0])]], tf.float32, "a")
    np.testing.assert_allclose(history[0][0], [-0.125, 0.125, -0.125], rtol=3e-7)


def test_update_step_is_keras_s_interface_for_one_variable():
    weights = tf.Variable([1.0, 2.0], dtype=tf.float64)
    other = tf.Variable([1.0, 2.0], dtype=tf.float64)
    optimizer, twin = tav.QHAdamW(0.125), tav.QHAdamW(0.125)
    optimizer.build([weights])
    optimizer.update_step(tf.constant([1.0, -1.0], tf.float64), weights, optimizer.learning_rate)
    twin.apply([tf.constant([1.0, -1.0], tf.float64)], [other])
    np.testing.assert_array_equal(weights.numpy(), other.numpy())


@pytest.mark.parametrize("mode", ["graph", "fused graph", pytest.param("xla", marks=pytest.mark.slow)])
def test_a_traced_step_is_freed_with_its_function(mode):
    """TensorFlow's all_reduce, which Keras calls for one replica too, would keep what was traced for good."""
    weights = [tf.Variable(tf.ones(3))]
    step = cases.apply_in(mode, tav.AdamW(), weights)
    graph = weakref.ref(step.get_concrete_function([tf.ones(3)]).graph)
    del step
    for _ in range(2):  # what has a finalizer takes two rounds
        gc.collect()
    assert graph() is None


@axes.pairwise(axes.few_graphs, case=cases.CASES, beta=[0.0, 1e-6, 0.01, 0.3, 0.5], mode=cases.MODES)
def test_a_small_beta_forgets_a_large_gradient(case, beta, mode):
    """Of m + (1 - beta) (g - m) the rounding of a large old m would be left."""
    grads = [[np.array([scale, -2 * scale])] for scale in (1.0, 2.0**-16, 2.0**-14)]
    terms = case.oracle_kwargs | {"beta_1": beta, "beta_2": beta, "epsilon": 2.0**-60}
    actual = cases.run(mode, case.cls(0.125, **terms), [np.ones(2)], grads, tf.float32, ["w"])
    expected = cases.oracle.train(case.rule, [np.ones(2)], grads, [0.125] * 3, **terms)
    assert cases.worst(actual, expected) < 5e-6
