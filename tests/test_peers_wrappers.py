"""What Keras's tests ask of an optimizer inside another: loss_scale_optimizer_test and multi_optimizer_test.

docs/peers.md has the table. As in test_peers_keras.py, an optimizer that is made "like SGD" takes SGD's steps
along a constant gradient, which Keras's numbers are of.
"""

import keras
import numpy as np
import pytest
import tensorflow as tf
from test_peers_keras import CLASSES, FUSED, HOW, NEWER, close, gradient, like_sgd, options, slot, variable

import tf_adam_variants as tav

INF = float("inf")
FOUR = [1.0, 2.0, 3.0, 4.0]
GRADIENT = np.array([1.0, 6.0, 7.0, 2.0], "float32")


def scaled(inner, **arguments):
    return keras.optimizers.LossScaleOptimizer(inner, **arguments)


# -- loss_scale_optimizer_test -------------------------------------------------------------------------------


@HOW
@FUSED
@CLASSES
def test_a_finite_step(cls, fused, how):
    """The gradient is divided by the scale, and by that of the optimizer inside no more."""
    inner_scale = 100.0 if hasattr(keras.optimizers, "MultiOptimizer") else None  # Keras 3.6 divides twice
    inner = like_sgd(cls, 0.5, fused=fused, beta_1=0.0, loss_scale_factor=inner_scale, **options(how))
    optimizer, weights = scaled(inner), variable(FOUR)
    assert inner.loss_scale_factor is None
    optimizer.apply([gradient(GRADIENT * optimizer.initial_scale, how)], [weights])
    close(slot(inner, "_momentum"), GRADIENT)
    close(weights, np.array(FOUR) - 0.5)


@FUSED
@CLASSES
def test_variables_need_not_be_given_again(cls, fused):
    optimizer, weights = scaled(like_sgd(cls, 0.5, fused=fused)), variable(FOUR)
    optimizer.build([weights])
    optimizer.apply([gradient(GRADIENT * optimizer.initial_scale)])
    close(weights, np.array(FOUR) - 0.5)


@HOW
@FUSED
@CLASSES
def test_an_infinite_step_is_not_taken(cls, fused, how):
    inner = cls(0.5, fused=fused, **options(how))
    optimizer, weights = scaled(inner), variable(FOUR)
    for bad in (INF, -INF, float("nan")):
        optimizer.apply([gradient([1.0, bad, 1.0, 1.0], how)], [weights])
    close(weights, FOUR, 0)
    assert int(inner.iterations) == 0
    for name in ("_momentum", "_velocity"):
        assert not np.any(slot(inner, name))


@NEWER
@FUSED
@CLASSES
def test_an_overwriting_gradient_is_not_divided(cls, fused):
    weights = variable(FOUR)
    weights.overwrite_with_gradient = True
    scaled(cls(0.5, fused=fused)).apply([gradient(GRADIENT)], [weights])
    close(weights, GRADIENT, 0)


@pytest.mark.parametrize("in_graph", [False, True], ids=["eager", "graph"])
@FUSED
@CLASSES
def test_the_scale_falls_and_grows(cls, fused, in_graph):
    """Halved by each gradient that is not finite, doubled after two in a row that are."""
    weights, steps = variable(FOUR), tf.function if in_graph else lambda step: step
    falling = scaled(cls(0.5, fused=fused), initial_scale=400.0)
    falling.build([weights])
    step = steps(lambda g: falling.apply([g], [weights]))
    for _ in range(4):
        step(tf.fill([4], INF))
    close(falling.scale_loss(1.0), 25.0)
    close(weights, FOUR, 0)
    growing = scaled(cls(0.5, fused=fused), initial_scale=2.0, dynamic_growth_steps=2)
    growing.build([weights])
    step = steps(lambda g: growing.apply([g], [weights]))
    for count in range(8):
        step(tf.constant(GRADIENT))
        assert int(growing.inner_optimizer.iterations) == count + 1
    close(growing.scale_loss(1.0), 32.0)


@CLASSES
def test_a_loss_scale_optimizer_comes_back(cls):
    inner = cls(0.5, exclude_from_weight_decay=["bias"], sparse_update="lazy", clipnorm=2.0)
    optimizer = scaled(inner, initial_scale=3.0, dynamic_growth_steps=2, name="mine")
    again = keras.optimizers.deserialize(keras.optimizers.serialize(optimizer))
    assert (again.name, again.initial_scale, again.dynamic_growth_steps) == ("mine", 3.0, 2)
    assert type(again.inner_optimizer) is cls
    assert again.inner_optimizer.get_config() == inner.get_config()


# -- multi_optimizer_test ------------------------------------------------------------------------------------


def multi(default, others, **arguments):
    return keras.optimizers.MultiOptimizer(keras.optimizers.OptimizerMap(default, others), **arguments)


def scoped(scope, value):
    with keras.name_scope(scope):
        return variable(value, name="kernel")


def three():
    return [
        scoped(scope, [[value] * 2]) for scope, value in (("dense_1", 2.0), ("dense_2", 3.0), ("other", 4.0))
    ]


def check_each_has_its_own(optimizer, own, how="dense"):
    """`own` are optimizers of the rates 0.1, 1 and 0 for the three variables."""
    weights = three()
    optimizer.build(weights)
    assert optimizer.optimizers == own
    optimizer.apply([gradient([[1.0, 1.0]], how) for _ in weights], weights)
    for have, want in zip(weights, (1.9, 2.0, 4.0), strict=True):
        close(have, [[want, want]])
    assert [int(one.iterations) for one in (optimizer, *own)] == [1] * 4
    assert [len(one.variables) for one in own] == [4] * 3


@NEWER
@HOW
@FUSED
@CLASSES
def test_each_variable_is_stepped_by_the_optimizer_of_its_pattern(cls, fused, how):
    first, second, default = (like_sgd(cls, rate, fused=fused, **options(how)) for rate in (0.1, 1.0, 0.0))
    optimizer = multi(default, {"^dense_1/.*": first, "^dense_2/.*": second})
    check_each_has_its_own(optimizer, [first, second, default], how)


@NEWER
@CLASSES
def test_each_variable_is_stepped_by_the_optimizer_that_a_function_chooses(cls):
    own = [like_sgd(cls, rate) for rate in (0.1, 1.0, 0.0)]
    chosen = dict(zip(("dense_1", "dense_2", "other"), own, strict=True))
    optimizer = keras.optimizers.MultiOptimizer(lambda v: chosen[v.path.split("/")[0]])
    check_each_has_its_own(optimizer, own)


@NEWER
@CLASSES
def test_two_patterns_for_one_variable_are_an_error(cls):
    optimizer = multi(cls(), {".*kernel.*": cls(), ".*dense.*": cls()})
    with pytest.raises(ValueError, match="Multiple optimizers"):
        optimizer.build(three())


@NEWER
@CLASSES
def test_several_optimizers_come_back(cls):
    weights = three()
    optimizer = multi(cls(0.125), {"^dense_1/.*": tav.LAMB(0.25), "^dense_2/.*": cls(0.5, clipnorm=1.0)})
    optimizer.build(weights)
    again = keras.optimizers.deserialize(keras.optimizers.serialize(optimizer))
    again.build(weights)
    for have, want in zip(again.optimizers, optimizer.optimizers, strict=True):
        assert type(have) is type(want)
        assert have.get_config() == want.get_config()
    assert [v.path for v in again.variables] == [v.path for v in optimizer.variables]


@NEWER
@FUSED
@CLASSES
def test_one_loss_scale_for_several_optimizers(cls, fused):
    """Its own takes the place of theirs; under a LossScaleOptimizer it has none either."""
    inner = [cls(0.1, fused=fused, beta_1=0.0, loss_scale_factor=factor) for factor in (2.0, 3.0)]
    optimizer = multi(inner[0], {"^dense_1/.*": inner[1]}, loss_scale_factor=5.0)
    weights = three()
    optimizer.build(weights)
    close(optimizer.scale_loss(tf.constant(2.0)), 10.0)
    optimizer.apply([gradient([[10.0, 10.0]])] * 3, weights)
    for one in inner:
        close(slot(one, "_momentum"), [[2.0, 2.0]])
    scaled(optimizer, initial_scale=10.0)
    assert [one.loss_scale_factor for one in (optimizer, *inner)] == [None] * 3


@NEWER
@FUSED
@CLASSES
def test_several_optimizers_under_a_loss_scale(cls, fused):
    inner = [like_sgd(cls, 0.1, fused=fused, beta_1=0.0) for _ in range(2)]
    optimizer = scaled(multi(inner[0], {"^dense_1/.*": inner[1]}), initial_scale=10.0)
    weights = three()[:2]
    optimizer.build(weights)
    close(optimizer.scale_loss(tf.constant(2.0)), 20.0)
    optimizer.apply([gradient([[10.0, 10.0]])] * 2, weights)
    close(weights[0], [[1.9, 1.9]])
    close(weights[1], [[2.9, 2.9]])
    for one in inner:
        close(slot(one, "_momentum"), [[1.0, 1.0]])


def model_of(optimizer):
    layers = [
        keras.layers.Dense(size, kernel_initializer="ones", use_bias=False, name=name)
        for size, name in ((2, "dense_1"), (1, "dense_2"))
    ]
    model = keras.Sequential([keras.Input((1,)), *layers])
    model.compile(optimizer, "mse")
    return model


@NEWER
@CLASSES
def test_fit_with_several_optimizers(cls):
    first, second, default = (like_sgd(cls, rate) for rate in (1e-3, 1e-2, 0.1))
    model = model_of(multi(default, {".*dense_1/.*": first, ".*dense_2/.*": second}))
    model.fit(np.ones((1, 1)), np.zeros((1, 1)), batch_size=1, epochs=1, verbose=0)
    close(model.get_weights()[0], [[0.999, 0.999]])  # Keras's numbers, of SGD, are for gradients of 4
    close(model.get_weights()[1], [[0.99], [0.99]])
    assert [int(one.iterations) for one in (model.optimizer, first, second, default)] == [1, 1, 1, 0]


@NEWER
@pytest.mark.filterwarnings("ignore:__array__ implementation")  # Keras's callbacks' own
@CLASSES
def test_callbacks_reach_the_rates_of_several_optimizers(cls, tmp_path):
    first, second = cls(0.1, name="first"), cls(0.01, name="second")
    model = model_of(multi(second, {".*dense_1/.*": first}))

    def rates(want):
        close([float(one.learning_rate) for one in (first, second)], want)

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


@NEWER
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
        close(held, value, 0)
    swap.on_test_end()
    for held, value in zip([*kernels, average], values, strict=True):
        close(held, value, 0)


@NEWER
@CLASSES
def test_wrappers_are_not_nested(cls):
    for inner in (scaled(cls()), multi(cls(), {})):
        with pytest.raises(ValueError, match="cannot be"):
            keras.optimizers.OptimizerMap(cls())[".*"] = inner
