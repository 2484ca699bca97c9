"""QHAdam: Adam with each moment averaged with the gradient."""

from __future__ import annotations

from typing import Any, Unpack

from tf_adam_variants.engines.hyperparameters import Hyperparameters
from tf_adam_variants.optimizer.arguments import Common
from tf_adam_variants.optimizer.base import AdamVariant
from tf_adam_variants.optimizer.variant import variant


@variant
class QHAdam(AdamVariant):
    """Quasi-hyperbolic Adam: Adam with each moment averaged with the gradient.

        m <- beta_1 m + (1 - beta_1) g              v <- beta_2 v + (1 - beta_2) g^2
        m^ = m / (1 - beta_1^t)                     v^ = v / (1 - beta_2^t)
        w <- w - learning_rate ((1 - nu_1) g + nu_1 m^) / (sqrt((1 - nu_2) g^2 + nu_2 v^) + epsilon)

    nu_1 = nu_2 = 1 is Adam, nu_1 = 0 is RMSprop, nu_1 = beta_1 is NAdam (`converters.from_nadam`). QHAdam has
    no weight decay. It accepts `exclude_from_weight_decay` so that the same arguments work for `QHAdamW`.

    Args:
        {{learning_rate}}
        {{beta_1}}
        {{beta_2}}
        {{nu_1}}
        {{nu_2}}
        {{epsilon}}
        {{common}}

    {{types}}

    {{raises}}

    Example:
        ```pycon
        >>> import keras
        >>> import tf_adam_variants as tav
        >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
        >>> model.compile(tav.QHAdam(1e-3, nu_1=0.8), "mse")

        ```

    Reference:
        Ma and Yarats, "Quasi-hyperbolic momentum and Adam for deep learning", ICLR 2019,
        https://arxiv.org/abs/1810.06801
    """

    def __init__(
        self,
        learning_rate: Any = 1e-3,
        beta_1: float = 0.995,
        beta_2: float = 0.999,
        nu_1: float = 0.7,
        nu_2: float = 1.0,
        epsilon: float = 1e-8,
        **common: Unpack[Common],
    ) -> None:
        hyperparameters = Hyperparameters(beta_1=beta_1, beta_2=beta_2, nu_1=nu_1, nu_2=nu_2, epsilon=epsilon)
        super().__init__(hyperparameters, learning_rate, **common)
