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
    """Adam with decoupled weight decay.

        m <- beta_1 m + (1 - beta_1) g              v <- beta_2 v + (1 - beta_2) g^2
        m^ = m / (1 - beta_1^t)                     v^ = v / (1 - beta_2^t)
        w <- w - s l w - learning_rate m^ / (sqrt(v^) + epsilon)

    Args:
        learning_rate: float >= 0, a `keras.optimizers.schedules.LearningRateSchedule`, or a callable
            without arguments.
        weight_decay: float >= 0, l above, dimensionless. 0 for none.
        beta_1: float in [0, 1), the decay of the first moment.
        beta_2: float in [0, 1), the decay of the second moment.
        epsilon: float >= 0, outside the root and after bias correction, in units of the gradient.
        amsgrad: bool. True: v^ is made from the largest v so far (Reddi et al., 2018).
        exclude_from_weight_decay: list of regular expressions, `re.search`ed in the variables' paths
            ("sequential/dense/kernel"): those that match do not decay. Saved with the configuration.
            Keras's method of the same name adds to it.
        weight_decay_mode: the factor s. "learning_rate": the learning rate of the step (Keras, PyTorch,
            optax). "schedule": the learning rate over its peak (the paper's eta_t: the peak is tuned and
            the decay stays). "independent": 1.
        peak_learning_rate: float > 0, the peak for "schedule". By default the float given as learning
            rate, or a schedule's `initial_learning_rate` (`warmup_target` where it warms up).
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

    Variables are float16, bfloat16, float32 or float64. The moments and all arithmetic are float32 for the
    half types and of the variable's own type otherwise; each variable has the slots "momentum" and
    "velocity" of its shape, and "velocity_hat" with amsgrad.

    Raises:
        ValueError: on an argument outside its range, naming it; in `apply`, where gradients and variables
            do not match; on loading, where the saved state has other slots.

    A checkpoint written with `keras.optimizers.Adam` or `AdamW` restores into it. "adamw" stays the name of
    Keras's class; by name this one is "tf_adam_variants>AdamW".

    Example:

    >>> import tf_adam_variants as tav
    >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
    >>> model.compile(tav.AdamW(3e-4, weight_decay=0.05, exclude_from_weight_decay=["bias"]), "mse")

    Reference:
        Loshchilov and Hutter, "Decoupled weight decay regularization", ICLR 2019,
        https://arxiv.org/abs/1711.05101
    """

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
        sparse_update: str = "exact",
        fused: str | bool = "auto",
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
            sparse_update,
            fused,
            name,
            keras_arguments,
        )
        self.amsgrad = _checks.flag("amsgrad", amsgrad)
