"""A few hundred of the random cases of `make fuzz`, and proof that they can fail."""

import fuzz
import numpy as np
import pytest
import tensorflow as tf
from intervals import Ambiguous, Arithmetic, Interval

from tf_adam_variants.engines import coefficients, formula
from tf_adam_variants.optimizer import gradients


@pytest.mark.parametrize("first", range(0, 300, 150))
def test_engines(first):
    wrong = {number: fuzz.run(0, number, "engines") for number in range(first, first + 150)}
    assert not any(wrong.values()), {number: text for number, text in wrong.items() if text}


@pytest.mark.parametrize(
    ("way", "cases"),
    [
        ("eager", 40),
        ("fused eager", 40),
        ("graph", 5),
        ("fused graph", 5),
        pytest.param("xla", 5, marks=pytest.mark.slow),
    ],
)
def test_optimizers(way, cases):
    wrong = {number: fuzz.run(1, number, way) for number in range(cases)}
    assert not any(wrong.values()), {number: text for number, text in wrong.items() if text}


def test_most_elements_have_a_bound():
    fuzz.tally.clear()
    for number in range(40):
        fuzz.run(0, number, "engines")
    assert fuzz.tally["bounded"] > 0.9 * fuzz.tally["elements"]


# -- mistakes, made on purpose -------------------------------------------------------------------------------

moments, direction, decay_peak = formula.moments, formula.direction, coefficients._decay_peak


def last_value_wins(slices, rows, dtype):
    shape = [rows, *slices.values.shape[1:]]
    indices = tf.cast(slices.indices, tf.int64)[:, None]
    return tf.tensor_scatter_nd_update(tf.zeros(shape, dtype), indices, tf.cast(slices.values, dtype))


MISTAKES = {
    "v is 1e-5 too large in float32, 1e-12 in float64": (
        formula,
        "moments",
        lambda m, v, g, hp, c: (
            moments(m, v, g, hp, c)[0],
            moments(m, v, g, hp, c)[1] * (1 + (1e-5 if v.dtype == tf.float32 else 1e-12)),
        ),
    ),
    "epsilon inside the root": (
        formula,
        "direction",
        lambda m, v, g, hp, c: direction(m, v + c.epsilon**2, g, hp, c._replace(epsilon=0.0)),
    ),
    "the decay forgets the peak": (
        coefficients,
        "_decay_peak",
        lambda hp: 1.0 if hp.weight_decay_mode == "schedule" else decay_peak(hp),
    ),
    "the last of repeated indices wins": (gradients, "to_dense", last_value_wins),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_it_finds_mistakes(name, monkeypatch):
    module, function, mistaken = MISTAKES[name]
    monkeypatch.setattr(module, function, mistaken)
    monkeypatch.setattr(fuzz, "ENGINES", {"formula": formula})
    assert any(fuzz.run(2, number, "engines") for number in range(100))


# -- the intervals -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_intervals_hold_what_the_type_computes(dtype):
    rng = np.random.default_rng(0)
    a, b, c = ((10.0 ** rng.uniform(-6, 6, 2000) * rng.normal(size=2000)).astype(dtype) for _ in range(3))

    def compute(a, b, c):
        return np.sqrt(np.maximum(a * b, b) ** 2 + c) / (a - np.clip(c, -1.0, 1.0)) - np.minimum(b, c)

    arithmetic = Arithmetic.of(dtype)
    with np.errstate(all="ignore"):
        actual = compute(a, b, c)
        held = compute(*(Interval.of(x, arithmetic) for x in (a, b, c)))
        inside = held.holds(actual)
    assert np.all(inside)
    assert np.mean(held.finite()) > 0.5  # the root of a negative number has no bounds
    wrong = actual * dtype(1 + 1000 * arithmetic.unit)
    assert np.mean(held.holds(wrong)[held.finite()]) < 0.5


def test_intervals_of_what_has_no_answer():
    near = Interval.around(np.longdouble(0), np.longdouble(1e-9), Arithmetic.of(np.float32))
    with pytest.raises(Ambiguous):
        _ = near > 0
    assert not np.any((1 / near).finite())
    assert np.all((0 * Interval.of([1.0], near.arithmetic)).high == 0)
