"""The converters and the warm-up."""

import keras
import numpy as np
import pytest

from tf_adam_variants import converters, schedules

GRADS = np.random.default_rng(0).normal(size=12)


def qhm(parameters, gradient, steps, start=0.0, before=0.0):
    """Weights under quasi-hyperbolic momentum; `gradient` is a function of weight and step."""
    w, m, history = start, before, []
    for t in range(steps):
        g = gradient(w, t)
        m = parameters.beta * m + (1 - parameters.beta) * g
        w = w - parameters.learning_rate * ((1 - parameters.nu) * g + parameters.nu * m)
        history.append(w)
    return np.array(history)


def test_nesterov_momentum():
    """Keras's SGD(nesterov=True) on given gradients."""
    weights = keras.Variable(0.0)
    sgd = keras.optimizers.SGD(0.125, momentum=0.75, nesterov=True)
    want = []
    for g in GRADS:
        sgd.apply([keras.ops.convert_to_tensor(g, "float32")], [weights])
        want.append(float(weights))
    have = qhm(converters.from_nesterov(0.125, 0.75), lambda w, t: GRADS[t], len(GRADS))
    np.testing.assert_allclose(have, want, rtol=1e-5)


def test_pid_is_qhm():
    """The controller's output is the sum of its three terms, with differences averaged by beta."""
    parameters = converters.QHMParameters(0.5, beta=0.75, nu=0.625)
    gains = converters.to_pid(*parameters)
    assert converters.from_pid(*gains) == pytest.approx(parameters, rel=1e-14)
    total, before, difference, want = 0.0, 0.0, 0.0, []
    for g in GRADS:
        total += g
        difference = 0.75 * difference + 0.25 * (g - before)
        before = g
        want.append(-(gains.k_p * g + gains.k_i * total + gains.k_d * difference))
    np.testing.assert_allclose(qhm(parameters, lambda w, t: GRADS[t], len(GRADS)), want, rtol=1e-12)


def slope(w, t=0):
    """Of a function that is not quadratic."""
    return np.tanh(w) + 0.5 * w


def synthesized_nesterov(rate, beta_1, beta_2, steps):
    x, before, points = 1.0, 1.0, []
    for _ in range(steps):
        x, before = x - rate * slope(x + beta_2 * (x - before)) + beta_1 * (x - before), x
        points.append(x + beta_2 * (x - before))
    return points


def test_synthesized_nesterov():
    have = qhm(converters.from_synthesized_nesterov(0.25, 0.625, 0.375), slope, 20, start=1.0)
    np.testing.assert_allclose(have, synthesized_nesterov(0.25, 0.625, 0.375, 20), rtol=1e-10)


@pytest.mark.parametrize("rho", [None, 0.75])
def test_robust_momentum(rho):
    """Cyrus et al., 2018, equations 3 and 4."""
    smoothness, kappa, r = 1.5, 9.0, rho or 2 / 3
    alpha = kappa * (1 - r) ** 2 * (1 + r) / smoothness
    beta = kappa * r**3 / (kappa - 1)
    gamma = r**3 / ((kappa - 1) * (1 - r) ** 2 * (1 + r))
    have = qhm(converters.from_robust_momentum(smoothness, kappa, rho), slope, 20, start=1.0)
    np.testing.assert_allclose(have, synthesized_nesterov(alpha, beta, gamma, 20), rtol=1e-9)


def test_accsgd():
    """Kidambi et al., 2018, algorithm 3."""
    delta, kappa, xi, eps = 0.125, 64.0, 4.0, 0.7
    long_step = delta * kappa / eps
    alpha = 1 - eps**2 * xi / kappa
    mix = eps / (eps + 1 - alpha)
    w, average, want = 1.0, 1.0, []
    for _ in range(30):
        g = slope(w)
        average = alpha * average + (1 - alpha) * (w - long_step * g)
        w = mix * (w - delta * g) + (1 - mix) * average
        want.append(w)
    have = qhm(converters.from_accsgd(delta, kappa, xi), slope, 30, start=1.0)
    np.testing.assert_allclose(have, want, rtol=1e-9)


def test_warm_up_of_goyal_et_al():
    """Reference rate 0.1 for 256 images, batches of 8,192: to 3.2 in 5 epochs, a tenth from 30 on."""
    per_epoch = 156
    steps = keras.optimizers.schedules.PiecewiseConstantDecay(
        [30 * per_epoch - 1, 60 * per_epoch - 1, 80 * per_epoch - 1], [3.2, 0.32, 0.032, 0.0032]
    )
    schedule = schedules.LinearWarmup(steps, 5 * per_epoch, initial_learning_rate=0.1)
    rate = [float(schedule(step)) for step in range(0, 90 * per_epoch, 26)]
    epoch = np.arange(len(rate)) / 6
    increments = np.diff(np.array(rate)[epoch <= 5])
    np.testing.assert_allclose(increments, 3.1 / 30, rtol=1e-4)
    want = np.select([epoch < 30, epoch < 60, epoch < 80], [3.2, 0.32, 0.032], 0.0032)
    np.testing.assert_allclose(np.array(rate)[epoch >= 5], want[epoch >= 5], rtol=1e-6)
    assert rate[0] == pytest.approx(0.1)


def test_a_shifted_schedule_begins_after_the_warm_up():
    cosine = keras.optimizers.schedules.CosineDecay(0.5, 10)
    schedule = schedules.LinearWarmup(cosine, 4, shift_schedule=True)
    twin = keras.optimizers.schedules.CosineDecay(0.0, 10, warmup_target=0.5, warmup_steps=4)
    for step in range(16):
        assert float(schedule(step)) == pytest.approx(float(twin(step)), rel=1e-6, abs=1e-9)


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("schedule", -1.0),
        ("schedule", None),
        ("schedule", "cosine"),
        ("warmup_steps", 0),
        ("warmup_steps", 1.5),
        ("warmup_steps", -3),
        ("initial_learning_rate", -0.1),
        ("initial_learning_rate", float("nan")),
        ("shift_schedule", 1),
    ],
)
def test_wrong_warm_ups(argument, value):
    with pytest.raises(ValueError, match=argument) as error:
        schedules.LinearWarmup(**({"schedule": 0.1, "warmup_steps": 10} | {argument: value}))
    assert repr(value) in str(error.value)


def test_a_model_trains_with_a_warm_up():
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)])
    optimizer = keras.optimizers.get(
        {
            "class_name": "qhadam",
            "config": {"learning_rate": keras.optimizers.schedules.serialize(schedules.LinearWarmup(0.5, 8))},
        }
    )
    model.compile(optimizer, "mse")
    x = np.random.default_rng(0).normal(size=(64, 3))
    model.fit(x, x.sum(axis=1), batch_size=16, epochs=2, verbose=0)
    assert float(optimizer.learning_rate) == 0.5
