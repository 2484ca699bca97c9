"""Gradients as IndexedSlices: exact is the step of the dense gradient, lazy changes the named rows."""

import itertools

import axes
import cases
import keras
import numpy as np
import oracle
import pytest
import tensorflow as tf
from axes import FUSED, SPARSE_UPDATES
from sparse import KINDS, draw_steps, slices, train, train_by_oracle

import tf_adam_variants as tav

TOLERANCE = {"float64": 1e-12, "float32": 5e-6, "float16": 2e-3, "bfloat16": 2e-2}


@axes.pairwise(
    axes.few_graphs, case=cases.CASES, sparse_update=["exact", "lazy"], kind=KINDS, mode=cases.MODES
)
def test_every_case(case, sparse_update, kind, mode):
    table = np.random.default_rng(1).normal(size=(9, 3))
    steps = draw_steps(kind, 9, (3,))
    actual = train(
        case.cls(0.125, **case.oracle_kwargs, sparse_update=sparse_update), table, steps, mode=mode
    )
    assert cases.worst(actual, train_by_oracle(case, sparse_update, table, steps, 0.125)) < 1e-12


@axes.pairwise(
    case=[cases.CASES[0], cases.CASES[5], cases.CASES[6]],
    indices_dtype=[tf.int32, tf.int64],
    dtype=list(TOLERANCE),
    shape=[(), (3,), (2, 3), (2, 1, 3)],
    sparse_update=["exact", "lazy"],
    mode=["eager", "fused eager"],
)
def test_types_and_ranks(case, indices_dtype, dtype, shape, sparse_update, mode):
    table = 1 + np.random.default_rng(1).uniform(size=(8, *shape))
    steps = draw_steps("repeated", 8, shape, count=3)
    actual = train(
        case.cls(0.0625, **case.oracle_kwargs, sparse_update=sparse_update),
        table,
        steps,
        tf.as_dtype(dtype),
        mode,
        indices_dtype,
    )
    assert cases.worst(actual, train_by_oracle(case, sparse_update, table, steps, 0.0625)) < TOLERANCE[dtype]


@axes.pairwise(axes.few_graphs, case=cases.CASES, mode=cases.MODES)
def test_lazy_leaves_other_rows_alone(case, mode):
    table = np.random.default_rng(1).normal(size=(6, 2))
    optimizer = case.cls(0.5, **case.oracle_kwargs, sparse_update="lazy")
    weights = tf.Variable(table)
    other = tf.Variable(np.ones(2))
    apply = cases.apply_in(mode, optimizer, [weights, other])
    apply([slices([4, 1], np.ones((2, 2)), tf.float64), tf.ones(2, tf.float64)])
    before = [v.numpy() for v in [weights, *optimizer.variables] if tuple(v.shape) == (6, 2)]
    apply([slices([1, 1], np.ones((2, 2)), tf.float64), tf.ones(2, tf.float64)])
    after = [v.numpy() for v in [weights, *optimizer.variables] if tuple(v.shape) == (6, 2)]
    assert len(after) in (3, 4)
    for old, new in zip(before, after, strict=True):
        np.testing.assert_array_equal(old[[0, 2, 3, 4, 5]], new[[0, 2, 3, 4, 5]])
        assert not np.array_equal(old[1], new[1])


@axes.pairwise(
    xla_is_slow=False, sparse_update=["exact", "lazy"], rows=[None, 7], mode=["graph", "xla", "fused graph"]
)
def test_static_and_dynamic_numbers_of_slices(sparse_update, rows, mode):
    table = np.random.default_rng(1).normal(size=(9, 3))
    steps = draw_steps("repeated", 9, (3,))
    signature = [tf.TensorSpec([rows], tf.int64), tf.TensorSpec([rows, 3], tf.float64)]
    case = cases.CASES[6]
    optimizer = case.cls(0.125, **case.oracle_kwargs, sparse_update=sparse_update)
    actual = train(optimizer, table, steps, mode=mode, signature=signature)
    twin = case.cls(0.125, **case.oracle_kwargs, sparse_update=sparse_update)
    assert cases.worst(actual, train(twin, table, steps, mode="eager")) < 1e-13


NAMED = [0, 2, 4]


def train_named(case, table, step_grads, fused, sparse, wrapped=False, **others):
    """The table after each gradient: `step_grads` are the values of the rows in NAMED."""
    weights = tf.Variable(table)
    optimizer = case.cls(0.0625, fused=fused, **case.oracle_kwargs, **others)
    if wrapped:
        optimizer = keras.optimizers.LossScaleOptimizer(optimizer, initial_scale=2.0)
    history = []
    for values in step_grads:
        values = values * 2 if wrapped else values
        if sparse:
            step = tf.IndexedSlices(tf.constant(values), tf.constant(NAMED), table.shape)
        else:
            whole = np.zeros_like(table)
            whole[NAMED] = values
            step = tf.constant(whole)
        optimizer.apply([step], [weights])
        history.append([weights.numpy()])
    return history


GRADIENTS = [np.full((3, 3, 2), 10.0 - step) for step in range(5)]


@axes.pairwise(case=cases.CASES, fused=[False, True])
def test_a_sparse_gradient_is_the_dense_one(case, fused):
    """Alone, and under a loss scale."""
    table = np.ones((5, 3, 2))
    expected = train_named(case, table, GRADIENTS, fused, False)
    assert np.all(np.abs(expected[-1][0] - 1)[NAMED] > 0.05)
    for wrapped in (False, True):
        assert cases.worst(train_named(case, table, GRADIENTS, fused, True, wrapped), expected) < 1e-13


@axes.pairwise(case=cases.CASES, fused=[False, True])
def test_a_lazy_gradient_is_the_dense_one_of_the_rows_that_it_names(case, fused):
    actual = train_named(case, np.ones((5, 3, 2)), GRADIENTS, fused, True, sparse_update="lazy")
    rows, grads = np.ones((3, 3, 2)), [[values] for values in GRADIENTS]
    expected = oracle.train(case.rule, [rows], grads, [0.0625] * 5, **case.oracle_kwargs)
    assert cases.worst([[step[0][NAMED]] for step in actual], expected) < 1e-12
    np.testing.assert_array_equal(actual[-1][0][[1, 3]], 1.0)


@axes.pairwise(case=cases.CASES, fused=[False, True])
def test_which_rows_a_sparse_gradient_moves(case, fused):
    """Exact: the others by their decay, and by their moments if they were named before. Lazy: no others."""
    for sparse_update in ("exact", "lazy"):
        weights = tf.Variable(np.ones((5, 10)))
        optimizer = case.cls(0.0625, fused=fused, sparse_update=sparse_update, **case.oracle_kwargs)
        for indices in (NAMED, [0]):
            before = weights.numpy()
            values = tf.fill((len(indices), 10), tf.constant(0.5, tf.float64))
            optimizer.apply([tf.IndexedSlices(values, tf.constant(indices))], [weights])
            moved = np.any(weights.numpy() != before, axis=1)
            if sparse_update == "lazy":
                assert list(np.flatnonzero(moved)) == indices
            else:
                assert np.all(moved[NAMED])
                assert np.all(moved[[1, 3]] == case.decays)


@axes.pairwise(cls=cases.CLASSES, sparse_update=["exact", "lazy"], fused=[False, True])
def test_an_index_twice_is_the_gradient_twice(cls, sparse_update, fused):
    tables = [[tf.Variable([[1.0], [2.0]], dtype=dtype) for dtype in TOLERANCE] for _ in range(2)]
    optimizers = [cls(1e-3, sparse_update=sparse_update, fused=fused) for _ in range(2)]
    once, twice = ([1], [[0.2]]), ([1, 1], [[0.1], [0.1]])
    for _ in range(4):
        for optimizer, weights, (indices, values) in zip(optimizers, tables, (once, twice), strict=True):
            grads = [
                tf.IndexedSlices(tf.constant(values, dtype), tf.constant(indices), [2, 1])
                for dtype in TOLERANCE
            ]
            optimizer.apply(grads, weights)
        for one, other in zip(*tables, strict=True):
            np.testing.assert_allclose(other, one, rtol=1e-15 if one.dtype == "float64" else 1e-7)


# -- indices out of range


@axes.pairwise(
    bad=[-1, 5, 2**31 - 1],
    sparse_update=["exact", "lazy"],
    mode=[mode for mode in cases.MODES if mode != "xla"],
)
def test_indices_out_of_range_write_nothing(bad, sparse_update, mode):
    weights = [tf.Variable(np.ones(2), name="dense"), tf.Variable(np.ones((5, 2)), name="table")]
    optimizer = tav.QHAdamW(sparse_update=sparse_update)
    apply = cases.apply_in(mode, optimizer, weights)
    apply([tf.ones(2, tf.float64), slices([0, 4], np.ones((2, 2)), tf.float64)])
    before = [v.numpy() for v in [*weights, *optimizer.variables]]
    with pytest.raises(tf.errors.InvalidArgumentError, match=r"(?s)ids of a gradient.*must be in \[0, 5\)"):
        apply([tf.ones(2, tf.float64), slices([0, bad], np.ones((2, 2)), tf.float64)])
    for variable, value in zip([*weights, *optimizer.variables], before, strict=True):
        np.testing.assert_array_equal(variable.numpy(), value)


@SPARSE_UPDATES
@pytest.mark.parametrize("bad", [-1, pytest.param(5, marks=pytest.mark.slow), 2**31 - 1])
def test_under_xla_indices_out_of_range_name_no_row(bad, sparse_update):
    """XLA compiles assertions away."""
    tables = [tf.Variable(np.ones((5, 2))) for _ in range(2)]
    for table, indices in zip(tables, ([0, bad, 4, bad], [0, 4]), strict=True):
        apply = cases.apply_in("xla", tav.QHAdamW(sparse_update=sparse_update), [table])
        apply([slices(indices, np.ones((len(indices), 2)), tf.float64)])
    np.testing.assert_array_equal(tables[0].numpy(), tables[1].numpy())
    assert not np.array_equal(tables[0].numpy()[0], [1, 1])


# -- slices that are malformed

MALFORMED = {
    "fewer indices": (np.ones((3, 2)), [0, 1]),
    "more indices": (np.ones((2, 2)), np.array([0, 1, 2])),
    "no indices": (np.ones((2, 2)), []),
    "indices of two dimensions": (np.ones((2, 2)), tf.constant([[0, 1]])),
    "one index": (np.ones((1, 2)), tf.constant(0)),
    "fractions": (np.ones((2, 2)), tf.constant([0.0, 1.0])),
    "truth values": (np.ones((2, 2)), tf.constant([True, False])),
}


@pytest.mark.parametrize("sparse_update", ["exact", "lazy"])
@pytest.mark.parametrize("malformed", MALFORMED)
def test_malformed_slices_are_an_error_and_write_nothing(malformed, sparse_update):
    values, indices = MALFORMED[malformed]
    weights = [tf.Variable(np.ones(2), name="dense"), tf.Variable(np.ones((5, 2)), name="table")]
    optimizer = tav.AdamW(sparse_update=sparse_update)
    optimizer.build(weights)
    before = [v.numpy() for v in [*weights, *optimizer.variables]]
    with pytest.raises(ValueError, match="gradient of table must have one integer index per slice"):
        optimizer.apply([tf.ones(2, tf.float64), tf.IndexedSlices(tf.constant(values), indices)], weights)
    for variable, value in zip([*weights, *optimizer.variables], before, strict=True):
        np.testing.assert_array_equal(variable.numpy(), value)


@FUSED
def test_slices_of_unknown_number_are_compared_when_they_are_known(fused):
    weights = [tf.Variable(np.ones(2), name="dense"), tf.Variable(np.ones((5, 2)), name="table")]
    optimizer = tav.AdamW(fused=fused)
    optimizer.build(weights)

    @tf.function(input_signature=[tf.TensorSpec([None, 2], tf.float64), tf.TensorSpec([None], tf.int32)])
    def apply(values, indices):
        optimizer.apply([tf.ones(2, tf.float64), tf.IndexedSlices(values, indices)], weights)

    with pytest.raises(tf.errors.InvalidArgumentError, match="need an id each"):
        apply(tf.ones((3, 2), tf.float64), [0, 1])
    np.testing.assert_array_equal(weights[0], 1.0)
    apply(tf.ones((2, 2), tf.float64), [0, 1])
    assert np.all(weights[0].numpy() < 1)


@axes.pairwise(
    integer=["int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64", "numpy", "list"],
    sparse_update=["exact", "lazy"],
    mode=["eager", "graph", "fused eager", "fused graph"],
)
def test_indices_of_any_integer_type(integer, sparse_update, mode):
    indices = {"numpy": np.array([4, 0, 4]), "list": [4, 0, 4]}.get(integer)
    indices = tf.constant([4, 0, 4], integer) if indices is None else indices

    def step_with(indices):
        table, optimizer = tf.Variable(np.ones((5, 2))), tav.AdamW(sparse_update=sparse_update)
        optimizer.build([table])
        gradient = tf.IndexedSlices(tf.constant(np.ones((3, 2))), indices)
        cases.compiled(mode, optimizer, lambda: optimizer.apply([gradient], [table]))()
        return table.numpy()

    np.testing.assert_array_equal(step_with(indices), step_with(tf.constant([4, 0, 4], tf.int64)))


# -- in models


def make_model(optimizer, seed=1):
    """Three tables of several sizes, one of them used twice, and dense layers."""
    keras.utils.set_random_seed(seed)
    shared = keras.layers.Embedding(50, 4, name="shared")
    inputs = [
        keras.Input((3,), dtype="int64"),
        keras.Input((2,), dtype="int64"),
        keras.Input((1,), dtype="int64"),
    ]
    parts = [
        shared(inputs[0]),
        shared(inputs[1]),
        keras.layers.Embedding(7, 4, name="small")(inputs[1]),
        keras.layers.Embedding(300, 4, name="large")(inputs[2]),
    ]
    flat = keras.layers.Concatenate(axis=1)(parts)
    hidden = keras.layers.Dense(8, "relu", name="body")(keras.layers.Flatten()(flat))
    model = keras.Model(inputs, keras.layers.Dense(1, name="head")(hidden))
    model.compile(optimizer, "mse")
    return model


def fit(fitted, epochs, **options):
    rng = np.random.default_rng(0)
    x = [rng.integers(high, size=(96, width)) for high, width in ((50, 3), (7, 2), (300, 1))]
    y = sum(part.sum(axis=1) for part in x) % 5
    return fitted.fit(x, y, batch_size=16, epochs=epochs, shuffle=False, verbose=0, **options).history["loss"]


@pytest.mark.parametrize(
    ("case", "sparse_update"),
    [
        (cases.CASES[1], "exact"),
        (cases.CASES[6], "lazy"),
        pytest.param(cases.CASES[5], "exact", marks=pytest.mark.slow),
        pytest.param(cases.CASES[5], "lazy", marks=pytest.mark.slow),
    ],
    ids=axes.name_value,
)
def test_fit_and_resume(case, sparse_update, tmp_path):
    rate = 0.01
    first = make_model(case.cls(rate, **case.terms, sparse_update=sparse_update))
    losses = fit(first, 2)
    first.save(tmp_path / "model.keras")
    losses += fit(first, 2)
    assert losses[-1] < losses[0]
    again = keras.models.load_model(tmp_path / "model.keras")
    assert again.optimizer.sparse_update == sparse_update
    fit(again, 2)
    for a, b in itertools.chain(
        zip(first.weights, again.weights, strict=True),
        zip(first.optimizer.variables, again.optimizer.variables, strict=True),
    ):
        np.testing.assert_array_equal(a.numpy(), b.numpy())


@pytest.mark.parametrize(
    ("sparse_update", "option"),
    [
        ("lazy", "jit_compile"),
        ("exact", "steps_per_execution"),
        pytest.param("exact", "jit_compile", marks=pytest.mark.slow),
        pytest.param("lazy", "steps_per_execution", marks=pytest.mark.slow),
        pytest.param("exact", "run_eagerly", marks=pytest.mark.slow),
        pytest.param("lazy", "run_eagerly", marks=pytest.mark.slow),
    ],
)
def test_fit_in_other_ways(option, sparse_update):
    plain, other = (
        make_model(tav.QHAdamW(0.01, sparse_update=sparse_update)),
        make_model(tav.QHAdamW(0.01, sparse_update=sparse_update)),
    )
    other.compile(other.optimizer, "mse", **{option: 3 if option == "steps_per_execution" else True})
    fit(plain, 1)
    fit(other, 1)
    for a, b in zip(plain.weights, other.weights, strict=True):
        np.testing.assert_allclose(a.numpy(), b.numpy(), rtol=2e-4, atol=2e-5)


@FUSED
def test_rows_are_written_in_place_and_read_without_a_copy(fused):
    """TensorFlow copies a table that rows were written to at every dense read, unless told otherwise."""
    table = tf.Variable(tf.ones((1000, 4)))
    optimizer = tav.AdamW(sparse_update="lazy", fused=fused)
    optimizer.build([table])

    @tf.function
    def step():
        optimizer.apply([slices([1, 5, 1], np.ones((3, 4)), tf.float32)], [table])

    step()
    before = cases.address(table)
    step()
    assert cases.address(table) == before
    assert cases.address(table) == cases.address(table)
