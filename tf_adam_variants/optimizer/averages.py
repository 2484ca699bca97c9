"""Exponential moving averages of the weights (`use_ema`), on one replica or several."""

from __future__ import annotations

import functools
from typing import Any

import tensorflow as tf

from tf_adam_variants.optimizer import replicas
from tf_adam_variants.utils.variables import tf_variable


def update(optimizer: Any, variables: list[Any]) -> None:
    """Update all averages, and every `ema_overwrite_frequency` steps overwrite these variables by them."""
    replicas.merge(
        functools.partial(_update, optimizer, variables=variables), optimizer._distribution_strategy
    )


def _update(optimizer: Any, strategy: Any, variables: list[Any]) -> None:
    iterations = tf.convert_to_tensor(optimizer.iterations)
    first = tf.equal(iterations, 0)

    def move(average: Any, variable: Any) -> None:
        # In the type of the average: in bfloat16, 0.999 is 1.
        one, part = (tf.constant(x, average.dtype) for x in (1.0, 1 - optimizer.ema_momentum))
        value = tf.cast(variable.value(), average.dtype)
        average.assign(average + tf.where(first, one, part) * (value - average))

    pairs = zip(optimizer._trainable_variables, optimizer._model_variables_moving_average, strict=True)
    for variable, average in pairs:
        if average is not None:
            strategy.extended.update(average.value, move, args=(tf_variable(variable),), group=False)
    if frequency := optimizer.ema_overwrite_frequency:
        due = tf.equal((iterations + 1) % frequency, 0)
        tf.cond(due, lambda: overwrite(optimizer, strategy, variables), lambda: None)


def overwrite(optimizer: Any, strategy: Any, variables: list[Any]) -> None:
    """Overwrite each variable by its average, but none that has no average."""
    for variable in variables:
        average = optimizer._model_variables_moving_average[optimizer._get_variable_index(variable)]
        if average is not None:
            strategy.extended.update(
                tf_variable(variable), lambda v, a: v.assign(tf.cast(a, v.dtype)), args=(average.value,)
            )
