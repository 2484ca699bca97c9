"""Single numbers and formulas from the tests of Keras, TensorFlow Addons and qhoptim."""

import functools

import axes
import cases
import keras
import numpy as np
import oracle
import pytest
import tensorflow as tf
from axes import FUSED
from like_sgd import assert_close, gradient, variable

import tf_adam_variants as tav

# -- Keras: adamw_test, lamb_test


@axes.pairwise(cls=[tav.AdamW, tav.QHAdamW], fused=[False, True])
def test_a_single_step_of_adamw(cls, fused):
    weights = variable([1.0, 2.0, 3.0, 4.0])
    cls(0.5, weight_decay=0.004, fused=fused).apply([gradient([1.0, 6.0, 7.0, 2.0])], [weights])
    assert_close(weights, [0.4980, 1.4960, 2.494, 3.492], 1e-4)


# Keras's numbers for AdamW(1.0, weight_decay=0.5, epsilon=2): gradients of 0.01, then of 0.1 to 1.
FIRST, THEN = np.full(10, 0.01), np.arange(0.1, 1.1, 0.1)
GOLDEN = np.array(
    [
        [0.4998, 0.4998, 0.4998, 0.4998, 0.4998, 0.4998, 0.4998, 0.4998, 0.4998, 0.4998],
        [0.2486, 0.2475, 0.2463, 0.2451, 0.2440, 0.2428, 0.2417, 0.2405, 0.2394, 0.2382],
        [0.1223, 0.1198, 0.1174, 0.1149, 0.1124, 0.1100, 0.1075, 0.1051, 0.1027, 0.1003],
        [0.0586, 0.0549, 0.0512, 0.0475, 0.0439, 0.0402, 0.0366, 0.0330, 0.0294, 0.0258],
        [0.0263, 0.0215, 0.0167, 0.0120, 0.0073, 0.0026, -0.0021, -0.0067, -0.0113, -0.0159],
    ]
)


BETAS = {"beta_1": 0.9, "beta_2": 0.999}
ADAMW = pytest.mark.parametrize(
    "make",
    [
        functools.partial(tav.AdamW, 1.0, weight_decay=0.5, **BETAS),
        functools.partial(tav.QHAdamW, 1.0, weight_decay=0.5, nu_1=1.0, nu_2=1.0, **BETAS),
    ],
    ids=["AdamW", "QHAdamW"],
)


@FUSED
@ADAMW
def test_keras_s_golden_adamw_with_epsilon_where_keras_adds_it(make, fused):
    """Keras adds it before the bias correction of v, which at step t is 2 / sqrt(1 - 0.999**t) after it."""
    optimizer, weights = make(fused=fused), variable(np.ones(10))
    for t, expected in enumerate(GOLDEN, 1):
        optimizer.epsilon = 2 / np.sqrt(1 - 0.999**t)
        optimizer.apply([gradient(FIRST if t == 1 else THEN)], [weights])
        assert_close(weights, expected, 5e-4)


@FUSED
@ADAMW
def test_keras_s_golden_adamw_with_epsilon_where_the_paper_has_it(make, fused):
    """The same problem by the paper's formula: 2 is not the 63 that Keras adds at the first step."""
    optimizer, weights = make(epsilon=2.0, fused=fused), tf.Variable(np.ones(10))
    grads = [[FIRST], *[[THEN]] * 4]
    history = []
    for step in grads:
        optimizer.apply([tf.constant(step[0])], [weights])
        history.append([weights.numpy()])
    oracle_kwargs = BETAS | {"epsilon": 2.0, "weight_decay": 0.5}
    expected = oracle.train(oracle.adamw, [np.ones(10)], grads, [1.0] * 5, **oracle_kwargs)
    assert cases.worst(history, expected) < 1e-12
    assert np.max(np.abs(expected[1][0] - GOLDEN[1])) > 0.1


@FUSED
def test_a_single_step_of_lamb(fused):
    weights = variable([1.0, 2.0, 3.0, 4.0])
    tav.LAMB(0.5, weight_decay=0.0, fused=fused).apply([gradient([1.0, 6.0, 7.0, 2.0])], [weights])
    assert_close(weights, [-0.3693, 0.6306, 1.6306, 2.6306], 1e-4)


@FUSED
def test_keras_s_golden_lamb(fused):
    optimizer, weights = tav.LAMB(0.001, weight_decay=0.0, fused=fused), variable(np.ones(10))
    for step, expected in enumerate([0.999, 0.9982, 0.9974, 0.9965, 0.9955]):
        optimizer.apply([gradient(THEN if step else FIRST)], [weights])
        assert_close(weights, np.full(10, expected), 5e-4)


# -- TensorFlow Addons: lamb_test, weight_decay_optimizers_test


DENSE = ([np.array([1.0, 2.0]), np.array([3.0, 4.0])], [np.full(2, 0.1), np.full(2, 0.01)])
SPARSE = (
    [np.array([1.0, 1.0, 2.0]), np.array([3.0, 3.0, 4.0])],
    [np.array([0.1, 0.0, 0.1]), np.array([0.01, 0.0, 0.01])],
)


TOLERANCE = {"float64": 1e-12, "float32": 1e-6, "float16": 1e-3}  # the last two are those of Addons
SMALL = float(np.float32(1e-3))  # Addons' rate, as Keras keeps it


def take_three_steps(optimizer, problem, sparse=False, fused=False, dtypes=("float64",)):
    """For each type, weights after each of three steps with the same gradients.

    Sparse: the gradients are slices of the rows 0 and 2. Variables of all types take a step together.
    """
    mode = "fused eager" if fused else "eager"
    weights = [cases.variables(problem[0], dtype, (f"{dtype}/0", f"{dtype}/1")) for dtype in dtypes]
    step = cases.apply_in(mode, optimizer, [w for pair in weights for w in pair])
    histories = [[] for _ in dtypes]
    for _ in range(3):
        grads = [tf.constant(g, dtype) for dtype in dtypes for g in problem[1]]
        if sparse:
            grads = [tf.IndexedSlices(tf.gather(g, [0, 2]), tf.constant([0, 2]), [3]) for g in grads]
        step(grads)
        for history, pair in zip(histories, weights, strict=True):
            history.append([w.numpy().astype(np.float64) for w in pair])
    return histories


@axes.pairwise(case=cases.CASES, fused=[False, True], sparse=[False, True])
def test_three_steps_of_every_type(case, fused, sparse):
    problem = SPARSE if sparse else DENSE
    actual = take_three_steps(case.cls(SMALL, **case.oracle_kwargs), problem, sparse, fused, TOLERANCE)
    expected = oracle.train(case.rule, problem[0], [problem[1]] * 3, [SMALL] * 3, **case.oracle_kwargs)
    for history, tolerance in zip(actual, TOLERANCE.values(), strict=True):
        assert cases.worst(history, expected) < tolerance


@axes.pairwise(cls=cases.CLASSES, mode=["graph", "fused graph"])
def test_a_mean_square_is_minimized(cls, mode):
    weights, target = tf.Variable([0.1, -0.2, -0.1]), tf.constant([0.4, 0.2, -0.5])
    optimizer = cls(0.02, **({} if cls is tav.QHAdam else {"weight_decay": 0.01}))
    optimizer.build([weights])

    def step():
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean((target - weights) ** 2)
        optimizer.apply(tape.gradient(loss, [weights]), [weights])

    step = cases.compiled(mode, optimizer, step)
    for _ in range(200):
        step()
    np.testing.assert_allclose(weights, target, rtol=1e-2, atol=1e-2)


def step_of_addons(w, g, t, slots, lr, decay, beta_1, beta_2, epsilon):
    """AdamW as Addons' NumPy rule has it: epsilon before v is bias-corrected, decay whatever the rate."""
    m = slots["m"] = beta_1 * slots.get("m", 0.0) + (1 - beta_1) * g
    v = slots["v"] = beta_2 * slots.get("v", 0.0) + (1 - beta_2) * g**2
    return w * (1 - decay) - lr * np.sqrt(1 - beta_2**t) / (1 - beta_1**t) * m / (np.sqrt(v) + epsilon)


@axes.pairwise(cls=[tav.AdamW, tav.QHAdamW], fused=[False, True], sparse=[False, True])
def test_decay_that_does_not_depend_on_the_rate(cls, fused, sparse):
    """The epsilons differ by less than 1e-8 / 0.01 / sqrt(1 - 0.999) of a step."""
    nus = {"nu_1": 1.0, "nu_2": 1.0} if cls is tav.QHAdamW else {}
    problem = SPARSE if sparse else DENSE
    oracle_kwargs = {"beta_1": 0.9, "beta_2": 0.999, "epsilon": 1e-8}
    optimizer = cls(1e-3, 0.01, weight_decay_mode="independent", **oracle_kwargs, **nus)
    (actual,) = take_three_steps(optimizer, problem, sparse, fused)
    weights, slots = list(problem[0]), [{}, {}]
    for t, step in enumerate(actual, 1):
        for i, w in enumerate(step):
            weights[i] = step_of_addons(weights[i], problem[1][i], t, slots[i], 1e-3, 0.01, **oracle_kwargs)
            np.testing.assert_allclose(w, weights[i], rtol=0, atol=1e-3 * 3.2e-5 * t)


# -- qhoptim


def fit_linear_regression(optimizer, mode, steps, sparse=False):
    """Weights and bias after each step of least squares, each with gradients at its own weights.

    Sparse: the weights are gathered in another order, and their gradient comes in slices.
    """
    rng = np.random.default_rng(0)
    weights = cases.variables([rng.normal(size=(4, 1)), np.zeros(1)], tf.float64, ("weight", "bias"))
    order, true = [2, 0, 3, 1], rng.normal(size=(4, 1))
    optimizer.build(weights)

    def step(x, y):
        with tf.GradientTape() as tape:
            used = tf.gather(weights[0], order) if sparse else weights[0]
            loss = tf.reduce_mean((x @ used + weights[1] - y) ** 2)
        grads = tape.gradient(loss, weights)
        assert isinstance(grads[0], tf.IndexedSlices) == sparse
        optimizer.apply(grads, weights)

    step = cases.compiled(mode, optimizer, step)
    history = []
    for x in rng.normal(size=(steps, 16, 4)):
        step(tf.constant(x), tf.constant(x @ true + rng.normal(size=(16, 1)) + 5))
        history.append([w.numpy() for w in weights])
    return history


def fit_by_hand(rule, steps, sparse=False, **oracle_kwargs):
    """The same in NumPy."""
    rng = np.random.default_rng(0)
    weights, slots = [rng.normal(size=(4, 1)), np.zeros(1)], [{}, {}]
    order, true = ([2, 0, 3, 1] if sparse else [0, 1, 2, 3]), rng.normal(size=(4, 1))
    decay, history = oracle_kwargs.pop("weight_decay", 0.0), []
    for t, x in enumerate(rng.normal(size=(steps, 16, 4)), 1):
        y = x @ true + rng.normal(size=(16, 1)) + 5
        error = 2 * (x @ weights[0][order] + weights[1] - y) / 16
        gradient = np.zeros((4, 1))
        gradient[order] = x.T @ error
        grads = [gradient, error.sum(axis=0)]
        weights = [
            rule(w, g, t, s, RATE, RATE * decay, **oracle_kwargs)
            for w, g, s in zip(weights, grads, slots, strict=True)
        ]
        history.append(weights)
    return history


RATE, ADAM = 2.0**-11, {"beta_1": 0.9, "beta_2": 0.999, "epsilon": 1e-8}  # qhoptim's is 3e-4


@pytest.mark.parametrize(("mode", "decay"), [("graph", 0.0), ("fused graph", 0.5e-4)])
def test_at_nu_1_they_are_adam_and_adamw(mode, decay):
    """1,024 steps of a regression, in which an error would grow."""
    if decay:
        optimizer = tav.QHAdamW(RATE, weight_decay=decay, nu_1=1.0, nu_2=1.0, **ADAM)
    else:
        optimizer = tav.QHAdam(RATE, nu_1=1.0, nu_2=1.0, **ADAM)
    actual = fit_linear_regression(optimizer, mode, 1024)
    assert cases.worst(actual, fit_by_hand(oracle.adamw, 1024, weight_decay=decay, **ADAM)) < 1e-9


@axes.pairwise(case=cases.CASES, mode=["graph", "fused eager"])
def test_gathered_weights_train_as_whole_ones(case, mode):
    oracle_kwargs = case.oracle_kwargs
    if case.cls is tav.LAMB:
        oracle_kwargs["weight_decay"] = 0.25
    actual = fit_linear_regression(case.cls(RATE, **oracle_kwargs), mode, 4, sparse=True)
    if case.cls is tav.LAMB:
        oracle_kwargs["weight_decay"] = 0.25 / RATE  # which `by_hand` multiplies by the rate
    assert cases.worst(actual, fit_by_hand(case.rule, 4, sparse=True, **oracle_kwargs)) < 1e-11


def test_l2_regularization_is_the_loss_s():
    """qhoptim's QHAdam adds weight_decay times the weights to the gradient; that is a term of the loss."""
    init, oracle_kwargs = np.array([[0.5], [-2.0]]), {"nu_1": 0.7, "nu_2": 0.9} | ADAM
    layer = keras.layers.Dense(1, use_bias=False, kernel_regularizer=keras.regularizers.L2(0.25 / 2))
    model = keras.Sequential([keras.Input((2,)), layer])
    model.compile(tav.QHAdam(RATE, **oracle_kwargs), "mse")
    layer.kernel.assign(init)
    x, y = np.array([[1.0, -0.5]]), np.array([[3.0]])
    weights, slots = init, {}
    for t in range(1, 5):
        model.train_on_batch(x, y)
        gradient = x.T @ (2 * (x @ weights - y)) + 0.25 * weights
        weights = oracle.qhadam(weights, gradient, t, slots, RATE, 0.0, **oracle_kwargs)
    np.testing.assert_allclose(layer.kernel.numpy(), weights, rtol=1e-6)
