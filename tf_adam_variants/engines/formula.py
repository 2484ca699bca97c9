"""The formula in plain TensorFlow: any variable, in any context, XLA's too.

    m  <- m + beta_3 g - (1 - beta_1) m           v <- v + (1 - beta_2) (g^2 - v)      (see `_step.is_small`)
    u   = (momentum_coefficient m + gradient_coefficient g)
          / (sqrt(velocity_coefficient v + squared_gradient_coefficient g^2) + epsilon) + weight_decay w
    w  <- w - u, or with a trust ratio w - learning_rate r u

The coefficients are those of `_step.Step`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import tensorflow as tf

from tf_adam_variants import _rounding
from tf_adam_variants._step import Parameter, Step, StepInputs, Workload, is_small
from tf_adam_variants._update import Update

takes_slices = False


def reason_against(update: Update, workload: Workload) -> str:
    """Nothing: it can take every step."""
    return ""


def global_norm(gradients: Sequence[Any], device: str = "") -> Any:
    """The norm of all gradients together, in float64; each one's own is in its type, float32 at least."""
    values = [g.values if isinstance(g, tf.IndexedSlices) else tf.convert_to_tensor(g) for g in gradients]
    halves = [tf.cast(tf.nn.l2_loss(widened(v)), tf.float64) for v in values]  # of the squares
    return tf.sqrt(2 * tf.add_n(halves))


def take(parameters: Sequence[Parameter], update: Update, inputs: StepInputs, exact: bool) -> None:
    """Update variables and slots, each by a few operations."""
    step = Step.of(update, inputs)
    rounding_key = step.rounding_key  # float32 would not hold it
    step = step.cast(parameters[0].momentum.dtype)
    for parameter in parameters:
        _take(parameter, update, step, rounding_key)


class Computed(NamedTuple):
    """What a step makes of a variable, before anything is written."""

    w: Any  # the weights that it begins with
    momentum: Any
    velocity: Any
    velocity_hat: Any | None
    u: Any  # the direction and the weight decay


def computed(p: Parameter, update: Update, step: Step) -> Computed:
    """New moments and u."""
    g = tf.cast(p.gradient, p.momentum.dtype)
    if tf.is_tensor(step.gradient_scale):
        g *= step.gradient_scale
    w = weights(p)
    m, v = moments(p.momentum.value(), p.velocity.value(), g, update, step)
    v_hat = None if p.velocity_hat is None else tf.maximum(v, p.velocity_hat.value())
    u = direction(m, v if v_hat is None else v_hat, g, update, step)
    if p.weight_decay and update.weight_decay:
        u += step.weight_decay * w
    return Computed(w, m, v, v_hat, u)


def _take(p: Parameter, update: Update, step: Step, rounding_key: Any) -> None:
    w, m, v, v_hat, u = computed(p, update, step)
    p.momentum.assign(m)
    p.velocity.assign(v)
    if p.velocity_hat is not None:
        p.velocity_hat.assign(v_hat)
    if update.trust_ratio:
        if p.layer_adaptation:
            u *= step.learning_rate * trust_ratio(*half_norms(w, u, p.sentinels), update, step)
        else:
            u *= step.learning_rate
    if p.variable.dtype == p.momentum.dtype:
        p.variable.assign_sub(u)
    elif p.stream is not None:
        elements = _rounding.elements(p.variable.shape, p.ids)
        p.variable.assign(_rounding.at_random(w - u, p.variable.dtype, rounding_key, p.stream, elements))
    else:
        p.variable.assign(tf.cast(w - u, p.variable.dtype))
        if p.master_weight is not None:
            p.master_weight.assign(w - u)


def weights(p: Parameter) -> Any:
    """The weights that the step begins with, in the type of the moments.

    They are the master weights, but for elements of the variable that are not the rounding of theirs: those
    were assigned since the last step, by loading, by an average or by a constraint.
    """
    w = tf.cast(p.variable.value(), p.momentum.dtype)
    if p.master_weight is None:
        return w
    master = p.master_weight.value()
    return tf.where(tf.cast(master, p.variable.dtype) == p.variable.value(), master, w)


def moments(m: Any, v: Any, g: Any, update: Update, step: Step) -> tuple[Any, Any]:
    """The new first and second moment. As differences they take one pass less."""
    if is_small(update.beta_1):
        m = step.momentum_kept * m + step.beta_3 * g
    elif update.grad_averaging:
        m += step.beta_3 * (g - m)
    else:
        m += g - step.momentum_forgotten * m
    if is_small(update.beta_2):
        # 0 times an infinite v is NaN, as in the compiled op.
        return m, step.velocity_kept * v + (
            step.one_minus_beta_2 * tf.square(g) - step.velocity_forgotten * v
        )
    return m, v + step.one_minus_beta_2 * (tf.square(g) - v)


def direction(m: Any, v: Any, g: Any, update: Update, step: Step) -> Any:
    """The direction d. Terms whose coefficient is 0 are not computed: g^2 may overflow where v does not."""
    numerator = step.momentum_coefficient * m
    if update.nu_1 != 1:
        numerator += step.gradient_coefficient * g
    if update.nu_2 != 1:
        v = step.velocity_coefficient * v + step.squared_gradient_coefficient * tf.square(g)
    return numerator / (tf.sqrt(v) + step.epsilon)


def half_norms(w: Any, u: Any, sentinels: Any | None) -> tuple[Any, Any]:
    """|w| and |u|, both over the square root of 2; rows of sentinel ids do not count."""
    if sentinels is not None:
        w, u = (tf.where(sentinels, tf.zeros_like(x), x) for x in (w, u))
    # l2_loss is half the square of the norm in one pass without a copy.
    return tf.sqrt(tf.nn.l2_loss(w)), tf.sqrt(tf.nn.l2_loss(u))


def trust_ratio(w_norm: Any, u_norm: Any, update: Update, step: Step) -> Any:
    """|w| / |u|, 1 where either norm is 0, then clipped. A factor that both norms have cancels."""
    # Not by their minimum, in which XLA loses a NaN.
    ratio = tf.where((w_norm > 0) & (u_norm > 0), w_norm / u_norm, 1)
    if update.trust_ratio_min is not None:
        ratio = tf.maximum(ratio, step.trust_ratio_min)
    if update.trust_ratio_max is not None:
        ratio = tf.minimum(ratio, step.trust_ratio_max)
    return ratio


def norms(parameters: Sequence[Parameter], update: Update, inputs: StepInputs) -> Any:
    """|w|, |u| and the trust ratio of a step that is about to be taken, in float64: [variables, 3].

    u is what the learning rate is a factor of. The ratio of an update without one is |w| / |u|.
    """
    step = Step.over_learning_rate(update, inputs)
    step = step.cast(parameters[0].momentum.dtype)
    rows = []
    for p in parameters:
        c = computed(p, update, step)
        w_norm, u_norm = half_norms(c.w, c.u, p.sentinels)
        adapts = p.layer_adaptation or not update.trust_ratio
        ratio = trust_ratio(w_norm, u_norm, update, step) if adapts else tf.ones_like(w_norm)
        rows.append(tf.cast(tf.stack([math.sqrt(2) * w_norm, math.sqrt(2) * u_norm, ratio]), tf.float64))
    return tf.stack(rows)


def widened(values: Any) -> Any:
    """Half types as float32."""
    return tf.cast(values, tf.float32) if values.dtype in (tf.float16, tf.bfloat16) else values
