"""Gradients before the step: checked, unscaled, with repeated indices summed, dense or as rows, clipped."""

from __future__ import annotations

import collections
import enum
from collections.abc import Callable, Container
from typing import Any

import numpy as np
import tensorflow as tf

from tf_adam_variants.engines.formula import to_float32
from tf_adam_variants.optimizer import replicas
from tf_adam_variants.utils import checks, internals
from tf_adam_variants.utils.variables import path_of, paths_of, state_dtype


class Form(enum.Enum):
    """What becomes of a sparse gradient before the replicas meet."""

    DENSE = enum.auto()
    ROWS = enum.auto()  # as it is: the engine adds up repeated indices
    UNIQUE_ROWS = enum.auto()  # repeated indices are summed first: nothing is squared or clipped before


# -- checks --------------------------------------------------------------------------------------------------


def check_distinct(variables: list[Any], keys: list[Any], name: str) -> None:
    """Raise a ValueError where a variable is given more than once."""
    if len(set(keys)) != len(keys):
        counts = collections.Counter(keys)
        repeated = [v for v, key in zip(variables, keys, strict=True) if counts[key] > 1]
        raise ValueError(f"{name} was given a variable more than once: {paths_of(repeated)}")


def check(grads: list[Any], variables: list[Any], keys: list[Any], name: str) -> list[Any]:
    """The gradients, with lists as tensors, if there is one per variable, of its shape.

    Args:
        grads: gradients, some of which may be None.
        variables: their variables.
        keys: what identifies each variable.
        name: the name of the optimizer.

    Raises:
        ValueError: if there is not.
    """
    if len(grads) != len(variables):
        raise ValueError(
            f"{name} needs one gradient a variable. Received: {len(grads)} gradients for "
            f"{len(variables)} variables: {paths_of(variables)}"
        )
    check_distinct(variables, keys, name)
    grads = [_convert(gradient, variable) for gradient, variable in zip(grads, variables, strict=True)]
    for gradient, variable in zip(grads, variables, strict=True):
        if gradient is not None and not tf.TensorShape(variable.shape).is_compatible_with(
            _shape_of(gradient)
        ):
            raise ValueError(
                f"The gradient of {path_of(variable)} must have its shape, "
                f"{tuple(variable.shape)}. Received: a gradient of shape {_shape_of(gradient)}"
            )
    return grads


def _convert(gradient: Any, variable: Any) -> Any:
    """A gradient as a tensor, Keras allows lists and tuples; the indices of IndexedSlices as int32 or int64.

    Raises:
        ValueError: for IndexedSlices without one integer index per slice.
    """
    if isinstance(gradient, (list, tuple)):
        return tf.convert_to_tensor(gradient, state_dtype(variable))
    if not isinstance(gradient, tf.IndexedSlices):
        return gradient
    values, indices = gradient.values, gradient.indices
    if not tf.is_tensor(values):
        values = tf.convert_to_tensor(values, state_dtype(variable))
    if not tf.is_tensor(indices):
        indices = tf.convert_to_tensor(np.array(indices, None if len(indices) else np.int64))
    if not indices.dtype.is_integer or not indices.shape.is_compatible_with(values.shape[:1]):
        raise ValueError(
            f"The gradient of {path_of(variable)} must have one integer index per slice. Received: "
            f"indices of shape {indices.shape} and type {indices.dtype.name}, values of shape {values.shape}"
        )
    if indices.dtype not in (tf.int32, tf.int64):
        indices = tf.cast(indices, tf.int64)
    return tf.IndexedSlices(values, indices, gradient.dense_shape)


def _shape_of(gradient: Any) -> tf.TensorShape:
    """The shape of a gradient, with the number of rows left open for IndexedSlices."""
    if isinstance(gradient, tf.IndexedSlices):
        return tf.TensorShape([None]).concatenate(gradient.values.shape[1:])
    return tf.TensorShape(gradient.shape)


def assert_indices(grads: list[Any], variables: list[Any]) -> list[Any]:
    """Assertions that all indices are rows, as many as values; a GPU would silently ignore the others."""
    assertions = []
    for gradient, variable in zip(grads, variables, strict=True):
        if isinstance(gradient, tf.IndexedSlices):
            indices, rows = gradient.indices, variable.shape[0]
            message = f"The ids of a gradient's slices must be in [0, {rows})"
            assertions.append(
                tf.debugging.assert_greater_equal(indices, tf.zeros((), indices.dtype), message)
            )
            assertions.append(tf.debugging.assert_less(indices, tf.constant(rows, indices.dtype), message))
            if not (indices.shape + gradient.values.shape[:1]).is_fully_defined():
                sizes = tf.shape(indices), tf.shape(gradient.values)[:1]
                assertions.append(tf.debugging.assert_equal(*sizes, "A gradient's slices need an id each"))
    return [assertion for assertion in assertions if assertion is not None]  # None: it ran eagerly


def check_known(variables: list[Any], keys: list[Any], known: Container[Any], name: str) -> None:
    """Raise a ValueError for variables without slots."""
    unknown = [v for v, key in zip(variables, keys, strict=True) if key not in known]
    if unknown:
        raise ValueError(
            f"Unknown variables: {paths_of(unknown)}. {name} has no slots for them. To add some, call "
            "`optimizer.build(model.trainable_variables)` before the step (the others keep theirs), or "
            "compile the model with a new optimizer"
        )


# -- which gradients step ------------------------------------------------------------------------------------


def drop_missing(grads: list[Any], variables: list[Any]) -> tuple[list[Any], list[Any]]:
    """Gradients and variables without those that have no gradient, of which Keras's warning tells."""
    missing = [path_of(v) for g, v in zip(grads, variables, strict=True) if g is None]
    if len(missing) == len(grads):
        raise ValueError("No gradients provided for any variable.")
    if missing:
        checks.warn(
            f"Gradients do not exist for variables {missing} when minimizing the loss. If using "
            "`model.compile()`, did you forget to provide a `loss` argument?"
        )
    pairs = [(g, v) for g, v in zip(grads, variables, strict=True) if g is not None]
    return [g for g, _ in pairs], [v for _, v in pairs]


def overwrite_variables(
    grads: list[Any], variables: list[Any], overwrite: Callable[[Any, Any], Any]
) -> tuple[list[Any], list[Any]]:
    """Overwrite variables that ask for it, as float8 scales do, by their gradients; return the others."""
    others = []
    for gradient, variable in zip(grads, variables, strict=True):
        if getattr(variable, "overwrite_with_gradient", False):
            overwrite(variable, gradient)
        else:
            others.append((gradient, variable))
    return [g for g, _ in others], [v for _, v in others]


def tensors_of(grads: list[Any]) -> list[Any]:
    """The tensors of the gradients, to wait for."""
    present = [g.values if isinstance(g, tf.IndexedSlices) else g for g in grads if g is not None]
    return [] if tf.executing_eagerly() else [g for g in present if tf.is_tensor(g)]


# -- the form of a gradient ----------------------------------------------------------------------------------


def prepare(gradient: Any, variable: Any, form: Form, loss_scale: float | None, accumulates: bool) -> Any:
    """The gradient of one replica, unscaled, and if it is sparse in this form."""
    if isinstance(gradient, tf.IndexedSlices):
        if form is Form.DENSE:
            gradient = to_dense(gradient, variable.shape[0], state_dtype(variable))
        elif form is Form.UNIQUE_ROWS:
            gradient = sum_repeated_indices(gradient, variable.shape[0], state_dtype(variable))
    elif accumulates or loss_scale:
        gradient = tf.cast(gradient, state_dtype(variable))
    return map_values(lambda values: values / loss_scale, gradient) if loss_scale else gradient


def unique_rows(gradient: Any, variable: Any) -> Any:
    """A gradient after the replicas met, with each row once: their IndexedSlices were concatenated."""
    if replicas.count() == 1 or not isinstance(gradient, tf.IndexedSlices):
        return gradient
    return sum_repeated_indices(gradient, variable.shape[0], state_dtype(variable))


def to_dense(slices: tf.IndexedSlices, rows: int, dtype: tf.DType) -> Any:
    """The dense gradient that the slices add up to."""
    return tf.math.unsorted_segment_sum(tf.cast(slices.values, dtype), slices.indices, rows)


def sum_repeated_indices(slices: tf.IndexedSlices, rows: int, dtype: tf.DType) -> tf.IndexedSlices:
    """IndexedSlices with each index once, whose values are the sums.

    XLA has no shapes that depend on values. There the indices are padded with `rows`, which is no row:
    gathering it gives any row, scattering to it does nothing.
    """
    indices, values = slices.indices, tf.cast(slices.values, dtype)
    if not internals.is_xla_compiling():
        unique, position = tf.unique(indices)
        return tf.IndexedSlices(tf.math.unsorted_segment_sum(values, position, tf.size(unique)), unique)
    order = tf.argsort(indices)
    indices, values = tf.gather(indices, order), tf.gather(values, order)
    first = tf.concat(
        [tf.ones_like(indices[:1]), tf.cast(indices[1:] != indices[:-1], indices.dtype)], axis=0
    )
    position = tf.cumsum(first) - 1
    unique = tf.tensor_scatter_nd_update(
        tf.fill(tf.shape(indices), tf.cast(rows, indices.dtype)), position[:, None], indices
    )
    return tf.IndexedSlices(tf.math.unsorted_segment_sum(values, position, tf.shape(indices)[0]), unique)


def nonzero_rows(gradient: Any, all_rows: Any) -> tf.IndexedSlices:
    """The rows of a dense gradient that are not all zeros, or all of them; padded under XLA as above."""
    rows, other_axes = gradient.shape[0], tuple(range(1, gradient.shape.rank))
    nonzero = tf.reduce_any(gradient != 0, axis=other_axes) | all_rows
    if not internals.is_xla_compiling():
        indices = tf.where(nonzero)[:, 0]
        return tf.IndexedSlices(tf.gather(gradient, indices), indices)
    indices = tf.where(nonzero, tf.range(rows, dtype=tf.int64), tf.constant(rows, tf.int64))
    return tf.IndexedSlices(gradient, indices)


def padding_mask(slices: tf.IndexedSlices, rows: int) -> Any | None:
    """Which of the slices are padding, to broadcast over their values; None where none can be."""
    if not internals.is_xla_compiling():
        return None
    return tf.reshape(slices.indices >= rows, [-1] + [1] * (slices.values.shape.rank - 1))


# -- clipping ------------------------------------------------------------------------------------------------


def clip(gradient: Any, clipnorm: float | None, clipvalue: float | None) -> Any:
    """A clipped gradient, in float32 for half precision. Its indices must not repeat."""
    if clipnorm:
        return map_values(lambda values: tf.clip_by_norm(to_float32(values), clipnorm), gradient)
    if clipvalue:
        return map_values(
            lambda values: tf.clip_by_value(to_float32(values), -clipvalue, clipvalue), gradient
        )
    return gradient


def clip_scale(norm: Any, global_clipnorm: float) -> Any:
    """The factor that clips gradients of this global norm. NaN where it is not finite, as in Keras."""
    return global_clipnorm / tf.maximum(norm, global_clipnorm) + (norm - norm)


def map_values(function: Callable[[Any], Any], gradient: Any) -> Any:
    """A function of the values of a gradient, dense or sparse."""
    if isinstance(gradient, tf.IndexedSlices):
        return tf.IndexedSlices(function(gradient.values), gradient.indices, gradient.dense_shape)
    return function(tf.convert_to_tensor(gradient))
