"""Which accumulated gradients hold a dense one: such an update moves all rows, also where it is lazy."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tf_adam_variants.state.added_at import create_untracked


class DenseSums:
    """A flag per trainable variable of an optimizer that accumulates gradients."""

    def __init__(self, optimizer: Any) -> None:
        self._optimizer = optimizer
        self.variables: list[keras.Variable] = []  # one vector, if there is any
        self._initial = np.zeros(0, bool)

    def create(self) -> None:
        """Create the flags, after each `build`."""
        self._initial = self._flags(self.values())
        self.variables = [create_untracked(self._optimizer, self._initial, "dense_sums")]

    def add(self, is_dense: list[bool]) -> Any:
        """The flags after gradients are added of which these, one per trainable variable, are dense."""
        return tf.logical_or(tf.convert_to_tensor(self.variables[0].value), is_dense)

    def assign(self, strategy: Any, flags: Any) -> None:
        """Set the flags, once for all replicas."""
        strategy.extended.update(self.variables[0].value, lambda v: v.assign(flags), group=False)

    def values(self) -> set[int]:
        """The indices of the variables whose flags are set."""
        if not self.variables:
            return set()
        with tf.init_scope():
            flags = self.variables[0].numpy()
        # A variable that is created while a step is traced has no value until then.
        return {int(i) for i in np.flatnonzero(flags if flags.size else self._initial)}

    def restore(self, values: Mapping[int, bool]) -> None:
        """Set the flags of the variables with these indices."""
        if self.variables:
            others = self.values() - values.keys()
            flags = self._flags(others | {i for i, value in values.items() if value})
            with tf.init_scope():
                self.variables[0].assign(flags)

    def _flags(self, indices: set[int]) -> np.ndarray:
        flags = np.zeros(len(self._optimizer._trainable_variables), bool)
        flags[list(indices)] = True
        return flags
