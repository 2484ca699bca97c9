"""The compiled op (custom_ops/), which updates all variables of a type in one pass over memory."""

from __future__ import annotations

import functools
import logging
import struct
from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from tf_adam_variants import _xla
from tf_adam_variants._step import Constants, Parameter, StepInputs, Workload
from tf_adam_variants._update import Update
from tf_adam_variants.fused import _library

takes_slices = True
TERMS = {
    *("nu_1", "nu_2", "amsgrad", "bias_correction", "grad_averaging"),
    *("weight_decay", "weight_decay_mode", "peak_learning_rate"),
    *("trust_ratio", "trust_ratio_min", "trust_ratio_max"),
}

_UNDER_XLA = (
    "XLA (`jit_compile=True`) compiles no ops but its own. `tav.fused.split_step(model)` leaves it the "
    "gradients and takes the update out of it"
)


def reason_against(update: Update, workload: Workload) -> str:
    """Why the op cannot update the variables in the present context; '' where it can."""
    return _UNDER_XLA if _xla.is_compiling() else _reason_outside_xla(update, workload)


def mention_split_step(update: Update, workload: Workload) -> None:
    """Log, once, that XLA alone is what keeps the op from the update, if so."""
    if _xla.is_compiling() and not _reason_outside_xla(update, workload):
        _log_once(f"The compiled op is built, but not used: {_UNDER_XLA}")


@functools.cache
def _log_once(message: str) -> None:
    logging.getLogger("tf_adam_variants").warning(message)


def _reason_outside_xla(update: Update, workload: Workload) -> str:
    terms = TERMS - {"nu_1", "nu_2", "amsgrad"} if update.trust_ratio else TERMS
    if missing := update.terms - terms:
        return f"it has no step with {', '.join(sorted(missing))}{' and a trust ratio' * update.trust_ratio}"
    kind, reason = _device_type(workload.devices)
    if reason or not _library.load():
        return reason or _library.reason()
    return _library.gpu_reason() if kind == "GPU" else ""


@functools.cache
def _device_type(devices: frozenset[tuple[str, ...]]) -> tuple[str, str]:
    """CPU or GPU, where all variables are on one, or why the op cannot update them."""
    names = sorted({device for replicas in devices for device in replicas})
    parsed = [tf.DeviceSpec.from_string(name) for name in names]
    types = {device.device_type for device in parsed}
    local = all(map(_is_of_this_process, parsed))
    if len(devices) == 1 and local and types in ({"CPU"}, {"GPU"}):
        return types.pop(), ""
    return "", (
        "the variables, or a replica's copies of them, must all be on one CPU or GPU of this process. "
        f"They are on {', '.join(names)}"
    )


def _is_of_this_process(device: tf.DeviceSpec) -> bool:
    """This process is /job:localhost, or in a cluster for example /job:worker/replica:0/task:1."""
    with tf.init_scope(), tf.device(None):
        here = tf.DeviceSpec.from_string(tf.constant(0).device)
    return all(getattr(device, part) in (None, getattr(here, part)) for part in ("job", "replica", "task"))


def global_norm(gradients: Sequence[Any], device: str) -> Any:
    """The norm of all gradients together, in float64, in one pass."""
    groups: dict[tf.DType, list[Any]] = {}
    for gradient in gradients:
        values = gradient.values if isinstance(gradient, tf.IndexedSlices) else gradient
        values = tf.convert_to_tensor(values)
        groups.setdefault(values.dtype, []).append(values)
    squared_norm = _library.load().tf_adam_variants_squared_norm
    with tf.device(device):
        return tf.sqrt(tf.add_n([squared_norm(gradients=group) for group in groups.values()]))


def take(parameters: Sequence[Parameter], update: Update, inputs: StepInputs, exact: bool) -> None:
    """Update variables and slots: by one op those with dense gradients, by one op each those with slices."""
    dense: dict[tf.DType, list[Parameter]] = {}
    with tf.device(parameters[0].variable.device):
        step = scalars(update, inputs)
        for parameter in parameters:
            if isinstance(parameter.gradient, tf.IndexedSlices):
                _take_sparse(parameter, update, step, exact)
            else:
                gradient = _in_a_type_of(parameter, parameter.gradient)
                dense.setdefault(gradient.dtype, []).append(parameter._replace(gradient=gradient))
        for group in dense.values():
            _take_dense(group, update, step)


def scalars(update: Update, inputs: StepInputs) -> Any:
    """The fields of `Step`, in one tensor."""
    constants = Constants.of(update)
    numbers = [*constants.step, *constants[1:]]
    rate = inputs.learning_rate
    return _library.load().tf_adam_variants_step_scalars(
        iterations=tf.cast(inputs.iterations, tf.int64),
        learning_rate=rate if rate.dtype in (tf.float32, tf.float64) else tf.cast(rate, tf.float64),
        gradient_scale=[] if inputs.gradient_scale is None else [inputs.gradient_scale],
        rounding_seed=[] if inputs.rounding_seed is None else [inputs.rounding_seed],
        constants=struct.unpack(f"{len(numbers)}q", struct.pack(f"{len(numbers)}d", *numbers)),
    )


def _take_dense(group: Sequence[Parameter], update: Update, step: Any) -> None:
    _library.load().tf_adam_variants_dense_step(
        step=step,
        variables=[p.variable.handle for p in group],
        momentums=[p.momentum.handle for p in group],
        velocities=[p.velocity.handle for p in group],
        velocity_hats=[p.velocity_hat.handle for p in group if p.velocity_hat is not None],
        master_weights=[p.master_weight.handle for p in group if p.master_weight is not None],
        gradients=[p.gradient for p in group],
        T=group[0].variable.dtype,
        squared_gradient=update.nu_2 != 1,
        trust_ratio=update.trust_ratio,
        weight_decay=[p.weight_decay for p in group],
        layer_adaptation=[p.layer_adaptation for p in group],
        stochastic_rounding=group[0].stream is not None,
        streams=[p.stream or 0 for p in group],
    )


def _take_sparse(p: Parameter, update: Update, step: Any, exact: bool) -> None:
    _library.load().tf_adam_variants_sparse_step(
        step=step,
        variable=p.variable.handle,
        momentum=p.momentum.handle,
        velocity=p.velocity.handle,
        velocity_hats=[] if p.velocity_hat is None else [p.velocity_hat.handle],
        master_weights=[] if p.master_weight is None else [p.master_weight.handle],
        values=_in_a_type_of(p, p.gradient.values),
        ids=p.gradient.indices,
        T=p.variable.dtype,
        squared_gradient=update.nu_2 != 1,
        trust_ratio=update.trust_ratio,
        weight_decay=p.weight_decay,
        layer_adaptation=p.layer_adaptation,
        stochastic_rounding=p.stream is not None,
        stream=p.stream or 0,
        exact=exact,
    )


def _in_a_type_of(p: Parameter, gradient: Any) -> Any:
    """The gradient in the type of the variable or of its moments, which the op takes."""
    gradient = tf.convert_to_tensor(gradient)
    if gradient.dtype in (p.variable.dtype, p.momentum.dtype):
        return gradient
    return tf.cast(gradient, p.momentum.dtype)
