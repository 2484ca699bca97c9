"""A variable with its slots and its gradient, as an engine updates it; or some rows of them."""

from __future__ import annotations

from typing import Any, NamedTuple

import tensorflow as tf

from tf_adam_variants.utils import internals


class VariableState(NamedTuple):
    """One variable on one device, with its slots and its gradient.

    The variable and its slots are TensorFlow variables, or views of some of their rows (`Rows`).
    """

    variable: Any
    momentum: Any  # the type of the slots is the type of the arithmetic
    velocity: Any
    gradient: Any  # a tensor; IndexedSlices for an engine that accepts them
    weight_decay: bool  # False: the variable is excluded
    layer_adaptation: bool
    velocity_hat: Any | None = None  # with amsgrad
    master_weight: Any | None = None  # float32 copy of a half-precision variable, which is its rounding
    rng_stream: int | None = None  # number of the random stream that rounds the variable; None: to nearest
    indices: Any | None = None  # of the rows that are updated, where the tensors are views of rows
    padding: Any | None = None  # mask of the rows that stand for none, with meaningless values

    def select_rows(self, slices: tf.IndexedSlices, padding: Any | None) -> VariableState:
        """The state of the rows that these slices name, each once."""
        tensors = ("variable", "momentum", "velocity", "velocity_hat", "master_weight")
        rows: dict[str, Any] = {
            name: Rows(getattr(self, name), slices.indices)
            for name in tensors
            if getattr(self, name) is not None
        }
        return self._replace(gradient=slices.values, indices=slices.indices, padding=padding, **rows)


class GroupSpec(NamedTuple):
    """What an engine must know of a group of variables to say whether it can update them."""

    dtype: tf.DType
    sparse: bool  # whether their gradients are IndexedSlices
    devices: frozenset[tuple[str, ...]]  # of all variables of the optimizer, a tuple over replicas each


class Rows(NamedTuple):
    """Some rows of a resource variable: reading gathers, assigning scatters."""

    variable: Any
    indices: Any  # each once

    @property
    def dtype(self) -> tf.DType:
        return self.variable.dtype

    @property
    def shape(self) -> tf.TensorShape:
        """The shape of the whole variable."""
        return self.variable.shape

    def value(self) -> Any:
        return self.variable.sparse_read(self.indices)

    def assign(self, value: Any) -> None:
        handle = self.variable.handle
        tf.raw_ops.ResourceScatterUpdate(resource=handle, indices=self.indices, updates=value)
        self.allow_dense_reads()

    def assign_sub(self, value: Any) -> None:
        handle = self.variable.handle
        tf.raw_ops.ResourceScatterSub(resource=handle, indices=self.indices, updates=value)
        self.allow_dense_reads()

    def allow_dense_reads(self) -> None:
        """Let dense reads use the variable's memory again.

        After a gather or a scatter TensorFlow copies the whole table at each dense read, and Keras's
        Embedding begins with one.
        """
        if not internals.is_xla_compiling():
            tf.raw_ops.DisableCopyOnRead(resource=self.variable.handle)
