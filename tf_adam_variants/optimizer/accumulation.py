"""Gradient accumulation (`gradient_accumulation_steps`), on one replica or several."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import tensorflow as tf


def is_due(optimizer: Any) -> Any:
    """Whether this step updates the weights; the others only add to the sums."""
    steps = optimizer.gradient_accumulation_steps
    return tf.equal((optimizer._iterations.value + 1) % steps, 0)


def accumulate(
    optimizer: Any,
    strategy: Any,
    grads: list[Any],
    _: None,
    variables: list[Any],
    lazy_indices: frozenset[int],
) -> None:
    """Add gradients to the sums, or step with the mean if it is due. Runs once for all replicas."""
    indices = [optimizer._get_variable_index(v) for v in variables]
    sums = [optimizer._accumulated_gradients[i].value for i in indices]
    is_lazy = optimizer.sparse_update == "lazy"
    if is_lazy:
        dense = {*indices} - lazy_indices
        flags = optimizer._dense_sums.add([i in dense for i in range(len(optimizer._trainable_variables))])

    def on_each(function: Callable[[Any, Any], Any]) -> list[Any]:
        pairs = zip(sums, grads, strict=True)
        return [strategy.extended.update(total, function, args=(g,)) for total, g in pairs]

    def step() -> None:
        means = on_each(lambda total, g: (g + total) / optimizer.gradient_accumulation_steps)
        all_rows = {i: flags[i] for i in lazy_indices}
        optimizer._step(strategy, means, optimizer.learning_rate, variables, all_rows)
        if is_lazy:
            optimizer._dense_sums.assign(strategy, tf.zeros_like(flags))
        for total in optimizer._accumulated_gradients:  # all of them, as in Keras
            if total is not None:
                strategy.extended.update(
                    total.value, lambda v: v.assign(tf.zeros(v.shape, v.dtype)), group=False
                )

    def add() -> None:
        on_each(lambda total, g: total.assign(total + g))  # faster than `assign_add`, measured
        if is_lazy:
            optimizer._dense_sums.assign(strategy, flags)

    tf.cond(is_due(optimizer), step, add)


def overwrite(optimizer: Any, variable: Any, gradient: Any) -> None:
    """Set a variable that its gradient overwrites; accumulating, to the largest gradient, if it is due."""
    if not optimizer.gradient_accumulation_steps:
        variable.assign(gradient)
        return
    total = optimizer._accumulated_gradients[optimizer._get_variable_index(variable)]
    largest = tf.maximum(tf.cast(gradient, total.value.dtype), total.value)
    due = is_due(optimizer)
    variable.assign(tf.where(due, tf.cast(largest, variable.dtype), tf.convert_to_tensor(variable)))
    total.assign(tf.where(due, tf.zeros_like(largest), largest))
