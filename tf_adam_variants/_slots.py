"""Slots: the moments of each variable, by Keras's names and in the type of the arithmetic."""

from __future__ import annotations

from typing import Any

import keras
import tensorflow as tf

from tf_adam_variants import _variables

# Lists with one entry a variable, in the order in which they were added. The first three are Keras's.
_BY_VARIABLE = (
    *("_trainable_variables", "_model_variables_moving_average", "_accumulated_gradients"),
    *("_momentums", "_velocities", "_velocity_hats"),
)


def by_variable(optimizer: keras.optimizers.Optimizer) -> dict[str, list[Any]]:
    """The lists of variables and of slots that an optimizer has, by the names of its attributes."""
    return {name: list(getattr(optimizer, name)) for name in _BY_VARIABLE if hasattr(optimizer, name)}


def check_types(variables: list[Any], name: str) -> None:
    """Raise a ValueError for a variable that has no real floating type."""
    for variable in variables:
        if not tf.as_dtype(variable.dtype).is_floating:
            raise ValueError(
                f"{name} updates variables of real floating types. "
                f"Received: {_variables.path(variable)} of type {variable.dtype}"
            )


def add(optimizer: keras.optimizers.Optimizer, variables: list[Any], *names: str) -> list[list[Any]]:
    """Make slots of these names, all of the first variable before those of the second, as Keras does.

    Returns:
        For each name the slots of all variables. None for a variable that its gradient overwrites, as float8
        scales.
    """
    made = [[_add(optimizer, variable, name) for name in names] for variable in variables]
    return [[row[i] for row in made] for i in range(len(names))]


def _add(optimizer: keras.optimizers.Optimizer, variable: Any, name: str) -> Any:
    if getattr(variable, "overwrite_with_gradient", False):
        return None
    dtype = _variables.state_dtype(variable)
    if dtype == tf.as_dtype(variable.dtype):
        return optimizer.add_variable_from_reference(variable, name=name)
    with tf.distribute.get_strategy().extended.colocate_vars_with(_variables.tf_variable(variable)):
        return optimizer.add_variable(
            shape=variable.shape,
            dtype=dtype.name,
            name=f"{_variables.path(variable).replace('/', '_')}_{name}",
        )
