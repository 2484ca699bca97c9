"""Gradients in slices: exact is the dense gradient's step, lazy changes the rows that it names."""

import itertools
import json
import pathlib

import cases
import keras
import numpy as np
import pytest
import tensorflow as tf

import tf_adam_variants as tav

FOLDER = pathlib.Path(__file__).parent / "golden"
TOLERANCE = {"float64": 1e-12, "float32": 5e-6, "float16": 2e-3, "bfloat16": 2e-2}
ALL_CASES = pytest.mark.parametrize("case", cases.CASES, ids=lambda case: case.name)
BOTH = pytest.mark.parametrize("how", ["exact", "lazy"])
ALL_MODES = pytest.mark.parametrize("mode", cases.MODES)


def defaults(case):
    config = case.cls().get_config()
    terms = {k: config[k] for k in ("beta_1", "beta_2", "epsilon", "nu_1", "nu_2") if k in config}
    return terms | ({"weight_decay": 0.25} if case.decays else {}) | case.terms


def dense(ids, values, shape):
    gradient = np.zeros(shape)
    np.add.at(gradient, ids, values)
    return gradient


def slices(ids, values, dtype, ids_dtype=tf.int64, shape=None):
    return tf.IndexedSlices(tf.constant(values, dtype), tf.constant(ids, ids_dtype), shape)


def trained(optimizer, table, steps, dtype=tf.float64, mode="graph", ids_dtype=tf.int64, signature=None):
    """The table after each step of ids and values."""
    weights = tf.Variable(table, dtype=dtype, name="table")
    optimizer.build([weights])

    def apply(ids, values):
        optimizer.apply([tf.IndexedSlices(values, ids)], [weights])

    step = cases.compiled(mode, optimizer, apply, **({"input_signature": signature} if signature else {}))
    history = []
    for ids, values in steps:
        step(tf.constant(ids, ids_dtype), tf.constant(values, dtype))
        history.append([weights.numpy().astype(np.float64)])
    return history


def lazily(case, table, steps, rates):
    """The oracle's lazy training: each named row is a variable of its own whose step is the global one.

    LAMB's ratio is that of the named rows together.
    """
    told = defaults(case)
    decay, terms = told.pop("weight_decay", 0.0), told
    table, slots, history = np.array(table, np.float64), {}, []
    for t, ((ids, values), lr) in enumerate(zip(steps, rates, strict=True), 1):
        rows = sorted(set(ids))
        if rows:
            g = dense(ids, values, table.shape)[rows]
            kept = {key: whole[rows] for key, whole in slots.items()}
            share = decay * (1.0 if case.cls is tav.LAMB else lr)
            table[rows] = case.rule(table[rows], g, t, kept, lr, share, **terms)
            for key, value in kept.items():
                slots.setdefault(key, np.zeros_like(table))[rows] = value
        history.append([table.copy()])
    return history


def expected(case, how, table, steps, rate):
    """The oracle's training, exact by the dense gradients."""
    if how == "lazy":
        return lazily(case, table, steps, [rate] * len(steps))
    grads = [[dense(*step, table.shape)] for step in steps]
    return cases.oracle.train(case.rule, [table], grads, [rate] * len(steps), **defaults(case))


def steps_of(kind, rows, shape, count=5, seed=0):
    rng = np.random.default_rng(seed)
    draw = {
        "repeated": lambda: rng.choice(rows // 2, size=7),
        "one id many times": lambda: [3] * 6,
        "unsorted": lambda: rng.permutation(rows)[:4],
        "single": lambda: [int(rng.integers(rows))],
        "all rows": lambda: rng.permutation(rows),
        "empty": lambda: [],
    }[kind]
    drawn = [np.asarray(draw(), np.int64) for _ in range(count)]
    return [(ids, rng.normal(size=(len(ids), *shape))) for ids in drawn]


KINDS = ["repeated", "one id many times", "unsorted", "single", "all rows", "empty"]


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@ALL_MODES
@pytest.mark.parametrize(
    ("file", "how"), [("exact_sparse_lamb_tfa", "exact"), ("lazy_sparse_adam_torch", "lazy")]
)
def test_golden(file, how, mode, dtype):
    data = np.load(FOLDER / f"{file}.npz")
    meta = json.loads(str(data["meta"]))
    optimizer = getattr(tav, meta["optimizer"])(**meta["hyperparameters"], sparse_update=how)
    steps = list(zip(data["indices"], data["values"], strict=True))
    history = trained(optimizer, data["init"], steps, tf.as_dtype(dtype), mode)
    assert cases.worst(history, [[p] for p in data["params"]]) < TOLERANCE[dtype]


@ALL_MODES
@pytest.mark.parametrize("kind", KINDS)
@BOTH
@ALL_CASES
def test_every_case(case, how, kind, mode):
    table = np.random.default_rng(1).normal(size=(9, 3))
    steps = steps_of(kind, 9, (3,))
    have = trained(case.cls(0.125, **defaults(case), sparse_update=how), table, steps, mode=mode)
    assert cases.worst(have, expected(case, how, table, steps, 0.125)) < 1e-12


@BOTH
@pytest.mark.parametrize("shape", [(), (3,), (2, 3), (2, 1, 3)], ids=lambda shape: f"rank {len(shape) + 1}")
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("ids_dtype", [tf.int32, tf.int64], ids=lambda dtype: dtype.name)
@pytest.mark.parametrize("case", [cases.CASES[0], cases.CASES[5], cases.CASES[6]], ids=lambda case: case.name)
def test_types_and_ranks(case, ids_dtype, dtype, shape, how):
    table = 1 + np.random.default_rng(1).uniform(size=(8, *shape))
    steps = steps_of("repeated", 8, shape, count=3)
    have = trained(
        case.cls(0.0625, **defaults(case), sparse_update=how),
        table,
        steps,
        tf.as_dtype(dtype),
        ids_dtype=ids_dtype,
    )
    assert cases.worst(have, expected(case, how, table, steps, 0.0625)) < TOLERANCE[dtype]


@ALL_MODES
@ALL_CASES
def test_lazy_leaves_other_rows_alone(case, mode):
    table = np.random.default_rng(1).normal(size=(6, 2))
    optimizer = case.cls(0.5, **defaults(case), sparse_update="lazy")
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


@pytest.mark.parametrize("mode", [mode for mode in cases.MODES if mode != "xla"])
@BOTH
@pytest.mark.parametrize("bad", [-1, 5, 2**31 - 1])
def test_ids_out_of_range_write_nothing(bad, how, mode):
    weights = [tf.Variable(np.ones(2), name="dense"), tf.Variable(np.ones((5, 2)), name="table")]
    optimizer = tav.QHAdamW(sparse_update=how)
    apply = cases.apply_in(mode, optimizer, weights)
    apply([tf.ones(2, tf.float64), slices([0, 4], np.ones((2, 2)), tf.float64)])
    before = [v.numpy() for v in [*weights, *optimizer.variables]]
    with pytest.raises(tf.errors.InvalidArgumentError, match=r"(?s)ids of a gradient.*must be in \[0, 5\)"):
        apply([tf.ones(2, tf.float64), slices([0, bad], np.ones((2, 2)), tf.float64)])
    for variable, value in zip([*weights, *optimizer.variables], before, strict=True):
        np.testing.assert_array_equal(variable.numpy(), value)


@BOTH
@pytest.mark.parametrize("bad", [-1, 5, 2**31 - 1])
def test_under_xla_ids_out_of_range_name_no_row(bad, how):
    """XLA compiles assertions away."""
    tables = [tf.Variable(np.ones((5, 2))) for _ in range(2)]
    for table, ids in zip(tables, ([0, bad, 4, bad], [0, 4]), strict=True):
        apply = cases.apply_in("xla", tav.QHAdamW(sparse_update=how), [table])
        apply([slices(ids, np.ones((len(ids), 2)), tf.float64)])
    np.testing.assert_array_equal(tables[0].numpy(), tables[1].numpy())
    assert not np.array_equal(tables[0].numpy()[0], [1, 1])


@pytest.mark.parametrize("mode", [mode for mode in cases.MODES if not mode.endswith("eager")])
@pytest.mark.parametrize("rows", [None, 7], ids=["dynamic", "static"])
@BOTH
def test_static_and_dynamic_numbers_of_slices(how, rows, mode):
    table = np.random.default_rng(1).normal(size=(9, 3))
    steps = steps_of("repeated", 9, (3,))
    signature = [tf.TensorSpec([rows], tf.int64), tf.TensorSpec([rows, 3], tf.float64)]
    case = cases.CASES[6]
    optimizer = case.cls(0.125, **defaults(case), sparse_update=how)
    have = trained(optimizer, table, steps, mode=mode, signature=signature)
    twin = case.cls(0.125, **defaults(case), sparse_update=how)
    assert cases.worst(have, trained(twin, table, steps, mode="eager")) < 1e-13


CLIPPINGS = [{"clipnorm": 0.5}, {"clipvalue": 0.125}, {"global_clipnorm": 0.75}]


@ALL_MODES
@BOTH
@pytest.mark.parametrize("clipping", CLIPPINGS, ids=lambda clipping: next(iter(clipping)))
def test_repeated_ids_are_summed_before_they_are_clipped(clipping, how, mode):
    """Every row is named, and so lazy is exact."""
    rng = np.random.default_rng(3)
    table, other = rng.normal(size=(4, 3)), rng.normal(size=(5,))
    ids = [[0, 1, 2, 3, 1, 1], [3, 3, 3, 2, 1, 0]]
    values, grads = rng.normal(size=(2, 6, 3)), rng.normal(size=(2, 5))
    told = {"beta_1": 0.9, "beta_2": 0.98, "nu_1": 0.7, "nu_2": 1.0, "epsilon": 1e-4, "weight_decay": 0.25}
    optimizer = tav.QHAdamW(0.125, **told, **clipping, sparse_update=how, use_ema=True, ema_momentum=0.5)
    weights = [tf.Variable(table), tf.Variable(other)]
    apply = cases.apply_in(mode, optimizer, weights)
    for i in range(2):
        apply([slices(ids[i], values[i], tf.float64), tf.constant(grads[i])])
    want = cases.oracle.train(
        cases.oracle.qhadam,
        [table, other],
        [[dense(ids[i], values[i], (4, 3)), grads[i]] for i in range(2)],
        [0.125] * 2,
        clipping=clipping,
        **told,
    )
    assert cases.worst([[w.numpy() for w in weights]], want[-1:]) < 1e-12


@ALL_MODES
@BOTH
@pytest.mark.parametrize("case", [cases.CASES[5], cases.CASES[6]], ids=lambda case: case.name)
def test_accumulated_slices(case, how, mode):
    """Two steps together are one step with the mean of their slices; in half of the steps nothing moves."""
    table = np.random.default_rng(1).normal(size=(9, 3))
    steps = steps_of("repeated", 9, (3,), count=6)
    optimizer = case.cls(0.125, **defaults(case), sparse_update=how, gradient_accumulation_steps=2)
    have = trained(optimizer, table, steps, mode=mode)
    pairs = [
        (np.concatenate([a[0], b[0]]), np.concatenate([a[1], b[1]]) / 2)
        for a, b in zip(steps[::2], steps[1::2], strict=True)
    ]
    want = [[table], *itertools.chain.from_iterable([x, x] for x in expected(case, how, table, pairs, 0.125))]
    assert cases.worst(have, want[:-1]) < 1e-12


@BOTH
def test_a_loss_scale(how):
    plain, scaled, wrapped = (tf.Variable(np.ones((4, 2))) for _ in range(3))
    values = np.random.default_rng(0).normal(size=(3, 2))
    once = slices([1, 1, 2], values, tf.float64, shape=(4, 2))
    four = slices([1, 1, 2], 4 * values, tf.float64, shape=(4, 2))
    tav.AdamW(0.125, sparse_update=how).apply([once], [plain])
    tav.AdamW(0.125, sparse_update=how, loss_scale_factor=4.0).apply([four], [scaled])
    inner = tav.AdamW(0.125, sparse_update=how)
    keras.optimizers.LossScaleOptimizer(inner, initial_scale=4.0).apply([four], [wrapped])
    np.testing.assert_array_equal(plain.numpy(), scaled.numpy())
    np.testing.assert_array_equal(plain.numpy(), wrapped.numpy())


def model(optimizer, seed=1):
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
    made = keras.Model(inputs, keras.layers.Dense(1, name="head")(hidden))
    made.compile(optimizer, "mse")
    return made


def fit(made, epochs, **options):
    rng = np.random.default_rng(0)
    x = [rng.integers(high, size=(96, width)) for high, width in ((50, 3), (7, 2), (300, 1))]
    y = sum(part.sum(axis=1) for part in x) % 5
    return made.fit(x, y, batch_size=16, epochs=epochs, shuffle=False, verbose=0, **options).history["loss"]


@BOTH
@ALL_CASES
def test_fit_and_resume(case, how, tmp_path):
    rate = 0.01
    made = model(case.cls(rate, **case.terms, sparse_update=how))
    losses = fit(made, 2)
    made.save(tmp_path / "model.keras")
    losses += fit(made, 2)
    assert losses[-1] < losses[0]
    again = keras.models.load_model(tmp_path / "model.keras")
    assert again.optimizer.sparse_update == how
    fit(again, 2)
    for a, b in itertools.chain(
        zip(made.weights, again.weights, strict=True),
        zip(made.optimizer.variables, again.optimizer.variables, strict=True),
    ):
        np.testing.assert_array_equal(a.numpy(), b.numpy())


@BOTH
@pytest.mark.parametrize("option", ["run_eagerly", "jit_compile", "steps_per_execution"])
def test_fit_in_other_ways(option, how):
    plain, other = model(tav.QHAdamW(0.01, sparse_update=how)), model(tav.QHAdamW(0.01, sparse_update=how))
    other.compile(other.optimizer, "mse", **{option: 3 if option == "steps_per_execution" else True})
    fit(plain, 1)
    fit(other, 1)
    for a, b in zip(plain.weights, other.weights, strict=True):
        np.testing.assert_allclose(a.numpy(), b.numpy(), rtol=2e-4, atol=2e-5)


def test_rows_are_written_in_place_and_read_without_a_copy():
    """TensorFlow copies a table that rows were written to at every dense read, unless told otherwise."""
    table = tf.Variable(tf.ones((1000, 4)))
    optimizer = tav.AdamW(sparse_update="lazy")
    optimizer.build([table])

    @tf.function
    def step():
        optimizer.apply([slices([1, 5, 1], np.ones((3, 4)), tf.float32)], [table])

    step()
    before = cases.address(table)
    step()
    assert cases.address(table) == before
    assert cases.address(table) == cases.address(table)
