"""Mistakes planted in the package, one at a time: does the quick suite notice each?

    python tests/tools/mutants.py                  all of them, with progress
    python tests/tools/mutants.py --list           their names
    python tests/tools/mutants.py --only accumul   those whose name contains this
    python tests/tools/mutants.py --jobs 2         two at a time

Each runs in a copy of the tree: first the tests that are most likely to fail, and the rest of the quick
suite (`make test`) only if they pass. So a mistake that is killed is one that `make test` kills.
"""

import argparse
import concurrent.futures
import multiprocessing
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
import time
from typing import NamedTuple

import pytest

# Processes begin as copies of one that has imported TensorFlow.
PROCESSES = multiprocessing.get_context("forkserver")
ROOT = pathlib.Path(__file__).parents[2]
COPIED = ("tf_adam_variants", "custom_ops", "tests", "docs", "examples")
SECONDS = 1800  # for the quick suite; a mistake that hangs it is noticed too


class Mutant(NamedTuple):
    """A mistake: in this file, this text is replaced."""

    name: str
    file: str
    text: str  # occurs exactly once
    replacement: str
    tests: str  # most likely to fail: "steps" for test_steps.py, or "steps::test_float32"

    @property
    def is_cpp(self):
        return self.file.startswith("custom_ops/")


def _mutants(folder, rows):
    return [Mutant(name, folder + file, *rest) for name, file, *rest in rows]


# fmt: off
# ruff: noqa: E501
PYTHON = _mutants("tf_adam_variants/", [
    # -- the formula and its coefficients
    ("first moment without decay", "engines/formula.py", "m += c.m_weight * (g - m)", "m += c.m_weight * g", "golden"),
    ("second moment of the absolute gradient", "engines/formula.py",
     "return m, v + c.v_weight * (tf.square(g) - v)", "return m, v + c.v_weight * (tf.abs(g) - v)", "golden"),
    ("second moment off by 1e-5", "engines/formula.py",
     "return m, v + c.v_weight * (tf.square(g) - v)", "return m, v + c.v_weight * (1.00001 * tf.square(g) - v)",
     "fuzz::test_engines"),
    ("a small beta as a difference", "engines/coefficients.py", "return beta < 0.5", "return beta < 0", "steps::test_a_small_beta_forgets_a_large_gradient"),
    ("amsgrad takes the smaller one", "engines/formula.py",
     "v_hat = v if s.velocity_hat is None else tf.maximum(v,", "v_hat = v if s.velocity_hat is None else tf.minimum(v,",
     "steps::test_float32"),
    ("nu_1 the wrong way round", "engines/coefficients.py", "c_g=1 - hp.nu_1", "c_g=hp.nu_1", "golden"),
    ("nu_2 the wrong way round", "engines/coefficients.py", "c_g2=1 - hp.nu_2", "c_g2=hp.nu_2", "golden"),
    ("epsilon inside the root", "engines/formula.py", "/ (tf.sqrt(v) + c.epsilon)",
     "/ tf.sqrt(v + tf.square(c.epsilon))", "fuzz::test_engines"),
    ("epsilon before the bias correction", "engines/coefficients.py",
     "epsilon=root * fixed.epsilon", "epsilon=fixed.epsilon", "golden"),
    ("bias correction one step late", "engines/coefficients.py",
     "tf.tanh(tf.multiply(t, halves))", "tf.tanh(tf.multiply(t + 1, halves))", "golden"),
    ("bias correction cancels", "engines/coefficients.py", "tf.realdiv(tf.multiply(tanh, 2.0), tf.add(tanh, 1.0))",
     "tf.cast(1 - tf.cast(tf.exp(-2 * t * halves), tf.float32), tf.float64)",
     "coefficients::test_bias_corrections_do_not_cancel"),
    ("TFLite cannot convert the bias correction", "engines/coefficients.py",
     "tf.realdiv(tf.multiply(tanh, 2.0), tf.add(tanh, 1.0))", "-tf.math.expm1(-2 * t * halves)", "tflite"),
    ("bias_correction=False ignored", "engines/coefficients.py",
     "if beta and hp.bias_correction else", "if beta else", "golden"),
    ("grad_averaging=False ignored", "engines/coefficients.py",
     "m_weight=1 - hp.beta_1 if hp.grad_averaging else 1.0", "m_weight=1 - hp.beta_1", "steps::test_float32"),
    ("betas as TensorFlow's kernels round them", "engines/resource_apply.py",
     "return 1.0 - float(number(1) - number(beta))", "return beta", "steps::test_the_first_step_is_exact_to_float32"),
    ("TensorFlow's kernels do not clip", "engines/resource_apply.py", "        if scales:", "        if False:",
     "clipping::test_clipping_across_types"),
    # -- weight decay and exclusions
    ("decay without the learning rate", "engines/coefficients.py",
     "        return 1.0\n    # Rounded", "        return 0.0\n    # Rounded", "weight_decay"),
    ("the peak is 1", "engines/coefficients.py", "return float(floatx(hp.peak_learning_rate))", "return 1.0",
     "weight_decay"),
    ("the peak is not rounded as the rate is", "engines/coefficients.py",
     "return float(floatx(hp.peak_learning_rate))", "return hp.peak_learning_rate", "weight_decay"),
    ("independent decay follows the rate", "engines/coefficients.py",
     ' or hp.weight_decay_mode == "independent"', "", "weight_decay"),
    ("the peak of a warm-up is where it begins", "engines/hyperparameters.py",
     'for attribute in ("warmup_target", "initial_learning_rate")',
     'for attribute in ("initial_learning_rate", "warmup_target")', "weight_decay"),
    ("excluded variables decay", "optimizer/base.py",
     "weight_decay=index not in self._decay_exclusions.indices", "weight_decay=True", "exclusions"),
    ("excluded variables have a trust ratio", "optimizer/base.py",
     "layer_adaptation=index not in self._adaptation_exclusions.indices", "layer_adaptation=True", "exclusions"),
    ("decay's exclusions keep the trust ratio", "optimizer/exclusions.py",
     "self.indices = self._default.indices", "self.indices = frozenset()", "exclusions"),
    ("what a state excludes is not restored", "optimizer/exclusions.py",
     "self.indices ^= frozenset(changed)", "pass", "exclusions"),
    ("a state excludes whatever the patterns are", "state/built.py",
     "if patterns.get(name) == exclusions.patterns_in_use:", "if name in patterns:", "exclusions"),
    ("patterns match at the beginning only", "optimizer/exclusions.py",
     "for i, v in enumerate(variables) if re.search(", "for i, v in enumerate(variables) if re.match(", "exclusions"),
    ("the method's list is forgotten", "optimizer/exclusions.py",
     "*self._added, *self._listed]", "*self._added]", "exclusions"),
    ("a pattern that matches nothing is silent", "optimizer/exclusions.py",
     "if not self._unmatched:", "if True:", "exclusions"),
    # -- the trust ratio
    ("trust ratio upside down", "engines/formula.py", "w_norm / u_norm, 1)", "u_norm / w_norm, 1)", "golden"),
    ("trust ratio of a zero norm", "engines/formula.py", "(w_norm > 0) & (u_norm > 0)", "(u_norm > 0)",
     "weight_decay::test_lamb_s_ratio_is_1_where_a_norm_is_0"),
    ("trust ratio without the decay", "engines/formula.py",
     "rate *= trust_ratio(*half_norms(w, u, s.padding)",
     "rate *= trust_ratio(*half_norms(w, u - c.weight_decay * w, s.padding)", "golden"),
    ("trust_ratio_min as a maximum", "engines/formula.py",
     "tf.maximum(ratio, c.trust_ratio_min)", "tf.minimum(ratio, c.trust_ratio_min)", "steps::test_every_pair_of_options"),
    ("trust_ratio_max ignored", "engines/formula.py",
     "tf.minimum(ratio, c.trust_ratio_max)", "ratio", "golden"),
    # -- sparse gradients
    ("exact without fused kernels is lazy", "optimizer/base.py",
     'return Form.DENSE if self.sparse_update == "exact" else Form.UNIQUE_ROWS', "return Form.UNIQUE_ROWS", "sparse::test_every_case"),
    ("lazy without fused kernels is exact", "optimizer/base.py",
     'return Form.DENSE if self.sparse_update == "exact" else Form.UNIQUE_ROWS', "return Form.DENSE", "sparse::test_lazy_leaves_other_rows_alone"),
    ("fused lazy is exact", "optimizer/base.py", 'exact=self.sparse_update == "exact")', "exact=True)", "sparse::test_lazy_leaves_other_rows_alone"),
    ("fused exact is lazy", "optimizer/base.py", 'exact=self.sparse_update == "exact")', "exact=False)", "sparse::test_every_case"),
    ("the largest of repeated indices wins", "optimizer/gradients.py",
     "tf.math.unsorted_segment_sum(values, position, tf.size(unique))",
     "tf.math.unsorted_segment_max(values, position, tf.size(unique))", "gradients::test_the_form_of_a_sparse_gradient"),
    ("repeated indices have their mean", "optimizer/gradients.py",
     "tf.math.unsorted_segment_sum(tf.cast(slices.values, dtype), slices.indices, rows)",
     "tf.math.unsorted_segment_mean(tf.cast(slices.values, dtype), slices.indices, rows)", "gradients::test_the_form_of_a_sparse_gradient"),
    ("padding counts in the norms", "optimizer/gradients.py",
     "slices.indices >= rows, [-1]", "slices.indices > rows, [-1]", "sparse::test_static_and_dynamic_numbers_of_slices"),
    ("indices out of range pass", "optimizer/gradients.py",
     "tf.constant(rows, indices.dtype), message", "tf.constant(rows + 1, indices.dtype), message", "sparse::test_indices_out_of_range_write_nothing"),
    ("a table is copied at each dense read", "engines/variable_state.py",
     "tf.raw_ops.DisableCopyOnRead(resource=self.variable.handle)", "pass", "sparse::test_rows_are_written_in_place_and_read_without_a_copy"),
    # -- clipping
    ("clipnorm twice as large", "optimizer/gradients.py", "to_float32(values), clipnorm)",
     "to_float32(values), 2 * clipnorm)", "clipping::test_gradients_are_clipped"),
    ("clipvalue from one side", "optimizer/gradients.py", "-clipvalue, clipvalue)", "-np.inf, clipvalue)"
     .replace("-np.inf", 'float("-inf")'), "clipping::test_clipping_across_types"),
    ("global norm always scales", "optimizer/gradients.py",
     "global_clipnorm / tf.maximum(norm, global_clipnorm)", "global_clipnorm / (norm + global_clipnorm)", "clipping::test_clipping_across_types"),
    ("a global norm of NaN is hidden", "optimizer/gradients.py", " + (norm - norm)", "", "faults::test_global_clipnorm_makes_everything_nan"),
    ("each replica's gradient is clipped", "optimizer/base.py",
     "gradients.prepare(g, v, form_of(v.dtype), self.loss_scale_factor, accumulates)",
     "gradients.clip(gradients.prepare(g, v, form_of(v.dtype), self.loss_scale_factor, accumulates), "
     "self.clipnorm, self.clipvalue)", "strategies::test_loop_clips_the_sum_over_replicas"),
    ("rows of several replicas are clipped apart", "optimizer/base.py",
     "                gradient = gradients.unique_rows(gradient, variable)\n", "", "strategies::test_loop_clips_the_sum_over_replicas"),
    ("replicas are averaged", "optimizer/replicas.py", "ReduceOp.SUM", "ReduceOp.MEAN", "strategies::test_loop"),
    # -- accumulation
    ("accumulated sums are not divided", "optimizer/accumulation.py",
     "(g + total) / optimizer.gradient_accumulation_steps", "(g + total)", "accumulation"),
    ("accumulated sums are not reset", "optimizer/accumulation.py",
     "lambda v: v.assign(tf.zeros(v.shape, v.dtype))", "lambda v: v.assign(v)", "accumulation"),
    ("accumulation is due one step late", "optimizer/accumulation.py",
     "(optimizer._iterations.value + 1) % steps", "optimizer._iterations.value % steps", "accumulation"),
    ("accumulated lazy rows take a dense step", "optimizer/base.py",
     'lazy = accumulates and self.sparse_update == "lazy"', "lazy = False", "accumulation::test_accumulated_slices"),
    ("accumulation in half precision", "optimizer/base.py",
     'if name in ("gradient_accumulator", "average")', 'if name in ("average",)', "accumulation::test_gradients_of_half_types_accumulate_in_float32"),
    ("overwriting gradients add up", "optimizer/accumulation.py",
     "tf.maximum(tf.cast(gradient, total.value.dtype), total.value)", "gradient + total.value", "accumulation"),
    # -- averages
    ("the first average is of zero", "optimizer/averages.py",
     "tf.where(first, one, part)", "tf.where(first, part, part)", "averages::test_an_average_of_the_weights_overwrites_them"),
    ("the average's momentum the wrong way round", "optimizer/averages.py",
     "(1.0, 1 - optimizer.ema_momentum)", "(1.0, optimizer.ema_momentum)", "averages"),
    ("averages overwrite one step late", "optimizer/averages.py",
     "(iterations + 1) % frequency", "iterations % frequency", "averages"),
    ("fit ends without the average", "optimizer/base.py",
     "averages.overwrite(self, self._distribution_strategy, list(var_list))", "pass", "averages"),
    ("averages in half precision", "optimizer/base.py",
     'if name in ("gradient_accumulator", "average")', 'if name in ("gradient_accumulator",)', "averages::test_averages_of_half_precision_are_float32"),
    # -- loss scale, count, constraints, gradients that overwrite
    ("the loss scale stays in the gradient", "optimizer/gradients.py", "lambda values: values / loss_scale",
     "lambda values: values", "loss_scale"),
    ("the loss scale is divided in half precision", "optimizer/gradients.py",
     "elif accumulates or loss_scale:", "elif accumulates:", "loss_scale"),
    ("steps count twice", "optimizer/base.py", "self._iterations.assign_add(1)", "self._iterations.assign_add(2)",
     "iterations::test_iterations_count_steps"),
    ("the count does not wait for the data", "optimizer/base.py",
     "with tf.control_dependencies(gradients.tensors_of(grads)):", "with tf.control_dependencies([]):", "iterations::test_the_count_waits_in_a_loop_over_the_data"),
    ("constraints are not assigned", "optimizer/base.py",
     "variable.assign(variable.constraint(variable))", "variable.constraint(variable)", "in_models::test_constraints_are_applied"),
    ("gradients do not overwrite", "optimizer/gradients.py",
     'if getattr(variable, "overwrite_with_gradient", False):', "if False:", "gradients::test_a_gradient_that_overwrites_its_variable"),
    ("a missing gradient stops the step", "optimizer/gradients.py",
     "if len(missing) == len(grads):", "if missing:", "gradients::test_gradients_that_are_none"),
    ("a variable may be given twice", "optimizer/gradients.py", "if len(set(keys)) != len(keys):", "if False:",
     "gradients::test_a_variable_twice_is_an_error"),
    ("traces are never freed", "optimizer/replicas.py", "if count() == 1 or context is None:", "if context is None:",
     "steps::test_a_traced_step_is_freed_with_its_function"),
    # -- half precision
    ("master weights stay", "engines/formula.py", "s.master_weight.assign(w - u)", "pass", "rounding::test_master_weights_take_the_steps_of_float32"),
    ("assigned weights are forgotten", "engines/formula.py",
     "return tf.where(tf.cast(master, s.variable.dtype) == s.variable.value(), master, w)", "return master",
     "rounding::test_an_assigned_element_is_taken_over_and_the_others_continue"),
    ("rounding is not random", "engines/rounding.py",
     "random = tf.bitwise.bitwise_and(random, mask)", "random = tf.zeros_like(random)", "rounding::test_rounding_at_random_is_the_oracle_s"),
    ("all variables round alike", "engines/rounding.py", "rng_stream * 0x9E3779B9 % 2**32", "0", "rounding::test_rounding_at_random_is_the_oracle_s"),
    ("all steps round alike", "engines/rounding.py", "_uint32(seed) + _hash32(_uint32(iterations))",
     "_uint32(seed)", "rounding::test_random_numbers_differ_between_steps_variables_and_elements"),
    ("fused: all variables round alike", "engines/fused.py", "streams=[s.rng_stream or 0 for s in group]",
     "streams=[0 for s in group]", "rounding::test_rounding_at_random_is_the_oracle_s"),
    ("moments in half precision", "utils/variables.py",
     "return tf.float32 if is_half(variable) else tf.as_dtype(variable.dtype)", "return tf.as_dtype(variable.dtype)",
     "precision::test_state_is_float32"),
    # -- engines, threads
    ("fused=True is silent", "engines/__init__.py", "if fused_option is True:", "if False:", "fused_kernels::test_true_is_an_error_where_the_op_cannot_be_used"),
    ("fused=False is fused", "engines/__init__.py",
     "FASTEST_FIRST if fused_option else FASTEST_FIRST[1:]", "FASTEST_FIRST", "gradients::test_which_form_an_optimizer_asks_for"),
    ("the rows of a call are kept in the optimizer", "optimizer/base.py",
     "        step = (\n            functools.partial(accumulation",
     '        self.__dict__["_rows_of_call"] = lazy_indices\n        __import__("time").sleep(1e-3)\n'
     '        lazy_indices = self.__dict__["_rows_of_call"]\n'
     "        step = (\n            functools.partial(accumulation", "threads::test_lazy_rows_stay_where_two_threads_accumulate_in_one_optimizer"),
    ("a dense gradient of an earlier micro-batch is forgotten", "optimizer/accumulation.py",
     "all_rows = {i: flags[i] for i in lazy_indices}", "all_rows = dict.fromkeys(lazy_indices, False)", "accumulation"),
    # -- variables added later, saving, configurations, names
    ("variables added later count from the first step", "optimizer/base.py",
     "self._added_at.count(iterations, call)", "iterations", "state"),
    ("averages of variables added later begin at zero", "optimizer/slots.py",
     "                average.assign(variable)", "                pass", "state"),
    ("the saved layout is not compared", "state/layout.py",
     "if match(saved, present, optimizer) != list(range(len(saved))):", "if False:", "layout"),
    ("values that wait are dropped", "state/file.py",
     "variables[i].assign(self._pending_slots.pop(pending[place]))", "self._pending_slots.pop(pending[place])",
     "state"),
    ("damaged backups are taken", "callbacks/backup_folder.py",
     "if (path / DIGESTS).read_bytes() != _format_digests(*found):", "if False:", "callbacks"),
    ("a backup is not forced to the disk whole", "callbacks/backup_folder.py", "os.rename(unfinished, path)",
     "shutil.copytree(unfinished, path)", "callbacks"),
    ("optimizers are not built again", "callbacks/model_optimizers.py", "if calls and not optimizer.built:",
     "if False:", "backup_optimizers"),
    ("warm-up begins at zero", "schedules.py", "start + (target - start) * done", "target * done", "helpers"),
    ("warm-up shifts the wrong schedule", "schedules.py", "if self.shift_schedule else 0",
     "if not self.shift_schedule else 0", "helpers"),
    ("warm-up gives its schedule a float", "schedules.py", "step = _to_int64(step)", "step = tf.cast(step, tf.float64)",
     "helpers::test_a_schedule_sees_the_step_as_an_optimizer_gives_it"),
    ("layer exclusions are not in the configuration", "optimizer/attributes.py",
     'config["exclude_from_layer_adaptation"] = self._adaptation_exclusions.patterns',
     'config["exclude_from_layer_adaptation"] = None', "names_and_configs"),
    ("NumPy's scalars stay", "utils/checks.py", "return value.item() if scalar else value", "return value",
     "names_and_configs::test_every_argument_takes_numpy_s_scalars_and_keeps_python_s"),
    ("no short names in lower case", "optimizer/variant.py",
     "for name in (optimizer.__name__, optimizer.__name__.lower()):", "for name in (optimizer.__name__,):",
     "names_and_configs"),
    ("a name that Keras takes is silent", "optimizer/variant.py", "if taken:", "if False:", "names_and_configs"),
    ("names of others are taken", "optimizer/variant.py", "if name not in known and name", "if name",
     "names_and_configs"),
    ("an option may change its slots", "optimizer/attributes.py", "if needs_slots and", "if False and",
     "hyperparameters::test_slots_are_fixed_once_built"),
    ("split_step lets XLA compile the update", "fused/_split_step.py",
     "train_step=train_step, jit_compile=False", "train_step=train_step, jit_compile=True", "split_step"),
    ("NAdam's nu is 1", "converters.py", "nu_1=beta_1", "nu_1=1.0", "equivalences::test_from_nadam"),
    ("QHAdamW without decay", "qhadamw.py", "weight_decay=weight_decay,", "weight_decay=None,", "golden"),
])

CPP = _mutants("custom_ops/", [
    ("C++: epsilon inside the root", "adam_math.h", "(square_root(squared) + epsilon)", "square_root(squared + epsilon * epsilon)",
     "fuzz::test_engines"),
    ("C++: amsgrad takes the smaller one", "adam_math.h", "*v_max >= v_new ?", "*v_max <= v_new ?", "steps::test_float32"),
    ("C++: trust ratio upside down", "adam_math.h", "sqrt(squared.w) / sqrt(squared.u)",
     "sqrt(squared.u) / sqrt(squared.w)", "golden"),
    ("C++: trust_ratio_max ignored", "adam_math.h", "ratio > c.trust_ratio_max ? c.trust_ratio_max : ratio", "ratio",
     "golden"),
    ("C++: an infinite weight without decay is NaN", "adam_math.h", "decay != S(0) ? decay * w : S(0)", "decay * w",
     "fused::test_special_values"),
    ("C++: gradients are not scaled", "adam_math.h", "    g *= gradient_scale;\n", "", "clipping::test_clipping_across_types"),
    ("C++: master weights stay", "update_element.h", "*master = updated;", "*master = weight;", "rounding::test_master_weights_take_the_steps_of_float32"),
    ("C++: all elements round alike", "update_element.h", "random_bits(stream_key, index)", "random_bits(stream_key, 0)", "rounding::test_rounding_at_random_is_the_oracle_s"),
    ("C++: spans round alike", "loops.cc", " + uint32_t(span.begin);", ";", "rounding::test_random_numbers_differ_between_steps_variables_and_elements"),
    ("C++: the last of repeated indices wins", "sparse.h", "sum[j] += ", "sum[j] = ", "sparse::test_every_case"),
    ("C++: exact is lazy between named rows", "sparse.h", "if (exact) partition.add(state, 0, done, begin, nullptr);", "",
     "sparse::test_every_case"),
    ("C++: ties are rounded up", "half_precision.h", "bits + 0x7fffu + (bits >> 16 & 1u)", "bits + 0x8000u", "rounding::test_ties_are_rounded_to_even"),
    ("C++: bfloat16 is cut off", "half_precision.h", "bits + 0x7fffu + (bits >> 16 & 1u)", "bits", "rounding::test_ties_are_rounded_to_even"),
    ("C++: stochastic rounding of denormals", "half_precision.h", "float(int32_t(cut)) * 0x1p-13f", "0.0f", "fuzz::test_engines"),
    ("C++: norms of one span only", "step.h", "sums[spans[i].variable].u += norms[i].u;",
     "sums[spans[i].variable].u = norms[i].u;", "fused::test_odd_sizes_in_one_step"),
    ("C++: a variable of several spans has no decay", "step.h", "state.weight_decay ? c.weight_decay : 0.0", "0.0", "fused::test_odd_sizes_in_one_step"),
    ("C++: the global norm of one part only", "step.h", "for (double part : sums) sum += part;",
     "for (double part : sums) sum = part;", "clipping::test_the_global_norm_of_large_variables"),
    ("C++: bias correction one step late", "coefficients.h", "double(*inputs.iterations + 1)",
     "double(*inputs.iterations + 2)", "golden"),
    ("C++: the seed does not know the step", "coefficients.h", " + hash32(uint32_t(*inputs.iterations))", "",
     "rounding::test_random_numbers_differ_between_steps_variables_and_elements"),
])
# fmt: on
MUTANTS = PYTHON + CPP


class Result(NamedTuple):
    """What became of a mistake."""

    mutant: Mutant
    outcome: str  # "killed", "SURVIVED", or what is wrong with the mistake itself
    by: str  # the first test that failed
    seconds: float


def _copy_tree(folder):
    for name in COPIED:
        ignored = shutil.ignore_patterns("__pycache__", "*.so", ".pytest_cache")
        shutil.copytree(ROOT / name, folder / name, ignore=ignored)
    for path in ROOT.iterdir():
        if path.is_file():
            shutil.copy2(path, folder / path.name)


def _plant(mutant, folder):
    """Replace the text; what is wrong, where it is not there exactly once."""
    path = folder / mutant.file
    if not path.exists():
        return "NO FILE"
    source = path.read_text()
    if source.count(mutant.text) != 1:
        return f"TEXT {source.count(mutant.text)} TIMES"
    path.write_text(source.replace(mutant.text, mutant.replacement))
    return ""


def _pytest(folder, environment, log, arguments):
    """Run pytest in this process, which has TensorFlow imported and nothing else."""
    os.chdir(folder)
    os.environ.update(environment)
    sys.path.insert(0, folder)
    with open(log, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    code = pytest.main(["-x", "-q", "-m", "not slow", "-p", "no:cacheprovider", *arguments])
    sys.stdout.flush()
    os._exit(int(code))


def _first_failure(output):
    found = re.findall(r"^(?:FAILED|ERROR) (\S+)", output, re.MULTILINE)
    return found[0].removeprefix("tests/") if found else "the process ended"


def _test(mutant, folder, environment, likely_only):
    """The first test that fails, or None."""
    likely = []
    for name in mutant.tests.split():
        file, separator, function = name.partition("::")
        if (folder / f"tests/test_{file}.py").exists():
            likely.append(f"tests/test_{file}.py{separator}{function}")
    rest = ["tests", *(f"--ignore={name}" for name in likely if "::" not in name)]
    log = folder / "pytest.log"
    for selected in [likely, *([] if likely_only else [rest])]:
        arguments = (str(folder), environment, str(log), selected)
        process = PROCESSES.Process(target=_pytest, args=arguments)
        process.start()
        process.join(SECONDS)
        if process.exitcode is None:
            process.kill()
            return "it hangs"
        if process.exitcode not in (0, 5):  # 5: no test was selected
            return _first_failure(log.read_text())
    return None


def check(mutant, likely_only=False):
    """Plant one mistake in a copy of the tree, and run the tests."""
    start = time.time()
    with tempfile.TemporaryDirectory(prefix="mutant-") as name:
        folder = pathlib.Path(name)
        _copy_tree(folder)
        outcome, by = _plant(mutant, folder), ""
        environment = {"PYTHONPATH": name, "TF_CPP_MIN_LOG_LEVEL": "3"}
        if mutant.is_cpp and not outcome:
            environment["TF_ADAM_VARIANTS_CACHE"] = str(folder / "cache")
            command = [sys.executable, "-m", "tf_adam_variants.fused", "build", "--no-cuda"]
            built = subprocess.run(command, cwd=folder, env=os.environ | environment, capture_output=True)
            outcome = "DOES NOT COMPILE" if built.returncode else ""
        if not outcome:
            by = _test(mutant, folder, environment, likely_only)
            outcome = "killed" if by else "SURVIVED"
    return Result(mutant, outcome, by or "", time.time() - start)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="", help="a part of the name, or several separated by commas")
    parser.add_argument("--list", action="store_true", help="print the names and stop")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--likely", action="store_true", help="run the likely files only, not the rest")
    options = parser.parse_args()
    chosen = [m for m in MUTANTS if any(part in m.name for part in options.only.split(","))]
    if options.list:
        print(*(f"{m.name}: {m.file}" for m in chosen), sep="\n")
        return 0
    os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
    PROCESSES.set_forkserver_preload(["keras", "numpy", "pytest", "tensorflow"])
    results = []
    with concurrent.futures.ThreadPoolExecutor(options.jobs) as pool:
        runs = [pool.submit(check, mutant, options.likely) for mutant in chosen]
        for run in concurrent.futures.as_completed(runs):
            result = run.result()
            results.append(result)
            print(
                f"{len(results):3}/{len(chosen)}  {result.outcome:10} {result.seconds:5.0f} s  "
                f"{result.mutant.name}  {result.by}",
                flush=True,
            )
    others = [result for result in results if result.outcome != "killed"]
    print(f"{len(results) - len(others)} of {len(results)} mistakes killed")
    for result in others:
        print(f"    {result.outcome}: {result.mutant.name} ({result.mutant.file})")
    return int(bool(others))


if __name__ == "__main__":
    sys.exit(main())
