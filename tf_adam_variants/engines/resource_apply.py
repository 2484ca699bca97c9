"""TensorFlow's own kernels, in place on CPUs and GPUs, for the steps that they compute.

Where nu_2 is 1, a step is

    w <- w - weight_decay w - (c_m m + c_g g) / (sqrt(v) + epsilon)

`ResourceApplyAdam` updates m and v and subtracts the first part of the fraction; `ResourceApplyAdagradV2`,
with update_slots=False, subtracts the second.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import tensorflow as tf

from tf_adam_variants.engines.coefficients import Coefficients, StepInputs, is_small
from tf_adam_variants.engines.formula import global_norm as global_norm
from tf_adam_variants.engines.hyperparameters import Hyperparameters
from tf_adam_variants.engines.variable_state import GroupSpec, VariableState
from tf_adam_variants.utils import internals

accepts_indexed_slices = False
TERMS = {"nu_1", "bias_correction", "weight_decay", "weight_decay_mode", "peak_learning_rate"}


def unsupported_reason(hp: Hyperparameters, group: GroupSpec) -> str | None:
    """Why these kernels do not compute the step, or not faster than the formula; None where they do."""
    if missing := hp.terms - TERMS:
        return f"TensorFlow has no kernel with {', '.join(sorted(missing))}"
    if group.sparse or group.dtype not in (tf.float32, tf.float64):
        return "TensorFlow's kernels update whole variables of the type of their slots"
    if hp.nu_1 != 1 and internals.is_xla_compiling():
        return "XLA fuses the formula too, and two kernels divide twice"
    if is_small(min(hp.beta_1, hp.beta_2)):
        return "TensorFlow's kernels make the moments as differences, which are not exact with a small beta"
    betas = [_round_beta(beta, group.dtype) for beta in (hp.beta_1, hp.beta_2)]
    return "a beta is 1 in the type of the variables" if max(betas) == 1 else None


def _with_rounded_betas(hp: Hyperparameters, dtype: tf.DType) -> Hyperparameters:
    """The hyperparameters with the betas whose 1 - beta the kernels use."""
    beta_1, beta_2 = _round_beta(hp.beta_1, dtype), _round_beta(hp.beta_2, dtype)
    return dataclasses.replace(hp, beta_1=beta_1, beta_2=beta_2)


def _round_beta(beta: float, dtype: tf.DType) -> float:
    """A beta as the kernels use it: they compute 1 - beta in the variable's type.

    In float32, 1 - 0.999 is 0.00099998713: bias corrections made for 0.001 would be off by 1.3e-5.
    """
    number = dtype.as_numpy_dtype
    return 1.0 - float(number(1) - number(beta))


def step(states: Sequence[VariableState], hp: Hyperparameters, inputs: StepInputs, exact: bool) -> None:
    """Update variables and slots, each by up to three kernels."""
    dtype = states[0].variable.dtype
    c = Coefficients.from_hyperparameters(_with_rounded_betas(hp, dtype), inputs)
    scales = tf.is_tensor(c.gradient_scale)
    beta_1, beta_2 = tf.constant(hp.beta_1, dtype), tf.constant(hp.beta_2, dtype)
    zero = tf.zeros((), dtype)
    c = c.cast(dtype)
    for s in states:
        gradient = tf.cast(s.gradient, dtype)
        if scales:
            gradient *= c.gradient_scale
        if s.weight_decay and hp.weight_decay:
            s.variable.assign_sub(c.weight_decay * s.variable)
        tf.raw_ops.ResourceApplyAdam(
            var=s.variable.handle,
            m=s.momentum.handle,
            v=s.velocity.handle,
            beta1_power=zero,  # switches off the kernel's own bias correction, whose 1 - power cancels
            beta2_power=zero,
            lr=c.c_m,
            beta1=beta_1,
            beta2=beta_2,
            epsilon=c.epsilon,
            grad=gradient,
        )
        if hp.nu_1 != 1:
            tf.raw_ops.ResourceApplyAdagradV2(
                var=s.variable.handle,
                accum=s.velocity.handle,
                lr=c.c_g,
                epsilon=c.epsilon,
                grad=gradient,
                update_slots=False,
            )
