"""Slots: the moments of each variable, by Keras's names and in the type of the arithmetic; master weights."""

from __future__ import annotations

import random
from typing import Any

import keras
import tensorflow as tf

from tf_adam_variants import _variables, _xla

# The attributes with a list of slots, one a variable. The first two are Keras's.
_LISTS = (
    *("_model_variables_moving_average", "_accumulated_gradients"),
    *("_momentums", "_velocities", "_velocity_hats", "_master_weights"),
)


def indices(optimizer: keras.optimizers.Optimizer) -> dict[int, int]:
    """The index of the variable that a slot belongs to, by the slot's id."""
    lists = [getattr(optimizer, name, ()) for name in _LISTS]
    return {id(slot): i for slots in lists for i, slot in enumerate(slots) if slot is not None}


def check_types(variables: list[Any], name: str) -> None:
    """Raise a ValueError for a variable that has no real floating type."""
    for variable in variables:
        if not tf.as_dtype(variable.dtype).is_floating:
            raise ValueError(
                f"{name} updates variables of real floating types. "
                f"Received: {_variables.path(variable)} of type {variable.dtype}"
            )


def check_some_are_half(variables: list[Any], option: str) -> None:
    """Raise a ValueError for variables that an option for half types can do nothing for."""
    if not any(map(_variables.is_half, variables)):
        types = ", ".join(sorted({tf.as_dtype(variable.dtype).name for variable in variables}))
        raise ValueError(
            f"`{option}=True` is for float16 and bfloat16 variables. Received: variables of type {types}, "
            "which are updated in full precision as they are (a mixed_... policy makes such). Leave it out"
        )


def add(optimizer: keras.optimizers.Optimizer, variables: list[Any], *names: str) -> list[list[Any]]:
    """Make slots of these names, all of the first variable before those of the second, as Keras does.

    Returns:
        For each name the slots of all variables. None for a variable that its gradient overwrites, as float8
        scales.
    """
    made = [[_add(optimizer, variable, name) for name in names] for variable in variables]
    return [[row[i] for row in made] for i in range(len(names))]


def add_master_weights(optimizer: keras.optimizers.Optimizer, variables: list[Any]) -> list[Any]:
    """Make a float32 copy of each variable of a half type; None for the others.

    What XLA compiles cannot read a variable to make another. There it is zero until the first step, which
    takes over elements that are not the rounding of their master weight.
    """

    def initializer(variable: Any) -> Any:
        if _xla.is_compiling():
            return "zeros"
        return lambda shape, dtype: tf.cast(_variables.tf_variable(variable), dtype)

    return [
        _add(optimizer, variable, "master_weight", initializer(variable))
        if _variables.is_half(variable)
        else None
        for variable in variables
    ]


def add_rounding_seed(optimizer: keras.optimizers.Optimizer) -> Any:
    """Make a variable with a seed that is drawn from Python's `random`, as Keras's own seeds are."""
    seed = random.getrandbits(32)
    return optimizer.add_variable(
        shape=(),
        initializer=lambda shape, dtype: tf.constant(seed, dtype),
        dtype="uint32",
        aggregation="only_first_replica",
        name="rounding_seed",
    )


def add_averages(optimizer: keras.optimizers.Optimizer, variables: list[Any]) -> list[Any]:
    """Make the averages of variables that were added later, equal to these as after Keras's first step."""
    averages = [
        None
        if getattr(variable, "overwrite_with_gradient", False)
        else optimizer.add_variable_from_reference(variable, name="average")
        for variable in variables
    ]
    with tf.init_scope():
        for variable, average in zip(variables, averages, strict=True):
            if average is not None:
                average.assign(variable)
    return averages


def _add(optimizer: keras.optimizers.Optimizer, variable: Any, name: str, initializer: Any = "zeros") -> Any:
    if getattr(variable, "overwrite_with_gradient", False):
        return None
    if not _variables.is_half(variable):
        return optimizer.add_variable_from_reference(variable, name=name)
    return in_type_of_arithmetic(optimizer, variable, name, initializer)


def in_type_of_arithmetic(
    optimizer: keras.optimizers.Optimizer, variable: Any, name: str, initializer: Any = "zeros"
) -> Any:
    """Make a variable of the optimizer's like this one, in the type of its moments."""
    with tf.distribute.get_strategy().extended.colocate_vars_with(_variables.tf_variable(variable)):
        return optimizer.add_variable(
            shape=variable.shape,
            initializer=initializer,
            dtype=_variables.state_dtype(variable).name,
            name=f"{_variables.path(variable).replace('/', '_')}_{name}",
        )
