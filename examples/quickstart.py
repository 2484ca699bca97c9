"""An optimizer by its name: compile, fit, save, load, go on. Run: python examples/quickstart.py"""

import tempfile
from pathlib import Path

import keras
from sklearn.datasets import load_digits

import tf_adam_variants  # noqa: F401 - registers "qhadam", "qhadamw" and "lamb"

digits = load_digits()
x, y = digits.data / 16, digits.target

model = keras.Sequential(
    [keras.Input((64,)), keras.layers.Dense(64, "relu"), keras.layers.Dense(10, "softmax")]
)
model.compile(optimizer="qhadamw", loss="sparse_categorical_crossentropy", metrics=["accuracy"])
model.fit(x, y, epochs=3)

with tempfile.TemporaryDirectory() as folder:
    path = Path(folder, "digits.keras")
    model.save(path)  # the optimizer's averages and step count are saved too
    model = keras.models.load_model(path)
model.fit(x, y, epochs=3)  # goes on where the first fit stopped
