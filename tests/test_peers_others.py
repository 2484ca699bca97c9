"""What TensorFlow Addons', qhoptim's and PyTorch's tests ask of an optimizer.

docs/peers.md has the tables.
"""

import cases
import keras
import numpy as np
import oracle
import pytest
import tensorflow as tf
from test_peers_keras import CLASSES, FUSED

import tf_adam_variants as tav

ALL_CASES = pytest.mark.parametrize("case", cases.CASES, ids=lambda case: case.name)

# -- TensorFlow Addons: lamb_test, weight_decay_optimizers_test ----------------------------------------------

DENSE = ([np.array([1.0, 2.0]), np.array([3.0, 4.0])], [np.full(2, 0.1), np.full(2, 0.01)])
SPARSE = (
    [np.array([1.0, 1.0, 2.0]), np.array([3.0, 3.0, 4.0])],
    [np.array([0.1, 0.0, 0.1]), np.array([0.01, 0.0, 0.01])],
)
TOLERANCE = {"float64": 1e-12, "float32": 1e-6, "float16": 1e-3}  # the last two are those of Addons
SMALL = float(np.float32(1e-3))  # Addons' rate, as Keras keeps it


def three_steps(optimizer, problem, sparse=False, fused=False, dtypes=("float64",)):
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


@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
@FUSED
@ALL_CASES
def test_three_steps_of_every_type(case, fused, sparse):
    problem = SPARSE if sparse else DENSE
    have = three_steps(case.cls(SMALL, **case.told), problem, sparse, fused, TOLERANCE)
    want = oracle.train(case.rule, problem[0], [problem[1]] * 3, [SMALL] * 3, **case.told)
    for history, tolerance in zip(have, TOLERANCE.values(), strict=True):
        assert cases.worst(history, want) < tolerance


FALLING = keras.optimizers.schedules.InverseTimeDecay(SMALL, decay_steps=1, decay_rate=0.5)
RATES = {
    "tensor": (lambda: tf.constant(SMALL), [SMALL] * 3),
    "function": (lambda: lambda: SMALL, [SMALL] * 3),
    "inverse time decay": (lambda: FALLING, [SMALL, float(FALLING(1)), SMALL / 2]),
}


@pytest.mark.parametrize("rate", RATES)
@FUSED
@pytest.mark.parametrize("case", [case for case in cases.CASES if not case.terms], ids=lambda case: case.name)
def test_learning_rates_of_every_kind(case, fused, rate):
    made, rates = RATES[rate]
    assert rates == pytest.approx([1e-3] * 3 if "time" not in rate else [1e-3, 1e-3 / 1.5, 1e-3 / 2])
    (have,) = three_steps(case.cls(made(), **case.told), DENSE, fused=fused)
    want = oracle.train(case.rule, DENSE[0], [DENSE[1]] * 3, rates, **case.told)
    assert cases.worst(have, want) < 1e-12


@pytest.mark.parametrize("mode", ["graph", "fused graph"])
@CLASSES
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


def of_addons(w, g, t, slots, lr, decay, beta_1, beta_2, epsilon):
    """AdamW as Addons' NumPy rule has it: epsilon before v is bias-corrected, decay whatever the rate."""
    m = slots["m"] = beta_1 * slots.get("m", 0.0) + (1 - beta_1) * g
    v = slots["v"] = beta_2 * slots.get("v", 0.0) + (1 - beta_2) * g**2
    return w * (1 - decay) - lr * np.sqrt(1 - beta_2**t) / (1 - beta_1**t) * m / (np.sqrt(v) + epsilon)


@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
@FUSED
@pytest.mark.parametrize(
    ("cls", "nus"), [(tav.AdamW, {}), (tav.QHAdamW, {"nu_1": 1.0, "nu_2": 1.0})], ids=["AdamW", "QHAdamW"]
)
def test_decay_that_does_not_depend_on_the_rate(cls, nus, fused, sparse):
    """The epsilons differ by less than 1e-8 / 0.01 / sqrt(1 - 0.999) of a step."""
    problem = SPARSE if sparse else DENSE
    told = {"beta_1": 0.9, "beta_2": 0.999, "epsilon": 1e-8}
    optimizer = cls(1e-3, 0.01, weight_decay_mode="independent", **told, **nus)
    (have,) = three_steps(optimizer, problem, sparse, fused)
    weights, slots = list(problem[0]), [{}, {}]
    for t, step in enumerate(have, 1):
        for i, w in enumerate(step):
            weights[i] = of_addons(weights[i], problem[1][i], t, slots[i], 1e-3, 0.01, **told)
            np.testing.assert_allclose(w, weights[i], rtol=0, atol=1e-3 * 3.2e-5 * t)


@FUSED
@pytest.mark.parametrize("how", ["exact", "lazy"])
@CLASSES
def test_an_id_twice_is_the_gradient_twice(cls, how, fused):
    tables = [[tf.Variable([[1.0], [2.0]], dtype=dtype) for dtype in TOLERANCE] for _ in range(2)]
    optimizers = [cls(1e-3, sparse_update=how, fused=fused) for _ in range(2)]
    once, twice = ([1], [[0.2]]), ([1, 1], [[0.1], [0.1]])
    for _ in range(4):
        for optimizer, weights, (ids, values) in zip(optimizers, tables, (once, twice), strict=True):
            grads = [
                tf.IndexedSlices(tf.constant(values, dtype), tf.constant(ids), [2, 1]) for dtype in TOLERANCE
            ]
            optimizer.apply(grads, weights)
        for one, other in zip(*tables, strict=True):
            np.testing.assert_allclose(other, one, rtol=1e-15 if one.dtype == "float64" else 1e-7)


@pytest.mark.parametrize("name", ["beta_1", "beta_2", "epsilon", "weight_decay"])
def test_hyperparameters_are_no_functions_but_can_be_set(name):
    """Addons' are functions that every step asks. Here an attribute is set; the rate may be a function."""
    optimizer = tav.AdamW()
    for wrong in (lambda: 0.5, FALLING):
        with pytest.raises(ValueError, match=f"`{name}` must be"):
            tav.AdamW(**{name: wrong})
    setattr(optimizer, name, 0.5)
    assert optimizer.get_config()[name] == 0.5


@pytest.mark.parametrize(
    ("old", "meant"), [({"weight_decay_rate": 0.01}, "weight_decay"), ({"decay": 0.5}, "weight_decay")]
)
def test_arguments_of_old_are_errors(old, meant):
    with pytest.raises(ValueError, match=f"Argument not recognized.*Did you mean `{meant}`"):
        tav.LAMB(0.01, **old)


def test_variables_to_decay_are_those_that_no_pattern_excludes():
    """Addons' `apply_gradients` takes a list of them in every step."""
    weights = cases.variables(DENSE[0], tf.float64, ("var0", "var1"))
    optimizer = tav.AdamW(1.0, weight_decay=0.125, exclude_from_weight_decay=["^(?!var0$)"])
    with pytest.raises(TypeError, match="decay_var_list"):
        optimizer.apply_gradients(zip(DENSE[1], weights, strict=True), decay_var_list=weights[:1])
    optimizer.apply([tf.zeros(2, tf.float64)] * 2, weights)
    np.testing.assert_array_equal(weights[0], 0.875 * DENSE[0][0])
    np.testing.assert_array_equal(weights[1], DENSE[0][1])


# -- qhoptim -------------------------------------------------------------------------------------------------


def linear_regression(optimizer, mode, steps, sparse=False):
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


def by_hand(rule, steps, sparse=False, **told):
    """The same in NumPy."""
    rng = np.random.default_rng(0)
    weights, slots = [rng.normal(size=(4, 1)), np.zeros(1)], [{}, {}]
    order, true = ([2, 0, 3, 1] if sparse else [0, 1, 2, 3]), rng.normal(size=(4, 1))
    decay, history = told.pop("weight_decay", 0.0), []
    for t, x in enumerate(rng.normal(size=(steps, 16, 4)), 1):
        y = x @ true + rng.normal(size=(16, 1)) + 5
        error = 2 * (x @ weights[0][order] + weights[1] - y) / 16
        gradient = np.zeros((4, 1))
        gradient[order] = x.T @ error
        grads = [gradient, error.sum(axis=0)]
        weights = [
            rule(w, g, t, s, RATE, RATE * decay, **told)
            for w, g, s in zip(weights, grads, slots, strict=True)
        ]
        history.append(weights)
    return history


RATE, ADAM = 2.0**-11, {"beta_1": 0.9, "beta_2": 0.999, "epsilon": 1e-8}  # qhoptim's is 3e-4


@pytest.mark.parametrize("mode", ["graph", "fused graph"])
@pytest.mark.parametrize("decay", [0.0, 0.5e-4])
def test_at_nu_1_they_are_adam_and_adamw(mode, decay):
    """1,024 steps of a regression, in which an error would grow."""
    if decay:
        optimizer = tav.QHAdamW(RATE, weight_decay=decay, nu_1=1.0, nu_2=1.0, **ADAM)
    else:
        optimizer = tav.QHAdam(RATE, nu_1=1.0, nu_2=1.0, **ADAM)
    have = linear_regression(optimizer, mode, 1024)
    assert cases.worst(have, by_hand(oracle.adamw, 1024, weight_decay=decay, **ADAM)) < 1e-9


@pytest.mark.parametrize("mode", ["graph", "fused eager"])
@ALL_CASES
def test_gathered_weights_train_as_whole_ones(case, mode):
    told = dict(case.told)
    if case.cls is tav.LAMB:
        told["weight_decay"] = 0.25
    have = linear_regression(case.cls(RATE, **told), mode, 4, sparse=True)
    if case.cls is tav.LAMB:
        told["weight_decay"] = 0.25 / RATE  # which `by_hand` multiplies by the rate
    assert cases.worst(have, by_hand(case.rule, 4, sparse=True, **told)) < 1e-11


def test_l2_regularization_is_the_loss_s():
    """qhoptim's QHAdam adds weight_decay times the weights to the gradient; that is a term of the loss."""
    init, told = np.array([[0.5], [-2.0]]), {"nu_1": 0.7, "nu_2": 0.9} | ADAM
    layer = keras.layers.Dense(1, use_bias=False, kernel_regularizer=keras.regularizers.L2(0.25 / 2))
    model = keras.Sequential([keras.Input((2,)), layer])
    model.compile(tav.QHAdam(RATE, **told), "mse")
    layer.kernel.assign(init)
    x, y = np.array([[1.0, -0.5]]), np.array([[3.0]])
    weights, slots = init, {}
    for t in range(1, 5):
        model.train_on_batch(x, y)
        gradient = x.T @ (2 * (x @ weights - y)) + 0.25 * weights
        weights = oracle.qhadam(weights, gradient, t, slots, RATE, 0.0, **told)
    np.testing.assert_allclose(layer.kernel.numpy(), weights, rtol=1e-6)


# -- PyTorch: the inputs that are errors ---------------------------------------------------------------------


@CLASSES
def test_a_rate_of_two_elements_is_an_error(cls):
    with pytest.raises(
        ValueError, match=r"`learning_rate` must be a finite number.*\[0.001 0.001\]|0.001, 0.001"
    ):
        cls(tf.constant([0.001, 0.001]))


@CLASSES
def test_betas_are_floats(cls):
    """PyTorch takes two floats or two tensors; no step here would follow a tensor that changes."""
    for wrong in ({"beta_1": 0.9, "beta_2": tf.constant(0.99)}, {"beta_1": tf.constant(0.9), "beta_2": 0.99}):
        with pytest.raises(ValueError, match=r"must be in \[0, 1\)"):
            cls(**wrong)
    with pytest.raises(ValueError, match=r"`beta_1` must be in \[0, 1\). Received: beta_1=1.0"):
        cls(beta_1=1.0, beta_2=0.0)


@CLASSES
def test_what_pytorch_takes_and_these_do_not(cls):
    for name, value in {
        "foreach": True,
        "differentiable": True,
        "capturable": True,
        "momentum_decay": -0.2,
    }.items():
        with pytest.raises(ValueError, match=f"Argument not recognized: {name}={value}"):
            cls(**{name: value})


@CLASSES
def test_a_variable_twice_is_an_error(cls):
    weights = tf.Variable([1.0, 2.0], name="w")
    for action in (
        lambda: cls().build([weights, weights]),
        lambda: cls().apply([tf.ones(2)] * 2, [weights, weights]),
    ):
        with pytest.raises(ValueError, match="given a variable more than once: w, w"):
            action()
    np.testing.assert_array_equal(weights, [1.0, 2.0])


@pytest.mark.parametrize("made", [tf.Variable, keras.Variable])
@CLASSES
def test_a_variable_in_place_of_a_list_is_an_error(cls, made):
    weights = made([1.0, 2.0], name="w")
    for action in (lambda: cls().build(weights), lambda: cls().apply([tf.ones(2)], weights)):
        with pytest.raises(ValueError, match=r"needs a list of variables\. Received: the variable w alone"):
            action()
    np.testing.assert_array_equal(weights.numpy(), [1.0, 2.0])
