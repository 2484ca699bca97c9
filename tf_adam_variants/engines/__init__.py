"""Engines: implementations of a step. All compute the same step to rounding; `choose` picks the fastest.

An engine is a module with the interface of `Engine`. It receives the hyperparameters, the inputs of the
coefficients, and the variables with their slots. It knows nothing of Keras, of replicas, or of where a
gradient comes from.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from tf_adam_variants.engines import formula, fused, resource_apply
from tf_adam_variants.engines.coefficients import StepInputs
from tf_adam_variants.engines.hyperparameters import Hyperparameters
from tf_adam_variants.engines.variable_state import GroupSpec, VariableState


class Engine(Protocol):
    """What every engine has."""

    accepts_indexed_slices: bool  # with repeated indices; other engines accept dense gradients only

    def unsupported_reason(self, hp: Hyperparameters, group: GroupSpec) -> str | None:
        """Why it cannot run a step in the present context, as the end of a sentence; None where it can."""

    def global_norm(self, gradients: Sequence[Any], device: str) -> Any:
        """The norm of all gradients of variables on this device, in float64, without repeated indices."""

    def step(
        self, states: Sequence[VariableState], hp: Hyperparameters, inputs: StepInputs, exact: bool
    ) -> None:
        """Update variables and slots in place.

        Args:
            states: variables of one type.
            hp: the hyperparameters.
            inputs: the other inputs of the coefficients.
            exact: whether rows that no index names have a zero gradient; otherwise they do not change.
        """


FASTEST_FIRST: tuple[Engine, ...] = (fused, resource_apply, formula)


def choose(hp: Hyperparameters, group: GroupSpec, fused_option: str | bool) -> Engine:
    """The fastest engine that can run the step.

    Raises:
        ValueError: with fused=True, where the fused kernels cannot.
    """
    if fused_option == "auto":
        fused.warn_xla_blocks_fused(hp, group)
    for engine in FASTEST_FIRST if fused_option else FASTEST_FIRST[1:]:
        reason = engine.unsupported_reason(hp, group)
        if reason is None:
            return engine
        if fused_option is True:
            raise ValueError(f"fused=True, but the compiled op cannot be used here: {reason}")
    raise AssertionError("the formula supports every step")
