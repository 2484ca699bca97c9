"""The coefficients of a step, by the fused kernels and by the other engines, against the oracle."""

import itertools

import cases
import numpy as np
import oracle
import pytest
import tensorflow as tf

import tf_adam_variants as tav
from tf_adam_variants.engines import fused
from tf_adam_variants.engines.coefficients import Coefficients, StepInputs
from tf_adam_variants.engines.hyperparameters import Hyperparameters
from tf_adam_variants.fused import _library

ITERATIONS = (0, 1, 2, 9, 999, 10**6, 2**40)
RATES = (np.float32(1e-3), 0.1, np.float32(2.0))
BETAS = ({}, {"beta_1": 0.0, "beta_2": 0.3}, {"beta_1": 0.5, "beta_2": 0.999})
MODES = ("learning_rate", "schedule", "independent")
PEAK = 0.1
SEED, SCALE = 0xFEDCBA98, 0.3
# expm1 is accurate to 1 unit in the last place, on GPUs too. It does not amplify the half units of the two
# roundings in its argument, log(beta) and its product with t; the square root halves the error. With four
# more roundings a coefficient is within 2 + 1 + 4 * 0.5. TensorFlow has tanh in place of expm1: with the
# same argument and two more roundings, the bias corrections are within 2.2 as measured, and 1.3 by expm1.
ULPS = 5 * 2.0**-52

CASES_AND_TERMS = [
    (case, terms)
    for case in cases.CASES
    for betas in BETAS
    for mode in (MODES if case.has_modes else MODES[:1])
    for terms in [case.oracle_kwargs | betas | ({"weight_decay_mode": mode} if case.has_modes else {})]
]


def hyperparameters_of(case, terms):
    peak = {"peak_learning_rate": PEAK} if terms.get("weight_decay_mode") == "schedule" else {}
    return Hyperparameters(**terms, **peak, trust_ratio=case.rule is oracle.lamb)


def inputs_of(iterations, rate, scale=None, seed=None):
    return StepInputs(
        tf.constant(iterations, tf.int64),
        tf.constant(rate, np.asarray(rate).dtype),
        None if scale is None else tf.constant(scale, tf.float64),
        None if seed is None else tf.constant(seed, tf.uint32),
    )


def by_fused(hp, inputs):
    return Coefficients(*fused.coefficients(hp, inputs).numpy())


def by_tensorflow(hp, inputs):
    return Coefficients(*(np.float64(x) for x in Coefficients.from_hyperparameters(hp, inputs)))


def formula(c, case, w, g, slots):
    """The update w loses, by the formula in the docstring of `Coefficients`."""
    g = c.gradient_scale * g
    m = c.m_scale * slots["m"] + c.m_weight * g - c.m_decay * slots["m"]
    v = c.v_scale * slots["v"] + c.v_weight * g**2 - c.v_decay * slots["v"]
    if case.terms.get("amsgrad"):
        v = np.maximum(v, slots["vhat"])
    root = np.sqrt(c.c_v * v + c.c_g2 * g**2)
    u = (c.c_m * m + c.c_g * g) / (root + c.epsilon) + c.weight_decay * w
    if case.rule is oracle.lamb:
        ratio = np.sqrt(np.sum(w**2)) / np.sqrt(np.sum(u**2))
        u = c.learning_rate * np.minimum(np.maximum(ratio, c.trust_ratio_min), c.trust_ratio_max) * u
    return u


def update_by_oracle(case, terms, w, g, slots, t, rate):
    """The same by the oracle, which computes in the type of its arguments: here long double."""
    terms = dict(terms)
    mode = terms.pop("weight_decay_mode", "independent")
    factor = {"learning_rate": rate, "schedule": rate / np.longdouble(np.float32(PEAK)), "independent": 1}[
        mode
    ]
    decay = terms.pop("weight_decay", 0.0) * factor
    exact = {k: np.longdouble(x) if isinstance(x, float) else x for k, x in terms.items()}
    return w - case.rule(w, g, t, dict(slots), rate, decay, **exact)


@pytest.mark.parametrize("compute", [by_fused, by_tensorflow])
def test_coefficients_give_the_step_of_the_oracle(compute):
    """In long double, so that only the coefficients are rounded."""
    rng = np.random.default_rng(0)
    positive = lambda: np.longdouble(rng.uniform(0.5, 2.0, 3))  # noqa: E731
    worst = 0.0
    for (case, terms), iterations, rate in itertools.product(CASES_AND_TERMS, ITERATIONS, RATES):
        slots = {"m": positive(), "v": positive(), "vhat": positive()}
        wide = np.longdouble(rate)
        w, g = wide * positive(), positive()  # no two terms cancel, and decay shows
        c = compute(hyperparameters_of(case, terms), inputs_of(iterations, rate, SCALE))
        have = formula(Coefficients(*map(np.longdouble, c)), case, w, g, slots)
        want = update_by_oracle(case, terms, w, np.longdouble(SCALE) * g, slots, iterations + 1, wide)
        error = np.max(np.abs(have - want) / np.abs(want))
        assert error <= ULPS, (case.name, terms, iterations, rate, float(error / 2.0**-52))
        worst = max(worst, error)
    assert worst > 0


def test_fused_and_tensorflow_agree():
    """Bit-exact where the iterations do not enter, and for rng_key."""
    errors = dict.fromkeys(Coefficients._fields, 0.0)
    for (case, terms), iterations, rate in itertools.product(CASES_AND_TERMS, ITERATIONS, RATES):
        inputs = inputs_of(iterations, rate, SCALE, SEED)
        c, other = (compute(hyperparameters_of(case, terms), inputs) for compute in (by_fused, by_tensorflow))
        for name, have, want in zip(Coefficients._fields, c, other, strict=True):
            error = 0.0 if have == want else abs(have - want) / abs(want)
            errors[name] = max(errors[name], error)
        assert c.rng_key == oracle.rounding_key(SEED, iterations % 2**32)
    of_iterations = ("c_m", "c_g", "c_v", "epsilon")
    assert max(errors[name] for name in of_iterations) <= ULPS
    assert {name for name, error in errors.items() if error} <= set(of_iterations)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_any_type_of_learning_rate(dtype):
    rate = tf.constant(0.1, dtype)
    c = by_fused(Hyperparameters(beta_1=0.9, beta_2=0.999, epsilon=1e-8), StepInputs(tf.constant(3), rate))
    assert c.learning_rate == float(rate)
    assert c.gradient_scale == 1
    assert c.rng_key == 0


def test_bias_corrections_do_not_cancel():
    """1 - beta is 2^-40: 1 - pow(beta, t) would have 12 digits less than t log(beta)."""
    beta = 1 - 2.0**-40
    hp = Hyperparameters(beta_1=beta, beta_2=0.0, epsilon=1.0)
    for compute in (by_fused, by_tensorflow):
        c = compute(hp, inputs_of(2, np.float64(1)))
        want = 3 * 2.0**-40 - 3 * 2.0**-80  # 1 - (1 - x)^3, without its last term
        assert abs(1 / c.c_m - want) <= ULPS * want


@pytest.mark.parametrize("compute", [by_fused, by_tensorflow])
@pytest.mark.parametrize("betas", [(0.5, 0.999), (0.9, 0.9999), (0.99, 0.99999), (0.7, 0.999999)])
def test_bias_corrections_up_to_ten_million_steps(compute, betas):
    hp = Hyperparameters(beta_1=betas[0], beta_2=betas[1], epsilon=1.0, nu_2=0.5)
    for t in (10 ** np.random.default_rng(0).uniform(0, 7, 50)).astype(int):
        c = compute(hp, inputs_of(t - 1, np.float64(1)))
        for beta, have in zip(betas, (1 / np.longdouble(c.c_m), 0.5 / np.longdouble(c.c_v)), strict=True):
            want = -np.expm1(t * np.log1p(np.longdouble(beta) - 1))
            assert abs(have - want) <= ULPS * want, (beta, t)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"iterations": tf.constant([1], tf.int64)}, "scalar|rank 0"),
        ({"learning_rate": tf.constant([0.1])}, "scalar|rank 0"),
        ({"gradient_scale": [tf.constant(1.0, tf.float64)] * 2}, "at most one gradient_scale"),
        ({"rounding_seed": [tf.constant(1, tf.uint32)] * 2}, "at most one gradient_scale and rounding_seed"),
        ({"static_coefficients": [0] * 5}, "21 static coefficients"),
    ],
)
@pytest.mark.parametrize("mode", ["eager", "graph"])
def test_the_op_checks_its_inputs(wrong, message, mode):
    right = {"iterations": tf.constant(1, tf.int64), "learning_rate": tf.constant(0.1)}
    right |= {"gradient_scale": [], "rounding_seed": [], "static_coefficients": [0] * 21}
    call = lambda: _library.load().tf_adam_variants_coefficients(**right | wrong)  # noqa: E731
    with pytest.raises((tf.errors.InvalidArgumentError, ValueError), match=message):
        (call if mode == "eager" else tf.function(call))()


@pytest.mark.parametrize("clipping", [{}, {"global_clipnorm": 1.0}])
def test_a_traced_step_has_few_nodes(clipping):
    """As many for 50 variables as for two: reads, the count, coefficients, the step, and clipping."""

    def nodes(count):
        weights = [tf.Variable(tf.ones(3)) for _ in range(count)]
        optimizer = tav.AdamW(fused=True, **clipping)
        optimizer.build(weights)
        step = tf.function(lambda grads: optimizer.apply(grads, weights))
        graph = step.get_concrete_function([tf.ones(3)] * count).graph.as_graph_def()
        nodes = [*graph.node, *(node for f in graph.library.function for node in f.node_def)]
        return [node.op for node in nodes if node.op != "Placeholder"]

    assert nodes(2).count("TfAdamVariants>Coefficients") == 1
    assert len(nodes(2)) == len(nodes(50)) <= (18 if clipping else 10)
