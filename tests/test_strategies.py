"""A loop of `strategy.run` on two replicas, or on one device of several, trains on the global batch.

What TensorFlow itself does not do is not here: an optimizer has to be built before its first step in a
`tf.function` around `strategy.run`, and XLA compiles no step of several CPUs.
"""

import axes
import cases
import keras
import numpy as np
import pytest
import tensorflow as tf
from strategies import (
    OLDEST_KERAS,
    assert_same,
    global_batches,
    make_loop,
    on_each_device,
    run_loop,
    steps_of_two,
    strategy_of,
)

import tf_adam_variants as tav

TOLERANCE = {"float64": 1e-12, "float16": 2e-3, "bfloat16": 2e-2}
GRAPH_OR_EAGER = ["eager", "graph"]
ACCUMULATING = {"gradient_accumulation_steps": 2}
AVERAGING = {"use_ema": True, "ema_momentum": 0.5}
OVERWRITING = AVERAGING | {"ema_overwrite_frequency": 3}


def check_loop(optimizer, mode="graph", dtype="float64", count=4):
    actual = run_loop(strategy_of("two replicas"), optimizer, steps_of_two(count), mode, dtype)
    expected = run_loop(strategy_of(None), optimizer, global_batches(steps_of_two(count)), mode, dtype)
    assert len(actual) == 2
    assert_same(actual, expected, TOLERANCE[dtype])


@axes.pairwise(case=cases.CASES, sparse_update=["exact", "lazy"], fused=[False, True])
def test_loop(case, sparse_update, fused):
    check_loop(lambda: case.cls(0.125, **case.terms, sparse_update=sparse_update, fused=fused))


@axes.pairwise(fused=[False, True], mode=GRAPH_OR_EAGER)
def test_loop_with_a_schedule(fused, mode):
    """Each replica has a learning rate, and all are the same."""
    check_loop(
        lambda: tav.AdamW(keras.optimizers.schedules.ExponentialDecay(0.125, 2, 0.5), fused=fused), mode
    )


@axes.pairwise(
    option=[None, "master_weights", "stochastic_rounding"],
    cls=[tav.AdamW, tav.LAMB],
    sparse_update=["exact", "lazy"],
    fused=[False, True],
    dtype=["float16", "bfloat16"],
)
def test_loop_in_half_precision(option, cls, sparse_update, fused, dtype):
    """Moments are float32, gradients are not."""
    options = {option: True} if option else {}
    check_loop(lambda: cls(0.125, sparse_update=sparse_update, fused=fused, **options), dtype=dtype)


@axes.pairwise(options=[{}, {"global_clipnorm": 0.5}, AVERAGING], fused=[False, True], mode=GRAPH_OR_EAGER)
def test_variables_of_several_types(options, fused, mode):
    """TensorFlow has one sum over replicas for gradients of one type."""

    def train(place, steps):
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

    actual = train("two replicas", steps_of_two())
    expected = train(None, global_batches(steps_of_two()))
    assert len(actual) == 2
    assert_same(actual, expected, 2e-6)


@axes.pairwise(
    sparse_update=["exact", "lazy"],
    options=[AVERAGING, OVERWRITING, ACCUMULATING, OVERWRITING | ACCUMULATING],
    fused=[False, True],
    mode=GRAPH_OR_EAGER,
)
def test_loop_with_options(sparse_update, options, fused, mode):
    """Keras's accumulation, in a graph, lets replicas meet inside a `tf.cond`, where they cannot."""
    check_loop(lambda: tav.QHAdamW(0.125, sparse_update=sparse_update, fused=fused, **options), mode, count=5)


@axes.pairwise(sparse_update=["exact", "lazy"], dtype=["float16", "bfloat16"])
def test_loop_accumulates_in_half_precision(sparse_update, dtype):
    check_loop(lambda: tav.LAMB(0.125, sparse_update=sparse_update, **ACCUMULATING), dtype=dtype)


@axes.pairwise(
    sparse_update=["exact", "lazy"],
    clipping=[{"clipnorm": 0.5}, {"clipvalue": 0.5}, {"global_clipnorm": 0.5}],
    fused=[False, True],
    mode=GRAPH_OR_EAGER,
)
def test_loop_clips_the_sum_over_replicas(sparse_update, clipping, fused, mode):
    """Keras clips each replica's gradient before the sum, which is not what one device does."""
    check_loop(lambda: tav.AdamW(0.125, sparse_update=sparse_update, fused=fused, **clipping), mode)


def test_loop_clips_the_accumulated_sum():
    check_loop(lambda: tav.LAMB(0.125, global_clipnorm=0.5, **ACCUMULATING))


@axes.pairwise(fused=[False, True], dtype=["float16", "bfloat16"])
def test_loop_clips_in_half_precision(fused, dtype):
    check_loop(lambda: tav.LAMB(0.125, global_clipnorm=0.5, fused=fused), dtype=dtype)


@axes.pairwise(
    sparse_update=["exact", "lazy"],
    options=[{}, OVERWRITING, ACCUMULATING, {"clipnorm": 0.5}],
    mode=GRAPH_OR_EAGER,
)
def test_loop_on_one_device(sparse_update, options, mode):
    def optimizer():
        return tav.QHAdamW(0.125, sparse_update=sparse_update, **options)

    steps = global_batches(steps_of_two())
    actual, expected = (run_loop(strategy_of(name), optimizer, steps, mode) for name in ("one device", None))
    assert_same(actual, expected)


@pytest.mark.skipif(OLDEST_KERAS, reason="its count of steps cannot be assigned in a replica there")
@axes.pairwise(cls=[tav.QHAdamW, tav.LAMB], sparse_update=["exact", "lazy"], fused=[False, True])
def test_loop_with_central_storage(cls, sparse_update, fused):
    """Two replicas compute gradients of one copy of the variables, which is on a third device."""

    def optimizer():
        return cls(0.125, sparse_update=sparse_update, fused=fused)

    actual = run_loop(strategy_of("central storage"), optimizer, steps_of_two())
    assert len(actual) == 1
    assert_same(actual, run_loop(strategy_of(None), optimizer, global_batches(steps_of_two())))


@axes.pairwise(replica=[0, 1], sparse_update=["exact", "lazy"], mode=GRAPH_OR_EAGER)
def test_an_index_out_of_range_in_one_replica_writes_nothing_in_any(replica, sparse_update, mode):
    step, variables = make_loop(
        strategy_of("two replicas"), lambda: tav.QHAdamW(sparse_update=sparse_update), mode
    )
    first, second = steps_of_two(2)
    step(first)
    before = on_each_device(variables)
    second[replica][0][-1] = 9
    with pytest.raises(tf.errors.InvalidArgumentError, match="ids of a gradient"):
        step(second)
    np.testing.assert_equal(on_each_device(variables), before)
