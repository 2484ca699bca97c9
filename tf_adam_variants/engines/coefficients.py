"""The coefficients of one step: the scalars of the formula."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, NamedTuple

import keras
import tensorflow as tf

from tf_adam_variants.engines import rounding
from tf_adam_variants.engines.hyperparameters import Hyperparameters

Scalar = Any  # a float64 tensor or a Python number


class Coefficients(NamedTuple):
    """The scalars of one step: `tfav::Coefficients` of custom_ops/adam_math.h, field by field.

        g  <- gradient_scale g
        m  <- m_scale m + m_weight g - m_decay m
        v  <- v_scale v + v_weight g^2 - v_decay v
        d   = (c_m m + c_g g)
              / (sqrt(c_v v + c_g2 g^2) + epsilon)
        u   = d + weight_decay w
        w  <- w - u                           without a trust ratio
        w  <- w - learning_rate r u           with a trust ratio r

    The bias corrections are in the coefficients of d and in epsilon. Without a trust ratio the learning rate
    is in the coefficients of d and in weight_decay, and not used again.
    """

    gradient_scale: Scalar  # for clipping by the global norm
    m_scale: Scalar  # 1 and 1 - beta_1; beta_1 and 0 for a small beta: see `is_small`
    m_decay: Scalar
    m_weight: Scalar  # 1 - beta_1, or 1 without gradient averaging
    v_scale: Scalar
    v_decay: Scalar
    v_weight: Scalar
    c_m: Scalar
    c_g: Scalar
    c_v: Scalar
    c_g2: Scalar
    epsilon: Scalar
    weight_decay: Scalar
    learning_rate: Scalar
    trust_ratio_min: Scalar
    trust_ratio_max: Scalar
    rng_key: Scalar  # below 2^32, of the random numbers that round weights

    @classmethod
    def from_hyperparameters(cls, hp: Hyperparameters, inputs: StepInputs) -> Coefficients:
        """The coefficients of a step, in float64: `tfav::coefficients_of` of custom_ops/coefficients.h."""
        static = StaticCoefficients.from_hyperparameters(hp)
        fixed = static.coefficients
        rate = tf.cast(inputs.learning_rate, tf.float64)
        t = tf.cast(inputs.iterations + 1, tf.float64)
        correction_1, correction_2 = _bias_corrections(static, t)
        # With nu_2 = 1, numerator and denominator times sqrt(correction_2), so that v is used as it is.
        root = tf.sqrt(correction_2) if hp.nu_2 == 1 else 1.0
        factor = 1.0 if static.trust_ratio else rate
        scale, seed = inputs.gradient_scale, inputs.rounding_seed
        peak = static.decay_peak
        return fixed._replace(
            gradient_scale=1.0 if scale is None else scale,
            c_m=root * (factor * fixed.c_m / correction_1),
            c_g=root * (factor * fixed.c_g) if fixed.c_g else 0.0,  # not computed, for time
            c_v=1.0 if hp.nu_2 == 1 else fixed.c_v / correction_2,
            epsilon=root * fixed.epsilon,
            weight_decay=rate / peak * fixed.weight_decay if peak else fixed.weight_decay,
            learning_rate=rate,
            rng_key=0.0 if seed is None else rounding.step_key(seed, inputs.iterations),
        )

    @classmethod
    def over_learning_rate(cls, hp: Hyperparameters, inputs: StepInputs) -> Coefficients:
        """The coefficients of u / learning_rate: w <- w - learning_rate u.

        With a trust ratio these are the coefficients of the step itself. Without one they are computed
        without a division by the learning rate, which may be 0.
        """
        c = cls.from_hyperparameters(dataclasses.replace(hp, trust_ratio=True), inputs)
        if hp.trust_ratio or not hp.weight_decay:
            return c
        return c._replace(weight_decay=c.weight_decay / (_decay_peak(hp) or c.learning_rate))

    def cast(self, dtype: tf.DType) -> Coefficients:
        """The same scalars in another type."""
        return Coefficients(*(tf.cast(x, dtype) if tf.is_tensor(x) else tf.constant(x, dtype) for x in self))


def is_small(beta: float) -> bool:
    """Whether a moment with this beta is computed as beta m + (1 - beta) g.

    A larger beta uses m + (1 - beta) (g - m), so that a constant gradient is a fixed point whatever
    1 - beta rounds to; but the rounding error of the old m is then kept, which a small beta would scale
    down. `torch.lerp` draws the same line at 0.5.
    """
    return beta < 0.5


def _bias_corrections(static: StaticCoefficients, t: Any) -> Any:
    """1 - beta_1^t and 1 - beta_2^t, without the cancellation that 1 - pow(beta, t) suffers for small t.

    This is -expm1(t log(beta)), which TFLite cannot convert: 1 - exp(-2 x) = 2 tanh(x) / (1 + tanh(x)). Both
    at once, and by functions rather than operators: eager steps take less time.
    """
    halves = tf.constant((-0.5 * static.log_beta_1, -0.5 * static.log_beta_2), t.dtype)
    tanh = tf.tanh(tf.multiply(t, halves))  # 1, of infinity, without a bias correction
    return tf.unstack(tf.realdiv(tf.multiply(tanh, 2.0), tf.add(tanh, 1.0)))


class StepInputs(NamedTuple):
    """The inputs of a step's coefficients besides the hyperparameters, as tensors."""

    iterations: Any  # how many updates there have been, int64
    learning_rate: Any
    gradient_scale: Any = None  # for clipping by the global norm, float64; None: 1
    rounding_seed: Any = None  # uint32; None: nothing is rounded at random


class StaticCoefficients(NamedTuple):
    """What is the same in every step: `tfav::StaticCoefficients` of custom_ops/coefficients.h."""

    coefficients: Coefficients  # as it is where the bias corrections and the learning rate are 1
    log_beta_1: float  # -inf without a bias correction
    log_beta_2: float
    decay_peak: float  # weight_decay is multiplied by learning_rate / decay_peak; 0: times 1
    trust_ratio: bool  # whether there is one: no coefficient has the learning rate in it

    @classmethod
    def from_hyperparameters(cls, hp: Hyperparameters) -> StaticCoefficients:
        """The fields as Python numbers."""
        low, high = hp.trust_ratio_min, hp.trust_ratio_max
        coefficients = Coefficients(
            gradient_scale=1.0,
            m_scale=hp.beta_1 if is_small(hp.beta_1) else 1.0,
            m_decay=0.0 if is_small(hp.beta_1) else 1 - hp.beta_1,
            m_weight=1 - hp.beta_1 if hp.grad_averaging else 1.0,
            v_scale=hp.beta_2 if is_small(hp.beta_2) else 1.0,
            v_decay=0.0 if is_small(hp.beta_2) else 1 - hp.beta_2,
            v_weight=1 - hp.beta_2,
            c_m=hp.nu_1,
            c_g=1 - hp.nu_1,
            c_v=hp.nu_2,
            c_g2=1 - hp.nu_2,
            epsilon=hp.epsilon,
            weight_decay=hp.weight_decay or 0.0,
            learning_rate=1.0,
            trust_ratio_min=0.0 if low is None else low,
            trust_ratio_max=math.inf if high is None else high,
            rng_key=0.0,
        )
        log_beta_1, log_beta_2 = (
            math.log(beta) if beta and hp.bias_correction else -math.inf for beta in (hp.beta_1, hp.beta_2)
        )
        return cls(coefficients, log_beta_1, log_beta_2, _decay_peak(hp), hp.trust_ratio)


def _decay_peak(hp: Hyperparameters) -> float:
    """What the learning rate is divided by to give the factor of the weight decay; 0: the factor is 1."""
    if not hp.weight_decay or hp.trust_ratio or hp.weight_decay_mode == "independent":
        return 0.0
    if hp.weight_decay_mode == "learning_rate":
        return 1.0
    # Rounded as Keras rounds the learning rate, so that at the peak their quotient is exactly 1.
    floatx = tf.as_dtype(keras.config.floatx()).as_numpy_dtype
    return float(floatx(hp.peak_learning_rate))
