"""What the package touches of Keras and TensorFlow that is not public: every name, with its reason.

A test compares this module with what the package uses, on the oldest and the newest versions.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import keras
import tensorflow as tf
from keras.src.optimizers import ALL_OBJECTS_DICT
from keras.src.saving import saving_lib
from tensorflow.python.ops.control_flow_util import GraphOrParentsInXlaContext
from tensorflow.python.trackable.data_structures import TrackableDataStructure

# Private attributes of `keras.optimizers.Optimizer` that our subclass uses. Keras saves and tracks them.
INHERITED = {
    "_iterations": "the raw count of steps; `iterations` counts updates",
    "_learning_rate": "the schedule itself; `learning_rate` is its value",
    "_trainable_variables": "the variables that the optimizer was built on",
    "_trainable_variables_indices": "their indices by key, which a later build extends",
    "_var_key": "the key of a variable, the same for its copies on replicas",
    "_get_variable_index": "the index of a variable",
    "_model_variables_moving_average": "the averages, which checkpoints know by this name",
    "_accumulated_gradients": "the sums of gradients, likewise",
    "_distribution_strategy": "the strategy under which the optimizer was constructed",
}

# Private methods of its bases that our subclass overrides.
OVERRIDDEN = {
    "_trackable_children": "keeps the layout out of SavedModels, which hold no Python state",
}


def is_xla_compiling() -> bool:
    """Whether what is being traced will be compiled by XLA (`jit_compile=True`)."""
    return GraphOrParentsInXlaContext(tf.compat.v1.get_default_graph())


def maybe_merge_call(function: Callable[..., Any], strategy: Any, *args: Any) -> Any:
    """Let replicas meet as Keras's optimizers do: also in the `tf.cond` of a LossScaleOptimizer."""
    return tf.__internal__.distribute.interim.maybe_merge_call(function, strategy, *args)


def is_restored(variable: Any) -> bool:
    """Whether a `tf.train.Checkpoint` has set a variable: TensorFlow's mark of it."""
    return getattr(variable, "_update_uid", -1) >= 0


def wrap_tracked(values: list[Any]) -> Any:
    """A list that a SavedModel follows as it follows one that is assigned to an attribute."""
    return tf.__internal__.tracking.wrap(values)


def keras_optimizers() -> Mapping[str, type]:
    """The classes that Keras resolves by itself, by name in lower case. To ask it would make an optimizer."""
    return ALL_OBJECTS_DICT


# -- the optimizer -------------------------------------------------------------------------------------------


def variables_of(optimizer: keras.optimizers.Optimizer) -> list[Any]:
    """The variables that an optimizer was built on: its public `variables` are the slots."""
    return list(optimizer._trainable_variables) if optimizer.built else []


def key_of(optimizer: keras.optimizers.Optimizer, variable: Any) -> Any:
    """What is the same for a Keras variable, its tf.Variable and its copies on replicas."""
    return optimizer._var_key(variable)


def count_steps(optimizer: keras.optimizers.Optimizer) -> int:
    """How many steps it has taken, with those that only accumulate gradients: `iterations` are updates."""
    return int(optimizer._iterations.numpy())


def inner_optimizer(model: keras.Model) -> Any:
    """The optimizer of a model without the LossScaleOptimizer around it."""
    return getattr(model.optimizer, "inner_optimizer", model.optimizer)


# -- saving --------------------------------------------------------------------------------------------------


# What is of this class may be missing in a checkpoint: `assert_existing_objects_matched` passes over it.
OptionalState = TrackableDataStructure


class LoadCall(NamedTuple):
    """The arguments of a call of `load_weights`."""

    model: keras.Model
    skip_mismatch: bool


def current_load() -> LoadCall | None:
    """The call of `load_weights` that this is part of. Keras tells the optimizer nothing of it."""
    frame: Any = sys._getframe(1)
    while frame is not None:
        if frame.f_code is saving_lib.load_weights_only.__code__:
            return LoadCall(frame.f_locals["model"], frame.f_locals["skip_mismatch"])
        frame = frame.f_back
    return None


# -- Keras's trainer -----------------------------------------------------------------------------------------

TrainFunction = Callable[[Any], Any]


def layers_of(model: keras.Model) -> list[keras.layers.Layer]:
    """The layers and those within them, by which Keras decides for `jit_compile="auto"`."""
    return list(model._flatten_layers())


class ModelView:
    """A model as methods of `keras.Model` see it, with other values for some attributes."""

    make_train_function = keras.Model.make_train_function
    _make_function = getattr(keras.Model, "_make_function", None)  # not in Keras 3.6

    def __init__(self, model: keras.Model, **attributes: Any) -> None:
        vars(self).update(attributes, _model=model)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._model(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)


def current_fit(model: keras.Model) -> Any:
    """An object that each call of `fit` has for itself: the parameters that it gives its callbacks."""
    return getattr(getattr(model, "history", None), "params", None)


class _InitialEpoch(int):
    """An epoch that is false, so that it does not count, in any `fit` but the one that created it."""

    model: keras.Model
    fit: Any

    def __bool__(self) -> bool:
        return current_fit(self.model) is self.fit


def set_initial_epoch(model: keras.Model, epoch: int | None) -> None:
    """Let the `fit` that calls `on_train_begin` begin at this epoch; None: where the caller says.

    `fit` reads `_initial_epoch or initial_epoch` after that. There is no other way to tell it.
    """
    if epoch is not None:
        epoch = _InitialEpoch(epoch)
        epoch.model, epoch.fit = model, current_fit(model)
    model._initial_epoch = epoch


class _NextStep:
    """A train function for the next step of one `fit`. Any other call is one of the model's train function.

    Where an exception ends the `fit` before that step, the next call of it finds out.
    """

    def __init__(self, model: keras.Model, function: TrainFunction) -> None:
        self._model, self._function, self._fit = model, function, current_fit(model)
        self.train_function = model.train_function

    def __call__(self, iterator: Any) -> Any:
        restore_train_function(self._model)
        # `train_on_batch` has a generator.
        is_fit = isinstance(iterator, (tf.data.Iterator, tf.distribute.DistributedIterator))
        if is_fit and current_fit(self._model) is self._fit:
            return self._function(iterator)
        return self.train_function(iterator)


def replace_next_step(model: keras.Model, function: TrainFunction) -> None:
    """Let the `fit` that calls `on_train_batch_begin` call `function(iterator)` in place of the next step."""
    model.train_function = _NextStep(model, function)


def is_next_step_replaced(model: keras.Model) -> bool:
    """Whether it is, by `replace_next_step`."""
    return isinstance(model.train_function, _NextStep)


def restore_train_function(model: keras.Model) -> None:
    """Undo `replace_next_step`."""
    if is_next_step_replaced(model):
        model.train_function = model.train_function.train_function
