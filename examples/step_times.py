"""A Keras callback that times the steps of `fit`."""

from __future__ import annotations

import time
from typing import Any

import keras


class StepTimes(keras.callbacks.Callback):
    """Milliseconds of each step, as the training loop sees them: to fetch a batch, and to train on it."""

    def __init__(self) -> None:
        super().__init__()
        self.milliseconds: list[float] = []

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        self._start = time.perf_counter()

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        self.milliseconds.append(1e3 * (time.perf_counter() - self._start))
