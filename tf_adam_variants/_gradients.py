"""Gradients before the step: shapes and ids checked, repeated ids summed, clipped."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import tensorflow as tf

from tf_adam_variants import _variables, _xla
from tf_adam_variants.engines import formula


class Slices(tf.IndexedSlices):
    """Slices that Keras can divide by a loss scale."""

    def __truediv__(self, scale: Any) -> Slices:
        return _with_values(self, self.values / scale)


def _with_values(slices: tf.IndexedSlices, values: Any) -> Slices:
    return Slices(values, slices.indices, slices.dense_shape)


# -- checks --------------------------------------------------------------------------------------------------


def checked(grads: list[Any], variables: list[Any], keys: list[Any], name: str) -> list[Any]:
    """The gradients, with lists as tensors, if there is one a variable, of its shape.

    Args:
        grads: gradients, some of which may be None.
        variables: their variables.
        keys: what identifies each variable.
        name: the optimizer's.

    Raises:
        ValueError: if there is not.
    """
    if len(grads) != len(variables):
        raise ValueError(
            f"{name} needs one gradient a variable. Received: {len(grads)} gradients for "
            f"{len(variables)} variables: {_variables.paths(variables)}"
        )
    if len(set(keys)) != len(keys):
        raise ValueError(f"{name} was given a variable more than once: {_variables.paths(variables)}")
    grads = [_without_lists(gradient, variable) for gradient, variable in zip(grads, variables, strict=True)]
    for gradient, variable in zip(grads, variables, strict=True):
        if gradient is not None and not tf.TensorShape(variable.shape).is_compatible_with(_shape(gradient)):
            raise ValueError(
                f"The gradient of {_variables.path(variable)} must have its shape, "
                f"{tuple(variable.shape)}. Received: a gradient of shape {_shape(gradient)}"
            )
    return grads


def _without_lists(gradient: Any, variable: Any) -> Any:
    """A gradient, or the ids of its slices, as a tensor where it is a list or tuple, as Keras takes them."""
    if isinstance(gradient, (list, tuple)):
        return tf.convert_to_tensor(gradient, _variables.state_dtype(variable))
    if isinstance(gradient, tf.IndexedSlices) and isinstance(gradient.indices, (list, tuple)):
        ids = tf.convert_to_tensor(gradient.indices, tf.int64)
        return tf.IndexedSlices(gradient.values, ids, gradient.dense_shape)
    return gradient


def _shape(gradient: Any) -> tf.TensorShape:
    """The shape of a gradient, that of slices with the number of rows left open."""
    if isinstance(gradient, tf.IndexedSlices):
        return tf.TensorShape([None]).concatenate(gradient.values.shape[1:])
    return tf.TensorShape(gradient.shape)


def assert_ids_in_range(grads: list[Any], variables: list[Any]) -> list[Any]:
    """Assertions that all ids are ids of rows; without them a GPU ignores the others silently."""
    assertions = []
    for gradient, variable in zip(grads, variables, strict=True):
        if isinstance(gradient, tf.IndexedSlices):
            ids, rows = gradient.indices, variable.shape[0]
            message = f"The ids of a gradient's slices must be in [0, {rows})"
            assertions.append(tf.debugging.assert_greater_equal(ids, tf.zeros((), ids.dtype), message))
            assertions.append(tf.debugging.assert_less(ids, tf.constant(rows, ids.dtype), message))
    return [assertion for assertion in assertions if assertion is not None]  # None: it ran eagerly


# -- repeated ids --------------------------------------------------------------------------------------------


def to_dense(slices: tf.IndexedSlices, rows: int, dtype: tf.DType) -> Any:
    """The dense gradient that the slices add up to."""
    return tf.math.unsorted_segment_sum(tf.cast(slices.values, dtype), slices.indices, rows)


def sum_repeated_ids(slices: tf.IndexedSlices, rows: int, dtype: tf.DType) -> Slices:
    """Slices with each id once, whose values are the sums.

    XLA has no shapes that depend on values. There the ids are padded with the sentinel id `rows`, which no
    row has: gathering it gives any row, scattering to it does nothing.
    """
    ids, values = slices.indices, tf.cast(slices.values, dtype)
    if not _xla.is_compiling():
        unique, position = tf.unique(ids)
        return Slices(tf.math.unsorted_segment_sum(values, position, tf.size(unique)), unique)
    order = tf.argsort(ids)
    ids, values = tf.gather(ids, order), tf.gather(values, order)
    first = tf.concat([tf.ones_like(ids[:1]), tf.cast(ids[1:] != ids[:-1], ids.dtype)], axis=0)
    position = tf.cumsum(first) - 1
    unique = tf.tensor_scatter_nd_update(
        tf.fill(tf.shape(ids), tf.cast(rows, ids.dtype)), position[:, None], ids
    )
    return Slices(tf.math.unsorted_segment_sum(values, position, tf.shape(ids)[0]), unique)


def nonzero_rows(gradient: Any) -> Slices:
    """The rows of a dense gradient that are not all zeros, padded under XLA as above."""
    rows, other_axes = gradient.shape[0], tuple(range(1, gradient.shape.rank))
    nonzero = tf.reduce_any(gradient != 0, axis=other_axes)
    if not _xla.is_compiling():
        ids = tf.where(nonzero)[:, 0]
        return Slices(tf.gather(gradient, ids), ids)
    return Slices(gradient, tf.where(nonzero, tf.range(rows, dtype=tf.int64), tf.constant(rows, tf.int64)))


def sentinels(slices: tf.IndexedSlices, rows: int) -> Any | None:
    """Which of the slices have a sentinel id, to broadcast over their values; None where none can have."""
    if not _xla.is_compiling():
        return None
    return tf.reshape(slices.indices >= rows, [-1] + [1] * (slices.values.shape.rank - 1))


# -- clipping ------------------------------------------------------------------------------------------------


def clip(grads: list[Any], clipnorm: Any, clipvalue: Any) -> list[Any]:
    """Each gradient clipped, in float32 for half types. Slices have the dense one's norm if no id repeats."""
    if clipnorm:
        return [_map_values(lambda values: tf.clip_by_norm(values, clipnorm), g) for g in grads]
    if clipvalue:
        return [_map_values(lambda values: tf.clip_by_value(values, -clipvalue, clipvalue), g) for g in grads]
    return grads


def clip_scale(norm: Any, global_clipnorm: float) -> Any:
    """What gradients of this global norm are multiplied by. NaN where it is not finite, as in Keras."""
    return global_clipnorm / tf.maximum(norm, global_clipnorm) + (norm - norm)


def _map_values(function: Callable[[Any], Any], gradient: Any) -> Any:
    if isinstance(gradient, tf.IndexedSlices):
        return _with_values(gradient, function(formula.widened(gradient.values)))
    return function(formula.widened(tf.convert_to_tensor(gradient)))
