"""Distribution strategies on the CPU's logical devices, and what each of their devices holds."""

import functools

import keras
import numpy as np
import tensorflow as tf

OLDEST_KERAS = keras.__version__.startswith("3.6.")


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
    """Values of the variables, a list per device that has copies of its own."""
    tensors = [v.value if hasattr(v, "path") else v for v in variables]  # Keras's have a path
    copies = [v.values if isinstance(v, tf.distribute.DistributedValues) else [v] for v in tensors]
    return [[v.numpy().astype(np.float64) for v in device] for device in zip(*copies, strict=True)]


def assert_same(actual, expected, tolerance=1e-12):
    """Every device holds what the one of `expected` does, relative to the largest element of each array."""
    for device in actual:
        for a, e in zip(device, *expected, strict=True):
            np.testing.assert_allclose(a, e, rtol=0, atol=tolerance * np.max(np.abs(e)))


def make_loop(strategy, make_optimizer, mode="graph", dtype="float64"):
    """A function that takes a step of `strategy.run`, given what each replica sees, and all variables."""
    keras.utils.set_random_seed(0)
    with strategy.scope():
        layer = keras.layers.Layer(dtype=dtype)
        table, bias = layer.add_weight((9, 3), "ones"), layer.add_weight((4,), "ones")
        optimizer = make_optimizer()
        optimizer.build([table, bias])

    def replica(indices, values, dense):
        one = tf.ones((), dtype)  # makes gradients where replicas make them: on their own devices
        optimizer.apply([tf.IndexedSlices(one * values, indices), one * dense], [table, bias])

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


def run_loop(strategy, make_optimizer, steps, mode="graph", dtype="float64"):
    """What each device holds after these steps."""
    step, variables = make_loop(strategy, make_optimizer, mode, dtype)
    for replicas in steps:
        step(replicas)
    return on_each_device(variables)


def steps_of_two(count=4):
    """The indices, values and dense gradient that each of two replicas sees in each step.

    Indices repeat within replicas and across them. Quarters have exact sums in any type and order.
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
