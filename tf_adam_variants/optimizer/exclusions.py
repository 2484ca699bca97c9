"""Variables that a list of regular expressions excludes, by their paths."""

from __future__ import annotations

import copy
import re
import sys
import warnings
from collections.abc import Iterable
from typing import Any

from tf_adam_variants.utils import checks
from tf_adam_variants.utils.variables import path_of, paths_of, tf_variable


class Exclusions:
    """The patterns of one argument, and those that Keras's method adds to them."""

    def __init__(self, argument: str, patterns: list[str] | None) -> None:
        self._argument, self._given = argument, patterns
        self._added: list[str] = []
        self._listed: dict[str, list[Any]] = {}  # the method's variables, by the pattern of their path

    def add(self, variables: Iterable[Any] | None, patterns: Iterable[str] | None) -> None:
        """Exclude these as well; they replace those of an earlier call."""
        names = checks.check_patterns("var_names", patterns) or []
        listed: dict[str, list[Any]] = {}
        for variable in variables or ():
            # A Sequential model's name begins the paths of its variables, but not after the model was loaded.
            first, _, rest = path_of(variable).partition("/")
            own = f"({re.escape(first)}/)?{re.escape(rest)}" if "/" in rest else re.escape(path_of(variable))
            pattern = f"^{own}$"
            listed.setdefault(pattern, []).append(tf_variable(variable))
        self._added, self._listed = names, listed

    def would_change(
        self, variables: Iterable[Any] | None, patterns: Iterable[str] | None, among: list[Any]
    ) -> bool:
        """Whether `add` changes which of these variables are excluded, or has a pattern that matches none."""
        other = copy.copy(self)
        other.add(variables, patterns)
        before, after = (
            {pattern: one._matches(pattern, among) for pattern in one.patterns or ()} for one in (self, other)
        )
        unmatched = any(not after[pattern] for pattern in after.keys() - before.keys())
        return unmatched or set().union(*before.values()) != set().union(*after.values())

    @property
    def patterns(self) -> list[str] | None:
        """All patterns; None where none were ever given."""
        if self._given is None and not self._added and not self._listed:
            return None
        return list(dict.fromkeys([*(self._given or ()), *self._added, *self._listed]))

    def _matches(self, pattern: str, variables: list[Any]) -> set[int]:
        """The indices of the variables whose path matches; of namesakes those that were listed, if any."""
        matches = {i for i, v in enumerate(variables) if re.search(pattern, path_of(v))}
        if pattern in [*(self._given or ()), *self._added]:
            return matches
        listed = set(map(id, self._listed[pattern]))
        return {i for i in matches if id(tf_variable(variables[i])) in listed} or matches

    def find_indices(self, variables: Iterable[Any]) -> frozenset[int]:
        """The indices of the excluded variables. A pattern that matches none of them causes a warning."""
        variables = list(variables)
        unmatched = []
        excluded: set[int] = set()
        for pattern in self.patterns or ():
            matches = self._matches(pattern, variables)
            excluded |= matches
            if not matches:
                unmatched.append(pattern)
        if unmatched:
            one = len(unmatched) == 1
            warnings.warn(
                f"`{self._argument}`: the pattern{'' if one else 's'} {', '.join(map(repr, unmatched))} "
                f"match{'es' if one else ''} no variable. The variables are {paths_of(variables)}",
                stacklevel=levels_to_caller(),
            )
        return frozenset(excluded)


def levels_to_caller() -> int:
    """How far up the first function is that belongs neither to this package nor to Keras or TensorFlow."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and re.match(
        r"(tf_adam_variants|keras|tensorflow)\b", frame.f_globals.get("__name__", "")
    ):
        level, frame = level + 1, frame.f_back
    return level
