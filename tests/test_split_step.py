"""`tav.fused.split_step`: gradients by XLA, the update by the op, and all of Keras's training step kept."""

import contextlib
import logging

import keras
import numpy as np
import oracle
import pytest
import tensorflow as tf
from strategies import strategy_of
from traced import ops_of

import tf_adam_variants as tav
from tf_adam_variants.engines import fused
from tf_adam_variants.utils import internals

RNG = np.random.default_rng(0)
X = RNG.normal(size=(40, 6)).astype("float32")
Y = X.sum(axis=1, keepdims=True)
IDS = RNG.integers(0, 30, size=(40, 3))  # repeated ones among them
CLASSES = (X[:, 0] > 0).astype("int32")

LOGGER = "tf_adam_variants"


class Activity(keras.layers.Layer):
    """A layer with a loss of its own."""

    def call(self, x):
        self.add_loss(0.1 * keras.ops.mean(keras.ops.square(x)))
        return x


class Subclassed(keras.Model):
    def __init__(self):
        super().__init__()
        self.hidden, self.out = keras.layers.Dense(8, "tanh"), keras.layers.Dense(1)

    def call(self, x, training=False):
        x = self.hidden(x)
        return self.out(x + 0.5 if training else x)


class Context(keras.layers.Layer):
    """Notes whether it is traced for XLA."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def call(self, x):
        self.seen.append(internals.is_xla_compiling())
        return x


def dense(*more, out=1, policy=None, **options):
    hidden = keras.layers.Dense(8, "tanh", dtype=policy, **options)
    return keras.Sequential([keras.Input((6,)), hidden, *more, keras.layers.Dense(out, dtype=policy)])


def unbuilt():
    return keras.Sequential([keras.layers.Dense(8, "tanh"), keras.layers.Dense(1)])


def embedding():
    return keras.Sequential(
        [
            keras.Input((3,), dtype="int32"),
            keras.layers.Embedding(30, 4),
            keras.layers.Flatten(),
            keras.layers.Dense(1),
        ]
    )


def frozen():
    model = dense(keras.layers.Dense(8))
    model.layers[1].trainable = False
    return model


def two_outputs():
    inputs = keras.Input((6,))
    hidden = keras.layers.Dense(8, "tanh")(inputs)
    return keras.Model(inputs, {name: keras.layers.Dense(1, name=name)(hidden) for name in ("a", "b")})


def adamw(**options):
    """With a beta_2 that float32 holds: where XLA compiles the update, it is TensorFlow's kernel's."""
    return lambda fused: tav.AdamW(0.01, beta_2=0.9375, **options, fused=fused)


def scaled(fused):
    """The first scale overflows: steps are left out, and the scale halved."""
    return keras.optimizers.LossScaleOptimizer(tav.LAMB(0.02, fused=fused), initial_scale=2.0**20)


def scheduled(fused):
    return tav.QHAdamW(keras.optimizers.schedules.ExponentialDecay(0.02, 2, 0.7), fused=fused)


# A model, an optimizer, what `compile` and what `fit` is told besides.
KEPT = {
    "AdamW": (dense, adamw(), {}, {}),
    "QHAdam": (dense, lambda fused: tav.QHAdam(0.01, fused=fused), {}, {}),
    "QHAdamW": (dense, lambda fused: tav.QHAdamW(0.01, fused=fused), {}, {}),
    "LAMB": (dense, lambda fused: tav.LAMB(0.01, fused=fused), {}, {}),
    "unbuilt": (unbuilt, adamw(), {}, {}),
    "subclassed": (Subclassed, adamw(), {}, {}),
    "sample weights": (dense, adamw(), {"weighted_metrics": ["mae"]}, {"sample_weight": np.arange(40.0)}),
    "class weights": (
        lambda: dense(out=2),
        adamw(),
        {"loss": keras.losses.SparseCategoricalCrossentropy(from_logits=True), "metrics": ["accuracy"]},
        {"y": CLASSES, "class_weight": {0: 0.3, 1: 2.0}},
    ),
    "regularizers": (lambda: dense(kernel_regularizer="l2", activity_regularizer="l1"), adamw(), {}, {}),
    "add_loss": (lambda: dense(Activity()), adamw(), {}, {}),
    "constraints": (lambda: dense(kernel_constraint="unit_norm"), adamw(), {}, {}),
    "state that does not train": (
        lambda: dense(keras.layers.BatchNormalization(), keras.layers.Dropout(0.3)),
        adamw(),
        {},
        {},
    ),
    "two outputs": (
        two_outputs,
        adamw(),
        {"loss": {"a": "mse", "b": "mae"}, "metrics": {"a": "mae"}},
        {"y": {"a": Y, "b": -Y}},
    ),
    "frozen layers": (frozen, adamw(), {}, {}),
    "loss scale": (lambda: dense(policy="mixed_float16"), scaled, {}, {}),
    "constant loss scale": (dense, adamw(loss_scale_factor=128.0), {}, {}),
    "master weights": (lambda: dense(policy="bfloat16"), adamw(master_weights=True), {}, {}),
    "rounding at random": (lambda: dense(policy="bfloat16"), adamw(stochastic_rounding=True), {}, {}),
    "accumulation": (dense, adamw(gradient_accumulation_steps=3), {}, {}),
    "averages": (dense, adamw(use_ema=True, ema_momentum=0.5, ema_overwrite_frequency=4), {}, {}),
    "clipnorm": (dense, adamw(clipnorm=0.1), {}, {}),
    "clipvalue": (dense, adamw(clipvalue=0.01), {}, {}),
    "global_clipnorm": (dense, adamw(global_clipnorm=0.1), {}, {}),
    "schedule": (dense, scheduled, {}, {}),
    "steps_per_execution": (dense, adamw(), {"steps_per_execution": 3}, {}),
    "slices, exact": (embedding, adamw(), {}, {"x": IDS}),
    "slices, lazy": (embedding, adamw(sparse_update="lazy"), {}, {"x": IDS}),
}


def compiled(model, optimizer, split, strategy=None, **options):
    keras.utils.set_random_seed(1)  # the same weights and the same dropout
    with strategy.scope() if strategy else contextlib.nullcontext():
        made = model()
        made.compile(
            optimizer(fused=True if split else "auto" if strategy else False),
            **({"loss": "mse", "metrics": ["mae"]} | options),
            jit_compile=not split and strategy is None,
        )
    if split:
        tav.fused.split_step(made)
    return made


def trained(model, *, validate=True, **fit):
    data = {"x": X, "y": Y} | fit
    held_out = {"validation_data": (data["x"], data["y"])} if validate else {}
    return model.fit(**data, **held_out, batch_size=16, epochs=3, shuffle=False, verbose=0).history


def assert_same(model, history, other, other_history, rtol=1e-5):
    """To rounding: XLA rounds otherwise where the update is among what it compiles."""
    assert history.keys() == other_history.keys()
    for name, values in history.items():
        np.testing.assert_allclose(values, other_history[name], rtol=rtol)
    variables = [*model.variables, *model.optimizer.variables]
    expected = [*other.variables, *other.optimizer.variables]
    assert len(variables) == len(expected)
    for have, want in zip(variables, expected, strict=True):
        have, want = (np.asarray(keras.ops.convert_to_numpy(v), "float64") for v in (have, want))
        np.testing.assert_allclose(have, want, rtol=rtol, atol=rtol)


# The others are left to `make test-all`.
QUICK = ("LAMB",)


@pytest.mark.parametrize(
    "kept", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in KEPT]
)
def test_the_numbers_of_keras_training_step(kept):
    """Against Keras's step, all of it compiled by XLA, with the formula in plain TensorFlow."""
    model, optimizer, options, fit = KEPT[kept]
    split = compiled(model, optimizer, True, **options)
    history = trained(split, **fit)
    whole = compiled(model, optimizer, False, **options)
    # One unit of bfloat16 and float16, which a weight on the edge between two may go either way by.
    rtol = {"master weights": 2**-7, "rounding at random": 2**-7, "loss scale": 1e-3}.get(kept, 1e-5)
    assert_same(split, history, whole, trained(whole, **fit), rtol)


@pytest.mark.slow
@pytest.mark.parametrize("drops", [False, True])
def test_random_numbers_are_those_of_xla(drops):
    """As the docstring says: Keras's step without XLA draws others."""
    ends = []
    for how in ("split", "XLA", "neither"):
        keras.utils.set_random_seed(1)
        model = dense(keras.layers.Dropout(0.5 if drops else 0.0))
        model.compile(tav.AdamW(0.01, fused=how == "split"), "mse", jit_compile=how == "XLA")
        if how == "split":
            tav.fused.split_step(model)
        ends.append(trained(model, validate=False)["loss"])
    split, xla, neither = ends
    np.testing.assert_allclose(split, xla, rtol=1e-5)
    assert np.allclose(split, neither, rtol=1e-5) != drops


@pytest.mark.slow
@pytest.mark.parametrize("model", [lambda: dense(keras.layers.BatchNormalization()), embedding])
@pytest.mark.parametrize("optimizer", [tav.AdamW, tav.LAMB])
def test_replicas(model, optimizer):
    """Against Keras's step on as many replicas, which it does not compile by XLA."""
    x = IDS if model is embedding else X
    make = lambda fused: optimizer(0.01, global_clipnorm=0.5, fused=fused)  # noqa: E731
    split, whole = (compiled(model, make, split, strategy_of("two replicas")) for split in (True, False))
    assert_same(split, trained(split, x=x), whole, trained(whole, x=x))


@pytest.mark.slow
def test_the_oracles_weights():
    """A linear model's gradients are known: 2 / n X^T (X w - y)."""
    model = keras.Sequential([keras.Input((6,)), keras.layers.Dense(1, use_bias=False)])
    model.compile(tav.QHAdamW(0.125, weight_decay=0.25), "mse")
    tav.fused.split_step(model)
    (weights,) = start = [w.astype("float64") for w in model.get_weights()]
    told = {"beta_1": 0.995, "beta_2": 0.999, "nu_1": 0.7, "nu_2": 1.0, "epsilon": 1e-8, "weight_decay": 0.25}
    grads = []
    for _ in range(4):
        model.fit(X, Y, batch_size=40, verbose=0)
        grads.append([2 / 40 * X.T.astype("float64") @ (X @ weights - Y)])
        (weights,) = oracle.train(oracle.qhadam, start, grads, [0.125] * len(grads), **told)[-1]
        np.testing.assert_allclose(model.get_weights()[0], weights, rtol=1e-5, atol=1e-6)


def test_xla_compiles_the_gradients_and_the_op_takes_the_step():
    """With a model that Keras would not compile with XLA, also where several steps are one call."""
    for steps in (1, 2):
        context = Context()
        model = dense(context)
        model.compile(tav.AdamW(0.01), "mse", jit_compile=False, steps_per_execution=steps)
        tav.fused.split_step(model)
        context.seen.clear()
        model.fit(X, Y, verbose=0)
        assert set(context.seen) == {True}
        assert "TfAdamVariants>DenseStep" in ops_of(model)


@pytest.mark.slow
def test_evaluate_and_predict_stay_as_they_are():
    context = Context()
    model = dense(context)
    for jit_compile in (True, False):
        model.compile(tav.AdamW(0.01), "mse", jit_compile=jit_compile)
        before = model.evaluate(X, Y, verbose=0), model.predict(X, verbose=0)
        tav.fused.split_step(model)
        for function in (model.make_test_function, model.make_predict_function):
            function(force=True)  # traced anew
        context.seen.clear()
        after = model.evaluate(X, Y, verbose=0), model.predict(X, verbose=0)
        assert set(context.seen) == {jit_compile}
        assert model.jit_compile is jit_compile
        assert after[0] == before[0]
        np.testing.assert_array_equal(after[1], before[1])


@pytest.mark.slow
def test_compile_undoes_it():
    context = Context()
    model = dense(context)
    model.compile(tav.AdamW(0.01), "mse")
    tav.fused.split_step(model)
    model.fit(X, Y, verbose=0)
    model.compile(tav.AdamW(0.01, fused=False), "mse", jit_compile=False)
    context.seen.clear()
    model.fit(X, Y, verbose=0)
    assert set(context.seen) == {False}
    assert "TfAdamVariants>DenseStep" not in ops_of(model)


@pytest.mark.slow
def test_batch_by_batch():
    split, whole = (compiled(dense, adamw(), split) for split in (True, False))
    for begin in range(0, 40, 10):
        batch = slice(begin, begin + 10)
        have, want = (m.train_on_batch(X[batch], Y[batch], return_dict=True) for m in (split, whole))
        assert have.keys() == want.keys()
        for name, value in have.items():
            np.testing.assert_allclose(value, want[name], rtol=1e-5)


@pytest.mark.slow
def test_thawed_layers():
    """Compiled again, as Keras asks for, and split again, with the optimizer of before."""
    split, whole = (compiled(frozen, adamw(), split) for split in (True, False))
    for model in (split, whole):
        trained(model)
        optimizer = model.optimizer
        model.layers[1].trainable = True
        optimizer.build(model.trainable_variables)
        model.compile(optimizer, "mse", metrics=["mae"], jit_compile=model is whole)
    tav.fused.split_step(split)
    assert_same(split, trained(split), whole, trained(whole))


@pytest.mark.slow
def test_saved_and_loaded(tmp_path):
    """A loaded model trains on, split again, to the weights of the one that went on."""
    model = compiled(dense, adamw(), True)
    trained(model)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert loaded.train_function is None
    tav.fused.split_step(loaded)
    np.testing.assert_array_equal(loaded.predict(X, verbose=0), model.predict(X, verbose=0))
    histories = trained(model), trained(loaded)
    assert_same(loaded, histories[1], model, histories[0], rtol=1e-6)
    model.export(tmp_path / "served", verbose=False)
    served = tf.saved_model.load(tmp_path / "served")
    np.testing.assert_allclose(served.serve(X), model.predict(X, verbose=0), rtol=1e-5)


@pytest.mark.slow
def test_splitting_twice_is_splitting_once():
    once, twice = (compiled(dense, adamw(), True) for _ in range(2))
    tav.fused.split_step(twice)
    assert_same(once, trained(once), twice, trained(twice), rtol=0)


class WithItsOwn(Subclassed):
    def train_step(self, data):
        return super().train_step(data)


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        (dense, None, "compile"),
        (dense, {"optimizer": None}, "compile"),
        (dense, {"optimizer": "adam"}, "Received: Adam$"),
        (dense, {"optimizer": tav.LAMB(fused=False)}, "Received: LAMB, fused=False"),
        (dense, {"optimizer": "lamb", "run_eagerly": True}, "run_eagerly"),
        (WithItsOwn, {"optimizer": "lamb"}, r"WithItsOwn has a train_step[\s\S]*optimizer.apply\(gradients"),
    ],
)
def test_what_cannot_be_split(model, options, message):
    made = model()
    if options is not None:
        made.compile(loss="mse", **options)
    with pytest.raises(ValueError, match=message):
        tav.fused.split_step(made)


def test_without_the_op_the_step_stays_keras(monkeypatch, caplog):
    model = dense()
    model.compile("lamb", "mse")
    with monkeypatch.context() as patch, caplog.at_level(logging.WARNING, LOGGER):
        patch.setattr(
            tav.fused._library, "find_library", lambda: tav.fused._library.Found(reason="It is not built.")
        )
        tav.fused.split_step(model)
    assert caplog.messages == ["split_step leaves the training step as it is: It is not built."]
    assert model.train_function is None
    model.fit(X, Y, verbose=0)


def test_with_a_layer_that_xla_cannot_compile_the_step_stays_keras(caplog):
    """As in Keras, which takes no XLA for it; the op takes the step without."""
    words = keras.layers.TextVectorization(20, output_sequence_length=2, name="words")
    words.adapt(["a b", "c d"])
    model = keras.Sequential([keras.Input((), dtype="string"), words, keras.layers.Embedding(20, 1)])
    model.compile(tav.LAMB(fused=True), "mse")
    with caplog.at_level(logging.WARNING, LOGGER):
        tav.fused.split_step(model)
    assert "as words has" in caplog.messages[0]
    model.fit(tf.constant(["a b", "c d"]), np.zeros((2, 2, 1)), verbose=0)


@pytest.mark.slow
def test_a_step_under_xla_mentions_it_once(caplog):
    fused._log_once.cache_clear()

    def messages():
        return [record.message for record in caplog.records if record.name == LOGGER]

    model = dense()
    with caplog.at_level(logging.WARNING, LOGGER):
        for option, count in ((False, 0), ("auto", 1), ("auto", 1)):
            model.compile(tav.LAMB(fused=option), "mse", jit_compile=True)
            model.fit(X, Y, verbose=0)
            assert len(messages()) == count
        assert "split_step" in messages()[0]
        fused._log_once.cache_clear()
        model.compile(tav.LAMB(), "mse", jit_compile=False)
        model.fit(X, Y, verbose=0)
        tav.fused.split_step(model)
        model.fit(X, Y, verbose=0)
        assert len(messages()) == 1
