"""Training steps as TFLite models, for training on a device: they convert, and train as in TensorFlow."""

import functools

import axes
import cases
import numpy as np
import pytest
import tensorflow as tf

import tf_adam_variants as tav

pytestmark = pytest.mark.filterwarnings("ignore:[^.]*tf.lite.Interpreter is deprecated")

RATE = 0.0625
OPTIONS = {
    "clipnorm": {"clipnorm": 0.1},
    "clipvalue": {"clipvalue": 0.1},
    "global_clipnorm": {"global_clipnorm": 0.1},
    "accumulation": {"gradient_accumulation_steps": 2},
    "averages": {"use_ema": True, "ema_momentum": 0.75, "ema_overwrite_frequency": 3},
    "loss_scale_factor": {"loss_scale_factor": 4.0},
    "schedule": {"learning_rate": tav.schedules.LinearWarmup(RATE, 3)},
    "small betas": {"beta_1": 0.0, "beta_2": 0.3},
}
OPTIMIZERS = {
    f"{cls.__name__}-{name}": functools.partial(cls, **{"learning_rate": RATE} | options)
    for name, options in OPTIONS.items()
    for cls in (tav.AdamW, tav.LAMB)
}
OPTIMIZERS |= {
    f"AdamW-{mode}": functools.partial(tav.AdamW, RATE, weight_decay_mode=mode)
    for mode in ("schedule", "independent")
}
OPTIMIZERS |= {
    case.name: functools.partial(case.cls, RATE, **case.terms) for case in reversed(cases.CASES)
}  # the last one is plain AdamW, which is quick enough
ALL = pytest.mark.parametrize("name", axes.one_quick(list(OPTIMIZERS)))


class Trainer(tf.Module):
    """A model with an embedding, whose signatures train on a batch and return the weights."""

    def __init__(self, optimizer, fused=False):
        super().__init__()
        rng = np.random.default_rng(0)
        shapes = {"table": (10, 4), "kernel": (4, 3), "bias": (3,)}
        self.weights = [tf.Variable(rng.normal(size=s).astype("f"), name=name) for name, s in shapes.items()]
        self.optimizer = optimizer
        self.optimizer.fused = fused
        self.optimizer.build(self.weights)
        # TFLite initializes no variable that only Keras holds, of Keras's optimizers neither.
        self.state = [variable.value for variable in self.optimizer.variables]

    @tf.function(input_signature=[tf.TensorSpec((8,), tf.int32), tf.TensorSpec((8, 3))])
    def train(self, rows, y):
        table, kernel, bias = self.weights
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean((tf.gather(table, rows) @ kernel + bias - y) ** 2)
        self.optimizer.apply(tape.gradient(loss, self.weights), self.weights)
        return {"loss": loss}

    @tf.function(input_signature=[])
    def read(self):
        return dict(zip(("table", "kernel", "bias"), map(tf.convert_to_tensor, self.weights), strict=True))


def convert(trainer, folder):
    """The TFLite model of its two functions."""
    signatures = {"train": trainer.train, "read": trainer.read}
    tf.saved_model.save(trainer, folder, signatures=signatures)
    converter = tf.lite.TFLiteConverter.from_saved_model(str(folder))
    converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS, tf.lite.OpsSet.SELECT_TF_OPS]
    converter.experimental_enable_resource_variables = True
    return converter.convert()


@functools.cache
def runs_float64():
    """Whether the interpreter of this TensorFlow runs SELECT_TF_OPS: that of 2.18 does, that of 2.21 not."""
    function = tf.function(lambda x: tf.cast(tf.tanh(tf.cast(x, tf.float64)), tf.float32))
    concrete = function.get_concrete_function(tf.TensorSpec(()))
    converter = tf.lite.TFLiteConverter.from_concrete_functions([concrete])
    converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS, tf.lite.OpsSet.SELECT_TF_OPS]
    try:
        tf.lite.Interpreter(model_content=converter.convert()).allocate_tensors()
    except RuntimeError as error:
        if "Flex delegate" not in str(error):
            raise
        return False
    return True


@ALL
def test_a_training_step_converts(name, tmp_path):
    assert convert(Trainer(OPTIMIZERS[name]()), tmp_path)


@ALL
def test_it_trains_in_the_interpreter(name, tmp_path):
    if not runs_float64():
        pytest.skip("the interpreter of this TensorFlow has no Flex delegate")
    trainer = Trainer(OPTIMIZERS[name]())
    interpreter = tf.lite.Interpreter(model_content=convert(trainer, tmp_path))
    train, read = (interpreter.get_signature_runner(function) for function in ("train", "read"))
    rng = np.random.default_rng(1)
    before = read()
    for _ in range(7):
        rows, y = rng.integers(0, 9, 8).astype("int32"), rng.normal(size=(8, 3)).astype("f")
        want = trainer.train(rows, y)["loss"]
        np.testing.assert_allclose(train(rows=rows, y=y)["loss"], want, rtol=1e-5)
        have = read()
        for key, weights in trainer.read().items():
            largest = np.max(np.abs(weights))
            np.testing.assert_allclose(have[key], weights, rtol=0, atol=2e-6 * largest, err_msg=key)
    assert all(np.max(np.abs(have[key] - before[key])) > 0.01 for key in have)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "fused", "op"),
    [({}, True, "TfAdamVariants>"), ({"sparse_update": "lazy"}, False, "DisableCopyOnRead")],
)
def test_what_does_not_convert(options, fused, op, tmp_path):
    """As docs/saving.md says."""
    trainer = Trainer(tav.AdamW(**options), fused)
    with pytest.raises(Exception, match=f"'tf.{op}.*' op is neither a custom op nor a flex op"):
        convert(trainer, tmp_path)
