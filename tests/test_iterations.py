"""The count of steps, `iterations`: what it counts, and that it waits for the data."""

import axes
import cases
import keras
import numpy as np
import pytest
import tensorflow as tf
from like_sgd import CLASSES_FUSED_FORMS, ONES, gradient, sparse_options, variable

import tf_adam_variants as tav

BATCHES, EPOCHS, BATCH_SIZE = 14, 2, 4
X = np.random.default_rng(0).normal(size=(BATCHES * BATCH_SIZE, 6)).astype("float32")
Y = X.sum(axis=1, keepdims=True)


@CLASSES_FUSED_FORMS
def test_iterations_count_steps(cls, fused, form):
    optimizer, weights = cls(fused=fused, **sparse_options(form)), variable()
    assert int(optimizer.iterations) == 0
    for count in (1, 2):
        assert int(optimizer.apply_gradients([(gradient(ONES, form), weights)])) == count
        assert int(optimizer.iterations) == count


def batches():
    yield from ((X[i : i + BATCH_SIZE], Y[i : i + BATCH_SIZE]) for i in range(0, len(X), BATCH_SIZE))


def dataset(length):
    """The batches; a generator does not tell TensorFlow how many there are."""
    if length == "known":
        return tf.data.Dataset.from_tensor_slices((X, Y)).batch(BATCH_SIZE)
    signature = (tf.TensorSpec((BATCH_SIZE, 6)), tf.TensorSpec((BATCH_SIZE, 1)))
    return tf.data.Dataset.from_generator(batches, output_signature=signature)


def fit(optimizer, length, steps_per_execution):
    """The optimizer, and the weights after each epoch."""
    keras.utils.set_random_seed(1)
    model = keras.Sequential([keras.Input((6,)), keras.layers.Dense(4, "tanh"), keras.layers.Dense(1)])
    model.compile(optimizer, "mse", steps_per_execution=steps_per_execution)
    assert dataset("unknown").cardinality() == tf.data.UNKNOWN_CARDINALITY
    history = []
    for _ in range(EPOCHS):
        model.fit(dataset(length), verbose=0)
        history.append(model.get_weights())
    return history


OPTIONS = [{}, {"gradient_accumulation_steps": 2}, {"use_ema": True, "ema_overwrite_frequency": 5}]


@axes.pairwise(cls=[tav.AdamW, tav.LAMB], options=OPTIONS, steps_per_execution=[1, 3], fused=[False, True])
def test_the_count_waits_for_the_data(cls, options, steps_per_execution, fused):
    """Where a dataset ends is known only when it has ended: a count that does not wait is one too high.

    Bias corrections and the schedule follow the count: weights are those of a dataset of known length.
    """
    schedule = keras.optimizers.schedules.ExponentialDecay(0.05, 4, 0.5)
    optimizers = [cls(schedule, fused=fused, **options) for _ in range(2)]
    unknown, known = (
        fit(optimizer, length, steps_per_execution)
        for optimizer, length in zip(optimizers, ("unknown", "known"), strict=True)
    )
    accumulate = options.get("gradient_accumulation_steps", 1)
    for optimizer in optimizers:
        assert int(optimizer._iterations) == BATCHES * EPOCHS
        assert int(optimizer.iterations) == BATCHES * EPOCHS // accumulate
    for actual_epoch, expected_epoch in zip(unknown, known, strict=True):
        for actual, expected in zip(actual_epoch, expected_epoch, strict=True):
            np.testing.assert_array_equal(actual, expected)


@pytest.mark.parametrize("mode", ["graph", "fused graph"])
def test_the_count_waits_in_a_loop_over_the_data(mode):
    """The same without `fit`: the last call finds no data and must not count."""
    weights = tf.Variable(np.ones((6, 1), "float32"))
    optimizer = tav.QHAdam(0.125)
    optimizer.build([weights])
    iterator = iter(dataset("unknown"))

    def step():
        x, y = next(iterator)
        optimizer.apply([tf.transpose(x) @ (x @ weights - y)], [weights])

    step = cases.compiled(mode, optimizer, step)
    for _ in range(BATCHES):
        step()
    before = weights.numpy()
    with pytest.raises((tf.errors.OutOfRangeError, StopIteration)):
        step()
    assert int(optimizer.iterations) == BATCHES
    np.testing.assert_array_equal(weights.numpy(), before)
