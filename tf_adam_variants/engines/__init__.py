"""Engines: ways to take a step. All compute the same step to rounding; `choose` picks the fastest that can.

An engine is a module with the face of `Engine`. It is handed the description of the update, what the
scalars of the step are made from and the variables, and knows nothing of Keras, of replicas or of where a
gradient comes from.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from tf_adam_variants._step import Parameter, StepInputs, Workload
from tf_adam_variants._update import Update
from tf_adam_variants.engines import compiled_op, formula, resource_apply


class Engine(Protocol):
    """What every engine has."""

    takes_slices: bool  # whether gradients may be slices, with repeated ids; otherwise they are dense

    def reason_against(self, update: Update, workload: Workload) -> str:
        """Why it cannot take a step in the present context, as the end of a sentence; '' where it can."""

    def global_norm(self, gradients: Sequence[Any], device: str) -> Any:
        """The norm of all gradients of variables on this device, in float64. Slices must not repeat ids."""

    def take(self, parameters: Sequence[Parameter], update: Update, inputs: StepInputs, exact: bool) -> None:
        """Update variables and slots in place.

        Args:
            parameters: variables of one type.
            update: what the step is.
            inputs: what its scalars are made from besides.
            exact: whether rows that no slice names have a zero gradient; otherwise they do not change.
        """


FASTEST_FIRST: tuple[Engine, ...] = (compiled_op, resource_apply, formula)


def choose(update: Update, workload: Workload, fused: str | bool) -> Engine:
    """The fastest engine that can take the step.

    Raises:
        ValueError: with fused=True, where the compiled op cannot.
    """
    if fused == "auto":
        compiled_op.mention_split_step(update, workload)
    for engine in FASTEST_FIRST if fused else FASTEST_FIRST[1:]:
        reason = engine.reason_against(update, workload)
        if not reason:
            return engine
        if fused is True:
            raise ValueError(f"fused=True, but the compiled op cannot be used here: {reason}")
    raise AssertionError("the formula takes every step")
