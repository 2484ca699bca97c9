"""Bad input is a ValueError that names the argument and its value, and nothing is changed."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import tf_adam_variants as tav

NAN, INF = float("nan"), float("inf")
ALL = (tav.AdamW, tav.QHAdam, tav.QHAdamW, tav.LAMB)
DECOUPLED = (tav.AdamW, tav.QHAdamW)

# classes, argument, values, a part of the message
WRONG = [
    (ALL, "learning_rate", [-1e-3, NAN, INF, None, "fast", True, [0.1], {"a": 1}], "learning_rate"),
    (ALL, "beta_1", [-0.1, 1.0, 1.5, NAN, None, "0.9", True], r"in \[0, 1\)"),
    (ALL, "beta_2", [-0.1, 1.0, 1.5, NAN, None, "0.9", True], r"in \[0, 1\)"),
    (ALL, "epsilon", [-1e-8, NAN, INF, None, "small"], ">= 0"),
    ((*DECOUPLED, tav.LAMB), "weight_decay", [-0.1, NAN, INF, "some", True], ">= 0"),
    ((tav.QHAdam, tav.QHAdamW), "nu_1", [NAN, INF, None, "0.7"], "finite"),
    ((tav.QHAdam, tav.QHAdamW), "nu_2", [NAN, -INF, None, "1"], "finite"),
    (DECOUPLED, "weight_decay_mode", ["lr", None, 1, ["schedule"]], "'independent'"),
    (DECOUPLED, "peak_learning_rate", [0.1, 0.0], "weight_decay_mode='schedule'"),
    ((tav.AdamW,), "amsgrad", [1, None, "yes"], "True or False"),
    ((tav.LAMB,), "bias_correction", [1, None], "True or False"),
    ((tav.LAMB,), "grad_averaging", [0, "no"], "True or False"),
    ((tav.LAMB,), "trust_ratio_min", [-1.0, NAN, INF, "0"], ">= 0"),
    ((tav.LAMB,), "trust_ratio_max", [-1.0, NAN, INF, "1"], ">= 0"),
    ((tav.LAMB,), "exclude_from_layer_adaptation", ["bias", [1], ["("], 3], "regular expression"),
    (ALL, "exclude_from_weight_decay", ["bias", [1], ["(", "ok"], 3], "regular expression"),
    (ALL, "clipnorm", [-1.0, 0.0, NAN, "1"], "> 0"),
    (ALL, "clipvalue", [-1.0, 0, INF], "> 0"),
    (ALL, "global_clipnorm", [-1.0, 0, NAN], "> 0"),
    (ALL, "loss_scale_factor", [-1.0, 0.0, NAN], "> 0"),
    (ALL, "gradient_accumulation_steps", [0, 1, -2, 2.5, "2", True], "integer >= 2"),
    (ALL, "ema_momentum", [-0.1, 1.1, NAN, None], r"in \[0, 1\]"),
    (ALL, "ema_overwrite_frequency", [0, -1, 1.5, 3], "ema_overwrite_frequency"),
    (ALL, "use_ema", ["yes", 1], "True or False"),
    (ALL, "decay", [0.1], "not recognized"),
    (ALL, "momentum", [0.9], "momentum"),
    ((tav.QHAdam,), "weight_decay", [0.1], "weight_decay"),
    ((tav.QHAdam, tav.LAMB), "weight_decay_mode", ["schedule"], "weight_decay_mode"),
    ((tav.QHAdam, tav.LAMB), "peak_learning_rate", [0.1], "peak_learning_rate"),
    (ALL, "sparse_update", ["dense", None, True], "'lazy'"),
    (ALL, "fused", ["yes", None, 1], "'auto', True or False"),
    (ALL, "master_weights", ["yes", None, 1], "True or False"),
    (ALL, "stochastic_rounding", ["yes", None, 1], "True or False"),
    (ALL, "name", [3], "name"),
]
ROWS = [
    (cls, argument, value, message)
    for classes, argument, values, message in WRONG
    for cls in classes
    for value in values
]


@pytest.mark.parametrize(("cls", "argument", "value", "message"), ROWS, ids=repr)
def test_wrong_arguments(cls, argument, value, message):
    with pytest.raises(ValueError, match=message) as error:
        cls(**{argument: value})
    assert argument in str(error.value)
    assert str(value) in str(error.value)


def test_crossed_bounds():
    with pytest.raises(ValueError, match=r"trust_ratio_min.*trust_ratio_max=1.0.*trust_ratio_min=2.0"):
        tav.LAMB(trust_ratio_min=2.0, trust_ratio_max=1.0)


@pytest.mark.parametrize("value", [0.0, -1.0, NAN, "0.1"])
def test_a_wrong_peak(value):
    with pytest.raises(ValueError, match="peak_learning_rate"):
        tav.AdamW(weight_decay_mode="schedule", peak_learning_rate=value)


def test_two_clippings():
    with pytest.raises(ValueError, match="clipnorm"):
        tav.AdamW(clipnorm=1.0, clipvalue=1.0)


def test_numbers_of_every_kind_are_numbers():
    optimizer = tav.QHAdamW(np.float32(0.5), weight_decay=0, nu_1=1, nu_2=np.float64(1))
    assert optimizer.get_config()["nu_1"] == 1.0
    assert float(tav.LAMB(learning_rate=1).learning_rate) == 1.0


@pytest.mark.parametrize("value", ["x", 3, [1], ["["]])
def test_wrong_names_for_the_method(value):
    with pytest.raises(ValueError, match="var_names"):
        tav.AdamW().exclude_from_weight_decay(var_names=value)


@pytest.fixture
def weights():
    return [tf.Variable([1.0, 2.0], name="a"), tf.Variable([[3.0]], name="b")]


GOOD = ([1.0, 1.0], [[1.0]])


def unchanged(optimizer, weights):
    return (
        [w.numpy().tolist() for w in weights] == [[1.0, 2.0], [[3.0]]]
        and int(optimizer._iterations) == 0
        and all(np.all(v.numpy() == 0) for v in optimizer.variables if v is not optimizer.learning_rate)
    )


@pytest.mark.parametrize("cls", ALL, ids=lambda cls: cls.__name__)
def test_gradients_that_do_not_match(cls, weights):
    optimizer = cls()
    optimizer.build(weights)
    wrong = [
        ([GOOD[0]], weights, "one gradient a variable.*1 gradients for 2 variables: a, b"),
        ([GOOD[0]], None, "one gradient a variable"),
        ([*GOOD, [1.0]], None, "3 gradients for 2"),
        ([GOOD[0], [1.0, 2.0]], weights, r"gradient of b must have its shape, \(1, 1\).*\(2,\)"),
        ([GOOD[1], GOOD[0]], None, "gradient of a"),
        ([GOOD[0], tf.IndexedSlices(tf.ones((1, 2)), [0])], weights, "gradient of b"),
        ([None, None], weights, "No gradients"),
        ([GOOD[0], GOOD[0]], [weights[0], weights[0]], "more than once"),
    ]
    for grads, variables, message in wrong:
        with pytest.raises(ValueError, match=message):
            optimizer.apply(
                [g if g is None or isinstance(g, tf.IndexedSlices) else tf.constant(g) for g in grads],
                variables,
            )
    assert unchanged(optimizer, weights)


def test_a_variable_that_it_was_not_built_on(weights):
    optimizer = tav.LAMB()
    optimizer.build(weights[:1])
    with pytest.raises(ValueError, match=r"Unknown variables: b\."):
        optimizer.apply([tf.ones(2), tf.ones((1, 1))], weights)
    assert unchanged(optimizer, weights)


def test_no_variables_and_not_built():
    with pytest.raises(ValueError, match="built"):
        tav.AdamW().apply([tf.ones(2)])


def test_built_twice(weights):
    optimizer = tav.QHAdam()
    optimizer.build(weights)
    count = len(optimizer.variables)
    optimizer.build(weights)
    assert len(optimizer.variables) == count
    for known in (weights[:1], weights[::-1], []):
        optimizer.build(known)
        assert len(optimizer.variables) == count
    with pytest.raises(ValueError, match=r"c of type.*int32"):
        optimizer.build([*weights, tf.Variable(1, name="c")])
    assert len(optimizer.variables) == count
    assert unchanged(optimizer, weights)


@pytest.mark.parametrize("dtype", [tf.int32, tf.complex64])
def test_variables_that_are_not_real(dtype):
    with pytest.raises(ValueError, match=f"w of type.*{dtype.name}"):
        tav.AdamW().build([tf.Variable(tf.ones(2, dtype), name="w")])


def test_an_infinite_gradient_is_not_hidden(weights):
    optimizer = tav.AdamW()
    optimizer.apply([tf.constant([INF, 1.0]), tf.ones((1, 1))], weights)
    assert np.isnan(weights[0].numpy()[0])
    assert np.all(np.isfinite(weights[0].numpy()[1:]))


def test_frozen_layers_and_constraints():
    model = keras.Sequential(
        [
            keras.Input((2,)),
            keras.layers.Dense(2, name="frozen", trainable=False),
            keras.layers.Dense(2, kernel_constraint=keras.constraints.NonNeg()),
        ]
    )
    model.compile("qhadamw", "mse")
    model.optimizer.learning_rate = 1.0
    before = model.layers[0].kernel.numpy()
    model.fit(np.ones((4, 2)), -np.ones((4, 2)), verbose=0)
    np.testing.assert_array_equal(model.layers[0].kernel.numpy(), before)
    assert np.min(model.layers[1].kernel.numpy()) == 0
