"""What the package touches of Keras and TensorFlow that is not public: every name, with its reason.

A test compares this module with what the package uses, on the oldest and the newest versions.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import keras
import tensorflow as tf
from keras.src.optimizers import ALL_OBJECTS_DICT
from tensorflow.python.ops.control_flow_util import GraphOrParentsInXlaContext

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


def keras_optimizer_names() -> Collection[str]:
    """The names, in lower case, that Keras resolves by itself. To ask it would make an optimizer."""
    return ALL_OBJECTS_DICT


TrainFunction = Callable[[Any], Any]

_MAKER = "_tf_adam_variants_maker"


def made_by(make: Callable[[], TrainFunction]) -> TrainFunction:
    """What `make` returns, of which `another` makes another with it: for one that Keras did not make."""
    function = make()
    setattr(function, _MAKER, make)
    return function


def another(model: keras.Model) -> TrainFunction:
    """A train function that does what the model's does, and has no traces yet."""
    present = model.train_function
    if make := getattr(present, _MAKER, None):
        return make()
    try:
        model.make_train_function(force=True)
        return model.train_function
    finally:
        model.train_function = present
