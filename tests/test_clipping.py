"""Clipping: by value, by norm, by the global norm; repeated indices are summed first."""

import threading

import axes
import cases
import numpy as np
import oracle
import pytest
import tensorflow as tf
from like_sgd import GRADIENT_FORMS, assert_close, gradient, slot, sparse_options, variable
from sparse import dense, slices

import tf_adam_variants as tav

CLIPPED = [
    ({"clipnorm": 1.0}, [100.0, 100.0], [2**0.5 / 2, 2**0.5 / 2]),
    ({"clipvalue": 1.0}, [100.0, 100.0], [1.0, 1.0]),
    ({"global_clipnorm": 1.0}, [50.0, 100.0], [50 / 12_500**0.5, 100 / 12_500**0.5]),
]


# -- dense gradients


@axes.pairwise(cls=cases.CLASSES, row=CLIPPED, fused=[False, True], form=GRADIENT_FORMS)
def test_gradients_are_clipped(cls, row, fused, form):
    """With beta_1 = 0 the first moment is the gradient that the step was taken with."""
    clipping, values, clipped = row
    optimizer = cls(beta_1=0.0, fused=fused, **clipping, **sparse_options(form))
    optimizer.apply([gradient(values, form)], [variable([1.0, 2.0])])
    assert_close(slot(optimizer, "_momentum"), clipped)


def test_clipping_that_does_not_bite_changes_nothing():
    inits, grads = cases.problem(8, seed=5)

    def train(**clipping):
        return cases.run("graph", tav.QHAdamW(0.125, **clipping), inits, grads)

    plain = train()
    for clip in ("clipnorm", "clipvalue", "global_clipnorm"):
        assert cases.worst(train(**{clip: 1e6}), plain) < 1e-13


def test_two_clippings_one_after_the_other():
    optimizer = tav.QHAdam(clipnorm=1.0)
    with pytest.raises(ValueError, match=r"Only one of.*clipnorm=1.0, clipvalue=2.0"):
        optimizer.clipvalue = 2.0
    optimizer.clipnorm = None
    optimizer.clipvalue = 2.0


def test_two_threads_clip_each_for_itself():
    weights = tf.Variable(tf.zeros(2))
    optimizer = tav.QHAdam(0.0, fused=True, global_clipnorm=1.0, beta_1=0.0, nu_1=1.0)
    optimizer.build([weights])
    seen = []

    def train(size):
        for _ in range(50):
            optimizer.apply([tf.fill([2], size)], [weights])
            seen.append(float(tf.norm(optimizer._momentums[0].value)))  # with beta_1 = 0 the clipped gradient

    threads = [threading.Thread(target=train, args=(size,)) for size in (10.0, 1e4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    np.testing.assert_allclose(seen, 1.0, rtol=1e-5)


# -- sparse gradients, and several types


CLIPPINGS = [{"clipnorm": 0.5}, {"clipvalue": 0.125}, {"global_clipnorm": 0.75}]


@axes.pairwise(xla_is_slow=False, clipping=CLIPPINGS, sparse_update=["exact", "lazy"], mode=cases.MODES)
def test_repeated_indices_are_summed_before_they_are_clipped(clipping, sparse_update, mode):
    """Every row is named, and so lazy is exact."""
    rng = np.random.default_rng(3)
    table, other = rng.normal(size=(4, 3)), rng.normal(size=(5,))
    ids = [[0, 1, 2, 3, 1, 1], [3, 3, 3, 2, 1, 0]]
    values, grads = rng.normal(size=(2, 6, 3)), rng.normal(size=(2, 5))
    oracle_kwargs = {
        "beta_1": 0.9,
        "beta_2": 0.98,
        "nu_1": 0.7,
        "nu_2": 1.0,
        "epsilon": 1e-4,
        "weight_decay": 0.25,
    }
    optimizer = tav.QHAdamW(
        0.125, **oracle_kwargs, **clipping, sparse_update=sparse_update, use_ema=True, ema_momentum=0.5
    )
    weights = [tf.Variable(table), tf.Variable(other)]
    apply = cases.apply_in(mode, optimizer, weights)
    for i in range(2):
        apply([slices(ids[i], values[i], tf.float64), tf.constant(grads[i])])
    expected = cases.oracle.train(
        cases.oracle.qhadam,
        [table, other],
        [[dense(ids[i], values[i], (4, 3)), grads[i]] for i in range(2)],
        [0.125] * 2,
        clipping=clipping,
        **oracle_kwargs,
    )
    assert cases.worst([[w.numpy() for w in weights]], expected[-1:]) < 1e-12


@axes.pairwise(
    clipping=[{"global_clipnorm": 0.5}, {"clipnorm": 0.5}, {"clipvalue": 0.1}],
    mode=cases.MODES,
    dtypes=[("bfloat16", "bfloat16"), ("float16", "float32"), ("float64", "float32")],
)
def test_clipping_across_types(dtypes, mode, clipping):
    """Dense gradients and slices of several types have one norm, summed without overflow."""
    rng = np.random.default_rng(0)
    gradient, values = rng.normal(size=(300, 4)) * 10, rng.normal(size=(2, 3))
    weights = [tf.Variable(tf.ones((300, 4), dtypes[0])), tf.Variable(tf.ones((4, 3), dtypes[1]))]
    optimizer = tav.AdamW(0.125, **clipping, epsilon=1.0)
    step = cases.apply_in(mode, optimizer, weights)
    step([tf.constant(gradient, dtypes[0]), slices([1, 1], values, dtypes[1])])
    grads = [gradient, np.zeros((4, 3))]
    np.add.at(grads[1], [1, 1], values)
    terms = {"beta_1": 0.9, "beta_2": 0.999, "epsilon": 1.0, "weight_decay": 0.004}
    inits = [np.ones((300, 4)), np.ones((4, 3))]
    expected = oracle.train(oracle.adamw, inits, [grads], [0.125], clipping=clipping, **terms)[0]
    for actual, target, dtype in zip(weights, expected, dtypes, strict=True):
        spacing = {"float16": 2.0**-9, "bfloat16": 2.0**-7, "float32": 2.0**-20, "float64": 2.0**-20}[dtype]
        np.testing.assert_allclose(tf.cast(actual, tf.float64), target, rtol=spacing)


@axes.FUSED
def test_the_global_norm_of_large_variables(fused):
    """The fused kernels add up squares by parts, one per task of a thread."""
    sizes = (200_000, 70_000)
    weights = [tf.Variable(tf.zeros(size)) for size in sizes]
    optimizer = tav.AdamW(global_clipnorm=1.0, fused=fused)
    optimizer.apply([tf.ones(size) for size in sizes], weights)
    for momentum in optimizer._momentums:
        expected = (1 - optimizer.beta_1) / np.sqrt(sum(sizes))
        np.testing.assert_allclose(momentum.numpy(), expected, rtol=1e-6)
