"""Bad input is a ValueError that names the argument and its value."""

import inspect

import keras
import numpy as np
import pytest
import tensorflow as tf
import yaml
from axes import CLASSES
from wrong_arguments import NAN, WRONG_ARGUMENTS

import tf_adam_variants as tav

WRONG_ROWS = pytest.mark.parametrize(
    ("classes", "argument", "values", "message"), WRONG_ARGUMENTS, ids=[row[1] for row in WRONG_ARGUMENTS]
)


@WRONG_ROWS
def test_wrong_arguments(classes, argument, values, message):
    for cls in classes:
        for value in values:
            with pytest.raises(ValueError, match=message) as error:
                cls(**{argument: value})
            assert argument in str(error.value)
            assert str(value) in str(error.value)


@WRONG_ROWS
def test_a_wrong_value_set_later_is_the_constructor_s_error(classes, argument, values, message):
    """For arguments that are attributes of the class, before and after it is built."""
    for cls in classes:
        if argument not in inspect.signature(cls).parameters or argument.startswith("exclude"):
            continue
        new, built = cls(), cls()
        built.build([tf.Variable([1.0])])
        before = new.get_config()
        for value in values:
            with pytest.raises(ValueError, match=argument) as constructed:
                cls(**{argument: value})
            for optimizer in (new, built):
                with pytest.raises(ValueError, match=argument) as set_later:
                    setattr(optimizer, argument, value)
                assert str(set_later.value) == str(constructed.value)
                assert optimizer.get_config() == before


def test_crossed_bounds():
    with pytest.raises(ValueError, match=r"trust_ratio_min.*trust_ratio_max=1.0.*trust_ratio_min=2.0"):
        tav.LAMB(trust_ratio_min=2.0, trust_ratio_max=1.0)


@pytest.mark.parametrize("value", [0.0, -1.0, NAN, "0.1"])
def test_a_wrong_peak(value):
    with pytest.raises(ValueError, match="peak_learning_rate"):
        tav.AdamW(weight_decay_mode="schedule", peak_learning_rate=value)


@pytest.mark.parametrize(
    "clippings",
    [
        {"clipnorm": 1.0, "clipvalue": 2.0},
        {"clipvalue": 2.0, "global_clipnorm": 0.5},
        {"global_clipnorm": 0.5, "clipnorm": 1.0},
        {"global_clipnorm": 0.5, "clipnorm": 1.0, "clipvalue": 2.0},
    ],
    ids=lambda clippings: " ".join(clippings),
)
def test_two_clippings_are_the_error_of_keras(clippings):
    messages = []
    for cls in (keras.optimizers.AdamW, tav.AdamW, tav.QHAdam):
        with pytest.raises(ValueError, match="Only one of `clipnorm`, `clipvalue` and") as error:
            cls(**clippings)
        messages.append(str(error.value))
    assert len(set(messages)) == 1
    (first, value), *others = clippings.items()
    optimizer = tav.AdamW(**{first: value})
    with pytest.raises(
        ValueError, match="Only one of `clipnorm`, `clipvalue` and `global_clipnorm` can be set"
    ):
        setattr(optimizer, *others[0])
    assert getattr(optimizer, others[0][0]) is None


def test_numbers_of_every_kind_are_numbers():
    optimizer = tav.QHAdamW(np.float32(0.5), weight_decay=0, nu_1=1, nu_2=np.float64(1))
    assert optimizer.get_config()["nu_1"] == 1.0
    assert float(tav.LAMB(learning_rate=1).learning_rate) == 1.0


@pytest.mark.parametrize("value", ["x", 3, [1], ["["]])
def test_wrong_names_for_the_method(value):
    with pytest.raises(ValueError, match="var_names"):
        tav.AdamW().exclude_from_weight_decay(var_names=value)


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


def test_an_empty_name():
    with pytest.raises(ValueError, match=r"`name` must be a string that is not empty. Received: name=''"):
        tav.AdamW(name="")


@pytest.mark.parametrize("name", ["learning_rate", "weight_decay", "epsilon", "beta_1", "clipnorm"])
def test_a_number_that_yaml_reads_as_text(name):
    text = "1e-3"
    assert yaml.safe_load(text) == text
    with pytest.raises(ValueError, match=rf"`{name}`.*1e-3"):
        tav.AdamW(**yaml.safe_load(f"{name}: {text}"))


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


@pytest.mark.parametrize("name", ["beta_1", "beta_2", "epsilon", "weight_decay"])
def test_hyperparameters_are_no_functions_but_can_be_set(name):
    """Addons' are functions that every step asks. Here an attribute is set; the rate may be a function."""
    optimizer = tav.AdamW()
    for wrong in (lambda: 0.5, keras.optimizers.schedules.InverseTimeDecay(1e-3, 1, 0.5)):
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
