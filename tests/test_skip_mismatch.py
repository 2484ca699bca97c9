"""Weights files whose optimizer state does not fit: an error of `load_weights`, or skipped with a warning."""

import warnings

import keras
import numpy as np
import pytest
from saved_models import in_turn

import tf_adam_variants as tav
from tf_adam_variants.state import built

X = np.random.default_rng(0).normal(size=(16, 3)).astype("float32")


def network(optimizer, classes=10, body="body"):
    """A compiled network whose head has this many outputs."""
    layers = [keras.layers.Dense(4, name=body), keras.layers.Dense(classes, name="head")]
    model = keras.Sequential([keras.Input((3,)), *layers], name="net")
    model.compile(optimizer, "mse")
    return model


def fit(model, epochs=1):
    labels = np.ones((16, model.output_shape[-1]), "float32")
    model.fit(X, labels, batch_size=8, shuffle=False, epochs=epochs, verbose=0)


def file_of(optimizer, path, **arguments):
    """The weights file of a network after two steps, and the network."""
    model = network(optimizer, **arguments)
    fit(model)
    model.save_weights(path / "a.weights.h5")
    return path / "a.weights.h5", model


def slots(model):
    return {variable.name: variable.numpy() for variable in model.optimizer.variables}


def lora(optimizer):
    model = network(None)
    model.layers[0].enable_lora(2)
    model.compile(optimizer, "mse")
    fit(model)
    return model


@pytest.mark.parametrize(("name", "is_built"), in_turn(["AdamW", "QHAdam", "QHAdamW", "LAMB"], [False, True]))
def test_a_new_head_begins_anew_and_the_body_goes_on(name, is_built, tmp_path):
    cls = getattr(tav, name)
    path, saved = file_of(cls(0.125), tmp_path)
    model = network(cls(0.125, fused=False), classes=5)
    if is_built:
        model.optimizer.build(model.trainable_variables)
    with pytest.warns(UserWarning, match=r"adam|lamb") as found:
        model.load_weights(path, skip_mismatch=True)
    (message,) = (str(w.message) for w in found if "begin anew" in str(w.message))
    heads = [
        f"net_head_{weight}_{slot}" for weight in ("kernel", "bias") for slot in ("momentum", "velocity")
    ]
    assert message.endswith(f"begin anew: {', '.join(heads)}")
    assert int(model.optimizer.iterations) == 2
    model.optimizer.build(model.trainable_variables)
    for name, value in slots(saved).items():
        if "head" not in name:
            np.testing.assert_array_equal(slots(model)[name], value)
    # The first step of the head is that of a new optimizer.
    grads = [np.ones(v.shape, "float32") for v in model.trainable_variables]
    new = network(cls(0.125, fused=False), classes=5)
    new.set_weights(model.get_weights())
    for each in (model, new):
        each.optimizer.apply(grads, each.trainable_variables)
    for got, want in zip(model.layers[1].get_weights(), new.layers[1].get_weights(), strict=True):
        np.testing.assert_array_equal(got, want)


OTHERS = {
    "head": lambda: network(tav.AdamW()),
    "momentum": lambda: network(keras.optimizers.SGD(momentum=0.5), classes=5),
    "rmsprop": lambda: network(keras.optimizers.RMSprop(), classes=5),
    "amsgrad": lambda: network(tav.AdamW(amsgrad=True), classes=5),
}


@pytest.mark.parametrize("what", OTHERS)
def test_what_does_not_fit_is_an_error_of_load_weights_or_skipped(what, tmp_path):
    saved = OTHERS[what]()
    fit(saved)
    saved.save_weights(tmp_path / "a.weights.h5")
    model = network(tav.AdamW(), classes=5)
    with pytest.raises(ValueError, match="could not be loaded"):
        model.load_weights(tmp_path / "a.weights.h5")
    model = network(tav.AdamW(), classes=5)
    with pytest.warns(UserWarning, match="adamw skips what does not fit of its saved state") as found:
        model.load_weights(tmp_path / "a.weights.h5", skip_mismatch=True)
    assert sum("adamw skips" in str(w.message) for w in found) == 1
    assert int(model.optimizer.iterations) == (2 if isinstance(saved.optimizer, tav.AdamW) else 0)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        fit(model)
    assert all(np.all(np.isfinite(weights)) for weights in model.get_weights())


def test_weights_of_lora_in_a_plain_model(tmp_path):
    saved = lora(tav.AdamW())
    saved.save_weights(tmp_path / "a.weights.h5")
    with pytest.raises(ValueError, match="could not be loaded"):
        network(tav.AdamW()).load_weights(tmp_path / "a.weights.h5")
    model = network(tav.AdamW())
    with pytest.warns(UserWarning, match="net_body_kernel_momentum, net_body_kernel_velocity"):
        model.load_weights(tmp_path / "a.weights.h5", skip_mismatch=True)
    fit(model)
    other = lora(tav.AdamW())
    other.load_weights(tmp_path / "a.weights.h5")
    np.testing.assert_array_equal(
        slots(other)["net_head_bias_momentum"], slots(saved)["net_head_bias_momentum"]
    )


def test_state_that_fits_is_taken_as_without_the_option(tmp_path):
    path, saved = file_of(tav.LAMB(), tmp_path)
    model = network(tav.LAMB())
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model.load_weights(path, skip_mismatch=True)
    for each in (model, saved):
        fit(each)
    for name, value in slots(saved).items():
        np.testing.assert_array_equal(slots(model)[name], value)


def test_layers_of_other_numbers_are_found(tmp_path):
    path, saved = file_of(tav.AdamW(), tmp_path, body="dense_1")
    model = network(tav.AdamW(), classes=5, body="dense_7")
    with pytest.warns(UserWarning, match="net_head_kernel_momentum"):
        model.load_weights(path, skip_mismatch=True)
    model.optimizer.build(model.trainable_variables)
    want = slots(saved)["net_dense_1_kernel_momentum"]
    np.testing.assert_array_equal(slots(model)["net_dense_7_kernel_momentum"], want)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_ema": True, "gradient_accumulation_steps": 3, "amsgrad": True, "learning_rate": lambda: 1.0},
        {"master_weights": True},
        {"stochastic_rounding": True},
    ],
)
def test_slots_are_foreseen(options):
    half = {"master_weights", "stochastic_rounding"} & set(options)
    model = keras.Sequential(
        [keras.Input((3,)), keras.layers.Dense(2, dtype="bfloat16" if half else None), keras.layers.Dense(2)]
    )
    optimizer = tav.AdamW(**options)
    foreseen = built.foresee(optimizer, model.trainable_variables)
    optimizer.build(model.trainable_variables)
    assert [entry[:3] for entry in foreseen] == [entry[:3] for entry in built.describe(optimizer).entries]
