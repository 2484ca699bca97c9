"""Slots: the moments of each variable, by Keras's names and in the type of the arithmetic; master weights."""

from __future__ import annotations

import random
from typing import Any

import keras
import tensorflow as tf

from tf_adam_variants.utils import internals
from tf_adam_variants.utils.variables import is_half, path_of, state_dtype, tf_variable


def check_types(variables: list[Any], name: str) -> None:
    """Raise a ValueError for a variable that has no real floating type."""
    for variable in variables:
        if not tf.as_dtype(variable.dtype).is_floating:
            raise ValueError(
                f"{name} updates variables of real floating types. "
                f"Received: {path_of(variable)} of type {variable.dtype}"
            )


def check_half_options(optimizer: keras.optimizers.Optimizer, variables: list[Any]) -> None:
    """Raise a ValueError for an option for half precision, where no variable is of half precision."""
    for option in ("master_weights", "stochastic_rounding"):
        if getattr(optimizer, option) and not any(map(is_half, variables)):
            types = ", ".join(sorted({tf.as_dtype(variable.dtype).name for variable in variables}))
            raise ValueError(
                f"`{option}=True` is for float16 and bfloat16 variables. Received: variables of type "
                f"{types}, which are updated in full precision as they are (a mixed_... policy makes such). "
                "Leave it out"
            )


def create(optimizer: Any, new: list[Any]) -> None:
    """Create the slots of new variables in the order of Keras's optimizers: checkpoints rely on it."""
    lists = dict(zip(("_momentums", "_velocities"), add(optimizer, new, "momentum", "velocity"), strict=True))
    if optimizer.amsgrad:
        (lists["_velocity_hats"],) = add(optimizer, new, "velocity_hat")
    if optimizer.master_weights:
        lists["_master_weights"] = add_master_weights(optimizer, new)
    for name, created in lists.items():
        if hasattr(optimizer, name):
            getattr(optimizer, name).extend(created)
        else:
            setattr(optimizer, name, created)
    if optimizer.stochastic_rounding and not hasattr(optimizer, "_rounding_seed"):
        optimizer._rounding_seed = add_rounding_seed(optimizer)


def build_on_more(optimizer: Any, new: list[Any]) -> None:
    """What Keras's `build` does, for variables that are added later."""
    first = len(optimizer._trainable_variables)
    for i, variable in enumerate(new, first):
        optimizer._trainable_variables_indices[optimizer._var_key(variable)] = i
    optimizer._trainable_variables.extend(new)
    if optimizer.use_ema:
        optimizer._model_variables_moving_average.extend(add_averages(optimizer, new))
    if optimizer.gradient_accumulation_steps:
        optimizer._accumulated_gradients.extend(
            optimizer.add_variable_from_reference(variable, name="gradient_accumulator") for variable in new
        )


def add(optimizer: keras.optimizers.Optimizer, variables: list[Any], *names: str) -> list[list[Any]]:
    """Create slots of these names: all of the first variable, then those of the second, as Keras does.

    Returns:
        For each name the slots of all variables. None for a variable that its gradient overwrites, as float8
        scales.
    """
    rows = [[_add(optimizer, variable, name) for name in names] for variable in variables]
    return [[row[i] for row in rows] for i in range(len(names))]


def add_master_weights(optimizer: keras.optimizers.Optimizer, variables: list[Any]) -> list[Any]:
    """Create a float32 copy of each half-precision variable; None for the others.

    XLA cannot initialise a variable from another. Under XLA the copy is zero until the first step, which
    replaces elements that do not round to their weight.
    """

    def initializer(variable: Any) -> Any:
        if internals.is_xla_compiling():
            return "zeros"
        return lambda shape, dtype: tf.cast(tf_variable(variable), dtype)

    return [
        _add(optimizer, variable, "master_weight", initializer(variable)) if is_half(variable) else None
        for variable in variables
    ]


def add_rounding_seed(optimizer: keras.optimizers.Optimizer) -> Any:
    """Create a variable with a seed from Python's `random`, as Keras draws its seeds."""
    seed = random.getrandbits(32)
    return optimizer.add_variable(
        shape=(),
        initializer=lambda shape, dtype: tf.constant(seed, dtype),
        dtype="uint32",
        aggregation="only_first_replica",
        name="rounding_seed",
    )


def add_averages(optimizer: keras.optimizers.Optimizer, variables: list[Any]) -> list[Any]:
    """Create the averages of variables that are added later, equal to the variables."""
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
    if not is_half(variable):
        return optimizer.add_variable_from_reference(variable, name=name)
    return add_in_state_dtype(optimizer, variable, name, initializer)


def add_in_state_dtype(
    optimizer: keras.optimizers.Optimizer, variable: Any, name: str, initializer: Any = "zeros"
) -> Any:
    """Create a slot like this variable, in the type of its moments."""
    with tf.distribute.get_strategy().extended.colocate_vars_with(tf_variable(variable)):
        return optimizer.add_variable(
            shape=variable.shape,
            initializer=initializer,
            dtype=state_dtype(variable).name,
            name=f"{path_of(variable).replace('/', '_')}_{name}",
        )
