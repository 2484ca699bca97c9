"""Which variables decay and which have a trust ratio: patterns, lists, the method, warnings."""

import copy
import pickle
import re
import warnings

import axes
import cases
import keras
import numpy as np
import oracle
import pytest
import tensorflow as tf
from axes import CLASSES, FUSED
from like_sgd import assert_close, gradient, variable
from saved_models import in_turn
from strategies import strategy_of

import tf_adam_variants as tav


def test_keras_variables_are_excluded_by_path():
    model = keras.Sequential(
        [keras.Input((3,)), keras.layers.Dense(2, name="head"), keras.layers.LayerNormalization(name="norm")]
    )
    optimizer = tav.AdamW(
        0.5, weight_decay=0.5, exclude_from_weight_decay=["head/bias$", "^sequential/norm/", "unmatched"]
    )
    optimizer.exclude_from_weight_decay(var_names=["also_unmatched"])
    weights = model.trainable_variables
    for weight in weights:
        weight.assign(tf.ones(weight.shape))
    optimizer.apply([tf.zeros(w.shape) for w in weights], weights)
    kept = {w.path.removeprefix("sequential/"): bool(np.all(w.numpy() == 1)) for w in weights}
    assert kept == {"head/kernel": False, "head/bias": True, "norm/gamma": True, "norm/beta": True}


def test_a_method_s_list_of_variables_excludes_just_those():
    weights = [tf.Variable([1.0], name="a"), tf.Variable([1.0], name="ab"), tf.Variable([1.0], name="a.")]
    optimizer = tav.QHAdamW(0.5, weight_decay=0.5)
    optimizer.exclude_from_weight_decay(var_list=[weights[2]])
    optimizer.apply([tf.zeros(1)] * 3, weights)
    assert [float(w[0]) for w in weights] == [0.75, 0.75, 1.0]


def test_a_second_call_of_the_method_replaces_the_first_and_the_list_stays():
    optimizer = tav.LAMB(exclude_from_weight_decay=["bias"])
    optimizer.exclude_from_weight_decay(var_names=["gamma"])
    optimizer.exclude_from_weight_decay(var_names=["beta"])
    assert optimizer.get_config()["exclude_from_weight_decay"] == ["bias", "beta"]


def test_the_late_call_raises():
    optimizer = tav.AdamW()
    optimizer.build([tf.Variable([1.0])])
    with pytest.raises(ValueError, match="before adamw is built"):
        optimizer.exclude_from_weight_decay(var_names=["bias"])


NAMES = ("kernel", "bias", "gamma")


def built(given, names, listed):
    """A built optimizer whose list is `given`, after the method was called, and its variables by name."""
    weights = {name: keras.Variable([1.0], name=name) for name in NAMES}
    optimizer = tav.AdamW(exclude_from_weight_decay=given)
    if names or listed:
        optimizer.exclude_from_weight_decay([weights[name] for name in listed], names)
    optimizer.build(list(weights.values()))
    return optimizer, weights


@pytest.mark.parametrize(
    ("given", "names", "listed", "late_names", "late_listed", "changes"),
    [
        (None, ["bias"], [], ["bias"], [], False),
        (None, [], ["bias"], None, ["bias"], False),
        (None, ["gamma"], ["bias"], ["gamma"], ["bias"], False),
        (["bias"], [], [], ["bias"], [], False),
        (["bias"], [], [], None, ["bias"], False),
        (["bias"], ["gamma"], [], ["gamma"], ["bias"], False),
        (None, [], [], None, [], False),
        (["bias"], [], [], None, [], False),
        (None, [], [], ["bias"], [], True),
        (None, ["bias"], [], None, ["kernel", "bias"], True),
        (None, ["bias"], [], ["bias", "gamma"], [], True),
        (None, ["bias", "gamma"], [], ["bias"], [], True),  # a later call replaces an earlier one
        (None, ["bias"], [], None, [], True),
        (["bias"], [], [], ["later"], [], True),  # for a variable that `build` may add
    ],
)
def test_a_late_call_passes_if_it_changes_nothing(given, names, listed, late_names, late_listed, changes):
    optimizer, weights = built(given, names, listed)
    config = optimizer.get_config()
    late = {"var_list": [weights[name] for name in late_listed], "var_names": late_names}
    if changes:
        with pytest.raises(ValueError, match="must be called before adamw is built"):
            optimizer.exclude_from_weight_decay(**late)
    else:
        optimizer.exclude_from_weight_decay(**late)
    assert optimizer.get_config() == config


def test_a_late_call_for_a_variable_without_slots_raises():
    optimizer, weights = built(None, [], ["bias"])
    with pytest.raises(ValueError, match="must be called before adamw is built"):
        optimizer.exclude_from_weight_decay([weights["bias"], keras.Variable([1.0], name="other")])


def test_each_replica_may_call_it():
    """As a test of Keras does: the first replica builds the optimizer before the second one calls it."""
    strategy = strategy_of("two replicas")
    with strategy.scope():
        weights = [keras.Variable([2.0], name=name) for name in NAMES]
        optimizer = tav.AdamW(1.0, weight_decay=0.5)

    def step():
        optimizer.exclude_from_weight_decay(var_list=weights[1:2], var_names=["gamma"])
        optimizer.apply([tf.zeros(1)] * 3, weights)

    strategy.run(step)
    assert [float(weight.numpy()[0]) for weight in weights] == [1.0, 2.0, 2.0]


@pytest.mark.parametrize(
    ("layers", "adapted"),
    [(None, [True, False, False, True]), ([], [True] * 4), (["kernel"], [False, True, True, False])],
)
def test_lamb_s_layer_exclusions(layers, adapted):
    """None: those without decay; []: none of them."""
    arguments = {"weight_decay": 0.25, "epsilon": 1e-6, "beta_1": 0.9, "beta_2": 0.999}
    optimizer = tav.LAMB(
        0.125, exclude_from_weight_decay=["bias", "norm"], exclude_from_layer_adaptation=layers, **arguments
    )
    inits, grads = cases.problem(5)
    history = cases.run("graph", optimizer, inits, grads)
    decayed = [True, False, False, True]
    oracle_kwargs = {"decayed": decayed, "adapted": adapted} | arguments
    assert (
        cases.worst(
            history, cases.oracle.train(cases.oracle.lamb, inits, grads, [0.125] * 5, **oracle_kwargs)
        )
        < 1e-12
    )


def decay_three_times(cls, **arguments):
    """Three optimizers at a rate of 1 and zero gradients: one variable decays in each, two are excluded."""
    decayed, named, listed = variable(2.0), variable(2.0, name="exclude"), variable(2.0)
    optimizers = [cls(1.0, weight_decay=0.004, **arguments) for _ in range(3)]
    optimizers[1].exclude_from_weight_decay(var_names=["exclude"])
    optimizers[2].exclude_from_weight_decay(var_list=[listed])
    for optimizer, others in zip(optimizers, ([], [named], [listed]), strict=True):
        optimizer.apply([gradient(0.0)] * (1 + len(others)), [decayed, *others])
    return [float(v) for v in (decayed, named, listed)]


@axes.pairwise(cls=[tav.AdamW, tav.QHAdamW], fused=[False, True])
def test_weight_decay_and_who_is_excluded(cls, fused):
    assert_close(decay_three_times(cls, fused=fused), [1.9760959, 2.0, 2.0], 1e-6)


@FUSED
def test_lamb_s_decay_is_inside_its_trust_ratio(fused):
    """A zero gradient leaves the decay alone, and a step is of the weights' length times the rate of 1.

    Keras's Lamb decays by the rate times the decay, outside: to 1.9760959.
    """
    assert_close(decay_three_times(tav.LAMB, fused=fused), [0.0, 2.0, 2.0], 1e-6)
    weights = np.array(2.0)
    oracle_kwargs = {"beta_1": 0.9, "beta_2": 0.999, "epsilon": 1e-6, "weight_decay": 0.004}
    expected = oracle.train(oracle.lamb, [weights], [[np.array(0.0)]], [1.0], **oracle_kwargs)
    assert_close(expected[0][0], 0.0, 1e-12)


@axes.pairwise(
    cls=[tav.AdamW, tav.QHAdamW, tav.LAMB], variable_class=[tf.Variable, keras.Variable], fused=[False, True]
)
def test_a_variable_is_excluded_and_not_its_namesake(cls, variable_class, fused):
    weights = [variable_class([1.0, 2.0], name="w") for _ in range(3)]
    optimizer = cls(0.5, weight_decay=0.5, fused=fused)
    optimizer.exclude_from_weight_decay(var_list=weights[1:2])
    optimizer.apply([gradient([0.0, 0.0])] * 3, weights)
    assert [bool(np.all(w.numpy() == [1.0, 2.0])) for w in weights] == [False, True, False]


def test_variables_to_decay_are_those_that_no_pattern_excludes():
    """Addons' `apply_gradients` takes a list of them in every step."""
    inits, grads = np.array([[1.0, 2.0], [3.0, 4.0]]), np.full((2, 2), 0.1)
    weights = cases.variables(inits, tf.float64, ("var0", "var1"))
    optimizer = tav.AdamW(1.0, weight_decay=0.125, exclude_from_weight_decay=["^(?!var0$)"])
    with pytest.raises(TypeError, match="decay_var_list"):
        optimizer.apply_gradients(zip(grads, weights, strict=True), decay_var_list=weights[:1])
    optimizer.apply([tf.zeros(2, tf.float64)] * 2, weights)
    np.testing.assert_array_equal(weights[0], 0.875 * inits[0])
    np.testing.assert_array_equal(weights[1], inits[1])


# -- warnings


def warnings_of(optimizer):
    """The warnings that building it on a model gives."""
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2, name="head")])
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        optimizer.apply([tf.zeros(w.shape) for w in model.trainable_variables], model.trainable_variables)
        optimizer.apply([tf.zeros(w.shape) for w in model.trainable_variables], model.trainable_variables)
        optimizer.build(model.trainable_variables)
    return [(str(w.message), w.filename) for w in found if "pattern" in str(w.message)]


@CLASSES
def test_a_pattern_that_matches_nothing_warns_once(cls):
    ((message, file),) = warnings_of(cls(exclude_from_weight_decay=["bais", "kernel"]))
    assert "`exclude_from_weight_decay`: the pattern 'bais' matches no variable" in message
    assert "sequential/head/kernel, sequential/head/bias" in message
    assert file == __file__
    assert not warnings_of(cls(exclude_from_weight_decay=["bias", "kernel"]))


def test_the_patterns_of_layers_and_of_the_method_are_warned_of():
    optimizer = tav.LAMB(exclude_from_layer_adaptation=["haed", "bias"], exclude_from_weight_decay=["bias"])
    optimizer.exclude_from_weight_decay(var_names=["gamma", "beta"])
    first, second = (message for message, _ in warnings_of(optimizer))
    assert "`exclude_from_weight_decay`: the patterns 'gamma', 'beta' match no variable" in first
    assert "`exclude_from_layer_adaptation`: the pattern 'haed' matches no variable" in second


def test_a_pattern_is_warned_of_in_fit():
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)])
    model.compile(tav.QHAdamW(exclude_from_weight_decay=["norm"]), "mse")
    with pytest.warns(UserWarning, match="the pattern 'norm' matches no variable"):
        model.fit(np.ones((4, 3)), np.ones(4), verbose=0)


@pytest.mark.parametrize("name", ["exclude_from_weight_decay", "exclude_from_layer_adaptation"])
def test_lists_of_exclusions_are_the_constructor_s(name):
    with pytest.raises(ValueError, match=f"`{name}` is an argument of the constructor"):
        setattr(tav.LAMB(), name, ["bias"])


def test_exclusions_by_the_method_are_in_the_config():
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2, name="d")])
    optimizer = tav.AdamW(exclude_from_weight_decay=["norm"])
    optimizer.exclude_from_weight_decay(var_list=[model.layers[0].bias], var_names=["gamma"])
    config = optimizer.get_config()
    assert config["exclude_from_weight_decay"] == ["norm", "gamma", "^(sequential/)?d/bias$"]
    again = tav.AdamW.from_config(config | {"learning_rate": 1.0, "weight_decay": 0.5})
    weights = model.trainable_variables
    for weight in weights:
        weight.assign(tf.ones(weight.shape))
    with pytest.warns(UserWarning, match="'norm', 'gamma' match no variable"):
        again.apply([tf.zeros(weight.shape) for weight in weights], weights)
    assert [float(tf.reduce_mean(weight)) for weight in weights] == [0.5, 1.0]


# -- copies: a loaded model does not have the paths of the model that was saved


def encoder(*layers, name="encoder"):
    return keras.Sequential([*layers, keras.layers.Dense(4, name="proj")], name=name)


def sequential_in_functional():
    inputs = keras.Input((3,))
    return keras.Model(inputs, keras.layers.Dense(2, name="head")(encoder()(inputs)))


def functional_in_sequential():
    inputs = keras.Input((3,))
    inner = keras.Model(inputs, encoder()(inputs), name="inner")
    return keras.Sequential([keras.Input((3,)), inner, keras.layers.Dense(2, name="head")])


def twice_nested():
    inputs = keras.Input((3,))
    inner = keras.Sequential([encoder()], name="outer")
    return keras.Model(inputs, keras.layers.Dense(2, name="head")(inner(inputs)))


def shared_twice():
    inputs = keras.Input((4,))
    inner = encoder()
    return keras.Model(inputs, keras.layers.Dense(2, name="head")(inner(inner(inputs))))


def again(model):
    """The same model and optimizer before the first step, with the paths of a loaded model."""
    new = keras.models.clone_model(model)
    new.set_weights(model.get_weights())
    new.compile(type(model.optimizer).from_config(model.optimizer.get_config()), "mse")
    return new


def by_weights_file(model, path):
    model.save_weights(path.with_suffix(".weights.h5"))
    new = again(model)
    new.load_weights(path.with_suffix(".weights.h5"))
    return new


def by_checkpoint(model, path):
    tf.train.Checkpoint(model=model).write(path)
    new = again(model)
    tf.train.Checkpoint(model=new).restore(path)
    return new


def by_store(model, path):
    store, new = {}, again(model)
    model.optimizer.save_own_variables(store)
    new.optimizer.build(new.trainable_variables)
    new.optimizer.load_own_variables(store)
    return new


def by_file(model, path):
    model.save(path.with_suffix(".keras"))
    return keras.models.load_model(path.with_suffix(".keras"))


WAYS = {
    "file": by_file,
    "weights": by_weights_file,
    "checkpoint": by_checkpoint,
    "store": by_store,
    "pickle": lambda model, path: pickle.loads(pickle.dumps(model)),
    "deepcopy": lambda model, path: copy.deepcopy(model),
}
INNER = "encoder/|bias"


def with_exclusions(make, cls=tav.AdamW, given="list", patterns=(INNER,)):
    """A compiled model of which the inner model and all biases are excluded, after a step; its data."""
    model = make()
    optimizer = cls(0.125, weight_decay=0.5, exclude_from_weight_decay=patterns if given == "list" else None)
    if given == "method":
        optimizer.exclude_from_weight_decay(var_names=patterns)
    elif given == "variables":
        optimizer.exclude_from_weight_decay(var_list=[v for v in model.variables if re.search(INNER, v.path)])
    model.compile(optimizer, "mse")
    x = np.random.default_rng(0).normal(size=(8, *model.input_shape[1:])).astype("float32")
    model.train_on_batch(x, x[:, :2])
    return model, (x, x[:, :2])


KINDS = {
    "AdamW, list": (tav.AdamW, sequential_in_functional, "list"),
    "LAMB, list": (tav.LAMB, shared_twice, "list"),
    "LAMB, method": (tav.LAMB, twice_nested, "method"),
    "AdamW, method": (tav.AdamW, functional_in_sequential, "method"),
    "AdamW, variables": (tav.AdamW, twice_nested, "variables"),
    "LAMB, variables": (tav.LAMB, sequential_in_functional, "variables"),
}


@pytest.mark.parametrize(("way", "kind"), in_turn(WAYS, KINDS))
def test_a_copy_excludes_what_the_model_did(way, kind, tmp_path):
    cls, make, given = KINDS[kind]
    model, data = with_exclusions(make, cls, given)
    copied = WAYS[way](model, tmp_path / "copy")
    assert [v.path for v in copied.trainable_variables] != [v.path for v in model.trainable_variables]
    for one in (model, copied):
        one.train_on_batch(*data)
    for want, got in zip(model.get_weights(), copied.get_weights(), strict=True):
        np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("way", axes.one_quick(WAYS))
def test_a_copy_s_patterns_match_no_path_and_do_not_warn(way, tmp_path):
    model, data = with_exclusions(sequential_in_functional, patterns=["encoder/"])
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        copied = WAYS[way](model, tmp_path / "copy")
        copied.train_on_batch(*data)


def test_other_patterns_count_and_the_differences_are_said(tmp_path):
    model, _ = with_exclusions(sequential_in_functional)
    model.save_weights(tmp_path / "a.weights.h5")
    other = again(model)
    other.compile(tav.AdamW(0.125, weight_decay=0.5, exclude_from_weight_decay=["head"]), "mse")
    other.optimizer.build(other.trainable_variables)
    with pytest.warns(UserWarning, match="The state was saved with") as found:
        other.load_weights(tmp_path / "a.weights.h5")
    (message,) = (str(w.message) for w in found if "state" in str(w.message))
    assert f"saved with exclude_from_weight_decay=['{INNER}']. Here it is ['head'], which counts" in message
    assert "Excluded now, and not before: head/kernel. " in message
    assert "Excluded before, and not now: proj/kernel, proj/bias" in message
    excluded = other.optimizer._decay_exclusions.indices
    assert {other.trainable_variables[i].path for i in excluded} == {"head/kernel", "head/bias"}


def test_other_patterns_of_the_same_variables_do_not_warn(tmp_path):
    model, data = with_exclusions(sequential_in_functional)
    model.save_weights(tmp_path / "a.weights.h5")
    other = again(model)
    other.compile(tav.AdamW(0.125, exclude_from_weight_decay=["proj/", "bias$"]), "mse")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        other.load_weights(tmp_path / "a.weights.h5")
        other.train_on_batch(*data)


def test_a_frozen_layer_that_waits_for_its_variables_stays_excluded(tmp_path):
    model, data = with_exclusions(sequential_in_functional)
    model.save(tmp_path / "a.keras")
    copied = keras.models.load_model(tmp_path / "a.keras", compile=False)
    copied.layers[1].trainable = False
    copied.compile(tav.AdamW(0.125, weight_decay=0.5, exclude_from_weight_decay=[INNER]), "mse")
    copied.load_weights(tmp_path / "a.keras")
    copied.optimizer.build(copied.trainable_variables)
    copied.layers[1].trainable = True
    copied.compile(copied.optimizer, "mse")
    copied.optimizer.build(copied.trainable_variables)
    for one in (model, copied):
        one.train_on_batch(*data)
    for want, got in zip(model.get_weights(), copied.get_weights(), strict=True):
        np.testing.assert_array_equal(got, want)


def test_state_that_excludes_others_comes_before_the_first_step(tmp_path):
    model, data = with_exclusions(sequential_in_functional)
    model.save_weights(tmp_path / "a.weights.h5")
    copied = again(model)
    copied.train_on_batch(*data)
    with pytest.raises(ValueError, match="excluded other variables, and a function with its step is traced"):
        copied.load_weights(tmp_path / "a.weights.h5")
