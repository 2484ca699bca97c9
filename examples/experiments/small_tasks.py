"""Four small tasks that the experiments train on. A training takes a second or two on one core.

    images        scikit-learn's digits, a convolutional network
    text          lines of a Markov chain, a small transformer: the next letter
    tabular       scikit-learn's Friedman function of 10 columns, a dense network: a number
    recommender   ratings made from hidden factors of users and items, embeddings: sparse gradients

The data come from scikit-learn and from fixed seeds. `validation` is for tuning, `test` for the report.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # examples/

import keras
import numpy as np
import tensorflow as tf
from digits import make_model
from sklearn.datasets import load_digits, make_friedman1

VOCABULARY, LENGTH = 24, 24
CHAINS, CHAIN_LETTERS = 4, 12


class Split(NamedTuple):
    x: Any
    y: np.ndarray


class Task(NamedTuple):
    make: Callable[[], keras.Model]
    loss: keras.losses.Loss
    train: Split
    validation: Split
    test: Split
    steps: int
    batch_size: int = 64


class Training(NamedTuple):
    model: keras.Model
    losses: list[float]  # the mean training loss of each piece


def crossentropy() -> keras.losses.Loss:
    return keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def images() -> Task:
    digits = load_digits()
    order = np.random.default_rng(0).permutation(len(digits.target))
    x, y = digits.images[order, ..., None].astype("float32") / 16, digits.target[order]
    return Task(digits_logits, crossentropy(), *split(x, y, sizes=(1024, 386)), steps=200)


def digits_logits() -> keras.Model:
    return make_model(dropout=0.0, activation=None)


def text() -> Task:
    lines, next_letters = letters(2048, seed=1)
    return Task(
        transformer, crossentropy(), *split(lines, next_letters, sizes=(1024, 512)), steps=200, batch_size=32
    )


def letters(size: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Lines of a Markov chain, and for each letter the next one. Each letter has a few likely followers."""
    follow = np.random.default_rng(0).dirichlet(np.full(VOCABULARY, 0.15), size=VOCABULARY).cumsum(axis=1)
    rng = np.random.default_rng(seed)
    drawn = [rng.integers(VOCABULARY, size=size)]
    for _ in range(LENGTH):
        draws = rng.uniform(size=(size, 1))
        drawn.append(np.minimum((follow[drawn[-1]] < draws).sum(axis=1), VOCABULARY - 1))
    lines = np.stack(drawn, axis=1).astype("int32")
    return lines[:, :-1], lines[:, 1:]


def transformer(width: int = 32, blocks: int = 1, activation: str | None = None) -> keras.Model:
    """Causal blocks over letters; the last layer gives logits of the next letter, unless activated."""
    layers = keras.layers
    ids = keras.Input((LENGTH,), dtype="int32")
    places = keras.ops.arange(LENGTH)
    x = layers.Embedding(VOCABULARY, width)(ids) + layers.Embedding(LENGTH, width)(places)
    for _ in range(blocks):
        x = block(x, width, causal=True)
    return keras.Model(ids, layers.Dense(VOCABULARY, activation)(layers.LayerNormalization()(x)))


def block(x: Any, width: int, causal: bool) -> Any:
    layers = keras.layers
    y = layers.LayerNormalization()(x)
    x += layers.MultiHeadAttention(4, width // 4)(y, y, use_causal_mask=causal)
    y = layers.Dense(4 * width, "gelu")(layers.LayerNormalization()(x))
    return x + layers.Dense(width)(y)


def chains(size: int, seed: int, length: int) -> Split:
    """Lines of letters, and which of four Markov chains each is of."""
    follow = (
        np.random.default_rng(0)
        .dirichlet(np.full(CHAIN_LETTERS, 0.3), size=(CHAINS, CHAIN_LETTERS))
        .cumsum(-1)
    )
    rng = np.random.default_rng(seed)
    chain = rng.integers(CHAINS, size=size)
    drawn = [rng.integers(CHAIN_LETTERS, size=size)]
    for _ in range(length - 1):
        draws = rng.uniform(size=(size, 1))
        drawn.append(np.minimum((follow[chain, drawn[-1]] < draws).sum(axis=1), CHAIN_LETTERS - 1))
    return Split(np.stack(drawn, axis=1).astype("int32"), chain)


def encoder(length: int, width: int = 32) -> keras.Model:
    """One block that sees all letters of a line; logits of the chains."""
    layers = keras.layers
    ids = keras.Input((length,), dtype="int32")
    places = keras.ops.arange(length)
    x = layers.Embedding(CHAIN_LETTERS, width)(ids) + layers.Embedding(length, width)(places)
    x = layers.LayerNormalization()(block(x, width, causal=False))
    return keras.Model(ids, layers.Dense(CHAINS)(layers.GlobalAveragePooling1D()(x)))


def tabular() -> Task:
    x, y = make_friedman1(4096, n_features=10, noise=1.0, random_state=0)
    y = (y - y.mean()) / y.std()
    splits = split(x.astype("float32"), y.astype("float32"), sizes=(2048, 1024))
    return Task(dense_network, keras.losses.MeanSquaredError(), *splits, steps=300)


def dense_network() -> keras.Model:
    layers = [keras.layers.Dense(64, "relu") for _ in range(2)]
    return keras.Sequential([keras.Input((10,)), *layers, keras.layers.Dense(1)])


USERS, ITEMS, FACTORS = 500, 300, 4


def recommender() -> Task:
    rng = np.random.default_rng(0)
    count = 24_576
    ids = np.stack([rng.integers(USERS, size=count), rng.integers(ITEMS, size=count)], axis=1)
    users, items = (rng.normal(size=(n, FACTORS)) / FACTORS**0.25 for n in (USERS, ITEMS))
    ratings = np.sum(users[ids[:, 0]] * items[ids[:, 1]], axis=1) + 0.3 * rng.normal(size=count)
    splits = split(ids, ratings.astype("float32"), sizes=(16_384, 4096))
    return Task(factors, keras.losses.MeanSquaredError(), *splits, steps=600, batch_size=256)


def factors() -> keras.Model:
    ids = keras.Input((2,), dtype="int64")

    def table(rows: int) -> keras.layers.Embedding:
        return keras.layers.Embedding(
            rows, 16, embeddings_initializer=keras.initializers.RandomNormal(stddev=0.1)
        )

    user, item = table(USERS)(ids[:, 0]), table(ITEMS)(ids[:, 1])
    return keras.Model(ids, keras.layers.Dot(axes=1)([user, item]))


def split(x: np.ndarray, y: np.ndarray, sizes: tuple[int, int]) -> tuple[Split, Split, Split]:
    """For training, for validation, and the rest for the test."""
    ends = np.cumsum(sizes)
    return tuple(Split(*pair) for pair in zip(np.split(x, ends), np.split(y, ends), strict=True))


TASKS = {"images": images, "text": text, "tabular": tabular, "recommender": recommender}


def batches(data: Split, batch_size: int, seed: int) -> tf.data.Dataset:
    """Without an end, each time through the data in another order."""
    examples = tf.data.Dataset.from_tensor_slices(tuple(data)).cache()
    return examples.shuffle(len(data.y), seed=seed).repeat().batch(batch_size, drop_remainder=True)


def fit(
    task: Task, optimizer: keras.optimizers.Optimizer, seed: int, pieces: int = 1, **options: Any
) -> Training:
    """Train on a task, in equal pieces that are epochs to Keras."""
    keras.utils.clear_session()
    keras.utils.set_random_seed(seed)
    steps, model = task.steps // pieces, task.make()
    model.compile(optimizer, task.loss, steps_per_execution=steps)
    data = batches(task.train, task.batch_size, seed)
    history = model.fit(
        data, epochs=pieces, steps_per_epoch=steps, shuffle=False, verbose=0, **options
    ).history
    return Training(model, history["loss"])


def loss_of(task: Task, model: keras.Model, data: Split) -> float:
    """The mean loss, all examples at once; infinite where the training diverged."""
    value = float(task.loss(data.y, model(data.x)))
    return value if np.isfinite(value) else float("inf")
