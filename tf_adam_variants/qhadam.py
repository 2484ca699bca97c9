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
    """Quasi-hyperbolic Adam: each moment is averaged once more with the gradient itself.

        m <- beta_1 m + (1 - beta_1) g              v <- beta_2 v + (1 - beta_2) g^2
        m^ = m / (1 - beta_1^t)                     v^ = v / (1 - beta_2^t)
        w <- w - learning_rate ((1 - nu_1) g + nu_1 m^) / (sqrt((1 - nu_2) g^2 + nu_2 v^) + epsilon)

    nu_1 = nu_2 = 1 is Adam, nu_1 = 0 RMSprop, nu_1 = beta_1 NAdam (`converters.from_nadam`).

    Args:
        learning_rate: float >= 0, a `keras.optimizers.schedules.LearningRateSchedule`, or a callable
            without arguments.
        beta_1: float in [0, 1), the decay of the first moment.
        beta_2: float in [0, 1), the decay of the second moment.
        nu_1: finite float, the share of the first moment in the step; 1 is Adam, 0 the plain gradient.
        nu_2: finite float, the share of the second moment under the root; 1 is Adam.
        epsilon: float >= 0, outside the root and after bias correction, in units of the gradient.
        exclude_from_weight_decay: as for `QHAdamW`, so that one set of arguments serves both; without
            weight decay there is nothing to exclude from.
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
    "velocity" of its shape.

    Raises:
        ValueError: on an argument outside its range, naming it; in `apply`, where gradients and variables
            do not match; on loading, where the saved state has other slots.

    Example:

    >>> import tf_adam_variants as tav
    >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
    >>> model.compile(tav.QHAdam(1e-3, nu_1=0.8), "mse")

    Reference:
        Ma and Yarats, "Quasi-hyperbolic momentum and Adam for deep learning", ICLR 2019,
        https://arxiv.org/abs/1810.06801
    """

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
        sparse_update: str = "exact",
        fused: str | bool = "auto",
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
            sparse_update=sparse_update,
            fused=fused,
            name=name,
            keras_arguments=keras_arguments,
        )
        self.nu_1 = _checks.real("nu_1", nu_1)
        self.nu_2 = _checks.real("nu_2", nu_2)

    def get_config(self) -> dict[str, Any]:
        """The constructor's arguments."""
        config = super().get_config()
        del config["weight_decay"]  # Keras's; this optimizer has none
        return config


@keras.saving.register_keras_serializable("tf_adam_variants")
class QHAdamW(DecoupledDecay):
    """QHAdam with AdamW's decoupled weight decay.

        m <- beta_1 m + (1 - beta_1) g              v <- beta_2 v + (1 - beta_2) g^2
        m^ = m / (1 - beta_1^t)                     v^ = v / (1 - beta_2^t)
        d  = ((1 - nu_1) g + nu_1 m^) / (sqrt((1 - nu_2) g^2 + nu_2 v^) + epsilon)
        w <- w - s l w - learning_rate d

    Args:
        learning_rate: float >= 0, a `keras.optimizers.schedules.LearningRateSchedule`, or a callable
            without arguments.
        weight_decay: float >= 0, l above, dimensionless. 0 for none.
        beta_1: float in [0, 1), the decay of the first moment.
        beta_2: float in [0, 1), the decay of the second moment.
        nu_1: finite float, the share of the first moment in the step; 1 is Adam, 0 the plain gradient.
        nu_2: finite float, the share of the second moment under the root; 1 is Adam.
        epsilon: float >= 0, outside the root and after bias correction, in units of the gradient.
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
    "velocity" of its shape.

    Raises:
        ValueError: on an argument outside its range, naming it; in `apply`, where gradients and variables
            do not match; on loading, where the saved state has other slots.

    Example:

    >>> import tf_adam_variants as tav
    >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
    >>> model.compile(optimizer="qhadamw", loss="mse")
    >>> model.compile(tav.QHAdamW(1e-3, weight_decay=0.01, weight_decay_mode="independent"), "mse")

    References:
        Ma and Yarats, "Quasi-hyperbolic momentum and Adam for deep learning", ICLR 2019,
        https://arxiv.org/abs/1810.06801
        Loshchilov and Hutter, "Decoupled weight decay regularization", ICLR 2019,
        https://arxiv.org/abs/1711.05101
    """

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
        sparse_update: str = "exact",
        fused: str | bool = "auto",
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
            sparse_update,
            fused,
            name,
            keras_arguments,
        )
        self.nu_1 = _checks.real("nu_1", nu_1)
        self.nu_2 = _checks.real("nu_2", nu_2)
