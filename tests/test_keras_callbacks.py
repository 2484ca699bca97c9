"""Keras's callbacks in `fit`, against the oracle: the rate of each step, weights brought back, averages."""

import axes
import cases
import keras
import numpy as np
import oracle
import pytest

RATE = 0.125
RNG = np.random.default_rng(0)
X = RNG.integers(-8, 9, size=(12, 3)) / 4  # with few bits, because Keras makes float32 of data
Y = X @ np.array([[0.5], [-1.0], [2.0]]) + 0.25
LOSS = keras.losses.MeanSquaredError(dtype="float64")
BEGIN = np.full((3, 1), 0.3125)
PLAIN_CASES = pytest.mark.parametrize("case", axes.one_quick(cases.PLAIN_CASES), ids=axes.name_value)


def model(case, fused, **arguments):
    """A line through points in float64: an epoch is one step, and its gradient is known."""
    decay = {"weight_decay": case.oracle_kwargs["weight_decay"]} if case.decays else {}
    made = keras.Sequential(
        [keras.Input((3,), dtype="float64"), keras.layers.Dense(1, use_bias=False, dtype="float64")]
    )
    made.set_weights([BEGIN])
    made.compile(case.cls(RATE, fused=fused, **decay, **arguments), LOSS)
    return made


def fit(made, *callbacks, epochs, first=0):
    options = {"batch_size": len(X), "initial_epoch": first, "epochs": epochs, "verbose": 0}
    return made.fit(X, Y, callbacks=list(callbacks), **options).history


def expected(case, rates):
    """The oracle's weights after each epoch."""
    w, slots, history = BEGIN, {}, []
    told = case.oracle_kwargs
    decay = told.pop("weight_decay", 0.0)
    for t, rate in enumerate(rates, start=1):
        gradient = 2 * X.T @ (X @ w - Y) / len(X)
        w = case.rule(
            w, gradient, t, slots, rate, decay * (1.0 if case.rule is oracle.lamb else rate), **told
        )
        history.append(w)
    return history


def assert_close(have, want):
    np.testing.assert_allclose(have, want, rtol=1e-12)


@axes.FUSED
@PLAIN_CASES
def test_scheduled_rates_and_the_best_weights_brought_back(case, fused):
    """The step of the fourth epoch is so large that all losses after it are worse."""
    rates = [RATE, RATE / 2, RATE / 4, 64.0, RATE, RATE]
    made = model(case, fused)
    rate = keras.callbacks.LearningRateScheduler(lambda epoch: rates[epoch])
    stop = keras.callbacks.EarlyStopping(monitor="loss", patience=2, restore_best_weights=True)
    history = fit(made, rate, stop, epochs=20)
    assert len(history["loss"]) == 6
    assert stop.best_epoch == 3  # whose loss is that before its step
    assert_close(made.get_weights()[0], expected(case, rates)[3])


@axes.FUSED
@PLAIN_CASES
def test_rates_reduced_on_a_plateau_and_averages_swapped_in(case, fused):
    """Only a loss that is less by 1000 would count as progress, so that each epoch from the third on has half
    the rate of the one before. At an epoch's end, and at the training's, the model has its weights' averages.
    """
    made, seen = model(case, fused, use_ema=True, ema_momentum=0.75), []
    plateau = keras.callbacks.ReduceLROnPlateau(monitor="loss", factor=0.5, patience=1, min_delta=1000.0)
    swap = keras.callbacks.SwapEMAWeights(swap_on_epoch=True)
    record = keras.callbacks.LambdaCallback(on_epoch_end=lambda *_: seen.append(made.get_weights()[0]))
    fit(made, plateau, swap, record, epochs=5)
    weights = expected(case, [RATE, RATE, RATE / 2, RATE / 4, RATE / 8])
    averages = weights[:1]
    for w in weights[1:]:
        averages.append(0.75 * averages[-1] + 0.25 * w)
    assert_close(seen, averages)
    assert_close(made.get_weights()[0], averages[-1])


@PLAIN_CASES
def test_training_goes_on_from_a_checkpoint_of_the_model(case, tmp_path):
    made = model(case, "auto")
    fit(made, keras.callbacks.ModelCheckpoint(tmp_path / "{epoch}.keras"), epochs=5)
    again = keras.models.load_model(tmp_path / "3.keras")
    again.compile(again.optimizer, LOSS)  # its type is not saved
    weights = expected(case, [RATE] * 5)
    assert_close(again.get_weights()[0], weights[2])
    fit(again, first=3, epochs=5)
    assert_close(again.get_weights()[0], weights[4])
    np.testing.assert_array_equal(again.get_weights()[0], made.get_weights()[0])
