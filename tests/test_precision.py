"""float16 and bfloat16 variables: float32 moments and arithmetic, and they train."""

import axes
import cases
import keras
import numpy as np
import tensorflow as tf
from axes import MODES_XLA_SLOW

import tf_adam_variants as tav

HALF_PRECISION = [tf.float16, tf.bfloat16]


@axes.pairwise(axes.few_graphs, case=cases.CASES, dtype=HALF_PRECISION, mode=cases.MODES)
def test_one_step_is_the_float32_step_rounded_once(case, dtype, mode):
    inits, grads = cases.problem(1, seed=7)
    inits = [tf.cast(w, dtype).numpy().astype(np.float32) for w in inits]
    grads = [[tf.cast(g, dtype).numpy().astype(np.float32) for g in grads[0]]]
    half = cases.run(mode, case.cls(0.125, **case.terms), inits, grads, dtype)
    full = cases.run(mode, case.cls(0.125, **case.terms), inits, grads, tf.float32)
    for actual, expected in zip(half[0], full[0], strict=True):
        half_spacing = 2.0 ** (-11 if dtype == tf.float16 else -8)
        assert np.all(np.abs(actual - expected) <= 1.0001 * half_spacing * np.abs(expected))


@axes.pairwise(case=cases.CASES, dtype=HALF_PRECISION)
def test_state_is_float32(case, dtype):
    weights = tf.Variable(tf.ones((3, 2), dtype))
    optimizer = case.cls(**case.terms)
    optimizer.build([weights])
    slots = [v for v in optimizer.variables if tuple(v.shape) == (3, 2)]
    assert len(slots) == (3 if "amsgrad" in case.terms else 2)
    assert {v.dtype for v in slots} == {"float32"}


@axes.pairwise(case=cases.CASES, dtype=HALF_PRECISION)
def test_half_precision_weights_follow_their_float32_twin(case, dtype):
    """20 steps at 1e-3 from 0.05: Keras's AdamW leaves a bfloat16 weight where it was."""

    def after(dtype, optimizer):
        weights = tf.Variable([0.05], dtype=dtype)
        for _ in range(20):
            optimizer.apply([tf.ones(1, dtype)], [weights])
        return float(weights[0])

    rate = 1e-3 if case.cls is not tav.LAMB else 2e-2
    actual = after(dtype, case.cls(rate, **case.terms))
    twin = after(tf.float32, case.cls(rate, **case.terms))
    spacing = 0.05 * (2.0**-10 if dtype == tf.float16 else 2.0**-7)
    assert twin < 0.045
    assert abs(actual - twin) < 10 * spacing  # 20 roundings, each by half a spacing at the most
    if dtype == tf.bfloat16:
        assert after(dtype, keras.optimizers.AdamW(1e-3)) == float(tf.constant(0.05, dtype))


@MODES_XLA_SLOW
def test_lamb_s_norms_do_not_overflow_in_float16(mode):
    """70,000 ones: the square of their norm is beyond float16's 65,504."""
    weights = np.ones(70_000)
    ours = cases.run(mode, tav.LAMB(2.0**-6), [weights], [[weights]], tf.float16, ["w"])
    expected = cases.oracle.train(
        cases.oracle.lamb,
        [weights],
        [[weights]],
        [2.0**-6],
        weight_decay=0.01,
        beta_1=0.9,
        beta_2=0.999,
        epsilon=1e-6,
    )
    np.testing.assert_allclose(ours[0][0], expected[0][0], rtol=2.0**-11)


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
