"""The variables that decide the next step of a training: their description, values and assignment."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import keras
import numpy as np
import tensorflow as tf

from tf_adam_variants.optimizer import replicas

Entry = dict[str, Any]  # a variable's name, shape, type and number of copies


def find_variables(model: keras.Model, optimizers: Iterable[keras.optimizers.Optimizer]) -> list[Any]:
    """Weights, random seeds and the states of the optimizers."""
    # Keras's files leave the seeds out, so Dropout would draw its first masks again.
    slots = (variable for optimizer in optimizers for variable in optimizer.variables)
    return list({id(one): one for one in (*model.variables, *slots)}.values())


def describe(variables: Iterable[Any]) -> list[Entry]:
    """An entry per variable."""
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


def check_same(saved: Sequence[Entry], present: Sequence[Entry], path: Path) -> None:
    """Raise a ValueError that names the first difference, if there is one."""
    for one, other in itertools.zip_longest(saved, present):
        if not _is_same(one, other):
            raise ValueError(
                f"The backup {path} does not belong to this model and optimizer: it has {len(saved)} "
                f"variables, they have {len(present)}. The first that differs is {_show(one)} in the backup "
                f"and {_show(other)} here. Make both as they were, or take another `backup_dir`"
            )


def are_same(saved: Sequence[Entry], present: Sequence[Entry]) -> bool:
    """Whether the entries are those of the same variables, on whatever number of replicas."""
    return all(itertools.starmap(_is_same, itertools.zip_longest(saved, present)))


def arrays_of(variables: Iterable[Any]) -> Iterator[np.ndarray]:
    """Per variable its value, and those of its copies."""
    for variable in variables:
        yield variable.numpy()
        for copy in _copies(variable):
            yield copy.numpy()


def read_arrays(file: BinaryIO, entries: Sequence[Entry]) -> Iterator[list[np.ndarray]]:
    """What `arrays_of` gave, a list per variable."""
    for entry in entries:
        dtype, shape = np.dtype(tf.as_dtype(entry["type"]).as_numpy_dtype), entry["shape"]
        size = math.prod(shape) * dtype.itemsize
        yield [np.frombuffer(file.read(size), dtype).reshape(shape) for _ in range(1 + entry["copies"])]


def assign(variables: Iterable[Any], arrays: Iterable[list[np.ndarray]]) -> None:
    """Set the variables, and their copies, if they were saved on as many replicas."""
    for variable, (value, *others) in zip(variables, arrays, strict=True):
        variable.assign(value)
        copies = _copies(variable)
        if len(copies) == len(others):
            for copy, array in zip(copies, others, strict=True):
                copy.assign(array)


def _copies(variable: Any) -> list[Any]:
    """The copies of a variable on several replicas where they may differ: averages of batches, metrics."""
    copies = [] if variable.trainable else replicas.replicas(variable)
    return copies if len(copies) > 1 else []


def _is_same(saved: Entry | None, present: Entry | None) -> bool:
    return bool(saved and present) and saved | {"copies": 0} == present | {"copies": 0}  # type: ignore[operator]


def _show(entry: Entry | None) -> str:
    return f"{entry['name']} {tuple(entry['shape'])} {entry['type']}" if entry else "none"
