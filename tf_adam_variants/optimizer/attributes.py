"""Arguments as attributes: checked when constructed and when set later, saved in the configuration."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

import keras
import tensorflow as tf

from tf_adam_variants.engines.hyperparameters import FIELDS, Hyperparameters
from tf_adam_variants.fused import _library
from tf_adam_variants.optimizer import arguments
from tf_adam_variants.optimizer.exclusions import Exclusions
from tf_adam_variants.utils import checks

_OPTIONS = ("sparse_update", "fused", "master_weights", "stochastic_rounding")  # that Keras does not know


class Attributes(keras.optimizers.Optimizer):
    """A Keras optimizer with `Hyperparameters`, whose fields can be read and set as attributes."""

    _default_name: str = "adam_variant"  # these two are set by `@variant`
    _own_arguments: tuple[str, ...] = ()

    def __init__(
        self,
        hyperparameters: Hyperparameters,
        learning_rate: Any,
        exclude_from_layer_adaptation: Iterable[str] | None,
        common: arguments.Common,
    ) -> None:
        known = [*self._own_arguments, *arguments.COMMON]
        arguments.check_names(common, known, type(self).__name__)
        defaults = {name: argument.default for name, argument in arguments.COMMON.items()}
        defaults["name"] = self._default_name
        # Checked here because Keras's constructor compares some of them before it sets them.
        options = {name: arguments.check_argument(name, value) for name, value in (defaults | common).items()}
        arguments.check_together(options)
        learning_rate = checks.check_learning_rate("learning_rate", learning_rate)
        # Keras's constructor sets attributes that are read from it.
        object.__setattr__(self, "_hyperparameters", hyperparameters.with_peak_of(learning_rate))
        # Keras keeps its method's argument in `_exclude_from_weight_decay`, so these have other names.
        decay_exclusions = Exclusions("exclude_from_weight_decay", options.pop("exclude_from_weight_decay"))
        no_adaptation = checks.check_patterns("exclude_from_layer_adaptation", exclude_from_layer_adaptation)
        adaptation_exclusions = Exclusions("exclude_from_layer_adaptation", no_adaptation, decay_exclusions)
        own = {name: options.pop(name) for name in _OPTIONS}
        if own["fused"] is True and not _library.load():
            raise ValueError(f"`fused=True` needs the compiled op. {_library.reason()}")
        super().__init__(learning_rate=learning_rate, weight_decay=hyperparameters.weight_decay, **options)
        for name, value in own.items():
            setattr(self, name, value)
        self._decay_exclusions, self._adaptation_exclusions = decay_exclusions, adaptation_exclusions

    def __getattr__(self, name: str) -> Any:
        if name in FIELDS:
            return getattr(self._hyperparameters, name)
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute; what the constructor takes, with the constructor's checks."""
        if name in FIELDS:
            self._set_hyperparameter(name, value)
            return
        if name in ("exclude_from_weight_decay", "exclude_from_layer_adaptation"):
            raise ValueError(f"`{name}` is an argument of the constructor and cannot be set later")
        if name == "learning_rate" and not tf.is_symbolic_tensor(value):
            value = checks.check_learning_rate(name, value)
        elif name in arguments.COMMON:
            value = arguments.check_argument(name, value)
            arguments.check_together(self.__dict__ | {name: value})
            self._check_slots_stay(name, value)
        super().__setattr__(name, value)

    def _set_hyperparameter(self, name: str, value: Any) -> None:
        if value is getattr(self._hyperparameters, name):  # Keras's constructor sets weight_decay
            return
        if name not in self._own_arguments:
            raise ValueError(f"{type(self).__name__} has no `{name}`. Received: {name}={value!r}")
        changes = {name: value}
        if name == "weight_decay_mode":
            changes["peak_learning_rate"] = None  # looked up again, if the mode needs one
        changed = dataclasses.replace(self._hyperparameters, **changes).with_peak_of(
            self._float_or_schedule()
        )
        self._check_slots_stay(name, value)
        object.__setattr__(self, "_hyperparameters", changed)

    def _float_or_schedule(self) -> Any:
        rate = self._learning_rate
        return float(rate.numpy()) if hasattr(rate, "numpy") else rate

    def _check_slots_stay(self, name: str, value: Any) -> None:
        needs_slots = name in (
            "amsgrad", "use_ema", "gradient_accumulation_steps", "master_weights", "stochastic_rounding"
        )  # fmt: skip
        if needs_slots and getattr(self, "built", False) and bool(value) != bool(getattr(self, name)):
            raise ValueError(
                f"`{name}` decides which slots there are and cannot change once {self.name} is built. "
                f"Received: {name}={value!r}. Make a new optimizer"
            )

    @property
    def _exclusions(self) -> tuple[Exclusions, Exclusions]:
        return self._decay_exclusions, self._adaptation_exclusions

    @classmethod
    def from_config(cls, config: dict[str, Any], **kwargs: Any) -> Any:
        """An optimizer with this configuration. With fused=True only training needs the fused kernels."""
        optimizer = super().from_config(config | {"fused": "auto"}, **kwargs)
        optimizer.fused = config.get("fused", "auto")
        return optimizer

    def get_config(self) -> dict[str, Any]:
        """The constructor's arguments, with what `exclude_from_weight_decay()` added to the list."""
        config = super().get_config()
        del config["weight_decay"]  # a hyperparameter, where there is one
        config |= {
            name: getattr(self._hyperparameters, name) for name in self._own_arguments if name in FIELDS
        }
        if "exclude_from_layer_adaptation" in self._own_arguments:
            config["exclude_from_layer_adaptation"] = self._adaptation_exclusions.patterns
        return config | {
            "exclude_from_weight_decay": self._decay_exclusions.patterns,
            **{name: getattr(self, name) for name in _OPTIONS},
        }

    def exclude_from_weight_decay(
        self, var_list: Iterable[Any] | None = None, var_names: Iterable[str] | None = None
    ) -> None:
        """Exclude variables from weight decay, on top of the constructor's list.

        Args:
            var_list: variables to exclude. The configuration keeps their paths.
            var_names: list of regular expressions, searched in the variables' paths.

        Raises:
            ValueError: after the optimizer is built, when it is too late, unless the call changes nothing.
        """
        if not self.built:
            self._decay_exclusions.add(var_list, var_names)
        elif self._decay_exclusions.would_change(var_list, var_names, self._trainable_variables):
            raise ValueError(
                f"`exclude_from_weight_decay()` must be called before {self.name} is built, that is "
                "before the first step: which variables decay is fixed by then."
            )
