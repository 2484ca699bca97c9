"""The optimizers of a model, also those of a `train_step` of its own, and what they were built on."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import keras
from keras.optimizers import Optimizer

from tf_adam_variants.utils import internals
from tf_adam_variants.utils.variables import path_of, paths_of

Builds = list[list[int]] | None  # calls of `build`, by places among the model's variables; None: not built


def find(model: keras.Model, everywhere: bool = True) -> list[Optimizer]:
    """The model's optimizer first; then those that are attributes of it, as for a `train_step` of its own.

    Args:
        everywhere: also those of its layers, and those in containers within containers.
    """
    owners = internals.layers_of(model) if everywhere else [model]
    depth = 9 if everywhere else 1  # a container may contain itself
    values = [model.optimizer, *(value for owner in owners for value in vars(owner).values())]
    found = (one for value in values for one in _optimizers_in(value, depth))
    return list({id(one): one for one in found}.values())


def _optimizers_in(value: Any, depth: int) -> Iterator[Optimizer]:
    if isinstance(value, Optimizer):
        yield value
    elif isinstance(value, (dict, list, tuple)) and depth:
        for one in value.values() if isinstance(value, dict) else value:
            yield from _optimizers_in(one, depth - 1)


def names(optimizers: Iterable[Optimizer]) -> list[str]:
    """Their classes."""
    return [f"{cls.__module__.partition('.')[0]}.{cls.__name__}" for cls in map(type, optimizers)]


def layouts(optimizers: Iterable[Optimizer]) -> list[Any]:
    """What those of this package know of their slots besides the values: when each was added."""
    return [one._layout for one in map(_innermost, optimizers) if hasattr(one, "_layout")]


def find_builds(model: keras.Model, optimizers: Iterable[Optimizer]) -> list[Builds]:
    """On what each was built. The first step does it, where a `train_step` takes an optimizer for a part.

    Raises:
        ValueError: for a variable that is none of the model's.
    """
    return [_find_builds(model, one) if one.built else None for one in optimizers]


def _find_builds(model: keras.Model, optimizer: Optimizer) -> Builds:
    inner = _innermost(optimizer)
    places = {internals.key_of(inner, variable): place for place, variable in enumerate(model.variables)}
    found = []
    for variable in internals.variables_of(inner):
        place = places.get(internals.key_of(inner, variable))
        if place is None:
            raise ValueError(
                f"AtomicBackupAndRestore cannot restore the training of {path_of(variable)} by "
                f"{optimizer.name}: {model.name} has no such variable. Make its layer an attribute of the "
                "model; without a layer, make it a keras.Variable that is an attribute"
            )
        found.append(place)
    # A later call adds its slots after those of the first.
    call_of = inner._added_at.call_of if hasattr(inner, "_added_at") else lambda index: 0
    runs = itertools.groupby(range(len(found)), call_of)
    return [[found[index] for index in indices] for _, indices in runs]


def build(model: keras.Model, optimizers: Sequence[Optimizer], builds: Iterable[Builds]) -> None:
    """Build those that are not built yet as others were, which `find_builds` saw."""
    variables = model.variables
    pairs = zip(optimizers, builds, strict=True)
    # A LossScaleOptimizer first: it builds the one in it, which may be an attribute too.
    for optimizer, calls in sorted(pairs, key=lambda pair: pair[0] is _innermost(pair[0])):
        if calls and not optimizer.built:
            with model.distribute_strategy.scope():
                for number, places in enumerate(calls):
                    target = _innermost(optimizer) if number else optimizer
                    target.build([variables[place] for place in places])


def check_same_builds(
    model: keras.Model, optimizers: Sequence[Optimizer], builds: Iterable[Builds], source: Any
) -> None:
    """Raise a ValueError for an optimizer that was built on other variables than in the backup.

    In another order, slots of equal names and shapes would be taken for one another.
    """
    for optimizer, calls, present in zip(optimizers, builds, find_builds(model, optimizers), strict=True):
        before, here = ([place for call in one or [] for place in call] for one in (calls, present))
        if before != here:
            raise ValueError(
                f"In the backup {source}, {optimizer.name} was built on {_show(model, before)}. Here: "
                f"{_show(model, here)}. Build it as before, or not at all: then the callback does"
            )


def _show(model: keras.Model, places: Iterable[int]) -> str:
    return paths_of(model.variables[place] for place in places) or "nothing"


def _innermost(optimizer: Optimizer) -> Optimizer:
    """The one that a LossScaleOptimizer wraps."""
    while hasattr(optimizer, "inner_optimizer"):
        optimizer = optimizer.inner_optimizer
    return optimizer
