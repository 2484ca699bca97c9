"""What the package touches of Keras and TensorFlow that is not public: each name once, with its reason.

The hooks of `keras.optimizers.Optimizer` that are overridden are in `optimizer/base.py`, which names them.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import keras
import tensorflow as tf
from keras.src.optimizers import ALL_OBJECTS_DICT
from tensorflow.python.ops.control_flow_util import GraphOrParentsInXlaContext


def is_xla_compiling() -> bool:
    """Whether what is being traced will be compiled by XLA (`jit_compile=True`)."""
    return GraphOrParentsInXlaContext(tf.compat.v1.get_default_graph())


def maybe_merge_call(function: Callable[..., Any], strategy: Any, *args: Any) -> Any:
    """What Keras's optimizers call where replicas meet: it also works in a `tf.cond` of LossScaleOptimizer."""
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
