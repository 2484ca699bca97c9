"""Gradient accumulation: `gradient_accumulation_steps`."""

import itertools

import axes
import cases
import keras
import numpy as np
import pytest
import tensorflow as tf
from like_sgd import (
    CLASSES_FUSED,
    CLASSES_FUSED_FORMS,
    GRADIENT_FORMS,
    ONES,
    START,
    assert_close,
    gradient,
    like_sgd,
    slot,
    sparse_options,
    variable,
)
from sparse import draw_steps, train, train_by_oracle

import tf_adam_variants as tav


@CLASSES_FUSED_FORMS
def test_gradients_accumulate(cls, fused, form):
    optimizer = like_sgd(cls, fused=fused, gradient_accumulation_steps=3, **sparse_options(form))
    weights = variable()
    for count, moved, waiting in ((1, 0, 1), (2, 0, 2), (3, 1, 0), (4, 1, 1)):
        optimizer.apply([gradient(ONES, form)], [weights])
        assert_close(weights, START - moved)
        assert_close(slot(optimizer, "_gradient_accumulator"), waiting * ONES)
        assert int(optimizer.variables[0]) == count


def test_accumulated_steps_are_one_step_with_the_mean_gradient():
    inits, grads = cases.problem(8, seed=5)
    pairs = [
        [np.stack([a, b]) for a, b in zip(*two, strict=True)]
        for two in zip(grads[::2], grads[1::2], strict=True)
    ]
    means = [[pair.mean(axis=0) for pair in step] for step in pairs]
    accumulated = cases.run("graph", tav.LAMB(0.125, gradient_accumulation_steps=2), inits, grads)[1::2]
    assert cases.worst(accumulated, cases.run("graph", tav.LAMB(0.125), inits, means)) < 1e-13


@axes.pairwise(
    xla_is_slow=False,
    case=[cases.CASES[5], cases.CASES[6]],
    sparse_update=["exact", "lazy"],
    mode=cases.MODES,
)
def test_accumulated_slices(case, sparse_update, mode):
    """Two steps together are one step with the mean of their slices; in half of the steps nothing moves."""
    table = np.random.default_rng(1).normal(size=(9, 3))
    steps = draw_steps("repeated", 9, (3,), count=6)
    optimizer = case.cls(
        0.125, **case.oracle_kwargs, sparse_update=sparse_update, gradient_accumulation_steps=2
    )
    actual = train(optimizer, table, steps, mode=mode)
    pairs = [
        (np.concatenate([a[0], b[0]]), np.concatenate([a[1], b[1]]) / 2)
        for a, b in zip(steps[::2], steps[1::2], strict=True)
    ]
    expected = [
        [table],
        *itertools.chain.from_iterable(
            [x, x] for x in train_by_oracle(case, sparse_update, table, pairs, 0.125)
        ),
    ]
    assert cases.worst(actual, expected[:-1]) < 1e-12


TABLE = np.arange(1.0, 9.0).reshape(4, 2)
SPARSE = tf.IndexedSlices(tf.ones((2, 2), tf.float64), tf.constant([1, 1], tf.int64), tf.constant([4, 2]))
DENSE = tf.constant([[1.0, 1.0], [0.0, 0.0], [0.0, 0.0], [1.0, -1.0]], tf.float64)


def lazy_and_exact():
    """Two optimizers that accumulate two gradients, lazy and exact, and a table for each."""
    made = []
    for sparse_update in ("lazy", "exact"):
        options = {"sparse_update": sparse_update, "gradient_accumulation_steps": 2}
        optimizer = tav.AdamW(0.125, weight_decay=0.5, **options)
        made.append((optimizer, tf.Variable(TABLE)))
        optimizer.build([made[-1][1]])
    return made


@pytest.mark.parametrize("mode", cases.MODES)
@pytest.mark.parametrize("in_turn", [[SPARSE, DENSE], [DENSE, SPARSE]], ids=["dense last", "dense first"])
def test_a_dense_gradient_among_slices_makes_the_update_dense(in_turn, mode):
    """In whatever order they come; the next update, of slices alone, is lazy again."""
    (lazy, table), (exact, expected) = lazy_and_exact()
    for optimizer, weights in ((lazy, table), (exact, expected)):
        for g in in_turn:
            cases.compiled(mode, optimizer, lambda g=g, o=optimizer, w=weights: o.apply([g], [w]))()
    np.testing.assert_allclose(table, expected, rtol=1e-12)
    assert np.all(table.numpy() != TABLE)
    before = table.numpy()
    for _ in range(2):
        lazy.apply([SPARSE], [table])
    np.testing.assert_array_equal(np.any(table.numpy() != before, axis=1), [False, True, False, False])


@pytest.mark.parametrize("later", [False, True], ids=["built at once", "with a later build"])
def test_a_dense_gradient_that_waits_is_saved(later):
    (lazy, table), (exact, expected) = lazy_and_exact()
    (resumed, _), _ = lazy_and_exact()
    lazy.apply([DENSE], [table])
    if later:
        lazy.build([table, tf.Variable(TABLE)])
        resumed.build([*resumed._trainable_variables, tf.Variable(TABLE)])
    store = {}
    lazy.save_own_variables(store)
    resumed.load_own_variables(store)
    resumed.apply([SPARSE], resumed._trainable_variables[:1])
    for g in (DENSE, SPARSE):
        exact.apply([g], [expected])
    np.testing.assert_allclose(resumed._trainable_variables[0], expected, rtol=1e-12)


@CLASSES_FUSED
def test_an_overwriting_gradient_accumulates_its_maximum(cls, fused):
    overwritten, trained = variable(), variable()
    overwritten.overwrite_with_gradient = True
    optimizer = like_sgd(cls, fused=fused, gradient_accumulation_steps=2)
    expected = [
        (1, START, START, (1, 1)),
        (2, 2 * ONES, START - 1, (0, 0)),  # a first step is of the rate's length, not 1.5 times it as SGD's
        (1, 2 * ONES, START - 1, (1, 1)),
    ]
    for size, first, second, waiting in expected:
        optimizer.apply([gradient(size * ONES)] * 2, [overwritten, trained])
        assert_close(overwritten, first, 0)
        assert_close(trained, second)
        for i in (0, 1):
            assert_close(slot(optimizer, "_gradient_accumulator", i), waiting[i] * ONES)
    assert_close(slot(optimizer, "_momentum"), (1 - optimizer.beta_1) * 1.5 * ONES)


@pytest.mark.parametrize("mode", ["eager", "graph"])
@pytest.mark.parametrize(("dtype", "of_gradient"), [("bfloat16", "bfloat16"), ("float32", "float64")])
def test_an_overwriting_gradient_may_have_another_type(dtype, of_gradient, mode):
    overwritten = tf.Variable(tf.ones(2, dtype))
    overwritten.overwrite_with_gradient = True
    optimizer = tav.AdamW(gradient_accumulation_steps=2)
    step = cases.apply_in(mode, optimizer, [overwritten])
    for size in (3.0, 2.0):
        step([tf.fill([2], tf.constant(size, of_gradient))])
    np.testing.assert_array_equal(tf.cast(overwritten, tf.float32), [3.0, 3.0])


@axes.pairwise(fused=[False, True], gradient=[tf.bfloat16, tf.float32], form=GRADIENT_FORMS)
def test_gradients_of_half_types_accumulate_in_float32(fused, gradient, form):
    """In bfloat16 ones add up to 256, and 1,000 of them would have a mean of 0.256."""
    count = 300
    weights, twin = tf.Variable(tf.ones((3, 2), tf.bfloat16)), tf.Variable(tf.ones((3, 2)))
    options = {"fused": fused, **sparse_options(form)}
    optimizer = tav.AdamW(0.125, epsilon=1.0, gradient_accumulation_steps=count, **options)
    ones = tf.ones((3, 2), gradient)
    for _ in range(count):
        optimizer.apply(
            [tf.IndexedSlices(ones, tf.constant([0, 1, 2])) if form != "dense" else ones], [weights]
        )
    tav.AdamW(0.125, epsilon=1.0).apply([tf.ones((3, 2))], [twin])
    np.testing.assert_array_equal(weights.numpy(), tf.cast(twin, tf.bfloat16).numpy())
    (accumulator,) = (v for v in optimizer.variables if v.name.endswith("gradient_accumulator"))
    assert accumulator.dtype == "float32"


# -- what Keras does silently: docs/silent.md


KERAS_TOO = pytest.mark.parametrize("cls", [keras.optimizers.AdamW, tav.AdamW], ids=["Keras's", "ours"])


@KERAS_TOO
def test_schedules_count_batches(cls):
    """A warm-up of 8 steps is over after 2 updates of 4 batches."""
    optimizer = cls(tav.schedules.LinearWarmup(1.0, 8), gradient_accumulation_steps=4)
    weights, rates = variable(), []
    for _ in range(10):
        rates.append(float(optimizer.learning_rate))
        optimizer.apply([gradient(ONES)], [weights])
    assert rates == [min(batch / 8, 1) for batch in range(10)]
    assert int(optimizer.iterations) == 2


@KERAS_TOO
@pytest.mark.parametrize(("momentum", "per_update"), [(0.5, 0.0625), (0.5**0.25, 0.5)])
def test_averages_move_at_every_batch(cls, momentum, per_update):
    options = {"use_ema": True, "ema_momentum": momentum, "gradient_accumulation_steps": 4}
    optimizer, weights = cls(0.5, weight_decay=0.0, **options), variable()
    averages, batches = [], [1.0] * 8 + [0.0] * 3
    for size in batches:
        optimizer.apply([gradient(size * ONES)], [weights])
        averages.append(optimizer._model_variables_moving_average[0].numpy())
    # The second update is in the last of the first 8 batches; the weights stay until the 12th.
    before, after = averages[6] - weights.numpy(), averages[10] - weights.numpy()
    assert_close(after, per_update * before, 1e-4)


@KERAS_TOO
@pytest.mark.filterwarnings("ignore:Gradients do not exist")
def test_a_head_without_a_gradient_at_the_update_does_not_train(cls):
    for missing, trained in ((None, [True, False, True]), (0.0, [True, True, True])):
        optimizer = cls(0.5, weight_decay=0.0, gradient_accumulation_steps=4)
        weights = [variable() for _ in range(3)]
        none = None if missing is None else gradient(missing * ONES)
        for batch in range(8):
            heads = [gradient(ONES), none] if batch % 2 == 0 else [none, gradient(ONES)]
            optimizer.apply([gradient(ONES), *heads], weights)
        assert [bool(np.all(w.numpy() != START)) for w in weights] == trained


@KERAS_TOO
def test_averages_overwrite_in_updates(cls):
    """At every batch of each second update."""
    options = {"use_ema": True, "ema_momentum": 0.5, "ema_overwrite_frequency": 2}
    optimizer = cls(0.5, weight_decay=0.0, gradient_accumulation_steps=4, **options)
    weights, equal = variable(), []
    for _ in range(12):
        optimizer.apply([gradient(ONES)], [weights])
        average = optimizer._model_variables_moving_average[0].numpy()
        equal.append(bool(np.all(weights.numpy() == average)))
    assert equal == [True] * 8 + [True] * 3 + [False]
