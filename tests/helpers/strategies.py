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
    """Every device of `actual` holds what the one of `expected` does, relative to arrays' largest elements."""
    for device in actual:
        for a, e in zip(device, *expected, strict=True):
            np.testing.assert_allclose(a, e, rtol=0, atol=tolerance * np.max(np.abs(e)))
