"""KerasHub's BERT as a text classifier, trained by LAMB from random weights on texts made on the spot.

    pip install keras-hub
    python examples/bert_classifier.py [--quick] [--json FILE]

The texts are of made-up words; each has a topic, whose words it uses often. Like a real tokenizer's, the
vocabulary has the common words and spells the others in pieces. `classifier` and `texts` are what a training
needs:

    model = classifier(FULL, lamb(FULL))
    model.fit(texts(FULL, steps=100, seed=0))

The program trains with keras.optimizers.Lamb and with tav.LAMB, and compares them; side_by_side.py says how.
BERT-base is 12 layers of width 768 with a vocabulary of 30,522, 109 million parameters. A full run takes
minutes.
"""

from __future__ import annotations

import os
from functools import partial
from typing import NamedTuple

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # read when TensorFlow is imported

import keras
import keras_hub
import numpy as np
import side_by_side
import tensorflow as tf

import tf_adam_variants as tav

TOPICS, TOPIC_WORDS, SHARE = 4, 5, 0.8
SYLLABLES = [consonant + vowel for consonant in "bdfghjklmnprstvz" for vowel in "aeiou"]
# The usual exclusions: biases and layer normalisation have neither weight decay nor a trust ratio.
EXCLUDED = ["bias", "gamma", "beta"]


class Size(NamedTuple):
    layers: int
    heads: int
    width: int
    vocabulary: int
    length: int
    batch: int
    learning_rate: float


FULL = Size(layers=12, heads=12, width=768, vocabulary=30_522, length=48, batch=8, learning_rate=2e-3)
QUICK = Size(layers=1, heads=4, width=256, vocabulary=2_000, length=32, batch=16, learning_rate=1.5e-2)


def lamb(size: Size, fused: bool | str = "auto") -> tav.LAMB:
    return tav.LAMB(size.learning_rate, weight_decay=0.01, exclude_from_weight_decay=EXCLUDED, fused=fused)


def keras_lamb(size: Size) -> keras.optimizers.Optimizer:
    optimizer = keras.optimizers.Lamb(size.learning_rate, weight_decay=0.01)
    optimizer.exclude_from_weight_decay(var_names=EXCLUDED)
    return optimizer


def words(count: int) -> list[str]:
    """Made-up words of three syllables, the same at every call."""
    numbers = np.random.default_rng(0).choice(len(SYLLABLES) ** 3, count, replace=False)
    return ["".join(SYLLABLES[n // len(SYLLABLES) ** i % len(SYLLABLES)] for i in range(3)) for n in numbers]


def vocabulary(size: Size) -> list[str]:
    """Special tokens, syllables to begin and to go on with, and as many whole words as there is room for."""
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *SYLLABLES, *(f"##{s}" for s in SYLLABLES)]
    return pieces + words(size.vocabulary - len(pieces))


def texts(size: Size, steps: int, seed: int) -> tf.data.Dataset:
    """Batches of texts and their topics."""
    rng, known = np.random.default_rng(seed), np.array(words(2 * size.vocabulary))
    topics = rng.integers(TOPICS, size=steps * size.batch)
    shape = len(topics), size.length
    common = rng.zipf(1.2, shape) % len(known)  # a few are frequent, most are rare, and spelled in pieces
    own = topics[:, None] * TOPIC_WORDS + rng.integers(TOPIC_WORDS, size=shape)
    chosen = known[np.where(rng.uniform(size=shape) < SHARE, own, common)]
    return tf.data.Dataset.from_tensor_slices(([" ".join(text) for text in chosen], topics)).batch(size.batch)


def preprocessor(size: Size) -> keras_hub.models.BertTextClassifierPreprocessor:
    tokenizer = keras_hub.models.BertTokenizer(vocabulary(size))
    return keras_hub.models.BertTextClassifierPreprocessor(tokenizer, sequence_length=size.length)


def classifier(size: Size, optimizer: keras.optimizers.Optimizer) -> keras_hub.models.BertTextClassifier:
    """A compiled model that takes texts."""
    backbone = keras_hub.models.BertBackbone(
        vocabulary_size=size.vocabulary,
        num_layers=size.layers,
        num_heads=size.heads,
        hidden_dim=size.width,
        intermediate_dim=4 * size.width,
        max_sequence_length=512,
    )
    model = keras_hub.models.BertTextClassifier(backbone, num_classes=TOPICS, preprocessor=preprocessor(size))
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer, loss, metrics=["accuracy"], jit_compile=False)
    return model


def problem(quick: bool) -> side_by_side.Problem:
    size, steps, turns = (QUICK, 16, 2) if quick else (FULL, 3, 12)
    return side_by_side.Problem(
        f"BERT, layers: {size.layers}, width: {size.width}; batches of {size.batch} x {size.length} tokens",
        theirs=partial(keras_lamb, size),
        ours=partial(lamb, size),
        model=partial(classifier, size),
        batches=lambda turn: texts(size, steps, seed=turn),
        turns=turns,
    )


markdown = side_by_side.markdown

if __name__ == "__main__":
    side_by_side.main(__doc__, problem)
