"""Which variables a saved state has, and which of them belongs to which variable of an optimizer.

Keras and TensorFlow save the variables of an optimizer by position. Without a layout, state that was saved
with other options (one more average, no learning rate variable) would be mixed up or left at zero silently.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

SLOTS = ("gradient_accumulator", "master_weight", "velocity_hat", "velocity", "momentum", "average")
MOMENTS = ("momentum", "velocity")  # the slots that every optimizer has
ZEROS = (*MOMENTS, "velocity_hat", "gradient_accumulator")  # the slots that begin at zero
SCALARS = ("iteration", "learning_rate")
OPTIONS = (  # that decide which variables exist
    "amsgrad, use_ema, gradient_accumulation_steps, master_weights, stochastic_rounding, a float or a "
    "schedule as learning rate"
)


class Entry(NamedTuple):
    """What the layout says of one variable of an optimizer."""

    kind: str  # the name of the slot or scalar
    shape: tuple[int, ...]
    name: str
    added_at: int | None = None  # the number of updates before; None: it was there from the first
    excluded_from: tuple[str, ...] | None = ()  # arguments that exclude its variable; None: not known
    had_dense: bool = False  # whether the sum of its gradients, which wait for the update, has a dense one

    @property
    def variable(self) -> str:
        """The name of the variable that a slot belongs to."""
        return self.name.removesuffix(f"_{self.kind}")


class Layout(NamedTuple):
    """What is saved with the values: an entry per variable, and the patterns of each argument."""

    entries: list[Entry]
    patterns: dict[str, list[str]]

    def to_json(self) -> str:
        """The text that is saved."""
        return json.dumps({"variables": self.entries, "patterns": self.patterns})

    @classmethod
    def from_json(cls, text: bytes | str) -> Layout:
        """The layout in a text that was saved. An older version saved the entries alone."""
        saved = json.loads(text)
        if isinstance(saved, list):
            saved = {"variables": saved, "patterns": {}}
        return cls([_read_entry(*fields) for fields in saved["variables"]], saved["patterns"])


def _read_entry(
    kind: str,
    shape: list[int],
    name: str,
    added_at: int | None = None,
    excluded_from: list[str] | None = None,
    had_dense: bool = False,
) -> Entry:
    excluded = None if excluded_from is None else tuple(excluded_from)
    return Entry(kind, tuple(shape), name, added_at, excluded, had_dense)


def kind_of(name: str) -> str:
    """The kind of the optimizer's variable of this name: "dense_kernel_momentum" is a "momentum"."""
    return next((slot for slot in SLOTS if name.endswith(f"_{slot}")), name)


def match(saved: Sequence[Entry], present: Sequence[Entry], optimizer: str) -> list[int]:
    """For each present variable, the place of its value among those that were saved.

    1. By name, where each stands for one saved variable: layers may be frozen, added or in another order.
       The state of other variables may be left over.
    2. By position, where slots, shapes and order are the same: Keras numbers layers and models.

    Raises:
        ValueError: that names the first differences, where neither fits.
    """
    positions = list(range(len(saved)))
    if saved == present:
        return positions
    places = [find(entry, saved) for entry in present]
    found = [place for place in places if place is not None]
    left = [saved[place] for place in {*positions} - {*found}]
    is_by_name = len(found) == len({*found}) == len(present) and _are_other_variables(left, present)
    if _is_same_order(saved, present) and (not is_by_name or found == positions):
        return positions
    if not is_by_name:
        raise ValueError(_describe_difference(saved, present, optimizer))
    if not _are_names_sure(found, saved, present):
        raise ValueError(
            f"The state saved for {optimizer} is in another order: {names(saved)}. Here: {names(present)}"
        )
    return found


def match_some(saved: Sequence[Entry], present: Sequence[Entry]) -> list[int | None]:
    """For each present variable the place of its value among those that were saved; None where none fits.

    By position where the kinds and names are the same but for Keras's numbers; otherwise by name. The slots
    of a variable whose moments are not there are all left out.
    """
    places: list[int | None] = [find(entry, saved) for entry in present]
    if _kinds_and_names(saved) == _kinds_and_names(present):
        pairs = enumerate(zip(saved, present, strict=True))
        places = [i if one.shape == other.shape else None for i, (one, other) in pairs]
    doubles = {place for place in places if places.count(place) > 1}
    places = [None if place in doubles else place for place in places]
    without = {
        entry.variable
        for entry, place in zip(present, places, strict=True)
        if place is None and entry.kind in MOMENTS
    }
    return [
        None if entry.kind in SLOTS and entry.variable in without else place
        for entry, place in zip(present, places, strict=True)
    ]


def begin_anew(
    saved: Sequence[Entry], places: Sequence[int | None], present: Sequence[Entry], updates: int
) -> list[Entry | None]:
    """Per present variable its saved entry. One whose moments are not there is added after these updates.

    Args:
        saved: the saved entries.
        places: those of the present variables among them; None where there is none.
        present: the present entries.
        updates: how many there were when the state was saved.
    """
    return [
        saved[place]
        if place is not None
        else entry._replace(added_at=updates or None, excluded_from=None)
        if entry.kind in MOMENTS
        else None
        for place, entry in zip(places, present, strict=True)
    ]


def check_positions(saved: Sequence[Entry], present: Sequence[Entry], optimizer: str) -> None:
    """Raise a ValueError where a `tf.train.Checkpoint`, which goes by position, does not fit."""
    if match(saved, present, optimizer) != list(range(len(saved))):
        raise ValueError(
            f"The state saved for {optimizer} is of more variables or in another order: "
            f"{names(saved)}. Here: {names(present)}. TensorFlow restores by position: "
            "before, call `optimizer.build()` on the same variables in this order, frozen ones too. "
            "What `model.save` and `model.save_weights` write goes by names"
        )


def find(entry: Entry, saved: Sequence[Entry]) -> int | None:
    """The place of the one saved entry of the same kind, shape and name; None for none or several.

    Where no name is the same, one may lack the name of a model in front, which begins the paths of a
    Sequential until it is loaded; otherwise Keras's numbers may differ.
    """
    for is_same in (_are_equal, _is_one_the_end, _differ_in_numbers):
        places = [
            place
            for place, other in enumerate(saved)
            if other.shape == entry.shape and other.kind == entry.kind and is_same(other.name, entry.name)
        ]
        if places:
            return places[0] if len(places) == 1 else None
    return None


def names(entries: Iterable[Entry]) -> list[str]:
    """Their names, in order."""
    return [entry.name for entry in entries]


def list_names(entries: Iterable[Entry]) -> str:
    """The first names, for messages."""
    found = names(entries)
    return ", ".join(found[:5]) + (f" and {len(found) - 5} more" if len(found) > 5 else "")


def _are_equal(one: str, other: str) -> bool:
    return one == other


def _is_one_the_end(one: str, other: str) -> bool:
    return one.endswith(f"_{other}") or other.endswith(f"_{one}")


def _differ_in_numbers(one: str, other: str) -> bool:
    return _drop_numbers(one) == _drop_numbers(other)


def _drop_numbers(name: str) -> str:
    """A name without the numbers that Keras gives layers and models: "dense_1_kernel" is "dense_kernel"."""
    return re.sub(r"_\d+(?=_)", "", name)


def _kinds_and_names(entries: Iterable[Entry]) -> list[tuple[str, str]]:
    return [(entry.kind, _drop_numbers(entry.name)) for entry in entries]


def _is_same_order(saved: Sequence[Entry], present: Sequence[Entry]) -> bool:
    """Whether all but the names is the same, and the names are not the same in another order."""
    if [entry[:2] + entry[3:4] for entry in saved] != [entry[:2] + entry[3:4] for entry in present]:
        return False
    before, now = ([_drop_numbers(entry.name) for entry in entries] for entries in (saved, present))
    return before == now or sorted(before) != sorted(now)


def _are_other_variables(left: Iterable[Entry], present: Iterable[Entry]) -> bool:
    """Whether these entries are all the slots of some variables, and not those of an option that is off.

    Master weights are an option, but only half-precision variables have them.
    """
    kinds = {entry.kind for entry in present if entry.kind in SLOTS}
    by_variable: dict[str, set[str]] = {}
    for entry in left:
        by_variable.setdefault(entry.variable, set()).add(entry.kind)
    return all(slots ^ kinds <= {"master_weight"} & kinds for slots in by_variable.values())


def _are_names_sure(places: Sequence[int], saved: Sequence[Entry], present: Sequence[Entry]) -> bool:
    """Whether the names stand for the same layers: "dense_1" may be the "dense" of another program.

    They do where they differ in more than their numbers, where variables were added, so that their order has
    to differ, or where the slots of each kind are in the order in which they were saved.
    """
    if len({_drop_numbers(entry.name) for entry in present}) == len(present):
        return True
    if any(entry.added_at is not None for entry in (*saved, *present)):
        return True
    kinds: dict[str, list[int]] = {}
    for place, entry in zip(places, present, strict=True):
        kinds.setdefault(entry.kind, []).append(place)
    return all(own == sorted(own) for own in kinds.values())


def _describe_difference(saved: Sequence[Entry], present: Sequence[Entry], optimizer: str) -> str:
    lines = [
        f"  {i}: saved {_show(saved, i)}, this optimizer has {_show(present, i)}"
        for i in range(max(len(saved), len(present)))
        if i >= len(saved) or i >= len(present) or saved[i][:2] != present[i][:2]
    ] or [
        f"  {one} was saved, {other} is here"
        for one, other in zip(names(saved), names(present), strict=True)
        if one != other
    ]
    more = f"\n  and {len(lines) - 5} more" if len(lines) > 5 else ""
    return (
        f"The saved state does not belong to {optimizer}: it has {len(saved)} variables, this optimizer has "
        f"{len(present)}.\n" + "\n".join(lines[:5]) + more + f"\nMake the optimizer with the options it "
        f"was saved with ({OPTIONS}) and on the same model, with the same names of layers. To start without "
        "the saved state, compile the model with a new optimizer after loading it (with load_model(..., "
        "compile=False)) or its weights."
    )


def _show(entries: Sequence[Entry], i: int) -> str:
    if i >= len(entries):
        return "nothing"
    entry = entries[i]
    return f"{entry.kind} {entry.shape}" + (f" ({entry.name})" if entry.name != entry.kind else "")
