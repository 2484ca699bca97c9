"""A training step in two parts: the gradients compiled by XLA, the update by the compiled op outside it."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any

import keras
import tensorflow as tf

from tf_adam_variants.fused import _library
from tf_adam_variants.utils import internals
from tf_adam_variants.utils.internals import ModelView


def split_step(model: keras.Model) -> None:
    """Let a compiled model train with gradients by XLA and the update by the compiled op, outside XLA.

    Where there is a GPU, Keras compiles the whole training step with XLA, in which the op cannot be used.
    After this, `fit` and `train_on_batch` make two parts of Keras's `train_step`: what yields the loss, the
    metrics and the gradients is compiled by XLA, also where Keras would not do so; then the optimizer takes
    its step. All else stays as it is: sample and class weights, losses of layers, loss scaling, accumulation,
    averages, clipping, `steps_per_execution`, strategies. `evaluate`, `predict`, saving and loading are
    untouched. `model.compile` undoes it; a loaded model has to be split again.

    The numbers are those of Keras's step with XLA, to rounding. They are those of a step without XLA too,
    unless a layer draws random numbers, as Dropout does: from the same seed, XLA draws others.

    The training step stays Keras's, and a log line says why, where the op is not built or cannot be loaded,
    and where XLA cannot compile a layer (`supports_jit=False`, as of `TextVectorization`): Keras does without
    it then, and the op takes the step.

    Args:
        model: a compiled `keras.Model` with Keras's own `train_step` and an optimizer of this package, also
            inside a `LossScaleOptimizer`. Built or not.

    Raises:
        ValueError: if the model is not compiled, or with `run_eagerly=True`; if it has a `train_step` of its
            own, with the lines to write there; if its optimizer has no compiled op, or `fused=False`.

    Examples:
        >>> import numpy as np
        >>> x, y = np.ones((32, 8)), np.ones(32)
        >>> model = keras.Sequential([keras.layers.Dense(4, "relu"), keras.layers.Dense(1)])
        >>> model.compile(optimizer="qhadamw", loss="mse")
        >>> split_step(model)
        >>> history = model.fit(x, y, epochs=2, verbose=0)
        >>> history.history["loss"][1] < history.history["loss"][0]
        True
    """
    _check(model)
    if reason := _unsupported_reason(model):
        logging.getLogger("tf_adam_variants").warning(
            "split_step leaves the training step as it is: %s", reason
        )
        return
    if model.built:  # otherwise in the first step, which takes longer then
        with model.distribute_strategy.scope():
            model.optimizer.build(model.trainable_variables)

    @tf.function(jit_compile=True, reduce_retracing=True)
    @tf.autograph.experimental.do_not_convert
    def metrics_and_gradients(data: Any) -> tuple[Any, list[Any]]:
        keeper = _GradientKeeper(model)
        metrics = keras.Model.train_step(ModelView(model, optimizer=keeper), data)
        return metrics, keeper.gradients

    def train_step(data: Any) -> Any:
        metrics, gradients = metrics_and_gradients(data)
        if gradients:
            model.optimizer.apply(gradients, model.trainable_variables)
        return metrics

    view = ModelView(model, train_step=train_step, jit_compile=False)
    view.make_train_function(force=True)
    model.train_function = view.train_function  # `compile` sets it to None


class _GradientKeeper:
    """An optimizer for `train_step`, which keeps the gradients for the real one."""

    def __init__(self, model: keras.Model) -> None:
        self._model = model
        self.gradients: list[Any] = []

    def scale_loss(self, loss: Any) -> Any:
        optimizer = self._model.optimizer
        if not optimizer.built:  # it would scale by a constant
            optimizer.build(self._model.trainable_variables)
        return optimizer.scale_loss(loss)

    def apply_gradients(self, grads_and_vars: Iterable[tuple[Any, Any]]) -> None:
        self.gradients = [gradient for gradient, _ in grads_and_vars]


def _check(model: keras.Model) -> None:
    """Raise a ValueError for a model whose step cannot be split."""
    if not model.compiled or model.optimizer is None:
        raise ValueError(f"split_step needs a compiled model. Call compile() of {model.name} before it")
    own = [name for name in _KERAS if getattr(type(model), name) is not getattr(keras.Model, name)]
    if own:
        raise ValueError(_OWN_STEP.format(model=type(model).__name__, method=own[0]))
    if model.run_eagerly:
        raise ValueError(
            f"split_step compiles, and {model.name} was compiled with run_eagerly=True. Leave one of them out"
        )
    fused = [getattr(optimizer, "fused", None) for optimizer in _optimizers(model.optimizer)]
    if not any(fused):
        raise ValueError(
            "split_step needs an optimizer of tf_adam_variants whose `fused` is not False. "
            f"Received: {type(model.optimizer).__name__}{', fused=False' if False in fused else ''}"
        )


_KERAS = ("train_step", "make_train_function")
_OWN_STEP = """{model} has a {method} of its own, which split_step cannot take apart. Compile the model with \
jit_compile=False, let a method that ends with `return loss, tape.gradient(loss, self.trainable_variables)` \
yield the gradients, and write

    @tf.function(jit_compile=True)  # in front of this method

    loss, gradients = self.loss_and_gradients(x, y)  # in train_step
    self.optimizer.apply(gradients, self.trainable_variables)"""


def _optimizers(optimizer: Any) -> list[Any]:
    """The optimizer and those that it wraps."""
    inner = getattr(optimizer, "inner_optimizer", None)
    return [optimizer] if inner is None else [optimizer, *_optimizers(inner)]


def _unsupported_reason(model: keras.Model) -> str | None:
    """Why a split step would be no better; None where it would."""
    if without := [layer.name for layer in internals.layers_of(model) if not layer.supports_jit]:
        return f"XLA compiles no layer with supports_jit=False, as {without[0]} has"
    if not _library.load():
        return _library.reason()
    return _library.gpu_reason() or None if tf.config.list_logical_devices("GPU") else None
