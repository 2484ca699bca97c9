"""LAMB: Adam's direction with a step length of its own for every layer."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Unpack

import keras
import tensorflow as tf

from tf_adam_variants import _checks, _formula, _variables
from tf_adam_variants._base import AdamVariant, KerasArguments


@keras.saving.register_keras_serializable("tf_adam_variants")
class LAMB(AdamVariant):
    _hyperparameters = (
        "beta_1",
        "beta_2",
        "epsilon",
        "bias_correction",
        "grad_averaging",
        "trust_ratio_min",
        "trust_ratio_max",
    )

    def __init__(
        self,
        learning_rate: Any = 1e-3,
        weight_decay: float = 0.01,
        beta_1: float = 0.9,
        beta_2: float = 0.999,
        epsilon: float = 1e-6,
        exclude_from_layer_adaptation: Iterable[str] | None = None,
        bias_correction: bool = True,
        grad_averaging: bool = True,
        trust_ratio_min: float | None = None,
        trust_ratio_max: float | None = None,
        *,
        exclude_from_weight_decay: Iterable[str] | None = None,
        name: str = "lamb",
        **keras_arguments: Unpack[KerasArguments],
    ) -> None:
        super().__init__(
            learning_rate,
            beta_1,
            beta_2,
            epsilon,
            weight_decay=_checks.nonnegative("weight_decay", weight_decay),
            exclude_from_weight_decay=exclude_from_weight_decay,
            name=name,
            keras_arguments=keras_arguments,
        )
        self.bias_correction = _checks.flag("bias_correction", bias_correction)
        self.grad_averaging = _checks.flag("grad_averaging", grad_averaging)
        self.trust_ratio_min, self.trust_ratio_max = _checks.bounds(
            "trust_ratio_min", trust_ratio_min, "trust_ratio_max", trust_ratio_max
        )
        self._unadapted_patterns = _checks.patterns(
            "exclude_from_layer_adaptation", exclude_from_layer_adaptation
        )

    def build(self, variables: Iterable[Any]) -> None:
        variables = list(variables)
        super().build(variables)
        self._unadapted = (
            self._undecayed
            if self._unadapted_patterns is None
            else frozenset(
                i for i, v in enumerate(variables) if _variables.matches(self._unadapted_patterns, v)
            )
        )

    def _in_place(self, dtype: tf.DType) -> bool:
        return False  # no kernel knows the trust ratio

    def _decay(self, learning_rate: Any) -> Any | None:
        return tf.constant(self.weight_decay, tf.float64) if self.weight_decay else None

    def _change(self, w: Any, d: Any, decay: Any | None, learning_rate: Any, index: int) -> Any:
        u = d if decay is None else d + decay * w
        if index not in self._unadapted:
            learning_rate *= _formula.trust_ratio(w, u, self.trust_ratio_min, self.trust_ratio_max)
        return learning_rate * u

    def get_config(self) -> dict[str, Any]:
        patterns = self._unadapted_patterns
        return super().get_config() | {
            "exclude_from_layer_adaptation": None if patterns is None else list(patterns)
        }
