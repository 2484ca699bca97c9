"""An optimizer from a configuration file, by its bare name or with its options.

    python examples/train_from_yaml.py [FILE]

FILE is examples/qhadamw.yaml if left out; examples/lamb_warmup.yaml has options and a learning rate
schedule inside a schedule.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import yaml
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import tf_adam_variants  # noqa: F401 - registers the names that the files use


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path, nargs="?", default=Path(__file__).with_name("qhadamw.yaml"))
    file = parser.parse_args().file
    config = yaml.safe_load(file.read_text(encoding="utf-8"))

    images, labels = load_digits(return_X_y=True)
    x_train, x_test, y_train, y_test = train_test_split(
        images / 16, labels, test_size=360, stratify=labels, random_state=0
    )

    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [
            keras.Input((64,)),
            keras.layers.Dense(128, activation="relu"),
            keras.layers.Dense(10, activation="softmax"),
        ]
    )
    # A name and a {class_name, config} mapping are both what keras.optimizers.get() takes.
    optimizer = keras.optimizers.get(config["optimizer"])
    model.compile(optimizer, loss="sparse_categorical_crossentropy", metrics=["accuracy"])
    model.fit(x_train, y_train, batch_size=config["batch_size"], epochs=config["epochs"], verbose=2)

    _, accuracy = model.evaluate(x_test, y_test, verbose=0)
    print(f"{file.name}: {type(optimizer).__name__}, test accuracy {accuracy:.3f}")


if __name__ == "__main__":
    main()
