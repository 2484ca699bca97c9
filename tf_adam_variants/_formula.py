"""The one formula of the Adam family, as pure functions of tensors.

    m  <- b1 m + (1 - b1) g            v  <- b2 v + (1 - b2) g^2
    m^ =  m / (1 - b1^t)               v^ =  v / (1 - b2^t)
    d  = ((1 - nu1) g + nu1 m^) / (sqrt((1 - nu2) g^2 + nu2 v^) + eps)

Nothing here knows of Keras, of variables or of a particular optimizer.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import tensorflow as tf

Tensor = Any  # a tf.Tensor, or what converts to one; TensorFlow ships no type stubs


class Coefficients(NamedTuple):
    """d = (gradient g + momentum m) / (sqrt(square g^2 + velocity v) + epsilon).

    What one step knows before it sees a variable. `gradient` and `square` are Python floats: where
    they are 0 (AdamW, LAMB, and `square` in the QH defaults) their terms are never computed.
    """

    gradient: float
    momentum: Tensor
    square: float
    velocity: Tensor
    epsilon: Tensor


def bias_correction(beta: float, t: Tensor) -> Tensor:
    """1 - beta^t in float64, without the cancellation that 1 - pow(beta, t) suffers for small t."""
    t = tf.cast(t, tf.float64)
    return -tf.math.expm1(t * math.log(beta)) if beta else tf.ones_like(t)


def coefficients(
    nu_1: float, nu_2: float, epsilon: float, correction_1: Tensor, correction_2: Tensor
) -> Coefficients:
    """The direction's coefficients from the hyperparameters and the two bias corrections."""
    return Coefficients(
        gradient=1.0 - nu_1,
        momentum=nu_1 / correction_1,
        square=1.0 - nu_2,
        velocity=nu_2 / correction_2,
        epsilon=epsilon,
    )


def moments(
    m: Tensor, v: Tensor, g: Tensor, beta_1: float, beta_2: float, grad_averaging: bool = True
) -> tuple[Tensor, Tensor]:
    """The new first and second moment. Written as differences: one pass and one rounding less."""
    new_m = m + (1.0 - beta_1) * (g - m) if grad_averaging else beta_1 * m + g
    return new_m, v + (1.0 - beta_2) * (tf.square(g) - v)


def direction(g: Tensor, m: Tensor, v: Tensor, c: Coefficients) -> Tensor:
    """The direction d, before the learning rate."""
    top, square = c.momentum * m, c.velocity * v
    if c.gradient:
        top += c.gradient * g
    if c.square:
        square += c.square * tf.square(g)
    return top / (tf.sqrt(square) + c.epsilon)


def trust_ratio(w: Tensor, u: Tensor, minimum: float | None = None, maximum: float | None = None) -> Tensor:
    """|w| / |u|, 1 where either norm is 0, then clipped to [minimum, maximum]."""
    # l2_loss is half the square of the norm in one pass without a copy; the halves cancel.
    w_norm, u_norm = tf.sqrt(tf.nn.l2_loss(w)), tf.sqrt(tf.nn.l2_loss(u))
    ratio = tf.where((w_norm > 0) & (u_norm > 0), w_norm / u_norm, 1)
    if minimum is not None:
        ratio = tf.maximum(ratio, minimum)
    if maximum is not None:
        ratio = tf.minimum(ratio, maximum)
    return ratio
