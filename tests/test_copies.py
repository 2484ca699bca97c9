"""The state of an optimizer in another: weights that are set, copies, checkpoints."""

import copy
import pickle

import axes
import cases
import keras
import numpy as np
import pytest
import tensorflow as tf
from axes import ALL_CASES, CLASSES
from like_sgd import START, gradient, variable


@ALL_CASES
def test_weights_of_one_optimizer_set_in_another(case):
    weights = variable()
    optimizer, other = case.cls(**case.terms), case.cls(**case.terms)
    optimizer.apply([gradient(START)], [weights])
    with pytest.raises(ValueError, match="You are calling"):
        other.set_weights(optimizer.variables)
    other.build([weights])
    other.set_weights(optimizer.variables)
    assert len(other.variables) == len(optimizer.variables) >= 4
    for actual, expected in zip(other.variables, optimizer.variables, strict=True):
        np.testing.assert_array_equal(actual, expected)


@CLASSES
def test_a_checkpoint_takes_training_back(cls, tmp_path):
    """Restored into the optimizer that went on in the meantime, which then takes the same step again."""
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(2)])
    model.compile(cls(0.125), "mse")
    x, y = np.random.default_rng(0).uniform(size=(2, 1, 2))
    model.train_on_batch(x, y)
    before = model.predict(x, verbose=0)
    checkpoint = tf.train.Checkpoint(model, optimizer=model.optimizer)
    path = checkpoint.save(tmp_path / "checkpoint")
    model.train_on_batch(x, y)
    after = model.predict(x, verbose=0)
    assert np.max(np.abs(after - before)) > 1e-3
    checkpoint.restore(path)
    np.testing.assert_array_equal(model.predict(x, verbose=0), before)
    model.train_on_batch(x, y)
    np.testing.assert_array_equal(model.predict(x, verbose=0), after)


def pickle_and_load(optimizer):
    return pickle.loads(pickle.dumps(optimizer))


@axes.pairwise(case=cases.CASES, copy_by=[pickle_and_load, copy.deepcopy])
def test_a_copy_of_an_optimizer_continues(case, copy_by):
    """Keras copies the configuration alone, and warns that the state is skipped."""
    optimizer = case.cls(0.125, exclude_from_weight_decay=["norm"], **case.oracle_kwargs)
    inits, grads = cases.problem(4)
    weights = cases.variables(inits, tf.float64)
    for step in grads[:2]:
        optimizer.apply(list(map(tf.constant, step)), weights)
    again, others = copy_by(optimizer), cases.variables([w.numpy() for w in weights], tf.float64)
    assert type(again) is case.cls
    assert again.get_config() == optimizer.get_config()
    for step in grads[2:]:
        optimizer.apply(list(map(tf.constant, step)), weights)
        again.apply(list(map(tf.constant, step)), others)
    for actual, expected in zip([*others, *again.variables], [*weights, *optimizer.variables], strict=True):
        np.testing.assert_array_equal(actual, expected)


@CLASSES
def test_names_do_not_depend_on_what_was_made_before(cls):
    """Keras 3.15 numbers them: a slot's path depends there on the optimizers that a process made before."""
    first, second, named = cls(), cls(), cls(name="mine")
    assert first.name == second.name == cls.__name__.lower()
    assert named.name == "mine"
    for optimizer in (first, named):
        again = keras.optimizers.deserialize(keras.optimizers.serialize(optimizer))
        assert again.name == optimizer.name
    named.build([variable(name="w")])
    assert [v.path for v in named.variables] == [
        f"mine/{end}" for end in ("iteration", "learning_rate", "w_momentum", "w_velocity")
    ]
