"""The schedule that warms up. `converters.from_nadam` is in test_equivalences.py."""

import keras
import numpy as np
import pytest

from tf_adam_variants import schedules


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
