"""Hyperparameters as attributes, what a wrong one is told, patterns that match nothing, and new variants."""

import dataclasses
import inspect
import math
import warnings

import cases
import keras
import numpy as np
import oracle
import pytest
import tensorflow as tf
import test_bad_input
import yaml

import tf_adam_variants as tav
from tf_adam_variants.engines import formula, fused, resource_apply
from tf_adam_variants.engines.hyperparameters import Hyperparameters
from tf_adam_variants.engines.variable_state import GroupSpec
from tf_adam_variants.optimizer.base import AdamVariant
from tf_adam_variants.optimizer.variant import variant

NAN = float("nan")
ALL = (tav.AdamW, tav.QHAdam, tav.QHAdamW, tav.LAMB)
DECAYING = (tav.AdamW, tav.QHAdamW, tav.LAMB)
DECOUPLED = (tav.AdamW, tav.QHAdamW)
QUASI_HYPERBOLIC = (tav.QHAdam, tav.QHAdamW)

# The wrong values of the constructor's test, for arguments that are attributes of the class.
ROWS = [
    (cls, name, value)
    for cls, name, value, _ in test_bad_input.ROWS
    if name in inspect.signature(cls).parameters and not name.startswith("exclude")
]


@pytest.mark.parametrize("built", [False, True])
@pytest.mark.parametrize(("cls", "name", "value"), ROWS, ids=repr)
def test_a_wrong_value_set_later_is_the_constructor_s_error(cls, name, value, built):
    optimizer = cls()
    if built:
        optimizer.build([tf.Variable([1.0])])
    before = optimizer.get_config()
    with pytest.raises(ValueError, match=name) as set_later:
        setattr(optimizer, name, value)
    with pytest.raises(ValueError, match=name) as constructed:
        cls(**{name: value})
    assert str(set_later.value) == str(constructed.value)
    assert optimizer.get_config() == before


RIGHT = [
    (ALL, "beta_1", 0.5),
    (ALL, "epsilon", 0),
    (ALL, "learning_rate", np.float32(0.5)),
    (ALL, "clipnorm", 2),
    (ALL, "sparse_update", "lazy"),
    (ALL, "fused", False),
    (QUASI_HYPERBOLIC, "nu_2", 0.5),
    (DECAYING, "weight_decay", None),
    (DECOUPLED, "weight_decay_mode", "independent"),
    ((tav.LAMB,), "trust_ratio_max", 3),
]


@pytest.mark.parametrize(
    ("cls", "name", "value"), [(cls, name, value) for all_, name, value in RIGHT for cls in all_], ids=repr
)
def test_a_right_value_set_later_is_in_the_configuration_and_in_the_step(cls, name, value):
    optimizer, twin = cls(), cls(**{name: value})
    setattr(optimizer, name, value)
    assert getattr(optimizer, name) == value
    assert optimizer.get_config() == twin.get_config()
    inits, grads = cases.problem(2)
    have, want = (cases.run("eager", one, inits, grads) for one in (optimizer, twin))
    assert cases.worst(have, want) == 0


def test_a_tensor_is_a_learning_rate_too():
    optimizer = tav.AdamW()
    optimizer.learning_rate = tf.constant(0.25)
    assert float(optimizer.learning_rate) == 0.25
    optimizer.learning_rate = tav.AdamW(0.5).learning_rate
    assert float(optimizer.learning_rate) == 0.5
    with pytest.raises(ValueError, match="learning_rate"):
        optimizer.learning_rate = tf.constant(NAN)

    @tf.function
    def set_in_a_graph(value):
        optimizer.learning_rate = value

    set_in_a_graph(tf.constant(0.125))
    assert float(optimizer.learning_rate) == 0.125


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


@pytest.mark.parametrize("name", ["exclude_from_weight_decay", "exclude_from_layer_adaptation"])
def test_lists_of_exclusions_are_the_constructor_s(name):
    with pytest.raises(ValueError, match=f"`{name}` is an argument of the constructor"):
        setattr(tav.LAMB(), name, ["bias"])


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


def test_two_clippings_one_after_the_other():
    optimizer = tav.QHAdam(clipnorm=1.0)
    with pytest.raises(ValueError, match=r"Only one of.*clipnorm=1.0, clipvalue=2.0"):
        optimizer.clipvalue = 2.0
    optimizer.clipnorm = None
    optimizer.clipvalue = 2.0


@pytest.mark.parametrize("mode", cases.MODES)
@pytest.mark.parametrize("cls", DECAYING)
def test_no_weight_decay(cls, mode):
    """None is none, as in Keras, and comes back as None."""
    inits, grads = cases.problem(3)
    have, want = (cases.run(mode, cls(0.125, weight_decay=decay), inits, grads) for decay in (None, 0.0))
    assert cases.worst(have, want) == 0
    assert cls.from_config(cls(weight_decay=None).get_config()).weight_decay is None


TEXTS = [("1e-3", "1.0e-3"), ("2E5", "2.0e+5"), ("1.5e3", "1.5e+3"), ("-1e-3", "-1.0e-3")]


@pytest.mark.parametrize(("text", "number"), TEXTS)
@pytest.mark.parametrize("name", ["learning_rate", "weight_decay", "epsilon", "beta_1", "clipnorm"])
def test_a_number_that_yaml_reads_as_text(name, text, number):
    assert yaml.safe_load(text) == text
    assert yaml.safe_load(number) == float(text)
    with pytest.raises(ValueError, match=rf"`{name}`.*Write {number.replace('+', '.')}$"):
        tav.AdamW(**yaml.safe_load(f"{name}: {text}"))


def test_a_number_in_quotes():
    with pytest.raises(ValueError, match=r"beta_1='0.9', which is text: write it without quotes"):
        tav.AdamW(beta_1="0.9")
    with pytest.raises(ValueError, match=r"learning_rate='fast'$"):
        tav.AdamW("fast")


def test_a_schedule_s_class():
    with pytest.raises(ValueError, match=r"learning_rate.*an instance, not a class: CosineDecay\(\.\.\.\)"):
        tav.AdamW(keras.optimizers.schedules.CosineDecay)
    with pytest.raises(ValueError, match=r"schedule.*an instance, not a class"):
        tav.schedules.LinearWarmup(keras.optimizers.schedules.CosineDecay, 5)
    optimizer = tav.AdamW()
    with pytest.raises(ValueError, match="not a class"):
        optimizer.learning_rate = keras.optimizers.schedules.CosineDecay


@pytest.mark.parametrize(
    ("wrong", "meant"),
    [
        ("lr", "learning_rate"),
        ("wd", "weight_decay"),
        ("eps", "epsilon"),
        ("beta1", "beta_1"),
        ("fuse", "fused"),
    ],
)
def test_an_unknown_argument(wrong, meant):
    with pytest.raises(ValueError, match="Argument not recognized") as error:
        tav.LAMB(**{wrong: 3})
    message = str(error.value)
    assert f"{wrong}=3. Did you mean `{meant}`?" in message
    assert message.index("trust_ratio_max") < message.index("sparse_update") < message.index("clipnorm")


def test_an_empty_name():
    with pytest.raises(ValueError, match=r"`name` must be a string that is not empty. Received: name=''"):
        tav.AdamW(name="")


def matching(optimizer):
    """The warnings that building it on a model gives."""
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2, name="head")])
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        optimizer.apply([tf.zeros(w.shape) for w in model.trainable_variables], model.trainable_variables)
        optimizer.apply([tf.zeros(w.shape) for w in model.trainable_variables], model.trainable_variables)
        optimizer.build(model.trainable_variables)
    return [(str(w.message), w.filename) for w in found if "pattern" in str(w.message)]


@pytest.mark.parametrize("cls", ALL)
def test_a_pattern_that_matches_nothing_warns_once(cls):
    ((message, file),) = matching(cls(exclude_from_weight_decay=["bais", "kernel"]))
    assert "`exclude_from_weight_decay`: the pattern 'bais' matches no variable" in message
    assert "sequential/head/kernel, sequential/head/bias" in message
    assert file == __file__
    assert not matching(cls(exclude_from_weight_decay=["bias", "kernel"]))


def test_the_patterns_of_layers_and_of_the_method_are_warned_of():
    optimizer = tav.LAMB(exclude_from_layer_adaptation=["haed", "bias"], exclude_from_weight_decay=["bias"])
    optimizer.exclude_from_weight_decay(var_names=["gamma", "beta"])
    first, second = (message for message, _ in matching(optimizer))
    assert "`exclude_from_weight_decay`: the patterns 'gamma', 'beta' match no variable" in first
    assert "`exclude_from_layer_adaptation`: the pattern 'haed' matches no variable" in second


def test_a_pattern_is_warned_of_in_fit():
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)])
    model.compile(tav.QHAdamW(exclude_from_weight_decay=["norm"]), "mse")
    with pytest.warns(UserWarning, match="the pattern 'norm' matches no variable"):
        model.fit(np.ones((4, 3)), np.ones(4), verbose=0)


@variant
class Nadamw(AdamVariant):
    """A variant of known terms: NAdam's direction with a trust ratio.

    Args:
        {{learning_rate}}
        {{beta_1}}
        {{common}}
    """

    def __init__(self, learning_rate=1e-3, beta_1=0.9, weight_decay=0.25, **common):
        update = Hyperparameters(
            beta_1=beta_1, beta_2=0.99, epsilon=1e-6, nu_1=beta_1, weight_decay=weight_decay, trust_ratio=True
        )
        super().__init__(update, learning_rate, **common)


@pytest.mark.parametrize("mode", [mode for mode in cases.MODES if "fused" not in mode])
def test_a_variant_is_a_declaration(mode):
    inits, grads = cases.problem(4)
    have = cases.run(mode, Nadamw(0.125), inits, grads)
    for i, w in enumerate(inits):
        m = v = 0.0
        for t, g in enumerate(grads, 1):
            m, v = 0.9 * m + 0.1 * g[i], 0.99 * v + 0.01 * g[i] ** 2
            d = (0.1 * g[i] + 0.9 * m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.99**t)) + 1e-6)
            u = d + 0.25 * w
            w = w - 0.125 * math.sqrt(np.sum(w**2) / np.sum(u**2)) * u
            np.testing.assert_allclose(have[t - 1][i], w, rtol=1e-11)
    assert "beta_1: float in [0, 1)" in Nadamw.__doc__
    assert "fused: whether" in Nadamw.__doc__
    assert Nadamw.from_config(Nadamw(beta_1=0.5).get_config()).beta_1 == 0.5
    assert Nadamw().name == "nadamw"


def test_a_step_that_the_op_does_not_have_goes_on_without_it():
    """ "auto" goes by the formula, True says why not."""
    weights = tf.Variable([1.0, 2.0])
    Nadamw().apply([tf.ones(2)], [weights])
    assert np.all(weights.numpy() < [1.0, 2.0])
    with pytest.raises(ValueError, match=r"fused=True.*trust ratio"):
        Nadamw(fused=True).apply([tf.ones(2)], [weights])


def test_an_engine_without_a_term_gives_it_as_the_reason():
    """A field of Update that an engine does not list is no step of its."""
    plain = Hyperparameters(beta_1=0.9, beta_2=0.999, epsilon=1e-8)
    assert plain.terms == frozenset()
    workload = GroupSpec(tf.float32, False, frozenset({("/job:localhost/device:CPU:0",)}))
    for engine in (fused, resource_apply):
        assert not engine.unsupported_reason(plain, workload)
        for field in dataclasses.fields(Hyperparameters)[3:]:
            other = {"weight_decay_mode": "independent", "peak_learning_rate": 0.5}.get(field.name)
            value = other or (not field.default if isinstance(field.default, bool) else 0.5)
            mode = {"weight_decay_mode": "schedule"} if field.name == "peak_learning_rate" else {}
            update = dataclasses.replace(plain, **{field.name: value}, **mode)
            assert field.name in update.terms
            reason = engine.unsupported_reason(update, workload)
            assert (field.name in reason) == (field.name not in engine.TERMS), reason
    assert formula.unsupported_reason(dataclasses.replace(plain, amsgrad=True), workload) is None


def test_a_subclass_of_a_variant():
    """With a constructor of its own, it keeps the configuration of the variant."""

    class Mine(tav.AdamW):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)

    optimizer = Mine(0.5, beta_1=0.25, fused=False)
    assert optimizer.get_config()["beta_1"] == 0.25
    assert Mine.from_config(optimizer.get_config()).get_config() == optimizer.get_config()
    inits, grads = cases.problem(3)
    have = cases.run("graph", Mine(0.125), inits, grads)
    want = oracle.train(
        oracle.adamw, inits, grads, [0.125] * 3, weight_decay=0.004, beta_1=0.9, beta_2=0.999, epsilon=1e-8
    )
    assert cases.worst(have, want) < 1e-12
