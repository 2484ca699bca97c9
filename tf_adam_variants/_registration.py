"""The short names, "qhadamw" and "QHAdamW", for `model.compile(optimizer=...)`."""

from __future__ import annotations

import keras


def register(*optimizers: type[keras.optimizers.Optimizer]) -> None:
    """Make each class known to Keras by its name and by its name in lower case.

    A name that Keras, or somebody else's registration, resolves already is left as it is: "adamw"
    stays Keras's own.
    """
    known = keras.saving.get_custom_objects()
    for optimizer in optimizers:
        for name in (optimizer.__name__, optimizer.__name__.lower()):
            if name not in known and not _keras_resolves(name):
                known[name] = optimizer


def _keras_resolves(name: str) -> bool:
    """Asked with an argument that no optimizer takes: making one would start TensorFlow's runtime."""
    try:
        keras.optimizers.deserialize({"class_name": name, "config": {"no_such_argument": None}})
    except (TypeError, ValueError) as error:
        return "Could not locate" not in str(error)
    return False  # what Keras does not know it gives back as it came
