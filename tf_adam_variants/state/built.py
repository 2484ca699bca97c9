"""What `build` makes and fixes: its layout, before and after, and that of a saved state taken over."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from tf_adam_variants.state import layout
from tf_adam_variants.state.layout import Entry, Layout
from tf_adam_variants.utils.variables import is_half, path_of

# The attributes with a list of slots, one per variable. The first two are those of Keras.
_SLOT_LISTS = (
    *("_model_variables_moving_average", "_accumulated_gradients"),
    *("_momentums", "_velocities", "_velocity_hats", "_master_weights"),
)


def describe(optimizer: Any) -> Layout:
    """The layout of an optimizer: one entry per variable, in order."""
    indices, added_at = _slot_indices(optimizer), optimizer._added_at.values()
    dense = optimizer._dense_sums.values()

    def entry(variable: Any) -> Entry:
        index = indices.get(id(variable), -1)
        excluded_from = tuple(one.argument for one in optimizer._exclusions if index in one.indices)
        shape, kind = tuple(variable.shape), layout.kind_of(variable.name)
        return Entry(kind, shape, variable.name, added_at.get(index), excluded_from, index in dense)

    patterns = {one.argument: one.patterns_in_use for one in optimizer._exclusions}
    return Layout([entry(variable) for variable in optimizer.variables], patterns)


def foresee(optimizer: Any, variables: Iterable[Any]) -> list[Entry]:
    """The entries of an optimizer that is not built, once it is built on these variables."""
    variables = list(variables)
    with_slots = [v for v in variables if not getattr(v, "overwrite_with_gradient", False)]
    slots = [("average", v) for v in with_slots if optimizer.use_ema]
    slots += [("gradient_accumulator", v) for v in variables if optimizer.gradient_accumulation_steps]
    slots += [(kind, v) for v in with_slots for kind in ("momentum", "velocity")]
    slots += [("velocity_hat", v) for v in with_slots if optimizer.amsgrad]
    slots += [("master_weight", v) for v in with_slots if optimizer.master_weights and is_half(v)]
    entries = [
        Entry(kind, tuple(v.shape), f"{path_of(v).replace('/', '_')}_{kind}", None, None) for kind, v in slots
    ]
    seed = [Entry("rounding_seed", (), "rounding_seed")] if optimizer.stochastic_rounding else []
    return describe(optimizer).entries + entries + seed


def _slot_indices(optimizer: Any) -> dict[int, int]:
    """The index of the variable that a slot belongs to, by the slot's id."""
    lists = [getattr(optimizer, name, ()) for name in _SLOT_LISTS] if optimizer.built else []
    return {id(slot): i for slots in lists for i, slot in enumerate(slots) if slot is not None}


def restore(optimizer: Any, saved: Sequence[Entry | None], patterns: Mapping[str, list[str]]) -> None:
    """Take over what is known of each variable: when it was added, what excludes it, its dense gradients.

    Args:
        optimizer: an optimizer that is built.
        saved: the restored entries, at first one per variable of the optimizer; None for no news.
        patterns: the restored patterns of each argument.
    """
    indices = _slot_indices(optimizer)
    entries = {
        indices[id(variable)]: entry
        for variable, entry in zip(optimizer.variables, saved, strict=False)
        if id(variable) in indices and entry is not None
    }
    optimizer._added_at.restore(
        {i: entry.added_at for i, entry in entries.items() if entry.added_at is not None}
    )
    optimizer._dense_sums.restore({i: entry.had_dense for i, entry in entries.items()})
    for exclusions in optimizer._exclusions:
        name = exclusions.argument
        changed = [
            index
            for index, entry in entries.items()
            if entry.excluded_from is not None
            and (name in entry.excluded_from) != (index in exclusions.indices)
        ]
        if patterns.get(name) == exclusions.patterns_in_use:
            optimizer._added_at.check_not_traced(changed, f"`{name}` excluded other variables")
            exclusions.restore(changed)
        elif name in patterns:
            exclusions.warn_changed(patterns[name], changed, optimizer._trainable_variables)
