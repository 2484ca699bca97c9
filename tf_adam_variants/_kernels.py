"""The same step by TensorFlow's own in-place kernels, where they compute it.

With the coefficients of `_formula`, and where (1 - nu2) g^2 is absent, multiplying the fraction's top
and bottom by k = 1 / sqrt(velocity) gives

    lr d = (lr k momentum m + lr k gradient g) / (sqrt(v) + k eps)

`ResourceApplyAdam` updates m and v and subtracts the first term, `ResourceApplyAdagradV2` (told to leave
its accumulator, v, alone) the second. Both run in place on CPU and GPU and both compile under XLA.
This is the only file that names a raw op.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import tensorflow as tf

from tf_adam_variants import _formula


class Rates(NamedTuple):
    """The scalars of one step that the kernels take, in the variables' type."""

    momentum: Any
    gradient: Any | None
    epsilon: Any


def held_beta(beta: float, dtype: tf.DType) -> float:
    """The beta whose 1 - beta the kernels use: they subtract in the variable's type.

    In float32, 1 - 0.999 is 0.00099998713: bias corrections made for 0.001 would be off by 1.3e-5.
    """
    number = dtype.as_numpy_dtype
    return 1.0 - float(number(1) - number(beta))


def rates(learning_rate: Any, c: _formula.Coefficients, dtype: tf.DType) -> Rates:
    """From float64 scalars; c.square must be 0."""
    k = tf.math.rsqrt(c.velocity)
    return Rates(
        momentum=tf.cast(learning_rate * k * c.momentum, dtype),
        gradient=tf.cast(learning_rate * k * c.gradient, dtype) if c.gradient else None,
        epsilon=tf.cast(k * c.epsilon, dtype),
    )


def step(w: Any, m: Any, v: Any, g: Any, beta_1: float, beta_2: float, rates: Rates) -> None:
    """Update weights, momentum and velocity (resource variables of one type) in place."""
    _adam(w, m, v, g, beta_1, beta_2, rates.momentum, rates.epsilon)
    if rates.gradient is not None:
        tf.raw_ops.ResourceApplyAdagradV2(
            var=w.handle,
            accum=v.handle,
            lr=rates.gradient,
            epsilon=rates.epsilon,
            grad=g,
            update_slots=False,
        )


def _adam(w: Any, m: Any, v: Any, g: Any, beta_1: float, beta_2: float, lr: Any, epsilon: Any) -> None:
    dtype = g.dtype
    zero = tf.zeros((), dtype)  # the kernel's own bias correction, 1 - beta_power, cancels: switched off
    tf.raw_ops.ResourceApplyAdam(
        var=w.handle,
        m=m.handle,
        v=v.handle,
        beta1_power=zero,
        beta2_power=zero,
        lr=lr,
        beta1=tf.constant(beta_1, dtype),
        beta2=tf.constant(beta_2, dtype),
        epsilon=epsilon,
        grad=g,
    )
