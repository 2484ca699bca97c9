"""Scalars and histograms for TensorBoard, written without it: `tf.summary.scalar` wants it installed."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import tensorflow as tf

_SCALARS, _TENSORS = 1, 2  # data classes of TensorFlow's summary.proto


def create_writer(log_dir: str | os.PathLike[str]) -> Any:
    """A writer of event files; an OSError that names the argument, where none can be written."""
    try:
        return tf.summary.create_file_writer(os.fspath(log_dir))
    except tf.errors.OpError as error:
        raise OSError(
            f"TrustRatioLogger cannot write in `log_dir`: {error.message}. Received: log_dir={log_dir!r}. "
            "Take a folder that can be written"
        ) from error


def write_scalar(tag: str, number: float) -> None:
    """Write what `tf.summary.scalar` writes."""
    _write(tag, np.float32(number), "scalars", _SCALARS)


def write_histogram(tag: str, numbers: Sequence[float], bins: int = 30) -> None:
    """Write what `tf.summary.histogram` writes, of those numbers that are finite."""
    finite = np.array([number for number in numbers if np.isfinite(number)])
    counts, edges = np.histogram(finite, bins) if finite.size else (np.zeros(0), np.zeros(1))
    _write(tag, np.stack([edges[:-1], edges[1:], counts], axis=1), "histograms", _TENSORS)


def _write(tag: str, value: Any, plugin: str, data_class: int) -> None:
    metadata = tf.compat.v1.SummaryMetadata()
    metadata.plugin_data.plugin_name = plugin
    metadata.data_class = data_class
    tf.summary.write(tag, tf.constant(value), metadata=metadata)
