"""ResNet-50 of keras.applications, trained by AdamW from random weights on images made on the spot.

    python examples/resnet50.py [--quick] [--json FILE]

Each of ten classes has a pattern of coloured patches, shown shifted, mirrored, and under noise. `classifier`
and `images` are what a training needs:

    model = classifier(FULL, adamw(FULL))
    model.fit(images(FULL, steps=100, seed=0))

The program trains with keras.optimizers.AdamW and with tav.AdamW, and compares them; side_by_side.py says
how. --quick trains a small MobileNet: the first steps of four ResNet-50s alone take a minute.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # read when TensorFlow is imported

import keras
import numpy as np
import side_by_side
import tensorflow as tf

import tf_adam_variants as tav

CLASSES = 10
# What batch normalisation and biases learn is not decayed.
EXCLUDED = ["bias", "gamma", "beta"]


class Size(NamedTuple):
    application: Callable[..., keras.Model]
    pixels: int
    batch: int
    learning_rate: float


FULL = Size(keras.applications.ResNet50, pixels=64, batch=16, learning_rate=1e-3)
QUICK = Size(partial(keras.applications.MobileNet, alpha=0.25), pixels=32, batch=16, learning_rate=1e-2)


def adamw(size: Size, fused: bool | str = "auto") -> tav.AdamW:
    decay = {"weight_decay": 0.05, "exclude_from_weight_decay": EXCLUDED}
    return tav.AdamW(size.learning_rate, **decay, fused=fused)


def keras_adamw(size: Size) -> keras.optimizers.Optimizer:
    optimizer = keras.optimizers.AdamW(size.learning_rate, weight_decay=0.05)
    optimizer.exclude_from_weight_decay(var_names=EXCLUDED)
    return optimizer


def images(size: Size, steps: int, seed: int) -> tf.data.Dataset:
    """Batches of images between 0 and 1, and their classes."""
    patches = np.random.default_rng(0).uniform(size=(CLASSES, 2, 2, 3)).round()
    patterns = tf.image.resize(patches, (size.pixels, size.pixels))
    classes = np.random.default_rng(seed).integers(CLASSES, size=steps * size.batch)

    def image(index: tf.Tensor, label: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        seeds = tf.stack([tf.cast(seed, tf.int64), index])
        shift = tf.random.stateless_uniform([2], seeds, 0, size.pixels // 4, tf.int32)
        shown = tf.image.stateless_random_flip_left_right(tf.gather(patterns, label), seeds)
        noise = tf.random.stateless_normal(shown.shape, seeds, stddev=0.1)
        return tf.clip_by_value(tf.roll(shown, shift, [0, 1]) + noise, 0.0, 1.0), label

    made = tf.data.Dataset.from_tensor_slices(classes).enumerate().map(image, tf.data.AUTOTUNE)
    return made.batch(size.batch, drop_remainder=True).prefetch(tf.data.AUTOTUNE)


def classifier(size: Size, optimizer: keras.optimizers.Optimizer) -> keras.Model:
    """A compiled model."""
    model = size.application(weights=None, input_shape=(size.pixels, size.pixels, 3), classes=CLASSES)
    model.compile(optimizer, "sparse_categorical_crossentropy", metrics=["accuracy"], jit_compile=False)
    return model


def problem(quick: bool) -> side_by_side.Problem:
    size, steps, turns = (QUICK, 16, 3) if quick else (FULL, 6, 16)
    name = "MobileNet" if quick else "ResNet-50"
    return side_by_side.Problem(
        f"{name}, batches of {size.batch} x {size.pixels} x {size.pixels} pixels",
        theirs=partial(keras_adamw, size),
        ours=partial(adamw, size),
        model=partial(classifier, size),
        batches=lambda turn: images(size, steps, seed=turn),
        turns=turns,
    )


markdown = side_by_side.markdown

if __name__ == "__main__":
    side_by_side.main(__doc__, problem)
