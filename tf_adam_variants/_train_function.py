"""A model's train function, made once more: one that is traced anew, and leaves the other as it is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras

TrainFunction = Callable[[Any], Any]

_MAKER = "_tf_adam_variants_maker"


def made_by(make: Callable[[], TrainFunction]) -> TrainFunction:
    """What `make` returns, of which `another` makes another with it: for one that Keras did not make."""
    function = make()
    setattr(function, _MAKER, make)
    return function


def another(model: keras.Model) -> TrainFunction:
    """A train function that does what the model's does, and has no traces yet."""
    present = model.train_function
    if make := getattr(present, _MAKER, None):
        return make()
    try:
        model.make_train_function(force=True)
        return model.train_function
    finally:
        model.train_function = present
