"""Constructor arguments: a wrong one is a ValueError that names it, its value and what is allowed."""

from __future__ import annotations

import difflib
import math
import numbers
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple, NoReturn, TypedDict

import numpy as np


def _reject(name: str, value: object, allowed: str) -> NoReturn:
    raise ValueError(f"`{name}` must be {allowed}. Received: {name}={value!r}{_hint(value)}")


def _hint(value: object) -> str:
    """What to do about a number that is text."""
    if not isinstance(value, str):
        return ""
    try:
        float(value)
    except ValueError:
        return ""
    parts = re.fullmatch(r"([+-]?\d+)(\.\d*)?e([+-]?)(\d+)", value.strip(), re.IGNORECASE)
    number = f"{parts[1]}{parts[2] or '.0'}e{parts[3] or '+'}{parts[4]}" if parts else value
    if number == value:
        return ", which is text: write it without quotes"
    return f", which is text: YAML reads {value} as text and {number} as a number. Write {number}"


def _finite(value: object) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value)


def finite(name: str, value: Any) -> float:
    return float(value) if _finite(value) else _reject(name, value, "a finite number")


def nonnegative(name: str, value: Any, allowed: str = "a finite number >= 0") -> float:
    return float(value) if _finite(value) and value >= 0 else _reject(name, value, allowed)


def nonnegative_or_none(name: str, value: Any) -> float | None:
    return None if value is None else nonnegative(name, value, "None or a finite number >= 0")


def positive(name: str, value: Any, allowed: str = "a finite number > 0") -> float:
    return float(value) if _finite(value) and value > 0 else _reject(name, value, allowed)


def positive_or_none(name: str, value: Any) -> float | None:
    return None if value is None else positive(name, value, "None or a finite number > 0")


def beta(name: str, value: Any) -> float:
    return float(value) if _finite(value) and 0 <= value < 1 else _reject(name, value, "in [0, 1)")


def closed_unit(name: str, value: Any) -> float:
    return value if _finite(value) and 0 <= value <= 1 else _reject(name, value, "in [0, 1]")


def count(name: str, value: Any, least: int) -> int:
    whole = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    return int(value) if whole and int(value) >= least else _reject(name, value, f"an integer >= {least}")


def count_or_none(least: int) -> Check:
    return lambda name, value: None if value is None else count(name, value, least)


def flag(name: str, value: Any) -> bool:
    return value if isinstance(value, bool) else _reject(name, value, "True or False")


def auto_or_flag(name: str, value: Any) -> str | bool:
    auto = isinstance(value, str) and value == "auto"
    return value if auto or isinstance(value, bool) else _reject(name, value, "'auto', True or False")


def text(name: str, value: Any) -> str:
    return value if isinstance(value, str) and value else _reject(name, value, "a string that is not empty")


def one_of(*allowed: str) -> Check:
    def check(name: str, value: Any) -> str:
        return value if value in allowed else _reject(name, value, f"one of {', '.join(map(repr, allowed))}")

    return check


def no_class(name: str, value: Any) -> None:
    """Raise for a class where an instance of it is meant."""
    if isinstance(value, type):
        _reject(name, value, f"an instance, not a class: {value.__name__}(...)")


def learning_rate(name: str, value: Any) -> Any:
    """A float for a number; schedules and callables as they are."""
    no_class(name, value)
    if callable(value):
        return value
    if getattr(value, "shape", None) == ():
        value = np.asarray(value).item()
    return nonnegative(
        name, value, "a finite number >= 0, a LearningRateSchedule, or a callable without arguments"
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


Check = Callable[[str, Any], Any]


class Common(TypedDict, total=False):
    """What every optimizer takes by keyword: the package's own, then Keras's."""

    exclude_from_weight_decay: Iterable[str] | None
    sparse_update: str
    fused: str | bool
    master_weights: bool
    stochastic_rounding: bool
    name: str
    clipnorm: float | None
    clipvalue: float | None
    global_clipnorm: float | None
    use_ema: bool
    ema_momentum: float
    ema_overwrite_frequency: int | None
    loss_scale_factor: float | None
    gradient_accumulation_steps: int | None


class Argument(NamedTuple):
    """An argument's default and its check."""

    default: Any
    check: Check


COMMON = {
    "exclude_from_weight_decay": Argument(None, patterns),
    "sparse_update": Argument("exact", one_of("exact", "lazy")),
    "fused": Argument("auto", auto_or_flag),
    "master_weights": Argument(False, flag),
    "stochastic_rounding": Argument(False, flag),
    "name": Argument(None, text),  # None here: each class has a name of its own
    "clipnorm": Argument(None, positive_or_none),
    "clipvalue": Argument(None, positive_or_none),
    "global_clipnorm": Argument(None, positive_or_none),
    "use_ema": Argument(False, flag),
    "ema_momentum": Argument(0.99, closed_unit),
    "ema_overwrite_frequency": Argument(None, count_or_none(1)),
    "loss_scale_factor": Argument(None, positive_or_none),
    "gradient_accumulation_steps": Argument(None, count_or_none(2)),
}


def checked(name: str, value: Any) -> Any:
    """The value of a common argument, if it is allowed."""
    return COMMON[name].check(name, value)


_CLIPPINGS = ("clipnorm", "clipvalue", "global_clipnorm")


def check_names(given: Mapping[str, Any], known: list[str], cls: str) -> None:
    """Raise for the first argument that is not known, with the one it may have been meant for."""
    for name, value in given.items():
        if name not in known:
            nearest = _nearest(name, known)
            meant = f" Did you mean `{nearest}`?" if nearest else ""
            raise ValueError(
                f"Argument not recognized: {name}={value!r}.{meant} {cls} takes {', '.join(known)}"
            )


def _nearest(name: str, known: list[str]) -> str | None:
    """By its initials, as in lr and wd, or its spelling."""
    initials = (one for one in known if "".join(word[0] for word in one.split("_")) == name.lower())
    spelling = iter(difflib.get_close_matches(name.lower(), known, cutoff=0.5))
    return next(initials, None) or next(spelling, None)


def check_together(options: Mapping[str, Any]) -> None:
    """Raise for options that exclude each other."""
    clippings = {name: options[name] for name in _CLIPPINGS if options.get(name) is not None}
    if len(clippings) > 1:
        received = ", ".join(f"{name}={value!r}" for name, value in clippings.items())
        raise ValueError(f"Only one of {', '.join(_CLIPPINGS)} can be set. Received: {received}")
    if options.get("stochastic_rounding") and options.get("master_weights"):
        _reject("stochastic_rounding", True, "False with master_weights=True, which rounds to nearest")
    if options.get("ema_overwrite_frequency") and not options.get("use_ema"):
        _reject("ema_overwrite_frequency", options["ema_overwrite_frequency"], "None unless use_ema=True")
