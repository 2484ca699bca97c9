"""Variables that a list of regular expressions excludes, by their paths, from decay or adaptation."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Sequence
from typing import Any

from tf_adam_variants.utils import checks
from tf_adam_variants.utils.variables import path_of, paths_of, tf_variable


class Exclusions:
    """The patterns of one argument, those that Keras's method adds to them, and the variables they exclude.

    Which those are is fixed when an optimizer takes its variables. A saved state holds it: the paths of a
    copied model may differ.
    """

    def __init__(self, argument: str, patterns: list[str] | None, default: Exclusions | None = None) -> None:
        self.argument, self._given = argument, patterns
        self._default = default  # what counts where no patterns were ever given
        self._added: list[str] = []
        self._listed: dict[str, list[Any]] = {}  # the method's variables, by the pattern of their path
        self.indices: frozenset[int] = frozenset()
        self._number = 0  # how many variables are fixed
        self._unmatched: list[str] = []

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

    @property
    def patterns_in_use(self) -> list[str]:
        """Where none were ever given, those of the argument that counts instead."""
        if self.patterns is None:
            return self._default.patterns_in_use if self._default else []
        return self.patterns

    def fix(self, variables: Sequence[Any]) -> None:
        """Find the excluded ones among the variables that an optimizer took since the last call."""
        if self.patterns is None and self._default:
            self.indices = self._default.indices
            return
        matches = {pattern: self._matches(pattern, variables) for pattern in self.patterns_in_use}
        new = range(self._number, len(variables))
        self.indices |= {i for found in matches.values() for i in found if i in new}
        self._number = len(variables)
        self._unmatched = [pattern for pattern, found in matches.items() if not found]

    def _matches(self, pattern: str, variables: Sequence[Any]) -> set[int]:
        """The indices of the variables whose path matches; of namesakes those that were listed, if any."""
        matches = {i for i, v in enumerate(variables) if re.search(pattern, path_of(v))}
        if pattern in [*(self._given or ()), *self._added]:
            return matches
        listed = set(map(id, self._listed[pattern]))
        return {i for i in matches if id(tf_variable(variables[i])) in listed} or matches

    def restore(self, changed: Iterable[int]) -> None:
        """Take over what a state says that was saved with the same patterns.

        Args:
            changed: the indices of the variables that are excluded here and not there, or the other way.
        """
        self.indices ^= frozenset(changed)
        self._unmatched = []

    def warn_changed(self, patterns: list[str], changed: Iterable[int], variables: Sequence[Any]) -> None:
        """Warn of the variables whose exclusion differs from a state that was saved with other patterns."""
        if changed and self.patterns is not None:
            checks.warn(self._describe(patterns, changed, variables))

    def _describe(self, patterns: list[str], changed: Iterable[int], variables: Sequence[Any]) -> str:
        excluded = paths_of(variables[i] for i in sorted(changed) if i in self.indices)
        included = paths_of(variables[i] for i in sorted(changed) if i not in self.indices)
        return (
            f"The state was saved with {self.argument}={patterns}. Here it is {self.patterns}, which counts. "
            + (f"Excluded now, and not before: {excluded}. " if excluded else "")
            + (f"Excluded before, and not now: {included}. " if included else "")
        ).rstrip()

    def warn_unmatched(self, variables: Iterable[Any]) -> None:
        """Warn once of the patterns that match no variable."""
        if not self._unmatched:
            return
        one = len(self._unmatched) == 1
        checks.warn(
            f"`{self.argument}`: the pattern{'' if one else 's'} {', '.join(map(repr, self._unmatched))} "
            f"match{'es' if one else ''} no variable. The variables are {paths_of(variables)}"
        )
        self._unmatched = []
