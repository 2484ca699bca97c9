"""AdamW: Adam with decoupled weight decay."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Unpack

import keras

from tf_adam_variants import _checks
from tf_adam_variants._base import KerasArguments
from tf_adam_variants._decay import DecoupledDecay


@keras.saving.register_keras_serializable("tf_adam_variants")
class AdamW(DecoupledDecay):
    _hyperparameters = ("beta_1", "beta_2", "epsilon", "amsgrad")

    def __init__(
        self,
        learning_rate: Any = 1e-3,
        weight_decay: float = 0.004,
        beta_1: float = 0.9,
        beta_2: float = 0.999,
        epsilon: float = 1e-8,
        amsgrad: bool = False,
        *,
        exclude_from_weight_decay: Iterable[str] | None = None,
        weight_decay_mode: str = "learning_rate",
        peak_learning_rate: float | None = None,
        name: str = "adamw",
        **keras_arguments: Unpack[KerasArguments],
    ) -> None:
        super().__init__(
            learning_rate,
            weight_decay,
            beta_1,
            beta_2,
            epsilon,
            exclude_from_weight_decay,
            weight_decay_mode,
            peak_learning_rate,
            name,
            keras_arguments,
        )
        self.amsgrad = _checks.flag("amsgrad", amsgrad)
