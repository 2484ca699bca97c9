"""Two threads that train at once."""

import threading

import cases
import numpy as np
import pytest
import tensorflow as tf

import tf_adam_variants as tav

STEPS = 15
OPTIMIZERS = [
    lambda: tav.LAMB(0.125, sparse_update="lazy", global_clipnorm=1.0),
    lambda: tav.QHAdamW(0.125, gradient_accumulation_steps=2, clipvalue=0.5),
]


class Training:
    """An optimizer with its variables and gradients."""

    def __init__(self, make, mode, seed):
        rng = np.random.default_rng(seed)
        self.weights = [
            tf.Variable(rng.normal(size=(40, 30)).astype("f")),
            tf.Variable(rng.normal(size=7)),
            tf.Variable(rng.normal(size=(20, 4)).astype("f")),
        ]
        self.optimizer = make()
        self.step = cases.apply_in(mode, self.optimizer, self.weights)
        self.grads = [
            [
                tf.constant(rng.normal(size=(40, 30)).astype("f")),
                tf.constant(rng.normal(size=7)),
                tf.IndexedSlices(
                    tf.constant(rng.normal(size=(5, 4)).astype("f")),
                    tf.constant(rng.integers(20, size=5)),
                    tf.constant([20, 4], tf.int64),
                ),
            ]
            for _ in range(STEPS)
        ]

    def run(self, start=None):
        if start is not None:
            start.wait()  # so that all begin at once, the first tracing too
        for grads in self.grads:
            self.step(grads)

    def state(self):
        return [v.numpy() for v in (*self.weights, *self.optimizer.variables)]


def at_once(*functions):
    """Run functions in a thread each, all from the same moment on."""
    start, failures = threading.Barrier(len(functions)), []

    def guarded(function):
        try:
            function(start)
        except BaseException as failure:  # a thread's would only be printed
            failures.append(failure)

    threads = [threading.Thread(target=guarded, args=(function,)) for function in functions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures, failures


MODES = pytest.mark.parametrize("mode", [mode for mode in cases.MODES if mode != "xla"])


@MODES
def test_two_optimizers_train_as_alone(mode):
    """Bit for bit."""
    makes = [OPTIMIZERS[0], OPTIMIZERS[1], OPTIMIZERS[0]]
    alone, together = ([Training(make, mode, i) for i, make in enumerate(makes)] for _ in range(2))
    for training in alone:
        training.run()
    at_once(*(training.run for training in together))
    for one, other in zip(alone, together, strict=True):
        for expected, actual in zip(one.state(), other.state(), strict=True):
            np.testing.assert_array_equal(actual, expected)


@MODES
def test_one_optimizer_in_two_threads_on_different_variables(mode):
    """No variable's step is lost. Counts may be: Keras reads the number of steps and then writes it."""
    weights = [tf.Variable(tf.ones(1000)) for _ in range(2)]
    # Betas of 0, so that a step does not depend on how many the other thread has taken.
    optimizer = tav.QHAdam(0.125, beta_1=0.0, beta_2=0.0, nu_1=1.0)
    optimizer.build(weights)
    optimizer.fused = mode.startswith("fused")

    def train(start, variable):
        def step():
            optimizer.apply([tf.ones(1000)], [variable])

        run = step if mode.endswith("eager") else tf.function(step)
        start.wait()
        for _ in range(STEPS):
            run()

    at_once(*(lambda start, w=w: train(start, w) for w in weights))
    for w in weights:
        np.testing.assert_allclose(w, 1 - 0.125 * STEPS, rtol=1e-6)
    assert STEPS <= int(optimizer.iterations.numpy()) <= 2 * STEPS


@pytest.mark.parametrize("fused", [False, True], ids=["unfused", "fused"])
def test_lazy_rows_stay_where_two_threads_accumulate_in_one_optimizer(fused):
    """One thread has a sparse gradient of a table, the other a dense one of another variable.

    Which variables step lazily belongs to a call: kept in the optimizer, the other thread's call would
    replace it, and the table would take a dense step, which moves all rows.
    """
    steps, named = 60, [1, 4]
    table, other = tf.Variable(tf.ones((8, 3))), tf.Variable(tf.ones(5))
    optimizer = tav.AdamW(
        0.125, weight_decay=0.5, sparse_update="lazy", gradient_accumulation_steps=2, fused=fused
    )
    optimizer.build([table, other])
    slots = [v.value for v in optimizer.variables if tuple(v.shape) == (8, 3)]

    def train(start, variable, make_gradient):
        start.wait()
        for _ in range(steps):
            optimizer.apply([make_gradient()], [variable])

    def sparse():
        return tf.IndexedSlices(tf.ones((2, 3)), tf.constant(named), tf.constant([8, 3]))

    at_once(
        lambda start: train(start, table, sparse),
        lambda start: train(start, other, lambda: tf.ones(5)),
    )
    others = [row for row in range(8) if row not in named]
    assert len(slots) == 3  # two moments and the accumulated gradient
    np.testing.assert_array_equal(table.numpy()[others], 1.0)
    for slot in slots:
        np.testing.assert_array_equal(slot.numpy()[others], 0.0)
    assert np.all(table.numpy()[named] < 1.0)
    assert np.all(other.numpy() < 1.0)
