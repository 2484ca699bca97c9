"""Numbers with the rounding errors that a computation may have made of them.

The oracle's rules run on an `Interval` as they do on an array, in extended precision. Every operation of a
rule widens its result by the roundings that an engine may make in its place. So the bound of each element
follows from the type's arithmetic and from the element's own terms: it is as wide as their cancellation makes
it, and it has no end where the formula is discontinuous (m / sqrt(v) where v may have become 0).
"""

import dataclasses

import ml_dtypes  # TensorFlow's own half types
import numpy as np

# An engine makes at most so many roundings where a rule has one operation. Most are in a coefficient:
# sqrt(1 - beta_2^t) lr nu_1 / (1 - beta_1^t) has eight in float64, where the rule has four operations.
ROUNDINGS = 4


@dataclasses.dataclass(frozen=True, order=True)
class Arithmetic:
    """What a floating type can hold."""

    unit: float  # the largest relative error of a rounding
    least: float  # of the normal numbers: TensorFlow's kernels may flush the others to 0
    largest: float

    @classmethod
    def of(cls, dtype):
        about = ml_dtypes.finfo(dtype)
        return cls(float(about.eps) / 2, float(about.smallest_normal), float(about.max))


class Ambiguous(Exception):
    """A comparison that rounding decides."""


class Interval(np.lib.mixins.NDArrayOperatorsMixin):
    """All values between two bounds, element by element. A NaN as a bound: any value at all."""

    def __init__(self, low, high, arithmetic):
        self.low, self.high = np.asarray(low, np.longdouble), np.asarray(high, np.longdouble)
        self.arithmetic = arithmetic

    @classmethod
    def of(cls, values, arithmetic):
        """Exact values; a denormal one may be read as 0."""
        values = np.asarray(values).astype(np.longdouble)
        denormal = np.abs(values) < arithmetic.least
        ends = (
            np.where(denormal, np.minimum(values, 0), values),
            np.where(denormal, np.maximum(values, 0), values),
        )
        return cls(*ends, arithmetic)

    @classmethod
    def around(cls, values, errors, arithmetic):
        return cls(values - errors, values + errors, arithmetic)

    def __getitem__(self, index):
        return Interval(self.low[index], self.high[index], self.arithmetic)

    def __array_ufunc__(self, ufunc, method, *inputs, **kwargs):
        if method != "__call__" or kwargs or ufunc not in OPERATIONS:
            return NotImplemented
        arithmetic = max(x.arithmetic for x in inputs if isinstance(x, Interval))
        ends = [(x.low, x.high) if isinstance(x, Interval) else (np.longdouble(x),) * 2 for x in inputs]
        with np.errstate(all="ignore"):
            if ufunc is np.greater:
                return _greater(*ends)
            return _rounded(*OPERATIONS[ufunc](*ends), arithmetic, 0 if ufunc in EXACT else ROUNDINGS)

    def __array_function__(self, function, types, args, kwargs):
        if function is np.clip and not kwargs:
            return np.minimum(np.maximum(args[0], args[1]), args[2])
        if function is not np.sum or kwargs:
            return NotImplemented
        with np.errstate(all="ignore"):  # in whatever order: n - 1 roundings at the most
            return _rounded(self.low.sum(), self.high.sum(), self.arithmetic, ROUNDINGS + self.low.size)

    def holds(self, values, rounded=None):
        """Whether each of the values may be the result, rounded by this function if one is given."""
        low, high = self.low, self.high
        free = ~(np.isfinite(low) & np.isfinite(high))
        if rounded is not None:  # it keeps order, so that the rounded bounds are the bounds
            with np.errstate(all="ignore"):
                low, high = (rounded(x.astype(np.float32)) for x in (low, high))
        return free | ((low <= values) & (values <= high))

    def finite(self):
        return np.isfinite(self.low) & np.isfinite(self.high)


def _rounded(low, high, arithmetic, roundings):
    """The interval of what is between two bounds after so many roundings, which keep 0 and every sign."""
    if roundings:
        unit, least = np.longdouble(roundings * arithmetic.unit), np.longdouble(roundings * arithmetic.least)
        low, high = _less(low, unit, least), -_less(-high, unit, least)
    low = np.where(low < -arithmetic.largest, -np.inf, low)
    return Interval(low, np.where(high > arithmetic.largest, np.inf, high), arithmetic)


def _less(end, unit, least):
    lower = end - (np.abs(end) * unit + least)
    return np.where(end >= 0, np.maximum(lower, 0), lower)


def _outer(function, a, b):
    """The least and the largest of a function that is monotone in both of its arguments."""
    corners = [function(x, y) for x in a for y in b]
    return (
        np.minimum(np.minimum(corners[0], corners[1]), np.minimum(corners[2], corners[3])),
        np.maximum(np.maximum(corners[0], corners[1]), np.maximum(corners[2], corners[3])),
    )


def _divide(a, b):
    low, high = _outer(np.divide, a, b)
    crosses = (b[0] < 0) & (b[1] > 0)
    return np.where(crosses, -np.inf, low), np.where(crosses, np.inf, high)


def _power(a, exponent):
    if np.any(exponent[0] != 2):
        raise ValueError(f"only squares have a rule here. Received: a power of {exponent[0]}")
    low, high = np.minimum(np.abs(a[0]), np.abs(a[1])), np.maximum(np.abs(a[0]), np.abs(a[1]))
    return np.where((a[0] <= 0) & (a[1] >= 0), 0, low) ** 2, high**2


def _greater(a, b):
    if np.all(a[0] > b[1]):
        return True
    if np.all(a[1] <= b[0]):
        return False
    raise Ambiguous


OPERATIONS = {
    np.add: lambda a, b: (a[0] + b[0], a[1] + b[1]),
    np.subtract: lambda a, b: (a[0] - b[1], a[1] - b[0]),
    np.multiply: lambda a, b: _outer(np.multiply, a, b),
    np.divide: _divide,
    np.power: _power,
    np.sqrt: lambda a: (np.sqrt(a[0]), np.sqrt(a[1])),
    np.maximum: lambda a, b: (np.maximum(a[0], b[0]), np.maximum(a[1], b[1])),
    np.minimum: lambda a, b: (np.minimum(a[0], b[0]), np.minimum(a[1], b[1])),
    np.greater: None,
}
EXACT = (np.maximum, np.minimum)
