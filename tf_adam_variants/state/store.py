"""Reading and writing an optimizer's state, in `tf.train.Checkpoint`s and in Keras's files."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from tf_adam_variants.state import layout
from tf_adam_variants.state.layout import Entry, Layout
from tf_adam_variants.utils import internals

# The attributes with a list of slots, one per variable. The first two are those of Keras.
_SLOT_LISTS = (
    *("_model_variables_moving_average", "_accumulated_gradients"),
    *("_momentums", "_velocities", "_velocity_hats", "_master_weights"),
)
_LAYOUT = "layout"  # not in what Keras saved
_DIGEST = "sha256"  # nor in what an older version saved


class CheckpointLayout(tf.train.experimental.PythonState):
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
        return (describe(self._optimizer) if self._optimizer.built else Layout([], {})).to_json()

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
            present = describe(self._optimizer).entries
            layout.check_positions(self._pending.entries, present, self._optimizer.name)
            _restore_build(self._optimizer, self._pending)
            self._optimizer._file_state.forget_pending_slots()
            self._pending = None


class FileState:
    """The state in Keras's files: `.keras` and `.weights.h5`.

    What has no variable yet is pending: before `build` all slots, later those of layers that are frozen.
    """

    def __init__(self, optimizer: Any) -> None:
        self._optimizer = optimizer
        self._pending: dict[str, np.ndarray] | None = None  # as they were read
        self._pending_slots: dict[Entry, np.ndarray] = {}
        self._patterns: dict[str, list[str]] = {}  # that were saved with them

    @property
    def is_restored(self) -> bool:
        return self._pending is None

    def forget_pending_slots(self) -> None:
        self._pending_slots = {}

    def save(self, store: Any) -> None:
        """Write the variables by position, as Keras does, and the layout and a digest with them."""
        present = describe(self._optimizer)
        pending = list(self._pending_slots)
        if self._patterns != present.patterns:  # whom those of here exclude is not known
            pending = [entry._replace(excluded_from=None) for entry in pending]
        text = present._replace(entries=present.entries + pending).to_json()
        values = [variable.numpy() for variable in self._optimizer.variables]
        written = self._pending or {_LAYOUT: np.frombuffer(text.encode(), np.uint8)}
        written = written | {str(i): v for i, v in enumerate((*values, *self._pending_slots.values()))}
        for key, array in (written | {_DIGEST: _digest(written)}).items():
            store[key] = array

    def load(self, store: Any) -> None:
        """Set the variables, now or, before the slots exist, when `build` creates them."""
        # Copies, which outlive the file: an h5 group, or one of Keras's own stores.
        arrays = {key: np.array(store[key]) for key in list(store.keys())}
        digest = arrays.pop(_DIGEST, None)
        if digest is not None and not np.array_equal(digest, _digest(arrays)):
            raise ValueError(
                f"The saved state of {self._optimizer.name} is damaged: its bytes are not those that were "
                "saved. Take another copy of the file. To start without the saved state, compile the model "
                "with a new optimizer after loading it (with load_model(..., compile=False))"
            )
        arrays = _drop_loss_scale(arrays)
        if not arrays:
            warnings.warn(
                f"The file has no state for {self._optimizer.name}, which stays as it is. The model was "
                "saved without an optimizer, or this one is in a LossScaleOptimizer and the saved one was "
                "not: then compile with auto_scale_loss=False, load, and compile with model.optimizer",
                stacklevel=2,
            )
            return
        if self._optimizer.built or not _has_slots(arrays):
            self._assign(arrays)
            return
        for i, variable in enumerate(self._optimizer.variables):
            if arrays[str(i)].shape == ():  # iteration, and learning rate unless it is a schedule
                variable.assign(arrays[str(i)])
        self._pending = arrays

    def restore_pending(self) -> None:
        """Set the slots that the first `build` created; raise a ValueError as long as they do not fit."""
        if self._pending is not None:
            with tf.init_scope():  # slots may be created, and so loaded, while a step is traced
                self._assign(self._pending, slots_only=True)
            self._pending = None

    def restore_pending_slots(self, first: int) -> None:
        """Set the slots that a later `build` created, from this place among the optimizer's variables."""
        if not self._pending_slots:
            return
        variables, present = self._optimizer.variables, describe(self._optimizer).entries
        before = len(self._pending_slots)
        with tf.init_scope():
            for i in range(first, len(present)):
                pending = list(self._pending_slots)
                place = layout.find(present[i], pending)
                if place is not None:
                    present[i] = pending[place]
                    variables[i].assign(self._pending_slots.pop(pending[place]))
            _restore_build(self._optimizer, Layout(present, self._patterns))
        if len(self._pending_slots) == before:
            warnings.warn(
                f"The saved state of {self._optimizer.name} that waits for its variables is of others than "
                f"these: {', '.join(layout.names(present[first:])[:5])}. It has "
                f"{', '.join(layout.names(self._pending_slots)[:5])}",
                stacklevel=2,
            )

    def _assign(self, arrays: Mapping[str, np.ndarray], slots_only: bool = False) -> None:
        optimizer = self._optimizer
        variables, present = optimizer.variables, describe(optimizer).entries
        patterns: dict[str, list[str]] = {}
        if _LAYOUT in arrays:
            saved, patterns = Layout.from_json(arrays[_LAYOUT].tobytes())
        else:  # written by Keras: only shapes can be compared
            shapes = [arrays[str(i)].shape for i in range(len(arrays))]
            fits = shapes == [entry.shape for entry in present]
            saved = present if fits else [Entry("an array", shape, "an array") for shape in shapes]
        if not _has_slots(arrays):
            present = [entry for entry in present if entry.kind in layout.SCALARS]
        places = layout.match(saved, present, optimizer.name)
        _restore_build(optimizer, Layout([saved[place] for place in places], patterns))
        for variable, place, entry in zip(variables, places, present, strict=False):
            if not (slots_only and entry.kind in layout.SCALARS):
                variable.assign(arrays[str(place)])
        left = sorted({*range(len(saved))} - {*places})
        self._pending_slots = {saved[place]: arrays[str(place)] for place in left}
        self._patterns = patterns


def describe(optimizer: Any) -> Layout:
    """The layout of an optimizer: one entry per variable, in order."""
    indices, added_at = _slot_indices(optimizer), optimizer._added_at.values()

    def entry(variable: Any) -> Entry:
        index = indices.get(id(variable), -1)
        excluded_from = tuple(one.argument for one in optimizer._exclusions if index in one.indices)
        shape, kind = tuple(variable.shape), layout.kind_of(variable.name)
        return Entry(kind, shape, variable.name, added_at.get(index), excluded_from)

    patterns = {one.argument: one.patterns_in_use for one in optimizer._exclusions}
    return Layout([entry(variable) for variable in optimizer.variables], patterns)


def _slot_indices(optimizer: Any) -> dict[int, int]:
    """The index of the variable that a slot belongs to, by the slot's id."""
    lists = [getattr(optimizer, name, ()) for name in _SLOT_LISTS] if optimizer.built else []
    return {id(slot): i for slots in lists for i, slot in enumerate(slots) if slot is not None}


def _restore_build(optimizer: Any, saved: Layout) -> None:
    """Take over what `build` had fixed per variable: when it was added, and what excluded it.

    Args:
        optimizer: an optimizer that is built.
        saved: its restored layout: the entries begin with one per variable of the optimizer.
    """
    indices = _slot_indices(optimizer)
    entries = {
        indices[id(variable)]: entry
        for variable, entry in zip(optimizer.variables, saved.entries, strict=False)
        if id(variable) in indices
    }
    optimizer._added_at.restore(
        {i: entry.added_at for i, entry in entries.items() if entry.added_at is not None}
    )
    for exclusions in optimizer._exclusions:
        name = exclusions.argument
        changed = [
            index
            for index, entry in entries.items()
            if entry.excluded_from is not None
            and (name in entry.excluded_from) != (index in exclusions.indices)
        ]
        if saved.patterns.get(name) == exclusions.patterns_in_use:
            optimizer._added_at.check_not_traced(changed, f"`{name}` excluded other variables")
            exclusions.restore(changed)
        elif name in saved.patterns:
            exclusions.warn_changed(saved.patterns[name], changed, optimizer._trainable_variables)


def _digest(arrays: Mapping[str, np.ndarray]) -> np.ndarray:
    """A checksum: `.weights.h5` files have none."""
    digest = hashlib.sha256()
    for key in sorted(arrays):
        digest.update(f"{key} {arrays[key].shape} {arrays[key].dtype.str} ".encode())
        digest.update(np.ascontiguousarray(arrays[key]).tobytes())
    return np.frombuffer(digest.digest(), np.uint8)


def _has_slots(arrays: Mapping[str, np.ndarray]) -> bool:
    """False for an optimizer that was saved before its first step: iteration and learning rate only."""
    return len(arrays) - (_LAYOUT in arrays) > 2


def _drop_loss_scale(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Of what a LossScaleOptimizer saved, the state of the optimizer in it: all but its own four scalars."""
    first = [arrays[str(i)] for i in range(min(len(arrays), 5)) if str(i) in arrays]
    # Its iteration, learning rate, step counter and scale; the iteration of the other.
    if [array.dtype.kind for array in first] != list("ififi") or any(array.shape for array in first):
        return arrays
    return {str(i): arrays[str(i + 4)] for i in range(len(arrays) - 4)}


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
