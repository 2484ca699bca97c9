"""Gradients that name rows (`tf.IndexedSlices`): ids checked, repeated ones summed, rows read and written.

No arithmetic of an optimizer is here. An update is written once, over a place to read from and to write
to: a whole variable, or some of its rows.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import tensorflow as tf

from tf_adam_variants import _kernels


class Slices(tf.IndexedSlices):
    """Slices that Keras can divide by a loss scale."""

    def __truediv__(self, scale: Any) -> Slices:
        return with_values(self, self.values / scale)


def with_values(slices: tf.IndexedSlices, values: Any) -> Slices:
    return Slices(values, slices.indices, slices.dense_shape)


def range_checks(grads: list[Any], variables: list[Any]) -> list[Any]:
    """Assertions that all ids are ids of rows; without them a GPU passes over the others in silence."""
    checks = []
    for gradient, variable in zip(grads, variables, strict=True):
        if isinstance(gradient, tf.IndexedSlices):
            ids, rows = gradient.indices, variable.shape[0]
            message = f"The ids of a gradient's slices must be in [0, {rows})"
            checks.append(tf.debugging.assert_greater_equal(ids, tf.zeros((), ids.dtype), message))
            checks.append(tf.debugging.assert_less(ids, tf.constant(rows, ids.dtype), message))
    return [check for check in checks if check is not None]  # eagerly they have run already


def as_they_are(slices: tf.IndexedSlices, rows: int, dtype: tf.DType) -> Slices:
    return with_values(slices, slices.values)


def dense(slices: tf.IndexedSlices, rows: int, dtype: tf.DType) -> Any:
    """The dense gradient that the slices add up to."""
    return tf.math.unsorted_segment_sum(tf.cast(slices.values, dtype), slices.indices, rows)


def deduplicated(slices: tf.IndexedSlices, rows: int, dtype: tf.DType) -> Slices:
    """Slices with each id once, whose values are sums.

    XLA has no shapes that depend on values: there the ids are padded with `rows`, an id that no row has.
    Reading such a row gives anything, writing it does nothing.
    """
    ids, values = slices.indices, tf.cast(slices.values, dtype)
    if not _kernels.in_xla():
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


def nonzero(gradient: Any, rows: int) -> Slices:
    """The rows of a gradient that are not all zeros, padded under XLA as above."""
    rest = tuple(range(1, gradient.shape.rank))
    named = tf.reduce_any(gradient != 0, axis=rest)
    if not _kernels.in_xla():
        ids = tf.where(named)[:, 0]
        return Slices(tf.gather(gradient, ids), ids)
    return Slices(gradient, tf.where(named, tf.range(rows, dtype=tf.int64), tf.constant(rows, tf.int64)))


class Whole:
    """All of a variable."""

    def read(self, variable: Any) -> Any:
        return tf.convert_to_tensor(variable)

    def subtract(self, variable: Any, value: Any) -> None:
        variable.assign_sub(value)

    def write(self, variable: Any, value: Any) -> None:
        variable.assign(value)

    def real(self, value: Any) -> Any:
        """The value, where it is one of the variable's."""
        return value


class Rows(NamedTuple):
    """The rows that deduplicated slices name."""

    ids: Any
    rows: int

    def read(self, variable: Any) -> Any:
        return variable.sparse_read(self.ids)

    def subtract(self, variable: Any, value: Any) -> None:
        _kernels.subtract_rows(variable, self.ids, value)

    def write(self, variable: Any, value: Any) -> None:
        _kernels.write_rows(variable, self.ids, value)

    def real(self, value: Any) -> Any:
        """The value, with zeros in rows that only pad."""
        if not _kernels.in_xla():
            return value
        shape = [-1] + [1] * (value.shape.rank - 1)
        return tf.where(tf.reshape(self.ids < self.rows, shape), value, tf.zeros_like(value))
