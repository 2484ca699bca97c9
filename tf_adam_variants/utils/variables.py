"""What is asked of a variable: its path, the type of its arithmetic."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import tensorflow as tf


def path_of(variable: Any) -> str:
    """ "sequential/dense/kernel" for a Keras variable, its tf.Variable, or a replica's copy of it.

    Keras keeps the path in `path` and only the last part in `name`; TensorFlow keeps the path in
    `name` and adds ":0" (and "/replica_1" on the replicas of a mirrored variable).
    """
    if hasattr(variable, "path"):
        return variable.path
    return re.sub(r"(/replica_\d+)?:\d+$", "", variable.name)


def paths_of(variables: Iterable[Any]) -> str:
    """The first paths, for messages."""
    found = [path_of(variable) for variable in variables]
    return ", ".join(found[:5]) + (f" and {len(found) - 5} more" if len(found) > 5 else "")


def is_half(variable: Any) -> bool:
    """Whether it is of type float16 or bfloat16."""
    return tf.as_dtype(variable.dtype) in (tf.float16, tf.bfloat16)


def as_list(variables: Iterable[Any], name: str) -> list[Any]:
    """The variables as a list. One alone is an error: its elements would be taken for variables."""
    if hasattr(variables, "dtype"):
        raise ValueError(
            f"{name} needs a list of variables. Received: the variable {path_of(variables)} alone. "
            "Write [variable]"
        )
    return list(variables)


def state_dtype(variable: Any) -> tf.DType:
    """The type of a variable's moments, norms and arithmetic."""
    return tf.float32 if is_half(variable) else tf.as_dtype(variable.dtype)


def is_keras_variable(value: Any) -> bool:
    """Whether it is a Keras variable: in Keras 3.6 not all of them are instances of `keras.Variable`."""
    return hasattr(value, "path") and hasattr(value, "assign")


def is_variable(value: Any) -> bool:
    """Whether it is a variable of TensorFlow or Keras."""
    return isinstance(value, tf.Variable) or is_keras_variable(value)


def is_optimizer_rate(value: Any) -> bool:
    """Whether it is what `optimizer.learning_rate` returns: the variable that Keras makes of a number.

    One optimizer copies it from another, as in `optimizer.learning_rate = other.learning_rate`.
    """
    if not is_keras_variable(value):
        return False
    return value.name == "learning_rate" and value.aggregation == "only_first_replica"


def tf_variable(variable: Any) -> Any:
    """The tf.Variable of a Keras variable; another variable as it is."""
    return variable.value if hasattr(variable, "path") else variable
