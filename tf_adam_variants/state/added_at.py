"""When variables were added: the number of updates before a late `build`, from which theirs count."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping
from typing import Any

import keras
import tensorflow as tf

from tf_adam_variants.utils import internals

NAME = "added_at"


class AddedAt:
    """One int64 variable of the optimizer per `build` call after the first, for all variables of the call.

    The calls count from 0, the first `build`, which has none.
    """

    def __init__(self, optimizer: Any) -> None:
        self._optimizer = optimizer
        self._variables: list[Any] = []
        self._calls: dict[int, int] = {}  # by the index of a trainable variable
        self._traced: set[int] = set()  # the indices whose calls are fixed in the graph of a function
        self._others: Any = None

    def __len__(self) -> int:
        return len(self._variables)

    def add_last(self, number: int) -> None:
        """Create the variable of the `build` call that added the last trainable variables, in this number."""
        end = len(self._optimizer._trainable_variables)
        with tf.init_scope():
            updates = int(keras.ops.convert_to_numpy(self._optimizer.iterations))
        self._add(range(end - number, end), updates)

    def _add(self, indices: Iterable[int], updates: int) -> None:
        strategy = self._optimizer._distribution_strategy
        with contextlib.nullcontext() if tf.distribute.has_strategy() else strategy.scope():
            variable = self._optimizer.add_variable(
                shape=(),
                initializer=lambda shape, dtype: tf.constant(updates, dtype),
                dtype="int64",
                aggregation="only_first_replica",
                name=NAME,
            )
        self._variables.append(variable)
        self._calls |= dict.fromkeys(indices, len(self._variables))

    def call_of(self, index: int) -> int:
        """The `build` call that added a trainable variable."""
        if not tf.executing_eagerly():
            self._traced.add(index)
        return self._calls.get(index, 0)

    def count(self, iterations: tf.Tensor, call: int) -> tf.Tensor:
        """The updates of the variables of a call; from 0 again where `iterations` was set to less."""
        if not call:
            return iterations
        variable = self._variables[call - 1].value
        start = tf.minimum(tf.convert_to_tensor(variable), tf.cast(iterations, tf.int64))
        variable.assign(start)
        return iterations - tf.cast(start, iterations.dtype)

    def values(self) -> dict[int, int]:
        """The number of updates before each added variable, by its index."""
        with tf.init_scope():
            starts = [int(variable.numpy()) for variable in self._variables]
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
        if any(not self._traced.isdisjoint(members[group]) for group in moved):
            raise ValueError(
                f"In the saved state, {self._optimizer.name} took variables later than here, and a function "
                "with its step is traced already. Restore the state before the first step"
            )
        for call, start in starts.items():
            if call:
                self._variables[call - 1].assign(start)
        for group in moved:
            self._add(members[group], group[1])

    def others(self) -> Any:
        """The optimizer's other variables, as a list that TensorFlow can track.

        In a `tf.train.Checkpoint`, where variables go by position, the others then have theirs whatever was
        added when. The layout that is saved with them holds the numbers.
        """
        own = {id(variable) for variable in self._variables}
        others = [variable for variable in self._optimizer.variables if id(variable) not in own]
        if self._others is None or len(self._others) != len(others):
            self._others = internals.wrap_tracked(others)
        return self._others
