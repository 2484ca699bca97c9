"""Keras's MultiOptimizer around several optimizers."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from axes import CLASSES
from like_sgd import (
    CLASSES_FUSED,
    CLASSES_FUSED_FORMS,
    NEWER_KERAS,
    assert_close,
    gradient,
    like_sgd,
    slot,
    sparse_options,
    variable,
)

import tf_adam_variants as tav

pytestmark = NEWER_KERAS


def multi(default, others, **arguments):
    return keras.optimizers.MultiOptimizer(keras.optimizers.OptimizerMap(default, others), **arguments)


def create_in_scope(scope, value):
    with keras.name_scope(scope):
        return variable(value, name="kernel")


def make_three_variables():
    return [
        create_in_scope(scope, [[value] * 2])
        for scope, value in (("dense_1", 2.0), ("dense_2", 3.0), ("other", 4.0))
    ]


def check_each_has_its_own(optimizer, own, form="dense"):
    """`own` are optimizers of the rates 0.1, 1 and 0 for the three variables."""
    weights = make_three_variables()
    optimizer.build(weights)
    assert optimizer.optimizers == own
    optimizer.apply([gradient([[1.0, 1.0]], form) for _ in weights], weights)
    for actual, expected in zip(weights, (1.9, 2.0, 4.0), strict=True):
        assert_close(actual, [[expected, expected]])
    assert [int(one.iterations) for one in (optimizer, *own)] == [1] * 4
    assert [len(one.variables) for one in own] == [4] * 3


@CLASSES_FUSED_FORMS
def test_each_variable_is_stepped_by_the_optimizer_of_its_pattern(cls, fused, form):
    first, second, default = (
        like_sgd(cls, rate, fused=fused, **sparse_options(form)) for rate in (0.1, 1.0, 0.0)
    )
    optimizer = multi(default, {"^dense_1/.*": first, "^dense_2/.*": second})
    check_each_has_its_own(optimizer, [first, second, default], form)


@CLASSES
def test_each_variable_is_stepped_by_the_optimizer_that_a_function_chooses(cls):
    own = [like_sgd(cls, rate) for rate in (0.1, 1.0, 0.0)]
    chosen = dict(zip(("dense_1", "dense_2", "other"), own, strict=True))
    optimizer = keras.optimizers.MultiOptimizer(lambda v: chosen[v.path.split("/")[0]])
    check_each_has_its_own(optimizer, own)


@CLASSES
def test_two_patterns_for_one_variable_are_an_error(cls):
    optimizer = multi(cls(), {".*kernel.*": cls(), ".*dense.*": cls()})
    with pytest.raises(ValueError, match="Multiple optimizers"):
        optimizer.build(make_three_variables())


@CLASSES
def test_several_optimizers_come_back(cls):
    weights = make_three_variables()
    optimizer = multi(cls(0.125), {"^dense_1/.*": tav.LAMB(0.25), "^dense_2/.*": cls(0.5, clipnorm=1.0)})
    optimizer.build(weights)
    again = keras.optimizers.deserialize(keras.optimizers.serialize(optimizer))
    again.build(weights)
    for actual, expected in zip(again.optimizers, optimizer.optimizers, strict=True):
        assert type(actual) is type(expected)
        assert actual.get_config() == expected.get_config()
    assert [v.path for v in again.variables] == [v.path for v in optimizer.variables]


@CLASSES_FUSED
def test_one_loss_scale_for_several_optimizers(cls, fused):
    """Its own takes the place of theirs; under a LossScaleOptimizer it has none either."""
    inner = [cls(0.1, fused=fused, beta_1=0.0, loss_scale_factor=factor) for factor in (2.0, 3.0)]
    optimizer = multi(inner[0], {"^dense_1/.*": inner[1]}, loss_scale_factor=5.0)
    weights = make_three_variables()
    optimizer.build(weights)
    assert_close(optimizer.scale_loss(tf.constant(2.0)), 10.0)
    optimizer.apply([gradient([[10.0, 10.0]])] * 3, weights)
    for one in inner:
        assert_close(slot(one, "_momentum"), [[2.0, 2.0]])
    keras.optimizers.LossScaleOptimizer(optimizer, initial_scale=10.0)
    assert [one.loss_scale_factor for one in (optimizer, *inner)] == [None] * 3


@CLASSES_FUSED
def test_several_optimizers_under_a_loss_scale(cls, fused):
    inner = [like_sgd(cls, 0.1, fused=fused, beta_1=0.0) for _ in range(2)]
    optimizer = multi(inner[0], {"^dense_1/.*": inner[1]})
    optimizer = keras.optimizers.LossScaleOptimizer(optimizer, initial_scale=10.0)
    weights = make_three_variables()[:2]
    optimizer.build(weights)
    assert_close(optimizer.scale_loss(tf.constant(2.0)), 20.0)
    optimizer.apply([gradient([[10.0, 10.0]])] * 2, weights)
    assert_close(weights[0], [[1.9, 1.9]])
    assert_close(weights[1], [[2.9, 2.9]])
    for one in inner:
        assert_close(slot(one, "_momentum"), [[1.0, 1.0]])


def model_of(optimizer):
    layers = [
        keras.layers.Dense(size, kernel_initializer="ones", use_bias=False, name=name)
        for size, name in ((2, "dense_1"), (1, "dense_2"))
    ]
    model = keras.Sequential([keras.Input((1,)), *layers])
    model.compile(optimizer, "mse")
    return model


@CLASSES
def test_fit_with_several_optimizers(cls):
    first, second, default = (like_sgd(cls, rate) for rate in (1e-3, 1e-2, 0.1))
    model = model_of(multi(default, {".*dense_1/.*": first, ".*dense_2/.*": second}))
    model.fit(np.ones((1, 1)), np.zeros((1, 1)), batch_size=1, epochs=1, verbose=0)
    assert_close(model.get_weights()[0], [[0.999, 0.999]])  # Keras's numbers, of SGD, are for gradients of 4
    assert_close(model.get_weights()[1], [[0.99], [0.99]])
    assert [int(one.iterations) for one in (model.optimizer, first, second, default)] == [1, 1, 1, 0]


@pytest.mark.filterwarnings("ignore:__array__ implementation")  # Keras's callbacks' own
@CLASSES
def test_callbacks_reach_the_rates_of_several_optimizers(cls, tmp_path):
    first, second = cls(0.1, name="first"), cls(0.01, name="second")
    model = model_of(multi(second, {".*dense_1/.*": first}))

    def rates(expected):
        assert_close([float(one.learning_rate) for one in (first, second)], expected)

    scheduler = keras.callbacks.LearningRateScheduler(lambda epoch, rate: rate * 0.5)
    scheduler.set_model(model)
    scheduler.on_epoch_begin(epoch=1)
    rates([0.05, 0.005])
    plateau = keras.callbacks.ReduceLROnPlateau(monitor="val_loss", factor=0.5, patience=1)
    plateau.set_model(model)
    plateau.on_train_begin()
    plateau.on_epoch_end(epoch=0, logs={"val_loss": 1.0})
    rates([0.05, 0.005])
    plateau.on_epoch_end(epoch=1, logs={"val_loss": 1.0})
    rates([0.025, 0.0025])
    board = keras.callbacks.TensorBoard(tmp_path)
    board.set_model(model)
    logs = board._collect_learning_rate({})
    assert logs == {
        "learning_rate_first": pytest.approx(0.025),
        "learning_rate_second": pytest.approx(0.0025),
    }


@CLASSES
def test_averages_are_swapped_where_there_are_averages(cls):
    first, second = cls(0.1, use_ema=True, ema_momentum=0.9), cls(0.1)
    model = model_of(multi(second, {".*dense_1/.*": first}))
    model.train_on_batch(np.ones((1, 1)), np.ones((1, 1)))
    kernels = [layer.kernel for layer in model.layers]
    (average,) = (v for v in first.variables if v.path.endswith("_average"))
    values = [[[2.0, 2.0]], [[3.0], [3.0]], [[9.0, 9.0]]]
    for held, value in zip([*kernels, average], values, strict=True):
        held.assign(value)
    swap = keras.callbacks.SwapEMAWeights()
    swap.set_model(model)
    swap.on_test_begin()
    for held, value in zip([average, kernels[1], kernels[0]], values, strict=True):
        assert_close(held, value, 0)
    swap.on_test_end()
    for held, value in zip([*kernels, average], values, strict=True):
        assert_close(held, value, 0)


@CLASSES
def test_wrappers_are_not_nested(cls):
    for inner in (keras.optimizers.LossScaleOptimizer(cls()), multi(cls(), {})):
        with pytest.raises(ValueError, match="cannot be"):
            keras.optimizers.OptimizerMap(cls())[".*"] = inner


def test_fit_with_and_without_the_fused_kernels():
    results = []
    for fused in ("auto", False):
        keras.utils.set_random_seed(0)
        model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(8, name="a"), keras.layers.Dense(1)])
        inner = {"a/.*": tav.AdamW(0.01, fused=fused)}
        outer = keras.optimizers.OptimizerMap(tav.LAMB(0.01, fused=fused), inner)
        model.compile(keras.optimizers.MultiOptimizer(outer), "mse")
        x = np.random.default_rng(0).normal(size=(32, 4)).astype("float32")
        before = model.get_weights()
        model.fit(x, x.sum(axis=1), epochs=2, verbose=0, shuffle=False)
        results.append(model.get_weights())
        assert not any(np.array_equal(a, b) for a, b in zip(before, results[-1], strict=True))
    for actual, expected in zip(*results, strict=True):
        np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-6)
