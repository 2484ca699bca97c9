"""The schedule that warms up. `converters.from_nadam` is in test_equivalences.py."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import tf_adam_variants as tav
from tf_adam_variants import schedules


def test_warm_up_of_goyal_et_al():
    """Reference rate 0.1 for 256 images, batches of 8,192: to 3.2 in 5 epochs, a tenth from 30 on."""
    per_epoch = 156
    steps = keras.optimizers.schedules.PiecewiseConstantDecay(
        [30 * per_epoch - 1, 60 * per_epoch - 1, 80 * per_epoch - 1], [3.2, 0.32, 0.032, 0.0032]
    )
    schedule = schedules.LinearWarmup(steps, 5 * per_epoch, initial_learning_rate=0.1)
    rate = [float(schedule(step)) for step in range(0, 90 * per_epoch, 26)]
    epoch = np.arange(len(rate)) / 6
    increments = np.diff(np.array(rate)[epoch <= 5])
    np.testing.assert_allclose(increments, 3.1 / 30, rtol=1e-4)
    want = np.select([epoch < 30, epoch < 60, epoch < 80], [3.2, 0.32, 0.032], 0.0032)
    np.testing.assert_allclose(np.array(rate)[epoch >= 5], want[epoch >= 5], rtol=1e-6)
    assert rate[0] == pytest.approx(0.1)


def test_a_shifted_schedule_begins_after_the_warm_up():
    cosine = keras.optimizers.schedules.CosineDecay(0.5, 10)
    schedule = schedules.LinearWarmup(cosine, 4, shift_schedule=True)
    twin = keras.optimizers.schedules.CosineDecay(0.0, 10, warmup_target=0.5, warmup_steps=4)
    for step in range(16):
        assert float(schedule(step)) == pytest.approx(float(twin(step)), rel=1e-6, abs=1e-9)


TABLE = tf.constant([0.125, 0.25, 0.375, 0.5, 0.625, 0.75])
# What schedules of users do with the step. All but the last few do not take a float.
USES = {
    "table": lambda step: tf.gather(TABLE, step),
    "one hot": lambda step: tf.reduce_sum(tf.one_hot(step, 6) * TABLE),
    "every fourth": lambda step: tf.where(tf.equal(step % 4, tf.constant(0, tf.int64)), 0.5, 0.25),
    "type": lambda step: {tf.int64: 0.5}[tf.as_dtype(step.dtype)],
    "branches": lambda step: tf.switch_case(tf.cast(step % 2, tf.int32), [lambda: 0.5, lambda: 0.25]),
    "table of Keras": lambda step: keras.ops.take(TABLE, step),
    "quotient": lambda step: 0.5 / (1 + step / 4.0),
    "product": lambda step: tf.constant(0.125) * step,
    "Keras's value": lambda step: 0.125 * tf.cast(step.value, tf.float32),
}


class Inner(keras.optimizers.schedules.LearningRateSchedule):
    """A user's schedule."""

    def __init__(self, use):
        self.use = use

    def __call__(self, step):
        return self.use(step)


@pytest.mark.parametrize(
    ("use", "shift"), [(use, True) for use in USES] + [("table", False), ("quotient", False)]
)
def test_a_schedule_sees_the_step_as_an_optimizer_gives_it(use, shift):
    """As Keras gives it to the schedule alone: eagerly, in a graph, and in a LossScaleOptimizer."""
    alone = keras.optimizers.SGD(Inner(USES[use]))
    warm = tav.AdamW(schedules.LinearWarmup(Inner(USES[use]), 2, shift_schedule=shift))
    scaled = keras.optimizers.LossScaleOptimizer(warm)
    in_graph = tf.function(lambda: tf.convert_to_tensor(warm.learning_rate))
    for step in (2, 5):
        alone._iterations.assign(step - 2 if shift else step)
        warm._iterations.assign(step)
        expected = float(alone.learning_rate)
        assert [float(rate) for rate in (warm.learning_rate, scaled.learning_rate, in_graph())] == [
            expected
        ] * 3


@pytest.mark.parametrize("shift", [False, True])
def test_a_schedule_sees_the_step_that_a_user_gives(shift):
    """In int64, whatever type the step has."""
    numbers = (3, 3.0, np.int32(3), np.float32(3), np.array(3), tf.constant(3.0))
    tensors = (tf.constant(3), tf.constant(3, tf.int64), tf.Variable(3), keras.Variable(3, dtype="int32"))
    for use in ("table", "one hot", "every fourth", "type", "quotient", "product"):
        schedule = schedules.LinearWarmup(Inner(USES[use]), 2, shift_schedule=shift)
        expected = np.float32(USES[use](np.int64(1 if shift else 3)))
        for step in numbers if use in ("quotient", "product") else numbers + tensors:
            assert float(schedule(step)) == expected, (use, step)
    cosine = keras.optimizers.schedules.CosineDecay(0.5, 10)
    assert float(schedules.LinearWarmup(cosine, 2)(2.5)) == float(cosine(2.5))  # not a step, but a plot


def test_a_warm_up_counts_exactly():
    """float32 does not hold 2^24 + 1, nor int32 2^40."""
    for shift in (False, True):
        seen = Inner(lambda step: tf.where(tf.equal(tf.cast(step, tf.int64) % 2, 1), 0.5, 0.25))
        schedule = schedules.LinearWarmup(seen, 2, shift_schedule=shift)
        for steps in (2**24, 2**40):
            assert [float(schedule(step)) for step in (steps, steps + 1)] == [0.25, 0.5]


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("schedule", -1.0),
        ("schedule", None),
        ("schedule", "cosine"),
        ("warmup_steps", 0),
        ("warmup_steps", 1.5),
        ("warmup_steps", -3),
        ("initial_learning_rate", -0.1),
        ("initial_learning_rate", float("nan")),
        ("shift_schedule", 1),
    ],
)
def test_wrong_warm_ups(argument, value):
    with pytest.raises(ValueError, match=argument) as error:
        schedules.LinearWarmup(**({"schedule": 0.1, "warmup_steps": 10} | {argument: value}))
    assert repr(value) in str(error.value)


def test_a_model_trains_with_a_warm_up():
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)])
    optimizer = keras.optimizers.get(
        {
            "class_name": "qhadam",
            "config": {"learning_rate": keras.optimizers.schedules.serialize(schedules.LinearWarmup(0.5, 8))},
        }
    )
    model.compile(optimizer, "mse")
    x = np.random.default_rng(0).normal(size=(64, 3))
    model.fit(x, x.sum(axis=1), batch_size=16, epochs=2, verbose=0)
    assert float(optimizer.learning_rate) == 0.5
