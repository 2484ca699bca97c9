"""An optimizer's saved state with its layout, so that state saved by a different optimizer is refused.

Keras saves an optimizer's variables by position and TensorFlow's checkpoints match them by position
too: without the layout, state saved with other options (an average more, no learning rate variable) would be
mixed up or left at zero silently. Nor do Keras's files notice when their bytes change: a digest does.
"""

from __future__ import annotations

import hashlib
import json
import re
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import keras
import numpy as np
import tensorflow as tf

from tf_adam_variants.optimizer import slots

_SLOTS = ("gradient_accumulator", "master_weight", "velocity_hat", "velocity", "momentum", "average")
_SCALARS = ("iteration", "learning_rate")
_OPTIONS = (  # that decide which variables there are
    "amsgrad, use_ema, gradient_accumulation_steps, master_weights, stochastic_rounding, a float or a "
    "schedule as learning rate"
)
_KEY = "layout"
_DIGEST = "sha256"  # not in what Keras, or an older version, saved


class Entry(NamedTuple):
    """What the layout says of one of the optimizer's variables."""

    what: str  # the slot or scalar that it is
    shape: tuple[int, ...]
    name: str
    start: int | None = None  # after how many updates it was added; None: it was there from the first

    @property
    def is_slot(self) -> bool:
        return self.what in _SLOTS


class SavedState(tf.train.experimental.PythonState):
    """Saving and restoring an optimizer, before or after its slots are made.

    As a part of `tf.train.Checkpoint`s it is the layout: written with them, compared when they are restored.
    """

    def __init__(self, optimizer: keras.optimizers.Optimizer) -> None:
        self._optimizer = optimizer
        self._layout: list[Entry] | None = None  # of a checkpoint, not compared yet
        self._arrays: dict[str, np.ndarray] | None = None  # of a Keras file, for slots not made yet
        self._slots_are_new = False
        # Of variables that the optimizer was not built on, but may be later: frozen layers.
        self._waiting: dict[Entry, np.ndarray] = {}
        # After how many updates a variable's slots were added, by its index; 0 for those that are missing.
        self.starts: dict[int, int] = {}
        self._traced: set[int] = set()  # the indices whose starts are in the graph of a function

    def start_of(self, index: int) -> int:
        """After how many updates the slots of a variable were added, for its bias corrections."""
        if not tf.executing_eagerly():
            self._traced.add(index)
        return self.starts.get(index, 0)

    def slots_were_made(self, first: int = 0) -> None:
        """Take over what was restored before; raise where it does not fit.

        Args:
            first: how many of the optimizer's variables there were already, where slots were added.
        """
        self._slots_are_new = not first
        self.finish()
        if first:
            self._take_waiting(first)

    def finish(self) -> None:
        """Raise a ValueError as long as what was restored does not fit the optimizer, which is built."""
        self._compare_layout()
        if self._slots_are_new:
            _check_restored(self._optimizer.variables, self._optimizer.name)
            self._slots_are_new = False
        if self._arrays is not None:
            with tf.init_scope():  # slots may be made, and so loaded, while a step is traced
                self._assign(self._arrays, slots_only=True)
            self._arrays = None

    # -- tf.train.Checkpoint ---------------------------------------------------------------------------------

    def serialize(self) -> str:
        return json.dumps(_describe(self._optimizer) if self._optimizer.built else [])

    def deserialize(self, string_value: bytes | str) -> None:
        self._layout = _entries(string_value)
        if self._optimizer.built:
            self._compare_layout()

    def _compare_layout(self) -> None:
        if self._layout:
            present = _describe(self._optimizer)
            places = _match(self._layout, present, self._optimizer.name)
            if places != list(range(len(self._layout))):  # TensorFlow goes by position
                raise ValueError(
                    f"The state saved for {self._optimizer.name} is of more variables or in another order: "
                    f"{_names(self._layout)}. Here: {_names(present)}. TensorFlow restores by position: "
                    "before, call `optimizer.build()` on the same variables in this order, frozen ones too. "
                    "What `model.save` and `model.save_weights` write goes by names"
                )
            self._set_starts(self._layout)
            self._layout, self._waiting = None, {}

    # -- Keras's files ---------------------------------------------------------------------------------------

    def save(self, store: Any) -> None:
        """Write the variables by position, as Keras does, and the layout with them.

        Arrays that wait for their slots are written as they were read.
        """
        variables = self._optimizer.variables
        entries = [*_describe(self._optimizer), *self._waiting]
        arrays = dict(self._arrays or {_KEY: np.frombuffer(json.dumps(entries).encode(), np.uint8)})
        values = [*(variable.numpy() for variable in variables), *self._waiting.values()]
        arrays |= {str(i): value for i, value in enumerate(values)}
        for key, array in (arrays | {_DIGEST: _digest(arrays)}).items():
            store[key] = array

    def load(self, store: Any) -> None:
        """Set the variables, now or, before the slots are made, when they are."""
        # Copies, which outlive the file: an h5 group, or one of Keras's own stores.
        arrays = {key: np.array(store[key]) for key in list(store.keys())}
        digest = arrays.pop(_DIGEST, None)
        if digest is not None and not np.array_equal(digest, _digest(arrays)):
            raise ValueError(
                f"The saved state of {self._optimizer.name} is damaged: its bytes are not those that were "
                "saved. Take another copy of the file. To start without the saved state, compile the model "
                "with a new optimizer after loading it (with load_model(..., compile=False))"
            )
        arrays = _without_loss_scale(arrays)
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
        self._arrays = arrays

    def _assign(self, arrays: Mapping[str, np.ndarray], slots_only: bool = False) -> None:
        variables = self._optimizer.variables
        present = _describe(self._optimizer)
        if not _has_slots(arrays):
            present = [entry for entry in present if entry.what in _SCALARS]
        if _KEY in arrays:
            saved = _entries(arrays[_KEY].tobytes())
        else:  # written by Keras: arrays only, whose shapes have to do
            shapes = [arrays[str(i)].shape for i in range(len(arrays))]
            fits = shapes == [entry.shape for entry in present]
            saved = present if fits else [Entry("an array", shape, "an array") for shape in shapes]
        places = _match(saved, present, self._optimizer.name)
        self._set_starts([saved[place] for place in places])
        for variable, place, entry in zip(variables, places, present, strict=False):
            if not (slots_only and entry.what in _SCALARS):
                variable.assign(arrays[str(place)])
        left = sorted({*range(len(saved))} - {*places})
        self._waiting = {saved[place]: arrays[str(place)] for place in left}

    def _take_waiting(self, first: int) -> None:
        """Give slots that were added the values that waited for them."""
        if not self._waiting:
            return
        present, before = _describe(self._optimizer), len(self._waiting)
        with tf.init_scope():
            for i in range(first, len(present)):
                waiting = list(self._waiting)
                place = _place(present[i], waiting)
                if place is not None:
                    present[i] = waiting[place]
                    self._optimizer.variables[i].assign(self._waiting.pop(waiting[place]))
        self._set_starts(present)
        if len(self._waiting) == before:
            warnings.warn(
                f"The saved state of {self._optimizer.name} that waits for its variables is of others than "
                f"these: {', '.join(entry.name for entry in present[first:][:5])}. It has "
                f"{', '.join(entry.name for entry in list(self._waiting)[:5])}",
                stacklevel=2,
            )

    def _set_starts(self, entries: Sequence[Entry]) -> None:
        """Take over the starts of what was restored: one entry for each of the optimizer's variables."""
        indices = slots.indices(self._optimizer)
        starts = {
            indices[id(variable)]: entry.start
            for variable, entry in zip(self._optimizer.variables, entries, strict=False)
            if id(variable) in indices and entry.start is not None
        }
        if any(starts.get(i, 0) != self.starts.get(i, 0) for i in self._traced):
            raise ValueError(
                f"In the saved state, {self._optimizer.name} took variables later than here, and a function "
                "with its step is traced already. Restore the state before the first step"
            )
        self.starts = starts


def _digest(arrays: Mapping[str, np.ndarray]) -> np.ndarray:
    digest = hashlib.sha256()
    for key in sorted(arrays):
        digest.update(f"{key} {arrays[key].shape} {arrays[key].dtype.str} ".encode())
        digest.update(np.ascontiguousarray(arrays[key]).tobytes())
    return np.frombuffer(digest.digest(), np.uint8)


def _has_slots(arrays: Mapping[str, np.ndarray]) -> bool:
    """False for an optimizer that was saved before its first step: iteration and learning rate only."""
    return len(arrays) - (_KEY in arrays) > 2


def _describe(optimizer: Any) -> list[Entry]:
    """One entry for each of the optimizer's variables, in order."""
    indices = slots.indices(optimizer) if optimizer.built else {}
    starts = optimizer._layout.starts
    return [
        Entry(
            next((slot for slot in _SLOTS if v.name.endswith("_" + slot)), v.name),
            tuple(v.shape),
            v.name,
            starts.get(indices.get(id(v), -1)),
        )
        for v in optimizer.variables
    ]


def _match(saved: Sequence[Entry], present: Sequence[Entry], name: str) -> list[int]:
    """For each of the optimizer's variables, the place of its value among those that were saved.

    They go by position where slots, shapes and order are the same, whatever the names: those of layers and
    models may have other numbers. Otherwise, where some layers are frozen or slots were added, they go by
    names. What is left over may only be the slots of other variables.

    Raises:
        ValueError: that names the first differences, if there are any.
    """
    names, here = _names(saved), _names(present)
    alike = [(entry[:2], entry.start) for entry in saved] == [(entry[:2], entry.start) for entry in present]
    if alike and (names == here or sorted(names) != sorted(here)):
        return list(range(len(saved)))
    places = [_place(entry, saved) for entry in present]
    found = [place for place in places if place is not None]
    left = [saved[i] for i in {*range(len(saved))} - {*found}]
    if len(found) == len({*found}) == len(present) and _are_of_other_variables(left, present):
        # A name with a number may stand for another layer in another program.
        distinct = len({_without_numbers(one) for one in here}) == len(here)
        added = any(entry.start is not None for entry in (*saved, *present))
        if distinct or added or _in_order(found, present):
            return found
        raise ValueError(f"The state saved for {name} is in another order: {names}. Here: {here}")
    lines = [
        f"  {i}: saved {_show(saved, i)}, this optimizer has {_show(present, i)}"
        for i in range(max(len(saved), len(present)))
        if i >= len(saved) or i >= len(present) or saved[i][:2] != present[i][:2]
    ] or [
        f"  {one} was saved, {other} is here" for one, other in zip(names, here, strict=True) if one != other
    ]
    more = f"\n  and {len(lines) - 5} more" if len(lines) > 5 else ""
    raise ValueError(
        f"The saved state does not belong to {name}: it has {len(saved)} variables, this optimizer has "
        f"{len(present)}.\n" + "\n".join(lines[:5]) + more + f"\nMake the optimizer with the options it "
        f"was saved with ({_OPTIONS}) and on the same model, with the same names of layers. To start without "
        "the saved state, compile the model with a new optimizer after loading it (with load_model(..., "
        "compile=False)) or its weights."
    )


def _place(entry: Entry, saved: Sequence[Entry]) -> int | None:
    """The place of the one saved entry that is this slot or scalar; None where there is none, or several.

    It has the same name; or one ends as the other, since a Sequential model's name begins the paths of its
    variables, but not after the model was loaded; or the names have other numbers.
    """
    alike = [i for i, other in enumerate(saved) if other[:2] == entry[:2]]
    for same in (str.__eq__, _ends_alike, _alike_but_for_numbers):
        found = [i for i in alike if same(saved[i].name, entry.name)]
        if found:
            return found[0] if len(found) == 1 else None
    return None


def _ends_alike(one: str, other: str) -> bool:
    return one.endswith(f"_{other}") or other.endswith(f"_{one}")


def _alike_but_for_numbers(one: str, other: str) -> bool:
    return _without_numbers(one) == _without_numbers(other)


def _without_numbers(name: str) -> str:
    """A name without the numbers that Keras gives layers and models: dense_1_kernel_momentum."""
    return re.sub(r"_\d+(?=_)", "", name)


def _in_order(places: Sequence[int], present: Sequence[Entry]) -> bool:
    """Whether the slots of each kind are in the order in which they were saved."""
    kinds: dict[str, list[int]] = {}
    for place, entry in zip(places, present, strict=True):
        kinds.setdefault(entry.what, []).append(place)
    return all(own == sorted(own) for own in kinds.values())


def _are_of_other_variables(left: Sequence[Entry], present: Sequence[Entry]) -> bool:
    """Whether these entries are all the slots of some variables, and not an option that is not here.

    Master weights are an option, but only variables of half types have them.
    """
    kinds = {entry.what for entry in present if entry.is_slot}
    found: dict[str, set[str]] = {}
    for entry in left:
        found.setdefault(entry.name.removesuffix("_" + entry.what), set()).add(entry.what)
    return all(slots ^ kinds <= {"master_weight"} & kinds for slots in found.values())


def _without_loss_scale(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Of what a LossScaleOptimizer saved, the state of the optimizer in it: all but its own four scalars."""
    first = [arrays[str(i)] for i in range(min(len(arrays), 5)) if str(i) in arrays]
    # Its iteration, learning rate, step counter and scale; the other one's iteration.
    if [array.dtype.kind for array in first] != list("ififi") or any(array.shape for array in first):
        return arrays
    return {str(i): arrays[str(i + 4)] for i in range(len(arrays) - 4)}


def _names(entries: Sequence[Entry]) -> list[str]:
    return [entry.name for entry in entries]


def _show(entries: Sequence[Entry], i: int) -> str:
    if i >= len(entries):
        return "nothing"
    entry = entries[i]
    return f"{entry.what} {entry.shape}" + (f" ({entry.name})" if entry.name != entry.what else "")


def _check_restored(variables: Sequence[Any], name: str) -> None:
    """Raise if a `tf.train.Checkpoint` has set some of the variables and not the others.

    Those that Keras wrote have no layout, and TensorFlow fills variables that are made after restoring
    without comparing shapes. `_update_uid` is its own mark of a variable that was restored.
    """
    restored = [getattr(variable, "_update_uid", -1) >= 0 for variable in variables]
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
            f"({_OPTIONS}) and on the same model."
        )


def _entries(text: bytes | str) -> list[Entry]:
    return [Entry(what, tuple(shape), name, *start) for what, shape, name, *start in json.loads(text)]
