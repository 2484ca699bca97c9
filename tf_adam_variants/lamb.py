"""LAMB: Adam's direction with a step length of its own for every layer."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, Unpack

import keras
import tensorflow as tf

from tf_adam_variants import _checks, _formula, _variables
from tf_adam_variants._base import AdamVariant, KerasArguments, Step
from tf_adam_variants.fused._ops import Scalars


@keras.saving.register_keras_serializable("tf_adam_variants")
class LAMB(AdamVariant):
    """Adam's direction with a step length of its own for every variable, for large batches.

        m <- beta_1 m + (1 - beta_1) g              v <- beta_2 v + (1 - beta_2) g^2
        m^ = m / (1 - beta_1^t)                     v^ = v / (1 - beta_2^t)
        u  = m^ / (sqrt(v^) + epsilon) + l w
        r  = |w| / |u|, 1 where either norm is 0, clipped to [trust_ratio_min, trust_ratio_max]
        w <- w - learning_rate r u

    Args:
        learning_rate: float >= 0, a `keras.optimizers.schedules.LearningRateSchedule`, or a callable
            without arguments.
        weight_decay: float >= 0, l above, inside the trust ratio. 0 for none.
        beta_1: float in [0, 1), the decay of the first moment.
        beta_2: float in [0, 1), the decay of the second moment.
        epsilon: float >= 0, outside the root and after bias correction, in units of the gradient.
        exclude_from_layer_adaptation: list of regular expressions, searched as those of
            `exclude_from_weight_decay`: r = 1 for the variables that match. None: for those that do not
            decay; []: for none.
        bias_correction: bool. False: m^ = m and v^ = v.
        grad_averaging: bool. False: m <- beta_1 m + g.
        trust_ratio_min: float >= 0 or None, the least r.
        trust_ratio_max: float >= trust_ratio_min or None, the largest r.
        exclude_from_weight_decay: list of regular expressions, `re.search`ed in the variables' paths
            ("sequential/dense/kernel"): those that match do not decay. Saved with the configuration.
            Keras's method of the same name adds to it.
        sparse_update: what a `tf.IndexedSlices` gradient does. "exact": what the dense gradient would do.
            "lazy": only the rows it names change, in the variable and its slots, by moments and decay
            alike; the bias correction counts all steps. Repeated ids are summed first in both. With
            `gradient_accumulation_steps` the rows are those whose accumulated gradient is not all zeros.
            Ids outside the table are an InvalidArgumentError and nothing is written; XLA
            (`jit_compile=True`) has no errors, and there they name no row.
        fused: whether the compiled op takes the step. "auto": wherever it is built, loads and applies, see
            `tf_adam_variants.fused`. True: a ValueError where it cannot. False: never. The attribute may be
            set later and holds for the steps that are traced from then on.
        name: str.
        **keras_arguments: Keras's own `clipnorm`, `clipvalue`, `global_clipnorm`, `use_ema`,
            `ema_momentum`, `ema_overwrite_frequency`, `loss_scale_factor` and
            `gradient_accumulation_steps`; see `keras.optimizers.Optimizer`.

    Norms are taken over the whole variable, in the type of its moments, or in float64 by the compiled op.
    With sparse_update="lazy" they are taken over the rows that the gradient names: u is not defined
    elsewhere, and against |w| of the whole table the step would grow with the number of rows that are not in
    the batch.

    Variables are float16, bfloat16, float32 or float64. The moments and all arithmetic are float32 for the
    half types and of the variable's own type otherwise; each variable has the slots "momentum" and
    "velocity" of its shape.

    Raises:
        ValueError: on an argument outside its range, naming it; in `apply`, where gradients and variables
            do not match; on loading, where the saved state has other slots.

    Example:

    >>> import tf_adam_variants as tav
    >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
    >>> warm_up = tav.schedules.LinearWarmup(0.01, warmup_steps=500)
    >>> model.compile(tav.LAMB(warm_up, exclude_from_weight_decay=["bias", "norm"]), "mse")

    Reference:
        You et al., "Large batch optimization for deep learning: training BERT in 76 minutes", ICLR 2020,
        https://arxiv.org/abs/1904.00962 (algorithm 2)
    """

    trust_ratio = True

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
        sparse_update: str = "exact",
        fused: str | bool = "auto",
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
            sparse_update=sparse_update,
            fused=fused,
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
        """Make the slots, and fix which variables have no trust ratio."""
        variables = list(variables)
        super().build(variables)
        self._unadapted = (
            self._undecayed
            if self._unadapted_patterns is None
            else frozenset(
                i for i, v in enumerate(variables) if _variables.matches(self._unadapted_patterns, v)
            )
        )

    def _kernels_serve(self, dtype: tf.DType) -> bool:
        return False  # none knows the trust ratio

    def _direction_rate(self, learning_rate: Any) -> Any:
        return tf.ones((), tf.float64)  # the ratio is made of the bare direction

    def _decay(self, learning_rate: Any) -> Any | None:
        return tf.constant(self.weight_decay, tf.float64) if self.weight_decay else None

    def _scalars(self, rate: Any) -> Scalars:
        low, high = self.trust_ratio_min, self.trust_ratio_max
        return (
            super()
            ._scalars(rate)
            ._replace(ratio_min=0.0 if low is None else low, ratio_max=math.inf if high is None else high)
        )

    def _change(self, w: Any, d: Any, decay: Any | None, step: Step, index: int) -> Any:
        u = d if decay is None else d + decay * w
        if index in self._unadapted:
            return step.rate * u
        return step.rate * _formula.trust_ratio(w, u, self.trust_ratio_min, self.trust_ratio_max) * u

    def get_config(self) -> dict[str, Any]:
        """The constructor's arguments, with what `exclude_from_weight_decay()` added to the list."""
        patterns = self._unadapted_patterns
        return super().get_config() | {
            "exclude_from_layer_adaptation": None if patterns is None else list(patterns)
        }
