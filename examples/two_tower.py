"""A two-tower recommender with large embedding tables, trained by AdamW with lazy sparse updates.

    python examples/two_tower.py [--quick] [--json FILE]

Who likes what is made on the spot as in recommender.py: each user and each item has hidden factors, and is
drawn by a Zipf law. A tower is an embedding and two dense layers; the product of the two towers' outputs says
whether the user likes the item. `two_towers` and `interactions` are what a training needs:

    model = two_towers(FULL, adamw())
    model.fit(interactions(FULL))

The program trains with keras.optimizers.Adam and with tav.AdamW(sparse_update="lazy"), and compares them;
side_by_side.py says how.
"""

from __future__ import annotations

import os
from functools import partial
from typing import NamedTuple

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # read when TensorFlow is imported

import keras
import recommender
import side_by_side
import tensorflow as tf

import tf_adam_variants as tav


class Size(NamedTuple):
    users: int
    items: int
    width: int
    batch: int
    batches: int


FULL = Size(users=1_000_000, items=200_000, width=32, batch=8192, batches=160)
QUICK = Size(users=20_000, items=5_000, width=16, batch=1024, batches=40)


def adamw(fused: bool | str = "auto") -> tav.AdamW:
    return tav.AdamW(5e-3, weight_decay=0.0, sparse_update="lazy", fused=fused)


def keras_adam() -> keras.optimizers.Optimizer:
    return keras.optimizers.Adam(5e-3)


def interactions(size: Size) -> tf.data.Dataset:
    """Batches of users and items, and whether the one likes the other."""
    rows, shape = (size.users, size.items), (size.batches, size.batch)
    users, items, ratings, _ = recommender.ratings(rows, size.batches * size.batch)
    inputs = {"user": users.reshape(shape), "item": items.reshape(shape)}
    return tf.data.Dataset.from_tensor_slices((inputs, (ratings > 0).reshape(shape)))


def tower(rows: int, width: int, name: str) -> keras.Sequential:
    layers = [
        keras.layers.Embedding(rows, width),
        keras.layers.Dense(2 * width, "relu"),
        keras.layers.Dense(width),
    ]
    return keras.Sequential(layers, name=name)


def two_towers(size: Size, optimizer: keras.optimizers.Optimizer) -> keras.Model:
    """A compiled model."""
    inputs = {name: keras.Input((), dtype="int64", name=name) for name in ("user", "item")}
    user = tower(size.users, size.width, "user_tower")(inputs["user"])
    item = tower(size.items, size.width, "item_tower")(inputs["item"])
    model = keras.Model(inputs, keras.layers.Dot(axes=1)([user, item]))
    loss = keras.losses.BinaryCrossentropy(from_logits=True)
    model.compile(optimizer, loss, metrics=[keras.metrics.BinaryAccuracy(threshold=0.0)], jit_compile=False)
    return model


def problem(quick: bool) -> side_by_side.Problem:
    size, steps = (QUICK, 8) if quick else (FULL, 10)
    batches = interactions(size)
    tables = f"{size.users:,} users and {size.items:,} items, width {size.width}"
    return side_by_side.Problem(
        f"two towers, {tables}; batches of {size.batch:,}",
        theirs=keras_adam,
        ours=adamw,
        model=partial(two_towers, size),
        batches=lambda turn: batches.skip(turn * steps).take(steps),
        turns=size.batches // steps,
    )


markdown = side_by_side.markdown

if __name__ == "__main__":
    side_by_side.main(__doc__, problem)
