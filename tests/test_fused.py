"""The compiled op: the numbers of the pure step, in every setting, in place, and safe beside others."""

import json
import os
import subprocess
import sys
import textwrap
import threading

import cases
import hypothesis
import keras
import numpy as np
import oracle
import pytest
import tensorflow as tf
from hypothesis import strategies as st

import tf_adam_variants as tav
from tf_adam_variants.engines.coefficients import Coefficients
from tf_adam_variants.fused import _library

ALL_CASES = pytest.mark.parametrize("case", cases.CASES, ids=lambda case: case.name)
SIZES = (0, 1, 3, 17, 18011, 65536 + 1)
ULP = 2.0**-23


def ops_in(function, *args):
    graph = function.get_concrete_function(*args).graph.as_graph_def()
    nodes = [*graph.node, *(node for f in graph.library.function for node in f.node_def)]
    return [node.op for node in nodes]


@pytest.mark.parametrize("mode", ["graph", "fused graph"])
@pytest.mark.parametrize("size", SIZES[1:])
@ALL_CASES
def test_a_float32_step_is_within_4_ulps_of_the_oracle_s(case, size, mode):
    """4 units in the last place of the step, 8 where it is a product of LAMB's ratio and direction."""
    rng = np.random.default_rng(size)
    weights = rng.normal(size=size).astype(np.float32)
    gradient = (rng.normal(size=size) * 10.0 ** rng.uniform(-6, 3, size=size)).astype(np.float32)
    rate, terms = 0.0625, case.told
    have = cases.run(mode, case.cls(rate, **terms), [weights], [[gradient]], tf.float32, ["w"])[0][0]
    want = oracle.train(case.rule, [weights], [[gradient]], [rate], **terms)[0][0]
    # What cancels in a step, decay against direction, is rounded before it does.
    step = np.abs(want - weights) + 2 * terms.get("weight_decay", 0.0) * rate * np.abs(weights)
    ulps = 8 if case.cls is tav.LAMB else 4
    stores = 1 if mode == "fused graph" else 3  # TensorFlow's kernels store the decayed weights in between
    rounding = stores * 0.5 * ULP * np.maximum(np.abs(weights), np.abs(want))
    assert np.max(np.abs(have - want) / (ulps * ULP * step + rounding)) <= 1


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
@ALL_CASES
def test_special_values(case, dtype):
    """Zeros, denormals, what overflows when squared, inf and NaN: NaN where the pure step has it."""
    specials = [0.0, -0.0, 1e-40, 6e-8, 1e-30, 3e4, 1e30, np.inf, -np.inf, np.nan, 1.0, -2.0]
    numbers = np.array([(w, g) for w in specials for g in specials]).T
    if case.cls is tav.LAMB:  # what is not finite is in the norm, and below
        numbers = numbers[:, np.isfinite(numbers).all(axis=0) & (np.abs(numbers) < 1e20).all(axis=0)]
    inits, grads = [numbers[0]], [[numbers[1]], [numbers[1][::-1]]]
    with np.errstate(all="ignore"):
        pure, fused = (
            cases.run(mode, case.cls(0.125, **case.terms), inits, grads, tf.as_dtype(dtype), ["w"])
            for mode in ("graph", "fused graph")
        )
    rounding = {"float16": 2.0**-10, "bfloat16": 2.0**-7, "float32": 2e-6, "float64": 1e-14}[dtype]
    for have, want in zip(fused, pure, strict=True):
        np.testing.assert_allclose(
            have[0], want[0], rtol=rounding, atol=1e-30 if dtype != "float16" else 6e-8
        )


@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan, 1e25])
@pytest.mark.parametrize("case", cases.CASES[6:], ids=lambda case: case.name)
def test_special_gradients_of_lamb(case, bad):
    """One element's; all others meet it in the norm."""
    grads = [[np.array([1.0, bad, -0.5])], [np.array([0.25, 1.0, 2.0])]]
    pure, fused = (
        cases.run(mode, case.cls(0.125, **case.terms), [np.array([1.0, 2.0, -3.0])], grads, tf.float32, ["w"])
        for mode in ("graph", "fused graph")
    )
    for have, want in zip(fused, pure, strict=True):
        np.testing.assert_allclose(have[0], want[0], rtol=2e-6)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
@pytest.mark.parametrize("mode", ["fused eager", "fused graph"])
@ALL_CASES
def test_odd_sizes_in_one_step(case, mode, dtype):
    rng = np.random.default_rng(0)
    inits = [rng.normal(size=size) for size in SIZES]
    inits = [tf.cast(w, dtype).numpy().astype(np.float64) for w in inits]
    grads = [[tf.cast(rng.normal(size=size), dtype).numpy().astype(np.float64) for size in SIZES]]
    paths = [f"v{size}" for size in SIZES]
    have = cases.run(mode, case.cls(0.125, **case.told), inits, grads, tf.as_dtype(dtype), paths)[0]
    want = oracle.train(case.rule, inits, grads, [0.125], **case.told)[0]
    tolerance = {"float16": 2.0**-11, "bfloat16": 2.0**-8, "float32": 5e-7, "float64": 1e-14}[dtype]
    assert have[0].shape == (0,)
    for a, b in zip(have[1:], want[1:], strict=True):
        np.testing.assert_allclose(a, b, rtol=1.001 * tolerance, atol=1e-6 if dtype != "float64" else 1e-14)


CASE = st.sampled_from(cases.CASES)


@hypothesis.settings(max_examples=60, deadline=None, derandomize=True)
@hypothesis.given(
    case=CASE,
    shapes=st.lists(st.lists(st.integers(0, 40), max_size=3).map(tuple), min_size=1, max_size=5),
    rate=st.sampled_from([0.0, 2.0**-10, 0.125, 0.75]),  # 1 takes a LAMB of one weight to 0, or all but
    beta_1=st.sampled_from([0.0, 0.5, 0.9, 0.999]),
    beta_2=st.sampled_from([0.0, 0.9, 0.99, 0.9999]),
    epsilon=st.sampled_from([1e-8, 1e-3, 1.0]),
    clipping=st.sampled_from([{}, {"global_clipnorm": 0.5}, {"clipnorm": 0.25}, {"clipvalue": 0.1}]),
    seed=st.integers(0, 2**16),
)
def test_fuzz(case, shapes, rate, beta_1, beta_2, epsilon, clipping, seed):
    """Any shapes and hyperparameters, three steps in float64, against the oracle."""
    rng = np.random.default_rng(seed)
    inits = [rng.normal(size=shape) for shape in shapes]
    grads = [[rng.normal(size=shape) for shape in shapes] for _ in range(3)]
    terms = case.told | {"beta_1": beta_1, "beta_2": beta_2, "epsilon": epsilon}
    if terms.get("nu_2", 1.0) > 1:
        terms["nu_2"] = 1.0  # the root of a negative number otherwise
    paths = [f"v{i}" for i in range(len(shapes))]
    have = cases.run("fused eager", case.cls(rate, **terms, **clipping), inits, grads, tf.float64, paths)
    want = oracle.train(case.rule, inits, grads, [rate] * 3, clipping=clipping, **terms)
    for a, b in zip(have, want, strict=True):
        for x, y in zip(a, b, strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-11, atol=1e-11)


def test_one_op_updates_all_variables_of_a_type():
    dtypes = ["float32", "float32", "bfloat16", "float64", "float32"]
    weights = [tf.Variable(tf.ones((3, 2), dtype)) for dtype in dtypes] + [tf.Variable(tf.ones((9, 2)))]
    optimizer = tav.QHAdamW(fused=True, global_clipnorm=1.0)
    optimizer.build(weights)

    @tf.function
    def step():
        table = tf.IndexedSlices(tf.ones((2, 2)), tf.constant([1, 1]))
        optimizer.apply([*(tf.ones_like(w) for w in weights[:-1]), table], weights)

    ops = ops_in(step)
    assert ops.count("TfAdamVariants>DenseStep") == 3
    assert ops.count("TfAdamVariants>SparseStep") == 1
    assert ops.count("TfAdamVariants>SquaredNorm") == 3
    assert not {"ResourceApplyAdam", "AssignSubVariableOp"} & set(ops)


def trained(case, setting, fused):
    """Weights and losses of a model with two embeddings, dense layers and a frozen one."""
    keras.utils.set_random_seed(3)
    options, compiling, dtype = dict(setting), {}, None
    for name in ("run_eagerly", "steps_per_execution", "jit_compile"):
        if name in options:
            compiling[name] = options.pop(name)
    policy, wrap, constraint = (options.pop(name, None) for name in ("policy", "wrap", "constraint"))
    dtype = policy or "float32"
    ids, numbers = keras.Input((3,), dtype="int32"), keras.Input((4,))
    both = [
        keras.layers.Embedding(40, 4, dtype=dtype, embeddings_constraint=constraint)(ids),
        keras.layers.Embedding(1000, 4, dtype="float32")(ids),
    ]
    flat = keras.layers.Flatten()(keras.layers.Concatenate(dtype="float32")(both))
    frozen = keras.layers.Dense(4, trainable=False)
    hidden = keras.layers.Concatenate(dtype="float32")([flat, frozen(numbers)])
    hidden = keras.layers.Dense(16, "tanh", dtype=dtype, kernel_constraint=constraint)(hidden)
    model = keras.Model([ids, numbers], keras.layers.Dense(1, dtype="float32")(hidden))
    optimizer = case.cls(2.0**-6, **case.terms, **options, fused=fused)
    if wrap:
        optimizer = wrap(optimizer)
    model.compile(optimizer, "mse", **compiling)
    rng = np.random.default_rng(0)
    x = [rng.integers(0, 40, size=(64, 3)), rng.normal(size=(64, 4))]
    model.fit(x, x[0].sum(axis=1) % 3, batch_size=16, epochs=2, shuffle=False, verbose=0)
    return [tf.cast(w.value, tf.float64).numpy() for w in model.weights]


SETTINGS = {
    "plain": {},
    "lazy": {"sparse_update": "lazy"},
    "accumulation": {"gradient_accumulation_steps": 2},
    "lazy accumulation": {"gradient_accumulation_steps": 2, "sparse_update": "lazy"},
    "average": {"use_ema": True, "ema_overwrite_frequency": 3},
    "clipnorm": {"clipnorm": 0.05},
    "clipvalue": {"clipvalue": 0.01},
    "global_clipnorm": {"global_clipnorm": 0.05},
    "lazy global_clipnorm": {"global_clipnorm": 0.05, "sparse_update": "lazy"},
    "loss_scale_factor": {"loss_scale_factor": 1024.0},
    "constraint": {"constraint": keras.constraints.MaxNorm(0.5)},
    "bfloat16": {"policy": "bfloat16"},
    "LossScaleOptimizer": {"wrap": keras.optimizers.LossScaleOptimizer},
    "run_eagerly": {"run_eagerly": True},
    "steps_per_execution": {"steps_per_execution": 3},
    "jit_compile": {"jit_compile": True},
}


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("case", [cases.CASES[0], cases.CASES[5], cases.CASES[6]], ids=lambda case: case.name)
def test_auto_trains_as_without(case, setting):
    fused, pure = (trained(case, SETTINGS[setting], choice) for choice in ("auto", False))
    for have, want in zip(fused, pure, strict=True):
        # A bfloat16 weight may round the other way, and then goes its own way by spacings of 2^-8.
        np.testing.assert_allclose(have, want, rtol=2e-4, atol=0.02 if setting == "bfloat16" else 2e-5)


@pytest.mark.skipif(not hasattr(keras.optimizers, "MultiOptimizer"), reason="Keras is older than it")
def test_multi_optimizer():
    results = []
    for fused in ("auto", False):
        keras.utils.set_random_seed(0)
        model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(8, name="a"), keras.layers.Dense(1)])
        inner = {"a/.*": tav.AdamW(0.01, fused=fused)}
        outer = keras.optimizers.OptimizerMap(tav.LAMB(0.01, fused=fused), inner)
        model.compile(keras.optimizers.MultiOptimizer(outer), "mse")
        x = np.random.default_rng(0).normal(size=(32, 4)).astype("float32")
        before = model.get_weights()
        model.fit(x, x.sum(axis=1), epochs=2, verbose=0, shuffle=False)
        results.append(model.get_weights())
        assert not any(np.array_equal(a, b) for a, b in zip(before, results[-1], strict=True))
    for have, want in zip(*results, strict=True):
        np.testing.assert_allclose(have, want, rtol=1e-5, atol=1e-6)


def stepping(cls=tav.AdamW, size=1000, **arguments):
    weights = tf.Variable(tf.zeros(size))
    optimizer = cls(0.125, fused=True, **arguments)
    optimizer.build([weights])
    return weights, tf.function(lambda g: optimizer.apply([g], [weights]))


def test_in_place_unless_somebody_holds_the_old_value():
    weights, step = stepping(weight_decay=0.0)
    step(tf.ones(1000))  # the initial value is TensorFlow's, which keeps it
    before = cases.address(weights)
    step(tf.ones(1000))
    assert cases.address(weights) == before
    kept = weights.read_value()
    step(tf.ones(1000))
    assert cases.address(weights) != before
    assert np.all(kept > weights)


def test_readers_see_whole_steps():
    """All elements take the same steps: a read from within a step would have two different ones."""
    weights, step = stepping(size=1 << 20)
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
    for how in ("exact", "lazy"):
        weights = [tf.Variable(rng.normal(size=n).astype("f")) for n in (1, 300_000, 17, 70_000)]
        table = tf.Variable(rng.normal(size=(5000, 9)).astype("f"))
        optimizer = cls(0.01, fused=True, sparse_update=how, global_clipnorm=1.0)
        optimizer.build([*weights, table])
        for _ in range(3):
            grads = [tf.constant(rng.normal(size=w.shape).astype("f")) for w in weights]
            ids = tf.constant(rng.zipf(1.3, 4000) % 5000)
            slices = tf.IndexedSlices(tf.constant(rng.normal(size=(4000, 9)).astype("f")), ids)
            optimizer.apply([*grads, slices], [*weights, table])
        for v in [*weights, table, *optimizer.variables]:
            print(hashlib.sha256(v.numpy().tobytes()).hexdigest())
"""


def python(program, *args, **environment):
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program), *map(str, args)],
        capture_output=True, text=True, env=os.environ | environment, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_the_same_bits_for_any_number_of_threads():
    results = [python(PROGRAM, threads) for threads in (1, 2, 5, 2)]
    assert len(results[0].split()) > 40
    assert len(set(results)) == 1


def test_without_the_library(tmp_path):
    """ "auto" trains on by the pure path; True says what to do; nothing is built on the way."""
    printed = python(
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
    assert printed[0] == "False"
    assert abs(float(printed[1]) - 0.5) < 1e-6
    assert "python -m tf_adam_variants.fused build" in printed[2]
    assert "fused=True" in printed[2]
    assert not (tmp_path / "empty").exists()


def test_true_is_an_error_where_the_op_cannot_be_used():
    weights = tf.Variable(tf.ones(3))
    optimizer = tav.AdamW(fused=True)
    optimizer.build([weights])
    with pytest.raises(ValueError, match=r"fused=True.*jit_compile"):
        tf.function(lambda: optimizer.apply([tf.ones(3)], [weights]), jit_compile=True)()
    optimizer.fused = "auto"
    tf.function(lambda: optimizer.apply([tf.ones(3)], [weights]), jit_compile=True)()


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
    ("arguments", "says"),
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
def test_the_op_checks_what_it_is_given(arguments, says, mode):
    w = ones(3)
    given = arguments(w)
    step = (lambda: dense_step(*given)) if mode == "eager" else tf.function(lambda: dense_step(*given))
    with pytest.raises((INVALID, ValueError), match=says):
        step()
    np.testing.assert_array_equal(w.numpy(), np.ones(3))


@pytest.mark.parametrize(
    ("dtype", "attributes", "says"),
    [
        (tf.float32, {"stochastic_rounding": True}, "half and bfloat16"),
        (tf.float32, {"master_weights": 1}, "half and bfloat16"),
        (tf.bfloat16, {"master_weights": 1, "stochastic_rounding": True}, "no `stochastic_rounding`"),
        (tf.bfloat16, {"master_weights": 2}, "one element a variable"),
        (tf.bfloat16, {"rng_streams": [0, 1]}, "one element a variable"),
    ],
)
@pytest.mark.parametrize("mode", ["eager", "graph"])
def test_the_op_checks_how_weights_are_rounded(dtype, attributes, says, mode):
    w, m, v, *masters = ones(3, dtype=dtype), ones(3), ones(3), ones(3), ones(3)
    attributes = attributes | {"master_weights": handles(*masters[: attributes.get("master_weights", 0)])}

    def call():
        dense_step([w], [m], [v], [tf.ones(3, dtype)], **attributes)

    with pytest.raises((INVALID, ValueError), match=says):
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
        results.append([float(x) for x in python(program, tmp_path / str(fused), fused).split()])
    np.testing.assert_allclose(*results, rtol=1e-6)


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
    printed = python(program, json.dumps(config), TF_ADAM_VARIANTS_CACHE=str(tmp_path)).splitlines()
    assert printed[0] == "True"
    assert "python -m tf_adam_variants.fused build" in printed[1]


@pytest.mark.parametrize(
    "clipping", [{"global_clipnorm": 0.5}, {"clipnorm": 0.5}, {"clipvalue": 0.1}], ids=str
)
@pytest.mark.parametrize("mode", cases.MODES)
@pytest.mark.parametrize("dtypes", [("bfloat16", "bfloat16"), ("float16", "float32"), ("float64", "float32")])
def test_clipping_across_types(dtypes, mode, clipping):
    """Dense gradients and slices of several types have one norm, summed without overflow."""
    rng = np.random.default_rng(0)
    gradient, values = rng.normal(size=(300, 4)) * 10, rng.normal(size=(2, 3))
    weights = [tf.Variable(tf.ones((300, 4), dtypes[0])), tf.Variable(tf.ones((4, 3), dtypes[1]))]
    optimizer = tav.AdamW(0.125, **clipping, epsilon=1.0)
    step = cases.apply_in(mode, optimizer, weights)
    step([tf.constant(gradient, dtypes[0]), slices([1, 1], values, dtypes[1])])
    grads = [gradient, np.zeros((4, 3))]
    np.add.at(grads[1], [1, 1], values)
    terms = {"beta_1": 0.9, "beta_2": 0.999, "epsilon": 1.0, "weight_decay": 0.004}
    inits = [np.ones((300, 4)), np.ones((4, 3))]
    want = oracle.train(oracle.adamw, inits, [grads], [0.125], clipping=clipping, **terms)[0]
    for have, target, dtype in zip(weights, want, dtypes, strict=True):
        spacing = {"float16": 2.0**-9, "bfloat16": 2.0**-7, "float32": 2.0**-20, "float64": 2.0**-20}[dtype]
        np.testing.assert_allclose(tf.cast(have, tf.float64), target, rtol=spacing)


def slices(ids, values, dtype):
    return tf.IndexedSlices(tf.cast(values, dtype), tf.constant(ids))


@pytest.mark.parametrize("mode", ["eager", "fused eager"])
def test_half_slices_divided_by_a_large_loss_scale(mode):
    weights = tf.Variable(tf.ones((4, 2), tf.float16))
    optimizer = tav.AdamW(0.125, loss_scale_factor=65536.0, epsilon=1e-12, weight_decay=0.0)
    cases.apply_in(mode, optimizer, [weights])([slices([1], np.full((1, 2), 0.02), tf.float16)])
    np.testing.assert_allclose(weights[1], 0.875, rtol=1e-3)


def test_two_threads_clip_each_for_itself():
    weights = tf.Variable(tf.zeros(2))
    optimizer = tav.QHAdam(0.0, fused=True, global_clipnorm=1.0, beta_1=0.0, nu_1=1.0)
    optimizer.build([weights])
    seen = []

    def train(size):
        for _ in range(50):
            optimizer.apply([tf.fill([2], size)], [weights])
            seen.append(float(tf.norm(optimizer._momentums[0].value)))  # with beta_1 = 0 the clipped gradient

    threads = [threading.Thread(target=train, args=(size,)) for size in (10.0, 1e4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    np.testing.assert_allclose(seen, 1.0, rtol=1e-5)


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
    lines = python(program, strategy).splitlines()
    assert lines == ["0.5 1.5"] * 2
