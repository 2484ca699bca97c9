"""QHAdam and QHAdamW: Adam whose two moments are each averaged with the gradient itself."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Unpack

import keras

from tf_adam_variants import _checks
from tf_adam_variants._base import AdamVariant, KerasArguments
from tf_adam_variants._decay import DecoupledDecay


@keras.saving.register_keras_serializable("tf_adam_variants")
class QHAdam(AdamVariant):
    _hyperparameters = ("beta_1", "beta_2", "nu_1", "nu_2", "epsilon")

    def __init__(
        self,
        learning_rate: Any = 1e-3,
        beta_1: float = 0.995,
        beta_2: float = 0.999,
        nu_1: float = 0.7,
        nu_2: float = 1.0,
        epsilon: float = 1e-8,
        *,
        exclude_from_weight_decay: Iterable[str] | None = None,
        name: str = "qhadam",
        **keras_arguments: Unpack[KerasArguments],
    ) -> None:
        super().__init__(
            learning_rate,
            beta_1,
            beta_2,
            epsilon,
            weight_decay=None,
            exclude_from_weight_decay=exclude_from_weight_decay,
            name=name,
            keras_arguments=keras_arguments,
        )
        self.nu_1 = _checks.real("nu_1", nu_1)
        self.nu_2 = _checks.real("nu_2", nu_2)

    def get_config(self) -> dict[str, Any]:
        config = super().get_config()
        del config["weight_decay"]  # Keras's; this optimizer has none
        return config


@keras.saving.register_keras_serializable("tf_adam_variants")
class QHAdamW(DecoupledDecay):
    _hyperparameters = QHAdam._hyperparameters

    def __init__(
        self,
        learning_rate: Any = 1e-3,
        weight_decay: float = 0.004,
        beta_1: float = 0.995,
        beta_2: float = 0.999,
        nu_1: float = 0.7,
        nu_2: float = 1.0,
        epsilon: float = 1e-8,
        *,
        exclude_from_weight_decay: Iterable[str] | None = None,
        weight_decay_mode: str = "learning_rate",
        peak_learning_rate: float | None = None,
        name: str = "qhadamw",
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
        self.nu_1 = _checks.real("nu_1", nu_1)
        self.nu_2 = _checks.real("nu_2", nu_2)
