"""Learning rates of each kind: numbers, tensors, functions, schedules."""

import axes
import cases
import keras
import numpy as np
import oracle
import pytest
import tensorflow as tf
from axes import CLASSES
from like_sgd import ONES, START, assert_close, gradient, like_sgd, variable
from strategies import strategy_of

import tf_adam_variants as tav


@axes.pairwise(cls=cases.CLASSES, mode=cases.MODES)
def test_a_callable_is_a_learning_rate(cls, mode):
    weights, rate = variable(), tf.Variable(0.1)
    optimizer = like_sgd(cls, rate.read_value)
    assert int(optimizer.iterations) == 0
    step = cases.apply_in(mode, optimizer, [weights])
    step([gradient(ONES)])
    assert_close(weights, START - 0.1)
    assert int(optimizer.iterations) == 1
    rate.assign(0.2)  # asked for in every step
    step([gradient(ONES)])
    assert_close(weights, START - 0.3)


@CLASSES
def test_a_schedule_in_place_of_a_float_removes_the_variable_of_the_rate(cls):
    optimizer = cls(0.25)
    assert len(optimizer.variables) == 2
    optimizer.learning_rate = keras.optimizers.schedules.PolynomialDecay(optimizer.learning_rate, 4)
    assert len(optimizer.variables) == 1
    assert float(optimizer.learning_rate) == 0.25
    optimizer.apply([gradient(ONES)], [variable()])
    assert float(optimizer.learning_rate) == pytest.approx(0.25 - 0.2499 / 4)


def test_a_tensor_is_a_learning_rate_too():
    optimizer = tav.AdamW()
    optimizer.learning_rate = tf.constant(0.25)
    assert float(optimizer.learning_rate) == 0.25
    optimizer.learning_rate = tav.AdamW(0.5).learning_rate
    assert float(optimizer.learning_rate) == 0.5
    with pytest.raises(ValueError, match="learning_rate"):
        optimizer.learning_rate = tf.constant(float("nan"))

    @tf.function
    def set_in_a_graph(value):
        optimizer.learning_rate = value

    set_in_a_graph(tf.constant(0.125))
    assert float(optimizer.learning_rate) == 0.125


VARIABLES = {
    "tf.Variable": lambda: tf.Variable(0.5),
    "keras.Variable": lambda: keras.Variable(0.5),
    "not trained": lambda: keras.Variable(0.5, trainable=False, name="learning_rate"),
    "float64": lambda: tf.Variable(0.5, trainable=False, dtype=tf.float64, name="learning_rate"),
    "an element": lambda: tf.Variable([0.5]),
}


@pytest.mark.parametrize("kind", VARIABLES)
def test_a_variable_is_no_learning_rate_but_a_callable_follows_it(kind):
    rate = VARIABLES[kind]()
    optimizer = tav.QHAdam(0.25)
    scaled = keras.optimizers.LossScaleOptimizer(optimizer)

    def set_on(target):
        target.learning_rate = rate

    for use in (
        tav.LAMB,
        lambda rate: tav.AdamW.from_config({"learning_rate": rate}),
        lambda _: set_on(optimizer),
        lambda _: set_on(scaled),
        lambda _: tf.function(set_on, autograph=False)(optimizer),
    ):
        with pytest.raises(ValueError, match=r"`learning_rate` must not be a variable.*callable.*assign"):
            use(rate)
    assert float(optimizer.learning_rate) == 0.25
    if kind == "an element":
        return
    optimizer.learning_rate = lambda: rate
    in_graph = tf.function(lambda: tf.convert_to_tensor(optimizer.learning_rate))
    for value in (0.5, 0.125):
        rate.assign(value)
        assert float(optimizer.learning_rate) == float(in_graph()) == value


def test_a_variable_of_each_replica_is_no_learning_rate():
    with strategy_of("two replicas").scope():
        for rate in (tf.Variable(0.5), keras.Variable(0.5)):
            with pytest.raises(ValueError, match="must not be a variable"):
                tav.AdamW(rate)


@pytest.mark.parametrize("make", [tav.AdamW, keras.optimizers.Adam], ids=["ours", "Keras's"])
def test_the_rate_of_an_optimizer_is_copied(make):
    """Keras copies it too. `assign` on the rate is how Keras 2 set it."""
    other = make(0.5)
    optimizer = tav.LAMB(other.learning_rate)
    for change in (0.25, 0.125):
        other.learning_rate = change
        optimizer.learning_rate = other.learning_rate
        other.learning_rate = 1.0
        assert float(optimizer.learning_rate) == change
    optimizer.learning_rate = optimizer.learning_rate
    optimizer.learning_rate *= 2
    assert float(optimizer.learning_rate) == 0.25
    optimizer.learning_rate.assign(0.0625)
    assert optimizer.get_config()["learning_rate"] == 0.0625


SMALL = float(np.float32(1e-3))  # Addons' rate, as Keras keeps it
FALLING = keras.optimizers.schedules.InverseTimeDecay(SMALL, decay_steps=1, decay_rate=0.5)
RATES = {
    "tensor": (lambda: tf.constant(SMALL), [SMALL] * 3),
    "function": (lambda: lambda: SMALL, [SMALL] * 3),
    "inverse time decay": (lambda: FALLING, [SMALL, float(FALLING(1)), SMALL / 2]),
}


@axes.pairwise(case=cases.PLAIN_CASES, rate=list(RATES), mode=["eager", "fused eager"])
def test_learning_rates_of_every_kind(case, rate, mode):
    make_rate, rates = RATES[rate]
    assert rates == pytest.approx([1e-3] * 3 if "time" not in rate else [1e-3, 1e-3 / 1.5, 1e-3 / 2])
    inits, grads = cases.problem(3)
    actual = cases.run(mode, case.cls(make_rate(), **case.oracle_kwargs), inits, grads)
    expected = oracle.train(case.rule, inits, grads, rates, **case.oracle_kwargs)
    assert cases.worst(actual, expected) < 1e-12


def test_a_callable_may_ask_for_its_replica():
    strategy = strategy_of("two replicas")

    def rate():
        replica = tf.distribute.get_replica_context().replica_id_in_sync_group
        return 0.5 if replica is not None else 0.0

    with strategy.scope():
        weights = tf.Variable([1.0])
        optimizer = tav.AdamW(rate, weight_decay=0.0, epsilon=0.0)
        optimizer.build([weights])
    strategy.run(tf.function(lambda: optimizer.apply([tf.identity(tf.ones(1))], [weights])))
    assert float(weights.numpy()[0]) == 0.5
