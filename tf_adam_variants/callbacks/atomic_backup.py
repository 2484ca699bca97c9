"""`AtomicBackupAndRestore`: a training that is killed and resumed ends as if nothing had happened."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

import keras
import tensorflow as tf

from tf_adam_variants.callbacks import model_optimizers, training_state
from tf_adam_variants.callbacks.backup_folder import Backup, BackupFolder
from tf_adam_variants.utils import checks, internals

_FORMAT = 2  # the first had no "builds", and left out what `model_optimizers.find` finds everywhere
_END = object()


class AtomicBackupAndRestore(keras.callbacks.Callback):
    """`keras.callbacks.BackupAndRestore` that survives a kill at any moment, and resumes at the very step.

    `fit` backs up the training. A program that was killed and is started again resumes from the last backup,
    and ends bit-exact as if it had not been interrupted. A backup is written under another name, forced to
    the disk and renamed, and the one before is kept. Each has SHA-256 digests, and `fit` resumes from the
    newest that is whole. It prints the name of this backup and of those that are damaged. If all backups are
    damaged, that is an error: training never starts over silently.

    A backup holds all variables of the model, random seeds among them, those of its optimizers, the epoch,
    the step in the epoch, and what the metrics have counted in it. A model with its own `train_step` may have
    several optimizers: as attributes of it or of its layers, also in lists and dicts. Those that the first
    step built are built again on the same variables.

    Args:
        backup_dir: str or path: a local folder for the backups of this `fit` alone. They take the room of
            two models with their optimizers' slots, and of a third while a backup is written.
        save_freq: "epoch": a backup after each epoch. An integer: after that many steps.
        delete_checkpoint: whether to remove the backups when `fit` is done.

    Raises:
        ValueError: on an argument outside its range; in `fit`, where `backup_dir` is a file, the model has
            not been built, a backup does not belong to it, or an optimizer trains variables that it does not
            have.
        OSError: in `fit`, where a backup cannot be written, or none can be read.

    When `fit` resumes in an epoch, it draws the data of the epoch's first steps again without training on
    them. So they must come in the same order, as with `shuffle=False`, or in one that depends on the epoch.
    Put the callback after those that change the model or its optimizer at the end of an epoch, as
    `ReduceLROnPlateau` does.

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
        *,
        delete_checkpoint: bool = True,
    ) -> None:
        super().__init__()
        backup_dir = checks.to_python(backup_dir)
        text = str(backup_dir) if isinstance(backup_dir, (str, os.PathLike)) else ""
        if not text or "://" in text or "\0" in text:
            checks.reject("backup_dir", backup_dir, "a local folder")
        self.backup_dir = backup_dir
        self.save_freq = checks.check_frequency("save_freq", save_freq, '"epoch" or an integer >= 1')
        self.delete_checkpoint = checks.check_bool("delete_checkpoint", delete_checkpoint)
        self._folder = BackupFolder(Path(backup_dir))
        self._epoch = 0
        self._step = 0  # how many of the epoch's steps are done
        self._steps_since_backup = 0
        self._steps_to_skip = 0
        self._saved: dict[str, Any] = {}  # the description of the backup that `fit` resumes from
        self._metrics: list[Any] = []  # the values of the metrics after the steps to skip

    # -- resuming --------------------------------------------------------------------------------------------

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        """Resume from the newest backup that is whole."""
        self._check_built()
        self._check_folder()
        internals.restore_train_function(self.model)  # of a `fit` that an exception ended
        self._steps_since_backup = self._steps_to_skip = 0
        backup = self._folder.find_whole()
        if backup is not None:
            self._restore(backup)
        elif (Path(self.backup_dir) / "latest.weights.h5").exists():
            raise ValueError(
                f"{self.backup_dir} holds a backup of keras.callbacks.BackupAndRestore. Finish that training "
                "with it, or take another `backup_dir`"
            )

    def _check_built(self) -> None:
        """Raise a ValueError for a model whose variables do not exist yet."""
        # One that only its `train_step` calls in parts has no `call`, and is never built itself.
        without_call = type(self.model).call is keras.Model.call
        parts = internals.layers_of(self.model)[1:] if without_call else [self.model]
        unbuilt = [part.name for part in parts if not part.built]
        if unbuilt:
            raise ValueError(
                f"AtomicBackupAndRestore needs a model that is built before `fit`. {unbuilt[0]} is not: "
                "give it an Input, or call it on a batch"
            )

    def _check_folder(self) -> None:
        """Raise an error that names the argument, where no backup could be written: rather now than later."""
        try:
            self._folder.prepare()
        except NotADirectoryError as error:
            allowed = f"a local folder, new or not. {error.strerror}: move it away, or take another folder"
            checks.reject("backup_dir", self.backup_dir, allowed)
        except OSError as error:
            raise OSError(
                error.errno,
                f"No backup can be written in `backup_dir`: {error.strerror or error}. Received: "
                f"backup_dir={self.backup_dir!r}. Take a folder that can be written, with room for backups",
            ) from error

    def _restore(self, backup: Backup) -> None:
        saved = self._saved = backup.description
        optimizers = self._check(backup)
        for layout, text in zip(model_optimizers.layouts(optimizers), saved["layouts"], strict=True):
            layout.deserialize(text)
        with backup.open() as file:
            arrays = training_state.read_arrays(file, saved["variables"])
            training_state.assign(training_state.find_variables(self.model, optimizers), arrays)
            self._metrics = list(training_state.read_arrays(file, saved["metrics"]))
        self._steps_to_skip = saved["step"]
        internals.set_initial_epoch(self.model, saved["epoch"])
        damaged = f". Passed over as damaged: {', '.join(backup.damaged)}" if backup.damaged else ""
        _say(
            f"AtomicBackupAndRestore: training goes on from {backup.path}, after {saved['epoch']} epochs and "
            f"{saved['step']} steps{damaged}"
        )

    def _check(self, backup: Backup) -> list[keras.optimizers.Optimizer]:
        """Raise a ValueError for a backup of another model or optimizer. Build the optimizers that were."""
        saved, model = backup.description, self.model
        if saved["format"] not in (1, _FORMAT):
            raise ValueError(f"The backup {backup.path} was written by another version of tf_adam_variants")
        first_format = saved["format"] == 1
        optimizers = model_optimizers.find(model, everywhere=not first_format)
        before, here = saved["optimizers"], model_optimizers.names(optimizers)
        if before != here:
            raise ValueError(
                f"The backup {backup.path} is of a training with {', '.join(before)}. Here: "
                f"{', '.join(here)}. Compile as before, or take another `backup_dir`"
            )
        if first_format:
            if saved["built"] and not model.optimizer.built:
                with model.distribute_strategy.scope():
                    model.optimizer.build(model.trainable_variables)
        else:
            weights = training_state.describe(model.variables)
            if training_state.are_same(saved["variables"][: saved["weights"]], weights):
                model_optimizers.build(model, optimizers, saved["builds"])
        present = training_state.describe(training_state.find_variables(model, optimizers))
        training_state.check_same(saved["variables"], present, backup.path)
        if not first_format:
            model_optimizers.check_same_builds(model, optimizers, saved["builds"], backup.path)
        return optimizers

    def on_epoch_begin(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Count the epoch's steps from 0."""
        self._epoch, self._step = epoch, 0
        internals.set_initial_epoch(self.model, None)

    def on_train_batch_begin(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        """Let a step from before the backup draw its data only."""
        if self._step < self._steps_to_skip:
            if internals.is_next_step_replaced(self.model):
                raise ValueError("`fit` takes one AtomicBackupAndRestore: two cannot both go on")
            internals.replace_next_step(self.model, self._skip)

    def _skip(self, iterator: Any) -> dict[str, Any]:
        steps, before = self.model.steps_per_execution, self._saved["steps_per_execution"]
        if self._step + steps > self._steps_to_skip and steps != before:
            raise ValueError(
                f"The backup was made after {self._steps_to_skip} steps of an epoch, which is no multiple of "
                f"steps_per_execution={steps}. Compile with {before} as before"
            )
        for i in range(steps):
            if next(iterator, _END) is _END:
                if i == 0:
                    raise StopIteration  # `fit` ends the epoch
                break
        return {} if self._step + steps < self._steps_to_skip else self._restore_metrics(iterator)

    def _restore_metrics(self, iterator: Any) -> dict[str, Any]:
        """Set what the metrics have counted, so that the epoch's results are those of the whole epoch."""
        if not self._has_metrics() and not self.model.run_eagerly:
            # Keras creates their variables when it traces a step.
            spec = tf.nest.map_structure(
                lambda one: None if isinstance(one, tf.OptionalSpec) else one, iterator.element_spec
            )
            tf.function(self.model.train_step, autograph=False).get_concrete_function(spec)
        if not self._has_metrics():  # a model that runs eagerly has none yet
            _say(
                f"AtomicBackupAndRestore: the metrics of epoch {self._epoch + 1} are those of its last steps"
            )
            return {}
        training_state.assign(self.model.metrics_variables, self._metrics)
        return self.model.get_metrics_result()

    def _has_metrics(self) -> bool:
        present = training_state.describe(self.model.metrics_variables)
        return training_state.are_same(self._saved["metrics"], present)

    # -- backing up ------------------------------------------------------------------------------------------

    def on_train_batch_end(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        """Back up after every `save_freq` steps."""
        self._step += self.model.steps_per_execution
        if self._step <= self._steps_to_skip:
            return
        if not self._steps_since_backup:  # rather now than when the first backup is due
            model_optimizers.find_builds(self.model, model_optimizers.find(self.model))
        self._steps_since_backup += self.model.steps_per_execution
        if not isinstance(self.save_freq, str) and self._steps_since_backup >= self.save_freq:
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
        internals.set_initial_epoch(self.model, None)  # without any epoch too
        if self.delete_checkpoint:
            self._folder.remove_all()

    def _back_up(self, epoch: int, step: int) -> None:
        optimizers = model_optimizers.find(self.model)
        variables = training_state.find_variables(self.model, optimizers)
        metrics = self.model.metrics_variables if step else []  # an epoch begins with new ones
        description = {
            "format": _FORMAT,
            "builds": model_optimizers.find_builds(self.model, optimizers),
            "steps_per_execution": self.model.steps_per_execution,
            "epoch": epoch,
            "step": step,
            "optimizers": model_optimizers.names(optimizers),
            "weights": len(self.model.variables),
            "variables": training_state.describe(variables),
            "layouts": [layout.serialize() for layout in model_optimizers.layouts(optimizers)],
            "metrics": training_state.describe(metrics),
        }
        self._folder.write(description, training_state.arrays_of([*variables, *metrics]))
        self._steps_since_backup = 0


def _say(message: str) -> None:
    """Print as Keras's progress does, or log where that is switched off."""
    if keras.config.is_interactive_logging_enabled():
        print(message, flush=True)
    else:
        logging.getLogger(__name__).info(message)
