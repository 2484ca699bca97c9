"""Training on two replicas, or on a device of one's own, is training on the global batch.

What TensorFlow itself does not do is not here. An optimizer has to be built before its first step in a
`tf.function` around `strategy.run`. XLA compiles
no step of several CPUs.
"""

import functools

import cases
import keras
import numpy as np
import pytest
import tensorflow as tf

import tf_adam_variants as tav

TOLERANCE = {"float64": 1e-12, "float16": 2e-3, "bfloat16": 2e-2}
ALL_CASES = pytest.mark.parametrize("case", cases.CASES, ids=lambda case: case.name)
BOTH = pytest.mark.parametrize("how", ["exact", "lazy"])
OLDEST_KERAS = keras.__version__.startswith("3.6.")
MODES = pytest.mark.parametrize("mode", ["eager", "graph"])
ACCUMULATING = {"gradient_accumulation_steps": 2}
AVERAGING = {"use_ema": True, "ema_momentum": 0.5}
OVERWRITING = AVERAGING | {"ema_overwrite_frequency": 3}


def name_of(value):
    return ("-".join(value) or "plain") if isinstance(value, dict) else None


# A second MirroredStrategy would number its collective operations as the first did: with three replicas there
# are none.
@functools.cache
def strategy_of(name):
    """None has no strategy."""
    return {
        "two replicas": lambda: tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"]),
        "three replicas": lambda: tf.distribute.MirroredStrategy(
            ["CPU:0", "CPU:1", "CPU:2"], tf.distribute.ReductionToOneDevice()
        ),
        "central storage": lambda: tf.distribute.experimental.CentralStorageStrategy(
            ["CPU:0", "CPU:1"], "CPU:2"
        ),
        "one device": lambda: tf.distribute.OneDeviceStrategy("CPU:1"),
        None: tf.distribute.get_strategy,
    }[name]()


def on_each_device(variables):
    """Values of the variables, a list for each device that has copies of its own."""
    held = [v.value if hasattr(v, "path") else v for v in variables]  # Keras's have a path
    copies = [v.values if isinstance(v, tf.distribute.DistributedValues) else [v] for v in held]
    return [[v.numpy().astype(np.float64) for v in device] for device in zip(*copies, strict=True)]


def assert_same(have, want, tolerance=1e-12):
    """Every device of `have` holds what the one of `want` does, relative to arrays' largest elements."""
    for device in have:
        for a, b in zip(device, *want, strict=True):
            np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * np.max(np.abs(b)))


def loop(strategy, optimizer, mode="graph", dtype="float64"):
    """A function that takes a step of `strategy.run`, given what each replica sees, and all variables."""
    keras.utils.set_random_seed(0)
    with strategy.scope():
        layer = keras.layers.Layer(dtype=dtype)
        table, bias = layer.add_weight((9, 3), "ones"), layer.add_weight((4,), "ones")
        optimizer = optimizer()
        optimizer.build([table, bias])

    def replica(ids, values, dense):
        one = tf.ones((), dtype)  # makes gradients where replicas make them: on their own devices
        optimizer.apply([tf.IndexedSlices(one * values, ids), one * dense], [table, bias])

    def everywhere(*arguments):
        strategy.run(replica, arguments)

    run = tf.function(everywhere) if mode == "graph" else everywhere

    def step(replicas):
        def spread(i, kind):
            return strategy.experimental_distribute_values_from_function(
                lambda context: tf.constant(replicas[context.replica_id_in_sync_group][i], kind)
            )

        run(spread(0, "int64"), spread(1, dtype), spread(2, dtype))

    return step, [table, bias, *optimizer.variables]


def looped(strategy, optimizer, steps, mode="graph", dtype="float64"):
    step, variables = loop(strategy, optimizer, mode, dtype)
    for replicas in steps:
        step(replicas)
    return on_each_device(variables)


def steps_of_two(count=4):
    """The ids, values and dense gradient that each of two replicas sees in each step.

    Ids repeat within replicas and across them. Quarters have exact sums in any type and order.
    """
    rng = np.random.default_rng(0)
    return [
        [
            (rng.integers(5, size=n), rng.integers(-8, 9, (n, 3)) / 4, rng.integers(-8, 9, 4) / 4)
            for n in (6, 2)
        ]
        for _ in range(count)
    ]


def global_batches(steps):
    """The same steps, for one replica."""
    return [[(np.append(a[0], b[0]), np.concatenate([a[1], b[1]]), a[2] + b[2])] for a, b in steps]


def check_loop(optimizer, mode="graph", dtype="float64", count=4):
    have = looped(strategy_of("two replicas"), optimizer, steps_of_two(count), mode, dtype)
    want = looped(strategy_of(None), optimizer, global_batches(steps_of_two(count)), mode, dtype)
    assert len(have) == 2
    assert_same(have, want, TOLERANCE[dtype])


@pytest.mark.parametrize("fused", [False, True])
@BOTH
@ALL_CASES
def test_loop(case, how, fused):
    check_loop(lambda: case.cls(0.125, **case.terms, sparse_update=how, fused=fused))


@MODES
@pytest.mark.parametrize("fused", [False, True])
def test_loop_with_a_schedule(fused, mode):
    """Each replica has a rate of its own, and all are the same."""
    check_loop(
        lambda: tav.AdamW(keras.optimizers.schedules.ExponentialDecay(0.125, 2, 0.5), fused=fused), mode
    )


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("fused", [False, True])
@BOTH
@pytest.mark.parametrize("cls", [tav.AdamW, tav.LAMB])
@pytest.mark.parametrize("option", [None, "master_weights", "stochastic_rounding"])
def test_loop_of_half_types(option, cls, how, fused, dtype):
    """Moments are float32, gradients are not."""
    options = {option: True} if option else {}
    check_loop(lambda: cls(0.125, sparse_update=how, fused=fused, **options), dtype=dtype)


@MODES
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("options", [{}, {"global_clipnorm": 0.5}, AVERAGING], ids=name_of)
def test_variables_of_several_types(options, fused, mode):
    """TensorFlow has one sum over replicas for gradients of one type."""

    def trained(place, steps):
        strategy = strategy_of(place)
        with strategy.scope():
            half = keras.layers.Layer(dtype="bfloat16").add_weight((4,), "ones")
            full = keras.layers.Layer(dtype="float32").add_weight((4,), "ones")
            optimizer = tav.LAMB(0.125, master_weights=True, fused=fused, **options)
            optimizer.build([half, full])

        def replica(values):
            optimizer.apply([tf.cast(values, tf.bfloat16), values * 1.0], [half, full])

        run = tf.function(strategy.run) if mode == "graph" else strategy.run
        for replicas in steps:
            values = strategy.experimental_distribute_values_from_function(
                lambda context, r=replicas: tf.constant(r[context.replica_id_in_sync_group][2], tf.float32)
            )
            run(replica, (values,))
        return on_each_device([half, full, *optimizer.variables])

    have = trained("two replicas", steps_of_two())
    want = trained(None, global_batches(steps_of_two()))
    assert len(have) == 2
    assert_same(have, want, 2e-6)


@MODES
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize(
    "options", [AVERAGING, OVERWRITING, ACCUMULATING, OVERWRITING | ACCUMULATING], ids=name_of
)
@BOTH
def test_loop_with_options(how, options, fused, mode):
    """Keras's accumulation, in a graph, lets replicas meet inside a `tf.cond`, where they cannot."""
    check_loop(lambda: tav.QHAdamW(0.125, sparse_update=how, fused=fused, **options), mode, count=5)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@BOTH
def test_loop_accumulates_half_types(how, dtype):
    check_loop(lambda: tav.LAMB(0.125, sparse_update=how, **ACCUMULATING), dtype=dtype)


@MODES
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize(
    "clipping", [{"clipnorm": 0.5}, {"clipvalue": 0.5}, {"global_clipnorm": 0.5}], ids=name_of
)
@BOTH
def test_loop_clips_the_sum_over_replicas(how, clipping, fused, mode):
    """Keras clips each replica's gradient before the sum, which is not what one device does."""
    check_loop(lambda: tav.AdamW(0.125, sparse_update=how, fused=fused, **clipping), mode)


def test_loop_clips_the_accumulated_sum():
    check_loop(lambda: tav.LAMB(0.125, global_clipnorm=0.5, **ACCUMULATING))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("fused", [False, True])
def test_loop_clips_half_types(fused, dtype):
    check_loop(lambda: tav.LAMB(0.125, global_clipnorm=0.5, fused=fused), dtype=dtype)


@MODES
@pytest.mark.parametrize("options", [{}, OVERWRITING, ACCUMULATING, {"clipnorm": 0.5}], ids=name_of)
@BOTH
def test_loop_on_one_device(how, options, mode):
    def optimizer():
        return tav.QHAdamW(0.125, sparse_update=how, **options)

    steps = global_batches(steps_of_two())
    have, want = (looped(strategy_of(name), optimizer, steps, mode) for name in ("one device", None))
    assert_same(have, want)


@pytest.mark.skipif(OLDEST_KERAS, reason="its count of steps cannot be assigned in a replica there")
@pytest.mark.parametrize("fused", [False, True])
@BOTH
@pytest.mark.parametrize("cls", [tav.QHAdamW, tav.LAMB])
def test_loop_with_central_storage(cls, how, fused):
    """Two replicas compute gradients of one copy of the variables, which is on a third device."""

    def optimizer():
        return cls(0.125, sparse_update=how, fused=fused)

    have = looped(strategy_of("central storage"), optimizer, steps_of_two())
    assert len(have) == 1
    assert_same(have, looped(strategy_of(None), optimizer, global_batches(steps_of_two())))


@MODES
@BOTH
@pytest.mark.parametrize("replica", [0, 1])
def test_an_id_out_of_range_in_one_replica_writes_nothing_in_any(replica, how, mode):
    step, variables = loop(strategy_of("two replicas"), lambda: tav.QHAdamW(sparse_update=how), mode)
    first, second = steps_of_two(2)
    step(first)
    before = on_each_device(variables)
    second[replica][0][-1] = 9
    with pytest.raises(tf.errors.InvalidArgumentError, match="ids of a gradient"):
        step(second)
    np.testing.assert_equal(on_each_device(variables), before)


@pytest.fixture
def in_float64():
    kept = keras.config.dtype_policy(), keras.config.floatx()
    keras.config.set_dtype_policy("float64")
    keras.config.set_floatx("float64")  # the type of losses
    yield
    keras.config.set_dtype_policy(kept[0])
    keras.config.set_floatx(kept[1])


def model(strategy, optimizer):
    keras.utils.set_random_seed(1)
    with strategy.scope():
        ids = keras.Input((3,), dtype="int64")
        words = keras.layers.Flatten()(keras.layers.Embedding(20, 4)(ids))
        made = keras.Model(ids, keras.layers.Dense(1)(keras.layers.Dense(8, "tanh")(words)))
        made.compile(optimizer(), keras.losses.MeanSquaredError(reduction="sum"))  # Keras 3.6 adds up means
    return made


IDS = np.random.default_rng(0).integers(10, size=(48, 3))
BATCHES = IDS, IDS.sum(axis=1, keepdims=True) % 5.0


def fit(made):
    """Four steps; every batch, and every replica's part of it, repeats ids."""
    made.fit(*BATCHES, batch_size=12, shuffle=False, verbose=0)


def all_of(made):
    return on_each_device([*made.weights, *made.optimizer.variables])


@pytest.mark.usefixtures("in_float64")
@pytest.mark.parametrize(
    ("cls", "options"),
    [(tav.AdamW, {}), (tav.QHAdamW, {"nu_2": 0.9}), (tav.LAMB, {}), (tav.AdamW, AVERAGING)],
    ids=name_of,
)
@BOTH
def test_fit(how, cls, options):
    def fitted(name):
        made = model(strategy_of(name), lambda: cls(0.0625, sparse_update=how, **options))
        fit(made)
        return all_of(made)

    want, one, two = (fitted(name) for name in (None, "one device", "two replicas"))
    assert (len(one), len(two)) == (1, 2)
    assert_same(one + two, want)


@pytest.mark.skipif(OLDEST_KERAS, reason="set_distribution is an AttributeError there")
@pytest.mark.parametrize("shards", [(), (None, "model")], ids=["data parallel", "model parallel"])
def test_keras_distribution_does_nothing_on_tensorflow(shards):
    """Keras itself places nothing there: one device trains, and with the same bits."""

    def fitted(distribution):
        keras.distribution.set_distribution(distribution)
        try:
            made = model(strategy_of(None), lambda: tav.LAMB(0.0625))
            fit(made)
        finally:
            keras.distribution.set_distribution(None)
        return made

    if shards:
        mesh = keras.distribution.DeviceMesh((1, 2), ["batch", "model"], ["cpu:0", "cpu:1"])
        layouts = keras.distribution.LayoutMap(mesh)
        layouts[".*kernel"] = shards
        distribution = keras.distribution.ModelParallel(layout_map=layouts, batch_dim_name="batch")
    else:
        distribution = keras.distribution.DataParallel(devices=["cpu:0", "cpu:1"])
    have = fitted(distribution)
    np.testing.assert_equal(all_of(have), all_of(fitted(None)))
    state = [*have.weights, *have.optimizer.variables]
    assert {v.value.device for v in state} == {"/job:localhost/replica:0/task:0/device:CPU:0"}


PLACES = [None, "two replicas", "three replicas"]


def lamb(place, **options):
    return model(strategy_of(place), lambda: tav.LAMB(0.0625, **options))


def loop_of(made):
    """A function that takes the steps of `fit` by `strategy.run`."""
    strategy, variables = made.distribute_strategy, made.trainable_variables

    def replica(ids, y):
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum((made(ids) - y) ** 2)
        made.optimizer.apply(tape.gradient(loss, variables), variables)

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
def saved(tmp_path_factory):
    """A function of a place: the files, but for their endings, of a model after its first `fit` there."""

    @functools.cache
    def save(place):
        made, file = lamb(place), str(tmp_path_factory.mktemp("saved") / "model")
        fit(made)
        made.save(f"{file}.keras")
        made.save_weights(f"{file}.weights.h5")
        tf.train.Checkpoint(made=made).write(file)
        return file

    return save


@functools.cache
def goes_on(place):
    """A model that others are restored into, and two functions that take steps with it."""
    made = lamb(place)
    fit(made)
    return made, [functools.partial(fit, made), loop_of(made)]


@functools.cache
def uninterrupted():
    made = lamb(None)
    fit(made)
    fit(made)
    return all_of(made)


@pytest.mark.usefixtures("in_float64")
@pytest.mark.parametrize("then", PLACES)
@pytest.mark.parametrize("first", PLACES)
def test_any_number_of_replicas_goes_on_from_any_other(first, then, saved):
    """From a file of weights and from a checkpoint, in `fit` and in a loop."""
    file = saved(first)
    made, ways = goes_on(then)
    for restore in (
        lambda: made.load_weights(f"{file}.weights.h5"),
        lambda: tf.train.Checkpoint(made=made).read(file).assert_consumed(),
    ):
        for four_steps in ways:
            restore()
            four_steps()
            have = all_of(made)
            assert len(have) == strategy_of(then).num_replicas_in_sync
            assert_same(have, uninterrupted())


@pytest.mark.usefixtures("in_float64")
@pytest.mark.parametrize("then", PLACES)
@pytest.mark.parametrize("first", PLACES)
def test_any_number_of_replicas_goes_on_with_a_model_of_any_other(first, then, saved):
    file = saved(first)  # made here, if it is the first that asks: not in the other one's scope
    with strategy_of(then).scope():
        again = keras.models.load_model(f"{file}.keras")
    fit(again)
    assert_same(all_of(again), uninterrupted())


@pytest.mark.usefixtures("in_float64")
@pytest.mark.parametrize(("first", "then"), [(None, "three replicas"), ("three replicas", "two replicas")])
def test_a_checkpoint_is_restored_before_there_are_slots(first, then, saved):
    made = lamb(then)
    tf.train.Checkpoint(made=made).read(saved(first))
    fit(made)
    assert_same(all_of(made), uninterrupted())


@pytest.mark.usefixtures("in_float64")
@pytest.mark.parametrize(("first", "then"), [("two replicas", None), (None, "two replicas")])
def test_a_model_with_lazy_updates_goes_on_elsewhere(first, then, tmp_path):
    made = lamb(first, sparse_update="lazy")
    fit(made)
    made.save(tmp_path / "model.keras")
    with strategy_of(then).scope():
        again = keras.models.load_model(tmp_path / "model.keras")
    fit(again)
    whole = lamb(None, sparse_update="lazy")
    fit(whole)
    fit(whole)
    assert_same(all_of(again), all_of(whole))
