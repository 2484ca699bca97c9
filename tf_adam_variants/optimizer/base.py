"""The Keras optimizer that all variants are: its slots, and a step from `apply` down to the engine."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from typing import Any, Unpack

import keras
import tensorflow as tf

from tf_adam_variants import engines
from tf_adam_variants.engines import Engine
from tf_adam_variants.engines.coefficients import StepInputs
from tf_adam_variants.engines.hyperparameters import Hyperparameters
from tf_adam_variants.engines.variable_state import GroupSpec, VariableState
from tf_adam_variants.optimizer import accumulation, arguments, averages, gradients, replicas, slots
from tf_adam_variants.optimizer.attributes import Attributes
from tf_adam_variants.optimizer.gradients import Form
from tf_adam_variants.state.savable import Savable
from tf_adam_variants.utils.variables import as_list, is_half, tf_variable


class AdamVariant(Attributes, Savable):
    """An optimizer whose step is described by `Hyperparameters`, which a variant's constructor fills in.

    `apply` replaces that of Keras and calls nothing of it. `utils/internals.py` lists the private attributes
    of Keras's class that are used, and the one private method that is overridden.
    """

    def __init__(
        self,
        hyperparameters: Hyperparameters,
        learning_rate: Any,
        *,
        exclude_from_layer_adaptation: Iterable[str] | None = None,
        **common: Unpack[arguments.Common],
    ) -> None:
        super().__init__(hyperparameters, learning_rate, exclude_from_layer_adaptation, common)

    # -- state -----------------------------------------------------------------------------------------------

    def build(self, variables: Iterable[Any]) -> None:
        """Create slots for variables that have none yet, and fix which variables decay and adapt.

        A later call with more variables adds slots for those; the others keep theirs. The bias corrections
        of an added variable count from then on, as with a new optimizer.

        Args:
            variables: for example the trainable variables of a model.

        Raises:
            ValueError: for a variable without a real floating type, or given twice; with `master_weights`
                or `stochastic_rounding`, where no variable is of half precision.
        """
        variables = as_list(variables, self.name)
        keys = [self._var_key(v) for v in variables]
        gradients.check_distinct(variables, keys, self.name)
        known = self._trainable_variables_indices
        new = [v for v, key in zip(variables, keys, strict=True) if key not in known]
        if self.built and not new:
            return
        slots.check_types(new, self.name)
        for strategy in (self._distribution_strategy, tf.distribute.get_strategy()):
            replicas.check_strategy(strategy, self.name)
        slots_before = len(self.variables) if self.built else 0
        if slots_before:
            slots.build_on_more(self, new)
        else:
            slots.check_half_options(self, variables)
            super().build(new)
        slots.create(self, new)
        for exclusions in self._exclusions:
            exclusions.fix(self._trainable_variables)
        self._devices = frozenset(map(replicas.devices, self._trainable_variables))
        if self.gradient_accumulation_steps:
            self._dense_sums.create()
        self._restore_new_slots(len(new), slots_before)

    def add_variable_from_reference(
        self, reference_variable: Any, name: str | None = None, initializer: str = "zeros"
    ) -> Any:
        """Add a slot. Sums and averages of half precision are float32: bfloat16 cannot count past 256."""
        if name in ("gradient_accumulator", "average") and is_half(reference_variable):
            return slots.add_in_state_dtype(self, reference_variable, name)
        return super().add_variable_from_reference(reference_variable, name=name, initializer=initializer)

    # -- one step, read downwards ----------------------------------------------------------------------------

    @tf.autograph.experimental.do_not_convert  # plain Python: converting it would only take time
    def apply(self, grads: Iterable[Any], trainable_variables: Iterable[Any] | None = None) -> None:
        """Update the variables by one step, or add to the accumulated gradients.

        Args:
            grads: one gradient per variable, of its shape: a tensor, `tf.IndexedSlices` or None.
            trainable_variables: the variables; if left out, those that the optimizer was built on.

        Raises:
            ValueError: where gradients and variables do not match, before anything is changed.
        """
        grads = list(grads)
        if not grads:
            return
        if trainable_variables is None:
            if not self.built:
                raise ValueError(
                    "When passing `grads` without `variables`, the optimizer must already be built on a list "
                    "of variables. Call `optimizer.build(trainable_variables)` first."
                )
            trainable_variables = self._trainable_variables
        variables = as_list(trainable_variables, self.name)
        keys = [self._var_key(v) for v in variables]
        grads = gradients.check(grads, variables, keys, self.name)
        if not self.built:
            self.build(variables)
        self._check_restored()
        for exclusions in self._exclusions:
            exclusions.warn_unmatched(self._trainable_variables)
        gradients.check_known(variables, keys, self._trainable_variables_indices, self.name)
        with (
            keras.name_scope(self.name, caller=self),
            # A wrong index anywhere stops the step before any variable is written.
            tf.control_dependencies(gradients.assert_indices(grads, variables)),
        ):
            present, stepped = gradients.drop_missing(grads, variables)
            overwrite = functools.partial(accumulation.overwrite, self)
            present, stepped = gradients.overwrite_variables(present, stepped, overwrite)
            if present:
                self._update(present, stepped)
                if self.use_ema:
                    averages.update(self, variables)
                for variable in stepped:
                    if variable.constraint is not None:
                        variable.assign(variable.constraint(variable))
            with tf.control_dependencies(gradients.tensors_of(grads)):  # and so for the data
                self._iterations.assign_add(1)

    def _update(self, grads: list[Any], variables: list[Any]) -> None:
        """Bring each gradient into the form of the step, add up those of the replicas, and step."""
        variables = [tf_variable(v) for v in variables]
        accumulates = bool(self.gradient_accumulation_steps)
        form_of = functools.cache(self._form)
        prepared = [
            gradients.prepare(g, v, form_of(v.dtype), self.loss_scale_factor, accumulates)
            for g, v in zip(grads, variables, strict=True)
        ]
        # Gradients accumulate as dense ones; a lazy step finds the rows again.
        lazy = accumulates and self.sparse_update == "lazy"
        lazy_indices = frozenset(
            self._get_variable_index(v)
            for g, v in zip(grads, variables, strict=True)
            if lazy and isinstance(g, tf.IndexedSlices)
        )
        step = (
            functools.partial(accumulation.accumulate, self, variables=variables, lazy_indices=lazy_indices)
            if accumulates
            else functools.partial(AdamVariant._step, self, variables=variables)
        )
        # In the context of a replica, where a callable may ask for it; accumulating, only when it is due.
        rate = None if accumulates else self.learning_rate
        replicas.merge(step, self._distribution_strategy, replicas.sum_gradients(prepared), rate)

    def _form(self, dtype: str) -> Form:
        """The form of the sparse gradients of variables of this type."""
        if self.gradient_accumulation_steps:
            return Form.DENSE
        if not self._engine(dtype, sparse=True).accepts_indexed_slices:
            return Form.DENSE if self.sparse_update == "exact" else Form.UNIQUE_ROWS
        clips = self.clipnorm or self.clipvalue or self.global_clipnorm
        changed = replicas.count() > 1 or clips or self.loss_scale_factor
        return Form.UNIQUE_ROWS if changed else Form.ROWS

    def _engine(self, dtype: Any, sparse: bool) -> Engine:
        group = GroupSpec(tf.as_dtype(dtype), sparse, self._devices)
        return engines.choose(self._hyperparameters, group, self.fused)

    def _step(
        self,
        strategy: Any,
        grads: list[Any],
        learning_rate: Any,
        variables: list[Any],
        all_rows: Mapping[int, Any] | None = None,
    ) -> None:
        """Group the variables by engine, and update each group on each replica.

        Args:
            strategy: that of the replicas.
            grads: one gradient per variable.
            learning_rate: a number, or one per replica.
            variables: the variables.
            all_rows: whether all rows of a variable step, by its index, where the gradient is a mean that is
                dense, and the update lazy. Otherwise its rows that are not zero do.
        """
        all_rows = all_rows or {}
        rate = replicas.first_replica_value(strategy, learning_rate)
        rate, iterations = map(tf.convert_to_tensor, (rate, self.iterations))
        seed = tf.convert_to_tensor(self._rounding_seed) if self.stochastic_rounding else None
        engine_of = functools.cache(self._engine)
        one_place = next(iter(self._devices)) if len(self._devices) == 1 else None
        groups: dict[Any, list[tuple[Any, Any, int]]] = {}
        for gradient, variable in zip(grads, variables, strict=True):
            index = self._get_variable_index(variable)
            first = replicas.first_replica_value(strategy, gradient)
            sparse = isinstance(first, tf.IndexedSlices) or index in all_rows
            devices = one_place or replicas.devices(variable)
            key = engine_of(variable.dtype, sparse), variable.dtype, devices, self._added_at.call_of(index)
            groups.setdefault(key, []).append((gradient, variable, index))
        scale = self._gradient_scale(strategy, grads, variables, next(iter(groups))[0])
        for (engine, _, _, call), members in groups.items():
            inputs = StepInputs(self._added_at.count(iterations, call), rate, scale, seed)
            own_gradients, own_variables, own_indices = zip(*members, strict=True)
            step = functools.partial(
                self._step_on_device,
                variables=own_variables,
                indices=own_indices,
                all_rows=all_rows,
                engine=engine,
                inputs=inputs,
            )
            # The first variable stands for all of them: each replica receives its part of the gradients.
            strategy.extended.update(own_variables[0], step, args=(own_gradients,), group=False)

    def _gradient_scale(self, strategy: Any, grads: list[Any], variables: list[Any], engine: Engine) -> Any:
        """The factor that clips by the global norm of the summed gradients; None for none."""
        if not self.global_clipnorm:
            return None
        summed = [
            gradients.unique_rows(replicas.first_replica_value(strategy, g), v)
            for g, v in zip(grads, variables, strict=True)
        ]
        norm = engine.global_norm(summed, replicas.devices(variables[0])[0])
        return gradients.clip_scale(norm, self.global_clipnorm)

    def _step_on_device(
        self,
        first: Any,
        grads: Any,
        variables: Any,
        indices: Any,
        all_rows: Mapping[int, Any],
        engine: Engine,
        inputs: Any,
    ) -> None:
        """Update variables on one device, that of the first one."""
        states = []
        for gradient, variable, index in zip(grads, variables, indices, strict=True):
            if index in all_rows:
                gradient = gradients.nonzero_rows(gradient, all_rows[index])
            if self.clipnorm or self.clipvalue:
                gradient = gradients.unique_rows(gradient, variable)
                gradient = gradients.clip(gradient, self.clipnorm, self.clipvalue)
            state = self._variable_state(gradient, variable, index, first.device)
            if isinstance(gradient, tf.IndexedSlices) and not engine.accepts_indexed_slices:
                slices = gradients.unique_rows(gradient, variable)
                state = state.select_rows(slices, gradients.padding_mask(slices, variable.shape[0]))
            states.append(state)
        engine.step(states, self._hyperparameters, inputs, exact=self.sparse_update == "exact")

    def _variable_state(self, gradient: Any, variable: Any, index: int, device: str) -> VariableState:
        """A variable with its slots on this device, and its gradient."""

        def slot(exists: bool, name: str) -> Any:
            value = getattr(self, name)[index] if exists else None
            return None if value is None else replicas.on_device(value.value, device)

        return VariableState(
            replicas.on_device(variable, device),
            momentum=slot(True, "_momentums"),
            velocity=slot(True, "_velocities"),
            gradient=gradient,
            weight_decay=index not in self._decay_exclusions.indices,
            layer_adaptation=index not in self._adaptation_exclusions.indices,
            velocity_hat=slot(self._hyperparameters.amsgrad, "_velocity_hats"),
            master_weight=slot(self.master_weights, "_master_weights"),
            rng_stream=index if self.stochastic_rounding and is_half(variable) else None,
        )

    def finalize_variable_values(self, var_list: Iterable[Any]) -> None:
        """Overwrite the variables by their averages: `fit` calls it at its end."""
        if self.use_ema:
            averages.overwrite(self, self._distribution_strategy, list(var_list))

    @tf.autograph.experimental.do_not_convert
    def update_step(self, gradient: Any, variable: Any, learning_rate: Any) -> None:
        """Update one variable, as Keras's interface has it; `apply` updates all of them at once."""
        self._step(self._distribution_strategy, [gradient], learning_rate, [tf_variable(variable)])
