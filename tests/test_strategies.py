"""Training on two replicas, or on a device of one's own, is training on the global batch.

What TensorFlow and Keras themselves do not do is not here. In a graph, replicas cannot meet inside a
`tf.cond`, where Keras accumulates gradients and overwrites weights by their average; eagerly they can. An
optimizer has to be built before its first step in a `tf.function` around `strategy.run`. Gradients of several
types have no sum across replicas, and XLA compiles no step of several CPUs.
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
MODES = pytest.mark.parametrize("mode", ["eager", "graph"])
ACCUMULATING = {"gradient_accumulation_steps": 2}
AVERAGING = {"use_ema": True, "ema_momentum": 0.5}
OVERWRITING = AVERAGING | {"ema_overwrite_frequency": 3}


def name_of(value):
    return ("-".join(value) or "plain") if isinstance(value, dict) else None


@functools.cache  # a second MirroredStrategy would number its collective operations as the first did
def strategy_of(name):
    """None has no strategy."""
    return {
        "two replicas": lambda: tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"]),
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


def check_loop(optimizer, mode="graph", dtype="float64"):
    have = looped(strategy_of("two replicas"), optimizer, steps_of_two(), mode, dtype)
    want = looped(strategy_of(None), optimizer, global_batches(steps_of_two()), mode, dtype)
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


@pytest.mark.parametrize(
    ("options", "mode"),
    [({}, "eager"), (AVERAGING, "graph"), (OVERWRITING, "eager"), (ACCUMULATING, "eager")],
    ids=name_of,
)
@BOTH
def test_loop_with_options(how, options, mode):
    check_loop(lambda: tav.QHAdamW(0.125, sparse_update=how, **options), mode)


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
    check_loop(lambda: tav.LAMB(0.125, global_clipnorm=0.5, **ACCUMULATING), "eager")


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
    kept = keras.config.dtype_policy()
    keras.config.set_dtype_policy("float64")
    yield
    keras.config.set_dtype_policy(kept)


def model(strategy, optimizer):
    keras.utils.set_random_seed(1)
    with strategy.scope():
        ids = keras.Input((3,), dtype="int64")
        words = keras.layers.Flatten()(keras.layers.Embedding(20, 4)(ids))
        made = keras.Model(ids, keras.layers.Dense(1)(keras.layers.Dense(8, "tanh")(words)))
        made.compile(optimizer(), keras.losses.MeanSquaredError(reduction="sum"))  # Keras 3.6 adds up means
    return made


def fit(made):
    """Four steps; every batch, and every replica's half of it, repeats ids."""
    x = np.random.default_rng(0).integers(10, size=(64, 3))
    made.fit(x, x.sum(axis=1) % 5.0, batch_size=16, shuffle=False, verbose=0)


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


@pytest.mark.usefixtures("in_float64")
@pytest.mark.parametrize(("first", "then"), [("two replicas", None), (None, "two replicas")])
@BOTH
def test_a_saved_model_goes_on_elsewhere(how, first, then, tmp_path):
    made = model(strategy_of(first), lambda: tav.LAMB(0.0625, sparse_update=how))
    fit(made)
    made.save(tmp_path / "model.keras")
    with strategy_of(then).scope():
        again = keras.models.load_model(tmp_path / "model.keras")
    fit(again)
    whole = model(strategy_of(None), lambda: tav.LAMB(0.0625, sparse_update=how))
    fit(whole)
    fit(whole)
    assert_same(all_of(again), all_of(whole))
