"""Constructor arguments: a wrong one is a ValueError that names it, its value and what is allowed."""

from __future__ import annotations

import math
import numbers
import re
import sys
import warnings
from collections.abc import Callable, Iterable
from typing import Any, NoReturn

import numpy as np

from tf_adam_variants.utils.variables import is_optimizer_rate, is_variable

Check = Callable[[str, Any], Any]


def reject(name: str, value: object, allowed: str) -> NoReturn:
    """Raise the ValueError that names the argument, what is allowed and the value."""
    raise ValueError(f"`{name}` must be {allowed}. Received: {name}={value!r}{_hint(value)}")


def _hint(value: object) -> str:
    """What to do about a number that is text."""
    try:
        float(value if isinstance(value, str) else "no number")
    except ValueError:
        return ""
    return ", which is text: write it without quotes (YAML reads 1e-3 as text and 1.0e-3 as a number)"


def to_python(value: Any) -> Any:
    """A scalar or an array without axes of NumPy as a Python object, for JSON; another value as it is."""
    scalar = isinstance(value, np.generic) or (isinstance(value, np.ndarray) and value.ndim == 0)
    return value.item() if scalar else value


def _to_float(value: object) -> float:
    """A finite real number as a float; NaN, which no comparison holds for, for anything else."""
    number = to_python(value)
    if not isinstance(number, numbers.Real) or isinstance(number, bool):
        return math.nan
    try:
        number = float(number)
    except OverflowError:
        return math.nan
    return number if math.isfinite(number) else math.nan


def check_finite(name: str, value: Any) -> float:
    """A finite float."""
    number = _to_float(value)
    return reject(name, value, "a finite number") if math.isnan(number) else number


def check_nonnegative(name: str, value: Any, allowed: str = "a finite number >= 0") -> float:
    """A finite float >= 0."""
    number = _to_float(value)
    return number if number >= 0 else reject(name, value, allowed)


def check_nonnegative_or_none(name: str, value: Any) -> float | None:
    """None or a finite float >= 0."""
    return None if value is None else check_nonnegative(name, value, "None or a finite number >= 0")


def check_positive(name: str, value: Any, allowed: str = "a finite number > 0") -> float:
    """A finite float > 0."""
    number = _to_float(value)
    return number if number > 0 else reject(name, value, allowed)


def check_positive_or_none(name: str, value: Any) -> float | None:
    """None or a finite float > 0."""
    return None if value is None else check_positive(name, value, "None or a finite number > 0")


def check_beta(name: str, value: Any) -> float:
    """A float in [0, 1)."""
    number = _to_float(value)
    return number if 0 <= number < 1 else reject(name, value, "in [0, 1)")


def check_fraction(name: str, value: Any) -> float:
    """A float in [0, 1]."""
    number = _to_float(value)
    return number if 0 <= number <= 1 else reject(name, value, "in [0, 1]")


def check_int(name: str, value: Any, least: int, allowed: str | None = None) -> int:
    """An int >= least."""
    number = to_python(value)
    whole = isinstance(number, numbers.Integral) and not isinstance(number, bool)
    return (
        int(number) if whole and number >= least else reject(name, value, allowed or f"an integer >= {least}")
    )


def int_or_none_check(least: int) -> Check:
    """A check for None or an int >= least."""
    return lambda name, value: None if value is None else check_int(name, value, least)


def check_frequency(name: str, value: Any, allowed: str) -> str | int:
    """The string "epoch" or an int >= 1."""
    return "epoch" if _is_text(value, "epoch") else check_int(name, value, 1, allowed)


def check_bool(name: str, value: Any) -> bool:
    """True or False."""
    flag = to_python(value)
    return flag if isinstance(flag, bool) else reject(name, value, "True or False")


def check_auto_or_bool(name: str, value: Any) -> str | bool:
    """The string "auto", True or False."""
    flag = to_python(value)
    return (
        flag
        if isinstance(flag, bool) or _is_text(flag, "auto")
        else reject(name, value, "'auto', True or False")
    )


def check_str(name: str, value: Any) -> str:
    """A string that is not empty."""
    text = to_python(value)
    return text if isinstance(text, str) and text else reject(name, value, "a string that is not empty")


def _is_text(value: Any, text: str) -> bool:
    value = to_python(value)
    return isinstance(value, str) and value == text


def one_of_check(*allowed: str) -> Check:
    """A check for one of these strings."""

    def check(name: str, value: Any) -> str:
        found = [text for text in allowed if _is_text(value, text)]
        return found[0] if found else reject(name, value, f"one of {', '.join(map(repr, allowed))}")

    return check


def check_no_class(name: str, value: Any) -> None:
    """Raise for a class where an instance of it is meant."""
    if isinstance(value, type):
        reject(name, value, f"an instance, not a class: {value.__name__}(...)")


def check_learning_rate(name: str, value: Any) -> Any:
    """A float for a number or the rate of an optimizer; schedules and callables as they are."""
    check_no_class(name, value)
    if is_variable(value) and not is_optimizer_rate(value):
        raise ValueError(
            f"`{name}` must not be a variable: the optimizer would read it once and not follow it. Pass a "
            "callable that returns the variable, as `lambda: variable`; or pass a number, and assign to "
            f"`optimizer.learning_rate` later. Received: {name}={value!r}"
        )
    if callable(value):
        return value
    if getattr(value, "shape", None) == ():
        value = np.asarray(value).item()
    return check_nonnegative(
        name, value, "a finite number >= 0, a LearningRateSchedule, or a callable without arguments"
    )


def check_patterns(name: str, value: Iterable[str] | None) -> list[str] | None:
    """A list of regular expressions that compile, or None."""
    if value is None:
        return None
    if isinstance(to_python(value), (str, bytes)) or not isinstance(to_python(value), Iterable):
        reject(name, value, "a list of regular expressions")
    checked = [to_python(pattern) for pattern in value]
    for pattern in checked:
        if not isinstance(pattern, str):
            reject(name, checked, f"a list of regular expressions ({pattern!r} is not a string)")
        try:
            re.compile(pattern)
        except re.error as error:
            reject(name, checked, f"a list of regular expressions ({pattern!r}: {error})")
    return checked


def warn(message: str) -> None:
    """Warn, and name the line of the user's program that is to blame."""
    warnings.warn(message, stacklevel=1 + _levels_to_caller())


def _levels_to_caller() -> int:
    """How far up the first function is that belongs neither to this package nor to Keras or TensorFlow."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and re.match(
        r"(tf_adam_variants|keras|tensorflow)\b", frame.f_globals.get("__name__", "")
    ):
        level, frame = level + 1, frame.f_back
    return level
