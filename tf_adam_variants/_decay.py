"""Decoupled weight decay, w <- w - s l w, and what its factor s means."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import keras
import tensorflow as tf

from tf_adam_variants import _checks, _peak
from tf_adam_variants._base import AdamVariant, KerasArguments

MODES = ("learning_rate", "schedule", "independent")


class DecoupledDecay(AdamVariant):
    """An Adam variant whose weights decay beside the step, not through the gradient."""

    def __init__(
        self,
        learning_rate: Any,
        weight_decay: float,
        beta_1: float,
        beta_2: float,
        epsilon: float,
        exclude_from_weight_decay: Iterable[str] | None,
        weight_decay_mode: str,
        peak_learning_rate: float | None,
        sparse_update: str,
        fused: str | bool,
        name: str,
        keras_arguments: KerasArguments,
    ) -> None:
        super().__init__(
            learning_rate,
            beta_1,
            beta_2,
            epsilon,
            weight_decay=_checks.nonnegative("weight_decay", weight_decay),
            exclude_from_weight_decay=exclude_from_weight_decay,
            sparse_update=sparse_update,
            fused=fused,
            name=name,
            keras_arguments=keras_arguments,
        )
        self.weight_decay_mode = _checks.one_of("weight_decay_mode", weight_decay_mode, MODES)
        self.peak_learning_rate = _resolved_peak(weight_decay_mode, peak_learning_rate, learning_rate)

    def _decay(self, learning_rate: Any) -> Any | None:
        if not self.weight_decay:
            return None
        if self.weight_decay_mode == "learning_rate":
            return learning_rate * self.weight_decay
        if self.weight_decay_mode == "independent":
            return tf.constant(self.weight_decay, tf.float64)
        # Rounded as Keras rounds the learning rate, so that at the peak their quotient is exactly 1.
        peak = tf.cast(tf.constant(self.peak_learning_rate, keras.config.floatx()), tf.float64)
        return learning_rate / peak * self.weight_decay

    def get_config(self) -> dict[str, Any]:
        """The constructor's arguments. The peak is the resolved one: the learning rate may have changed."""
        return super().get_config() | {
            "weight_decay_mode": self.weight_decay_mode,
            "peak_learning_rate": self.peak_learning_rate,
        }


def _resolved_peak(mode: str, peak: float | None, learning_rate: Any) -> float | None:
    if mode != "schedule":
        if peak is not None:
            raise ValueError(
                "`peak_learning_rate` belongs to weight_decay_mode='schedule' and must be None with "
                f"{mode!r}. Received: peak_learning_rate={peak!r}"
            )
        return None
    if peak is None:
        peak = _peak.of(learning_rate)
    return _checks.positive(
        "peak_learning_rate",
        peak,
        "a finite number > 0 with weight_decay_mode='schedule'. It is taken from a float learning rate, "
        "or from a schedule's initial_learning_rate or warmup_target; where there is none, give it",
    )
