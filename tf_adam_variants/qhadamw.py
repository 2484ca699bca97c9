"""QHAdamW: QHAdam with decoupled weight decay."""

from __future__ import annotations

from typing import Any, Unpack

from tf_adam_variants.engines.hyperparameters import Hyperparameters
from tf_adam_variants.optimizer.arguments import Common
from tf_adam_variants.optimizer.base import AdamVariant
from tf_adam_variants.optimizer.variant import variant


@variant
class QHAdamW(AdamVariant):
    """QHAdam with AdamW's decoupled weight decay.

        m <- beta_1 m + (1 - beta_1) g              v <- beta_2 v + (1 - beta_2) g^2
        m^ = m / (1 - beta_1^t)                     v^ = v / (1 - beta_2^t)
        d  = ((1 - nu_1) g + nu_1 m^) / (sqrt((1 - nu_2) g^2 + nu_2 v^) + epsilon)
        w <- w - s l w - learning_rate d

    Args:
        {{learning_rate}}
        {{weight_decay}}
        {{beta_1}}
        {{beta_2}}
        {{nu_1}}
        {{nu_2}}
        {{epsilon}}
        {{weight_decay_mode}}
        {{peak_learning_rate}}
        {{common}}

    {{types}}

    {{raises}}

    Example:
        ```pycon
        >>> import keras
        >>> import tf_adam_variants as tav
        >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
        >>> model.compile(optimizer="qhadamw", loss="mse")
        >>> model.compile(tav.QHAdamW(1e-3, weight_decay=0.01, weight_decay_mode="independent"), "mse")

        ```

    References:
        Ma and Yarats, "Quasi-hyperbolic momentum and Adam for deep learning", ICLR 2019,
        https://arxiv.org/abs/1810.06801
        Loshchilov and Hutter, "Decoupled weight decay regularization", ICLR 2019,
        https://arxiv.org/abs/1711.05101
    """

    def __init__(
        self,
        learning_rate: Any = 1e-3,
        weight_decay: float | None = 0.004,
        beta_1: float = 0.995,
        beta_2: float = 0.999,
        nu_1: float = 0.7,
        nu_2: float = 1.0,
        epsilon: float = 1e-8,
        *,
        weight_decay_mode: str = "learning_rate",
        peak_learning_rate: float | None = None,
        **common: Unpack[Common],
    ) -> None:
        hyperparameters = Hyperparameters(
            beta_1=beta_1,
            beta_2=beta_2,
            nu_1=nu_1,
            nu_2=nu_2,
            epsilon=epsilon,
            weight_decay=weight_decay,
            weight_decay_mode=weight_decay_mode,
            peak_learning_rate=peak_learning_rate,
        )
        super().__init__(hyperparameters, learning_rate, **common)
