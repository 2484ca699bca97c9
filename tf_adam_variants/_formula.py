"""The one formula of the Adam family, as pure functions of tensors.

    m  <- b1 m + (1 - b1) g            v  <- b2 v + (1 - b2) g^2
    m^ =  m / (1 - b1^t)               v^ =  v / (1 - b2^t)
    d  = ((1 - nu1) g + nu1 m^) / (sqrt((1 - nu2) g^2 + nu2 v^) + eps)

Nothing here knows of Keras, of variables or of a particular optimizer.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import tensorflow as tf

Tensor = Any  # a tf.Tensor, or what converts to one; TensorFlow ships no type stubs


class Coefficients(NamedTuple):
    """rate d = (gradient g + momentum m) / (sqrt(square g^2 + velocity v) + epsilon).

    What one step knows before it sees a variable. A term whose coefficient is None is not computed:
    `gradient` where nu_1 is 1; `square` where nu_2 is 1, and then `velocity` too, which is 1.
    """

    gradient: Tensor | None
    momentum: Tensor
    square: Tensor | None
    velocity: Tensor | None
    epsilon: Tensor

    def cast(self, dtype: tf.DType) -> Coefficients:
        """In float64 first: TensorFlow takes a Python float for a float32."""
        exact = (None if c is None else tf.convert_to_tensor(c, tf.float64) for c in self)
        return Coefficients(*(None if c is None else tf.cast(c, dtype) for c in exact))


def bias_correction(beta: float, t: Tensor) -> Tensor:
    """1 - beta^t in float64, without the cancellation that 1 - pow(beta, t) suffers for small t."""
    t = tf.cast(t, tf.float64)
    return -tf.math.expm1(t * math.log(beta)) if beta else tf.ones_like(t)


def coefficients(
    rate: Tensor, nu_1: float, nu_2: float, epsilon: float, correction_1: Tensor, correction_2: Tensor
) -> Coefficients:
    """The coefficients of rate d, in float64, from the hyperparameters and the two bias corrections."""
    gradient = None if nu_1 == 1 else rate * (1 - nu_1)
    momentum = rate * nu_1 / correction_1
    if nu_2 != 1:
        return Coefficients(gradient, momentum, 1 - nu_2, nu_2 / correction_2, epsilon)
    # Top and bottom times sqrt(correction_2): v is then used as it is.
    k = tf.sqrt(tf.cast(correction_2, tf.float64))
    return Coefficients(None if gradient is None else k * gradient, k * momentum, None, None, k * epsilon)


def moments(
    m: Tensor, v: Tensor, g: Tensor, share_1: Tensor, share_2: Tensor, grad_averaging: bool = True
) -> tuple[Tensor, Tensor]:
    """The new first and second moment, where the shares of the gradient are 1 - b1 and 1 - b2.

    Written as differences: one pass and one rounding less.
    """
    new_m = m + share_1 * (g - m) if grad_averaging else m + (g - share_1 * m)
    return new_m, v + share_2 * (tf.square(g) - v)


def direction(g: Tensor, m: Tensor, v: Tensor, c: Coefficients) -> Tensor:
    """The direction d times the rate that the coefficients were made with."""
    top = c.momentum * m if c.gradient is None else c.momentum * m + c.gradient * g
    square = v if c.square is None else c.velocity * v + c.square * tf.square(g)
    return top / (tf.sqrt(square) + c.epsilon)


def trust_ratio(w: Tensor, u: Tensor, minimum: float | None = None, maximum: float | None = None) -> Tensor:
    """|w| / |u|, 1 where either norm is 0, then clipped to [minimum, maximum]."""
    # l2_loss is half the square of the norm in one pass without a copy; the halves cancel.
    w_norm, u_norm = tf.sqrt(tf.nn.l2_loss(w)), tf.sqrt(tf.nn.l2_loss(u))
    ratio = tf.where(tf.minimum(w_norm, u_norm) > 0, w_norm / u_norm, 1)
    if minimum is not None:
        ratio = tf.maximum(ratio, minimum)
    if maximum is not None:
        ratio = tf.minimum(ratio, maximum)
    return ratio


def global_norm(values: Iterable[Tensor]) -> Tensor:
    """The norm of all values together, in float64; squares are added up in each value's type."""
    return tf.sqrt(2 * tf.add_n([tf.cast(tf.nn.l2_loss(v), tf.float64) for v in values]))
