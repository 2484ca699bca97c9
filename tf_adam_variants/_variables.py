"""Variables by their path: which ones a list of regular expressions names."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import tensorflow as tf


def path(variable: Any) -> str:
    """ "sequential/dense/kernel" for a Keras variable, its tf.Variable, or a replica's component of it.

    Keras keeps the path in `path` and only the last part in `name`; TensorFlow keeps the path in
    `name` and adds ":0" (and "/replica_1" on the components of a mirrored variable).
    """
    if hasattr(variable, "path"):
        return variable.path
    return re.sub(r"(/replica_\d+)?:\d+$", "", variable.name)


def matches(patterns: Iterable[str], variable: Any) -> bool:
    return any(re.search(pattern, path(variable)) for pattern in patterns)


def exactly(variable: Any) -> str:
    """The regular expression that names this one path."""
    return f"^{re.escape(path(variable))}$"


def shape(gradient: Any) -> tf.TensorShape:
    """The shape of a gradient, that of slices with the rows' number left open."""
    if isinstance(gradient, tf.IndexedSlices):
        return tf.TensorShape([None]).concatenate(gradient.values.shape[1:])
    return tf.TensorShape(gradient.shape)


def fits(variable: Any, gradient: Any) -> bool:
    """Whether the gradient can have the variable's shape, as far as is known before running."""
    return tf.TensorShape(variable.shape).is_compatible_with(shape(gradient))


def state_type(variable: Any) -> tf.DType:
    """The type of a variable's moments, norms and arithmetic."""
    dtype = tf.as_dtype(variable.dtype)
    return tf.float32 if dtype in (tf.float16, tf.bfloat16) else dtype


def held(variable: Any) -> Any:
    """TensorFlow's variable, which a Keras variable holds."""
    return variable.value if hasattr(variable, "path") else variable


def copies(variable: Any) -> list[Any]:
    """The copy of each replica of a distribution strategy; the variable itself where replicas have none."""
    variable = held(variable)
    return list(variable.values) if isinstance(variable, tf.distribute.DistributedValues) else [variable]


def devices(variable: Any) -> tuple[str, ...]:
    """Where its copies are, each as "/job:localhost/replica:0/task:0/device:CPU:0"."""
    return tuple(copy.device for copy in copies(variable))


def beside(copy: Any, other: Any) -> Any:
    """Of another variable's copies, one on each replica's device, that beside this one."""
    if not isinstance(other, tf.distribute.DistributedValues):
        return other
    return next(one for one in copies(other) if one.device == copy.device)
