"""The description of one step: its scalars, and the variables that take it."""

from __future__ import annotations

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
    def of(cls, update: Update, iterations: Any, learning_rate: Any, rounding_seed: Any = None) -> Step:
        """The step after so many iterations, in float64."""
        learning_rate = tf.cast(learning_rate, tf.float64)
        correction_1 = correction_2 = tf.ones((), tf.float64)
        if update.bias_correction:
            t = tf.cast(iterations + 1, tf.float64)
            correction_1 = _bias_correction(update.beta_1, t)
            correction_2 = _bias_correction(update.beta_2, t)
        # With nu_2 = 1, numerator and denominator times sqrt(correction_2), so that v is used as it is.
        root = tf.sqrt(correction_2) if update.nu_2 == 1 else 1.0
        factor = 1.0 if update.trust_ratio else learning_rate
        low, high = update.trust_ratio_min, update.trust_ratio_max
        return cls(
            gradient_scale=1.0,
            momentum_kept=update.beta_1 if is_small(update.beta_1) else 1.0,
            momentum_forgotten=0.0 if is_small(update.beta_1) else 1 - update.beta_1,
            beta_3=1 - update.beta_1 if update.grad_averaging else 1.0,
            velocity_kept=update.beta_2 if is_small(update.beta_2) else 1.0,
            velocity_forgotten=0.0 if is_small(update.beta_2) else 1 - update.beta_2,
            one_minus_beta_2=1 - update.beta_2,
            momentum_coefficient=root * (factor * update.nu_1 / correction_1),
            gradient_coefficient=root * (factor * (1 - update.nu_1)),
            velocity_coefficient=1.0 if update.nu_2 == 1 else update.nu_2 / correction_2,
            squared_gradient_coefficient=1 - update.nu_2,
            epsilon=root * update.epsilon,
            weight_decay=_weight_decay(update, learning_rate),
            learning_rate=learning_rate,
            trust_ratio_min=0.0 if low is None else low,
            trust_ratio_max=math.inf if high is None else high,
            rounding_key=0.0 if rounding_seed is None else _rounding.step_key(rounding_seed, iterations),
        )

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


def _bias_correction(beta: float, t: Any) -> Any:
    """1 - beta^t, without the cancellation that 1 - pow(beta, t) suffers for small t."""
    return -tf.math.expm1(t * math.log(beta)) if beta else tf.ones_like(t)


def _weight_decay(update: Update, learning_rate: Any) -> Scalar:
    """The coefficient of w in u."""
    if not update.weight_decay:
        return 0.0
    if update.trust_ratio or update.weight_decay_mode == "independent":
        return update.weight_decay
    if update.weight_decay_mode == "learning_rate":
        return learning_rate * update.weight_decay
    # Rounded as Keras rounds the learning rate, so that at the peak their quotient is exactly 1.
    floatx = tf.as_dtype(keras.config.floatx()).as_numpy_dtype
    return learning_rate / float(floatx(update.peak_learning_rate)) * update.weight_decay


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
