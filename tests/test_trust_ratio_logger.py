"""TrustRatioLogger: what is logged, against the papers' algorithms in float64, and how it leaves a training.

The model's loss is the sum of w * x over all elements of its variables. So the gradient is the batch's mean
of x, whatever the weights are.
"""

import functools
import types

import cases
import keras
import numpy as np
import oracle
import pytest
import tensorflow as tf
from test_split_step import ops_of
from test_strategies import OLDEST_KERAS, strategy_of

import tf_adam_variants as tav

Logger = tav.callbacks.TrustRatioLogger
QUANTITIES = ("weight_norm", "update_norm", "trust_ratio")
SHAPES = {"first/kernel": (5, 4), "first/bias": (4,), "table/embeddings": (6, 3)}
STEPS, RATE, IDS = 7, 0.125, 4
RNG = np.random.default_rng(0)
# float32, which Keras makes of data; of sizes that differ widely. Two for each step: one for each replica.
SIZES = 10.0 ** RNG.uniform(-2, 1, 2 * STEPS)
GRADIENTS = {
    name: np.array([size * RNG.normal(size=shape) for size in SIZES], "float32")
    for name, shape in SHAPES.items()
}
ROWS = RNG.normal(size=(2 * STEPS, IDS, 3)).astype("float32")
ROW_IDS = RNG.integers(0, 5, (2 * STEPS, IDS)).astype("int32")  # repeated ones among them; 5 is never named
START = {name: RNG.integers(-16, 17, shape) / 8 for name, shape in SHAPES.items()}  # bfloat16 holds them
START["first/bias"] *= 0  # as a new layer's
PLAIN = {case.cls: case for case in cases.CASES if not case.terms}


class Product(keras.layers.Layer):
    """Sums of w * x for each example; of rows of w where ids are given."""

    def __init__(self, names, **options):
        super().__init__(**options)
        self.kinds = [name.rpartition("/")[2] for name in names]
        self.shapes = [SHAPES[name] for name in names]

    def build(self, *_):
        made = zip(self.shapes, self.kinds, strict=True)
        self.parts = [self.add_weight(shape, name=kind) for shape, kind in made]

    def call(self, inputs):
        if len(inputs) > len(self.parts):
            *inputs, ids = inputs
            weights = [tf.gather(tf.convert_to_tensor(self.parts[0]), ids)]
        else:
            weights = [w[None] for w in self.parts]
        products = [tf.cast(x, w.dtype) * w for x, w in zip(inputs, weights, strict=True)]
        return sum(tf.reduce_sum(p, range(1, p.shape.rank))[:, None] for p in products)


def model_of(optimizer, dtype="float64", sparse=False, **options):
    """The model, compiled, and its data."""
    dense = {name: keras.Input(SHAPES[name], dtype=dtype) for name in ("first/kernel", "first/bias")}
    table = {"table/embeddings": keras.Input((IDS, 3) if sparse else (6, 3), dtype=dtype)}
    data = [GRADIENTS["first/kernel"], GRADIENTS["first/bias"], GRADIENTS["table/embeddings"]]
    if sparse:
        table["ids"] = keras.Input((IDS,), dtype="int32")
        data = [*data[:2], ROWS, ROW_IDS]
    first = Product(list(dense), name="first", dtype=dtype)(list(dense.values()))
    second = Product(["table/embeddings"], name="table", dtype=dtype)(list(table.values()))
    inputs = [*dense.values(), *table.values()]
    model = keras.Model(inputs, keras.layers.Add(dtype=dtype)([first, second]))
    model.set_weights(list(START.values()))
    model.compile(optimizer, lambda y, p: p, **options)
    return model, data


def dataset(data, batch=1):
    """Of STEPS batches."""
    y = np.zeros((len(data[0]), 1), "float32")
    return tf.data.Dataset.from_tensor_slices((tuple(data), y)).batch(batch, drop_remainder=True).take(STEPS)


def fit(model, data, *callbacks, epochs=1, batch=1):
    options = {"epochs": epochs, "shuffle": False, "verbose": 0, "callbacks": list(callbacks)}
    return model.fit(dataset(data, batch), **options).history


def events(folder):
    """What the event files hold: values by tag, by step."""
    found = {}
    for file in sorted(folder.iterdir()):
        for event in tf.compat.v1.train.summary_iterator(str(file)):
            for value in event.summary.value:
                assert value.tag not in found.setdefault(event.step, {})
                found[event.step][value.tag] = tf.make_ndarray(value.tensor)
    return found


def gradients_of(step, batch, sparse):
    """Of each variable: the mean over the batch of what is its sum over the ids.

    Keras 3.6 adds up replicas' losses, later versions make their mean.
    """
    examples = range(step * batch, (step + 1) * batch)
    table = GRADIENTS["table/embeddings"][examples].astype("float64")
    if sparse:
        table = np.zeros((batch, *SHAPES["table/embeddings"]))
        for b, example in enumerate(examples):
            np.add.at(table[b], ROW_IDS[example], ROWS[example])
    kernel, bias = (GRADIENTS[name][examples].astype("float64") for name in ("first/kernel", "first/bias"))
    return [g.sum(axis=0) if OLDEST_KERAS else g.mean(axis=0) for g in (kernel, bias, table)]


def expected(
    case, *, rates=None, factor=lambda rate: rate, clipping=None, accumulate=1, sparse=None, batch=1,
    excluded=(), steps=range(STEPS), rounded=lambda gradient: gradient,
):  # fmt: skip
    """Norms and ratios of the updates by number, from the oracle's steps, and the weights after them."""
    told = case.told
    decay = told.pop("weight_decay", 0.0)
    lamb = case.rule is oracle.lamb
    weights, slots = [w.copy() for w in START.values()], [{} for _ in START]
    waiting, numbers, t = [0.0] * len(START), {}, 0
    for count, step in enumerate(steps):
        gradients = map(rounded, gradients_of(step, batch, sparse))
        waiting = [a + g / accumulate for a, g in zip(waiting, gradients, strict=True)]
        if (count + 1) % accumulate:
            continue
        gradients, waiting = oracle.clip(waiting, **(clipping or {})), [0.0] * len(START)
        rate, t = (rates or [RATE] * 99)[t], t + 1
        for i, (name, g) in enumerate(zip(START, gradients, strict=True)):
            rows = np.any(g != 0, axis=1) if sparse == "lazy" and name == "table/embeddings" else slice(None)
            w = weights[i][rows]
            own = 0.0 if name in excluded else decay
            kept = {slot: np.zeros_like(weights[i]) + value for slot, value in slots[i].items()}
            of_rows = {slot: value[rows] for slot, value in kept.items()}
            amount = own if lamb else own * factor(rate)
            step_of = functools.partial(case.rule, w, g[rows], t, lr=rate, decay=amount, **told)
            unadapted = {"adapted": False} if lamb else {}
            u = (w - step_of(dict(of_rows), **unadapted)) / rate
            w_norm, u_norm = np.sqrt(np.sum(w**2)), np.sqrt(np.sum(u**2))
            ratio = w_norm / u_norm if w_norm > 0 and u_norm > 0 else 1.0
            ratio = min(max(ratio, told.get("trust_ratio_min", 0.0)), told.get("trust_ratio_max", np.inf))
            if lamb and name in excluded:
                ratio = 1.0
            numbers.setdefault(t, {}).update(
                zip([f"{q}/{name}" for q in QUANTITIES], (w_norm, u_norm, ratio), strict=True)
            )
            weights[i][rows] = step_of(of_rows, **({"adapted": name not in excluded} if lamb else {}))
            for slot, value in of_rows.items():
                kept.setdefault(slot, np.zeros_like(weights[i]))[rows] = value
            slots[i] = kept
    return numbers, weights


def assert_logged(folder, numbers, updates, rtol=1e-6):
    """The scalars are float32."""
    found = events(folder)
    assert sorted(found) == sorted(updates)
    for update in updates:
        scalars = {tag: value for tag, value in found[update].items() if not tag.endswith("/all")}
        assert scalars.keys() == numbers[update].keys()
        for tag, value in scalars.items():
            np.testing.assert_allclose(
                value, numbers[update][tag], rtol=rtol, atol=1e-30, err_msg=f"{tag} of {update}"
            )


def assert_weights(model, weights, rtol=1e-11):
    for have, want in zip(model.get_weights(), weights, strict=True):
        np.testing.assert_allclose(have, want, rtol=rtol, atol=rtol)


# -- what is logged ------------------------------------------------------------------------------------------

EVERY = pytest.mark.parametrize("cls", PLAIN, ids=lambda cls: cls.__name__)
# How the step is run: what the optimizer is told, and `compile`.
ENGINES = {
    "op": ({"fused": True}, {"jit_compile": False}),
    "pure": ({"fused": False}, {"jit_compile": False}),
    "XLA": ({"fused": False}, {"jit_compile": True}),
    "eager": ({"fused": True}, {"run_eagerly": True}),
}


def made(case, **options):
    decay = {"weight_decay": case.told["weight_decay"]} if case.decays else {}
    return case.cls(**({"learning_rate": RATE} | case.terms | decay | options))


@pytest.mark.parametrize(
    ("case", "engine"),
    [(case, engine) for case in cases.CASES for engine in ENGINES if engine == "op" or not case.terms],
    ids=lambda value: getattr(value, "name", value),
)
def test_every_update_of_every_optimizer(case, engine, tmp_path):
    options, how = ENGINES[engine]
    model, data = model_of(made(case, **options), **how)
    fit(model, data, Logger(tmp_path, 1))
    numbers, weights = expected(case)
    assert_logged(tmp_path, numbers, range(1, STEPS + 1))
    assert_weights(model, weights)


def scaled(case, **options):
    return keras.optimizers.LossScaleOptimizer(made(case, **options), initial_scale=2.0**10)


HALVES = tf.keras.optimizers.schedules.ExponentialDecay(RATE, 2, 0.5, staircase=True)
HALVED = [RATE * 0.5 ** (t // 2) for t in range(STEPS)]
# What the optimizer, `compile` and the oracle are told, and which updates are logged.
SITUATIONS = {
    "clipnorm": ({"clipnorm": 0.5}, {}, {"clipping": {"clipnorm": 0.5}}, range(1, 8)),
    "clipvalue": ({"clipvalue": 0.25}, {}, {"clipping": {"clipvalue": 0.25}}, range(1, 8)),
    "global_clipnorm": ({"global_clipnorm": 0.5}, {}, {"clipping": {"global_clipnorm": 0.5}}, range(1, 8)),
    "constant loss scale": ({"loss_scale_factor": 128.0}, {}, {}, range(1, 8)),
    "steps_per_execution": ({}, {"steps_per_execution": 3}, {}, [3, 6] if OLDEST_KERAS else [3, 6, 7]),
    "accumulation": ({"gradient_accumulation_steps": 3}, {}, {"accumulate": 3}, [1, 2]),
    "both": ({"gradient_accumulation_steps": 2}, {"steps_per_execution": 3}, {"accumulate": 2}, [1, 3]),
    "schedule": ({"learning_rate": HALVES}, {}, {"rates": HALVED}, range(1, 8)),
    "exclusions": (
        {"exclude_from_weight_decay": ["kernel"]},
        {},
        {"excluded": ("first/kernel",)},
        range(1, 8),
    ),
}


@EVERY
@pytest.mark.parametrize("situation", SITUATIONS)
def test_situations(situation, cls, tmp_path):
    options, how, told, updates = SITUATIONS[situation]
    model, data = model_of(made(PLAIN[cls], **options), jit_compile=False, **how)
    fit(model, data, Logger(tmp_path, 1))
    numbers, weights = expected(PLAIN[cls], **told)
    assert_logged(tmp_path, numbers, updates)
    assert_weights(model, weights)


@pytest.mark.parametrize("mode", ["schedule", "independent"])
@pytest.mark.parametrize("cls", [tav.AdamW, tav.QHAdamW])
def test_modes_of_weight_decay(cls, mode, tmp_path):
    model, data = model_of(made(PLAIN[cls], weight_decay_mode=mode, learning_rate=HALVES))
    fit(model, data, Logger(tmp_path, 1))
    factor = {"schedule": lambda rate: rate / RATE, "independent": lambda rate: 1.0}[mode]
    numbers, weights = expected(PLAIN[cls], rates=HALVED, factor=factor)
    assert_logged(tmp_path, numbers, range(1, STEPS + 1))
    assert_weights(model, weights)


def test_a_learning_rate_of_0(tmp_path):
    """Of which no step could be divided."""
    model, data = model_of(made(PLAIN[tav.AdamW], learning_rate=0.0))
    fit(model, data, Logger(tmp_path))
    numbers, _ = expected(PLAIN[tav.AdamW])
    assert_logged(tmp_path, numbers, [1])


@pytest.mark.parametrize(
    ("cls", "engine"),
    [(cls, engine) for cls in PLAIN for engine in ENGINES if engine == "op" or cls is tav.LAMB],
)
@pytest.mark.parametrize("how", ["exact", "lazy"])
def test_sparse_gradients(how, cls, engine, tmp_path):
    options, compiled = ENGINES[engine]
    model, data = model_of(made(PLAIN[cls], sparse_update=how, **options), sparse=True, **compiled)
    fit(model, data, Logger(tmp_path, 1))
    numbers, weights = expected(PLAIN[cls], sparse=how)
    assert_logged(tmp_path, numbers, range(1, STEPS + 1))
    assert_weights(model, weights)


@pytest.mark.parametrize("engine", ["op", "XLA"])
@pytest.mark.parametrize("options", [{"gradient_accumulation_steps": 3}, {"clipnorm": 0.5}], ids=str)
def test_lazy_rows_of_gradients_that_were_changed(options, engine, tmp_path):
    own, how = ENGINES[engine]
    optimizer = made(PLAIN[tav.LAMB], sparse_update="lazy", **own, **options)
    model, data = model_of(optimizer, sparse=True, **how)
    fit(model, data, Logger(tmp_path, 1))
    steps = options.get("gradient_accumulation_steps", 1)
    clipping = None if steps > 1 else options
    numbers, _ = expected(PLAIN[tav.LAMB], sparse="lazy", accumulate=steps, clipping=clipping)
    assert_logged(tmp_path, numbers, range(1, STEPS // steps + 1))


@pytest.mark.parametrize("cls", [tav.QHAdamW, tav.LAMB])
def test_gradients_that_overflow(cls, tmp_path):
    """LossScaleOptimizer passes over the third step: the next one is the third update."""
    model, data = model_of(scaled(PLAIN[cls]))
    data[1] = data[1].copy()
    data[1][2] = np.inf
    fit(model, data, Logger(tmp_path, 1))
    numbers, weights = expected(PLAIN[cls], steps=[0, 1, 3, 4, 5, 6])
    assert_logged(tmp_path, numbers, range(1, STEPS))
    assert_weights(model, weights)


def test_a_logged_step_that_overflows_is_made_up_for(tmp_path):
    model, data = model_of(scaled(PLAIN[tav.LAMB]))
    data[1] = data[1].copy()
    data[1][:2] = np.inf
    fit(model, data, Logger(tmp_path, "epoch"))
    assert_logged(tmp_path, expected(PLAIN[tav.LAMB], steps=[2, 3])[0], [1])


@pytest.mark.parametrize(
    ("cls", "dtype", "options"),
    [
        *((cls, "float16", {"master_weights": True}) for cls in PLAIN),
        *((cls, "bfloat16", {"master_weights": True, "fused": False}) for cls in PLAIN),
        (tav.QHAdamW, "float16", {"fused": False}),
        (tav.LAMB, "float16", {}),
        (tav.AdamW, "bfloat16", {"stochastic_rounding": True}),
        (tav.LAMB, "bfloat16", {"stochastic_rounding": True}),
    ],
)
def test_half_types(cls, dtype, options, tmp_path):
    """All updates where there are master weights; otherwise those after the first depend on rounding."""
    model, data = model_of(made(PLAIN[cls], **options), dtype)
    fit(model, data, Logger(tmp_path, 1 if "master_weights" in options else "epoch"))
    rounded = lambda g: tf.cast(tf.cast(g, dtype), "float64").numpy()  # noqa: E731
    numbers, _ = expected(PLAIN[cls], rounded=rounded)
    assert_logged(tmp_path, numbers, range(1, STEPS + 1) if "master_weights" in options else [1], 2e-5)


@pytest.mark.parametrize(
    ("cls", "how", "fused"),
    [
        *((cls, None, True) for cls in PLAIN),
        *((tav.LAMB, how, fused) for how in ("exact", "lazy") for fused in (True, False)),
    ],
)
def test_two_replicas(cls, how, fused, tmp_path):
    optimizer = functools.partial(made, PLAIN[cls], fused=fused, clipnorm=0.5, sparse_update=how or "exact")
    with strategy_of("two replicas").scope():
        model, data = model_of(optimizer(), sparse=how is not None)
    fit(model, data, Logger(tmp_path, 1), batch=2)
    numbers, weights = expected(PLAIN[cls], batch=2, sparse=how, clipping={"clipnorm": 0.5})
    assert_logged(tmp_path, numbers, range(1, STEPS + 1))
    assert_weights(model, weights)


@pytest.mark.parametrize(
    "wrapped", [lambda: made(PLAIN[tav.LAMB], gradient_accumulation_steps=3), lambda: scaled(PLAIN[tav.LAMB])]
)
def test_two_replicas_and_conditions(wrapped, tmp_path):
    with strategy_of("two replicas").scope():
        model, data = model_of(wrapped())
    fit(model, data, Logger(tmp_path, 1), batch=2)
    steps = 1 if hasattr(model.optimizer, "inner_optimizer") else 3
    numbers, weights = expected(PLAIN[tav.LAMB], batch=2, accumulate=steps)
    assert_logged(tmp_path, numbers, range(1, STEPS // steps + 1))
    assert_weights(model, weights)


@pytest.mark.parametrize("place", ["one device", "three replicas"])
def test_within_the_scope_of_a_strategy(place, tmp_path):
    """Where a variable is one on each replica, that for the norms too."""
    with strategy_of(place).scope():
        model, data = model_of(made(PLAIN[tav.LAMB]))
        batch = 3 if place == "three replicas" else 1
        data = [np.repeat(part[:STEPS], batch, axis=0) for part in data]
        fit(model, data, Logger(tmp_path, 1), batch=batch)
    rtol = 1e-5 if OLDEST_KERAS else 1e-6  # its gradients are three times as large, and epsilon is not
    assert_logged(tmp_path, expected(PLAIN[tav.LAMB])[0], range(1, STEPS + 1), rtol)


class Seen(keras.callbacks.Callback):
    """The train function of each step. It comes after the logger."""

    def __init__(self):
        super().__init__()
        self.functions = []

    def on_train_batch_begin(self, batch, logs=None):
        self.functions.append(self.model.train_function)


@EVERY
def test_a_split_step(cls, tmp_path):
    """It is split after a logged step too, and the logged one is."""
    model, data = model_of(made(PLAIN[cls], fused=True))
    tav.fused.split_step(model)
    split, logger, seen = model.train_function, Logger(tmp_path, 2), Seen()
    fit(model, data, logger, seen)
    numbers, weights = expected(PLAIN[cls])
    assert_logged(tmp_path, numbers, [2, 4, 6])
    assert_weights(model, weights)
    assert model.train_function is split
    assert [function is split for function in seen.functions] == [True, False, True, False, True, False, True]
    for function in (split, logger._watched):
        assert "TfAdamVariants>DenseStep" in ops_of(types.SimpleNamespace(train_function=function))


# -- what a training is left as ------------------------------------------------------------------------------


def dense_model(optimizer, *more, **options):
    keras.utils.set_random_seed(1)
    model = keras.Sequential([keras.Input((5,)), keras.layers.Dense(8, "tanh"), *more, keras.layers.Dense(1)])
    model.compile(optimizer, "mse", **options)
    return model


X = np.random.default_rng(1).normal(size=(48, 5)).astype("float32")


def trained(model, *callbacks, epochs=2, **options):
    options = {"x": X, "y": X[:, :1], "batch_size": 8, "shuffle": False, "verbose": 0} | options
    return model.fit(epochs=epochs, callbacks=list(callbacks), **options).history


def state(model):
    return [v.numpy() for v in [*model.variables, *model.optimizer.variables]]


UNCHANGED = {
    "op": ({"fused": True}, {"jit_compile": False}),
    "pure": ({"fused": False}, {"jit_compile": False}),
    "eager": ({"fused": True}, {"run_eagerly": True}),
    "averages": ({"use_ema": True, "ema_overwrite_frequency": 2}, {}),
    "accumulation": ({"gradient_accumulation_steps": 3}, {}),
    "global norm": ({"global_clipnorm": 0.1}, {"steps_per_execution": 2}),
    "XLA": ({}, {"jit_compile": True}),
}


@pytest.mark.parametrize(
    ("how", "cls"),
    [(how, cls) for how in UNCHANGED for cls in PLAIN if how == "op" or cls is tav.LAMB],
)
def test_the_training_is_the_same(how, cls, tmp_path):
    """Bit for bit; where XLA compiles it, to rounding."""
    options, compiled = UNCHANGED[how]
    ends = []
    for callbacks in ([], [Logger(tmp_path, 2)]):
        model, data = model_of(made(PLAIN[cls], **options), "float32", **compiled)
        fit(model, data, *callbacks, epochs=2)
        ends.append(state(model))
    assert events(tmp_path)
    for before, after in zip(*ends, strict=True):
        if how == "XLA":
            np.testing.assert_allclose(after, before, rtol=1e-6)
        else:
            np.testing.assert_array_equal(after, before)


class Counter(keras.layers.Layer):
    """How often it is traced."""

    traces = 0

    def call(self, x):
        self.traces += 1
        return x


@pytest.mark.parametrize("split", [False, True], ids=["whole", "split"])
def test_steps_that_are_not_logged_are_those_without_the_callback(split, tmp_path):
    """The same function object, which is traced no more; nor is the logged one, after the first time."""
    counter = Counter()
    model = dense_model("lamb", counter)
    if split:
        tav.fused.split_step(model)
    trained(model)
    plain, before = model.train_function, counter.traces
    traces = plain_traces(model)
    logger, seen = Logger(tmp_path, 3), Seen()
    trained(model, logger, seen, epochs=3)
    logged = [function is not plain for function in seen.functions]
    assert logged == [False, False, True] * 6
    assert model.train_function is plain
    assert plain_traces(model) == traces
    first = counter.traces
    assert (
        first == before if split else first > before
    )  # a split one has its gradients from the same function
    trained(model, logger, epochs=3)
    assert counter.traces == first
    assert model.train_function is plain


def plain_traces(model):
    function = model.train_function
    around = [cell.cell_contents for cell in getattr(function, "__closure__", ())]
    steps = [f for f in (function, *around) if isinstance(f, tf.types.experimental.PolymorphicFunction)]
    return [f.experimental_get_tracing_count() for f in steps]


def test_an_error_in_a_logged_step_leaves_the_train_function(tmp_path):
    model = dense_model("lamb", run_eagerly=True)
    trained(model)
    plain = model.train_function

    def broken(data):
        raise InterruptedError

    logger = Logger(tmp_path, 1)
    model.train_step = broken
    with pytest.raises(InterruptedError):
        trained(model, logger)
    assert model.train_function is plain
    assert model.optimizer._watcher is None


# -- which steps are logged ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("update_freq", "updates"),
    [("epoch", [1, 7, 13, 19]), (1, range(1, 25)), (5, [5, 10, 15, 20]), (24, [24])],
)
def test_frequencies(update_freq, updates, tmp_path):
    """Counted on in the next `fit`."""
    model = dense_model("lamb")
    for _ in range(2):
        trained(model, Logger(tmp_path, update_freq))
    assert sorted(events(tmp_path)) == list(updates)


def test_one_logger_for_several_models(tmp_path):
    logger = Logger(tmp_path, history=True)
    for layers in ([], [keras.layers.Dense(3, name="more")], []):
        keras.utils.clear_session(free_memory=False)  # names begin anew
        history = trained(dense_model("lamb", *layers), logger)
        assert np.all(np.isfinite(history["trust_ratio/dense/kernel"]))
        assert ("trust_ratio/more/kernel" in history) == bool(layers)


def test_a_dataset_whose_length_is_not_known(tmp_path):
    model = dense_model("qhadam")
    batches = tf.data.Dataset.from_tensor_slices((X, X[:, :1])).batch(8).filter(lambda *_: True)
    history = trained(model, Logger(tmp_path, history=True), x=batches, y=None, batch_size=None, epochs=3)
    assert len(events(tmp_path)) == 3
    assert np.all(np.isfinite(history["trust_ratio/dense/kernel"]))


def test_a_model_that_is_built_by_its_first_step(tmp_path):
    model = keras.Sequential([keras.layers.Dense(2), keras.layers.Dense(1)])
    model.compile("lamb", "mse")
    trained(model, Logger(tmp_path))
    assert sorted(events(tmp_path))[-1] == 7


def test_compiled_anew(tmp_path):
    """Between two calls of `fit`, also to be split; and within one."""
    model, logger = dense_model("lamb"), Logger(tmp_path)
    trained(model, logger)
    model.compile(tav.AdamW(), "mse")
    tav.fused.split_step(model)
    split = model.train_function
    trained(model, logger)
    assert model.train_function is split

    def compile_again(epoch, logs):
        model.compile(tav.QHAdam(), "mse")
        model.make_train_function()

    trained(model, logger, keras.callbacks.LambdaCallback(on_epoch_end=compile_again))
    assert logger._optimizer.name == "qhadam"


def test_variables_that_are_added(tmp_path):
    model = dense_model("lamb")
    model.layers[0].trainable = False
    model.compile("lamb", "mse")
    logger = Logger(tmp_path, history=True)
    assert "trust_ratio/dense/kernel" not in trained(model, logger)
    model.layers[0].trainable = True
    model.optimizer.build(model.trainable_variables)
    model.compile(model.optimizer, "mse")
    assert np.all(np.isfinite(trained(model, logger)["trust_ratio/dense/kernel"]))


def test_variables_that_are_frozen(tmp_path):
    """They have slots, and take no step."""
    model = dense_model("lamb")
    trained(model)
    model.layers[0].trainable = False
    model.compile(model.optimizer, "mse")
    history = trained(model, Logger(tmp_path, history=True))
    assert np.all(np.isnan(history["trust_ratio/dense/kernel"]))
    assert np.all(np.isfinite(history["trust_ratio/dense_1/kernel"]))
    (first, _) = events(tmp_path).values()
    assert "trust_ratio/dense/kernel" not in first


# -- names, History and event files --------------------------------------------------------------------------


def test_the_history_has_what_was_logged_last_in_each_epoch(tmp_path):
    model, data = model_of(made(PLAIN[tav.LAMB]))
    history = fit(model, data, Logger(tmp_path, 3, history=True))
    numbers, _ = expected(PLAIN[tav.LAMB])
    assert set(history) == {"loss", *numbers[6]}
    for tag, value in numbers[6].items():
        np.testing.assert_allclose(history[tag], [value], rtol=1e-11)
    history = trained(dense_model("lamb"), Logger(tmp_path, 12, history=True), epochs=3)
    assert np.isnan(history["trust_ratio/dense/kernel"]).tolist() == [True, False, True]
    assert "trust_ratio/dense/kernel" not in trained(dense_model("lamb"), Logger(tmp_path))


def test_names(tmp_path):
    """Paths without the model's name; those that are the same are numbered."""
    inner = [keras.layers.Dense(3, name="same") for _ in range(2)]
    model = keras.Sequential(
        [keras.Input((5,)), Twice(inner, name="twice"), keras.layers.Dense(1)], name="outer"
    )
    model.compile("lamb", "mse")
    trained(model, Logger(tmp_path), epochs=1)
    (found,) = events(tmp_path).values()
    assert [tag for tag in found if tag.startswith("trust_ratio/")] == [
        *(f"trust_ratio/twice/same/{kind}" for kind in ("kernel", "bias", "kernel_1", "bias_1")),
        *(f"trust_ratio/dense/{kind}" for kind in ("kernel", "bias")),
        "trust_ratio/all",
    ]


class Twice(keras.layers.Layer):
    def __init__(self, layers, **options):
        super().__init__(**options)
        self.layers = layers

    def build(self, shape):
        for layer in self.layers:
            layer.build(shape)
            shape = (None, 3)

    def call(self, x):
        return self.layers[1](self.layers[0](x))


def test_histograms(tmp_path):
    model, data = model_of(made(PLAIN[tav.AdamW]))
    fit(model, data, Logger(tmp_path))
    numbers, _ = expected(PLAIN[tav.AdamW])
    (found,) = events(tmp_path).values()
    for quantity in QUANTITIES:
        values = [value for tag, value in numbers[1].items() if tag.startswith(quantity)]
        left, right, counts = found[f"{quantity}/all"].T
        assert counts.sum() == len(values)
        np.testing.assert_allclose([left[0], right[-1]], [min(values), max(values)])
        for value in values:
            assert counts[(left <= value * (1 + 1e-9)) & (value * (1 - 1e-9) <= right)].sum() > 0


def test_numbers_that_are_not_finite(tmp_path):
    model, data = model_of(made(PLAIN[tav.LAMB]))
    data[1] = data[1] * np.nan
    fit(model, data, Logger(tmp_path))
    (found,) = events(tmp_path).values()
    assert np.isnan(found["update_norm/first/bias"])
    assert np.isfinite(found["update_norm/first/kernel"])
    assert found["update_norm/all"][:, 2].sum() == 2


def test_tensorboard_reads_it(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    trained(dense_model("lamb"), Logger(tmp_path))
    read = accumulator.EventAccumulator(str(tmp_path)).Reload()
    tags = read.Tags()["tensors"]
    plugins = {tag: read.SummaryMetadata(tag).plugin_data.plugin_name for tag in tags}
    assert plugins["trust_ratio/dense/kernel"] == "scalars"
    assert plugins["trust_ratio/all"] == "histograms"
    assert [event.step for event in read.Tensors("trust_ratio/dense/kernel")] == [1, 7]


def test_beside_keras_s_tensorboard_callback(tmp_path):
    """Which lets no summary be recorded in other steps than its own."""
    pytest.importorskip("tensorboard")
    theirs = keras.callbacks.TensorBoard(tmp_path / "theirs", update_freq=5, write_graph=False)
    trained(dense_model("lamb"), theirs, Logger(tmp_path / "ours", 4))
    assert sorted(events(tmp_path / "ours")) == [4, 8, 12]


# -- beside AtomicBackupAndRestore ---------------------------------------------------------------------------


@pytest.mark.parametrize("order", [1, -1])
def test_a_training_that_goes_on_from_a_backup(order, tmp_path):
    """Killed after the fifth step. The weights end as those without a kill, and so do the numbers."""

    class Stop(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            if int(self.model.optimizer.iterations.numpy()) == 5:
                raise InterruptedError

    def run(folder, *more):
        model, data = model_of(made(PLAIN[tav.LAMB]))
        backup = tav.callbacks.AtomicBackupAndRestore(tmp_path / "backup", save_freq=1)
        callbacks = [Logger(folder, 2), backup][::order]
        fit(model, data, *more, *callbacks)
        return model

    with pytest.raises(InterruptedError):
        run(tmp_path / "first", Stop())
    model = run(tmp_path / "second")
    numbers, weights = expected(PLAIN[tav.LAMB])
    assert_weights(model, weights)
    assert_logged(tmp_path / "first", numbers, [2, 4])
    found = sorted(events(tmp_path / "second"))
    assert_logged(tmp_path / "second", numbers, found)
    if order == -1:
        assert found == [6]
    assert model.train_function.__qualname__.startswith("TensorFlowTrainer")


# -- errors --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrong",
    [
        {"log_dir": ""},
        {"log_dir": None},
        {"log_dir": 3},
        {"update_freq": 0},
        {"update_freq": True},
        {"update_freq": 1.5},
        {"update_freq": "batch"},
        {"history": 1},
    ],
    ids=str,
)
def test_wrong_arguments(wrong, tmp_path):
    ((name, value),) = wrong.items()
    with pytest.raises(ValueError, match=f"`{name}` must be.*Received: {name}={value!r}"):
        Logger(**{"log_dir": tmp_path} | wrong)


@pytest.mark.parametrize("optimizer", ["adam", None])
def test_another_optimizer_is_an_error(optimizer, tmp_path):
    model = dense_model(optimizer)
    with pytest.raises(ValueError, match=r"optimizer of tf_adam_variants.*Received: .*(Adam|None)"):
        trained(model, Logger(tmp_path))


def test_two_loggers_are_an_error(tmp_path):
    with pytest.raises(ValueError, match="one TrustRatioLogger"):
        trained(dense_model("lamb"), Logger(tmp_path), Logger(tmp_path))


def test_a_step_in_a_function_of_its_own_is_an_error(tmp_path):
    class Own(keras.Model):
        def __init__(self):
            super().__init__()
            self.out = keras.layers.Dense(1)
            self.build((None, 5))

        def call(self, x):
            return self.out(x)

        def build(self, shape):
            self.out.build(shape)
            self.built = True

        @tf.function
        def inner(self, x, y):
            with tf.GradientTape() as tape:
                loss = tf.reduce_mean((self(x) - y) ** 2)
            self.optimizer.apply(tape.gradient(loss, self.trainable_variables), self.trainable_variables)
            return loss

        def train_step(self, data):
            return {"loss": self.inner(*data)}

    model = Own()
    model.compile(tav.LAMB())
    with pytest.raises(ValueError, match=r"sees no step of lamb.*tf\.function of its own"):
        trained(model, Logger(tmp_path, 2))
