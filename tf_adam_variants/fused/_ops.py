"""The compiled ops: when they can take a step, and how. The only file that names them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import tensorflow as tf

from tf_adam_variants import _kernels, _variables
from tf_adam_variants.fused import _library


class Scalars(NamedTuple):
    """What a step knows before it sees a variable: `tfav::Scalars` of adam_math.h, in its order."""

    gradient: Any
    momentum: Any
    square: Any
    velocity: Any
    epsilon: Any
    fading_1: Any
    share_1: Any
    share_2: Any
    decay: Any
    scale: Any
    rate: Any
    ratio_min: Any
    ratio_max: Any


class Item(NamedTuple):
    """One variable of a step; its slots are momentum, velocity and, with amsgrad, the largest velocity.

    All are TensorFlow's variables, on one device.
    """

    variable: Any
    slots: Sequence[Any]
    gradient: Any
    decays: bool
    adapts: bool


def reason_against(devices: Iterable[tuple[str, ...]]) -> str:
    """Why the ops cannot update variables in the present context; '' where they can.

    Args:
        devices: where the variables are: of each, the devices of its copies.
    """
    if _kernels.in_xla():
        return "XLA (`jit_compile=True`) compiles no ops but its own"
    devices = set(devices)
    names = sorted({device for copies in devices for device in copies})
    places = [tf.DeviceSpec.from_string(name) for name in names]
    kinds = {place.device_type for place in places if place.job in (None, "localhost")}
    if (
        len(devices) > 1
        or any(place.job not in (None, "localhost") for place in places)
        or not kinds <= {"CPU", "GPU"}
    ):
        return (
            "the variables, or a replica's copies of them, must all be on one CPU or GPU of this process. "
            f"They are on {', '.join(names)}"
        )
    if not _library.load():
        return _library.reason()
    return _library.gpu_reason() if "GPU" in kinds else ""


def step(items: Iterable[Item], numbers: Scalars, square: bool, trust_ratio: bool, exact: bool) -> None:
    """Update the variables and their slots in place: one op for all of a type, one for each with slices.

    Args:
        items: the variables, with gradients that are tensors or slices.
        numbers: float64 scalars.
        square: whether nu_2 is not 1.
        trust_ratio: whether it is LAMB's step.
        exact: whether rows that no slice names have a zero gradient, rather than none.
    """
    ops = _library.load()
    scalars = tf.stack([tf.convert_to_tensor(number, tf.float64) for number in numbers])
    groups: dict[tuple[tf.DType, tf.DType], list[Item]] = {}
    for item in items:
        dtype = tf.as_dtype(item.variable.dtype)
        if not isinstance(item.gradient, tf.IndexedSlices):
            item = item._replace(gradient=_as_type_of(item.variable, item.gradient))
            groups.setdefault((dtype, item.gradient.dtype), []).append(item)
            continue
        with tf.device(item.variable.device):
            ops.tf_adam_variants_rows_step(
                scalars=scalars,
                variable=item.variable.handle,
                momentum=item.slots[0].handle,
                velocity=item.slots[1].handle,
                maxima=[slot.handle for slot in item.slots[2:]],
                values=_as_type_of(item.variable, item.gradient.values),
                ids=item.gradient.indices,
                T=dtype,
                square=square,
                trust_ratio=trust_ratio,
                decays=item.decays,
                adapts=item.adapts,
                exact=exact,
            )
    for (dtype, _), group in groups.items():
        momentums, velocities, *maxima = zip(*(item.slots for item in group), strict=True)
        with tf.device(group[0].variable.device):
            ops.tf_adam_variants_dense_step(
                scalars=scalars,
                variables=[item.variable.handle for item in group],
                momentums=[slot.handle for slot in momentums],
                velocities=[slot.handle for slot in velocities],
                maxima=[slot.handle for slots in maxima for slot in slots],
                gradients=[item.gradient for item in group],
                T=dtype,
                square=square,
                trust_ratio=trust_ratio,
                decays=[item.decays for item in group],
                adapts=[item.adapts for item in group],
            )


def _as_type_of(variable: Any, gradient: Any) -> Any:
    """The gradient in the variable's type or that of its moments."""
    gradient = tf.convert_to_tensor(gradient)
    state = _variables.state_type(variable)
    return gradient if gradient.dtype in (variable.dtype, state) else tf.cast(gradient, state)


def global_norm(items: Sequence[Item]) -> Any:
    """The norm of all gradients together, in float64. Slices must not repeat ids."""
    groups: dict[tf.DType, list[Any]] = {}
    for item in items:
        gradient = item.gradient
        values = gradient.values if isinstance(gradient, tf.IndexedSlices) else gradient
        values = _as_type_of(item.variable, values)
        groups.setdefault(values.dtype, []).append(values)
    squared_norm = _library.load().tf_adam_variants_squared_norm
    with tf.device(items[0].variable.device):
        return tf.sqrt(tf.add_n([squared_norm(gradients=group) for group in groups.values()]))
