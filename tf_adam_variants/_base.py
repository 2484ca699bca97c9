"""The Keras optimizer that all variants are: state, configuration, checks, and the way of one update."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable
from typing import Any, NamedTuple, TypedDict

import keras
import tensorflow as tf

from tf_adam_variants import _checks, _formula, _kernels, _layout, _sparse, _variables
from tf_adam_variants.fused import _library, _ops


class KerasArguments(TypedDict, total=False):
    """What `keras.optimizers.Optimizer` takes by keyword, passed on unchanged."""

    clipnorm: float | None
    clipvalue: float | None
    global_clipnorm: float | None
    use_ema: bool
    ema_momentum: float
    ema_overwrite_frequency: int | None
    loss_scale_factor: float | None
    gradient_accumulation_steps: int | None


class Step(NamedTuple):
    """What the updates of one step share, for variables of one state type."""

    rate: Any
    decay: Any | None
    coefficients: _formula.Coefficients
    shares: tuple[Any, Any]  # of the gradient in the new moments
    betas: _kernels.Betas | None  # None: the kernels do not serve


class AdamVariant(keras.optimizers.Optimizer):
    """One Adam body. A subclass says which terms it has.

    Keras's and TensorFlow's private names that this class uses, all of them here: the hook
    `_distributed_tf_update_step` (all variables of a step at once, so that scalars are computed once),
    `_apply_weight_decay` (switched off: decay belongs to the formula), `_all_reduce_sum_gradients`,
    `_clip_gradients`, `_use_weight_decay`, `_var_key`, `_get_variable_index`, `_trainable_variables`,
    `_distribution_strategy` and TensorFlow's `_trackable_children` (keeps the layout out of SavedModels).
    """

    nu_1: float = 1.0
    nu_2: float = 1.0
    amsgrad: bool = False
    bias_correction: bool = True
    grad_averaging: bool = True
    trust_ratio: bool = False

    # Constructor arguments of the subclass that are attributes of the same name.
    _hyperparameters: tuple[str, ...] = ()

    def __init__(
        self,
        learning_rate: Any,
        beta_1: float,
        beta_2: float,
        epsilon: float,
        weight_decay: float | None,
        exclude_from_weight_decay: Iterable[str] | None,
        sparse_update: str,
        fused: str | bool,
        name: str,
        keras_arguments: KerasArguments,
    ) -> None:
        _checks.keras_arguments(keras_arguments, KerasArguments.__annotations__)
        _checks.text("name", name)
        super().__init__(
            learning_rate=_checks.learning_rate(learning_rate),
            weight_decay=weight_decay,
            name=name,
            **keras_arguments,
        )
        self.beta_1 = _checks.beta("beta_1", beta_1)
        self.beta_2 = _checks.beta("beta_2", beta_2)
        self.epsilon = _checks.nonnegative("epsilon", epsilon)
        self.sparse_update = _checks.one_of("sparse_update", sparse_update, ("exact", "lazy"))
        self.fused = _checks.auto_or_flag("fused", fused)
        if fused is True and not _library.load():
            raise ValueError(f"`fused=True` needs the compiled op. {_library.reason()}")
        # Keras keeps its method's argument in `_exclude_from_weight_decay`, so these have other names.
        self._undecayed_patterns = _checks.patterns("exclude_from_weight_decay", exclude_from_weight_decay)
        self._undecayed_by_method: list[str] = []
        self._unloaded: dict[str, Any] | None = None
        self._slots_are_new = False
        self._accumulated_slices: frozenset[Any] = frozenset()
        self._unadapted: frozenset[int] = frozenset()
        self._layout = _layout.Layout(lambda: self.variables if self.built else None, self.name)

    # -- state ---------------------------------------------------------------------------------------

    def build(self, variables: Iterable[Any]) -> None:
        """Make the slots: momentum and velocity of each variable, in Keras's order and by its names."""
        variables = list(variables)
        if self.built:
            self._check_same_variables(variables)
            return
        for variable in variables:
            if not tf.as_dtype(variable.dtype).is_floating:
                raise ValueError(
                    f"{self.name} updates variables of real floating types. "
                    f"Received: {_variables.path(variable)} of type {variable.dtype}"
                )
        super().build(variables)
        momentums, velocities = [], []
        for variable in variables:
            momentums.append(self._add_slot(variable, "momentum"))
            velocities.append(self._add_slot(variable, "velocity"))
        self._momentums, self._velocities = momentums, velocities
        if self.amsgrad:
            self._velocity_hats = [self._add_slot(variable, "velocity_hat") for variable in variables]
        self._undecayed = frozenset(
            i for i, variable in enumerate(variables) if not self._use_weight_decay(variable)
        )
        self._devices = frozenset(map(_variables.devices, variables))
        self._slots_are_new = True
        self._finish_loading()

    def _add_slot(self, variable: Any, name: str) -> Any:
        if getattr(variable, "overwrite_with_gradient", False):  # float8 scales: no slots
            return None
        dtype = _variables.state_type(variable)
        if dtype == tf.as_dtype(variable.dtype):
            return self.add_variable_from_reference(variable, name=name)
        with tf.distribute.get_strategy().extended.colocate_vars_with(_variables.held(variable)):
            return self.add_variable(
                shape=variable.shape,
                dtype=dtype.name,
                name=f"{_variables.path(variable).replace('/', '_')}_{name}",
            )

    def _check_same_variables(self, variables: list[Any]) -> None:
        if [self._var_key(v) for v in variables] != [self._var_key(v) for v in self._trainable_variables]:
            raise ValueError(
                f"{self.name} is already built on {_names(self._trainable_variables)} and cannot be built "
                f"again on {_names(variables)}. Make a new optimizer: "
                f"{type(self).__name__}.from_config(optimizer.get_config())"
            )

    def _finish_loading(self) -> None:
        """Take over state that was restored before the slots were there; raise as long as it does not fit."""
        self._layout.check()
        if self._slots_are_new:
            _layout.check_restored(self.variables, self.name)
            self._slots_are_new = False
        if self._unloaded is not None:
            with tf.init_scope():  # the slots may be built, and so loaded, while a step is traced
                _layout.load(self._unloaded, self.variables, self.name, slots_only=True)
            self._unloaded = None

    def _trackable_children(self, save_type: str = "checkpoint", **kwargs: Any) -> dict[str, Any]:
        children = super()._trackable_children(save_type, **kwargs)
        if save_type == "savedmodel":  # it holds no Python state, and would be missed on loading
            children = {name: child for name, child in children.items() if child is not self._layout}
        return children

    def save_own_variables(self, store: Any) -> None:
        """Write the state, and what it consists of, to a Keras store."""
        _layout.save(store, self.variables, self._unloaded)

    def load_own_variables(self, store: Any) -> None:
        """Set the state from a Keras store, now or, before the slots are there, when they are built.

        Raises:
            ValueError: that names the differences, where the saved state is another optimizer's.
        """
        arrays = _layout.read(store)
        if self.built or not _layout.has_slots(arrays):
            _layout.load(arrays, self.variables, self.name)
        else:
            _layout.load_scalars(arrays, self.variables)
            self._unloaded = arrays

    # -- exclusions ----------------------------------------------------------------------------------

    def exclude_from_weight_decay(
        self, var_list: Iterable[Any] | None = None, var_names: Iterable[str] | None = None
    ) -> None:
        """Exclude variables from weight decay, on top of the constructor's list.

        Args:
            var_list: variables to exclude. The configuration keeps their paths.
            var_names: list of regular expressions, searched in the variables' paths.

        Raises:
            ValueError: after the optimizer is built, when it is too late.
        """
        if self.built:
            raise ValueError(
                f"`exclude_from_weight_decay()` must be called before {self.name} is built, that is "
                "before the first step: which variables decay is fixed by then."
            )
        variables = list(var_list or ())
        names = _checks.patterns("var_names", var_names) or []
        self._undecayed_by_method = names + [_variables.exactly(variable) for variable in variables]

    def _all_undecayed_patterns(self) -> list[str] | None:
        if self._undecayed_patterns is None and not self._undecayed_by_method:
            return None
        return list(dict.fromkeys([*(self._undecayed_patterns or ()), *self._undecayed_by_method]))

    def _use_weight_decay(self, variable: Any) -> bool:
        return not _variables.matches(self._all_undecayed_patterns() or (), variable)

    # -- one step ------------------------------------------------------------------------------------

    @tf.autograph.experimental.do_not_convert  # plain Python: converting it would only take time
    def apply(self, grads: Iterable[Any], trainable_variables: Iterable[Any] | None = None) -> None:
        """Update the variables by one step, or add to the accumulated gradients.

        Args:
            grads: one gradient a variable, of its shape: a tensor, `tf.IndexedSlices` or None.
            trainable_variables: the variables; those that the optimizer was built on if left out.

        Raises:
            ValueError: where gradients and variables do not match, before anything is changed.
        """
        if self.built:
            self._finish_loading()
            if trainable_variables is None:
                trainable_variables = self._trainable_variables
        grads = list(grads)
        if not grads or trainable_variables is None:
            super().apply(grads)  # nothing to do, or Keras says what is missing
            return
        variables = list(trainable_variables)
        self._check(grads, variables)
        if not self.built:  # not below, where the slots' creation would wait for the ids
            self.build(variables)
        # A wrong id anywhere stops the step before any variable is written.
        with tf.control_dependencies(_sparse.range_checks(grads, variables)):
            super().apply(self._without_repeated_ids(grads, variables), variables)

    def _check(self, grads: list[Any], variables: list[Any]) -> None:
        if len(grads) != len(variables):
            raise ValueError(
                f"{self.name} needs one gradient a variable. "
                f"Received: {len(grads)} gradients for {len(variables)} variables: {_names(variables)}"
            )
        keys = [self._var_key(variable) for variable in variables]
        if len(set(keys)) != len(keys):
            raise ValueError(f"{self.name} was given a variable more than once: {_names(variables)}")
        for gradient, variable in zip(grads, variables, strict=True):
            if gradient is not None and not _variables.fits(variable, gradient):
                raise ValueError(
                    f"The gradient of {_variables.path(variable)} must have its shape, "
                    f"{tuple(variable.shape)}. Received: a gradient of shape {_variables.shape(gradient)}"
                )

    def _fuses(self) -> bool:
        """Whether the compiled op takes the step."""
        if _checks.auto_or_flag("fused", self.fused) is False:
            return False
        reason = _ops.reason_against(self._devices)
        if reason and self.fused is True:
            raise ValueError(f"{self.name} has fused=True, but its op cannot be used here: {reason}")
        return not reason

    def _fuses_alone(self) -> bool:
        """Whether the op takes the step, and nothing happens to gradients before: no sum over replicas."""
        return self._fuses() and tf.distribute.get_strategy().num_replicas_in_sync == 1

    def _without_repeated_ids(self, grads: list[Any], variables: list[Any]) -> list[Any]:
        """Gradients whose slices name each row once: nothing is squared or clipped before they are summed."""
        summed = _sparse.deduplicated
        accumulated = []
        if self.gradient_accumulation_steps:  # in whole gradients; `_rows_of` finds the lazy rows again
            summed = _sparse.dense
            if self.sparse_update == "lazy":
                pairs = zip(grads, variables, strict=True)
                accumulated = [self._var_key(v) for g, v in pairs if isinstance(g, tf.IndexedSlices)]
        elif self._fuses():
            changed = self.clipnorm or self.clipvalue or self.global_clipnorm or self.loss_scale_factor
            if self._fuses_alone() and not changed:
                summed = _sparse.as_they_are  # the op sums them
        elif self.sparse_update == "exact":
            summed = _sparse.dense
        self._accumulated_slices = frozenset(accumulated)
        # TensorFlow adds up replicas' dense gradients in one operation, which wants them in one type.
        as_given = summed is _sparse.dense and tf.distribute.get_strategy().num_replicas_in_sync > 1
        return [
            summed(g, v.shape[0], g.dtype if as_given else _variables.state_type(v))
            if isinstance(g, tf.IndexedSlices)
            else g
            for g, v in zip(grads, variables, strict=True)
        ]

    def _clip_gradients(self, grads: list[Any]) -> list[Any]:
        """Keras's clipping, in float32 for half types. Slices without repeated ids have the dense norm."""
        if not (self.clipnorm or self.clipvalue or self.global_clipnorm):
            return grads
        if self.global_clipnorm and self._fuses_alone():
            return grads  # `_update_together` does it. Of replicas, Keras clips each one's before their sum
        values = [g.values if isinstance(g, tf.IndexedSlices) else tf.convert_to_tensor(g) for g in grads]
        values = [tf.cast(v, tf.float32) if v.dtype in (tf.float16, tf.bfloat16) else v for v in values]
        if self.global_clipnorm:  # Keras's wants gradients of one type
            scale = self._global_scale(_formula.global_norm(values))
            clipped = [v * tf.cast(scale, v.dtype) for v in values]
        else:
            clipped = super()._clip_gradients(values)
        return [
            _sparse.with_values(g, c) if isinstance(g, tf.IndexedSlices) else c
            for g, c in zip(grads, clipped, strict=True)
        ]

    def _global_scale(self, norm: Any) -> Any:
        """What gradients of this norm are multiplied by. NaN where it is not finite, as in Keras."""
        return self.global_clipnorm / tf.maximum(norm, self.global_clipnorm) + (norm - norm)

    def _apply_weight_decay(self, variables: Any) -> None:
        """Nothing: Keras would decay before the update, while here decay is a term of the formula."""

    @tf.autograph.experimental.do_not_convert
    def update_step(self, gradient: Any, variable: Any, learning_rate: Any) -> None:
        """Update one variable. Keras's interface; a whole step shares its scalars instead."""
        self._update(variable, gradient, self._step(learning_rate, _variables.state_type(variable)))

    def _all_reduce_sum_gradients(self, grads_and_vars: Iterable[Any]) -> Any:
        """Keras's, but for one replica, where it would copy each gradient and keep the traced graph alive."""
        if self._distribution_strategy.num_replicas_in_sync == 1:
            return grads_and_vars
        return super()._all_reduce_sum_gradients(grads_and_vars)

    def _distributed_tf_update_step(
        self, distribution: Any, grads_and_vars: Iterable[Any], learning_rate: Any
    ) -> None:
        grads_and_vars = list(grads_and_vars)
        if isinstance(
            learning_rate, tf.distribute.DistributedValues
        ):  # a schedule's: the same on all replicas
            learning_rate = distribution.experimental_local_results(learning_rate)[0]
        if self._fuses():
            self._fused_step(distribution, grads_and_vars, learning_rate)
            return
        steps: dict[tf.DType, Step] = {}
        for gradient, variable in grads_and_vars:
            dtype = _variables.state_type(variable)
            if dtype not in steps:
                steps[dtype] = self._step(learning_rate, dtype)
            distribution.extended.update(variable, self._update, args=(gradient, steps[dtype]), group=False)

    def _fused_step(
        self, distribution: Any, grads_and_vars: list[tuple[Any, Any]], learning_rate: Any
    ) -> None:
        """Update all variables by the compiled op, on each replica."""
        numbers = self._scalars(tf.cast(learning_rate, tf.float64))
        gradients, variables = zip(*grads_and_vars, strict=True)
        update = functools.partial(self._update_together, variables=variables, numbers=numbers)
        # The first variable stands for all: of what is passed beside it, each replica gets its own part.
        distribution.extended.update(variables[0], update, args=(gradients,), group=False)

    def _update_together(
        self, first: Any, gradients: Iterable[Any], variables: Iterable[Any], numbers: _ops.Scalars
    ) -> None:
        """Update the copies of all variables beside the first one's."""
        items = []
        for gradient, variable in zip(gradients, variables, strict=True):
            index = self._get_variable_index(variable)
            items.append(
                _ops.Item(
                    variable=_variables.beside(first, variable),
                    slots=[_variables.beside(first, slot) for slot in self._slots_of(variable)],
                    gradient=self._rows_of(variable, gradient),
                    decays=index not in self._undecayed,
                    adapts=index not in self._unadapted,
                )
            )
        if self.global_clipnorm and self._fuses_alone():  # the norm in one pass, its scale inside the step
            numbers = numbers._replace(scale=self._global_scale(_ops.global_norm(items)))
        exact = self.sparse_update == "exact"
        _ops.step(items, numbers, square=self.nu_2 != 1, trust_ratio=self.trust_ratio, exact=exact)

    def _scalars(self, rate: Any) -> _ops.Scalars:
        """The compiled op's numbers."""
        c = self._coefficients(rate, (self.beta_1, self.beta_2))
        decay = self._decay(rate)
        return _ops.Scalars(
            gradient=0.0 if c.gradient is None else c.gradient,
            momentum=c.momentum,
            square=0.0 if c.square is None else c.square,
            velocity=1.0 if c.velocity is None else c.velocity,
            epsilon=c.epsilon,
            fading_1=1 - self.beta_1,
            share_1=1 - self.beta_1 if self.grad_averaging else 1.0,
            share_2=1 - self.beta_2,
            decay=0.0 if decay is None else decay,
            scale=1.0,
            rate=rate,
            ratio_min=0.0,
            ratio_max=math.inf,
        )

    def _coefficients(self, rate: Any, betas: Iterable[float]) -> _formula.Coefficients:
        corrections = [
            _formula.bias_correction(b, self.iterations + 1) if self.bias_correction else 1.0 for b in betas
        ]
        return _formula.coefficients(
            self._direction_rate(rate), self.nu_1, self.nu_2, self.epsilon, *corrections
        )

    def _step(self, learning_rate: Any, dtype: tf.DType) -> Step:
        """This step's scalars: made in float64, used in the state's type."""
        rate = tf.cast(learning_rate, tf.float64)
        in_place = self._kernels_serve(dtype)
        betas = [_kernels.held_beta(b, dtype) if in_place else b for b in (self.beta_1, self.beta_2)]
        decay = self._decay(rate)
        return Step(
            rate=tf.cast(rate, dtype),
            decay=None if decay is None else tf.cast(decay, dtype),
            coefficients=self._coefficients(rate, betas).cast(dtype),
            shares=(tf.constant(1 - self.beta_1, dtype), tf.constant(1 - self.beta_2, dtype)),
            betas=_kernels.Betas.of(self.beta_1, self.beta_2, dtype) if in_place else None,
        )

    def _kernels_serve(self, dtype: tf.DType) -> bool:
        """Whether TensorFlow's own kernels take this step."""
        return not self.amsgrad and _kernels.serve(self.nu_1, self.nu_2, (self.beta_1, self.beta_2), dtype)

    def _direction_rate(self, learning_rate: Any) -> Any:
        """The factor that comes with the direction: the learning rate, unless it is applied later."""
        return learning_rate

    def _decay(self, learning_rate: Any) -> Any | None:
        """The factor of w that a step subtracts, None where there is no decay."""
        return None

    def _slots_of(self, variable: Any) -> list[Any]:
        """Momentum, velocity and, with amsgrad, the largest velocity."""
        index = self._get_variable_index(variable)
        kinds = [self._momentums, self._velocities, *([self._velocity_hats] if self.amsgrad else ())]
        return [slots[index].value for slots in kinds]

    def _rows_of(self, variable: Any, gradient: Any) -> Any:
        """The gradient; for a lazy update, of one accumulated from slices, the rows that are not zero."""
        if self._accumulated_slices and self._var_key(variable) in self._accumulated_slices:
            return _sparse.nonzero(gradient, variable.shape[0])
        return gradient

    def _update(self, variable: Any, gradient: Any, step: Step) -> None:
        """Update one variable and its slots, on one device."""
        dtype = _variables.state_type(variable)
        index = self._get_variable_index(variable)
        m, v, *v_hat = (_variables.beside(variable, slot) for slot in self._slots_of(variable))
        decay = None if index in self._undecayed else step.decay
        place: _sparse.Whole | _sparse.Rows = _sparse.Whole()
        gradient = self._rows_of(variable, gradient)
        if isinstance(gradient, tf.IndexedSlices):
            rows = variable.shape[0]
            if tf.distribute.get_strategy().num_replicas_in_sync > 1:  # all replicas' slices, strung together
                gradient = _sparse.deduplicated(gradient, rows, dtype)
            place, gradient = _sparse.Rows(gradient.indices, rows), gradient.values
        g = tf.cast(gradient, dtype)
        if step.betas is not None and dtype == variable.dtype and isinstance(place, _sparse.Whole):
            if decay is not None:
                variable.assign_sub(decay * variable)
            _kernels.step(variable, m, v, g, step.betas, step.coefficients)
            return
        # Each variable is read once: a read a use would be a graph operation a use.
        new_m, new_v = _formula.moments(place.read(m), place.read(v), g, *step.shares, self.grad_averaging)
        w = place.real(tf.cast(place.read(variable), dtype))
        place.write(m, new_m)
        place.write(v, new_v)
        if self.amsgrad:
            new_v = tf.maximum(new_v, place.read(v_hat[0]))
            place.write(v_hat[0], new_v)
        d = place.real(_formula.direction(g, new_m, new_v, step.coefficients))
        change = self._change(w, d, decay, step, index)
        if dtype == variable.dtype:
            place.subtract(variable, change)
        else:
            place.write(variable, tf.cast(w - change, variable.dtype))

    def _change(self, w: Any, d: Any, decay: Any | None, step: Step, index: int) -> Any:
        """What a step along the direction d (times its rate) subtracts from one variable's weights."""
        return d if decay is None else d + decay * w

    @classmethod
    def from_config(cls, config: dict[str, Any], **kwargs: Any) -> Any:
        """An optimizer of this configuration; with fused=True it needs the op to train, not to be made."""
        optimizer = super().from_config(config | {"fused": "auto"}, **kwargs)
        optimizer.fused = _checks.auto_or_flag("fused", config.get("fused", "auto"))
        return optimizer

    def get_config(self) -> dict[str, Any]:
        """The constructor's arguments, with what `exclude_from_weight_decay()` added to the list."""
        config = super().get_config()
        config |= {name: getattr(self, name) for name in self._hyperparameters}
        config["exclude_from_weight_decay"] = self._all_undecayed_patterns()
        config["sparse_update"] = self.sparse_update
        config["fused"] = self.fused
        return config


def _names(variables: Iterable[Any]) -> str:
    names = [_variables.path(variable) for variable in variables]
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
