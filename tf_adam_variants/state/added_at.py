"""When variables were added: the number of updates before a late `build`, from which theirs count."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping
from typing import Any

import keras
import numpy as np
import tensorflow as tf


def create_untracked(optimizer: Any, value: Any, name: str) -> keras.Variable:
    """A variable that is not in `optimizer.variables`: the layout of a saved state holds its value."""
    value, strategy = np.asarray(value), optimizer._distribution_strategy
    scope = contextlib.nullcontext() if tf.distribute.has_strategy() else strategy.scope()
    with scope, keras.name_scope(optimizer.name, caller=optimizer):
        return keras.Variable(
            lambda shape, dtype: tf.constant(value, dtype),
            shape=value.shape,
            dtype=value.dtype.name,
            trainable=False,
            name=name,
        )


class AddedAt:
    """One int64 variable per `build` call after the first, for all variables of the call.

    The calls count from 0, the first `build`, which has none. `optimizer.variables` leaves these out: the
    layout of a saved state holds their values, and a LossScaleOptimizer saves `variables` by position.
    """

    def __init__(self, optimizer: Any) -> None:
        self._optimizer = optimizer
        self.variables: list[Any] = []
        self._calls: dict[int, int] = {}  # by the index of a trainable variable
        self._traced: set[int] = set()  # the indices whose calls are fixed in the graph of a function

    def add_last(self, number: int) -> None:
        """Create the variable of the `build` call that added the last trainable variables, in this number."""
        end = len(self._optimizer._trainable_variables)
        with tf.init_scope():
            updates = int(keras.ops.convert_to_numpy(self._optimizer.iterations))
        self._add(range(end - number, end), updates)

    def _add(self, indices: Iterable[int], updates: int) -> None:
        self.variables.append(create_untracked(self._optimizer, np.int64(updates), "added_at"))
        self._calls |= dict.fromkeys(indices, len(self.variables))

    def call_of(self, index: int) -> int:
        """The `build` call that added a trainable variable."""
        if not tf.executing_eagerly():
            self._traced.add(index)
        return self._calls.get(index, 0)

    def count(self, iterations: tf.Tensor, call: int) -> tf.Tensor:
        """The updates of the variables of a call; from 0 again where `iterations` was set to less."""
        if not call:
            return iterations
        variable = self.variables[call - 1].value
        start = tf.minimum(tf.convert_to_tensor(variable), tf.cast(iterations, tf.int64))
        variable.assign(start)
        return iterations - tf.cast(start, iterations.dtype)

    def check_not_traced(self, indices: Iterable[int], what: str) -> None:
        """Raise a ValueError where a function that is traced already would miss a change of variables."""
        if not self._traced.isdisjoint(indices):
            raise ValueError(
                f"In the saved state, {what}, and a function with its step is traced already. Restore the "
                "state before the first step"
            )

    def values(self) -> dict[int, int]:
        """The number of updates before each added variable, by its index."""
        with tf.init_scope():
            starts = [int(variable.numpy()) for variable in self.variables]
        return {index: starts[call - 1] for index, call in self._calls.items()}

    def restore(self, values: Mapping[int, int]) -> None:
        """Set what `values` returned for another optimizer.

        Variables that were added there by several calls, and here by one, receive a variable per call.

        Raises:
            ValueError: where a function that is traced already would miss that.
        """
        members: dict[tuple[int, int], list[int]] = {}
        for index in range(len(self._optimizer._trainable_variables)):
            group = self._calls.get(index, 0), values.get(index, 0)
            members.setdefault(group, []).append(index)
        starts: dict[int, int] = {0: 0}  # by call: the number that its variable takes
        moved = [group for group in members if starts.setdefault(*group) != group[1]]
        for group in moved:
            self.check_not_traced(members[group], f"{self._optimizer.name} took variables later than here")
        for call, start in starts.items():
            if call:
                self.variables[call - 1].assign(start)
        for group in moved:
            self._add(members[group], group[1])
