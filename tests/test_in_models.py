"""What people train with: a known network, mixed precision, two optimizers at once, a search by name."""

import axes
import cases
import keras
import keras_tuner
import numpy as np
import oracle
import pytest
import tensorflow as tf
from like_sgd import CLASSES_FUSED, ONES, gradient, variable

import tf_adam_variants as tav


@pytest.mark.slow
def test_a_step_of_resnet50():
    """From one gradient, with and without the compiled op, to the oracle's weights; the loss falls."""
    model = keras.applications.ResNet50(weights=None, input_shape=(64, 64, 3), classes=10)
    x = np.random.default_rng(0).uniform(size=(2, 64, 64, 3)).astype("float32")
    weights = [v.value for v in model.trainable_variables]

    def loss():
        predicted = model(x, training=True)
        return tf.reduce_mean(keras.losses.sparse_categorical_crossentropy(tf.constant([3, 7]), predicted))

    with tf.GradientTape() as tape:
        before = loss()
    grads = tape.gradient(before, weights)
    start = [w.numpy() for w in weights]
    rates, betas = {"learning_rate": 1e-3, "weight_decay": 0.1}, {"beta_1": 0.9, "beta_2": 0.999}
    decayed = [path.split("/")[-1] == "kernel" for path in (v.path for v in model.trainable_variables)]
    for fused in (False, True):
        optimizer = tav.AdamW(**rates, **betas, exclude_from_weight_decay=["bias", "bn/"], fused=fused)
        optimizer.build(model.trainable_variables)
        assert len(optimizer.variables) == 2 + 2 * len(weights)
        for weight, value in zip(weights, start, strict=True):
            weight.assign(value)
        tf.function(optimizer.apply)(grads, weights)
        assert np.isfinite(before)
        assert loss() < before
        (expected,) = oracle.train(
            oracle.adamw, start, [grads], [1e-3], weight_decay=0.1, decayed=decayed, epsilon=1e-8, **betas
        )
        for actual, target in zip(weights, expected, strict=True):
            np.testing.assert_allclose(actual, target, rtol=1e-6, atol=1e-8)


ONE_CASE_QUICKLY = pytest.mark.parametrize(
    "case",
    [pytest.param(case, marks=pytest.mark.slow if i else ()) for i, case in enumerate(cases.PLAIN_CASES)],
    ids=axes.name_value,
)
X = np.random.default_rng(0).normal(size=(64, 8)).astype("float32")


def make_small_model(policy="float32"):
    layers = [keras.layers.Dense(16, "relu", dtype=policy), keras.layers.Dense(1, dtype=policy)]
    return keras.Sequential([keras.Input((8,)), *layers])


def train(model, optimizer, epochs):
    """The losses of an epoch, which is one step."""
    model.compile(optimizer, "mse")
    return model.fit(X, X.sum(axis=1), batch_size=len(X), epochs=epochs, verbose=0).history["loss"]


@ONE_CASE_QUICKLY
def test_mixed_float16_leaves_out_the_steps_that_overflow(case):
    """With a loss scale of 2**30 the first gradients are infinite. Keras halves it and leaves the weights as
    they are until it fits, and from there the training is the one that had this scale to begin with.
    """
    optimizer = keras.optimizers.LossScaleOptimizer(case.cls(0.01), initial_scale=2.0**30)
    model, other = make_small_model("mixed_float16"), make_small_model("mixed_float16")
    other.set_weights(model.get_weights())
    losses = train(model, optimizer, 40)
    scale = float(optimizer.dynamic_scale)
    left_out = round(30 - np.log2(scale))
    assert losses[:left_out] == [losses[0]] * left_out
    assert 5 < left_out < 25
    assert int(optimizer.inner_optimizer.iterations) == 40 - left_out
    assert losses[-1] < losses[0] / 1.5

    again = keras.optimizers.LossScaleOptimizer(case.cls(0.01), initial_scale=scale)
    train(other, again, 40 - left_out)
    for actual, expected in zip(model.get_weights(), other.get_weights(), strict=True):
        np.testing.assert_array_equal(actual, expected)


@ONE_CASE_QUICKLY
def test_mixed_bfloat16_trains(case):
    losses = train(make_small_model("mixed_bfloat16"), case.cls(0.02), 40)
    assert losses[-1] < losses[0] / 3


@pytest.mark.parametrize("mode", ["graph", "fused graph", pytest.param("xla", marks=pytest.mark.slow)])
def test_two_optimizers_in_one_function(mode):
    """Each has other variables, as where two networks are trained against each other."""
    inits, grads = cases.problem(6)
    pair, orders = (cases.CASES[0], cases.CASES[6]), (grads, grads[::-1])
    weights = [cases.variables(inits, tf.float64) for _ in pair]
    optimizers = [case.cls(0.125, **case.terms, fused=mode.startswith("fused")) for case in pair]
    for optimizer, own in zip(optimizers, weights, strict=True):
        optimizer.build(own)

    @tf.function(jit_compile=mode == "xla")
    def step(*gradients):
        for optimizer, own_gradients, own in zip(optimizers, gradients, weights, strict=True):
            optimizer.apply(own_gradients, own)

    for both in zip(*orders, strict=True):
        step(*([tf.constant(g) for g in own] for own in both))
    for case, own, order in zip(pair, weights, orders, strict=True):
        alone = cases.run(mode, case.cls(0.125, **case.terms), inits, order)[-1]
        for actual, expected in zip(own, alone, strict=True):
            np.testing.assert_array_equal(actual, expected)


@CLASSES_FUSED
def test_constraints_are_applied(cls, fused):
    weights = variable(np.random.default_rng(0).uniform(size=(2, 2)) - 1.0)
    weights.constraint = keras.constraints.NonNeg()
    cls(1e-4, fused=fused).apply([gradient(0 * ONES)], [weights])
    assert np.min(weights) == 0


def test_frozen_layers_and_constraints():
    model = keras.Sequential(
        [
            keras.Input((2,)),
            keras.layers.Dense(2, name="frozen", trainable=False),
            keras.layers.Dense(2, kernel_constraint=keras.constraints.NonNeg()),
        ]
    )
    model.compile("qhadamw", "mse")
    model.optimizer.learning_rate = 1.0
    before = model.layers[0].kernel.numpy()
    model.fit(np.ones((4, 2)), -np.ones((4, 2)), verbose=0)
    np.testing.assert_array_equal(model.layers[0].kernel.numpy(), before)
    assert np.min(model.layers[1].kernel.numpy()) == 0


@pytest.mark.slow
def test_a_search_by_name(tmp_path):
    """KerasTuner builds, trains and saves a model for each optimizer, and loads the best one's weights."""
    names = ["tf_adam_variants>AdamW", "qhadam", "qhadamw", "lamb"]

    def build(chosen):
        model = make_small_model()
        model.compile(optimizer=chosen.Choice("optimizer", names), loss="mse")
        model.optimizer.learning_rate = 0.01
        return model

    tuner = keras_tuner.GridSearch(build, objective="loss", directory=tmp_path, project_name="names")
    tuner.search(X, X.sum(axis=1), epochs=3, batch_size=16, verbose=0)
    trials = tuner.oracle.get_best_trials(len(names))
    assert {trial.hyperparameters.get("optimizer") for trial in trials} == set(names)
    assert {trial.status for trial in trials} == {"COMPLETED"}
    (best,) = tuner.get_best_models(1)
    assert type(best.optimizer) is type(keras.optimizers.get(trials[0].hyperparameters.get("optimizer")))
    assert int(best.optimizer.iterations) == 12
    assert best.evaluate(X, X.sum(axis=1), verbose=0) < build(trials[0].hyperparameters).evaluate(
        X, X.sum(axis=1), verbose=0
    )
