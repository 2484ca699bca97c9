"""The peak of a learning rate, which weight decay can be relative to."""

from __future__ import annotations

import numbers
from typing import Any


def of(learning_rate: Any) -> float | None:
    """A number itself, a schedule's `warmup_target` or else its `initial_learning_rate`, or None."""
    if isinstance(learning_rate, numbers.Real):
        return float(learning_rate)
    for attribute in ("warmup_target", "initial_learning_rate"):
        value = getattr(learning_rate, attribute, None)
        if isinstance(value, numbers.Real):
            return float(value)
    return None
