"""`TrustRatioLogger`: weight norm, update norm and trust ratio of each variable, to TensorBoard."""

from __future__ import annotations

import os
from typing import Any

import keras
import tensorflow as tf

from tf_adam_variants.callbacks import norms, summaries
from tf_adam_variants.utils import checks, internals


class TrustRatioLogger(keras.callbacks.Callback):
    """Write weight norm, update norm and trust ratio of every trainable variable to TensorBoard.

    For a variable with weights w before a step that is logged:

        weight_norm = |w|
        update_norm = |u|,  u = d + decay w
        trust_ratio = r = |w| / |u|, 1 where either norm is 0

    d is the direction of the step: Adam's (AdamW, LAMB) or QHAdam's (QHAdam, QHAdamW). The learning rate is
    what multiplies u, and decay follows from `weight_decay` l:

        LAMB        w <- w - learning_rate r u      decay = l; r as in the step: clipped to
                                                    [trust_ratio_min, trust_ratio_max], and 1 for
                                                    variables excluded from layer adaptation
        AdamW,      w <- w - learning_rate u        weight_decay_mode="learning_rate": decay = l
        QHAdamW                                                       "schedule": l / peak_learning_rate
                                                                      "independent": l / learning_rate
        QHAdam      w <- w - learning_rate u        decay = 0

    and decay = 0 for variables excluded from weight decay. For AdamW, QHAdamW and QHAdam the trust ratio is
    hypothetical: LAMB would use it. Their steps change a variable by learning_rate / r of its norm, so that
    a learning rate becomes too large for the variable with the smallest r first.

    What is not defined is not logged: u where an independent decay is divided by a learning rate of 0, and r
    where a norm is not finite.

    Before a step that is logged, the callback copies the weights. After the step, it computes all of this
    from the copies and the optimizer's slots: the step itself is the same as without the callback.

    Tags are a quantity and the variable's path without the model's name, as `trust_ratio/dense/kernel`, and
    `trust_ratio/all` for histograms over all variables. TensorBoard's step is the number of updates, this
    one included, also over several `fit`. Where a step does not update (`gradient_accumulation_steps`, or a
    `LossScaleOptimizer` whose gradients overflow), the callback logs the next step that does.

    Args:
        log_dir: str or path: the folder of the event files, in which TensorBoard looks. As for
            `keras.callbacks.TensorBoard`; the two may have the same.
        update_freq: "epoch": the first step of each epoch, because Keras may not know which step will be the
            last. An integer N: every N steps, also counting those that only accumulate gradients.
        history: whether the numbers that were logged last in an epoch are in its `logs`, under their tags:
            for the `History` that `fit` returns, for callbacks that come after this one, and on the
            progress bar. NaN where none was logged in the epoch.

    Raises:
        ValueError: on an argument outside its range; in `fit`, where the model's optimizer is not one of this
            package (it may be in a `LossScaleOptimizer`).
        OSError: in `fit`, where no event file can be written.

    Example:
        ```pycon
        >>> import tempfile, numpy as np, tf_adam_variants as tav
        >>> ratios = tav.callbacks.TrustRatioLogger(tempfile.mkdtemp(), update_freq=2, history=True)
        >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1, name="dense")])
        >>> model.compile("lamb", "mse")
        >>> x = np.ones((32, 4))
        >>> history = model.fit(x, x[:, :1], batch_size=8, epochs=3, verbose=0, callbacks=[ratios]).history
        >>> len(history["trust_ratio/dense/kernel"])
        3

        ```
    """

    def __init__(
        self, log_dir: str | os.PathLike[str], update_freq: str | int = "epoch", history: bool = False
    ) -> None:
        super().__init__()
        log_dir = checks.to_python(log_dir)
        if not log_dir or not isinstance(log_dir, (str, os.PathLike)):
            checks.reject("log_dir", log_dir, "a folder, as a str or a path: the one of TensorBoard")
        allowed = '"epoch" or an integer >= 1: how many steps there are from one that is logged to the next'
        self.log_dir = log_dir
        self.update_freq = checks.check_frequency("update_freq", update_freq, allowed)
        self.history = checks.check_bool("history", history)
        self._writer: Any = None
        self._before: norms.Before | None = None  # the state before a step that is logged
        self._numbers: dict[str, float] = {}  # logged last in this epoch, by tag
        self._steps, self._next = 0, 0.0  # how many steps the optimizer has taken, and when the next is due

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        """Check the optimizer."""
        self._optimizer = norms.find_optimizer(self.model)
        self._due = False  # whether the next step that updates is to be logged

    def on_epoch_begin(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Find the optimizer again: a callback may have compiled the model."""
        self._optimizer = norms.find_optimizer(self.model)
        self._due = self._due or self.update_freq == "epoch"
        self._numbers = {}
        self._count()

    def on_train_batch_begin(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        """Copy the weights before a step that is logged."""
        self._steps += self.model.steps_per_execution
        if not self._due and self._steps >= self._next:
            # Now the optimizer's count: AtomicBackupAndRestore passes over steps, which are none of it.
            self._steps = internals.count_steps(self._optimizer) + self.model.steps_per_execution
            self._due = self._steps >= self._next
        self._before = norms.Before.copy(self.model, self._optimizer) if self._due else None

    def on_train_batch_end(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        """Log the step, if it updated."""
        before, self._before = self._before, None
        if before is None or not before.copies or before.updates == norms.count_updates(self._optimizer):
            return
        self._due = False
        self._count()
        self._numbers = before.norms()
        self._writer = self._writer or summaries.create_writer(self.log_dir)
        # Keras's TensorBoard callback may have switched recording off for this step.
        with self._writer.as_default(norms.count_updates(self._optimizer)), tf.summary.record_if(True):
            for tag, number in self._numbers.items():
                summaries.write_scalar(tag, number)
            for quantity in norms.QUANTITIES:
                of_all = [n for tag, n in self._numbers.items() if tag.startswith(f"{quantity}/")]
                summaries.write_histogram(f"{quantity}/all", of_all)

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Give TensorBoard and `logs` what was logged in the epoch."""
        if self._writer is not None:
            self._writer.flush()
        if logs is not None and self.history:
            tags = norms.tags(norms.names(self.model, self._optimizer))
            logs.update(dict.fromkeys(tags, float("nan")) | self._numbers)

    def on_train_end(self, logs: dict[str, Any] | None = None) -> None:
        """Close the event file."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def _count(self) -> None:
        """Read how many steps the optimizer has taken, and find the next that is to be logged."""
        self._steps = internals.count_steps(self._optimizer)
        freq = self.update_freq
        self._next = float("inf") if isinstance(freq, str) else (self._steps // freq + 1) * freq
