"""Optimizers that take the steps of SGD.

Many of the numbers in Keras's tests are those of SGD with a gradient of ones. Adam's moments of a constant
gradient are the gradient and its square, so that without epsilon, decay and trust ratio a step of every
optimizer here is a step of SGD, whatever its betas and nus.
"""

import axes
import cases
import keras
import numpy as np
import pytest
import tensorflow as tf

import tf_adam_variants as tav

LIKE_SGD = {
    tav.AdamW: {"weight_decay": 0.0, "epsilon": 0.0},
    tav.QHAdam: {"epsilon": 0.0},
    tav.QHAdamW: {"weight_decay": 0.0, "epsilon": 0.0},
    tav.LAMB: {"weight_decay": 0.0, "epsilon": 0.0, "exclude_from_layer_adaptation": ["."]},
}
GRADIENT_FORMS = ("dense", "exact", "lazy")  # one piece, or IndexedSlices with this `sparse_update`
CLASSES_FUSED = axes.pairwise(cls=cases.CLASSES, fused=[False, True])
CLASSES_FUSED_FORMS = axes.pairwise(cls=cases.CLASSES, fused=[False, True], form=GRADIENT_FORMS)

# Keras 3.6 has no MultiOptimizer, and does some of what its tests ask for today wrongly itself.
NEWER_KERAS = pytest.mark.skipif(
    not hasattr(keras.optimizers, "MultiOptimizer"), reason="Keras is older than it"
)

START = np.array([[1.0, 2.0], [3.0, 4.0]], "float32")
ONES = np.ones((2, 2), "float32")


def like_sgd(cls, learning_rate=1.0, **options):
    return cls(learning_rate, **LIKE_SGD[cls], **options)


def variable(value=START, **options):
    return keras.Variable(np.asarray(value, "float32"), **options)


def gradient(values, form="dense"):
    """The same gradient in one piece, or as IndexedSlices of its rows."""
    values = tf.constant(values, tf.float32)
    if form == "dense":
        return values
    rows = tf.range(len(values))
    return tf.IndexedSlices(values, rows, values.shape)  # Keras's loss scale asks for a shape


def sparse_options(form):
    return {} if form == "dense" else {"sparse_update": form}


def slot(optimizer, name, i=0):
    """The i-th of the slots of this name."""
    return [v.numpy() for v in optimizer.variables if v.path.endswith(name)][i]


def assert_close(actual, expected, tolerance=1e-6):
    actual = actual.numpy() if hasattr(actual, "numpy") else actual
    np.testing.assert_allclose(actual, expected, rtol=tolerance, atol=tolerance)
