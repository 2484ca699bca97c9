"""Weight decay that means what it says: the modes and the peak."""

import cases
import keras
import numpy as np
import pytest
import tensorflow as tf

import tf_adam_variants as tav

DECOUPLED = pytest.mark.parametrize("cls", [tav.AdamW, tav.QHAdamW])


schedules = keras.optimizers.schedules


def measure_decay(optimizer, steps, between=lambda step: None):
    """The share of a weight that each step takes off: a zero gradient leaves the decay alone."""
    weights = tf.Variable([1.0, -2.0], dtype=tf.float64)
    optimizer.build([weights])
    shares = []
    for step in range(steps):
        between(step)
        before = weights.numpy()
        optimizer.apply([tf.zeros(2, tf.float64)], [weights])
        shares.append((1 - weights.numpy() / before)[0])
    return np.array(shares)


@DECOUPLED
def test_learning_rate_mode_scales_with_the_rate(cls):
    shares = measure_decay(cls(0.25, weight_decay=0.125), 1)
    np.testing.assert_allclose(shares, 0.25 * 0.125, rtol=1e-13)


@DECOUPLED
def test_independent_mode_is_the_decay_itself(cls):
    shares = measure_decay(cls(0.25, weight_decay=0.125, weight_decay_mode="independent"), 1)
    np.testing.assert_allclose(shares, 0.125, rtol=1e-13)


@pytest.mark.parametrize("rate", [1e-3, 3e-3, 0.25])
@DECOUPLED
def test_schedule_mode_leaves_the_decay_alone_when_the_rate_is_another(cls, rate):
    """Tuning the learning rate does not tune the decay, and at the peak the factor is exactly 1."""
    shares = measure_decay(cls(rate, weight_decay=0.125, weight_decay_mode="schedule"), 3)
    np.testing.assert_allclose(shares, 0.125, rtol=1e-13)


@DECOUPLED
def test_schedule_mode_follows_a_schedule_with_warm_up(cls):
    def shares(peak):
        schedule = schedules.CosineDecay(0.0, decay_steps=6, warmup_target=peak, warmup_steps=3)
        optimizer = cls(schedule, weight_decay=0.125, weight_decay_mode="schedule")
        return measure_decay(optimizer, 9)

    np.testing.assert_allclose(shares(1e-3), shares(0.7), rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(shares(1e-3)[:4], 0.125 * np.array([0, 1 / 3, 2 / 3, 1]), rtol=1e-6)


@DECOUPLED
def test_schedule_mode_follows_the_rate_when_it_is_set_later(cls):
    optimizer = cls(0.25, weight_decay=0.125, weight_decay_mode="schedule")

    def halve(step):
        optimizer.learning_rate = 0.25 * 0.5**step

    np.testing.assert_allclose(measure_decay(optimizer, 3, halve), [0.125, 0.0625, 0.03125], rtol=1e-13)
    again = cls.from_config(optimizer.get_config())
    assert float(again.learning_rate) == 0.0625
    assert again.peak_learning_rate == 0.25
    np.testing.assert_allclose(measure_decay(again, 1), 0.03125, rtol=1e-13)


PEAKS = [
    (0.25, 0.25),
    (schedules.ExponentialDecay(0.5, 10, 0.9), 0.5),
    (schedules.CosineDecay(0.125, 10), 0.125),
    (schedules.CosineDecay(0.0, 10, warmup_target=0.75, warmup_steps=2), 0.75),
    (tav.schedules.LinearWarmup(0.375, 10), 0.375),
    (tav.schedules.LinearWarmup(schedules.PolynomialDecay(0.875, 10), 10, 0.25), 0.875),
]


@pytest.mark.parametrize(("rate", "peak"), PEAKS, ids=lambda value: type(value).__name__)
def test_the_peak_is_found(rate, peak):
    assert tav.AdamW(rate, weight_decay_mode="schedule").peak_learning_rate == peak


UNKNOWN = [
    schedules.PiecewiseConstantDecay([2], [0.5, 0.25]),
    tav.schedules.LinearWarmup(schedules.PiecewiseConstantDecay([2], [0.5, 0.25]), 10),
    lambda: 0.5,
]


@pytest.mark.parametrize("rate", UNKNOWN, ids=["piecewise", "warmup", "callable"])
def test_an_unknown_peak_is_an_error_that_names_the_argument(rate):
    with pytest.raises(ValueError, match="peak_learning_rate"):
        tav.QHAdamW(rate, weight_decay_mode="schedule")
    optimizer = tav.QHAdamW(rate, weight_decay_mode="schedule", peak_learning_rate=0.5, weight_decay=0.125)
    np.testing.assert_allclose(
        measure_decay(optimizer, 1), 0.0 if "Warmup" in type(rate).__name__ else 0.125, rtol=1e-13
    )


def test_lamb_s_ratio_is_1_where_a_norm_is_0():
    inits, grads = [np.zeros(3), np.ones(2)], [[np.ones(3), np.zeros(2)]]
    history = cases.run("graph", tav.LAMB(0.5, weight_decay=0.0, epsilon=0.5), inits, grads, paths="ab")
    np.testing.assert_allclose(history[0][0], -0.5 / 1.5)
    np.testing.assert_array_equal(history[0][1], 1.0)
