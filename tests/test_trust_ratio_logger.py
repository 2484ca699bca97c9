"""TrustRatioLogger: what it logs, against the definition in float64, and which steps it logs.

The model's loss is the sum of w * x over all elements of its variables. So the gradient is the batch's mean
of x, whatever the weights are.
"""

import itertools
import re

import cases
import keras
import numpy as np
import oracle
import pytest
import tensorflow as tf
from strategies import OLDEST_KERAS, strategy_of

import tf_adam_variants as tav

Logger = tav.callbacks.TrustRatioLogger
SHAPES = {"first/kernel": (5, 4), "first/bias": (4,), "table/embeddings": (6, 3)}
STEPS, RATE, INDICES = 7, 0.125, 4
RNG = np.random.default_rng(0)
# float32, which Keras makes of data; of sizes that differ widely. Two per step: one per replica.
SIZES = 10.0 ** RNG.uniform(-2, 1, 2 * STEPS)
GRADIENTS = [np.array([s * RNG.normal(size=shape) for s in SIZES], "float32") for shape in SHAPES.values()]
ROWS = RNG.normal(size=(2 * STEPS, INDICES, 3)).astype("float32")
ROW_INDICES = RNG.integers(0, 5, (2 * STEPS, INDICES)).astype("int32")  # some repeat; none is 5
START = [RNG.integers(-16, 17, shape) / 8 for shape in SHAPES.values()]  # bfloat16 holds them
START[1] *= 0  # a new layer's bias
PLAIN = {case.cls: case for case in cases.CASES if not case.terms}
EVERY = range(1, STEPS + 1)


class Product(keras.layers.Layer):
    """Sums of w * x per example; of rows of w where there are indices."""

    def __init__(self, names, **options):
        super().__init__(**options)
        self.weight_names = names

    def build(self, *_):
        self.parts = [self.add_weight(SHAPES[name], name=name.split("/")[1]) for name in self.weight_names]

    def call(self, inputs):
        weights = [w[None] for w in self.parts]
        if len(inputs) > len(weights):
            *inputs, indices = inputs
            weights = [tf.gather(tf.convert_to_tensor(self.parts[0]), indices)]
        products = [tf.cast(x, w.dtype) * w for x, w in zip(inputs, weights, strict=True)]
        return sum(tf.reduce_sum(p, range(1, p.shape.rank))[:, None] for p in products)


def make_model(optimizer, dtype="float64", sparse=False, **options):
    """The model, compiled, and its data."""
    dense = [keras.Input(SHAPES[name], dtype=dtype) for name in ("first/kernel", "first/bias")]
    table, data = [keras.Input(SHAPES["table/embeddings"], dtype=dtype)], GRADIENTS
    if sparse:
        table = [keras.Input((INDICES, 3), dtype=dtype), keras.Input((INDICES,), dtype="int32")]
        data = [*GRADIENTS[:2], ROWS, ROW_INDICES]
    first = Product(["first/kernel", "first/bias"], name="first", dtype=dtype)(dense)
    second = Product(["table/embeddings"], name="table", dtype=dtype)(table)
    model = keras.Model([*dense, *table], keras.layers.Add(dtype=dtype)([first, second]))
    model.set_weights(START)
    model.compile(optimizer, lambda y, p: p, **options)
    return model, list(data)


def make(cls, **options):
    case = PLAIN[cls]
    decay = {"weight_decay": case.oracle_kwargs["weight_decay"]} if case.decays else {}
    return cls(**({"learning_rate": RATE} | decay | options))


def fit(model, data, *callbacks, batch=1):
    y = np.zeros((len(data[0]), 1), "float32")
    batches = tf.data.Dataset.from_tensor_slices((tuple(data), y)).batch(batch, drop_remainder=True)
    return model.fit(batches.take(STEPS), shuffle=False, verbose=0, callbacks=list(callbacks)).history


def read_events(folder):
    """What the event files hold: values by tag, by step."""
    values = {}
    for file in sorted(folder.iterdir()):
        for event in tf.compat.v1.train.summary_iterator(str(file)):
            for value in event.summary.value:
                assert value.tag not in values.setdefault(event.step, {})
                values[event.step][value.tag] = tf.make_ndarray(value.tensor)
    return values


# -- the definition ------------------------------------------------------------------------------------------


def mean_gradients(step, batch, sparse):
    """Per variable. Keras 3.6 adds up the losses of replicas, later versions take their mean."""
    examples = slice(step * batch, (step + 1) * batch)
    grads = [g[examples].astype("float64") for g in GRADIENTS]
    if sparse:
        grads[2] *= 0
        for table, rows, indices in zip(grads[2], ROWS[examples], ROW_INDICES[examples], strict=True):
            np.add.at(table, indices, rows)
    return [g.sum(axis=0) if OLDEST_KERAS else g.mean(axis=0) for g in grads]


def train(
    case, *, rates=None, factor=lambda rate: rate, clipping=None, accumulate=1, sparse=None, batch=1,
    excluded=(), steps=range(STEPS), rounded=lambda gradient: gradient,
):  # fmt: skip
    """Per update and variable: weights before it, direction, decay, rows. And the weights at the end."""
    arguments = case.oracle_kwargs
    decay, lamb = arguments.pop("weight_decay", 0.0), case.rule is oracle.lamb
    weights, slots, updates = [w.copy() for w in START], [{} for _ in START], []
    sums = [0.0] * len(START)
    for count, step in enumerate(steps, start=1):
        gradients = map(rounded, mean_gradients(step, batch, sparse))
        sums = [a + g / accumulate for a, g in zip(sums, gradients, strict=True)]
        if count % accumulate:
            continue
        update, t = [], len(updates) + 1
        rate = (rates or [RATE] * 99)[t - 1]
        for i, g in enumerate(oracle.clip(sums, **(clipping or {}))):
            rows = np.any(g != 0, axis=1) if sparse == "lazy" and i == 2 else slice(None)
            own, w = 0.0 if i in excluded else decay, weights[i][rows]
            terms = arguments | ({"adapted": i not in excluded} if lamb else {})
            plain = arguments | ({"adapted": False} if lamb else {})
            old = {name: value[rows] for name, value in slots[i].items()}
            direction = w - case.rule(w, g[rows], t, dict(old), 1.0, 0.0, **plain)
            update.append((weights[i].copy(), direction, own if lamb else own * factor(rate) / rate, rows))
            weights[i][rows] = case.rule(
                w, g[rows], t, old, rate, own * (1 if lamb else factor(rate)), **terms
            )
            for name, value in old.items():
                slots[i].setdefault(name, np.zeros_like(weights[i]))[rows] = value
        updates.append(update)
        sums = [0.0] * len(START)
    return updates, weights


def define(updates, case, excluded=(), call=1):
    """What is to be logged, by update and tag; with `call` updates per call, from the weights before it."""
    numbers = {}
    low, high = (
        case.oracle_kwargs.get(f"trust_ratio_{end}", value) for end, value in (("min", 0.0), ("max", np.inf))
    )
    for t, update in enumerate(updates):
        for i, (name, (_, direction, decay, rows)) in enumerate(zip(SHAPES, update, strict=True)):
            w = updates[t // call * call][i][0][rows]
            w_norm, u_norm = np.linalg.norm(w.ravel()), np.linalg.norm((direction + decay * w).ravel())
            ratio = np.clip(w_norm / u_norm if w_norm > 0 and u_norm > 0 else 1.0, low, high)
            if case.rule is oracle.lamb and i in excluded:
                ratio = 1.0
            tags = [f"{q}/{name}" for q in ("weight_norm", "update_norm", "trust_ratio")]
            numbers.setdefault(t + 1, {}).update(zip(tags, (w_norm, u_norm, ratio), strict=True))
    return numbers


def assert_logged(folder, numbers, updates, rtol=1e-6):
    """The scalars are float32."""
    logged = read_events(folder)
    assert sorted(logged) == sorted(updates)
    for update in updates:
        scalars = {tag: value for tag, value in logged[update].items() if not tag.endswith("/all")}
        assert scalars.keys() == numbers[update].keys()
        for tag, value in scalars.items():
            message = f"{tag} of {update}"
            np.testing.assert_allclose(value, numbers[update][tag], rtol, 1e-30, err_msg=message)


def assert_weights(model, weights):
    for actual, expected in zip(model.get_weights(), weights, strict=True):
        np.testing.assert_allclose(actual, expected, rtol=1e-11, atol=1e-11)


def check(folder, model, data, case, logged=EVERY, batch=1, call=1, **kwargs):
    """Fit with a logger. What it logs and the weights at the end are those of the definition."""
    fit(model, data, Logger(folder, 1), batch=batch)
    updates, weights = train(case, batch=batch, **kwargs)
    assert_logged(folder, define(updates, case, kwargs.get("excluded", ()), call), logged)
    assert_weights(model, weights)


# -- what is logged ------------------------------------------------------------------------------------------

# How the step runs: options of the optimizer, and of `compile`.
ENGINES = {
    "fused": ({"fused": True}, {"jit_compile": False}),
    "eager": ({"fused": True}, {"run_eagerly": True}),
    "XLA": ({"fused": False}, {"jit_compile": True}),
    "formula": ({"fused": False}, {"jit_compile": False}),
}


@pytest.mark.parametrize(
    ("case", "engine"),
    list(zip(cases.CASES, itertools.cycle(ENGINES), strict=False)),
    ids=lambda value: getattr(value, "name", value),
)
def test_every_optimizer(case, engine, tmp_path):
    options, how = ENGINES[engine]
    model, data = make_model(make(case.cls, **case.terms, **options), **how)
    check(tmp_path, model, data, case)


HALVES = keras.optimizers.schedules.ExponentialDecay(RATE, 2, 0.5, staircase=True)
HALVED = [RATE * 0.5 ** (t // 2) for t in range(STEPS)]
NORM, GLOBAL = {"clipnorm": 0.5}, {"global_clipnorm": 0.5}
# The class, options of the optimizer and of `compile`, and what `check` must know.
SITUATIONS = {
    "clipnorm": (tav.LAMB, NORM, {}, {"clipping": NORM}),
    "global_clipnorm": (tav.QHAdam, GLOBAL, {}, {"clipping": GLOBAL}),
    "loss scale": (tav.AdamW, {"loss_scale_factor": 128.0}, {}, {}),
    "accumulation": (
        tav.QHAdamW,
        {"gradient_accumulation_steps": 3},
        {},
        {"accumulate": 3, "logged": [1, 2]},
    ),
    "several steps": (
        tav.LAMB,
        {},
        {"steps_per_execution": 3},
        {"call": 3, "logged": [3, 6] if OLDEST_KERAS else [3, 6, 7]},
    ),
    "schedule": (tav.LAMB, {"learning_rate": HALVES}, {}, {"rates": HALVED}),
    "scheduled decay": (
        tav.AdamW,
        {"learning_rate": HALVES, "weight_decay_mode": "schedule"},
        {},
        {"rates": HALVED, "factor": lambda rate: rate / RATE},
    ),
    "independent decay": (
        tav.QHAdamW,
        {"learning_rate": HALVES, "weight_decay_mode": "independent"},
        {},
        {"rates": HALVED, "factor": lambda rate: 1.0},
    ),
    "exclusions": (tav.LAMB, {"exclude_from_weight_decay": ["kernel"]}, {}, {"excluded": [0]}),
}


@pytest.mark.parametrize("situation", SITUATIONS)
def test_situations(situation, tmp_path):
    cls, options, how, kwargs = SITUATIONS[situation]
    model, data = make_model(make(cls, **options), jit_compile=False, **how)
    check(tmp_path, model, data, PLAIN[cls], **kwargs)


@pytest.mark.parametrize("mode", ["learning_rate", "independent"])
def test_a_learning_rate_of_0(mode, tmp_path):
    """An independent decay over a rate of 0 is not defined, and not logged."""
    model, data = make_model(make(tav.AdamW, learning_rate=0.0, weight_decay_mode=mode), run_eagerly=True)
    fit(model, data, Logger(tmp_path))
    numbers = define(train(PLAIN[tav.AdamW])[0], PLAIN[tav.AdamW])
    if mode == "independent":
        numbers[1] = {tag: n for tag, n in numbers[1].items() if tag.startswith("weight_norm")}
    assert_logged(tmp_path, numbers, [1])


@pytest.mark.parametrize(
    ("cls", "how", "engine", "options"),
    [
        (tav.LAMB, "lazy", "fused", {}),
        (tav.LAMB, "lazy", "XLA", NORM),
        (tav.QHAdamW, "lazy", "eager", {}),
        (tav.QHAdamW, "exact", "fused", {}),
        (tav.LAMB, "lazy", "formula", {"gradient_accumulation_steps": 3}),
    ],
)
def test_sparse_gradients(cls, how, engine, options, tmp_path):
    """A lazy step updates the rows that its gradient names."""
    own, compiled = ENGINES[engine]
    model, data = make_model(make(cls, sparse_update=how, **own, **options), sparse=True, **compiled)
    steps = options.get("gradient_accumulation_steps", 1)
    clipping = options if "clipnorm" in options else None
    logged = range(1, STEPS // steps + 1)
    check(tmp_path, model, data, PLAIN[cls], logged, sparse=how, clipping=clipping, accumulate=steps)


@pytest.mark.parametrize(
    ("cls", "dtype", "options"),
    [
        (tav.QHAdamW, "float16", {"master_weights": True}),
        (tav.LAMB, "bfloat16", {"master_weights": True, "fused": False}),
        (tav.AdamW, "bfloat16", {"stochastic_rounding": True}),
    ],
)
def test_half_precision(cls, dtype, options, tmp_path):
    """All updates where there are master weights; otherwise those after the first depend on rounding."""
    model, data = make_model(make(cls, **options), dtype)
    logged = EVERY if "master_weights" in options else [1]
    fit(model, data, Logger(tmp_path, 1 if "master_weights" in options else "epoch"))
    updates, _ = train(PLAIN[cls], rounded=lambda g: tf.cast(tf.cast(g, dtype), "float64").numpy())
    assert_logged(tmp_path, define(updates, PLAIN[cls]), logged, 2e-5)


@pytest.mark.parametrize(
    ("optimizer", "kwargs"),
    [
        (lambda: make(tav.QHAdamW, **NORM), {"clipping": NORM}),
        (lambda: make(tav.LAMB, sparse_update="lazy"), {"sparse": "lazy"}),
        (lambda: keras.optimizers.LossScaleOptimizer(make(tav.LAMB), initial_scale=2.0**10), {}),
    ],
    ids=["QHAdamW", "lazy", "LossScaleOptimizer"],
)
def test_two_replicas(optimizer, kwargs, tmp_path):
    with strategy_of("two replicas").scope():
        model, data = make_model(optimizer(), sparse="sparse" in kwargs)
    cls = type(getattr(model.optimizer, "inner_optimizer", model.optimizer))
    check(tmp_path, model, data, PLAIN[cls], batch=2, **kwargs)


def test_gradients_that_overflow(tmp_path):
    """LossScaleOptimizer passes over the first two steps: the third is the first update."""
    optimizer = keras.optimizers.LossScaleOptimizer(make(tav.QHAdamW), initial_scale=2.0**10)
    model, data = make_model(optimizer)
    data[1] = data[1].copy()
    data[1][:2] = np.inf
    fit(model, data, Logger(tmp_path, "epoch"))
    updates, _ = train(PLAIN[tav.QHAdamW], steps=[2, 3])
    assert_logged(tmp_path, define(updates, PLAIN[tav.QHAdamW]), [1])


@pytest.mark.parametrize("how", ["split_step", "train_step"])
def test_other_training_steps(how, tmp_path):
    """A split step, and a `train_step` whose update is in a tf.function that was traced before."""
    model, data = make_model(make(tav.LAMB, fused=True), jit_compile=False)
    if how == "split_step":
        tav.fused.split_step(model)
    else:

        @tf.function
        def apply(grads):
            model.optimizer.apply(grads, model.trainable_variables)

        def train_step(batch):
            with tf.GradientTape() as tape:
                loss = tf.reduce_mean(model(batch[0]))
            apply(tape.gradient(loss, model.trainable_variables))
            return {"loss": loss}

        model.optimizer.build(model.trainable_variables)
        apply.get_concrete_function([tf.TensorSpec(v.shape, v.dtype) for v in model.trainable_variables])
        model.train_step = train_step
    check(tmp_path, model, data, PLAIN[tav.LAMB])


@pytest.mark.parametrize("cls", PLAIN)
def test_the_training_is_the_same(cls, tmp_path):
    """Bit-exact, by the same train function, also with two loggers."""
    ends = []
    for callbacks in ([], [Logger(tmp_path / "a", 2), Logger(tmp_path / "b", 3)]):
        model, data = make_model(make(cls, fused=True), "float32", jit_compile=False)
        fit(model, data)
        function = model.train_function
        fit(model, data, *callbacks)
        assert model.train_function is function
        ends.append([v.numpy() for v in [*model.variables, *model.optimizer.variables]])
    for without, with_logger in zip(*ends, strict=True):
        np.testing.assert_array_equal(with_logger, without)
    assert sorted(read_events(tmp_path / "a")) == [8, 10, 12, 14]
    assert sorted(read_events(tmp_path / "b")) == [9, 12]


# -- which steps are logged ----------------------------------------------------------------------------------

X = np.random.default_rng(1).normal(size=(48, 5)).astype("float32")


def dense_model(optimizer, *more):
    layers = [keras.Input((5,)), keras.layers.Dense(8, "tanh", name="hidden"), *more]
    model = keras.Sequential([*layers, keras.layers.Dense(1, name="out")])
    model.compile(optimizer, "mse", run_eagerly=True)
    return model


def fit_dense(model, *callbacks, epochs=2, **options):
    options = {"x": X, "y": X[:, :1], "batch_size": 8, "shuffle": False, "verbose": 0} | options
    return model.fit(epochs=epochs, callbacks=list(callbacks), **options).history


@pytest.mark.parametrize(
    ("update_freq", "updates"),
    [("epoch", [1, 7, 13, 19]), (1, range(1, 25)), (5, [5, 10, 15, 20]), (24, [24])],
)
def test_frequencies(update_freq, updates, tmp_path):
    """The next `fit` continues the count."""
    model = dense_model("lamb")
    for _ in range(2):
        fit_dense(model, Logger(tmp_path, update_freq))
    assert sorted(read_events(tmp_path)) == list(updates)


def test_one_logger_for_several_models(tmp_path):
    logger = Logger(tmp_path, history=True)
    for layers in ([], [keras.layers.Dense(3, name="more")], []):
        history = fit_dense(dense_model("lamb", *layers), logger)
        assert np.all(np.isfinite(history["trust_ratio/hidden/kernel"]))
        assert ("trust_ratio/more/kernel" in history) == bool(layers)


def test_a_dataset_whose_length_is_not_known(tmp_path):
    batches = tf.data.Dataset.from_tensor_slices((X, X[:, :1])).batch(8).filter(lambda *_: True)
    logger = Logger(tmp_path, history=True)
    history = fit_dense(dense_model("qhadam"), logger, x=batches, y=None, batch_size=None, epochs=3)
    assert len(read_events(tmp_path)) == 3
    assert np.all(np.isfinite(history["trust_ratio/hidden/kernel"]))


def test_a_model_that_its_first_step_builds(tmp_path):
    model = keras.Sequential([keras.layers.Dense(2), keras.layers.Dense(1)])
    model.compile("lamb", "mse")
    fit_dense(model, Logger(tmp_path))
    assert sorted(read_events(tmp_path))[-1] == 7


def test_a_model_that_is_compiled_again(tmp_path):
    """Between two calls of `fit`, and within one."""
    model, logger = dense_model("lamb"), Logger(tmp_path, history=True)

    def compile_again(epoch, logs):
        model.compile(tav.QHAdam(), "mse")
        model.make_train_function()

    fit_dense(model, logger)
    model.compile(tav.AdamW(), "mse")
    history = fit_dense(model, logger, keras.callbacks.LambdaCallback(on_epoch_end=compile_again))
    assert np.all(np.isfinite(history["trust_ratio/out/kernel"]))


def test_variables_that_are_frozen_and_added(tmp_path):
    """A frozen variable takes no step. The bias corrections of an added one count from its first step."""
    model, logger = dense_model(tav.LAMB(0.0, weight_decay=0.0)), Logger(tmp_path, history=True)
    hidden = model.layers[0]
    hidden.trainable = False
    assert "trust_ratio/hidden/kernel" not in fit_dense(model, logger)
    hidden.trainable = True
    model.optimizer.build(model.trainable_variables)
    history = fit_dense(model, logger, epochs=1)
    # The first direction of an added variable is its gradient's sign: 1 per element.
    np.testing.assert_allclose(history["update_norm/hidden/kernel"], [np.sqrt(5 * 8)], rtol=1e-3)
    hidden.trainable = False
    history = fit_dense(model, logger, epochs=1)
    assert np.all(np.isnan(history["trust_ratio/hidden/kernel"]))
    assert np.all(np.isfinite(history["trust_ratio/out/kernel"]))
    assert "trust_ratio/hidden/kernel" not in read_events(tmp_path)[19]


def independent(learning_rate, **options):
    return tav.AdamW(learning_rate, weight_decay_mode="independent", **options)


NAN, ZERO = {"x": X * np.nan}, {"x": X * 0, "y": X[:, :1] * 0}


@pytest.mark.parametrize(
    ("optimizer", "data", "weights", "left_out"),
    [
        # The decay over the rate, times the weights, has a square that float32 does not hold. Biases are 0.
        (lambda: independent(1e-22), {}, None, "(update|ratio).*kernel"),
        (lambda: independent(0.0), {}, 0.0, "update|ratio"),
        (lambda: independent(0.0, exclude_from_weight_decay=["bias"]), {}, None, "(update|ratio).*kernel"),
        (lambda: independent(0.0, weight_decay=0.0), {}, None, None),
        (lambda: tav.QHAdamW(epsilon=0.0), ZERO, None, "update|ratio"),  # a direction of 0 over 0
        (lambda: tav.LAMB(), NAN, None, "ratio"),
        (lambda: tav.LAMB(), {}, np.inf, "ratio"),
        (lambda: tav.LAMB(exclude_from_layer_adaptation=["bias"]), NAN, None, "ratio.*kernel"),
    ],
)
def test_what_is_not_defined_is_not_logged(optimizer, data, weights, left_out, tmp_path):
    model = dense_model(optimizer())
    if weights is not None:
        model.set_weights([w * 0 + weights for w in model.get_weights()])
    history = fit_dense(model, Logger(tmp_path, history=True), epochs=1, batch_size=len(X), **data)
    (logged,) = read_events(tmp_path).values()
    tags = [tag for tag in history if "/" in tag]
    assert len(tags) == 12
    for tag in tags:
        if left_out and re.search(left_out, tag):
            assert tag not in logged
            assert np.isnan(history[tag])
        else:
            assert np.isfinite(logged[tag]) or (data is NAN and "update" in tag) or weights == np.inf
            np.testing.assert_allclose(history[tag], [logged[tag]], rtol=1e-6)


class Stop(keras.callbacks.Callback):
    def on_train_batch_end(self, batch, logs=None):
        if int(self.model.optimizer.iterations.numpy()) == 5:
            raise InterruptedError


@pytest.mark.parametrize("order", [1, -1])
def test_a_training_that_resumes_from_a_backup(order, tmp_path):
    """Killed after the fifth step. It ends with the weights of a whole training, and logs its numbers."""

    def run(folder, *more):
        model, data = make_model(make(tav.LAMB))
        backup = tav.callbacks.AtomicBackupAndRestore(tmp_path / "backup", save_freq=1)
        fit(model, data, *more, *[Logger(folder, 2), backup][::order])
        return model

    with pytest.raises(InterruptedError):
        run(tmp_path / "first", Stop())
    model = run(tmp_path / "second")
    updates, weights = train(PLAIN[tav.LAMB])
    numbers = define(updates, PLAIN[tav.LAMB])
    assert_logged(tmp_path / "first", numbers, [2, 4])
    assert_logged(tmp_path / "second", numbers, [6])
    assert_weights(model, weights)


# -- names, History and event files --------------------------------------------------------------------------


def test_the_history_has_what_was_logged_last_in_each_epoch(tmp_path):
    model, data = make_model(make(tav.LAMB), run_eagerly=True)
    history = fit(model, data, Logger(tmp_path, 3, history=True))
    numbers = define(train(PLAIN[tav.LAMB])[0], PLAIN[tav.LAMB])[6]
    assert set(history) == {"loss", *numbers}
    for tag, value in numbers.items():
        np.testing.assert_allclose(history[tag], [value], rtol=1e-11)
    history = fit_dense(dense_model("lamb"), Logger(tmp_path, 12, history=True), epochs=3)
    assert np.isnan(history["trust_ratio/hidden/kernel"]).tolist() == [True, False, True]
    assert "trust_ratio/hidden/kernel" not in fit_dense(dense_model("lamb"), Logger(tmp_path))


class Twice(keras.layers.Layer):
    def build(self, shape):
        self.layers = [keras.layers.Dense(5, name="same") for _ in range(2)]
        for layer in self.layers:
            layer.build(shape)

    def call(self, x):
        return self.layers[1](self.layers[0](x))


def test_names(tmp_path):
    """Paths without the model's name; equal ones have a number."""
    model = keras.Sequential([keras.Input((5,)), Twice(name="twice")], name="outer")
    model.compile("lamb", "mse", run_eagerly=True)
    fit_dense(model, Logger(tmp_path), epochs=1)
    (logged,) = read_events(tmp_path).values()
    names = [tag.removeprefix("trust_ratio/twice/same/") for tag in logged if tag.startswith("trust_ratio")]
    assert names == ["kernel", "bias", "kernel_1", "bias_1", "trust_ratio/all"]


def test_histograms_and_numbers_that_are_not_finite(tmp_path):
    model, data = make_model(make(tav.AdamW), run_eagerly=True)
    data[1] = data[1] * np.nan
    fit(model, data, Logger(tmp_path))
    (logged,) = read_events(tmp_path).values()
    assert np.isnan(logged["update_norm/first/bias"])
    values = [logged[f"update_norm/{name}"] for name in ("first/kernel", "table/embeddings")]
    left, right, counts = logged["update_norm/all"].T
    assert counts.tolist() == [1] + [0] * 28 + [1]
    np.testing.assert_allclose([left[0], right[-1]], sorted(values))


def test_tensorboard_reads_it(tmp_path):
    """Beside Keras's own callback too, which lets no summary be recorded in other steps than its own."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    theirs = keras.callbacks.TensorBoard(tmp_path / "theirs", update_freq=5, write_graph=False)
    fit_dense(dense_model("lamb"), theirs, Logger(tmp_path / "ours", 4))
    events = accumulator.EventAccumulator(str(tmp_path / "ours")).Reload()
    plugins = {t: events.SummaryMetadata(t).plugin_data.plugin_name for t in events.Tags()["tensors"]}
    assert plugins["trust_ratio/hidden/kernel"] == "scalars"
    assert plugins["trust_ratio/all"] == "histograms"
    assert [event.step for event in events.Tensors("trust_ratio/hidden/kernel")] == [4, 8, 12]


# -- errors --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "wrong"),
    [("log_dir", ["", None, 3]), ("update_freq", [0, True, 1.5, "batch"]), ("history", [1])],
)
def test_wrong_arguments(name, wrong, tmp_path):
    for value in wrong:
        with pytest.raises(ValueError, match=f"`{name}` must be.*Received: {name}={value!r}"):
            Logger(**{"log_dir": tmp_path} | {name: value})


def test_a_folder_that_is_a_file(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OSError, match=r"cannot write in `log_dir`: .*Received: log_dir=.*Take a folder"):
        fit_dense(dense_model("lamb"), Logger(tmp_path / "file", 1))


@pytest.mark.parametrize("optimizer", ["adam", None])
def test_another_optimizer_is_an_error(optimizer, tmp_path):
    with pytest.raises(ValueError, match=r"optimizer of tf_adam_variants.*Received: .*(Adam|None)"):
        fit_dense(dense_model(optimizer), Logger(tmp_path))
