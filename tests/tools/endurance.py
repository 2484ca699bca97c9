"""Whether memory stays flat over many steps: `make endurance`.

    python tests/tools/endurance.py --steps 20000

Python's objects are counted exactly: one that is kept a step shows after ten steps. Memory blocks, in which
numbers and strings are too, grow by some hundreds while TensorFlow's caches fill, also if nothing but
`variable.assign_add` runs. What TensorFlow keeps in C++ shows in the resident memory, after many thousands of
steps.
"""

import argparse
import contextlib
import gc
import os
import sys
import time

import keras
import numpy as np
import tensorflow as tf

import tf_adam_variants as tav

OPTIMIZERS = {
    "AdamW": lambda fused: tav.AdamW(1e-3, fused=fused, global_clipnorm=1.0),
    "LAMB, lazy": lambda fused: tav.LAMB(1e-3, fused=fused, sparse_update="lazy"),
}


def problem():
    """Variables of two types and a table, with gradients."""
    weights = [
        tf.Variable(tf.ones((8, 4))),
        tf.Variable(tf.ones(3, tf.bfloat16)),
        tf.Variable(tf.ones((16, 4))),
    ]
    slices = tf.IndexedSlices(tf.ones((3, 4)), tf.constant([5, 1, 5]), tf.constant([16, 4]))
    return weights, [tf.ones((8, 4)), tf.ones(3, tf.bfloat16), slices]


def eagerly(optimizer):
    weights, grads = problem()
    optimizer.build(weights)

    def run(steps):
        for _ in range(steps):
            optimizer.apply(grads, weights)

    return run


def retraced(optimizer, every=20):
    """A function that is new every so many steps, as from a loop that makes its own."""
    weights, grads = problem()
    optimizer.build(weights)

    def run(steps):
        for i in range(steps):
            if i % every == 0:
                step = tf.function(lambda: optimizer.apply(grads, weights))
            step()

    return run


def in_fit(optimizer, a_fit=500):
    """Steps of `fit`, so many at a time."""
    model = keras.Sequential([keras.layers.Embedding(16, 4), keras.layers.Flatten(), keras.layers.Dense(1)])
    model.compile(optimizer, "mse")
    ids = np.arange(a_fit).reshape(-1, 1) % 16
    data = tf.data.Dataset.from_tensor_slices((ids, np.sin(ids).astype("f"))).batch(1).repeat()

    def run(steps):
        for first in range(0, steps, a_fit):
            model.fit(data, steps_per_epoch=min(a_fit, steps - first), shuffle=False, verbose=0)

    return run


WAYS = {"eagerly": eagerly, "retraced": retraced, "in fit": in_fit}


def counted():
    """Python's objects, and its memory blocks."""
    for _ in range(3):
        gc.collect()
    return len(gc.get_objects()), sys.getallocatedblocks()


def growth(run, steps, warm_up):
    """How many more of each there are after so many steps."""
    run(warm_up)
    before = counted()
    run(steps)
    return tuple(after - first for first, after in zip(before, counted(), strict=True))


def resident():
    """Bytes of resident memory."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=20_000)
    parser.add_argument("--way", choices=WAYS, action="append")
    options = parser.parse_args()
    failed = False
    for way in options.way or WAYS:
        for name, make in OPTIMIZERS.items():
            for fused in (False, True):
                run, start = WAYS[way](make(fused)), time.time()
                part = options.steps // 10
                run(part)  # pools, caches and arenas fill
                first, megabytes = counted(), [resident() / 2**20]
                for _ in range(9):
                    run(part)
                    megabytes.append(resident() / 2**20)
                objects, blocks = (b - a for a, b in zip(first, counted(), strict=True))
                # Half a kilobyte a step would be seen; what the allocator keeps aside is less.
                late = megabytes[-1] - megabytes[4]
                bad = objects > 50 or blocks > options.steps / 10 or late * 2**20 > 512 * 5 * part
                failed |= bad
                memory = ", ".join(f"{megabytes[i]:.1f}" for i in (0, 4, 9))
                print(
                    f"{way}, {name}, {'fused' if fused else 'pure'}: {options.steps} steps, "
                    f"{time.time() - start:.0f} s; since step {part} {objects:+} objects, {blocks:+} blocks; "
                    f"MiB at steps {part}, {5 * part}, {10 * part}: {memory}{' IT GROWS' if bad else ''}",
                    flush=True,
                )
    return int(failed)


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        sys.exit(main())
