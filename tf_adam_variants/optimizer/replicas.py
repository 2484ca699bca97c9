"""All that knows `tf.distribute`: the copies of a variable, their devices, strategies."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import tensorflow as tf

from tf_adam_variants.utils import internals
from tf_adam_variants.utils.variables import tf_variable


def count() -> int:
    """How many replicas train in step, under the strategy of the present context."""
    return tf.distribute.get_strategy().num_replicas_in_sync


def merge(function: Callable[..., Any], strategy: Any, *args: Any) -> None:
    """Call function(strategy, *args) once for all replicas; tensors in args then hold a value per replica."""
    internals.maybe_merge_call(function, strategy, *args)


def sum_gradients(grads: list[Any]) -> list[Any]:
    """The sum of each gradient over the replicas."""
    context = tf.distribute.get_replica_context()
    # TensorFlow would copy the gradient of a single replica and keep the traced graph alive.
    if count() == 1 or context is None:
        return grads
    by_type: dict[tf.DType, list[int]] = {}  # it adds up all gradients at once, which must have one type
    for i, gradient in enumerate(grads):
        by_type.setdefault(gradient.dtype, []).append(i)
    summed = list(grads)
    for members in by_type.values():
        reduced = context.all_reduce(tf.distribute.ReduceOp.SUM, [grads[i] for i in members])
        for i, gradient in zip(members, reduced, strict=True):
            summed[i] = gradient
    return summed


def replicas(variable: Any) -> list[Any]:
    """The copies that a distribution strategy has of a variable, one per replica; otherwise the variable."""
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


def first_replica_value(strategy: Any, value: Any) -> Any:
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
