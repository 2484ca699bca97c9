"""The description of one step: its scalars, and the variables that take it."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, NamedTuple

import keras
import tensorflow as tf

from tf_adam_variants import _rounding
from tf_adam_variants._update import Update

Scalar = Any  # a float64 tensor or a Python number


class Step(NamedTuple):
    """The scalars of one step: `tfav::Step` of custom_ops/adam_math.h, field by field.

        g  <- gradient_scale g
        m  <- momentum_kept m + beta_3 g - momentum_forgotten m
        v  <- velocity_kept v + one_minus_beta_2 g^2 - velocity_forgotten v
        d   = (momentum_coefficient m + gradient_coefficient g)
              / (sqrt(velocity_coefficient v + squared_gradient_coefficient g^2) + epsilon)
        u   = d + weight_decay w
        w  <- w - u                           without a trust ratio
        w  <- w - learning_rate r u           with a trust ratio r

    The bias corrections are in the coefficients of d and in epsilon. Without a trust ratio the learning rate
    is in the coefficients of d and in weight_decay, and not used again.
    """

    gradient_scale: Scalar  # for clipping by the global norm
    momentum_kept: Scalar  # 1 and 1 - beta_1; beta_1 and 0 for a small beta
    momentum_forgotten: Scalar
    beta_3: Scalar  # 1 - beta_1, or 1 without gradient averaging (the name is apex's)
    velocity_kept: Scalar
    velocity_forgotten: Scalar
    one_minus_beta_2: Scalar
    momentum_coefficient: Scalar
    gradient_coefficient: Scalar
    velocity_coefficient: Scalar
    squared_gradient_coefficient: Scalar
    epsilon: Scalar
    weight_decay: Scalar
    learning_rate: Scalar
    trust_ratio_min: Scalar
    trust_ratio_max: Scalar
    rounding_key: Scalar  # below 2^32, of the random numbers that round weights

    @classmethod
    def of(cls, update: Update, inputs: StepInputs) -> Step:
        """An update's step, in float64: `tfav::step_of` of custom_ops/step_scalars.h."""
        constants = Constants.of(update)
        step = constants.step
        rate = tf.cast(inputs.learning_rate, tf.float64)
        t = tf.cast(inputs.iterations + 1, tf.float64)
        correction_1 = _bias_correction(constants.log_beta_1, t)
        correction_2 = _bias_correction(constants.log_beta_2, t)
        # With nu_2 = 1, numerator and denominator times sqrt(correction_2), so that v is used as it is.
        root = tf.sqrt(correction_2) if update.nu_2 == 1 else 1.0
        factor = 1.0 if constants.trust_ratio else rate
        scale, seed = inputs.gradient_scale, inputs.rounding_seed
        peak = constants.decay_peak
        return step._replace(
            gradient_scale=1.0 if scale is None else scale,
            momentum_coefficient=root * (factor * step.momentum_coefficient / correction_1),
            gradient_coefficient=root * (factor * step.gradient_coefficient),
            velocity_coefficient=1.0 if update.nu_2 == 1 else step.velocity_coefficient / correction_2,
            epsilon=root * step.epsilon,
            weight_decay=rate / peak * step.weight_decay if peak else step.weight_decay,
            learning_rate=rate,
            rounding_key=0.0 if seed is None else _rounding.step_key(seed, inputs.iterations),
        )

    @classmethod
    def over_learning_rate(cls, update: Update, inputs: StepInputs) -> Step:
        """The step with u over the learning rate: d + weight_decay w, w <- w - learning_rate u.

        It is the update's own where that has a trust ratio, and where it has none not the quotient, which
        a learning rate of 0 does not have.
        """
        step = cls.of(dataclasses.replace(update, trust_ratio=True), inputs)
        if update.trust_ratio or not update.weight_decay:
            return step
        return step._replace(weight_decay=step.weight_decay / (_decay_peak(update) or step.learning_rate))

    def cast(self, dtype: tf.DType) -> Step:
        """The same scalars in another type."""
        return Step(*(tf.cast(x, dtype) if tf.is_tensor(x) else tf.constant(x, dtype) for x in self))


def is_small(beta: float) -> bool:
    """Whether a moment with this beta is made as a sum, beta m + (1 - beta) g.

    Others are made as a difference, m + (1 - beta) (g - m), so that a constant gradient is a fixed point
    whatever 1 - beta rounds to. The rounding is then that of the old moment, of which a small beta keeps
    less.
    """
    return beta < 0.5


def _bias_correction(log_beta: float, t: Any) -> Any:
    """1 - beta^t, without the cancellation that 1 - pow(beta, t) suffers for small t."""
    return tf.ones_like(t) if log_beta == -math.inf else -tf.math.expm1(t * log_beta)


class StepInputs(NamedTuple):
    """What the scalars of a step are made from besides the update, as tensors."""

    iterations: Any  # how many updates there have been, int64
    learning_rate: Any
    gradient_scale: Any = None  # for clipping by the global norm, float64; None: 1
    rounding_seed: Any = None  # uint32; None: nothing is rounded at random


class Constants(NamedTuple):
    """What is the same in every step of an update: `tfav::Constants` of custom_ops/step_scalars.h."""

    step: Step  # as it is where the bias corrections and the learning rate are 1
    log_beta_1: float  # -inf without a bias correction
    log_beta_2: float
    decay_peak: float  # the weight decay is that of `step` times learning_rate / decay_peak; 0: times 1
    trust_ratio: bool  # whether there is one: no coefficient has the learning rate in it

    @classmethod
    def of(cls, update: Update) -> Constants:
        """Those of this update, as Python numbers."""
        low, high = update.trust_ratio_min, update.trust_ratio_max
        step = Step(
            gradient_scale=1.0,
            momentum_kept=update.beta_1 if is_small(update.beta_1) else 1.0,
            momentum_forgotten=0.0 if is_small(update.beta_1) else 1 - update.beta_1,
            beta_3=1 - update.beta_1 if update.grad_averaging else 1.0,
            velocity_kept=update.beta_2 if is_small(update.beta_2) else 1.0,
            velocity_forgotten=0.0 if is_small(update.beta_2) else 1 - update.beta_2,
            one_minus_beta_2=1 - update.beta_2,
            momentum_coefficient=update.nu_1,
            gradient_coefficient=1 - update.nu_1,
            velocity_coefficient=update.nu_2,
            squared_gradient_coefficient=1 - update.nu_2,
            epsilon=update.epsilon,
            weight_decay=update.weight_decay or 0.0,
            learning_rate=1.0,
            trust_ratio_min=0.0 if low is None else low,
            trust_ratio_max=math.inf if high is None else high,
            rounding_key=0.0,
        )
        log_beta_1, log_beta_2 = (
            math.log(beta) if beta and update.bias_correction else -math.inf
            for beta in (update.beta_1, update.beta_2)
        )
        return cls(step, log_beta_1, log_beta_2, _decay_peak(update), update.trust_ratio)


def _decay_peak(update: Update) -> float:
    """What the learning rate is divided by to give the factor of the weight decay; 0: the factor is 1."""
    if not update.weight_decay or update.trust_ratio or update.weight_decay_mode == "independent":
        return 0.0
    if update.weight_decay_mode == "learning_rate":
        return 1.0
    # Rounded as Keras rounds the learning rate, so that at the peak their quotient is exactly 1.
    floatx = tf.as_dtype(keras.config.floatx()).as_numpy_dtype
    return float(floatx(update.peak_learning_rate))


class Parameter(NamedTuple):
    """One variable of a step, on one device, with its slots and its gradient.

    The variable and its slots are TensorFlow's variables or, where a step is for some of their rows, views of
    those (`_rows.Rows`).
    """

    variable: Any
    momentum: Any  # the type of the slots is the type of the arithmetic
    velocity: Any
    gradient: Any  # a tensor; slices for an engine that takes them
    weight_decay: bool  # False: excluded from it
    layer_adaptation: bool
    velocity_hat: Any | None = None  # with amsgrad
    master_weight: Any | None = (
        None  # of a half-type variable: what the step updates; the variable is its rounding
    )
    stream: int | None = (
        None  # of the random numbers that a half-type variable is rounded by; None: to nearest
    )
    ids: Any | None = None  # of the rows that are updated, where the tensors are views of rows
    sentinels: Any | None = None  # which rows have a sentinel id, and values that mean nothing


class Workload(NamedTuple):
    """Variables of one type, as far as an engine has to know them to say whether it can update them."""

    dtype: tf.DType
    sparse: bool  # whether their gradients are slices
    devices: frozenset[tuple[str, ...]]  # of all the optimizer's variables: those of each one's replicas
