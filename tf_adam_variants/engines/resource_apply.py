"""TensorFlow's own kernels, in place on CPUs and GPUs, for the steps that they compute.

Where nu_2 is 1, a step is

    w <- w - weight_decay w - (momentum_coefficient m + gradient_coefficient g) / (sqrt(v) + epsilon)

`ResourceApplyAdam` updates m and v and subtracts the first part of the fraction; `ResourceApplyAdagradV2`,
with update_slots=False, subtracts the second.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import tensorflow as tf

from tf_adam_variants import _xla
from tf_adam_variants._step import Parameter, Step, StepInputs, Workload, is_small
from tf_adam_variants._update import Update
from tf_adam_variants.engines.formula import global_norm as global_norm

takes_slices = False
TERMS = {"nu_1", "bias_correction", "weight_decay", "weight_decay_mode", "peak_learning_rate"}


def reason_against(update: Update, workload: Workload) -> str:
    """Why these kernels do not compute the step, or not faster than the formula; '' where they do."""
    if missing := update.terms - TERMS:
        return f"TensorFlow has no kernel with {', '.join(sorted(missing))}"
    if workload.sparse or workload.dtype not in (tf.float32, tf.float64):
        return "TensorFlow's kernels update whole variables of the type of their slots"
    if update.nu_1 != 1 and _xla.is_compiling():
        return "XLA fuses the formula too, and two kernels divide twice"
    if is_small(min(update.beta_1, update.beta_2)):
        return "TensorFlow's kernels make the moments as differences, which are not exact with a small beta"
    computed = [_rounded(beta, workload.dtype) for beta in (update.beta_1, update.beta_2)]
    return "a beta is 1 in the type of the variables" if max(computed) == 1 else ""


def _as_computed(update: Update, dtype: tf.DType) -> Update:
    """The update with the betas whose 1 - beta the kernels use."""
    beta_1, beta_2 = _rounded(update.beta_1, dtype), _rounded(update.beta_2, dtype)
    return dataclasses.replace(update, beta_1=beta_1, beta_2=beta_2)


def _rounded(beta: float, dtype: tf.DType) -> float:
    """A beta as the kernels use it: they compute 1 - beta in the variable's type.

    In float32, 1 - 0.999 is 0.00099998713: bias corrections made for 0.001 would be off by 1.3e-5.
    """
    number = dtype.as_numpy_dtype
    return 1.0 - float(number(1) - number(beta))


def take(parameters: Sequence[Parameter], update: Update, inputs: StepInputs, exact: bool) -> None:
    """Update variables and slots, each by up to three kernels."""
    dtype = parameters[0].variable.dtype
    step = Step.of(_as_computed(update, dtype), inputs)
    scales = tf.is_tensor(step.gradient_scale)
    beta_1, beta_2 = tf.constant(update.beta_1, dtype), tf.constant(update.beta_2, dtype)
    zero = tf.zeros((), dtype)
    step = step.cast(dtype)
    for p in parameters:
        gradient = tf.cast(p.gradient, dtype)
        if scales:
            gradient *= step.gradient_scale
        if p.weight_decay and update.weight_decay:
            p.variable.assign_sub(step.weight_decay * p.variable)
        tf.raw_ops.ResourceApplyAdam(
            var=p.variable.handle,
            m=p.momentum.handle,
            v=p.velocity.handle,
            beta1_power=zero,  # switches off the kernel's own bias correction, whose 1 - power cancels
            beta2_power=zero,
            lr=step.momentum_coefficient,
            beta1=beta_1,
            beta2=beta_2,
            epsilon=step.epsilon,
            grad=gradient,
        )
        if update.nu_1 != 1:
            tf.raw_ops.ResourceApplyAdagradV2(
                var=p.variable.handle,
                accum=p.velocity.handle,
                lr=step.gradient_coefficient,
                epsilon=step.epsilon,
                grad=gradient,
                update_slots=False,
            )
