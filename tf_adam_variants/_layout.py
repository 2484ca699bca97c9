"""What an optimizer's saved state consists of, so that state saved by a different one is refused.

Keras saves an optimizer's variables by position and TensorFlow's checkpoints match them by position
too: without this, state saved with other options (an average more, no learning rate variable) would be
mixed up or left at zero without a word.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

_SLOTS = ("gradient_accumulator", "velocity_hat", "velocity", "momentum", "average")
_SCALARS = ("iteration", "learning_rate")
_KEY = "layout"

Entry = tuple[str, tuple[int, ...], str]  # what it is, its shape, the variable's own name


def describe(variables: Sequence[Any]) -> list[Entry]:
    """One entry for each of the optimizer's variables, in order."""
    return [
        (
            next((slot for slot in _SLOTS if v.name.endswith("_" + slot)), v.name),
            tuple(v.shape),
            v.name,
        )
        for v in variables
    ]


def compare(saved: Sequence[Entry], present: Sequence[Entry], name: str) -> None:
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


def save(store: Any, variables: Sequence[Any], waiting: Mapping[str, np.ndarray] | None) -> None:
    """Write the variables by position, as Keras does, and the layout beside them.

    Slots that wait to be built are written as they were read.
    """
    layout = np.frombuffer(json.dumps(describe(variables)).encode(), np.uint8)
    arrays = dict(waiting or {_KEY: layout})
    arrays |= {str(i): variable.numpy() for i, variable in enumerate(variables)}
    for key, array in arrays.items():
        store[key] = array


def read(store: Any) -> dict[str, np.ndarray]:
    """A copy of a store, ours or a Keras optimizer's, that outlives its file."""
    keys = list(store.keys())  # an h5 group, or one of Keras's own stores
    return {key: np.array(store[key]) for key in keys}


def has_slots(arrays: Mapping[str, np.ndarray]) -> bool:
    """False for an optimizer that was saved before its first step: iteration and learning rate only."""
    return len(arrays) - (_KEY in arrays) > 2


def load_scalars(arrays: Mapping[str, np.ndarray], variables: Sequence[Any]) -> None:
    """Set iteration and learning rate; the variables are those of an optimizer that is not built."""
    for i, variable in enumerate(variables):
        if arrays[str(i)].shape == ():
            variable.assign(arrays[str(i)])


def load(
    arrays: Mapping[str, np.ndarray], variables: Sequence[Any], name: str, slots_only: bool = False
) -> None:
    """Set the variables from what `read` gave, if it belongs to them."""
    present = describe(variables)
    if not has_slots(arrays):
        present = [entry for entry in present if entry[0] in _SCALARS]
    if _KEY in arrays:
        saved = _entries(arrays[_KEY].tobytes())
    else:  # written by Keras: arrays only, whose shapes have to do
        shapes = [arrays[str(i)].shape for i in range(len(arrays))]
        fits = shapes == [shape for _, shape, _ in present]
        saved = present if fits else [("an array", shape, "an array") for shape in shapes]
    compare(saved, present, name)
    for i, (what, _, _) in enumerate(present):
        if not (slots_only and what in _SCALARS):
            variables[i].assign(arrays[str(i)])


def check_restored(variables: Sequence[Any], name: str) -> None:
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


class Layout(tf.train.experimental.PythonState):
    """The layout as a part of `tf.train.Checkpoint`s: written with them, compared when restored."""

    def __init__(self, variables: Callable[[], Sequence[Any] | None], name: str) -> None:
        self._variables, self._name = variables, name
        self._saved: list[Entry] | None = None

    def serialize(self) -> str:
        return json.dumps(describe(self._variables() or ()))

    def deserialize(self, string_value: bytes | str) -> None:
        self._saved = _entries(string_value)
        self.check()

    def check(self) -> None:
        """Compare what was restored, as soon as there is something to compare it with."""
        variables = self._variables()
        if self._saved and variables is not None:
            compare(self._saved, describe(variables), self._name)
            self._saved = None
