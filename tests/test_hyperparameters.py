"""Hyperparameters as attributes, and new variants."""

import dataclasses
import math

import axes
import cases
import numpy as np
import oracle
import pytest
import tensorflow as tf

import tf_adam_variants as tav
from tf_adam_variants.engines import formula, fused, resource_apply
from tf_adam_variants.engines.hyperparameters import Hyperparameters
from tf_adam_variants.engines.variable_state import GroupSpec
from tf_adam_variants.optimizer.base import AdamVariant
from tf_adam_variants.optimizer.variant import variant

DECAYING = (tav.AdamW, tav.QHAdamW, tav.LAMB)
CHANGES = [
    (cases.CLASSES, "beta_1", 0.5),
    (cases.CLASSES, "epsilon", 0),
    (cases.CLASSES, "learning_rate", np.float32(0.5)),
    (cases.CLASSES, "clipnorm", 2),
    (cases.CLASSES, "sparse_update", "lazy"),
    (cases.CLASSES, "fused", False),
    ((tav.QHAdam, tav.QHAdamW), "nu_2", 0.5),
    (DECAYING, "weight_decay", None),
    ((tav.AdamW, tav.QHAdamW), "weight_decay_mode", "independent"),
    ((tav.LAMB,), "trust_ratio_max", 3),
]


@pytest.mark.parametrize(("classes", "name", "value"), CHANGES, ids=[row[1] for row in CHANGES])
def test_a_right_value_set_later_is_in_the_configuration_and_in_the_step(classes, name, value):
    for cls in classes:
        optimizer, twin = cls(), cls(**{name: value})
        setattr(optimizer, name, value)
        assert getattr(optimizer, name) == value
        assert optimizer.get_config() == twin.get_config()
        inits, grads = cases.problem(2)
        actual, expected = (cases.run("eager", one, inits, grads) for one in (optimizer, twin))
        assert cases.worst(actual, expected) == 0


def test_the_mode_set_later_finds_its_peak():
    optimizer = tav.AdamW(0.25)
    optimizer.weight_decay_mode = "schedule"
    assert optimizer.peak_learning_rate == 0.25
    optimizer.weight_decay_mode = "independent"
    assert optimizer.peak_learning_rate is None
    optimizer = tav.AdamW(lambda: 0.5)
    with pytest.raises(ValueError, match="peak_learning_rate"):
        optimizer.weight_decay_mode = "schedule"
    assert optimizer.weight_decay_mode == "learning_rate"


def test_what_a_variant_has_not_cannot_be_set():
    for cls, name in ((tav.QHAdam, "weight_decay"), (tav.AdamW, "nu_1"), (tav.LAMB, "weight_decay_mode")):
        with pytest.raises(ValueError, match=f"{cls.__name__} has no `{name}`"):
            setattr(cls(), name, 0.5)
    assert tav.QHAdam().weight_decay is None
    with pytest.raises(AttributeError, match="beta_3"):
        _ = tav.AdamW().beta_3


@pytest.mark.parametrize(
    ("name", "value"), [("amsgrad", True), ("use_ema", True), ("gradient_accumulation_steps", 2)]
)
def test_slots_are_fixed_once_built(name, value):
    optimizer = tav.AdamW()
    setattr(optimizer, name, value)
    assert getattr(optimizer, name) == value
    optimizer = tav.AdamW()
    optimizer.build([tf.Variable([1.0])])
    with pytest.raises(ValueError, match=f"`{name}` decides which slots"):
        setattr(optimizer, name, value)


@axes.pairwise(cls=DECAYING, mode=cases.MODES)
def test_no_weight_decay(cls, mode):
    """None is none, as in Keras, and comes back as None."""
    inits, grads = cases.problem(3)
    actual, expected = (
        cases.run(mode, cls(0.125, weight_decay=decay), inits, grads) for decay in (None, 0.0)
    )
    assert cases.worst(actual, expected) == 0
    assert cls.from_config(cls(weight_decay=None).get_config()).weight_decay is None


@variant
class Nadamw(AdamVariant):
    """A variant of known terms: NAdam's direction with a trust ratio.

    Args:
        {{learning_rate}}
        {{beta_1}}
        {{common}}
    """

    def __init__(self, learning_rate=1e-3, beta_1=0.9, weight_decay=0.25, **common):
        hyperparameters = Hyperparameters(
            beta_1=beta_1, beta_2=0.99, epsilon=1e-6, nu_1=beta_1, weight_decay=weight_decay, trust_ratio=True
        )
        super().__init__(hyperparameters, learning_rate, **common)


@pytest.mark.parametrize("mode", ["eager", "xla"])
def test_a_variant_is_a_declaration(mode):
    inits, grads = cases.problem(4)
    actual = cases.run(mode, Nadamw(0.125), inits, grads)
    for i, w in enumerate(inits):
        m = v = 0.0
        for t, g in enumerate(grads, 1):
            m, v = 0.9 * m + 0.1 * g[i], 0.99 * v + 0.01 * g[i] ** 2
            d = (0.1 * g[i] + 0.9 * m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.99**t)) + 1e-6)
            u = d + 0.25 * w
            w = w - 0.125 * math.sqrt(np.sum(w**2) / np.sum(u**2)) * u
            np.testing.assert_allclose(actual[t - 1][i], w, rtol=1e-11)
    assert "beta_1: float in [0, 1)" in Nadamw.__doc__
    assert "fused: whether" in Nadamw.__doc__
    assert Nadamw.from_config(Nadamw(beta_1=0.5).get_config()).beta_1 == 0.5
    assert Nadamw().name == "nadamw"


def test_a_step_that_the_fused_kernels_do_not_have_continues_without_them():
    """ "auto" goes by the formula, True says why not."""
    weights = tf.Variable([1.0, 2.0])
    Nadamw().apply([tf.ones(2)], [weights])
    assert np.all(weights.numpy() < [1.0, 2.0])
    with pytest.raises(ValueError, match=r"fused=True.*trust ratio"):
        Nadamw(fused=True).apply([tf.ones(2)], [weights])


def test_an_engine_without_a_term_gives_it_as_the_reason():
    """An engine does not step with hyperparameters that it does not list."""
    plain = Hyperparameters(beta_1=0.9, beta_2=0.999, epsilon=1e-8)
    assert plain.terms == frozenset()
    group = GroupSpec(tf.float32, False, frozenset({("/job:localhost/device:CPU:0",)}))
    for engine in (fused, resource_apply):
        assert not engine.unsupported_reason(plain, group)
        for field in dataclasses.fields(Hyperparameters)[3:]:
            other = {"weight_decay_mode": "independent", "peak_learning_rate": 0.5}.get(field.name)
            value = other or (not field.default if isinstance(field.default, bool) else 0.5)
            mode = {"weight_decay_mode": "schedule"} if field.name == "peak_learning_rate" else {}
            hyperparameters = dataclasses.replace(plain, **{field.name: value}, **mode)
            assert field.name in hyperparameters.terms
            reason = engine.unsupported_reason(hyperparameters, group) or ""
            assert (field.name in reason) == (field.name not in engine.TERMS), reason
    assert formula.unsupported_reason(dataclasses.replace(plain, amsgrad=True), group) is None


def test_a_subclass_of_a_variant():
    """With another constructor, it keeps the configuration of the variant."""

    class Mine(tav.AdamW):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)

    optimizer = Mine(0.5, beta_1=0.25, fused=False)
    assert optimizer.get_config()["beta_1"] == 0.25
    assert Mine.from_config(optimizer.get_config()).get_config() == optimizer.get_config()
    inits, grads = cases.problem(3)
    actual = cases.run("graph", Mine(0.125), inits, grads)
    expected = oracle.train(
        oracle.adamw, inits, grads, [0.125] * 3, weight_decay=0.004, beta_1=0.9, beta_2=0.999, epsilon=1e-8
    )
    assert cases.worst(actual, expected) < 1e-12
