"""The same step by TensorFlow's own in-place kernels, where they compute it.

Where nu_2 is 1, a step is rate d = (momentum m + gradient g) / (sqrt(v) + epsilon) with the coefficients of
`_formula`. `ResourceApplyAdam` updates m and v and subtracts the first part of it, `ResourceApplyAdagradV2`
(told to leave its accumulator, v, alone) the second. Both run in place on CPU and GPU. This is the only
file that names a raw op, those that write rows in place included.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import tensorflow as tf
from tensorflow.python.ops.control_flow_util import GraphOrParentsInXlaContext

from tf_adam_variants._formula import Coefficients


def serve(nu_1: float, nu_2: float, betas: tuple[float, float], dtype: tf.DType) -> bool:
    """Whether the kernels compute a step with these terms, and are the faster way to it.

    XLA compiles them too, but fuses the formula as well, and there a second kernel is a second division.
    """
    if nu_2 != 1 or dtype not in (tf.float32, tf.float64):
        return False
    if max(held_beta(beta, dtype) for beta in betas) == 1:  # nothing of the gradient would be left
        return False
    return nu_1 == 1 or not in_xla()


def in_xla() -> bool:
    """Whether what is being traced will be compiled by XLA."""
    return GraphOrParentsInXlaContext(tf.compat.v1.get_default_graph())


def held_beta(beta: float, dtype: tf.DType) -> float:
    """The beta whose 1 - beta the kernels use: they subtract in the variable's type.

    In float32, 1 - 0.999 is 0.00099998713: bias corrections made for 0.001 would be off by 1.3e-5.
    """
    number = dtype.as_numpy_dtype
    return 1.0 - float(number(1) - number(beta))


class Betas(NamedTuple):
    """What the kernels take beside the coefficients; made once a step, not once a variable."""

    beta_1: Any
    beta_2: Any
    power: Any  # the kernel's own bias correction, 1 - power, cancels: 0 switches it off

    @classmethod
    def of(cls, beta_1: float, beta_2: float, dtype: tf.DType) -> Betas:
        return cls(*(tf.constant(number, dtype) for number in (beta_1, beta_2, 0.0)))


def step(w: Any, m: Any, v: Any, g: Any, betas: Betas, c: Coefficients) -> None:
    """Update weights, momentum and velocity (resource variables of one type) in place."""
    tf.raw_ops.ResourceApplyAdam(
        var=w.handle,
        m=m.handle,
        v=v.handle,
        beta1_power=betas.power,
        beta2_power=betas.power,
        lr=c.momentum,
        beta1=betas.beta_1,
        beta2=betas.beta_2,
        epsilon=c.epsilon,
        grad=g,
    )
    if c.gradient is not None:
        tf.raw_ops.ResourceApplyAdagradV2(
            var=w.handle, accum=v.handle, lr=c.gradient, epsilon=c.epsilon, grad=g, update_slots=False
        )


def write_rows(variable: Any, ids: Any, values: Any) -> None:
    """Set rows in place."""
    tf.raw_ops.ResourceScatterUpdate(resource=variable.handle, indices=ids, updates=values)
    _share_again(variable)


def subtract_rows(variable: Any, ids: Any, values: Any) -> None:
    """Subtract from rows in place."""
    tf.raw_ops.ResourceScatterSub(resource=variable.handle, indices=ids, updates=values)
    _share_again(variable)


def _share_again(variable: Any) -> None:
    """Let dense reads share the variable's memory again.

    Reading or writing rows makes TensorFlow copy the whole table for each dense read from then on, and
    Keras's Embedding begins with one.
    """
    if not in_xla():
        tf.raw_ops.DisableCopyOnRead(resource=variable.handle)
