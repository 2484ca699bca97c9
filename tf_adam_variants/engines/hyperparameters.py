"""The hyperparameters of an optimizer, which say what terms of the formula it has."""

from __future__ import annotations

import dataclasses
import functools
import numbers
from typing import Any

from tf_adam_variants.utils import checks


@dataclasses.dataclass(frozen=True, kw_only=True)
class Hyperparameters:
    """What an optimizer does at every step t, with gradient g and learning rate lr.

        m  <- beta_1 m + (1 - beta_1) g               grad_averaging=False: m <- beta_1 m + g
        v  <- beta_2 v + (1 - beta_2) g^2             amsgrad=True: v^ is made from the largest v so far
        m^ = m / (1 - beta_1^t)                       bias_correction=False: m^ = m
        v^ = v / (1 - beta_2^t)                       bias_correction=False: v^ = v
        d  = ((1 - nu_1) g + nu_1 m^) / (sqrt((1 - nu_2) g^2 + nu_2 v^) + epsilon)

        w  <- w - s weight_decay w - lr d
        w  <- w - lr r (d + weight_decay w)           trust_ratio=True

    where s is lr, lr / peak_learning_rate or 1 (`weight_decay_mode`) and r = |w| / |d + weight_decay w|,
    clipped to [trust_ratio_min, trust_ratio_max].

    A variant fills in the fields that are arguments of its constructor. Values out of range are a ValueError.
    """

    beta_1: float
    beta_2: float
    epsilon: float
    nu_1: float = 1.0
    nu_2: float = 1.0
    amsgrad: bool = False
    bias_correction: bool = True
    grad_averaging: bool = True
    weight_decay: float | None = None
    weight_decay_mode: str = "learning_rate"
    peak_learning_rate: float | None = None
    trust_ratio: bool = False
    trust_ratio_min: float | None = None
    trust_ratio_max: float | None = None

    def __post_init__(self) -> None:
        for name, check in _CHECKS.items():
            object.__setattr__(self, name, check(name, getattr(self, name)))
        low, high = self.trust_ratio_min, self.trust_ratio_max
        if low is not None and high is not None and low > high:
            raise ValueError(
                f"`trust_ratio_min` must be at most trust_ratio_max={high!r}. "
                f"Received: trust_ratio_min={low!r}"
            )
        if self.peak_learning_rate is None:
            return
        if self.weight_decay_mode != "schedule":
            raise ValueError(
                "`peak_learning_rate` belongs to weight_decay_mode='schedule' and must be None with "
                f"{self.weight_decay_mode!r}. Received: peak_learning_rate={self.peak_learning_rate!r}"
            )
        object.__setattr__(self, "peak_learning_rate", _check_peak(self.peak_learning_rate))

    @functools.cached_property
    def terms(self) -> frozenset[str]:
        """The fields that are not at their default. Without any, it is Adam without weight decay."""
        with_default = (
            field for field in dataclasses.fields(self) if field.default is not dataclasses.MISSING
        )
        return frozenset(field.name for field in with_default if getattr(self, field.name) != field.default)

    def with_peak_of(self, learning_rate: Any) -> Hyperparameters:
        """The hyperparameters with the peak of this learning rate, if they need a peak and have none."""
        if self.weight_decay_mode != "schedule" or self.peak_learning_rate is not None:
            return self
        return dataclasses.replace(self, peak_learning_rate=_check_peak(peak_of(learning_rate)))


def peak_of(learning_rate: Any) -> float | None:
    """A number itself, a schedule's `warmup_target` or else its `initial_learning_rate`, or None."""
    if isinstance(learning_rate, numbers.Real):
        return float(learning_rate)
    for attribute in ("warmup_target", "initial_learning_rate"):
        value = getattr(learning_rate, attribute, None)
        if isinstance(value, numbers.Real):
            return float(value)
    return None


def _check_peak(value: Any) -> float:
    return checks.check_positive(
        "peak_learning_rate",
        value,
        "a finite number > 0 with weight_decay_mode='schedule'. It is taken from a float learning rate, "
        "or from a schedule's initial_learning_rate or warmup_target; where there is none, give it",
    )


FIELDS = tuple(field.name for field in dataclasses.fields(Hyperparameters))

_CHECKS = {
    "beta_1": checks.check_beta,
    "beta_2": checks.check_beta,
    "epsilon": checks.check_nonnegative,
    "nu_1": checks.check_finite,
    "nu_2": checks.check_finite,
    "amsgrad": checks.check_bool,
    "bias_correction": checks.check_bool,
    "grad_averaging": checks.check_bool,
    "weight_decay": checks.check_nonnegative_or_none,
    "weight_decay_mode": checks.one_of_check("learning_rate", "schedule", "independent"),
    "trust_ratio": checks.check_bool,
    "trust_ratio_min": checks.check_nonnegative_or_none,
    "trust_ratio_max": checks.check_nonnegative_or_none,
}
