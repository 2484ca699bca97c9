"""A view of some rows of a variable: reading gathers, assigning scatters."""

from __future__ import annotations

from typing import Any, NamedTuple

import tensorflow as tf

from tf_adam_variants import _xla


class Rows(NamedTuple):
    """The rows of a resource variable that these ids name, each once."""

    variable: Any
    ids: Any

    @property
    def dtype(self) -> tf.DType:
        return self.variable.dtype

    @property
    def shape(self) -> tf.TensorShape:
        """The whole variable's."""
        return self.variable.shape

    def value(self) -> Any:
        return self.variable.sparse_read(self.ids)

    def assign(self, value: Any) -> None:
        handle = self.variable.handle
        tf.raw_ops.ResourceScatterUpdate(resource=handle, indices=self.ids, updates=value)
        self.allow_dense_reads()

    def assign_sub(self, value: Any) -> None:
        handle = self.variable.handle
        tf.raw_ops.ResourceScatterSub(resource=handle, indices=self.ids, updates=value)
        self.allow_dense_reads()

    def allow_dense_reads(self) -> None:
        """Let dense reads use the variable's memory again.

        After a gather or a scatter TensorFlow copies the whole table at each dense read, and Keras's
        Embedding begins with one.
        """
        if not _xla.is_compiling():
            tf.raw_ops.DisableCopyOnRead(resource=self.variable.handle)
