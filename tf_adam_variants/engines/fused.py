"""The fused kernels (custom_ops/): one op updates all variables of a type in one pass over memory."""

from __future__ import annotations

import functools
import logging
import struct
from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from tf_adam_variants.engines.coefficients import StaticCoefficients, StepInputs
from tf_adam_variants.engines.hyperparameters import Hyperparameters
from tf_adam_variants.engines.variable_state import GroupSpec, VariableState
from tf_adam_variants.fused import _library
from tf_adam_variants.utils import internals

accepts_indexed_slices = True
TERMS = {
    *("nu_1", "nu_2", "amsgrad", "bias_correction", "grad_averaging"),
    *("weight_decay", "weight_decay_mode", "peak_learning_rate"),
    *("trust_ratio", "trust_ratio_min", "trust_ratio_max"),
}

_UNDER_XLA = (
    "XLA (`jit_compile=True`) compiles no ops but its own. `tav.fused.split_step(model)` leaves it the "
    "gradients and takes the update out of it"
)


def unsupported_reason(hp: Hyperparameters, group: GroupSpec) -> str | None:
    """Why the fused kernels cannot update the variables in the present context; None where they can."""
    return _UNDER_XLA if internals.is_xla_compiling() else _reason_outside_xla(hp, group)


def warn_xla_blocks_fused(hp: Hyperparameters, group: GroupSpec) -> None:
    """Log once, where only XLA keeps the fused kernels from the step."""
    if internals.is_xla_compiling() and not _reason_outside_xla(hp, group):
        _log_once(f"The compiled op is built, but not used: {_UNDER_XLA}")


@functools.cache
def _log_once(message: str) -> None:
    logging.getLogger("tf_adam_variants").warning(message)


def _reason_outside_xla(hp: Hyperparameters, group: GroupSpec) -> str | None:
    terms = TERMS - {"nu_1", "nu_2", "amsgrad"} if hp.trust_ratio else TERMS
    if missing := hp.terms - terms:
        return f"it has no step with {', '.join(sorted(missing))}{' and a trust ratio' * hp.trust_ratio}"
    device_type, reason = _device_type(group.devices)
    if reason or not _library.load():
        return reason or _library.reason()
    return (_library.gpu_reason() if device_type == "GPU" else "") or None


@functools.cache
def _device_type(devices: frozenset[tuple[str, ...]]) -> tuple[str, str]:
    """CPU or GPU, where all variables are on one; or why the kernels cannot update them."""
    names = sorted({device for replicas in devices for device in replicas})
    parsed = [tf.DeviceSpec.from_string(name) for name in names]
    types = {device.device_type for device in parsed}
    if len(devices) == 1 and all(map(_is_local, parsed)) and types in ({"CPU"}, {"GPU"}):
        return types.pop(), ""
    return "", (
        "the variables, or a replica's copies of them, must all be on one CPU or GPU of this process. "
        f"They are on {', '.join(names)}"
    )


def _is_local(device: tf.DeviceSpec) -> bool:
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


def step(states: Sequence[VariableState], hp: Hyperparameters, inputs: StepInputs, exact: bool) -> None:
    """Update variables and slots: one op for all dense gradients of a type, one op per sparse gradient."""
    dense: dict[tf.DType, list[VariableState]] = {}
    with tf.device(states[0].variable.device):
        c = coefficients(hp, inputs)
        for state in states:
            if isinstance(state.gradient, tf.IndexedSlices):
                _step_sparse(state, hp, c, exact)
            else:
                gradient = _cast_gradient(state, state.gradient)
                dense.setdefault(gradient.dtype, []).append(state._replace(gradient=gradient))
        for group in dense.values():
            _step_dense(group, hp, c)


def coefficients(hp: Hyperparameters, inputs: StepInputs) -> Any:
    """The fields of `Coefficients`, in one tensor."""
    static = StaticCoefficients.from_hyperparameters(hp)
    numbers = [*static.coefficients, *static[1:]]
    rate = inputs.learning_rate
    return _library.load().tf_adam_variants_coefficients(
        iterations=tf.cast(inputs.iterations, tf.int64),
        learning_rate=rate if rate.dtype in (tf.float32, tf.float64) else tf.cast(rate, tf.float64),
        gradient_scale=[] if inputs.gradient_scale is None else [inputs.gradient_scale],
        rounding_seed=[] if inputs.rounding_seed is None else [inputs.rounding_seed],
        # An attribute can hold float32 only: the bits of float64.
        static_coefficients=struct.unpack(f"{len(numbers)}q", struct.pack(f"{len(numbers)}d", *numbers)),
    )


def _step_dense(group: Sequence[VariableState], hp: Hyperparameters, c: Any) -> None:
    _library.load().tf_adam_variants_dense_step(
        coefficients=c,
        variables=[s.variable.handle for s in group],
        momentums=[s.momentum.handle for s in group],
        velocities=[s.velocity.handle for s in group],
        velocity_hats=[s.velocity_hat.handle for s in group if s.velocity_hat is not None],
        master_weights=[s.master_weight.handle for s in group if s.master_weight is not None],
        gradients=[s.gradient for s in group],
        T=group[0].variable.dtype,
        squared_gradient=hp.nu_2 != 1,
        trust_ratio=hp.trust_ratio,
        weight_decay=[s.weight_decay for s in group],
        layer_adaptation=[s.layer_adaptation for s in group],
        stochastic_rounding=group[0].rng_stream is not None,
        rng_streams=[s.rng_stream or 0 for s in group],
    )


def _step_sparse(s: VariableState, hp: Hyperparameters, c: Any, exact: bool) -> None:
    _library.load().tf_adam_variants_sparse_step(
        coefficients=c,
        variable=s.variable.handle,
        momentum=s.momentum.handle,
        velocity=s.velocity.handle,
        velocity_hats=[] if s.velocity_hat is None else [s.velocity_hat.handle],
        master_weights=[] if s.master_weight is None else [s.master_weight.handle],
        values=_cast_gradient(s, s.gradient.values),
        indices=s.gradient.indices,
        T=s.variable.dtype,
        squared_gradient=hp.nu_2 != 1,
        trust_ratio=hp.trust_ratio,
        weight_decay=s.weight_decay,
        layer_adaptation=s.layer_adaptation,
        stochastic_rounding=s.rng_stream is not None,
        rng_stream=s.rng_stream or 0,
        exact=exact,
    )


def _cast_gradient(s: VariableState, gradient: Any) -> Any:
    """The gradient in the type of the variable or of its moments: the op accepts both."""
    gradient = tf.convert_to_tensor(gradient)
    if gradient.dtype in (s.variable.dtype, s.momentum.dtype):
        return gradient
    return tf.cast(gradient, s.momentum.dtype)
