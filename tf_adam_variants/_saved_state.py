"""An optimizer's saved state with its layout, so that state saved by a different optimizer is refused.

Keras saves an optimizer's variables by position and TensorFlow's checkpoints match them by position
too: without the layout, state saved with other options (an average more, no learning rate variable) would be
mixed up or left at zero silently. Nor do Keras's files notice when their bytes change: a digest does.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

_SLOTS = ("gradient_accumulator", "velocity_hat", "velocity", "momentum", "average")
_SCALARS = ("iteration", "learning_rate")
_KEY = "layout"
_DIGEST = "sha256"  # not in what Keras, or an older version, saved

Entry = tuple[str, tuple[int, ...], str]  # what it is, its shape, the variable's own name


class SavedState(tf.train.experimental.PythonState):
    """Saving and restoring an optimizer, before or after its slots are made.

    As a part of `tf.train.Checkpoint`s it is the layout: written with them, compared when they are restored.
    """

    def __init__(self, optimizer: keras.optimizers.Optimizer) -> None:
        self._optimizer = optimizer
        self._layout: list[Entry] | None = None  # of a checkpoint, not compared yet
        self._arrays: dict[str, np.ndarray] | None = None  # of a Keras file, for slots not made yet
        self._slots_are_new = False

    def slots_were_made(self) -> None:
        """Take over what was restored before; raise where it does not fit."""
        self._slots_are_new = True
        self.finish()

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
        return json.dumps(_describe(self._optimizer.variables) if self._optimizer.built else [])

    def deserialize(self, string_value: bytes | str) -> None:
        self._layout = _entries(string_value)
        if self._optimizer.built:
            self._compare_layout()

    def _compare_layout(self) -> None:
        if self._layout:
            _compare(self._layout, _describe(self._optimizer.variables), self._optimizer.name)
            self._layout = None

    # -- Keras's files ---------------------------------------------------------------------------------------

    def save(self, store: Any) -> None:
        """Write the variables by position, as Keras does, and the layout with them.

        Arrays that wait for their slots are written as they were read.
        """
        variables = self._optimizer.variables
        layout = np.frombuffer(json.dumps(_describe(variables)).encode(), np.uint8)
        arrays = dict(self._arrays or {_KEY: layout})
        arrays |= {str(i): variable.numpy() for i, variable in enumerate(variables)}
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
        if self._optimizer.built or not _has_slots(arrays):
            self._assign(arrays)
            return
        for i, variable in enumerate(self._optimizer.variables):
            if arrays[str(i)].shape == ():  # iteration, and learning rate unless it is a schedule
                variable.assign(arrays[str(i)])
        self._arrays = arrays

    def _assign(self, arrays: Mapping[str, np.ndarray], slots_only: bool = False) -> None:
        variables = self._optimizer.variables
        present = _describe(variables)
        if not _has_slots(arrays):
            present = [entry for entry in present if entry[0] in _SCALARS]
        if _KEY in arrays:
            saved = _entries(arrays[_KEY].tobytes())
        else:  # written by Keras: arrays only, whose shapes have to do
            shapes = [arrays[str(i)].shape for i in range(len(arrays))]
            fits = shapes == [shape for _, shape, _ in present]
            saved = present if fits else [("an array", shape, "an array") for shape in shapes]
        _compare(saved, present, self._optimizer.name)
        for i, (what, _, _) in enumerate(present):
            if not (slots_only and what in _SCALARS):
                variables[i].assign(arrays[str(i)])


def _digest(arrays: Mapping[str, np.ndarray]) -> np.ndarray:
    digest = hashlib.sha256()
    for key in sorted(arrays):
        digest.update(f"{key} {arrays[key].shape} ".encode())
        digest.update(np.ascontiguousarray(arrays[key]).tobytes())
    return np.frombuffer(digest.digest(), np.uint8)


def _has_slots(arrays: Mapping[str, np.ndarray]) -> bool:
    """False for an optimizer that was saved before its first step: iteration and learning rate only."""
    return len(arrays) - (_KEY in arrays) > 2


def _describe(variables: Sequence[Any]) -> list[Entry]:
    """One entry for each of the optimizer's variables, in order."""
    return [
        (
            next((slot for slot in _SLOTS if v.name.endswith("_" + slot)), v.name),
            tuple(v.shape),
            v.name,
        )
        for v in variables
    ]


def _compare(saved: Sequence[Entry], present: Sequence[Entry], name: str) -> None:
    """Raise a ValueError that names the first differences, if there are any."""
    if [entry[:2] for entry in saved] == [entry[:2] for entry in present]:
        names, here = [entry[2] for entry in saved], [entry[2] for entry in present]
        if names != here and sorted(names) == sorted(here):
            raise ValueError(f"The state saved for {name} is in another order: {names}. Here: {here}")
        return
    lines = [
        f"  {i}: saved {_show(saved, i)}, this optimizer has {_show(present, i)}"
        for i in range(max(len(saved), len(present)))
        if i >= len(saved) or i >= len(present) or saved[i][:2] != present[i][:2]
    ]
    more = f"\n  and {len(lines) - 5} more" if len(lines) > 5 else ""
    raise ValueError(
        f"The saved state does not belong to {name}: it has {len(saved)} variables, this optimizer has "
        f"{len(present)}.\n" + "\n".join(lines[:5]) + more + "\nMake the optimizer with the options it "
        "was saved with (amsgrad, use_ema, gradient_accumulation_steps, a float or a schedule as learning "
        "rate) and on the same model. To start without the saved state, compile the model with a new "
        "optimizer after loading it (with load_model(..., compile=False)) or its weights. Under "
        "mixed_float16 Keras wraps optimizers in a LossScaleOptimizer, which saves 4 variables more."
    )


def _show(entries: Sequence[Entry], i: int) -> str:
    if i >= len(entries):
        return "nothing"
    what, shape, name = entries[i]
    return f"{what} {shape}" + (f" ({name})" if name != what else "")


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
            f"{', '.join(wrong[:5])}{more}. Make the optimizer with the options it was saved with (amsgrad, "
            "use_ema, gradient_accumulation_steps, a float or a schedule as learning rate) and on the same "
            "model."
        )


def _entries(text: bytes | str) -> list[Entry]:
    return [(what, tuple(shape), name) for what, shape, name in json.loads(text)]
