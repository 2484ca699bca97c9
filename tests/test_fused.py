"""The fused kernels compute the numbers of the unfused step, in every setting."""

import axes
import cases
import keras
import numpy as np
import oracle
import pytest
import tensorflow as tf

import tf_adam_variants as tav

SIZES = (0, 1, 3, 17, 18011, 65536 + 1)
ULP = 2.0**-23


@axes.pairwise(case=cases.CASES, size=SIZES[1:], mode=["eager", "fused eager"])
def test_a_float32_step_is_within_4_ulps_of_the_oracle_s(case, size, mode):
    """4 units in the last place of the step, 8 where it is a product of LAMB's ratio and direction."""
    rng = np.random.default_rng(size)
    weights = rng.normal(size=size).astype(np.float32)
    gradient = (rng.normal(size=size) * 10.0 ** rng.uniform(-6, 3, size=size)).astype(np.float32)
    rate, terms = 0.0625, case.oracle_kwargs
    actual = cases.run(mode, case.cls(rate, **terms), [weights], [[gradient]], tf.float32, ["w"])[0][0]
    expected = oracle.train(case.rule, [weights], [[gradient]], [rate], **terms)[0][0]
    # What cancels in a step, decay against direction, is rounded before it does.
    step = np.abs(expected - weights) + 2 * terms.get("weight_decay", 0.0) * rate * np.abs(weights)
    ulps = 8 if case.cls is tav.LAMB else 4
    stores = 1 if mode == "fused eager" else 3  # TensorFlow's kernels store the decayed weights in between
    rounding = stores * 0.5 * ULP * np.maximum(np.abs(weights), np.abs(expected))
    assert np.max(np.abs(actual - expected) / (ulps * ULP * step + rounding)) <= 1


@axes.pairwise(case=cases.CASES, dtype=["float16", "bfloat16", "float32", "float64"])
def test_special_values(case, dtype):
    """Zeros, denormals, what overflows when squared, inf and NaN: NaN where the pure step has it."""
    specials = [0.0, -0.0, 1e-40, 6e-8, 1e-30, 3e4, 1e30, np.inf, -np.inf, np.nan, 1.0, -2.0]
    numbers = np.array([(w, g) for w in specials for g in specials]).T
    if case.cls is tav.LAMB:  # what is not finite is in the norm, and below
        numbers = numbers[:, np.isfinite(numbers).all(axis=0) & (np.abs(numbers) < 1e20).all(axis=0)]
    inits, grads = [numbers[0]], [[numbers[1]], [numbers[1][::-1]]]
    with np.errstate(all="ignore"):
        pure, fused = (
            cases.run(mode, case.cls(0.125, **case.terms), inits, grads, tf.as_dtype(dtype), ["w"])
            for mode in ("eager", "fused eager")
        )
    rounding = {"float16": 2.0**-10, "bfloat16": 2.0**-7, "float32": 2e-6, "float64": 1e-14}[dtype]
    for actual, expected in zip(fused, pure, strict=True):
        np.testing.assert_allclose(
            actual[0], expected[0], rtol=rounding, atol=1e-30 if dtype != "float16" else 6e-8
        )


@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan, 1e25])
@pytest.mark.parametrize("case", cases.CASES[6:], ids=lambda case: case.name)
def test_special_gradients_of_lamb(case, bad):
    """One element's; all others meet it in the norm."""
    grads = [[np.array([1.0, bad, -0.5])], [np.array([0.25, 1.0, 2.0])]]
    pure, fused = (
        cases.run(mode, case.cls(0.125, **case.terms), [np.array([1.0, 2.0, -3.0])], grads, tf.float32, ["w"])
        for mode in ("eager", "fused eager")
    )
    for actual, expected in zip(fused, pure, strict=True):
        np.testing.assert_allclose(actual[0], expected[0], rtol=2e-6)


@axes.pairwise(
    axes.few_graphs,
    case=cases.CASES,
    dtype=["float16", "bfloat16", "float32", "float64"],
    mode=["fused eager", "fused graph"],
)
def test_odd_sizes_in_one_step(case, dtype, mode):
    rng = np.random.default_rng(0)
    inits = [rng.normal(size=size) for size in SIZES]
    inits = [tf.cast(w, dtype).numpy().astype(np.float64) for w in inits]
    grads = [[tf.cast(rng.normal(size=size), dtype).numpy().astype(np.float64) for size in SIZES]]
    paths = [f"v{size}" for size in SIZES]
    actual = cases.run(mode, case.cls(0.125, **case.oracle_kwargs), inits, grads, tf.as_dtype(dtype), paths)[
        0
    ]
    expected = oracle.train(case.rule, inits, grads, [0.125], **case.oracle_kwargs)[0]
    tolerance = {"float16": 2.0**-11, "bfloat16": 2.0**-8, "float32": 5e-7, "float64": 1e-14}[dtype]
    assert actual[0].shape == (0,)
    for a, b in zip(actual[1:], expected[1:], strict=True):
        np.testing.assert_allclose(a, b, rtol=1.001 * tolerance, atol=1e-6 if dtype != "float64" else 1e-14)


def train(case, setting, fused):
    """Weights and losses of a model with two embeddings, dense layers and a frozen one."""
    keras.utils.set_random_seed(3)
    options, compiling, dtype = dict(setting), {}, None
    for name in ("run_eagerly", "steps_per_execution", "jit_compile"):
        if name in options:
            compiling[name] = options.pop(name)
    policy, wrap, constraint = (options.pop(name, None) for name in ("policy", "wrap", "constraint"))
    dtype = policy or "float32"
    ids, numbers = keras.Input((3,), dtype="int32"), keras.Input((4,))
    both = [
        keras.layers.Embedding(40, 4, dtype=dtype, embeddings_constraint=constraint)(ids),
        keras.layers.Embedding(1000, 4, dtype="float32")(ids),
    ]
    flat = keras.layers.Flatten()(keras.layers.Concatenate(dtype="float32")(both))
    frozen = keras.layers.Dense(4, trainable=False)
    hidden = keras.layers.Concatenate(dtype="float32")([flat, frozen(numbers)])
    hidden = keras.layers.Dense(16, "tanh", dtype=dtype, kernel_constraint=constraint)(hidden)
    model = keras.Model([ids, numbers], keras.layers.Dense(1, dtype="float32")(hidden))
    optimizer = case.cls(2.0**-6, **case.terms, **options, fused=fused)
    if wrap:
        optimizer = wrap(optimizer)
    model.compile(optimizer, "mse", **compiling)
    rng = np.random.default_rng(0)
    x = [rng.integers(0, 40, size=(64, 3)), rng.normal(size=(64, 4))]
    model.fit(x, x[0].sum(axis=1) % 3, batch_size=16, epochs=2, shuffle=False, verbose=0)
    return [tf.cast(w.value, tf.float64).numpy() for w in model.weights]


SETTINGS = {
    "plain": {},
    "lazy": {"sparse_update": "lazy"},
    "accumulation": {"gradient_accumulation_steps": 2},
    "lazy accumulation": {"gradient_accumulation_steps": 2, "sparse_update": "lazy"},
    "average": {"use_ema": True, "ema_overwrite_frequency": 3},
    "clipnorm": {"clipnorm": 0.05},
    "clipvalue": {"clipvalue": 0.01},
    "global_clipnorm": {"global_clipnorm": 0.05},
    "lazy global_clipnorm": {"global_clipnorm": 0.05, "sparse_update": "lazy"},
    "loss_scale_factor": {"loss_scale_factor": 1024.0},
    "constraint": {"constraint": keras.constraints.MaxNorm(0.5)},
    "bfloat16": {"policy": "bfloat16"},
    "LossScaleOptimizer": {"wrap": keras.optimizers.LossScaleOptimizer},
    "run_eagerly": {"run_eagerly": True},
    "steps_per_execution": {"steps_per_execution": 3},
    "jit_compile": {"jit_compile": True},
}


# What has a test of the fused kernels elsewhere too.
SLOW_SETTINGS = (
    "plain", "lazy", "accumulation", "clipnorm", "clipvalue", "global_clipnorm", "loss_scale_factor",
    "average", "constraint",
)  # fmt: skip


@pytest.mark.parametrize(
    "setting",
    [pytest.param(name, marks=pytest.mark.slow if name in SLOW_SETTINGS else ()) for name in SETTINGS],
)
def test_auto_trains_as_without(setting):
    """Each setting with one of three optimizers."""
    case = cases.CASES[(0, 5, 6)[list(SETTINGS).index(setting) % 3]]
    fused, unfused = (train(case, SETTINGS[setting], choice) for choice in ("auto", False))
    for actual, expected in zip(fused, unfused, strict=True):
        # A bfloat16 weight may round the other way, and then goes its own way by spacings of 2^-8.
        np.testing.assert_allclose(actual, expected, rtol=2e-4, atol=0.02 if setting == "bfloat16" else 2e-5)
