"""Learning rate schedules for the optimizers of this package and of Keras."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tf_adam_variants.engines.hyperparameters import peak_of
from tf_adam_variants.utils import checks
from tf_adam_variants.utils.variables import is_keras_variable


@keras.saving.register_keras_serializable("tf_adam_variants")
class LinearWarmup(keras.optimizers.schedules.LearningRateSchedule):
    """Gradual warm-up in front of a learning rate or of any schedule.

    During the first `warmup_steps` steps the learning rate moves linearly from `initial_learning_rate` to
    the rate of the schedule. After that it is the rate of the schedule:

        f    = min(step / warmup_steps, 1)
        rate = (1 - f) initial_learning_rate + f schedule(step)

    Args:
        schedule: float >= 0 or a `keras.optimizers.schedules.LearningRateSchedule`, the rate without warm-up.
            A schedule gets the step as an optimizer gives it, in int64.
        warmup_steps: int > 0, in steps as every schedule of Keras counts them: each batch is a step. With
            `gradient_accumulation_steps=4` a warm-up of 8 steps ends after 2 updates of the weights; for a
            warm-up of 8 updates write 32.
        initial_learning_rate: float >= 0, the rate of step 0. With n workers, Goyal et al. start at the
            rate of a single worker and end at n times that rate.
        shift_schedule: bool. False: the schedule counts steps from the start of training, as in the paper,
            where "a tenth from epoch 30 on" includes the 5 epochs of warm-up. True: the schedule starts
            when the warm-up ends.
        name: str.

    Raises:
        ValueError: if an argument is outside its range.

    `weight_decay_mode="schedule"` divides the rate by `warmup_target`: the float, or the first rate of the
    schedule.

    Example:
        ```pycon
        >>> import tf_adam_variants as tav
        >>> schedule = tav.schedules.LinearWarmup(0.5, warmup_steps=4, initial_learning_rate=0.1)
        >>> [round(float(schedule(step)), 3) for step in range(6)]
        [0.1, 0.2, 0.3, 0.4, 0.5, 0.5]
        >>> optimizer = tav.LAMB(tav.schedules.LinearWarmup(
        ...     keras.optimizers.schedules.CosineDecay(0.01, decay_steps=10_000), warmup_steps=500))

        ```

    Reference:
        Goyal et al., "Accurate, large minibatch SGD: training ImageNet in 1 hour", 2017,
        https://arxiv.org/abs/1706.02677 (section 2.2, gradual warmup).
    """

    def __init__(
        self,
        schedule: Any,
        warmup_steps: int,
        initial_learning_rate: float = 0.0,
        shift_schedule: bool = False,
        name: str = "LinearWarmup",
    ) -> None:
        super().__init__()
        self.schedule = schedule
        self.warmup_steps = warmup_steps
        self.initial_learning_rate = initial_learning_rate
        self.shift_schedule = shift_schedule
        self.name = name

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute; the constructor's arguments, with a check."""
        check = _CHECKS.get(name)
        super().__setattr__(name, check(name, value) if check else value)

    @property
    def warmup_target(self) -> float | None:
        """The rate at the end of the warm-up; None if the schedule does not name it."""
        return peak_of(self.schedule)

    def __call__(self, step: Any) -> Any:
        """The learning rate of a step, counted from 0."""
        with tf.name_scope(self.name):
            dtype = keras.config.floatx()
            step = _to_int64(step)
            target = self.schedule
            if callable(target):
                delay = self.warmup_steps if self.shift_schedule else 0
                target = _call_later(target, delay, step)
            # float64 holds every step count exactly.
            step = tf.cast(step, tf.float64)
            target, start = tf.cast(target, dtype), tf.cast(self.initial_learning_rate, dtype)
            done = tf.cast(tf.minimum(step / self.warmup_steps, 1), dtype)
            return tf.where(done < 1, start + (target - start) * done, target)

    def get_config(self) -> dict[str, Any]:
        """The constructor's arguments."""
        schedule = self.schedule
        return {
            "schedule": (keras.optimizers.schedules.serialize(schedule) if callable(schedule) else schedule),
            "warmup_steps": self.warmup_steps,
            "initial_learning_rate": self.initial_learning_rate,
            "shift_schedule": self.shift_schedule,
            "name": self.name,
        }

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> LinearWarmup:
        """A schedule from its configuration."""
        schedule = config["schedule"]
        if isinstance(schedule, dict):
            schedule = keras.optimizers.schedules.deserialize(schedule)
        return cls(**{**config, "schedule": schedule})


def _check_schedule(name: str, value: Any) -> Any:
    """A schedule as it is, or a float >= 0."""
    if isinstance(value, keras.optimizers.schedules.LearningRateSchedule):
        return value
    checks.check_no_class(name, value)
    return checks.check_nonnegative(name, value, "a finite number >= 0 or a LearningRateSchedule")


_CHECKS = {
    "schedule": _check_schedule,
    "warmup_steps": lambda name, value: checks.check_int(name, value, least=1),
    "initial_learning_rate": checks.check_nonnegative,
    "shift_schedule": checks.check_bool,
    "name": checks.check_str,
}


def _to_int64(step: Any) -> Any:
    """A step in int64, as optimizers count; a step that has or may have a fraction stays as it is.

    The `keras.Variable` of an optimizer stays too: a schedule can divide it by a float, but not a tensor in
    int64. A schedule can do the same with a number of NumPy's.
    """
    if (tf.is_tensor(step) or is_keras_variable(step)) and tf.as_dtype(step.dtype).is_integer:
        return step if step.dtype == "int64" else tf.cast(step, tf.int64)
    if tf.is_symbolic_tensor(step):
        return step
    number = np.asarray(step)
    whole = number.astype(np.int64)
    return whole[()] if np.array_equal(whole, number) else step


def _call_later(schedule: Any, delay: int, step: Any) -> Any:
    """The rate of a schedule that starts after this many steps."""
    if not delay:
        return schedule(step)
    if is_keras_variable(step):
        shifted = tf.maximum(tf.convert_to_tensor(step) - delay, 0)
        with keras.StatelessScope([(step, shifted)]):  # here the variable has this value
            return schedule(step)
    maximum = tf.maximum if tf.is_tensor(step) else np.maximum
    return schedule(maximum(step - delay, 0))
