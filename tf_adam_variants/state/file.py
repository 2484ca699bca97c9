"""The state of an optimizer in Keras's files: `.keras` and `.weights.h5`."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
import tensorflow as tf

from tf_adam_variants.state import built, layout
from tf_adam_variants.state.layout import Entry, Layout
from tf_adam_variants.utils import checks, internals

_LAYOUT = "layout"  # not in what Keras saved
_DIGEST = "sha256"  # nor in what an older version saved


class FileState:
    """The state in Keras's files: `.keras` and `.weights.h5`.

    What has no variable yet is pending: before `build` all slots, later those of layers that are frozen.
    """

    def __init__(self, optimizer: Any) -> None:
        self._optimizer = optimizer
        self._pending: dict[str, np.ndarray] | None = None  # as they were read
        self._pending_slots: dict[Entry, np.ndarray] = {}
        self._patterns: dict[str, list[str]] = {}  # that were saved with them
        self._skip_mismatch = False  # as in the call that loaded what is pending
        self._is_foreseen = False  # whether this call warned of what is skipped

    @property
    def is_restored(self) -> bool:
        return self._pending is None

    def forget_pending_slots(self) -> None:
        self._pending_slots = {}

    def save(self, store: Any) -> None:
        """Write the variables by position, as Keras does, and the layout and a digest with them."""
        present = built.describe(self._optimizer)
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
        call = internals.current_load()
        self._skip_mismatch = call is not None and call.skip_mismatch
        if self._optimizer.built or not _has_slots(arrays):
            self._assign(arrays)
            return
        self._is_foreseen = False
        if call is not None and internals.inner_optimizer(call.model) is self._optimizer:
            # The first `build` would find too late what does not fit.
            self._is_foreseen = True
            present = built.foresee(self._optimizer, call.model.trainable_variables)
            _, places = self._match(arrays, present, warn=True)
            if places[0] is None:
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
        variables, present = self._optimizer.variables, built.describe(self._optimizer).entries
        before = len(self._pending_slots)
        with tf.init_scope():
            for i in range(first, len(present)):
                pending = list(self._pending_slots)
                place = layout.find(present[i], pending)
                if place is not None:
                    present[i] = pending[place]
                    variables[i].assign(self._pending_slots.pop(pending[place]))
            built.restore(self._optimizer, present, self._patterns)
        if len(self._pending_slots) == before:
            checks.warn(
                f"The saved state of {self._optimizer.name} that waits for its variables is of others than "
                f"these: {layout.list_names(present[first:])}. "
                f"It has {layout.list_names(self._pending_slots)}"
            )

    def _assign(self, arrays: Mapping[str, np.ndarray], slots_only: bool = False) -> None:
        optimizer = self._optimizer
        present = built.describe(optimizer).entries
        if not _has_slots(arrays):
            present = [entry for entry in present if entry.kind in layout.SCALARS]
        saved, places = self._match(arrays, present, warn=not (slots_only and self._is_foreseen))
        if places[0] is None:  # nothing fits
            return
        updates = int(arrays[str(places[0])]) // (optimizer.gradient_accumulation_steps or 1)
        entries = layout.begin_anew(saved.entries, places, present, updates)
        built.restore(optimizer, entries, saved.patterns)
        for variable, place, entry in zip(optimizer.variables, places, present, strict=False):
            if slots_only and entry.kind in layout.SCALARS:
                continue
            if place is not None:
                variable.assign(arrays[str(place)])
            elif entry.kind in layout.ZEROS:
                variable.assign(tf.zeros(variable.shape, variable.dtype))
        left = [] if None in places else sorted({*range(len(saved.entries))} - {*places})
        self._pending_slots = {saved.entries[place]: arrays[str(place)] for place in left}
        self._patterns = saved.patterns

    def _match(
        self, arrays: Mapping[str, np.ndarray], present: list[Entry], warn: bool
    ) -> tuple[Layout, list[int | None]]:
        """The saved layout, and for each present variable the place of its value; None to skip it.

        Raises:
            ValueError: where they do not fit and the user did not say to skip what does not.
        """
        if _LAYOUT in arrays:
            saved = Layout.from_json(arrays[_LAYOUT].tobytes())
        else:  # written by Keras: only shapes can be compared
            shapes = [arrays[str(i)].shape for i in range(len(arrays))]
            fits = shapes == [entry.shape for entry in present]
            saved = Layout(present if fits else [Entry("an array", s, "an array") for s in shapes], {})
        try:
            return saved, list(layout.match(saved.entries, present, self._optimizer.name))
        except ValueError:
            if not self._skip_mismatch:
                raise
        places = layout.match_some(saved.entries, present)
        skipped = [entry for entry, place in zip(present, places, strict=True) if place is None]
        if warn:
            checks.warn(
                f"{self._optimizer.name} skips what does not fit of its saved state, as `skip_mismatch=True` "
                f"says. These begin anew: {layout.list_names(skipped)}"
            )
        return saved, places


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
