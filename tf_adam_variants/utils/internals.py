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


# -- the optimizer ---------------------------------------------------------------------------------------------


def variables_of(optimizer: keras.optimizers.Optimizer) -> list[Any]:
    """The variables that an optimizer was built on: its public `variables` are the slots."""
    return list(optimizer._trainable_variables) if optimizer.built else []


def count_steps(optimizer: keras.optimizers.Optimizer) -> int:
    """How many steps it has taken, with those that only accumulate gradients: `iterations` are updates."""
    return int(optimizer._iterations.numpy())


# -- Keras's trainer -------------------------------------------------------------------------------------------


