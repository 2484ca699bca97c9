"""The Keras optimizer that all variants are. It ties Keras's `apply` to the engines."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any, Unpack

import keras
import tensorflow as tf

from tf_adam_variants import _arguments, _gradients, _slots, _variables, engines
from tf_adam_variants._configured import Configured
from tf_adam_variants._rows import Rows
from tf_adam_variants._saved_state import SavedState
from tf_adam_variants._step import Parameter, StepInputs, Workload
from tf_adam_variants._update import Update
from tf_adam_variants.engines import Engine, formula

# Keras 3.6 counts the step in the method that we replace under replicas, later versions in `apply`.
_COUNTS_IN_BACKEND_APPLY = (
    "assign_add" in keras.optimizers.Optimizer._backend_apply_gradients.__code__.co_names
)


class AdamVariant(Configured):
    """An optimizer whose step is an `Update`. A variant's constructor fills one in and hands it over.

    Keras's private names that this class and `Configured` use, all of them here: the hook
    `_distributed_tf_update_step` (all variables of a step at once, so that scalars are computed once),
    `_apply_weight_decay` (switched off: decay belongs to the formula), `_all_reduce_sum_gradients`,
    `_clip_gradients`, `_use_weight_decay`, `_check_variables_are_known`,
    `_overwrite_model_variables_with_average_value`, `_model_variables_moving_average`,
    `_accumulated_gradients`, `_backend_apply_gradients` (where replicas meet), `_iterations`,
    `_trainable_variables_indices`, `_var_key`, `_get_variable_index`, `_trainable_variables`,
    `_distribution_strategy`, `_learning_rate`; and TensorFlow's `maybe_merge_call`, with which Keras's class
    lets replicas meet, and `_trackable_children` (keeps the layout out of SavedModels).
    """

    def __init__(
        self,
        update: Update,
        learning_rate: Any,
        *,
        exclude_from_layer_adaptation: Iterable[str] | None = None,
        **common: Unpack[_arguments.Common],
    ) -> None:
        super().__init__(update, learning_rate, exclude_from_layer_adaptation, common)
        self._without_decay: frozenset[int] = frozenset()  # indices of variables, fixed by `build`
        self._without_adaptation: frozenset[int] = frozenset()
        self._lazily_accumulated: frozenset[Any] = frozenset()
        self._stepping: frozenset[Any] = frozenset()  # keys of the variables of this step
        self._watcher: Callable[[list[int], Any], Any] | None = None  # told the norms of the steps traced now
        self._layout = SavedState(self)  # the name is that of its part in checkpoints

    # -- state -----------------------------------------------------------------------------------------------

    def build(self, variables: Iterable[Any]) -> None:
        """Make the slots of variables that have none yet, and fix which variables decay and adapt.

        Called again, with other variables among them, it adds slots for those; the others keep theirs. For
        an added variable the bias corrections count from here: it trains as with an optimizer of its own.

        Args:
            variables: a model's trainable variables, for one.

        Raises:
            ValueError: for a variable that has no real floating type, or that is given twice; with
                `master_weights` or `stochastic_rounding`, where no variable has a half type.
        """
        variables = _variables.listed(variables, self.name)
        keys = [self._var_key(v) for v in variables]
        if len(set(keys)) != len(keys):
            raise ValueError(
                f"{self.name} was given a variable more than once: {_variables.paths(variables)}"
            )
        known = self._trainable_variables_indices
        new = [v for v, key in zip(variables, keys, strict=True) if key not in known]
        if self.built and not new:
            return
        _slots.check_types(new, self.name)
        for strategy in (self._distribution_strategy, tf.distribute.get_strategy()):
            _variables.check_strategy(strategy, self.name)
        added = self.built
        before = len(self.variables) if added else 0
        if added:
            self._build_on_more(new)
        else:
            for option in ("master_weights", "stochastic_rounding"):
                if getattr(self, option):
                    _slots.check_some_are_half(variables, option)
            super().build(new)
        slots = dict(
            zip(("_momentums", "_velocities"), _slots.add(self, new, "momentum", "velocity"), strict=True)
        )
        if self._update.amsgrad:
            (slots["_velocity_hats"],) = _slots.add(self, new, "velocity_hat")
        if self.master_weights:
            slots["_master_weights"] = _slots.add_master_weights(self, new)
        for name, made in slots.items():
            if added:
                getattr(self, name).extend(made)
            else:
                setattr(self, name, made)
        if self.stochastic_rounding and not added:
            self._rounding_seed = _slots.add_rounding_seed(self)
        variables = self._trainable_variables
        self._without_decay = self._decay_exclusions.of(variables)
        self._without_adaptation = (
            self._without_decay
            if self._adaptation_exclusions.patterns is None
            else self._adaptation_exclusions.of(variables)
        )
        self._devices = frozenset(map(_variables.devices, variables))
        self._layout.slots_were_made(before)

    def _build_on_more(self, new: list[Any]) -> None:
        """What Keras's `build` does, for variables that come after those it was called with."""
        first = len(self._trainable_variables)
        for i, variable in enumerate(new, first):
            self._trainable_variables_indices[self._var_key(variable)] = i
        self._trainable_variables.extend(new)
        with tf.init_scope():
            updates = int(keras.ops.convert_to_numpy(self.iterations))
        self._layout.starts |= dict.fromkeys(range(first, first + len(new)), updates)
        if self.use_ema:
            self._model_variables_moving_average.extend(_slots.add_averages(self, new))
        if self.gradient_accumulation_steps:
            self._accumulated_gradients.extend(
                self.add_variable_from_reference(variable, name="gradient_accumulator") for variable in new
            )

    def add_variable_from_reference(
        self, reference_variable: Any, name: str | None = None, initializer: str = "zeros"
    ) -> Any:
        """Keras's, but sums and averages of half types are float32: bfloat16 ones add up to 256 at most."""
        if name in ("gradient_accumulator", "average") and _variables.is_half(reference_variable):
            return _slots.in_type_of_arithmetic(self, reference_variable, name)
        return super().add_variable_from_reference(reference_variable, name=name, initializer=initializer)

    def _update_model_variables_moving_average(self, trainable_variables: Iterable[Any]) -> None:
        """Keras's, in the type of the averages: in bfloat16, 0.999 is 1."""
        first = tf.equal(tf.convert_to_tensor(self.iterations), 0)
        for variable, average in zip(trainable_variables, self._model_variables_moving_average, strict=True):
            if average is not None:
                whole, part = (tf.constant(x, average.dtype) for x in (1.0, 1 - self.ema_momentum))
                value = tf.cast(tf.convert_to_tensor(variable), average.dtype)
                average.assign(average + tf.where(first, whole, part) * (value - average))

    def save_own_variables(self, store: Any) -> None:
        """Write the state, and what it consists of, to a Keras store."""
        self._layout.save(store)

    def load_own_variables(self, store: Any) -> None:
        """Set the state from a Keras store, now or, before the slots are there, when they are made.

        Raises:
            ValueError: that names the differences, where the saved state is another optimizer's.
        """
        self._layout.load(store)

    def _trackable_children(self, save_type: str = "checkpoint", **kwargs: Any) -> dict[str, Any]:
        children = super()._trackable_children(save_type, **kwargs)
        if save_type == "savedmodel":  # it holds no Python state, and would be missed on loading
            children = {name: child for name, child in children.items() if child is not self._layout}
        return children

    # -- one step, in the order in which Keras calls these ---------------------------------------------------

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
            self._layout.finish()
            if trainable_variables is None:
                trainable_variables = self._trainable_variables
        grads = list(grads)
        if not grads or trainable_variables is None:
            super().apply(grads)  # nothing to do, or Keras says what is missing
            return
        variables = _variables.listed(trainable_variables, self.name)
        keys = [self._var_key(v) for v in variables]
        grads = _gradients.checked(grads, variables, keys, self.name)
        if not self.built:  # not below, where the slots' creation would wait for the ids
            self.build(variables)
        self._stepping = frozenset(keys)
        # A wrong id anywhere stops the step before any variable is written.
        with tf.control_dependencies(_gradients.assert_ids_in_range(grads, variables)):
            sparse = [i for i, gradient in enumerate(grads) if isinstance(gradient, tf.IndexedSlices)]
            for i in sparse:
                grads[i] = self._with_ids_summed(grads[i], variables[i])
            if self.gradient_accumulation_steps or self.loss_scale_factor:
                grads = [  # slices are in this type
                    g
                    if g is None or isinstance(g, tf.IndexedSlices)
                    else tf.cast(g, _variables.state_dtype(v))
                    for g, v in zip(grads, variables, strict=True)
                ]
            # Gradients accumulate as dense ones; of these the step finds the rows again.
            lazily = self.gradient_accumulation_steps and self.sparse_update == "lazy"
            self._lazily_accumulated = frozenset(self._var_key(variables[i]) for i in sparse if lazily)
            super().apply(grads, variables)

    def _check_variables_are_known(self, variables: Iterable[Any]) -> None:
        """Raise a ValueError for variables without slots: Keras's check, which says what helps."""
        unknown = [v for v in variables if self._var_key(v) not in self._trainable_variables_indices]
        if unknown:
            raise ValueError(
                f"Unknown variables: {_variables.paths(unknown)}. {self.name} has no slots for them. To add "
                "some, call `optimizer.build(model.trainable_variables)` before the step (the others keep "
                "theirs), or compile the model with a new optimizer"
            )

    def _overwrite_model_variables_with_average_value(self, trainable_variables: Iterable[Any]) -> None:
        """Overwrite each variable by its average, but none that is frozen.

        Keras's goes through variables and averages in parallel, so that a list without the frozen variables
        gets the averages of others.
        """
        of_the_step = trainable_variables is self._trainable_variables
        for variable in trainable_variables:
            average = self._model_variables_moving_average[self._get_variable_index(variable)]
            if average is not None and not (of_the_step and self._var_key(variable) not in self._stepping):
                self._distribution_strategy.extended.update(
                    _variables.tf_variable(variable),
                    lambda a, b: a.assign(tf.cast(b, a.dtype)),
                    args=(average,),
                )

    def _with_ids_summed(self, slices: tf.IndexedSlices, variable: Any) -> Any:
        """The gradient with each row once: nothing is squared or clipped before repeated ids are summed."""
        rows, dtype = variable.shape[0], _variables.state_dtype(variable)
        one_replica = self._replicas() == 1
        accumulates = bool(self.gradient_accumulation_steps)
        takes_slices = not accumulates and self._engine(variable.dtype, sparse=True).takes_slices
        if accumulates:
            return _gradients.to_dense(slices, rows, dtype)
        if self.sparse_update == "exact" and not takes_slices:
            # TensorFlow adds up replicas' dense gradients in one operation, which wants them in one type.
            return _gradients.to_dense(slices, rows, dtype if one_replica else slices.dtype)
        clips = self.clipnorm or self.clipvalue or self.global_clipnorm
        if takes_slices and one_replica and not (clips or self.loss_scale_factor):
            return slices
        return _gradients.sum_repeated_ids(slices, rows, dtype)

    def _replicas(self) -> int:
        return tf.distribute.get_strategy().num_replicas_in_sync

    def _engine(self, dtype: Any, sparse: bool) -> Engine:
        workload = Workload(tf.as_dtype(dtype), sparse, self._devices)
        return engines.choose(self._update, workload, self.fused)

    def _backend_apply_gradients(self, grads: list[Any], trainable_variables: list[Any]) -> None:
        """Keras's, but that several replicas meet before its conditions, as within one they cannot."""
        if self._replicas() == 1:
            super()._backend_apply_gradients(grads, trainable_variables)
            return
        meet = functools.partial(
            tf.__internal__.distribute.interim.maybe_merge_call, strategy=self._distribution_strategy
        )
        if self.gradient_accumulation_steps:
            variables = [_variables.tf_variable(variable) for variable in trainable_variables]
            summed = self._all_reduce_sum_gradients(zip(grads, variables, strict=True))
            meet(self._accumulate, grads_and_vars=summed, learning_rate=self.learning_rate)
        else:
            self._backend_update_step(grads, trainable_variables, self.learning_rate)
        if self.use_ema:
            self._update_model_variables_moving_average(self._trainable_variables)
            if self.ema_overwrite_frequency:
                meet(self._overwrite_with_averages)
        if _COUNTS_IN_BACKEND_APPLY:
            self._iterations.assign_add(1)

    def _accumulate(self, strategy: Any, grads_and_vars: Iterable[Any], learning_rate: Any) -> None:
        """Add the sum of the replicas' gradients to what each has accumulated; take the step if it is due."""
        gradients, variables = zip(*grads_and_vars, strict=True)
        steps = self.gradient_accumulation_steps
        accumulated = [self._accumulated_gradients[self._get_variable_index(v)].value for v in variables]

        def on_each(function: Any) -> None:
            for total, gradient in zip(accumulated, gradients, strict=True):
                strategy.extended.update(total, function, args=(gradient,), group=False)

        def update() -> None:
            on_each(lambda total, _: total.assign(total / steps))
            self._distributed_tf_update_step(
                strategy, zip(accumulated, variables, strict=True), learning_rate
            )
            for total in self._accumulated_gradients:  # all, as in Keras
                if total is not None:
                    strategy.extended.update(total.value, lambda v: v.assign(tf.zeros_like(v)), group=False)

        on_each(lambda total, gradient: total.assign_add(gradient))
        tf.cond(tf.equal((self._iterations.value + 1) % steps, 0), update, lambda: None)

    def _overwrite_with_averages(self, strategy: Any) -> None:
        """Every `ema_overwrite_frequency` steps."""
        due = tf.equal((tf.convert_to_tensor(self.iterations) + 1) % self.ema_overwrite_frequency, 0)
        overwrite = functools.partial(
            self._overwrite_model_variables_with_average_value, self._trainable_variables
        )
        tf.cond(due, overwrite, lambda: None)

    def _clip_gradients(self, grads: list[Any]) -> list[Any]:
        """Clip on one replica. The sum of several is clipped in the step, as is the global norm always."""
        return grads if self._replicas() > 1 else self._clipped(grads)

    def _clipped(self, grads: list[Any]) -> list[Any]:
        return _gradients.clip(grads, self.clipnorm, self.clipvalue)

    def _apply_weight_decay(self, variables: Any) -> None:
        """Nothing: Keras would decay before the update, while here decay is a term of the formula."""

    def _all_reduce_sum_gradients(self, grads_and_vars: Iterable[Any]) -> Any:
        """Keras's, but for one replica, where it would copy each gradient and keep the traced graph alive."""
        if self._replicas() == 1:
            return grads_and_vars
        # TensorFlow adds up all gradients at once, which wants them in one type.
        by_type: dict[tf.DType, list[tuple[Any, Any]]] = {}
        for gradient, variable in grads_and_vars:
            by_type.setdefault(gradient.dtype, []).append((gradient, variable))
        summed = map(super()._all_reduce_sum_gradients, by_type.values())
        return [pair for pairs in summed for pair in pairs]

    def _distributed_tf_update_step(
        self, strategy: Any, grads_and_vars: Iterable[Any], learning_rate: Any
    ) -> None:
        """Update all variables, on each replica."""
        grads_and_vars = list(grads_and_vars)
        learning_rate = _variables.on_first_replica(strategy, learning_rate)  # a schedule's: the same on all
        learning_rate, iterations = map(tf.convert_to_tensor, (learning_rate, self.iterations))
        rounding_seed = tf.convert_to_tensor(self._rounding_seed) if self.stochastic_rounding else None
        engine_of = functools.cache(self._engine)
        (common_devices, *others) = self._devices
        groups: dict[Any, list[tuple[Any, Any]]] = {}
        for gradient, variable in grads_and_vars:
            one = _variables.on_first_replica(strategy, gradient)
            sparse = isinstance(one, tf.IndexedSlices) or self._lazily_accumulates(variable)
            devices = _variables.devices(variable) if others else common_devices
            start = self._layout.start_of(self._get_variable_index(variable))
            key = engine_of(variable.dtype, sparse), variable.dtype, devices, start
            groups.setdefault(key, []).append((gradient, variable))
        scale = self._gradient_scale(strategy, grads_and_vars, next(iter(groups))[0])
        for (engine, _, _, start), pairs in groups.items():
            count = iterations - start if start else iterations
            inputs = StepInputs(count, learning_rate, scale, rounding_seed)
            gradients, variables = zip(*pairs, strict=True)
            take = functools.partial(self._take, variables=variables, engine=engine, inputs=inputs)
            # The first variable stands for all of them: each replica is given its part of the gradients.
            strategy.extended.update(variables[0], take, args=(gradients,), group=False)

    def _lazily_accumulates(self, variable: Any) -> bool:
        return bool(self._lazily_accumulated) and self._var_key(variable) in self._lazily_accumulated

    def _gradient_scale(self, strategy: Any, grads_and_vars: list[Any], engine: Engine) -> Any:
        """The factor that clips by the global norm of the gradients of all replicas; None for none."""
        if not self.global_clipnorm:
            return None
        gradients = [self._summed(_variables.on_first_replica(strategy, g), v) for g, v in grads_and_vars]
        device = _variables.devices(grads_and_vars[0][1])[0]
        return _gradients.clip_scale(engine.global_norm(gradients, device), self.global_clipnorm)

    def _summed(self, gradient: Any, variable: Any) -> Any:
        """The gradient with each row once: the slices of several replicas stand one after the other."""
        if self._replicas() == 1 or not isinstance(gradient, tf.IndexedSlices):
            return gradient
        return _gradients.sum_repeated_ids(gradient, variable.shape[0], _variables.state_dtype(variable))

    def _take(self, first: Any, gradients: Any, variables: Any, engine: Engine, inputs: StepInputs) -> None:
        """Update variables on one device, that of the first one."""
        pairs = zip(gradients, variables, strict=True)
        parameters = [self._parameter(g, v, first.device) for g, v in pairs]
        with tf.control_dependencies(self._watched(parameters, variables, inputs)):
            if not engine.takes_slices:
                parameters = [self._by_rows(p) for p in parameters]
            engine.take(parameters, self._update, inputs, exact=self.sparse_update == "exact")

    def _watched(self, parameters: list[Parameter], variables: Any, inputs: StepInputs) -> list[Any]:
        """Tell who watches the step its norms; what has to be done before it is taken."""
        device = parameters[0].variable.device
        if self._watcher is None or device != _variables.devices(variables[0])[0]:
            return []  # all replicas have the same norms
        of_the_formula = []
        for p, variable in zip(parameters, variables, strict=True):
            if isinstance(p.gradient, tf.IndexedSlices):
                sums = _gradients.to_dense if self.sparse_update == "exact" else _gradients.sum_repeated_ids
                p = p._replace(gradient=sums(p.gradient, variable.shape[0], _variables.state_dtype(variable)))
            of_the_formula.append(self._by_rows(p))
        norms = formula.norms(of_the_formula, self._update, inputs)
        with tf.control_dependencies([norms]):
            for p in of_the_formula:
                for tensor in p:
                    if isinstance(tensor, Rows):  # the engine may take whole variables
                        tensor.allow_dense_reads()
            return [self._watcher([self._get_variable_index(v) for v in variables], norms)]

    def _parameter(self, gradient: Any, variable: Any, device: str) -> Parameter:
        """A variable with its slots and its gradient, on this device."""
        index = self._get_variable_index(variable)
        tensors = {"variable": variable} | {
            name: slots[index].value for name, slots in self._slots().items() if slots[index] is not None
        }
        tensors = {name: _variables.on_device(tensor, device) for name, tensor in tensors.items()}
        if self._lazily_accumulates(variable):
            gradient = _gradients.nonzero_rows(gradient)
        if self._replicas() > 1 and (self.clipnorm or self.clipvalue):
            (gradient,) = self._clipped([self._summed(gradient, variable)])
        return Parameter(
            **tensors,
            gradient=gradient,
            weight_decay=index not in self._without_decay,
            layer_adaptation=index not in self._without_adaptation,
            stream=index if self.stochastic_rounding and _variables.is_half(variable) else None,
        )

    def _by_rows(self, p: Parameter) -> Parameter:
        """The rows that its gradient names, where that is slices: what engines take that take no slices."""
        if not isinstance(p.gradient, tf.IndexedSlices):
            return p
        gradient = self._summed(p.gradient, p.variable)
        ids = gradient.indices
        tensors = (p.variable, p.momentum, p.velocity, p.velocity_hat, p.master_weight)
        variable, momentum, velocity, velocity_hat, master_weight = (
            None if tensor is None else Rows(tensor, ids) for tensor in tensors
        )
        return p._replace(
            variable=variable,
            momentum=momentum,
            velocity=velocity,
            velocity_hat=velocity_hat,
            master_weight=master_weight,
            gradient=gradient.values,
            ids=ids,
            sentinels=_gradients.sentinels(gradient, p.variable.shape[0]),
        )

    def _slots(self) -> dict[str, list[Any]]:
        """The slots of all variables, by the names that they have in a `Parameter`."""
        slots = {"momentum": self._momentums, "velocity": self._velocities}
        if self._update.amsgrad:
            slots["velocity_hat"] = self._velocity_hats
        if self.master_weights:
            slots["master_weight"] = self._master_weights
        return slots

    @tf.autograph.experimental.do_not_convert
    def update_step(self, gradient: Any, variable: Any, learning_rate: Any) -> None:
        """Update one variable: Keras's interface. `apply` updates all of them with one `Step`."""
        pairs = [(gradient, _variables.tf_variable(variable))]
        self._distributed_tf_update_step(self._distribution_strategy, pairs, learning_rate)
