"""Steps on a GPU that TensorFlow sees: the table of cases, placement, types, replicas.

Where there is no GPU, test_cuda.py runs this file with the kernels compiled for a CPU. TFAV_TEST_DEVICE is
then the device.
"""

import os

import cases
import keras
import numpy as np
import oracle
import pytest
import tensorflow as tf

import tf_adam_variants as tav
from tf_adam_variants import fused
from tf_adam_variants.fused import _library

DEVICE = os.environ.get("TFAV_TEST_DEVICE", "GPU:0")
KIND = DEVICE.partition(":")[0]
ALL_CASES = pytest.mark.parametrize("case", cases.CASES, ids=lambda case: case.name)
HOW = pytest.mark.parametrize("how", ["exact", "lazy"])
# XLA runs only the TensorFlow operations.
MODES = pytest.mark.parametrize("mode", cases.MODES if KIND == "GPU" else cases.MODES[3:])
SIZES = (0, 1, 3, 17, 4099)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not tf.config.list_logical_devices(KIND), reason="TensorFlow sees no GPU"),
]


@pytest.fixture(autouse=True)
def on_the_device():
    with tf.device(DEVICE):
        yield


def test_the_kernels_are_ready():
    """Not skipped: with a GPU but no kernels for it, build them first."""
    assert fused.is_available(), _library.reason()
    assert not _library.gpu_reason()


@MODES
@ALL_CASES
def test_steps(case, mode):
    inits, grads = cases.problem(4)
    have = cases.run(mode, case.cls(0.125, **case.oracle_kwargs), inits, grads)
    want = oracle.train(case.rule, inits, grads, [0.125] * 4, **case.oracle_kwargs)
    assert cases.worst(have, want) < 1e-11


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
@pytest.mark.parametrize("mode", ["fused eager", "fused graph"])
@ALL_CASES
def test_types_and_odd_sizes(case, mode, dtype):
    rng = np.random.default_rng(0)
    draw = lambda size: tf.cast(rng.normal(size=size), dtype).numpy().astype(np.float64)  # noqa: E731
    inits, grads = [draw(size) for size in SIZES], [[draw(size) for size in SIZES]]
    paths = [f"v{size}" for size in SIZES]
    have = cases.run(mode, case.cls(0.125, **case.oracle_kwargs), inits, grads, tf.as_dtype(dtype), paths)[0]
    want = oracle.train(case.rule, inits, grads, [0.125], **case.oracle_kwargs)[0]
    tolerance = {"float16": 2.0**-11, "bfloat16": 2.0**-8, "float32": 5e-7, "float64": 1e-14}[dtype]
    for a, b in zip(have[1:], want[1:], strict=True):
        np.testing.assert_allclose(a, b, rtol=1.001 * tolerance, atol=1e-6 if dtype != "float64" else 1e-14)


def sparse_step(optimizer, table, dense, mode):
    def step(ids, values, gradient):
        with tf.device(DEVICE):
            slices = tf.IndexedSlices(tf.identity(values), tf.identity(ids), dense_shape=table.shape)
            optimizer.apply([slices, tf.identity(gradient)], [table, dense])

    return cases.compiled(mode, optimizer, step)


@HOW
@pytest.mark.parametrize("mode", ["fused eager", "fused graph"])
@ALL_CASES
def test_repeated_ids(case, mode, how):
    """Beside the pure step, which other tests compare with the peers."""
    rng = np.random.default_rng(1)
    results = []
    steps = [(rng.integers(0, 6, 9), rng.normal(size=(9, 5)), rng.normal(size=3)) for _ in range(4)]
    for run in (mode, "graph"):
        table, dense = tf.Variable(np.full((8, 5), 0.5)), tf.Variable(np.ones(3))
        optimizer = case.cls(0.125, **case.oracle_kwargs, sparse_update=how)
        optimizer.build([table, dense])
        step = sparse_step(optimizer, table, dense, run)
        for ids, values, gradient in steps:
            step(tf.constant(ids), tf.constant(values), tf.constant(gradient))
        results.append([table.numpy(), dense.numpy()])
    for have, want in zip(*results, strict=True):
        np.testing.assert_allclose(have, want, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("mode", ["eager", "graph", "fused eager", "fused graph"])
def test_an_id_that_no_row_has(mode):
    table, dense = tf.Variable(np.ones((8, 5))), tf.Variable(np.ones(3))
    optimizer = tav.AdamW(0.125)
    optimizer.build([table, dense])
    step = sparse_step(optimizer, table, dense, mode)
    gradients = tf.constant([1, 8]), tf.ones((2, 5), tf.float64), tf.ones(3, tf.float64)
    with pytest.raises(tf.errors.InvalidArgumentError):
        step(*gradients)


@pytest.mark.parametrize("mode", ["fused eager", "fused graph"])
@pytest.mark.parametrize("clipping", [{"global_clipnorm": 0.5}, {"clipnorm": 0.25}, {"clipvalue": 0.1}])
def test_clipping(clipping, mode):
    inits, grads = cases.problem(3)
    have = cases.run(mode, tav.QHAdamW(0.125, weight_decay=0.25, **clipping), inits, grads)
    case = next(case for case in cases.CASES if case.cls is tav.QHAdamW)
    want = oracle.train(case.rule, inits, grads, [0.125] * 3, clipping=clipping, **case.oracle_kwargs)
    assert cases.worst(have, want) < 1e-11


def test_everything_is_on_the_device():
    weights = [tf.Variable(np.ones((3, 2), np.float32)), tf.Variable(np.ones(2, np.float32))]
    optimizer = tav.LAMB(0.125, fused=True)
    optimizer.build(weights)
    slots = [slot.value for slot in (*optimizer._momentums, *optimizer._velocities)]
    assert all(variable.device.endswith(DEVICE) for variable in (*weights, *slots))
    step = tf.function(lambda grads: optimizer.apply(grads, weights))
    gradients = [tf.ones((3, 2)), tf.ones(2)]
    graph = step.get_concrete_function(gradients).graph
    graphs = [graph, *(graph._functions[name].graph for name in getattr(graph, "_functions", {}))]
    ops = [op for one in graphs for op in one.get_operations() if op.type == "TfAdamVariants>DenseStep"]
    assert [op.device[-len(DEVICE) :] for op in ops] == [DEVICE]


def test_the_same_bits_each_time():
    def trained():
        rng = np.random.default_rng(0)
        weights = [tf.Variable(rng.normal(size=size), dtype=tf.float32) for size in (10007, 33)]
        optimizer = tav.LAMB(0.125, fused=True, global_clipnorm=1.0)
        for _ in range(3):
            optimizer.apply([tf.constant(rng.normal(size=w.shape), tf.float32) for w in weights], weights)
        return [w.numpy().tobytes() for w in weights]

    assert trained() == trained()


def test_a_read_that_is_alive_keeps_its_values():
    weights = tf.Variable(np.ones(1000, np.float32))
    optimizer = tav.AdamW(0.5, fused=True)
    held = weights.read_value()
    optimizer.apply([tf.ones(1000)], [weights])
    assert (held.numpy() == 1).all()
    assert (weights.numpy() < 1).all()


@pytest.mark.parametrize("name", ["qhadamw", "lamb"])
def test_fit(name):
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.layers.Embedding(20, 4), keras.layers.Flatten(), keras.layers.Dense(1)])
    model.compile(name, "mse", jit_compile=False)
    ids = np.arange(20)[:, None]
    history = model.fit(ids, np.sin(ids).astype(np.float32), epochs=30, batch_size=5, verbose=0).history
    assert history["loss"][-1] < history["loss"][0]


def test_variables_on_several_devices():
    with tf.device("CPU:1" if KIND == "CPU" else "CPU:0"):
        elsewhere = tf.Variable(1.0)
    here = tf.Variable(1.0)
    optimizer = tav.AdamW(0.5)
    optimizer.apply([tf.constant(1.0)] * 2, [here, elsewhere])
    assert here.numpy() == elsewhere.numpy() < 1
    optimizer = tav.AdamW(0.5, fused=True)
    with pytest.raises(ValueError, match="must all be on one CPU or GPU"):
        optimizer.apply([tf.constant(1.0)] * 2, [here, elsewhere])


@HOW
@pytest.mark.parametrize("cls", [tav.AdamW, tav.LAMB])
def test_replicas(cls, how):
    """One replica per device: their step equals one step with the sum of their gradients."""
    devices = [device.name for device in tf.config.list_logical_devices(KIND)]
    with tf.device(None):
        strategy = tf.distribute.MirroredStrategy(devices)
        with strategy.scope():
            table = tf.Variable(np.ones((6, 2)))
            optimizer = cls(0.125, sparse_update=how, fused=True)
            optimizer.build([table])

        def replica(ids):
            values = tf.ones((tf.size(ids), 2), tf.float64)
            optimizer.apply([tf.IndexedSlices(values, ids)], [table])

        ids = strategy.experimental_distribute_values_from_function(
            lambda context: tf.constant([1, 1, context.replica_id_in_sync_group])
        )
        for _ in range(2):
            strategy.run(replica, (ids,))
        alone = tf.Variable(np.ones((6, 2)))
        optimizer = cls(0.125, sparse_update=how, fused=False)
        all_ids = [i for k in range(len(devices)) for i in (1, 1, k)]
        for _ in range(2):
            values = tf.ones((len(all_ids), 2), tf.float64)
            optimizer.apply([tf.IndexedSlices(values, tf.constant(all_ids))], [alone])
    for copy in strategy.experimental_local_results(table):
        np.testing.assert_allclose(copy.numpy(), alone.numpy(), rtol=1e-12)
