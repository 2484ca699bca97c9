"""`TrustRatioLogger`: weight norm, update norm and trust ratio of each variable, to TensorBoard."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import keras
import numpy as np
import tensorflow as tf

from tf_adam_variants.optimizer import replicas
from tf_adam_variants.optimizer.base import AdamVariant
from tf_adam_variants.utils import checks, internals
from tf_adam_variants.utils.internals import TrainFunction
from tf_adam_variants.utils.variables import path_of

QUANTITIES = ("weight_norm", "update_norm", "trust_ratio")


class TrustRatioLogger(keras.callbacks.Callback):
    """Write weight norm, update norm and trust ratio of every trainable variable to TensorBoard.

    Of a variable with weights w, at a step that is logged, before the step is taken:

        weight_norm = |w|
        update_norm = |u|,  u = d + decay w
        trust_ratio = r = |w| / |u|, 1 where either norm is 0

    d is the direction of this step, from the clipped gradient and the moments that the step makes of it:
    Adam's (AdamW, LAMB) or QHAdam's (QHAdam, QHAdamW), see there. So u is what the learning rate is a factor
    of, and in `weight_decay` l:

        LAMB        w <- w - learning_rate r u      decay = l; r is the one that the step takes: clipped
                                                    to [trust_ratio_min, trust_ratio_max], and 1 for
                                                    variables excluded from layer adaptation
        AdamW,      w <- w - learning_rate u        weight_decay_mode="learning_rate": decay = l
        QHAdamW                                                       "schedule": l / peak_learning_rate
                                                                      "independent": l / learning_rate
        QHAdam      w <- w - learning_rate u        decay = 0

    and decay = 0 for variables excluded from weight decay. AdamW, QHAdamW and QHAdam take no trust ratio:
    theirs is the one that LAMB would take. A step of LAMB moves a variable by the learning rate times |w|,
    where r is not clipped; one of the others moves it by learning_rate / r times |w|, so that a rate becomes
    too large for the variable with the smallest r first.

    Norms are those of the arithmetic: float32 for float16 and bfloat16 variables, of the master weights where
    there are some. With sparse_update="lazy" they are taken over the rows that the gradient names, which
    alone take the step.

    A tag is a quantity and the variable's path without the model's name, as `trust_ratio/dense/kernel`.
    `trust_ratio/all` and its like are histograms over all variables. TensorBoard's step is the count of the
    optimizer's updates, this one included; it goes on from one `fit` to the next.

    Steps that are not logged run the model's train function as it is. Those that are logged run a second one,
    which computes the norms too. It is traced at the first logged step, and compiled where XLA compiles the
    other, which takes as long once more. The weights become what they would be without the callback: bit for
    bit, or to rounding where XLA compiles the update.

    Where a step does not update, the next one that does is logged: with `gradient_accumulation_steps`, or
    where a `LossScaleOptimizer` passes over gradients that overflow. With `steps_per_execution` the numbers
    are those of the last update in the call.

    Args:
        log_dir: str or path: the folder of the event files, in which TensorBoard looks. As for
            `keras.callbacks.TensorBoard`; the two may have the same.
        update_freq: "epoch": the first step of each epoch, because Keras may not know which one will be the
            last. An integer N: every N steps, counted by the optimizer, also those that only accumulate
            gradients.
        history: whether the numbers that were logged last in an epoch are in its `logs`, under their tags:
            for the `History` that `fit` returns, for callbacks that come after this one, and on the
            progress bar. NaN where none was logged in the epoch.

    Raises:
        ValueError: on an argument outside its range; in `fit`, where the model's optimizer is not one of this
            package (it may be in a `LossScaleOptimizer`), where there are two TrustRatioLoggers, or where
            the model's `train_step` calls a `tf.function` of its own that takes the optimizer's step.

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

    Keras's names that this class relies on besides documented ones, all of them here: `Model.train_function`
    and `Model.make_train_function`, which `fit` calls and makes; `Model.steps_per_execution`; the optimizer's
    `inner_optimizer`, `_iterations` and `_trainable_variables`.
    """

    def __init__(
        self, log_dir: str | os.PathLike[str], update_freq: str | int = "epoch", history: bool = False
    ) -> None:
        super().__init__()
        if not log_dir or not isinstance(log_dir, (str, os.PathLike)):
            raise ValueError(
                "`log_dir` must be a folder, as a str or a path: the one that TensorBoard is given. "
                f"Received: log_dir={log_dir!r}"
            )
        if update_freq != "epoch":
            try:
                update_freq = checks.check_int("update_freq", update_freq, least=1)
            except ValueError:
                raise ValueError(
                    '`update_freq` must be "epoch" or an integer >= 1: how many steps there are from one '
                    f"that is logged to the next. Received: update_freq={update_freq!r}"
                ) from None
        self.log_dir = log_dir
        self.update_freq = update_freq
        self.history = checks.check_bool("history", history)
        self._writer: Any = None
        self._plain: TrainFunction | None = None  # the model's train function
        self._watched: TrainFunction | None = None  # the one that computes the norms, once it is made
        self._table: _Table | None = None
        self._due = False  # whether the next step that updates is to be logged
        self._steps = 0  # that the optimizer has taken
        self._numbers: dict[str, float] = {}  # logged last in this epoch

    # -- which steps are logged ------------------------------------------------------------------------------

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        """Check the optimizer."""
        self._optimizer = _optimizer_of(self.model)
        self._due = False

    def on_epoch_begin(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Look at the model, which a callback may have compiled anew, and at the count of steps."""
        self._put_back()
        self._optimizer = _optimizer_of(self.model)
        if self._plain is not self.model.train_function:
            self._plain, self._watched = self.model.train_function, None
        self._steps = int(self._optimizer._iterations.numpy())
        self._due = self._due or self.update_freq == "epoch"
        self._numbers = {}

    def on_train_batch_begin(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        """Put the other train function in the place of the model's, for a step that is logged."""
        self._put_back()
        if getattr(self.model.train_function, "__func__", None) is TrustRatioLogger._step:
            raise ValueError("`fit` takes one TrustRatioLogger. Remove the others")
        if self.model.train_function is not self._plain:
            return  # AtomicBackupAndRestore passes over this step
        before, self._steps = self._steps, self._steps + self.model.steps_per_execution
        if isinstance(self.update_freq, int) and before // self.update_freq < self._steps // self.update_freq:
            self._due = True
        if self._due and self._is_ready():
            self.model.train_function = self._step

    def _put_back(self) -> None:
        """Undo it, where the step was not taken."""
        function = self.model.train_function
        if getattr(function, "__self__", None) is self:
            self.model.train_function = self._plain

    def _is_ready(self) -> bool:
        """Make the other train function and the table for the norms, as soon as there are variables."""
        if not self._optimizer.built and self.model.built and self.model.trainable_variables:
            with self.model.distribute_strategy.scope():
                self.model.optimizer.build(self.model.trainable_variables)
        table = self._made_table()
        if table is not None and self._watched is None:
            self._watched, table.was_told = internals.another(self.model), False
        return table is not None

    def _made_table(self) -> _Table | None:
        if not self._optimizer.built or not self.model.trainable_variables:
            return None  # a step may build them, and the next one is logged
        variables = self._optimizer._trainable_variables
        if self._table is None or not self._table.is_of(variables):
            self._table, self._watched = _Table(variables, self.model.name), None
        return self._table

    # -- a logged step ---------------------------------------------------------------------------------------

    def _step(self, iterator: Any) -> Any:
        """In the place of the model's train function."""
        self.model.train_function = self._plain
        assert self._table is not None
        assert self._watched is not None
        self._table.clear()
        self._optimizer._watcher = self._table.write
        try:
            results = self._watched(iterator)
        finally:
            self._optimizer._watcher = None
        if not self._table.was_told and not self.model.run_eagerly:
            raise ValueError(
                f"TrustRatioLogger sees no step of {self._optimizer.name}: {self.model.name}'s train_step "
                "calls it in a tf.function of its own, which was traced before. Call "
                "`optimizer.apply` in train_step itself, which Keras makes a tf.function of"
            )
        if numbers := self._table.read():
            self._due = False
            self._write(numbers)
        return results

    def _write(self, numbers: list[Norms]) -> None:
        update = int(self._optimizer.iterations.numpy())
        self._numbers = {
            f"{quantity}/{one.name}": getattr(one, quantity) for quantity in QUANTITIES for one in numbers
        }
        if self._writer is None:
            self._writer = tf.summary.create_file_writer(os.fspath(self.log_dir))
        # Keras's TensorBoard callback may have switched recording off for this step.
        with self._writer.as_default(update), tf.summary.record_if(True):
            for tag, number in self._numbers.items():
                _write_scalar(tag, number)
            for quantity in QUANTITIES:
                _write_histogram(f"{quantity}/all", [getattr(one, quantity) for one in numbers])

    # -- what becomes of the numbers -------------------------------------------------------------------------

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Let TensorBoard and `logs` have what was logged in the epoch."""
        self._put_back()
        if self._writer is not None:
            self._writer.flush()
        table = self._made_table() if self.history else None
        if logs is not None and table is not None:
            missing = {f"{quantity}/{name}": np.nan for quantity in QUANTITIES for name in table.names}
            logs.update(missing | self._numbers)

    def on_train_end(self, logs: dict[str, Any] | None = None) -> None:
        """Close the event file."""
        self._put_back()
        if self._writer is not None:
            self._writer.close()
            self._writer = None


def _optimizer_of(model: keras.Model) -> AdamVariant:
    """The model's optimizer, or the one that it wraps."""
    optimizer = model.optimizer
    while hasattr(optimizer, "inner_optimizer"):
        optimizer = optimizer.inner_optimizer
    if isinstance(optimizer, AdamVariant):
        return optimizer
    raise ValueError(
        "TrustRatioLogger needs an optimizer of tf_adam_variants, alone or in a LossScaleOptimizer. "
        f"Received: {type(optimizer).__module__}.{type(optimizer).__name__}. Compile {model.name} with one, "
        "or leave the callback out"
    )


class Norms(NamedTuple):
    """What is logged of a variable."""

    name: str
    weight_norm: float
    update_norm: float
    trust_ratio: float


class _Table:
    """Where a step leaves the norms: a row a variable."""

    def __init__(self, variables: Sequence[Any], model: str) -> None:
        self._of = list(variables)
        self.names = _names(variables, model)
        self.was_told = False
        device = replicas.devices(variables[0])[0]
        with tf.init_scope(), tf.device(device):
            made = tf.Variable(self._empty(), trainable=False)
        self._rows = replicas.on_device(made, device)

    def _empty(self) -> np.ndarray:
        return np.full((len(self._of), len(QUANTITIES)), -1.0)  # no norm is

    def is_of(self, variables: Sequence[Any]) -> bool:
        """Whether it has rows for just these variables."""
        return list(map(id, self._of)) == list(map(id, variables))

    def clear(self) -> None:
        """Before a step."""
        self._rows.assign(self._empty())

    def write(self, indices: list[int], norms: Any) -> Any:
        """Let the step, which may be one that is traced, write some variables' rows."""
        self.was_told = True
        with tf.device(self._rows.device):
            return self._rows.scatter_update(tf.IndexedSlices(norms, tf.constant(indices)))

    def read(self) -> list[Norms]:
        """The rows that a step has written."""
        rows = zip(self.names, self._rows.numpy().tolist(), strict=True)
        return [Norms(name, *row) for name, row in rows if row[0] != -1.0]


def _names(variables: Sequence[Any], model: str) -> list[str]:
    """Their paths without the model's name, each once."""
    names: list[str] = []
    for variable in variables:
        name = path = path_of(variable).removeprefix(f"{model}/")
        number = 0
        while name in names:
            number += 1
            name = f"{path}_{number}"
        names.append(name)
    return names


def _write_scalar(tag: str, number: float) -> None:
    _write_summary(tag, np.float32(number), "scalars", 1)


def _write_histogram(tag: str, numbers: list[float], bins: int = 30) -> None:
    finite = np.array([number for number in numbers if np.isfinite(number)])
    counts, edges = np.histogram(finite, bins) if finite.size else (np.zeros(0), np.zeros(1))
    _write_summary(tag, np.stack([edges[:-1], edges[1:], counts], axis=1), "histograms", 2)


def _write_summary(tag: str, value: Any, plugin: str, data_class: int) -> None:
    """What `tf.summary.scalar` and `tf.summary.histogram` do, but these want TensorBoard installed."""
    metadata = tf.compat.v1.SummaryMetadata()
    metadata.plugin_data.plugin_name = plugin
    metadata.data_class = data_class  # DATA_CLASS_SCALAR or DATA_CLASS_TENSOR of summary.proto
    tf.summary.write(tag, tf.constant(value), metadata=metadata)
