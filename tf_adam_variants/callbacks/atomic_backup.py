"""`AtomicBackupAndRestore`: a training that goes on after a kill as if there had been none."""

from __future__ import annotations

import itertools
import logging
import math
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import keras
import numpy as np
import tensorflow as tf

from tf_adam_variants.callbacks.backup_folder import Backup, Backups
from tf_adam_variants.optimizer import replicas
from tf_adam_variants.state import added_at
from tf_adam_variants.utils import checks

_FORMAT = 1
_END = object()

Entry = dict[str, Any]  # a variable's name, its shape, its type, its number of copies


class AtomicBackupAndRestore(keras.callbacks.Callback):
    """`keras.callbacks.BackupAndRestore` that a kill cannot break, and that goes on at the very step.

    `fit` backs up the training. A program that is started again after it was killed goes on from the last
    backup, and ends with the same bits as if it had never been interrupted. A backup is written beside,
    forced to the disk and renamed, and the one before is kept. Each has SHA-256 digests, and `fit` goes on
    from the newest that is whole. It prints which, and which ones it passed over. Backups of which none is
    whole are an error: training never begins anew silently.

    A backup holds all variables of the model, random seeds among them, those of its optimizers, the epoch,
    the step in the epoch, and what the metrics have counted in it.

    Args:
        backup_dir: str or path: a local folder for the backups of this one `fit`. They take the room of
            two models with their optimizers' slots, and of a third one while a backup is written.
        save_freq: "epoch": a backup after each epoch. An integer: after that many steps.
        double_checkpoint: Keras's. The backup before the last one is kept whatever it is.
        delete_checkpoint: whether the backups are removed when `fit` is done.

    Raises:
        ValueError: on an argument outside its range; in `fit`, where the model has not been built, or a
            backup does not belong to it.
        OSError: in `fit`, where a backup cannot be written, or none can be read.

    The data of steps that were taken already are drawn again and not trained on: they have to come in the
    same order, as with `shuffle=False`, or in one that depends on the epoch. Put the callback after those
    that change the model or its optimizer at the end of an epoch, as `ReduceLROnPlateau` does.

    Example:
        ```pycon
        >>> import tempfile, numpy as np, tf_adam_variants as tav
        >>> backup = tav.callbacks.AtomicBackupAndRestore(tempfile.mkdtemp(), save_freq=2)
        >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
        >>> model.compile("lamb", "mse")
        >>> x = np.ones((32, 4))
        >>> history = model.fit(x, x[:, :1], batch_size=8, shuffle=False, verbose=0, callbacks=[backup])

        ```
    """

    def __init__(
        self,
        backup_dir: str | os.PathLike[str],
        save_freq: str | int = "epoch",
        double_checkpoint: bool = False,
        delete_checkpoint: bool = True,
    ) -> None:
        super().__init__()
        if not backup_dir or not isinstance(backup_dir, (str, os.PathLike)) or "://" in str(backup_dir):
            raise ValueError(f"`backup_dir` must be a local folder. Received: backup_dir={backup_dir!r}")
        if save_freq != "epoch":
            try:
                save_freq = checks.check_int("save_freq", save_freq, least=1)
            except ValueError:
                raise ValueError(
                    f'`save_freq` must be "epoch" or an integer >= 1. Received: save_freq={save_freq!r}'
                ) from None
        self.backup_dir = backup_dir
        self.save_freq = save_freq
        self.double_checkpoint = checks.check_bool("double_checkpoint", double_checkpoint)
        self.delete_checkpoint = checks.check_bool("delete_checkpoint", delete_checkpoint)
        self._backups = Backups(Path(backup_dir))
        self._epoch = 0
        self._step = 0  # how many of the epoch's steps are done
        self._steps_since_backup = 0
        self._steps_to_skip = 0
        self._metrics: list[list[np.ndarray]] = []  # their values after the steps to skip
        self._metric_entries: list[Entry] = []
        self._restored = False
        self._initial_epoch: int | None = None  # of the model, while `fit` reads ours

    # -- going on --------------------------------------------------------------------------------------------

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        """Go on from the newest backup that is whole."""
        if not self.model.built:
            raise ValueError(
                f"AtomicBackupAndRestore needs a model that is built before `fit`. {self.model.name} is not: "
                "give it an Input, or call it on a batch"
            )
        self._steps_since_backup = self._steps_to_skip = 0
        backup = self.backup_folder.newest_whole()
        if backup is not None:
            self._restore(backup)
        elif (Path(self.backup_dir) / "latest.weights.h5").exists():
            raise ValueError(
                f"{self.backup_dir} holds a backup of keras.callbacks.BackupAndRestore. Finish that training "
                "with it, or take another `backup_dir`"
            )

    def _restore(self, backup: Backup) -> None:
        saved = backup.description
        if saved["format"] != _FORMAT:
            raise ValueError(f"The backup {backup.path} was written by another version of tf_adam_variants")
        optimizer = self.model.optimizer
        if saved["built"] and optimizer is not None and not optimizer.built:
            with self.model.distribute_strategy.scope():
                optimizer.build(self.model.trainable_variables)
        variables = _state(self.model)
        _compare(saved["variables"], _describe(variables), backup.path)
        before, here = saved["optimizers"], _names(self.model)
        if before != here:
            raise ValueError(
                f"The backup {backup.path} is of a training with {', '.join(before)}. Here: "
                f"{', '.join(here)}. Compile as before, or take another `backup_dir`"
            )
        for layout, text in zip(_layouts(self.model), saved["layouts"], strict=True):
            layout.deserialize(text)
        with backup.open() as file:
            for variable, arrays in zip(variables, _read(file, saved["variables"]), strict=True):
                _assign(variable, arrays)
            self._metrics = list(_read(file, saved["metrics"]))
        self._metric_entries = saved["metrics"]
        self._steps_to_skip = saved["step"]
        self._saved_steps_per_execution = saved["steps_per_execution"]
        # Private, and the only way to tell `fit`: Keras's callback does the same.
        self._initial_epoch, self.model._initial_epoch = self.model._initial_epoch, saved["epoch"]
        self._restored = True
        damaged = f". Passed over as damaged: {', '.join(backup.damaged)}" if backup.damaged else ""
        _say(
            f"AtomicBackupAndRestore: training goes on from {backup.path}, after {saved['epoch']} epochs and "
            f"{saved['step']} steps{damaged}"
        )

    def on_epoch_begin(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Count the epoch's steps from 0."""
        self._epoch, self._step = epoch, 0
        self._forget_initial_epoch()

    def on_train_batch_begin(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        """Let a step that was taken before the backup draw its data only."""
        if self._step < self._steps_to_skip:
            if getattr(self.model.train_function, "__func__", None) is AtomicBackupAndRestore._skip:
                raise ValueError("`fit` takes one AtomicBackupAndRestore: two cannot both go on")
            self._train, self.model.train_function = self.model.train_function, self._skip

    def _skip(self, iterator: Any) -> dict[str, Any]:
        """In the place of the model's train function."""
        self.model.train_function = self._train
        steps = self.model.steps_per_execution
        if self._step + steps > self._steps_to_skip and steps != self._saved_steps_per_execution:
            raise ValueError(
                f"The backup was made after {self._steps_to_skip} steps of an epoch, which is no multiple of "
                f"steps_per_execution={steps}. Compile with {self._saved_steps_per_execution} as before"
            )
        for i in range(steps):
            if next(iterator, _END) is _END:
                if i == 0:
                    raise StopIteration  # `fit` ends the epoch
                break
        if self._step + steps < self._steps_to_skip:
            return {}
        return self._restore_metrics(iterator)

    def _restore_metrics(self, iterator: Any) -> dict[str, Any]:
        """Let the metrics count on, so that the epoch's results are those of the whole epoch."""
        if not self._fit_metrics() and not self.model.run_eagerly:
            # Keras makes their variables when it traces a step.
            spec = tf.nest.map_structure(
                lambda one: None if isinstance(one, tf.OptionalSpec) else one, iterator.element_spec
            )
            tf.function(self.model.train_step, autograph=False).get_concrete_function(spec)
        if not self._fit_metrics():  # in a model that runs eagerly they are not there yet
            _say(
                f"AtomicBackupAndRestore: the metrics of epoch {self._epoch + 1} are those of its last steps"
            )
            return {}
        for variable, arrays in zip(self.model.metrics_variables, self._metrics, strict=True):
            _assign(variable, arrays)
        return self.model.get_metrics_result()

    def _fit_metrics(self) -> bool:
        present = _describe(self.model.metrics_variables)
        return all(itertools.starmap(_same, itertools.zip_longest(self._metric_entries, present)))

    # -- backing up ------------------------------------------------------------------------------------------

    def on_train_batch_end(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        """Back up after every `save_freq` steps."""
        self._step += self.model.steps_per_execution
        if self._step <= self._steps_to_skip:
            return
        self._steps_since_backup += self.model.steps_per_execution
        if isinstance(self.save_freq, int) and self._steps_since_backup >= self.save_freq:
            self._back_up(self._epoch, self._step)

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Back up after an epoch."""
        if self._step < self._steps_to_skip:
            raise ValueError(
                f"The data do not belong to the backup in {self.backup_dir}: it was made after "
                f"{self._steps_to_skip} steps of an epoch, and they end after {self._step}"
            )
        self._steps_to_skip = 0
        if self.save_freq == "epoch":
            self._back_up(epoch + 1, 0)

    def on_train_end(self, logs: dict[str, Any] | None = None) -> None:
        """Remove the backups."""
        self._forget_initial_epoch()
        if self.delete_checkpoint:
            self.backup_folder.remove_all()

    def _back_up(self, epoch: int, step: int) -> None:
        variables = _state(self.model)
        metrics = self.model.metrics_variables if step else []  # an epoch begins with new ones
        description = {
            "format": _FORMAT,
            "built": self.model.optimizer is not None and self.model.optimizer.built,
            "steps_per_execution": self.model.steps_per_execution,
            "epoch": epoch,
            "step": step,
            "optimizers": _names(self.model),
            "variables": _describe(variables),
            "layouts": [layout.serialize() for layout in _layouts(self.model)],
            "metrics": _describe(metrics),
        }
        arrays = (array for variable in [*variables, *metrics] for array in _values(variable))
        self.backup_folder.write(description, arrays)
        self._steps_since_backup = 0

    def _forget_initial_epoch(self) -> None:
        """The next `fit` of the model begins where it says."""
        if self._restored:
            self.model._initial_epoch, self._restored = self._initial_epoch, False


def _optimizers(model: keras.Model) -> list[keras.optimizers.Optimizer]:
    """The model's optimizer first; then those that a model with its own `train_step` has as attributes."""
    found = [model.optimizer]
    for value in vars(model).values():
        values = value.values() if isinstance(value, dict) else value
        found += values if isinstance(value, (dict, list, tuple)) else [value]
    return _unique(one for one in found if isinstance(one, keras.optimizers.Optimizer))


def _state(model: keras.Model) -> list[Any]:
    """All that decides the next step: weights, random seeds, the optimizers' states."""
    # Keras's files leave the seeds out, so Dropout would draw its first masks again.
    variables = (v for optimizer in _optimizers(model) for v in optimizer.variables)
    # When variables were added is in the layouts.
    return _unique([*model.variables, *(v for v in variables if v.name != added_at.NAME)])


def _names(model: keras.Model) -> list[str]:
    """The classes of its optimizers."""
    return [f"{type(one).__module__.partition('.')[0]}.{type(one).__name__}" for one in _optimizers(model)]


def _layouts(model: keras.Model) -> list[Any]:
    """What the optimizers of this package know of their slots besides the values: when each was added."""
    inner = [getattr(optimizer, "inner_optimizer", optimizer) for optimizer in _optimizers(model)]
    return [optimizer._layout for optimizer in inner if hasattr(optimizer, "_layout")]


def _unique(objects: Iterable[Any]) -> list[Any]:
    return list({id(one): one for one in objects}.values())


def _copies(variable: Any) -> list[Any]:
    """The replicas' copies of a variable where they may differ: averages of batches, what metrics count."""
    copies = [] if variable.trainable else replicas.replicas(variable)
    return copies if len(copies) > 1 else []


def _values(variable: Any) -> Iterator[np.ndarray]:
    """Its value, and those of its copies."""
    yield variable.numpy()
    for copy in _copies(variable):
        yield copy.numpy()


def _assign(variable: Any, arrays: list[np.ndarray]) -> None:
    value, *others = arrays
    variable.assign(value)
    copies = _copies(variable)
    if len(copies) == len(others):  # else the training goes on on another number of replicas
        for copy, array in zip(copies, others, strict=True):
            copy.assign(array)


def _describe(variables: Sequence[Any]) -> list[Entry]:
    return [
        {
            # Not the path: it depends on where Keras made the variable. Without the numbers of layers, which
            # count those that the process made before.
            "name": re.sub(r"_\d+(?=[_/]|$)", "", variable.name),
            "shape": list(variable.shape),
            "type": keras.backend.standardize_dtype(variable.dtype),
            "copies": len(_copies(variable)),
        }
        for variable in variables
    ]


def _same(saved: Entry | None, present: Entry | None) -> bool:
    """Whether two variables are the same one, on whatever number of replicas."""
    return bool(saved and present) and saved | {"copies": 0} == present | {"copies": 0}  # type: ignore[operator]


def _compare(saved: Sequence[Entry], present: Sequence[Entry], path: Path) -> None:
    """Raise a ValueError that names the first difference, if there is one."""
    for one, other in itertools.zip_longest(saved, present):
        if not _same(one, other):
            raise ValueError(
                f"The backup {path} does not belong to this model and optimizer: it has {len(saved)} "
                f"variables, they have {len(present)}. The first that differs is {_show(one)} in the backup "
                f"and {_show(other)} here. Make both as they were, or take another `backup_dir`"
            )


def _show(entry: Entry | None) -> str:
    return f"{entry['name']} {tuple(entry['shape'])} {entry['type']}" if entry else "none"


def _read(file: BinaryIO, entries: Sequence[Entry]) -> Iterator[list[np.ndarray]]:
    for entry in entries:
        kind, shape = np.dtype(tf.as_dtype(entry["type"]).as_numpy_dtype), entry["shape"]
        size = math.prod(shape) * kind.itemsize
        yield [np.frombuffer(file.read(size), kind).reshape(shape) for _ in range(1 + entry["copies"])]


def _say(message: str) -> None:
    """Print as Keras's progress does, or log where that is switched off."""
    if keras.config.is_interactive_logging_enabled():
        print(message, flush=True)
    else:
        logging.getLogger(__name__).info(message)
