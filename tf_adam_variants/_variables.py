"""What is asked of a variable: its path, the type of its arithmetic, its replicas, devices and strategy."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import tensorflow as tf


def path(variable: Any) -> str:
    """ "sequential/dense/kernel" for a Keras variable, its tf.Variable, or a replica's copy of it.

    Keras keeps the path in `path` and only the last part in `name`; TensorFlow keeps the path in
    `name` and adds ":0" (and "/replica_1" on the replicas of a mirrored variable).
    """
    if hasattr(variable, "path"):
        return variable.path
    return re.sub(r"(/replica_\d+)?:\d+$", "", variable.name)


def paths(variables: Iterable[Any]) -> str:
    """The first paths, for messages."""
    found = [path(variable) for variable in variables]
    return ", ".join(found[:5]) + (f" and {len(found) - 5} more" if len(found) > 5 else "")


def is_half(variable: Any) -> bool:
    """Whether it is of type float16 or bfloat16."""
    return tf.as_dtype(variable.dtype) in (tf.float16, tf.bfloat16)


def listed(variables: Iterable[Any], name: str) -> list[Any]:
    """The variables as a list. One alone is an error: its elements would be taken for variables."""
    if hasattr(variables, "dtype"):
        raise ValueError(
            f"{name} needs a list of variables. Received: the variable {path(variables)} alone. "
            "Write [variable]"
        )
    return list(variables)


def state_dtype(variable: Any) -> tf.DType:
    """The type of a variable's moments, norms and arithmetic."""
    return tf.float32 if is_half(variable) else tf.as_dtype(variable.dtype)


def tf_variable(variable: Any) -> Any:
    """The tf.Variable of a Keras variable; another variable as it is."""
    return variable.value if hasattr(variable, "path") else variable


def replicas(variable: Any) -> list[Any]:
    """The copies that a distribution strategy has of a variable, one a replica; otherwise the variable."""
    variable = tf_variable(variable)
    return list(variable.values) if isinstance(variable, tf.distribute.DistributedValues) else [variable]


def devices(variable: Any) -> tuple[str, ...]:
    """The devices of its replicas, each as "/job:localhost/replica:0/task:0/device:CPU:0"."""
    return tuple(replica.device for replica in replicas(variable))


def on_device(variable: Any, device: str) -> Any:
    """The replica of a variable that is on this device; the variable itself where it has no replicas."""
    if not isinstance(variable, tf.distribute.DistributedValues):
        return variable
    return next(replica for replica in replicas(variable) if replica.device == device)


def on_first_replica(strategy: Any, value: Any) -> Any:
    """A value that may differ between replicas, as the first one has it."""
    if strategy.num_replicas_in_sync == 1 and not isinstance(value, tf.distribute.DistributedValues):
        return value
    return strategy.experimental_local_results(value)[0]


def check_strategy(strategy: Any, name: str) -> None:
    """Raise a ValueError under a strategy whose workers write variables at the same time."""
    if isinstance(strategy, tf.distribute.ParameterServerStrategy):
        raise ValueError(
            f"{name} does not train under ParameterServerStrategy: its workers do not wait for each other. "
            "Steps that overlap would lose parts of each other's moments and of the count of steps. "
            "Train under MultiWorkerMirroredStrategy, or in one process under MirroredStrategy."
        )
