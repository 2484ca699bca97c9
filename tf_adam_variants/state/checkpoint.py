"""The layout in a `tf.train.Checkpoint`, which restores the variables of an optimizer by position."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from tf_adam_variants.state import built, layout
from tf_adam_variants.state.layout import Layout
from tf_adam_variants.utils import internals


class CheckpointLayout(tf.train.experimental.PythonState, internals.OptionalState):
    """The layout in a `tf.train.Checkpoint`: written with the variables, compared when they are restored.

    Checkpoints that Keras wrote have none.
    """

    def __init__(self, optimizer: Any) -> None:
        self._optimizer = optimizer
        self._pending: Layout | None = None  # restored, not compared yet
        self._slots_are_new = False

    @property
    def is_checked(self) -> bool:
        return self._pending is None and not self._slots_are_new

    def serialize(self) -> str:
        return (built.describe(self._optimizer) if self._optimizer.built else Layout([], {})).to_json()

    def deserialize(self, string_value: bytes | str) -> None:
        saved = Layout.from_json(string_value)
        self._pending = saved if saved.entries else None
        if self._optimizer.built:
            self._check_layout()

    def check_new_slots(self) -> None:
        """After the first `build`: raise where its slots are not those of the checkpoint."""
        self._slots_are_new = True
        self.check()

    def check(self) -> None:
        """Raise a ValueError as long as what was restored does not fit the optimizer, which is built."""
        self._check_layout()
        if self._slots_are_new:
            _check_filled(self._optimizer.variables, self._optimizer.name)
            self._slots_are_new = False

    def _check_layout(self) -> None:
        if self._pending is not None:
            present = built.describe(self._optimizer).entries
            layout.check_positions(self._pending.entries, present, self._optimizer.name)
            built.restore(self._optimizer, *self._pending)
            self._optimizer._file_state.forget_pending_slots()
            self._pending = None


def _check_filled(variables: Sequence[Any], name: str) -> None:
    """Raise if a `tf.train.Checkpoint` has set some of the variables and not the others.

    Those that Keras wrote have no layout, and TensorFlow fills variables that are created after restoring
    without comparing shapes.
    """
    restored = [internals.is_restored(variable) for variable in variables]
    with tf.init_scope():
        wrong = [
            variable.name
            for variable, done in zip(variables, restored, strict=True)
            if any(restored[:1]) and (not done or tuple(tf.shape(variable.value)) != tuple(variable.shape))
        ]
    if wrong:
        more = f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise ValueError(
            f"The checkpoint does not belong to {name}: it has no fitting value for "
            f"{', '.join(wrong[:5])}{more}. Make the optimizer with the options it was saved with "
            f"({layout.OPTIONS}) and on the same model."
        )
