"""`fit` under a strategy, and training that starts on some replicas and continues on others."""

import functools

import axes
import keras
import numpy as np
import pytest
import tensorflow as tf
from strategies import (
    OLDEST_KERAS,
    assert_same,
    on_each_device,
    strategy_of,
)

import tf_adam_variants as tav

AVERAGING = {"use_ema": True, "ema_momentum": 0.5}


@pytest.fixture
def in_float64():
    before = keras.config.dtype_policy(), keras.config.floatx()
    keras.config.set_dtype_policy("float64")
    keras.config.set_floatx("float64")  # the type of losses
    yield
    keras.config.set_dtype_policy(before[0])
    keras.config.set_floatx(before[1])


def make_model(strategy, optimizer):
    keras.utils.set_random_seed(1)
    with strategy.scope():
        ids = keras.Input((3,), dtype="int64")
        words = keras.layers.Flatten()(keras.layers.Embedding(20, 4)(ids))
        model = keras.Model(ids, keras.layers.Dense(1)(keras.layers.Dense(8, "tanh")(words)))
        model.compile(optimizer(), keras.losses.MeanSquaredError(reduction="sum"))  # Keras 3.6 adds up means
    return model


IDS = np.random.default_rng(0).integers(10, size=(48, 3))
BATCHES = IDS, IDS.sum(axis=1, keepdims=True) % 5.0


def fit(model):
    """Four steps; every batch, and every replica's part of it, repeats ids."""
    model.fit(*BATCHES, batch_size=12, shuffle=False, verbose=0)


def all_of(model):
    return on_each_device([*model.weights, *model.optimizer.variables])


@pytest.mark.usefixtures("in_float64")
@pytest.mark.parametrize(
    ("cls", "options", "sparse_update"),
    [
        pytest.param(tav.AdamW, {}, "lazy", marks=pytest.mark.slow),
        pytest.param(tav.QHAdamW, {"nu_2": 0.9}, "exact", marks=pytest.mark.slow),
        (tav.LAMB, {}, "lazy"),
        (tav.AdamW, AVERAGING, "exact"),
    ],
    ids=axes.name_value,
)
def test_fit(cls, options, sparse_update):
    def fit_under(name):
        model = make_model(strategy_of(name), lambda: cls(0.0625, sparse_update=sparse_update, **options))
        fit(model)
        return all_of(model)

    expected, one, two = (fit_under(name) for name in (None, "one device", "two replicas"))
    assert (len(one), len(two)) == (1, 2)
    assert_same(one + two, expected)


@pytest.mark.skipif(OLDEST_KERAS, reason="set_distribution is an AttributeError there")
@pytest.mark.parametrize(
    "shards",
    [(), pytest.param((None, "model"), marks=pytest.mark.slow)],
    ids=["data parallel", "model parallel"],
)
def test_keras_distribution_does_nothing_on_tensorflow(shards):
    """Keras itself places nothing there: one device trains, and with the same bits."""

    def fit_under(distribution):
        keras.distribution.set_distribution(distribution)
        try:
            model = make_model(strategy_of(None), lambda: tav.LAMB(0.0625))
            fit(model)
        finally:
            keras.distribution.set_distribution(None)
        return model

    if shards:
        mesh = keras.distribution.DeviceMesh((1, 2), ["batch", "model"], ["cpu:0", "cpu:1"])
        layouts = keras.distribution.LayoutMap(mesh)
        layouts[".*kernel"] = shards
        distribution = keras.distribution.ModelParallel(layout_map=layouts, batch_dim_name="batch")
    else:
        distribution = keras.distribution.DataParallel(devices=["cpu:0", "cpu:1"])
    actual = fit_under(distribution)
    np.testing.assert_equal(all_of(actual), all_of(fit_under(None)))
    state = [*actual.weights, *actual.optimizer.variables]
    assert {v.value.device for v in state} == {"/job:localhost/replica:0/task:0/device:CPU:0"}


PLACES = [None, "two replicas", "three replicas"]
# One down, and below one up: the others are slow.
MOVES = [("two replicas", None)]
ALL_MOVES = pytest.mark.parametrize(
    ("first", "then"),
    [
        pytest.param(first, then, marks=() if (first, then) in MOVES else pytest.mark.slow)
        for first in PLACES
        for then in PLACES
    ],
)


def make_lamb_model(place, **options):
    return make_model(strategy_of(place), lambda: tav.LAMB(0.0625, **options))


def loop_of(model):
    """A function that takes the steps of `fit` by `strategy.run`."""
    strategy, variables = model.distribute_strategy, model.trainable_variables

    def replica(ids, y):
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum((model(ids) - y) ** 2)
        model.optimizer.apply(tape.gradient(loss, variables), variables)

    run = tf.function(lambda *batch: strategy.run(replica, batch))

    def spread(array):
        parts = np.split(array, strategy.num_replicas_in_sync)
        return strategy.experimental_distribute_values_from_function(
            lambda context: tf.constant(parts[context.replica_id_in_sync_group])
        )

    def steps():
        for batch in zip(*(np.split(array, 4) for array in BATCHES), strict=True):
            run(*map(spread, batch))

    return steps


@pytest.fixture(scope="module")
def save_model(tmp_path_factory):
    """A function of a place: the files, but for their endings, of a model after its first `fit` there."""

    @functools.cache
    def save(place):
        model, file = make_lamb_model(place), str(tmp_path_factory.mktemp("saved") / "model")
        fit(model)
        model.save(f"{file}.keras")
        model.save_weights(f"{file}.weights.h5")
        tf.train.Checkpoint(model=model).write(file)
        return file

    return save


@functools.cache
def prepare_to_continue(place):
    """A model that others are restored into, and two functions that take steps with it."""
    model = make_lamb_model(place)
    fit(model)
    return model, [functools.partial(fit, model), loop_of(model)]


@functools.cache
def train_without_interruption():
    model = make_lamb_model(None)
    fit(model)
    fit(model)
    return all_of(model)


@pytest.mark.usefixtures("in_float64")
@ALL_MOVES
def test_any_number_of_replicas_continues_from_any_other(first, then, save_model):
    """From a file of weights and from a checkpoint, in `fit` and in a loop."""
    file = save_model(first)
    model, ways = prepare_to_continue(then)
    for restore in (
        lambda: model.load_weights(f"{file}.weights.h5"),
        lambda: tf.train.Checkpoint(model=model).read(file).assert_consumed(),
    ):
        for four_steps in ways:
            restore()
            four_steps()
            actual = all_of(model)
            assert len(actual) == strategy_of(then).num_replicas_in_sync
            assert_same(actual, train_without_interruption())


@pytest.mark.usefixtures("in_float64")
@ALL_MOVES
def test_any_number_of_replicas_continues_with_a_model_of_any_other(first, then, save_model):
    file = save_model(first)  # trained here, if it is the first that asks: not in the other one's scope
    with strategy_of(then).scope():
        again = keras.models.load_model(f"{file}.keras")
    fit(again)
    assert_same(all_of(again), train_without_interruption())


@pytest.mark.usefixtures("in_float64")
@pytest.mark.parametrize(
    ("first", "then"),
    [(None, "two replicas"), pytest.param("three replicas", "two replicas", marks=pytest.mark.slow)],
)
def test_a_checkpoint_is_restored_before_there_are_slots(first, then, save_model):
    model = make_lamb_model(then)
    tf.train.Checkpoint(model=model).read(save_model(first))
    fit(model)
    assert_same(all_of(model), train_without_interruption())


@pytest.mark.usefixtures("in_float64")
@pytest.mark.parametrize(
    ("first", "then"), [("two replicas", None), pytest.param(None, "two replicas", marks=pytest.mark.slow)]
)
def test_a_model_with_lazy_updates_continues_elsewhere(first, then, tmp_path):
    model = make_lamb_model(first, sparse_update="lazy")
    fit(model)
    model.save(tmp_path / "model.keras")
    with strategy_of(then).scope():
        again = keras.models.load_model(tmp_path / "model.keras")
    fit(again)
    whole = make_lamb_model(None, sparse_update="lazy")
    fit(whole)
    fit(whole)
    assert_same(all_of(again), all_of(whole))
