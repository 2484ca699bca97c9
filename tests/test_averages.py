"""Exponential moving averages of the weights: `use_ema`."""

import axes
import cases
import keras
import numpy as np
import pytest
import tensorflow as tf
from like_sgd import (
    CLASSES_FUSED_FORMS,
    ONES,
    START,
    assert_close,
    gradient,
    like_sgd,
    slot,
    sparse_options,
    variable,
)

import tf_adam_variants as tav


@CLASSES_FUSED_FORMS
def test_an_average_of_the_weights_overwrites_them(cls, fused, form):
    weights = variable(START + 2)
    optimizer = like_sgd(
        cls, fused=fused, use_ema=True, ema_momentum=0.9, ema_overwrite_frequency=3, **sparse_options(form)
    )
    for expected, average in ((START + 1, START + 1), (START, START + 0.9), (START + 0.71, START + 0.71)):
        optimizer.apply([gradient(ONES, form)], [weights])
        assert_close(weights, expected)
        assert_close(slot(optimizer, "_average"), average)


@axes.pairwise(case=cases.PLAIN_CASES, run_eagerly=[True, False])
def test_fit_ends_with_the_average(case, run_eagerly):
    """Weights of 1, an input of 1 and a target of 0: the gradient of the mean square is the weight."""
    layer = keras.layers.Dense(2, kernel_initializer="ones", use_bias=False)
    model = keras.Sequential([keras.Input((1,)), layer])
    model.compile(
        case.cls(0.125, use_ema=True, ema_momentum=0.75, **case.oracle_kwargs), "mse", run_eagerly=run_eagerly
    )
    model.fit(np.ones((1, 1)), np.zeros((1, 1)), batch_size=1, epochs=2, verbose=0)
    oracle_kwargs, weights, slots, steps = case.oracle_kwargs, np.ones((1, 2)), {}, []
    decay = oracle_kwargs.pop("weight_decay", 0.0) * (1.0 if case.cls is tav.LAMB else 0.125)
    for t in (1, 2):
        weights = case.rule(weights, weights, t, slots, 0.125, decay, **oracle_kwargs)
        steps.append(weights)
    expected = 0.75 * steps[0] + 0.25 * steps[1]
    assert_close(layer.kernel, expected, 2e-6)
    assert_close(slot(model.optimizer, "_average"), expected, 2e-6)


@pytest.mark.parametrize("momentum", [0.5, 0.99])
@pytest.mark.parametrize("dtype", [tf.float16, tf.bfloat16], ids=axes.name_value)
def test_averages_of_half_precision_are_float32(dtype, momentum):
    """In bfloat16 a momentum of 0.999 is 1, and the average would stay where it began."""
    options = {"use_ema": True, "ema_momentum": momentum, "weight_decay": 0.0}
    weights, twin = tf.Variable(tf.ones(2, dtype)), tf.Variable(tf.ones(2))
    half, full = tav.AdamW(2e-3, master_weights=True, **options), tav.AdamW(2e-3, **options)
    for _ in range(200):
        half.apply([tf.ones(2, dtype)], [weights])
        full.apply([tf.ones(2)], [twin])
    half.finalize_variable_values([weights])
    full.finalize_variable_values([twin])
    assert twin[0] < 0.9
    spacing = 2.0 ** (-10 if dtype == tf.float16 else -7)
    np.testing.assert_allclose(tf.cast(weights, tf.float32), twin, atol=spacing)


def test_averages_of_float64_are_float64():
    weights = tf.Variable([1.0, 2.0], dtype=tf.float64)
    optimizer = tav.AdamW(0.125, use_ema=True, ema_momentum=0.99)
    expected = None
    for _ in range(5):
        optimizer.apply([tf.ones(2, tf.float64)], [weights])
        expected = weights.numpy() if expected is None else 0.99 * expected + 0.01 * weights.numpy()
    optimizer.finalize_variable_values([weights])
    np.testing.assert_allclose(weights.numpy(), expected, rtol=1e-14)
