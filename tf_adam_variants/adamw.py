"""AdamW: Adam with decoupled weight decay."""

from __future__ import annotations

from typing import Any, Unpack

from tf_adam_variants.engines.hyperparameters import Hyperparameters
from tf_adam_variants.optimizer.arguments import Common
from tf_adam_variants.optimizer.base import AdamVariant
from tf_adam_variants.optimizer.variant import variant


@variant
class AdamW(AdamVariant):
    """Adam with decoupled weight decay.

        m <- beta_1 m + (1 - beta_1) g              v <- beta_2 v + (1 - beta_2) g^2
        m^ = m / (1 - beta_1^t)                     v^ = v / (1 - beta_2^t)
        w <- w - s l w - learning_rate m^ / (sqrt(v^) + epsilon)

    Args:
        {{learning_rate}}
        {{weight_decay}}
        {{beta_1}}
        {{beta_2}}
        {{epsilon}}
        amsgrad: bool. True: v^ uses the largest v so far (Reddi et al., 2018), which the slot
            "velocity_hat" holds.
        {{weight_decay_mode}}
        {{peak_learning_rate}}
        {{common}}

    {{types}}

    {{raises}}

    A checkpoint written by `keras.optimizers.Adam` or `AdamW` restores into this class. Its name is
    "tf_adam_variants>AdamW"; "adamw" is the name of Keras's class.

    Example:
        ```pycon
        >>> import keras
        >>> import tf_adam_variants as tav
        >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1, name="head")])
        >>> model.compile(tav.AdamW(3e-4, weight_decay=0.05, exclude_from_weight_decay=["bias"]), "mse")

        ```

    Reference:
        Loshchilov and Hutter, "Decoupled weight decay regularization", ICLR 2019,
        https://arxiv.org/abs/1711.05101
    """

    def __init__(
        self,
        learning_rate: Any = 1e-3,
        weight_decay: float | None = 0.004,
        beta_1: float = 0.9,
        beta_2: float = 0.999,
        epsilon: float = 1e-8,
        amsgrad: bool = False,
        *,
        weight_decay_mode: str = "learning_rate",
        peak_learning_rate: float | None = None,
        **common: Unpack[Common],
    ) -> None:
        hyperparameters = Hyperparameters(
            beta_1=beta_1,
            beta_2=beta_2,
            epsilon=epsilon,
            amsgrad=amsgrad,
            weight_decay=weight_decay,
            weight_decay_mode=weight_decay_mode,
            peak_learning_rate=peak_learning_rate,
        )
        super().__init__(hyperparameters, learning_rate, **common)
