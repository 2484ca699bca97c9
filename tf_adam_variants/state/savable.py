"""The part of the optimizer that saves and restores its state."""

from __future__ import annotations

from typing import Any

import keras

from tf_adam_variants.state.added_at import AddedAt
from tf_adam_variants.state.checkpoint import CheckpointLayout
from tf_adam_variants.state.dense_sums import DenseSums
from tf_adam_variants.state.file import FileState
from tf_adam_variants.utils import internals


class Savable(keras.optimizers.Optimizer):
    """A Keras optimizer that saves the layout of its state with it and refuses state that does not fit."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._added_at = AddedAt(self)
        self._dense_sums = DenseSums(self)
        self._layout = CheckpointLayout(self)  # checkpoints hold it under this name
        self._file_state = FileState(self)

    def save_own_variables(self, store: Any) -> None:
        """Write the state, and which variables it has, to a Keras store."""
        self._file_state.save(store)

    def load_own_variables(self, store: Any) -> None:
        """Set the state from a Keras store, now or, before the slots exist, when `build` creates them.

        Raises:
            ValueError: that names the differences, where the saved state belongs to another optimizer.
        """
        self._file_state.load(store)

    def _restore_new_slots(self, variables: int, slots_before: int) -> None:
        """Set slots that `build` created for this number of variables to what was restored before.

        Args:
            variables: how many variables were added.
            slots_before: how many slots there were; 0 in the first `build`.

        Raises:
            ValueError: where the restored state belongs to another optimizer.
        """
        if slots_before:
            self._added_at.add_last(variables)
            self._check_restored()
            self._file_state.restore_pending_slots(slots_before)
        else:
            self._layout.check_new_slots()
            self._file_state.restore_pending()

    def _check_restored(self) -> None:
        """Raise a ValueError as long as restored state does not fit."""
        if not (self._layout.is_checked and self._file_state.is_restored):
            self._layout.check()
            self._file_state.restore_pending()

    def _trackable_children(self, save_type: str = "checkpoint", **kwargs: Any) -> dict[str, Any]:
        children = super()._trackable_children(save_type, **kwargs)
        if save_type == "savedmodel":  # it holds no Python state, and would be missed on loading
            children = {name: child for name, child in children.items() if child is not self._layout}
            if untracked := self._added_at.variables + self._dense_sums.variables:
                children["untracked"] = internals.wrap_tracked(untracked)
        return children
