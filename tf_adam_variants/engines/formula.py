"""The formula in plain TensorFlow operations: any variable, in any context, XLA included.

    m  <- m + m_weight g - (1 - beta_1) m         v <- v + (1 - beta_2) (g^2 - v)     (see `is_small`)
    u   = (c_m m + c_g g) / (sqrt(c_v v + c_g2 g^2) + epsilon) + weight_decay w
    w  <- w - u, or with a trust ratio w - learning_rate r u

The names are those of `coefficients.Coefficients`, which is `c` below.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from tf_adam_variants.engines import rounding
from tf_adam_variants.engines.coefficients import Coefficients, StepInputs, is_small
from tf_adam_variants.engines.hyperparameters import Hyperparameters
from tf_adam_variants.engines.variable_state import GroupSpec, VariableState

accepts_indexed_slices = False


def unsupported_reason(hp: Hyperparameters, group: GroupSpec) -> None:
    """None: the formula supports every step."""


def global_norm(gradients: Sequence[Any], device: str = "") -> Any:
    """The norm of all gradients together, in float64; that of each gradient in its type, float32 at least."""
    values = [g.values if isinstance(g, tf.IndexedSlices) else tf.convert_to_tensor(g) for g in gradients]
    halves = [tf.cast(tf.nn.l2_loss(to_float32(v)), tf.float64) for v in values]  # of the squares
    return tf.sqrt(2 * tf.add_n(halves))


def step(states: Sequence[VariableState], hp: Hyperparameters, inputs: StepInputs, exact: bool) -> None:
    """Update variables and slots, each by a few operations."""
    c = Coefficients.from_hyperparameters(hp, inputs)
    rng_key = c.rng_key  # float32 would not hold it
    c = c.cast(states[0].momentum.dtype)
    for state in states:
        _step_variable(state, hp, c, rng_key)


def _step_variable(s: VariableState, hp: Hyperparameters, c: Coefficients, rng_key: Any) -> None:
    g = tf.cast(s.gradient, s.momentum.dtype)
    if tf.is_tensor(c.gradient_scale):
        g *= c.gradient_scale
    w = weights(s)
    m, v = moments(s.momentum.value(), s.velocity.value(), g, hp, c)
    v_hat = v if s.velocity_hat is None else tf.maximum(v, s.velocity_hat.value())
    u = direction(m, v_hat, g, hp, c)
    if s.weight_decay and hp.weight_decay:
        u += c.weight_decay * w
    s.momentum.assign(m)
    s.velocity.assign(v)
    if s.velocity_hat is not None:
        s.velocity_hat.assign(v_hat)
    if hp.trust_ratio:
        rate = c.learning_rate
        if s.layer_adaptation:
            rate *= trust_ratio(*half_norms(w, u, s.padding), hp, c)
        u *= rate
    _subtract(s, w, u, rng_key)


def _subtract(s: VariableState, w: Any, u: Any, rng_key: Any) -> None:
    """Assign w - u to the variable, rounded where its type is half precision."""
    if s.variable.dtype == s.momentum.dtype:
        s.variable.assign_sub(u)
    elif s.rng_stream is not None:
        elements = rounding.element_indices(s.variable.shape, s.indices)
        s.variable.assign(rounding.round_at_random(w - u, s.variable.dtype, rng_key, s.rng_stream, elements))
    else:
        s.variable.assign(tf.cast(w - u, s.variable.dtype))
        if s.master_weight is not None:
            s.master_weight.assign(w - u)


def weights(s: VariableState) -> Any:
    """The weights before the step, in the type of the moments.

    These are the master weights, except for elements of the variable that are not the rounding of their
    master weight: they were assigned since the last step, by loading, an average or a constraint.
    """
    w = tf.cast(s.variable.value(), s.momentum.dtype)
    if s.master_weight is None:
        return w
    master = s.master_weight.value()
    return tf.where(tf.cast(master, s.variable.dtype) == s.variable.value(), master, w)


def moments(m: Any, v: Any, g: Any, hp: Hyperparameters, c: Coefficients) -> tuple[Any, Any]:
    """The new first and second moment. As differences they take one pass less."""
    if is_small(hp.beta_1):
        m = c.m_scale * m + c.m_weight * g
    elif hp.grad_averaging:
        m += c.m_weight * (g - m)
    else:
        m += g - c.m_decay * m
    if is_small(hp.beta_2):
        # 0 times an infinite v is NaN, as in the fused kernels.
        return m, c.v_scale * v + (c.v_weight * tf.square(g) - c.v_decay * v)
    return m, v + c.v_weight * (tf.square(g) - v)


def direction(m: Any, v: Any, g: Any, hp: Hyperparameters, c: Coefficients) -> Any:
    """The direction d. Terms whose coefficient is 0 are not computed: g^2 may overflow where v does not."""
    numerator = c.c_m * m
    if hp.nu_1 != 1:
        numerator += c.c_g * g
    if hp.nu_2 != 1:
        v = c.c_v * v + c.c_g2 * tf.square(g)
    return numerator / (tf.sqrt(v) + c.epsilon)


def half_norms(w: Any, u: Any, padding: Any | None) -> tuple[Any, Any]:
    """|w| and |u|, both over the square root of 2; rows of padding indices do not count."""
    if padding is not None:
        w, u = (tf.where(padding, tf.zeros_like(x), x) for x in (w, u))
    # l2_loss is half the square of the norm in one pass without a copy.
    return tf.sqrt(tf.nn.l2_loss(w)), tf.sqrt(tf.nn.l2_loss(u))


def trust_ratio(w_norm: Any, u_norm: Any, hp: Hyperparameters, c: Coefficients) -> Any:
    """|w| / |u|, 1 where either norm is 0, then clipped. A factor that both norms have cancels."""
    # Not by their minimum, in which XLA loses a NaN.
    ratio = tf.where((w_norm > 0) & (u_norm > 0), w_norm / u_norm, 1)
    if hp.trust_ratio_min is not None:
        ratio = tf.maximum(ratio, c.trust_ratio_min)
    if hp.trust_ratio_max is not None:
        ratio = tf.minimum(ratio, c.trust_ratio_max)
    return ratio


def to_float32(values: Any) -> Any:
    """float16 and bfloat16 values as float32."""
    return tf.cast(values, tf.float32) if values.dtype in (tf.float16, tf.bfloat16) else values
