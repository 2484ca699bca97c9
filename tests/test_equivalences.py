"""What the papers say of one another: each optimizer is another one at some setting of its terms."""

import itertools

import cases
import keras
import numpy as np
import tensorflow as tf
from axes import MODES_XLA_SLOW

import tf_adam_variants as tav

# Numbers that float32 holds exactly: Keras's own Adam takes its betas through float32.
COMMON = {"beta_1": 0.875, "beta_2": 0.984375, "epsilon": 1e-4}
INITS, GRADS = cases.problem(8, seed=5)


def trajectory(optimizer, mode="graph", grads=GRADS):
    return cases.run(mode, optimizer, INITS, grads)


@MODES_XLA_SLOW
def test_qhadamw_with_nu_1_is_adamw(mode):
    qh = tav.QHAdamW(0.125, weight_decay=0.25, nu_1=1.0, nu_2=1.0, **COMMON)
    adamw = tav.AdamW(0.125, weight_decay=0.25, **COMMON)
    assert cases.worst(trajectory(qh, mode), trajectory(adamw, mode)) < 1e-14


def test_qhadam_with_nu_1_is_adam_with_epsilon_outside():
    """Keras's Adam with each step's epsilon scaled to stand where the paper has it."""
    qh = trajectory(tav.QHAdam(0.125, nu_1=1.0, nu_2=1.0, **COMMON), "eager")
    weights = cases.variables(INITS, tf.float64)
    adam = keras.optimizers.Adam(0.125, **COMMON)
    history = []
    for t, grads in enumerate(GRADS, 1):
        adam.epsilon = COMMON["epsilon"] * np.sqrt(1 - COMMON["beta_2"] ** t)
        adam.apply([tf.constant(g) for g in grads], weights)
        history.append([w.numpy() for w in weights])
    assert cases.worst(qh, history) < 1e-12


def test_lamb_without_adaptation_is_adamw():
    lamb = tav.LAMB(0.125, weight_decay=0.25, exclude_from_layer_adaptation=["."], **COMMON)
    adamw = tav.AdamW(0.125, weight_decay=0.25, **COMMON)
    assert cases.worst(trajectory(lamb), trajectory(adamw)) < 1e-14


def test_qhadam_without_momentum_is_rmsprop():
    """nu_1 = 0: the gradient over the root of its averaged square."""
    qh = tav.QHAdam(0.125, nu_1=0.0, nu_2=1.0, **COMMON)
    v, w, history = 0.0, INITS[0], []
    for t, grads in enumerate(GRADS, 1):
        v = 0.984375 * v + 0.015625 * grads[0] ** 2
        w = w - 0.125 * grads[0] / (np.sqrt(v / (1 - 0.984375**t)) + 1e-4)
        history.append([w])
    actual = [step[:1] for step in trajectory(qh)]
    assert cases.worst(actual, history) < 1e-13


def test_from_nadam():
    """Dozat's NAdam (without its momentum schedule): the same steps once its bias correction is over."""
    beta_1, beta_2, rate = 0.5, 0.75, 0.125
    grads = [[g] for g in np.random.default_rng(6).normal(size=(160, 4))]
    weights = cases.run(
        "graph",
        tav.QHAdam(**tav.converters.from_nadam(rate, beta_1, beta_2)._asdict()),
        [np.zeros(4)],
        grads,
        paths=["w"],
    )
    m, v, steps = 0.0, 0.0, []
    for t, (g,) in enumerate(grads, 1):
        m = beta_1 * m + (1 - beta_1) * g
        v = beta_2 * v + (1 - beta_2) * g**2
        m_bar = beta_1 * m / (1 - beta_1 ** (t + 1)) + (1 - beta_1) * g / (1 - beta_1**t)
        steps.append(rate * m_bar / (np.sqrt(v / (1 - beta_2**t)) + 1e-8))
    taken = [before[0] - after[0] for before, after in itertools.pairwise(weights)]
    np.testing.assert_allclose(taken[60:], steps[61:], rtol=1e-9, atol=1e-14)
    assert np.max(np.abs(taken[0] - steps[1])) > 1e-3  # the first steps do differ
