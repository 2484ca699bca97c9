"""float16 and bfloat16 variables: float32 moments and arithmetic, and they train."""

import cases
import keras
import numpy as np
import pytest
import tensorflow as tf

import tf_adam_variants as tav

HALF = [tf.float16, tf.bfloat16]


@pytest.mark.parametrize("mode", cases.MODES)
@pytest.mark.parametrize("dtype", HALF, ids=lambda dtype: dtype.name)
@pytest.mark.parametrize("case", cases.CASES, ids=lambda case: case.name)
def test_one_step_is_the_float32_step_rounded_once(case, dtype, mode):
    inits, grads = cases.problem(1, seed=7)
    inits = [tf.cast(w, dtype).numpy().astype(np.float32) for w in inits]
    grads = [[tf.cast(g, dtype).numpy().astype(np.float32) for g in grads[0]]]
    half = cases.run(mode, case.cls(0.125, **case.terms), inits, grads, dtype)
    full = cases.run(mode, case.cls(0.125, **case.terms), inits, grads, tf.float32)
    for have, want in zip(half[0], full[0], strict=True):
        half_spacing = 2.0 ** (-11 if dtype == tf.float16 else -8)
        assert np.all(np.abs(have - want) <= 1.0001 * half_spacing * np.abs(want))


@pytest.mark.parametrize("dtype", HALF, ids=lambda dtype: dtype.name)
@pytest.mark.parametrize("case", cases.CASES, ids=lambda case: case.name)
def test_state_is_float32(case, dtype):
    weights = tf.Variable(tf.ones((3, 2), dtype))
    optimizer = case.cls(**case.terms)
    optimizer.build([weights])
    slots = [v for v in optimizer.variables if tuple(v.shape) == (3, 2)]
    assert len(slots) == (3 if "amsgrad" in case.terms else 2)
    assert {v.dtype for v in slots} == {"float32"}


@pytest.mark.parametrize("dtype", HALF, ids=lambda dtype: dtype.name)
@pytest.mark.parametrize("case", cases.CASES, ids=lambda case: case.name)
def test_half_weights_follow_their_float32_twin(case, dtype):
    """20 steps at 1e-3 from 0.05: Keras's AdamW leaves a bfloat16 weight where it was."""

    def after(dtype, optimizer):
        weights = tf.Variable([0.05], dtype=dtype)
        for _ in range(20):
            optimizer.apply([tf.ones(1, dtype)], [weights])
        return float(weights[0])

    rate = 1e-3 if case.cls is not tav.LAMB else 2e-2
    have = after(dtype, case.cls(rate, **case.terms))
    twin = after(tf.float32, case.cls(rate, **case.terms))
    spacing = 0.05 * (2.0**-10 if dtype == tf.float16 else 2.0**-7)
    assert twin < 0.045
    assert abs(have - twin) < 10 * spacing  # 20 roundings, each by half a spacing at the most
    if dtype == tf.bfloat16:
        assert after(dtype, keras.optimizers.AdamW(1e-3)) == float(tf.constant(0.05, dtype))


@pytest.mark.parametrize("mode", cases.MODES)
def test_lamb_s_norms_do_not_overflow_in_float16(mode):
    """70,000 ones: the square of their norm is beyond float16's 65,504."""
    weights = np.ones(70_000)
    ours = cases.run(mode, tav.LAMB(2.0**-6), [weights], [[weights]], tf.float16, ["w"])
    want = cases.oracle.train(
        cases.oracle.lamb,
        [weights],
        [[weights]],
        [2.0**-6],
        weight_decay=0.01,
        beta_1=0.9,
        beta_2=0.999,
        epsilon=1e-6,
    )
    np.testing.assert_allclose(ours[0][0], want[0][0], rtol=2.0**-11)


def test_a_mixed_precision_model_trains():
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(16, "relu"), keras.layers.Dense(1)])
    finally:
        keras.config.set_dtype_policy("float32")
    model.compile(optimizer="qhadamw", loss="mse")
    model.optimizer.learning_rate = 1e-2
    x = np.random.default_rng(0).normal(size=(256, 8)).astype("float32")
    history = model.fit(x, x.sum(axis=1), epochs=10, verbose=0).history["loss"]
    assert history[-1] < history[0] / 4


def test_a_loss_scale_optimizer_wraps_it():
    inner = tav.AdamW(0.125)
    outer = keras.optimizers.LossScaleOptimizer(inner, initial_scale=4.0)
    weights, twin = tf.Variable([1.0, 2.0]), tf.Variable([1.0, 2.0])
    outer.apply([tf.constant([4.0, -8.0])], [weights])
    tav.AdamW(0.125).apply([tf.constant([1.0, -2.0])], [twin])
    np.testing.assert_array_equal(weights.numpy(), twin.numpy())
    outer.apply([tf.constant([np.nan, 1.0])], [weights])
    np.testing.assert_array_equal(weights.numpy(), twin.numpy())


@pytest.mark.parametrize("how", ["exact", "lazy"])
@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
@pytest.mark.parametrize("gradient", [tf.bfloat16, tf.float32], ids=lambda dtype: dtype.name)
@pytest.mark.parametrize("fused", [False, True])
def test_gradients_of_half_types_accumulate_in_float32(fused, gradient, sparse, how):
    """In bfloat16 ones add up to 256, and 1,000 of them would have a mean of 0.256."""
    count = 300
    weights, twin = tf.Variable(tf.ones((3, 2), tf.bfloat16)), tf.Variable(tf.ones((3, 2)))
    optimizer = tav.AdamW(
        0.125, epsilon=1.0, gradient_accumulation_steps=count, sparse_update=how, fused=fused
    )
    ones = tf.ones((3, 2), gradient)
    for _ in range(count):
        optimizer.apply([tf.IndexedSlices(ones, tf.constant([0, 1, 2])) if sparse else ones], [weights])
    tav.AdamW(0.125, epsilon=1.0).apply([tf.ones((3, 2))], [twin])
    np.testing.assert_array_equal(weights.numpy(), tf.cast(twin, tf.bfloat16).numpy())
    (accumulator,) = (v for v in optimizer.variables if v.name.endswith("gradient_accumulator"))
    assert accumulator.dtype == "float32"


@pytest.mark.parametrize("momentum", [0.5, 0.99])
@pytest.mark.parametrize("dtype", HALF, ids=lambda dtype: dtype.name)
def test_averages_of_half_types_are_float32(dtype, momentum):
    """In bfloat16 a momentum of 0.999 is 1, and the average would stay where it began."""
    options = {"use_ema": True, "ema_momentum": momentum, "weight_decay": 0.0}
    weights, twin = tf.Variable(tf.ones(2, dtype)), tf.Variable(tf.ones(2))
    half, full = tav.AdamW(2e-3, master_weights=True, **options), tav.AdamW(2e-3, **options)
    for _ in range(200):
        half.apply([tf.ones(2, dtype)], [weights])
        full.apply([tf.ones(2)], [twin])
    half.finalize_variable_values([weights])
    full.finalize_variable_values([twin])
    assert twin[0] < 0.9
    spacing = 2.0 ** (-10 if dtype == tf.float16 else -7)
    np.testing.assert_allclose(tf.cast(weights, tf.float32), twin, atol=spacing)


@pytest.mark.parametrize("fused", [False, True])
def test_a_loss_scale_is_taken_off_in_float32(fused):
    """1e-8 is none in float16."""
    scaled = tf.constant([1e-4, 1.05e-7, 1e-8]) * 2.0**15
    weights = tf.Variable(tf.ones(3, tf.float16))
    optimizer = tav.AdamW(
        2.0**-6, weight_decay=0.0, epsilon=1e-12, loss_scale_factor=2.0**15, master_weights=True, fused=fused
    )
    for _ in range(4):
        optimizer.apply([tf.cast(scaled, tf.float16)], [weights])
    np.testing.assert_allclose(tf.cast(weights, tf.float32), 1 - 4 * 2.0**-6, rtol=2.0**-11)


def test_averages_of_float64_are_float64():
    weights = tf.Variable([1.0, 2.0], dtype=tf.float64)
    optimizer = tav.AdamW(0.125, use_ema=True, ema_momentum=0.99)
    want = None
    for _ in range(5):
        optimizer.apply([tf.ones(2, tf.float64)], [weights])
        want = weights.numpy() if want is None else 0.99 * want + 0.01 * weights.numpy()
    optimizer.finalize_variable_values([weights])
    np.testing.assert_allclose(weights.numpy(), want, rtol=1e-14)
