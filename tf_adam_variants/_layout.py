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
        "optimizer after loading its weights."
    )


def _show(entries: Sequence[Entry], i: int) -> str:
    if i >= len(entries):
        return "nothing"
    what, shape, name = entries[i]
    return f"{what} {shape}" + (f" ({name})" if name != what else "")


def save(store: Any, variables: Sequence[Any]) -> None:
    """Write the variables by position, as Keras does, and the layout beside them."""
    for i, variable in enumerate(variables):
        store[str(i)] = variable.numpy()
    store[_KEY] = np.frombuffer(json.dumps(describe(variables)).encode(), np.uint8)


def read(store: Any) -> dict[str, np.ndarray]:
    """A copy of a store, ours or a Keras optimizer's, that outlives its file."""
    keys = list(store.keys())  # an h5 group, or one of Keras's own stores
    return {key: np.array(store[key]) for key in keys}


def load(arrays: Mapping[str, np.ndarray], variables: Sequence[Any], name: str) -> None:
    """Set the variables from what `read` gave, if it belongs to them."""
    present = describe(variables)
    if _KEY in arrays:
        saved = _entries(arrays[_KEY].tobytes())
    else:  # written by Keras: arrays only
        kinds = [what for what, _, _ in present] + ["an array"] * len(arrays)
        saved = [(kinds[i], arrays[str(i)].shape, kinds[i]) for i in range(len(arrays))]
    compare(saved, present, name)
    for i, variable in enumerate(variables):
        variable.assign(arrays[str(i)])


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
