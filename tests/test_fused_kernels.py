"""The ops of the fused kernels: in place, safe beside others, with checks of what they are given."""

import json
import os
import subprocess
import sys
import textwrap
import threading

import cases
import numpy as np
import pytest
import tensorflow as tf

import tf_adam_variants as tav
from tf_adam_variants.engines.coefficients import Coefficients
from tf_adam_variants.fused import _library


def list_ops(function, *args):
    graph = function.get_concrete_function(*args).graph.as_graph_def()
    nodes = [*graph.node, *(node for f in graph.library.function for node in f.node_def)]
    return [node.op for node in nodes]


def test_one_op_updates_all_variables_of_a_type():
    dtypes = ["float32", "float32", "bfloat16", "float64", "float32"]
    weights = [tf.Variable(tf.ones((3, 2), dtype)) for dtype in dtypes] + [tf.Variable(tf.ones((9, 2)))]
    optimizer = tav.QHAdamW(fused=True, global_clipnorm=1.0)
    optimizer.build(weights)

    @tf.function
    def step():
        table = tf.IndexedSlices(tf.ones((2, 2)), tf.constant([1, 1]))
        optimizer.apply([*(tf.ones_like(w) for w in weights[:-1]), table], weights)

    ops = list_ops(step)
    assert ops.count("TfAdamVariants>DenseStep") == 3
    assert ops.count("TfAdamVariants>SparseStep") == 1
    assert ops.count("TfAdamVariants>SquaredNorm") == 3
    assert not {"ResourceApplyAdam", "AssignSubVariableOp"} & set(ops)


# -- memory and threads


def make_step(cls=tav.AdamW, size=1000, **arguments):
    weights = tf.Variable(tf.zeros(size))
    optimizer = cls(0.125, fused=True, **arguments)
    optimizer.build([weights])
    return weights, tf.function(lambda g: optimizer.apply([g], [weights]))


def test_in_place_unless_somebody_holds_the_old_value():
    weights, step = make_step(weight_decay=0.0)
    step(tf.ones(1000))  # the initial value is TensorFlow's, which keeps it
    before = cases.address(weights)
    step(tf.ones(1000))
    assert cases.address(weights) == before
    old = weights.read_value()
    step(tf.ones(1000))
    assert cases.address(weights) != before
    assert np.all(old > weights)


def test_readers_see_whole_steps():
    """All elements take the same steps: a read from within a step would have two different ones."""
    weights, step = make_step(size=1 << 20)
    gradient, stop, torn = tf.ones(1 << 20), threading.Event(), []

    def read():
        while not stop.is_set():
            dense, rows = (
                weights.read_value().numpy(),
                weights.sparse_read([0, 77_777, (1 << 20) - 1]).numpy(),
            )
            if dense.min() != dense.max() or rows.min() != rows.max():
                torn.append(dense)

    readers = [threading.Thread(target=read) for _ in range(3)]
    for reader in readers:
        reader.start()
    for _ in range(60):
        step(gradient)
    stop.set()
    for reader in readers:
        reader.join()
    assert not torn


def test_steps_of_two_optimizers_at_once():
    weights = [tf.Variable(tf.zeros(1 << 16)) for _ in range(4)]
    optimizers = [tav.QHAdam(0.125, fused=True) for _ in range(2)]
    for optimizer, own in zip(optimizers, (weights, weights[::-1]), strict=True):
        optimizer.build(own)
    gradient = tf.ones(1 << 16)

    def train(optimizer, own):
        for _ in range(30):
            optimizer.apply([gradient] * 4, own)

    both = zip(optimizers, (weights, weights[::-1]), strict=True)
    threads = [threading.Thread(target=train, args=pair) for pair in both]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for own in weights:
        np.testing.assert_allclose(own.numpy(), -0.125 * 60, rtol=1e-5)  # none is lost, whoever came first


PROGRAM = """
import hashlib, sys, numpy as np, tensorflow as tf
tf.config.threading.set_intra_op_parallelism_threads(int(sys.argv[1]))
import tf_adam_variants as tav
rng = np.random.default_rng(0)
for cls in (tav.LAMB, tav.QHAdamW):
    for sparse_update in ("exact", "lazy"):
        weights = [tf.Variable(rng.normal(size=n).astype("f")) for n in (1, 300_000, 17, 70_000)]
        table = tf.Variable(rng.normal(size=(5000, 9)).astype("f"))
        optimizer = cls(0.01, fused=True, sparse_update=sparse_update, global_clipnorm=1.0)
        optimizer.build([*weights, table])
        for _ in range(3):
            grads = [tf.constant(rng.normal(size=w.shape).astype("f")) for w in weights]
            ids = tf.constant(rng.zipf(1.3, 4000) % 5000)
            slices = tf.IndexedSlices(tf.constant(rng.normal(size=(4000, 9)).astype("f")), ids)
            optimizer.apply([*grads, slices], [*weights, table])
        for v in [*weights, table, *optimizer.variables]:
            print(hashlib.sha256(v.numpy().tobytes()).hexdigest())
"""


def run_python(program, *args, **environment):
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program), *map(str, args)],
        capture_output=True, text=True, env=os.environ | environment, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


@pytest.mark.slow
def test_the_same_bits_for_any_number_of_threads():
    results = [run_python(PROGRAM, threads) for threads in (1, 2, 5)]
    assert len(results[0].split()) > 40
    assert len(set(results)) == 1


# -- where the kernels are missing, or cannot be used


@pytest.mark.slow
def test_without_the_library(tmp_path):
    """ "auto" trains on by the pure path; True says what to do; nothing is built on the way."""
    lines = run_python(
        """
        import numpy as np, tensorflow as tf, tf_adam_variants as tav
        print(tav.fused.is_available())
        weights = tf.Variable([1.0])
        tav.AdamW(0.5, weight_decay=0.0).apply([tf.ones(1)], [weights])
        print(float(weights[0]))
        try:
            tav.LAMB(fused=True)
        except ValueError as error:
            print(error)
        """,
        TF_ADAM_VARIANTS_CACHE=str(tmp_path / "empty"),
    ).splitlines()
    assert lines[0] == "False"
    assert abs(float(lines[1]) - 0.5) < 1e-6
    assert "python -m tf_adam_variants.fused build" in lines[2]
    assert "fused=True" in lines[2]
    assert not (tmp_path / "empty").exists()


def test_true_is_an_error_where_the_op_cannot_be_used():
    weights = tf.Variable(tf.ones(3))
    optimizer = tav.AdamW(fused=True)
    optimizer.build([weights])
    with pytest.raises(ValueError, match=r"fused=True.*jit_compile"):
        tf.function(lambda: optimizer.apply([tf.ones(3)], [weights]), jit_compile=True)()
    optimizer.fused = "auto"
    tf.function(lambda: optimizer.apply([tf.ones(3)], [weights]), jit_compile=True)()


@pytest.mark.slow
def test_an_optimizer_that_was_saved_with_true_can_be_loaded_anywhere(tmp_path):
    config = tav.QHAdamW(fused=True).get_config()
    assert tav.QHAdamW.from_config(config).fused is True
    program = """
        import json, sys, tensorflow as tf, tf_adam_variants as tav
        optimizer = tav.QHAdamW.from_config(json.loads(sys.argv[1]))
        print(optimizer.fused)
        try:
            optimizer.apply([tf.ones(1)], [tf.Variable([1.0])])
        except ValueError as error:
            print(error)
        """
    lines = run_python(program, json.dumps(config), TF_ADAM_VARIANTS_CACHE=str(tmp_path)).splitlines()
    assert lines[0] == "True"
    assert "python -m tf_adam_variants.fused build" in lines[1]


@pytest.mark.slow
def test_a_saved_model_with_and_without_the_op(tmp_path):
    class Trainer(tf.Module):
        def __init__(self, fused):
            self.weights = tf.Variable([1.0, 2.0])
            self.optimizer = tav.QHAdamW(0.125, fused=fused)
            self.optimizer.build([self.weights])

        @tf.function(input_signature=[tf.TensorSpec([2])])
        def train(self, gradient):
            self.optimizer.apply([gradient], [self.weights])
            return self.weights.read_value()

    program = """
        import sys, tensorflow as tf
        if sys.argv[2] == "True":
            import tf_adam_variants.fused
            assert tf_adam_variants.fused.is_available()
        trainer = tf.saved_model.load(sys.argv[1])
        print(*trainer.train([1.0, -1.0]).numpy())
        """
    results = []
    for fused in (True, False):
        trainer = Trainer(fused)
        tf.saved_model.save(trainer, str(tmp_path / str(fused)))
        results.append([float(x) for x in run_python(program, tmp_path / str(fused), fused).split()])
    np.testing.assert_allclose(*results, rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["mirrored", "workers"])
def test_a_strategy_with_one_replica(strategy):
    """Its variables are containers of one copy."""
    program = """
        import sys, keras, numpy as np, tensorflow as tf, tf_adam_variants as tav
        strategy = {
            "mirrored": lambda: tf.distribute.MirroredStrategy(["CPU:0"]),
            "workers": tf.distribute.MultiWorkerMirroredStrategy,
        }[sys.argv[1]]()
        for fused in ("auto", True):
            with strategy.scope():
                weights = tf.Variable([1.0, 2.0])
                optimizer = tav.AdamW(0.5, weight_decay=0.0, fused=fused)
                optimizer.build([weights])
            try:
                strategy.run(lambda: optimizer.apply([tf.ones(2)], [weights]))
                print(*weights.numpy().round(4))
            except ValueError as error:
                print(error)
        """
    lines = run_python(program, strategy).splitlines()
    assert lines == ["0.5 1.5"] * 2


# -- checks of the ops


def handles(*variables):
    return [variable.handle for variable in variables]


def dense_step(w, m, v, g, step=None, **attributes):
    step = [0.0] * len(Coefficients._fields) if step is None else step
    attributes = {
        "T": w[0].dtype,
        "squared_gradient": False,
        "trust_ratio": False,
        "stochastic_rounding": False,
        "velocity_hats": [],
        "master_weights": [],
        "rng_streams": list(range(len(w))),
    } | attributes
    attributes.setdefault("weight_decay", [True] * len(w))
    attributes.setdefault("layer_adaptation", [True] * len(w))
    _library.load().tf_adam_variants_dense_step(
        coefficients=tf.constant(step, tf.float64),
        variables=handles(*w),
        momentums=handles(*m),
        velocities=handles(*v),
        gradients=g,
        **attributes,
    )


def ones(*shape, dtype=tf.float32):
    return tf.Variable(tf.ones(shape, dtype))


INVALID = tf.errors.InvalidArgumentError


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (lambda w: ([w], [ones(2)], [ones(3)], [tf.ones(3)]), "shape"),
        (lambda w: ([w], [ones(3)], [ones(3)], [tf.ones(4)]), "shape"),
        (lambda w: ([w], [ones(3)], [ones(3, dtype=tf.float64)], [tf.ones(3)]), "float"),
        (lambda w: ([w], [w], [ones(3)], [tf.ones(3)]), "different"),
        (lambda w: ([w, w], [ones(3), ones(3)], [ones(3), ones(3)], [tf.ones(3)] * 2), "different"),
        (lambda w: ([w], [ones(3)], [ones(3)], [tf.ones(3)], [0.0] * 5), "step|17"),
    ],
    ids=[
        "slot's shape",
        "gradient's shape",
        "slot's type",
        "variable as slot",
        "twice",
        "scalars of the step",
    ],
)
@pytest.mark.parametrize("mode", ["eager", "graph"])
def test_the_op_checks_what_it_is_given(arguments, message, mode):
    w = ones(3)
    given = arguments(w)
    step = (lambda: dense_step(*given)) if mode == "eager" else tf.function(lambda: dense_step(*given))
    with pytest.raises((INVALID, ValueError), match=message):
        step()
    np.testing.assert_array_equal(w.numpy(), np.ones(3))


@pytest.mark.parametrize(
    ("dtype", "attributes", "message"),
    [
        (tf.float32, {"stochastic_rounding": True}, "half and bfloat16"),
        (tf.float32, {"master_weights": 1}, "half and bfloat16"),
        (tf.bfloat16, {"master_weights": 1, "stochastic_rounding": True}, "no `stochastic_rounding`"),
        (tf.bfloat16, {"master_weights": 2}, "one element a variable"),
        (tf.bfloat16, {"rng_streams": [0, 1]}, "one element a variable"),
    ],
)
@pytest.mark.parametrize("mode", ["eager", "graph"])
def test_the_op_checks_how_weights_are_rounded(dtype, attributes, message, mode):
    w, m, v, *masters = ones(3, dtype=dtype), ones(3), ones(3), ones(3), ones(3)
    attributes = attributes | {"master_weights": handles(*masters[: attributes.get("master_weights", 0)])}

    def call():
        dense_step([w], [m], [v], [tf.ones(3, dtype)], **attributes)

    with pytest.raises((INVALID, ValueError), match=message):
        (call if mode == "eager" else tf.function(call))()
    np.testing.assert_array_equal(w.numpy().astype(np.float32), np.ones(3))


@pytest.mark.parametrize("ids", [[0, 3], [-1, 0]])
def test_the_op_checks_the_rows(ids):
    w, m, v = (ones(3, 2) for _ in range(3))
    with pytest.raises(INVALID, match=r"must be in \[0, 3\).*Received: (3|-1)"):
        _library.load().tf_adam_variants_sparse_step(
            coefficients=tf.zeros(len(Coefficients._fields), tf.float64),
            variable=w.handle, momentum=m.handle, velocity=v.handle, velocity_hats=[], master_weights=[],
            values=tf.ones((2, 2)), indices=tf.constant(ids), T=tf.float32,
            squared_gradient=False, trust_ratio=False, weight_decay=True, layer_adaptation=True, exact=True,
            stochastic_rounding=False, rng_stream=0,
        )  # fmt: skip
    np.testing.assert_array_equal([w, m, v], np.ones((3, 3, 2)))
