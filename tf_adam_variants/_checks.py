"""Constructor arguments: a wrong one is a ValueError that names it, its value and what is allowed."""

from __future__ import annotations

import math
import numbers
import re
from collections.abc import Iterable, Mapping
from typing import Any, NoReturn


def _reject(name: str, value: object, allowed: str) -> NoReturn:
    raise ValueError(f"`{name}` must be {allowed}. Received: {name}={value!r}")


def _finite(value: object) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value)


def real(name: str, value: Any, allowed: str = "a finite number") -> float:
    return float(value) if _finite(value) else _reject(name, value, allowed)


def nonnegative(name: str, value: Any, allowed: str = "a finite number >= 0") -> float:
    return float(value) if _finite(value) and value >= 0 else _reject(name, value, allowed)


def positive(name: str, value: Any, allowed: str = "a finite number > 0") -> float:
    return float(value) if _finite(value) and value > 0 else _reject(name, value, allowed)


def beta(name: str, value: Any) -> float:
    return float(value) if _finite(value) and 0 <= value < 1 else _reject(name, value, "in [0, 1)")


def count(name: str, value: Any, least: int) -> int:
    whole = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    return int(value) if whole and int(value) >= least else _reject(name, value, f"an integer >= {least}")


def flag(name: str, value: Any) -> bool:
    return value if isinstance(value, bool) else _reject(name, value, "True or False")


def auto_or_flag(name: str, value: Any) -> str | bool:
    auto = isinstance(value, str) and value == "auto"
    return value if auto or isinstance(value, bool) else _reject(name, value, "'auto', True or False")


def text(name: str, value: Any) -> str:
    return value if isinstance(value, str) and value else _reject(name, value, "a string")


def one_of(name: str, value: Any, allowed: tuple[str, ...]) -> str:
    return value if value in allowed else _reject(name, value, f"one of {', '.join(map(repr, allowed))}")


def bounds(low_name: str, low: Any, high_name: str, high: Any) -> tuple[float | None, float | None]:
    """A lower and an upper bound, each None or >= 0, that do not cross."""
    if low is not None:
        low = nonnegative(low_name, low, "None or a finite number >= 0")
    if high is not None:
        high = nonnegative(high_name, high, "None or a finite number >= 0")
    if low is not None and high is not None and low > high:
        _reject(low_name, low, f"at most {high_name}={high!r}")
    return low, high


def learning_rate(value: Any) -> Any:
    """A float for a number; schedules and callables as they are."""
    if callable(value):
        return value
    return nonnegative(
        "learning_rate",
        value,
        "a finite number >= 0, a LearningRateSchedule, or a callable without arguments",
    )


def patterns(name: str, value: Iterable[str] | None) -> list[str] | None:
    """A list of regular expressions that compile, or None."""
    if value is None:
        return None
    if isinstance(value, (str, bytes)) or not isinstance(value, Iterable):
        _reject(name, value, "a list of regular expressions")
    checked = list(value)
    for pattern in checked:
        if not isinstance(pattern, str):
            _reject(name, checked, f"a list of regular expressions ({pattern!r} is not a string)")
        try:
            re.compile(pattern)
        except re.error as error:
            _reject(name, checked, f"a list of regular expressions ({pattern!r}: {error})")
    return checked


def keras_arguments(arguments: Mapping[str, Any], known: Iterable[str]) -> None:
    """What Keras itself takes: it ignores some wrong values and lets others fail later."""
    for name, value in arguments.items():
        if name not in known:
            raise ValueError(f"Argument not recognized: {name}={value!r}. Known are also: {', '.join(known)}")
    for name in ("clipnorm", "clipvalue", "global_clipnorm", "loss_scale_factor"):
        if arguments.get(name) is not None:
            positive(name, arguments[name], "None or a finite number > 0")
    flag("use_ema", arguments.get("use_ema", False))
    momentum = arguments.get("ema_momentum", 0.0)
    if not (_finite(momentum) and 0 <= momentum <= 1):
        _reject("ema_momentum", momentum, "in [0, 1]")
    for name, least in (("ema_overwrite_frequency", 1), ("gradient_accumulation_steps", 2)):
        if arguments.get(name) is not None:
            count(name, arguments[name], least)
    if arguments.get("ema_overwrite_frequency") and not arguments.get("use_ema"):
        _reject("ema_overwrite_frequency", arguments["ema_overwrite_frequency"], "None unless use_ema=True")
