"""Rounding to float16 and bfloat16 at random: up or down in proportion, so that it is right on average.

The random number of an element is a hash of the optimizer's seed, the step, the variable and the element's
index. Nothing else has to be kept for a resumed run to have the same bits, and every engine rounds alike:
custom_ops/adam_math.h and half_precision.h compute the same.
"""

from __future__ import annotations

from typing import Any

import tensorflow as tf


def step_key(seed: Any, iterations: Any) -> Any:
    """The key of a step's random numbers, below 2^32, in float64."""
    return tf.cast(_hash32(_uint32(seed) + _hash32(_uint32(iterations))), tf.float64)


def round_at_random(x: Any, dtype: tf.DType, key: Any, rng_stream: int, elements: Any) -> Any:
    """Round float32 values to float16 or bfloat16.

    Args:
        x: what is rounded.
        dtype: float16 or bfloat16.
        key: of the step, from `step_key`.
        rng_stream: the number of the variable.
        elements: the index in the variable of each value, uint32.
    """
    key = _hash32(tf.cast(key, tf.uint32) + _uint32(rng_stream * 0x9E3779B9 % 2**32))
    random = _hash32(elements + key)
    cut = 16 if dtype == tf.bfloat16 else 13  # how many more bits float32 has
    mask = _uint32(2**cut - 1)
    random = tf.bitwise.bitwise_and(random, mask)
    carried = tf.bitcast(x, tf.uint32) + random  # of the bits that are cut off, if there are any
    rounded = tf.bitwise.bitwise_and(carried, tf.bitwise.invert(mask))
    if dtype == tf.float16:  # denormals have fewer bits
        units = tf.floor(tf.abs(x) * 2.0**24 + tf.cast(random, tf.float32) * 2.0**-cut)
        sign = tf.bitwise.bitwise_and(tf.bitcast(x, tf.uint32), _uint32(2**31))
        small = tf.bitwise.bitwise_or(tf.bitcast(units * 2.0**-24, tf.uint32), sign)
        rounded = tf.where(tf.abs(x) < 2.0**-14, small, rounded)
    return tf.cast(tf.where(tf.math.is_finite(x), tf.bitcast(rounded, tf.float32), x), dtype)


def element_indices(shape: tf.TensorShape, indices: Any | None) -> Any:
    """The index in a variable of this shape of each of its elements, or in these rows."""
    if indices is None:
        return tf.reshape(tf.cast(tf.range(shape.num_elements(), dtype=tf.int64), tf.uint32), shape)
    width = shape[1:].num_elements()
    first = tf.cast(indices, tf.int64)[:, None] * width
    return tf.reshape(
        tf.cast(first + tf.range(width, dtype=tf.int64), tf.uint32), [tf.size(indices), *shape[1:]]
    )


def _hash32(x: Any) -> Any:
    """A hash of 32 bits, found by TheIronBorn for Chris Wellons' hash-prospector. Its low bits are used."""
    x = tf.bitwise.bitwise_xor(x, tf.bitwise.right_shift(x, _uint32(16))) * _uint32(0x21F0AAAD)
    x = tf.bitwise.bitwise_xor(x, tf.bitwise.right_shift(x, _uint32(15))) * _uint32(0x735A2D97)
    return tf.bitwise.bitwise_xor(x, tf.bitwise.right_shift(x, _uint32(15)))


def _uint32(value: Any) -> Any:
    return tf.constant(value, tf.uint32) if isinstance(value, int) else tf.cast(value, tf.uint32)
