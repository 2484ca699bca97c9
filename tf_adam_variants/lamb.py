"""LAMB: Adam's direction with one step length per variable."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Unpack

from tf_adam_variants.engines.hyperparameters import Hyperparameters
from tf_adam_variants.optimizer.arguments import Common
from tf_adam_variants.optimizer.base import AdamVariant
from tf_adam_variants.optimizer.variant import variant


@variant
class LAMB(AdamVariant):
    """Adam's direction with one step length per variable, for large batches.

        m <- beta_1 m + (1 - beta_1) g              v <- beta_2 v + (1 - beta_2) g^2
        m^ = m / (1 - beta_1^t)                     v^ = v / (1 - beta_2^t)
        u  = m^ / (sqrt(v^) + epsilon) + l w
        r  = |w| / |u|
        w <- w - learning_rate r u

    The trust ratio r is 1 if either norm is 0; `trust_ratio_min` and `trust_ratio_max` then bound it.
    Excluded variables always have r = 1.

    Args:
        {{learning_rate}}
        {{weight_decay}}
        {{beta_1}}
        {{beta_2}}
        {{epsilon}}
        exclude_from_layer_adaptation: list of regular expressions or None: r = 1 for the variables that
            match, as for `exclude_from_weight_decay`. None: for the variables that do not decay. []: for
            no variable.
        bias_correction: bool. False: m^ = m and v^ = v.
        grad_averaging: bool. False: m <- beta_1 m + g.
        trust_ratio_min: float >= 0 or None, the lower bound of r.
        trust_ratio_max: float >= trust_ratio_min or None, the upper bound of r.
        {{common}}

    Norms are over the whole variable, in the type of its moments, or in float64 in the fused kernels. With
    sparse_update="lazy" they are over the rows present in the gradient: u is not defined for other rows, and
    with |w| of the whole table the step would grow with the number of rows outside the batch.

    {{types}}

    {{raises}}

    Example:
        ```pycon
        >>> import keras
        >>> import tf_adam_variants as tav
        >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
        >>> warm_up = tav.schedules.LinearWarmup(0.01, warmup_steps=500)
        >>> model.compile(tav.LAMB(warm_up, exclude_from_weight_decay=["bias", "norm"]), "mse")

        ```

    Reference:
        You et al., "Large batch optimization for deep learning: training BERT in 76 minutes", ICLR 2020,
        https://arxiv.org/abs/1904.00962 (algorithm 2)
    """

    def __init__(
        self,
        learning_rate: Any = 1e-3,
        weight_decay: float | None = 0.01,
        beta_1: float = 0.9,
        beta_2: float = 0.999,
        epsilon: float = 1e-6,
        exclude_from_layer_adaptation: Iterable[str] | None = None,
        bias_correction: bool = True,
        grad_averaging: bool = True,
        trust_ratio_min: float | None = None,
        trust_ratio_max: float | None = None,
        **common: Unpack[Common],
    ) -> None:
        hyperparameters = Hyperparameters(
            beta_1=beta_1,
            beta_2=beta_2,
            epsilon=epsilon,
            bias_correction=bias_correction,
            grad_averaging=grad_averaging,
            weight_decay=weight_decay,
            trust_ratio=True,
            trust_ratio_min=trust_ratio_min,
            trust_ratio_max=trust_ratio_max,
        )
        super().__init__(
            hyperparameters,
            learning_rate,
            exclude_from_layer_adaptation=exclude_from_layer_adaptation,
            **common,
        )
