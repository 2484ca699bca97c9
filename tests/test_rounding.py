"""Half-precision weights whose steps are too small for them: master weights, and stochastic rounding."""

import random

import axes
import cases
import keras
import numpy as np
import oracle
import pytest
import tensorflow as tf
from axes import FUSED, MODES_XLA_SLOW, SPARSE_UPDATES

import tf_adam_variants as tav

HALF_PRECISION = {"float16": tf.float16, "bfloat16": tf.bfloat16}
OPTIONS = ("master_weights", "stochastic_rounding")
RATE = 2.0**-9  # steps of less than half the distance between two bfloat16 numbers


def round_to(values, dtype):
    return tf.cast(values, dtype).numpy().astype(np.float64)


def make_problem(dtype, steps=4):
    inits, grads = cases.problem(steps, seed=3)
    return [round_to(w, dtype) for w in inits], [[round_to(g, dtype) for g in one] for one in grads]


def slots_of(optimizer, name):
    return [v for v in optimizer.variables if v.name.endswith(name)]


def bits(variables):
    return [tf.bitcast(tf.convert_to_tensor(v), tf.uint16).numpy() for v in variables]


# -- master weights


@axes.pairwise(axes.few_graphs, case=cases.CASES, dtype=list(HALF_PRECISION), mode=cases.MODES)
def test_master_weights_take_the_steps_of_float32(case, dtype, mode):
    inits, grads = make_problem(dtype)
    weights = cases.variables(inits, HALF_PRECISION[dtype])
    optimizer = case.cls(RATE, **case.oracle_kwargs, master_weights=True)
    step = cases.apply_in(mode, optimizer, weights)
    expected = oracle.train(case.rule, inits, grads, [RATE] * 4, **case.oracle_kwargs)
    masters = slots_of(optimizer, "master_weight")
    assert [m.dtype for m in masters] == ["float32"] * len(weights)
    for step_grads, expected_now in zip(grads, expected, strict=True):
        step([tf.constant(g, HALF_PRECISION[dtype]) for g in step_grads])
        assert cases.worst([[m.numpy() for m in masters]], [expected_now]) < 5e-6
        for w, m in zip(weights, masters, strict=True):
            np.testing.assert_array_equal(bits([w]), bits([tf.cast(m.value, HALF_PRECISION[dtype])]))


@axes.pairwise(cls=[tav.AdamW, tav.QHAdamW, tav.LAMB], mode=cases.MODES, sparse_update=["exact", "lazy"])
def test_master_weights_of_rows(cls, mode, sparse_update):
    """Beside a float32 table, which other tests compare with the oracle."""
    rng = np.random.default_rng(0)
    table = round_to(rng.normal(size=(9, 4)), "bfloat16")
    steps = [(rng.integers(6, size=7), rng.integers(-8, 9, (7, 4)) / 4) for _ in range(4)]

    def train_table(dtype, **options):
        weights = tf.Variable(table, dtype=dtype)
        optimizer = cls(RATE, sparse_update=sparse_update, **options)
        optimizer.build([weights])
        step = cases.compiled(
            mode, optimizer, lambda ids, values: optimizer.apply([tf.IndexedSlices(values, ids)], [weights])
        )
        for ids, values in steps:
            step(tf.constant(ids), tf.constant(values, dtype))
        return weights, optimizer

    twin, _ = train_table(tf.float32)
    weights, optimizer = train_table(tf.bfloat16, master_weights=True)
    (master,) = slots_of(optimizer, "master_weight")
    np.testing.assert_allclose(master.numpy(), twin.numpy(), rtol=2e-6, atol=1e-7)
    np.testing.assert_array_equal(bits([weights]), bits([tf.cast(master.value, tf.bfloat16)]))


@axes.pairwise(cls=[tav.AdamW, tav.LAMB], mode=cases.MODES)
def test_an_assigned_element_is_taken_over_and_the_others_continue(cls, mode):
    inits, grads = make_problem("bfloat16", 6)
    weights = cases.variables(inits, tf.bfloat16)
    optimizer = cls(RATE, weight_decay=0.25, master_weights=True)
    step = cases.apply_in(mode, optimizer, weights)
    masters = slots_of(optimizer, "master_weight")
    case = next(case for case in cases.CASES if case.cls is cls)
    for step_grads in grads[:3]:
        step([tf.constant(g, tf.bfloat16) for g in step_grads])
    begin = [m.numpy().astype(np.float64) for m in masters]
    begin[0][2] = -0.75
    weights[0][2].assign(tf.fill([4], tf.constant(-0.75, tf.bfloat16)))
    moments = [
        [s.numpy().astype(np.float64) for s in slots_of(optimizer, name)] for name in ("momentum", "velocity")
    ]
    step([tf.constant(g, tf.bfloat16) for g in grads[3]])
    for i, master in enumerate(masters):
        own = {"m": moments[0][i], "v": moments[1][i]}
        decay = 0.25 * (1 if cls is tav.LAMB else RATE)
        terms = {name: value for name, value in case.oracle_kwargs.items() if name != "weight_decay"}
        expected = case.rule(begin[i], grads[3][i], 4, own, RATE, decay, **terms)
        np.testing.assert_allclose(master.numpy(), expected, rtol=0, atol=2e-6 * np.abs(expected).max())


@axes.pairwise(dtype=list(HALF_PRECISION), mode=["eager", "fused eager"])
def test_ties_are_rounded_to_even(dtype, mode):
    """A step at a rate of 0 writes the rounding of the master weights."""
    spacing = 2.0 ** (-10 if dtype == "float16" else -7)
    ties = np.concatenate([sign * (1 + spacing * (np.arange(8) + 0.5)) for sign in (1, -1)])
    ties = np.append(ties, 2.0**-24 * (np.arange(8) + 0.5)).astype("float32")  # denormal in float16
    rounded = tf.cast(ties, HALF_PRECISION[dtype])
    weights = tf.Variable(rounded)
    optimizer = tav.AdamW(0.0, master_weights=True)
    step = cases.apply_in(mode, optimizer, [weights])
    (master,) = slots_of(optimizer, "master_weight")
    master.assign(ties)
    step([tf.ones(len(ties), HALF_PRECISION[dtype])])
    np.testing.assert_array_equal(master.numpy(), ties)
    np.testing.assert_array_equal(bits([weights]), bits([rounded]))


def test_float32_variables_among_half_ones_are_updated_as_ever():
    half, full, twin = tf.Variable([0.5], dtype=tf.bfloat16), tf.Variable([0.5]), tf.Variable([0.5])
    optimizer = tav.AdamW(RATE, master_weights=True)
    optimizer.apply([tf.ones(1, tf.bfloat16), tf.ones(1)], [half, full])
    tav.AdamW(RATE).apply([tf.ones(1)], [twin])
    np.testing.assert_array_equal(full.numpy(), twin.numpy())
    assert len(slots_of(optimizer, "master_weight")) == 1


# -- stochastic rounding


@axes.pairwise(axes.few_graphs, case=cases.CASES, dtype=list(HALF_PRECISION), mode=cases.MODES)
def test_rounding_at_random_is_the_oracle_s(case, dtype, mode):
    """To the bit, but where the last bits of float32 decide."""
    rng, rate = np.random.default_rng(5), float(np.float32(0.0027))
    shapes = [(70, 30), (301,)]
    inits = [round_to(rng.normal(size=shape), dtype) for shape in shapes]
    grads = [[round_to(rng.normal(size=shape), dtype) for shape in shapes]]
    weights = cases.variables(inits, HALF_PRECISION[dtype], ("a", "b"))
    optimizer = case.cls(rate, **case.oracle_kwargs, stochastic_rounding=True)
    step = cases.apply_in(mode, optimizer, weights)
    optimizer.iterations.assign(0)
    (seed,) = slots_of(optimizer, "rounding_seed")
    step([tf.constant(g, HALF_PRECISION[dtype]) for g in grads[0]])
    expected = oracle.train(case.rule, inits, grads, [rate], **case.oracle_kwargs)[0]
    key = oracle.rounding_key(int(seed.numpy()), 0)
    for i, (actual, exact) in enumerate(zip(weights, expected, strict=True)):
        elements = np.arange(exact.size).reshape(exact.shape)
        low, high = (
            oracle.rounded_at_random(np.float32(exact * (1 + room)), dtype, key, i, elements)
            for room in (-2e-6, 2e-6)
        )
        actual, sure = actual.numpy().astype(np.float64), low == high
        assert sure.mean() > 0.98
        np.testing.assert_array_equal(actual[sure], low[sure])
        assert np.all((actual == low) | (actual == high))
        assert np.mean(actual != round_to(exact, dtype)) > 0.05  # not to nearest


@SPARSE_UPDATES
@MODES_XLA_SLOW
def test_rows_are_rounded_as_in_the_whole_table(sparse_update, mode):
    rng = np.random.default_rng(0)
    table, values = (
        round_to(rng.normal(size=(50, 8)), "bfloat16"),
        round_to(rng.normal(size=(20, 8)), "bfloat16"),
    )
    ids = rng.permutation(50)[:20]
    dense = np.zeros_like(table)
    dense[ids] = values
    one = tf.ones((), tf.bfloat16)

    def train_table(gradient):
        keras.utils.set_random_seed(1)
        weights = tf.Variable(table, dtype=tf.bfloat16)
        optimizer = tav.AdamW(RATE, sparse_update=sparse_update, stochastic_rounding=True)
        optimizer.build([weights])
        cases.compiled(mode, optimizer, lambda: optimizer.apply([gradient()], [weights]))()
        return weights.numpy().astype(np.float64)

    by_rows = train_table(lambda: tf.IndexedSlices(one * values, tf.constant(ids)))
    whole = train_table(lambda: one * dense)
    np.testing.assert_array_equal(by_rows[ids], whole[ids])


@FUSED
@pytest.mark.parametrize("dtype", HALF_PRECISION)
def test_steps_too_small_to_see_are_right_on_average(dtype, fused):
    size, steps = 20_000, 40
    rate = 2.0**-14 if dtype == "bfloat16" else 2.0**-17
    weights = tf.Variable(tf.ones(size, HALF_PRECISION[dtype]))
    optimizer = tav.AdamW(rate, weight_decay=0.0, stochastic_rounding=True, fused=fused)
    gradient = tf.ones(size, HALF_PRECISION[dtype])
    for _ in range(steps):
        optimizer.apply([gradient], [weights])
    actual = weights.numpy().astype(np.float64)
    # Each step is a draw with this variance at the most, and the draws of steps and elements are independent.
    spacing = 2.0 ** (-8 if dtype == "bfloat16" else -11)
    deviation = np.sqrt(steps * rate * spacing / size)
    assert abs(np.mean(actual) - (1 - steps * rate)) < 4 * deviation
    assert np.var(actual) < 1.1 * steps * rate * spacing
    plain = tf.Variable(tf.ones(size, HALF_PRECISION[dtype]))
    tav.AdamW(rate, weight_decay=0.0, fused=fused).apply([gradient], [plain])
    np.testing.assert_array_equal(plain.numpy().astype(np.float64), 1.0)


@FUSED
def test_random_numbers_differ_between_steps_variables_and_elements(fused):
    size = 50_000  # several spans of the fused kernels, which are of 16,384 elements
    weights = [tf.Variable(tf.ones(size, tf.bfloat16), name=name) for name in "ab"]
    optimizer = tav.AdamW(2.0**-10, weight_decay=0.0, epsilon=0.0, stochastic_rounding=True, fused=fused)
    ups = []
    for _ in range(4):
        for w in weights:
            w.assign(tf.ones(size, tf.bfloat16))
        optimizer.apply([tf.ones(size, tf.bfloat16)] * 2, weights)
        ups += [2.0 * (w.numpy().astype(np.float64) == 1) - 1 for w in weights]
    for i, one in enumerate(ups):
        for lag in (1, 2, 3, 64, 1000, 16_384):
            assert abs(np.mean(one[lag:] * one[:-lag]) - np.mean(one) ** 2) < 5 / np.sqrt(size - lag)
        for other in ups[:i]:
            assert abs(np.mean(one * other) - np.mean(one) * np.mean(other)) < 5 / np.sqrt(size)


def test_the_seed_is_keras_s_and_python_s():
    def seed_of(seed):
        keras.utils.set_random_seed(seed)
        optimizer = tav.LAMB(stochastic_rounding=True)
        optimizer.build([tf.Variable([1.0], dtype=tf.bfloat16)])
        return int(slots_of(optimizer, "rounding_seed")[0].numpy())

    assert seed_of(1) == seed_of(1) != seed_of(2)
    random.seed(1)
    assert random.getrandbits(32) == seed_of(1)


# -- both


def make_model(option):
    model = keras.Sequential(
        [
            keras.Input((6,)),
            keras.layers.Dense(8, "relu", dtype="bfloat16"),
            keras.layers.Dense(1, dtype="bfloat16"),
        ]
    )
    model.compile(tav.QHAdamW(RATE, **{option: True}), "mse")
    return model


def train_model(model, epochs=1):
    x = np.random.default_rng(0).normal(size=(64, 6)).astype("float32")
    model.fit(x, x.sum(axis=1, keepdims=True), epochs=epochs, batch_size=16, shuffle=False, verbose=0)


def state_of(model):
    return [v.numpy().astype(np.float64) for v in (*model.weights, *model.optimizer.variables)]


@axes.pairwise(option=OPTIONS, way=["keras", "weights", "checkpoint"], built=[False, True])
def test_a_saved_run_continues_bit_exactly(option, way, built, tmp_path):
    whole = make_model(option)
    train_model(whole)
    if way == "keras":
        whole.save(tmp_path / "model.keras")
        again = keras.models.load_model(tmp_path / "model.keras")
        assert getattr(again.optimizer, option)
    else:
        again = make_model(option)
        if built:
            train_model(again)
        if way == "weights":
            whole.save_weights(tmp_path / "model.weights.h5")
            again.load_weights(tmp_path / "model.weights.h5")
        else:
            saved = tf.train.Checkpoint(model=whole, optimizer=whole.optimizer).save(str(tmp_path / "c"))
            tf.train.Checkpoint(model=again, optimizer=again.optimizer).restore(saved)
    train_model(whole)
    train_model(again)
    for actual, expected in zip(state_of(again), state_of(whole), strict=True):
        np.testing.assert_array_equal(actual, expected)


@pytest.mark.parametrize("option", OPTIONS)
def test_state_saved_without_the_option_is_refused(option, tmp_path):
    plain = make_model("use_ema")  # any other
    plain.compile(tav.QHAdamW(RATE), "mse")
    train_model(plain)
    plain.save_weights(tmp_path / "model.weights.h5")
    other = make_model(option)
    train_model(other)
    with pytest.raises(ValueError, match="does not belong"):
        other.load_weights(tmp_path / "model.weights.h5")


def test_weights_loaded_after_building_are_trained_from():
    model, other = make_model("master_weights"), make_model("master_weights")
    train_model(model)
    train_model(other, 3)
    model.set_weights(other.get_weights())
    before = [w.numpy().astype(np.float64) for w in model.weights]
    model.optimizer.learning_rate = 0.0
    train_model(model)
    for w, expected in zip(model.weights, before, strict=True):
        np.testing.assert_array_equal(w.numpy().astype(np.float64), expected)
    for m, expected in zip(slots_of(model.optimizer, "master_weight"), before, strict=True):
        np.testing.assert_array_equal(m.numpy(), expected)


@pytest.mark.parametrize(
    "option", ["master_weights", pytest.param("stochastic_rounding", marks=pytest.mark.slow)]
)
def test_slots_that_are_made_under_xla(option):
    """As where Keras chooses XLA: the first step is the same as one of slots that were there before."""
    steps = []
    for built in (False, True):
        keras.utils.set_random_seed(0)
        model = make_model(option)
        model.compile(tav.LAMB(RATE, **{option: True}), "mse", jit_compile=True)
        if built:
            model.optimizer.build(model.trainable_variables)
        train_model(model)
        steps.append([w.numpy() for w in model.weights])
    for actual, expected in zip(*steps, strict=True):
        np.testing.assert_array_equal(actual, expected)


@axes.pairwise(cls=cases.CLASSES, dtype=[tf.float32, tf.float64], option=OPTIONS)
def test_full_precision_is_an_error(cls, dtype, option):
    optimizer, weights = cls(**{option: True}), tf.Variable([1.0], dtype=dtype)
    with pytest.raises(ValueError, match=f"`{option}=True` is for float16 and bfloat16.*{dtype.name}"):
        optimizer.apply([tf.ones(1, dtype)], [weights])
    np.testing.assert_array_equal(weights.numpy(), [1.0])


@pytest.mark.parametrize("option", OPTIONS)
def test_an_option_cannot_change_once_built(option):
    optimizer = tav.AdamW()
    optimizer.build([tf.Variable([1.0], dtype=tf.bfloat16)])
    with pytest.raises(ValueError, match=f"`{option}` decides which slots there are"):
        setattr(optimizer, option, True)


def test_one_of_the_two():
    with pytest.raises(ValueError, match="`stochastic_rounding` must be False with master_weights=True"):
        tav.AdamW(master_weights=True, stochastic_rounding=True)
    optimizer = tav.AdamW(master_weights=True)
    with pytest.raises(ValueError, match="`stochastic_rounding` must be False with master_weights=True"):
        optimizer.stochastic_rounding = True
