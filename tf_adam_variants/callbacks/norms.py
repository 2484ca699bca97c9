"""Norms of weights and updates, and trust ratios, from the state before and after a training step."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import keras
import tensorflow as tf

from tf_adam_variants.engines import formula
from tf_adam_variants.engines.coefficients import Coefficients, StepInputs
from tf_adam_variants.engines.variable_state import VariableState
from tf_adam_variants.optimizer import replicas
from tf_adam_variants.optimizer.base import AdamVariant
from tf_adam_variants.utils import internals
from tf_adam_variants.utils.variables import path_of, tf_variable

QUANTITIES = ("weight_norm", "update_norm", "trust_ratio")


def find_optimizer(model: keras.Model) -> AdamVariant:
    """The model's optimizer, or the one that it wraps.

    Raises:
        ValueError: if it is not an optimizer of this package.
    """
    optimizer = model.optimizer
    while hasattr(optimizer, "inner_optimizer"):
        optimizer = optimizer.inner_optimizer
    if isinstance(optimizer, AdamVariant):
        return optimizer
    raise ValueError(
        "TrustRatioLogger needs an optimizer of tf_adam_variants, alone or in a LossScaleOptimizer. "
        f"Received: {type(optimizer).__module__}.{type(optimizer).__name__}. Compile {model.name} with one, "
        "or leave the callback out"
    )


def count_updates(optimizer: AdamVariant) -> int:
    """How many updates the optimizer has made."""
    return int(optimizer.iterations.numpy())


class Copy(NamedTuple):
    """A variable with its slots, and its weights and first moment before the step."""

    name: str
    number: int  # its index in the optimizer
    state: VariableState
    weights: Any
    momentum: Any


class Before(NamedTuple):
    """What a step overwrites: its trainable variables, on the first replica."""

    optimizer: AdamVariant
    updates: int
    learning_rate: Any
    copies: list[Copy]

    @classmethod
    def copy(cls, model: keras.Model, optimizer: AdamVariant) -> Before:
        """Copy it before the step."""
        if not optimizer.built and model.built and model.trainable_variables:
            with model.distribute_strategy.scope():
                model.optimizer.build(model.trainable_variables)
        hp = optimizer._hyperparameters
        # A callable that is a learning rate may count its calls.
        rate = optimizer.learning_rate if hp.weight_decay_mode == "independent" else 1.0
        needs_momentum = hp.nu_1 != 1 or hp.nu_2 != 1 or optimizer.sparse_update == "lazy"
        trainable = set(map(id, model.trainable_variables))
        copies = []
        for index, (name, variable) in enumerate(names(model, optimizer).items()):
            if id(variable) in trainable and not getattr(variable, "overwrite_with_gradient", False):
                variable = tf_variable(variable)
                state = optimizer._variable_state(None, variable, index, replicas.devices(variable)[0])
                # Reading shares the memory. A step that writes copies it before.
                momentum = state.momentum.value() if needs_momentum else None
                copies.append(Copy(name, index, state, formula.weights(state), momentum))
        return cls(optimizer, count_updates(optimizer), tf.convert_to_tensor(rate), copies)

    def norms(self) -> dict[str, float]:
        """The quantities of each variable after the step, by tag. Those that are not defined are left out."""
        updates = count_updates(self.optimizer)
        hp = self.optimizer._hyperparameters

        @functools.cache
        def coefficients(start: int, dtype: tf.DType) -> Coefficients:
            iterations = tf.constant(updates - 1 - start, tf.int64)
            return Coefficients.over_learning_rate(hp, StepInputs(iterations, self.learning_rate)).cast(dtype)

        starts = self.optimizer._added_at.values()
        numbers: dict[str, float] = {}
        for copy in self.copies:
            c = coefficients(starts.get(copy.number, 0), copy.state.momentum.dtype)
            with tf.device(copy.state.variable.device):
                values = self._norms_of(copy, c, updates - self.updates)
            numbers |= {f"{quantity}/{copy.name}": value for quantity, value in values.items()}
        return {tag: numbers[tag] for tag in tags(copy.name for copy in self.copies) if tag in numbers}

    def _norms_of(self, copy: Copy, c: Coefficients, updates: int) -> dict[str, float]:
        hp, s, w = self.optimizer._hyperparameters, copy.state, copy.weights
        m = s.momentum.value()
        v = (s.velocity if s.velocity_hat is None else s.velocity_hat).value()
        g = None
        if copy.momentum is not None:  # the gradient of the step; of several updates, a weighted mean
            kept = hp.beta_1**updates
            g = (m - kept * copy.momentum) / (1 - kept)
        u = formula.direction(m, v, g, hp, c)
        if s.weight_decay and hp.weight_decay:
            u += c.weight_decay * w
        padding = None
        if self.optimizer.sparse_update == "lazy":  # the other rows took no step
            same = (formula.weights(s) == w) & (m == copy.momentum)
            padding = tf.reduce_all(same, axis=tuple(range(1, m.shape.rank)), keepdims=True)
        halves = formula.half_norms(w, u, padding)
        adapts = s.layer_adaptation or not hp.trust_ratio
        ratio = float(formula.trust_ratio(*halves, hp, c)) if adapts else 1.0
        weight_norm, update_norm = (math.sqrt(2) * float(half) for half in halves)
        numbers = {"weight_norm": weight_norm}
        # The decay over a learning rate of 0; or, with epsilon=0, a direction of 0 over 0.
        decay = float(c.weight_decay) if s.weight_decay else 0.0
        if not math.isfinite(decay) or (not math.isfinite(update_norm) and _are_finite(w, m, v)):
            return numbers
        numbers["update_norm"] = update_norm  # NaN shows a gradient that was not finite
        if not adapts or all(map(math.isfinite, (weight_norm, update_norm, ratio))):
            numbers["trust_ratio"] = ratio
        return numbers


def _are_finite(*tensors: Any) -> bool:
    return all(bool(tf.reduce_all(tf.math.is_finite(tensor))) for tensor in tensors)


def names(model: keras.Model, optimizer: AdamVariant) -> dict[str, Any]:
    """The variables of the optimizer by their paths without the model's name, each path once."""
    named: dict[str, Any] = {}
    for variable in internals.variables_of(optimizer):
        name = path = path_of(variable).removeprefix(f"{model.name}/")
        number = 0
        while name in named:
            number += 1
            name = f"{path}_{number}"
        named[name] = variable
    return named


def tags(names: Iterable[str]) -> list[str]:
    """The tags of variables of these names: those of one quantity after the other."""
    names = list(names)
    return [f"{quantity}/{name}" for quantity in QUANTITIES for name in names]
