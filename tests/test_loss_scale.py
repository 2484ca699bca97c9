"""Loss scales: `loss_scale_factor`, and Keras's LossScaleOptimizer around an optimizer."""

import axes
import cases
import keras
import numpy as np
import pytest
import tensorflow as tf
from axes import CLASSES, FUSED, SPARSE_UPDATES
from like_sgd import (
    CLASSES_FUSED,
    CLASSES_FUSED_FORMS,
    NEWER_KERAS,
    START,
    assert_close,
    gradient,
    like_sgd,
    slot,
    sparse_options,
    variable,
)
from sparse import slices

import tf_adam_variants as tav

INF = float("inf")
FOUR = [1.0, 2.0, 3.0, 4.0]
GRADIENT = np.array([1.0, 6.0, 7.0, 2.0], "float32")


def scale_loss_of(inner, **arguments):
    return keras.optimizers.LossScaleOptimizer(inner, **arguments)


# -- loss_scale_factor


@CLASSES_FUSED_FORMS
def test_a_loss_scale_divides_the_gradient(cls, fused, form):
    weights, twin = variable(), variable()
    optimizer = cls(1.0, fused=fused, loss_scale_factor=1024.0, beta_1=0.0, **sparse_options(form))
    assert optimizer.scale_loss(1.0) == 1024.0
    optimizer.apply([gradient(START * 1024, form)], [weights])
    assert_close(slot(optimizer, "_momentum"), START)
    cls(1.0, fused=fused, beta_1=0.0, **sparse_options(form)).apply([gradient(START, form)], [twin])
    np.testing.assert_array_equal(weights, twin)


@SPARSE_UPDATES
def test_a_loss_scale_of_a_sparse_gradient(sparse_update):
    plain, scaled, wrapped = (tf.Variable(np.ones((4, 2))) for _ in range(3))
    values = np.random.default_rng(0).normal(size=(3, 2))
    once = slices([1, 1, 2], values, tf.float64, shape=(4, 2))
    four = slices([1, 1, 2], 4 * values, tf.float64, shape=(4, 2))
    tav.AdamW(0.125, sparse_update=sparse_update).apply([once], [plain])
    tav.AdamW(0.125, sparse_update=sparse_update, loss_scale_factor=4.0).apply([four], [scaled])
    inner = tav.AdamW(0.125, sparse_update=sparse_update)
    keras.optimizers.LossScaleOptimizer(inner, initial_scale=4.0).apply([four], [wrapped])
    np.testing.assert_array_equal(plain.numpy(), scaled.numpy())
    np.testing.assert_array_equal(plain.numpy(), wrapped.numpy())


@FUSED
def test_a_loss_scale_is_taken_off_in_float32(fused):
    """1e-8 is none in float16."""
    scaled = tf.constant([1e-4, 1.05e-7, 1e-8]) * 2.0**15
    weights = tf.Variable(tf.ones(3, tf.float16))
    optimizer = tav.AdamW(
        2.0**-6, weight_decay=0.0, epsilon=1e-12, loss_scale_factor=2.0**15, master_weights=True, fused=fused
    )
    for _ in range(4):
        optimizer.apply([tf.cast(scaled, tf.float16)], [weights])
    np.testing.assert_allclose(tf.cast(weights, tf.float32), 1 - 4 * 2.0**-6, rtol=2.0**-11)


@pytest.mark.parametrize("mode", ["eager", "fused eager"])
def test_half_precision_slices_divided_by_a_large_loss_scale(mode):
    weights = tf.Variable(tf.ones((4, 2), tf.float16))
    optimizer = tav.AdamW(0.125, loss_scale_factor=65536.0, epsilon=1e-12, weight_decay=0.0)
    cases.apply_in(mode, optimizer, [weights])([slices([1], np.full((1, 2), 0.02), tf.float16)])
    np.testing.assert_allclose(weights[1], 0.875, rtol=1e-3)


# -- LossScaleOptimizer


@CLASSES_FUSED_FORMS
def test_a_finite_step(cls, fused, form):
    """The gradient is divided by the scale, and by that of the optimizer inside no more."""
    inner_scale = 100.0 if hasattr(keras.optimizers, "MultiOptimizer") else None  # Keras 3.6 divides twice
    inner = like_sgd(cls, 0.5, fused=fused, beta_1=0.0, loss_scale_factor=inner_scale, **sparse_options(form))
    optimizer, weights = scale_loss_of(inner), variable(FOUR)
    assert inner.loss_scale_factor is None
    optimizer.apply([gradient(GRADIENT * optimizer.initial_scale, form)], [weights])
    assert_close(slot(inner, "_momentum"), GRADIENT)
    assert_close(weights, np.array(FOUR) - 0.5)


@CLASSES_FUSED
def test_variables_need_not_be_given_again(cls, fused):
    optimizer, weights = scale_loss_of(like_sgd(cls, 0.5, fused=fused)), variable(FOUR)
    optimizer.build([weights])
    optimizer.apply([gradient(GRADIENT * optimizer.initial_scale)])
    assert_close(weights, np.array(FOUR) - 0.5)


@CLASSES_FUSED_FORMS
def test_an_infinite_step_is_not_taken(cls, fused, form):
    inner = cls(0.5, fused=fused, **sparse_options(form))
    optimizer, weights = scale_loss_of(inner), variable(FOUR)
    for bad in (INF, -INF, float("nan")):
        optimizer.apply([gradient([1.0, bad, 1.0, 1.0], form)], [weights])
    assert_close(weights, FOUR, 0)
    assert int(inner.iterations) == 0
    for name in ("_momentum", "_velocity"):
        assert not np.any(slot(inner, name))


@NEWER_KERAS
@CLASSES_FUSED
def test_an_overwriting_gradient_is_not_divided(cls, fused):
    weights = variable(FOUR)
    weights.overwrite_with_gradient = True
    scale_loss_of(cls(0.5, fused=fused)).apply([gradient(GRADIENT)], [weights])
    assert_close(weights, GRADIENT, 0)


@axes.pairwise(cls=cases.CLASSES, fused=[False, True], in_graph=[False, True])
def test_the_scale_falls_and_grows(cls, fused, in_graph):
    """Halved by each gradient that is not finite, doubled after two in a row that are."""
    weights, steps = variable(FOUR), tf.function if in_graph else lambda step: step
    falling = scale_loss_of(cls(0.5, fused=fused), initial_scale=400.0)
    falling.build([weights])
    step = steps(lambda g: falling.apply([g], [weights]))
    for _ in range(4):
        step(tf.fill([4], INF))
    assert_close(falling.scale_loss(1.0), 25.0)
    assert_close(weights, FOUR, 0)
    growing = scale_loss_of(cls(0.5, fused=fused), initial_scale=2.0, dynamic_growth_steps=2)
    growing.build([weights])
    step = steps(lambda g: growing.apply([g], [weights]))
    for count in range(8):
        step(tf.constant(GRADIENT))
        assert int(growing.inner_optimizer.iterations) == count + 1
    assert_close(growing.scale_loss(1.0), 32.0)


@CLASSES
def test_a_loss_scale_optimizer_comes_back(cls):
    inner = cls(0.5, exclude_from_weight_decay=["bias"], sparse_update="lazy", clipnorm=2.0)
    optimizer = scale_loss_of(inner, initial_scale=3.0, dynamic_growth_steps=2, name="mine")
    again = keras.optimizers.deserialize(keras.optimizers.serialize(optimizer))
    assert (again.name, again.initial_scale, again.dynamic_growth_steps) == ("mine", 3.0, 2)
    assert type(again.inner_optimizer) is cls
    assert again.inner_optimizer.get_config() == inner.get_config()


def test_a_loss_scale_optimizer_wraps_it():
    inner = tav.AdamW(0.125)
    outer = keras.optimizers.LossScaleOptimizer(inner, initial_scale=4.0)
    weights, twin = tf.Variable([1.0, 2.0]), tf.Variable([1.0, 2.0])
    outer.apply([tf.constant([4.0, -8.0])], [weights])
    tav.AdamW(0.125).apply([tf.constant([1.0, -2.0])], [twin])
    np.testing.assert_array_equal(weights.numpy(), twin.numpy())
    outer.apply([tf.constant([np.nan, 1.0])], [weights])
    np.testing.assert_array_equal(weights.numpy(), twin.numpy())
