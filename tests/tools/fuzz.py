"""Random steps through every engine, each compared with the oracle: `make fuzz`.

    python tests/tools/fuzz.py --seed 0 --cases 100000     all of them, with a display of progress
    python tests/tools/fuzz.py --seed 0 --case 1234        one of them again

A case is an optimizer with random hyperparameters, a few variables with random slots, and one to three
steps. It goes one of three ways: straight to the engines, through the whole optimizer eagerly, or through it
in a `tf.function`, by XLA or not. Every step is compared by itself, from the weights and slots that were
there before it: so errors do not grow, and each element's bound is that of one step's arithmetic
(`intervals.py`).
"""

import argparse
import collections
import contextlib
import dataclasses
import functools
import re
import sys
import time
import traceback
import warnings

import numpy as np
import oracle
import tensorflow as tf
from intervals import Ambiguous, Arithmetic, Interval

import tf_adam_variants as tav
from tf_adam_variants.engines import formula, fused, resource_apply
from tf_adam_variants.engines.coefficients import StepInputs
from tf_adam_variants.engines.hyperparameters import Hyperparameters
from tf_adam_variants.engines.variable_state import GroupSpec, Rows, VariableState
from tf_adam_variants.optimizer import gradients

RULES = {
    tav.AdamW: oracle.adamw,
    tav.QHAdam: oracle.qhadam,
    tav.QHAdamW: oracle.qhadam,
    tav.LAMB: oracle.lamb,
}
ENGINES = {"formula": formula, "resource_apply": resource_apply, "fused": fused}
DTYPES = (tf.float64, tf.float32, tf.bfloat16, tf.float16)
SLOTS = ("momentum", "velocity", "velocity_hat")
ROUNDINGS = ("master_weights", "stochastic_rounding")
SEED = 0xFEDCBA98  # of the random numbers that round


class Failure(Exception):
    """A value that is outside its interval, or that should not have changed."""


# -- what there is to draw from ------------------------------------------------------------------------------


@dataclasses.dataclass
class Array:
    """A variable before the first step."""

    dtype: tf.DType
    gradient_dtype: tf.DType
    weights: np.ndarray  # in its type
    slots: list  # in the type of the arithmetic: momentum, velocity and perhaps velocity_hat
    sparse: bool
    ids_dtype: tf.DType
    decays: bool
    adapts: bool
    stream: int  # of the random numbers that round it
    rounding: str | None = None  # how its weights are kept, if not rounded to nearest: ROUNDINGS
    master: np.ndarray | None = None  # float32

    def values(self):
        """What its variables begin with."""
        return [self.weights, *self.slots, *([] if self.master is None else [self.master])]

    def weights_of(self, values):
        """Of the values before a step, the weights that it begins with, and the slots."""
        if self.master is None:
            return values
        with np.errstate(over="ignore"):
            rounding = values[-1].astype(self.dtype.as_numpy_dtype)
        follows = np.where(rounding == values[0], values[-1], values[0].astype(np.float32))
        return [follows, *values[1:-1]]

    @property
    def state_dtype(self):
        return self.dtype if self.dtype in (tf.float32, tf.float64) else tf.float32

    @property
    def arithmetic(self):
        return Arithmetic.of(self.state_dtype.as_numpy_dtype)


@dataclasses.dataclass
class Case:
    """An optimizer, its variables and how it is run."""

    cls: type
    terms: dict  # arguments of the constructor, but for those below
    learning_rate: float  # one that float32 holds
    weight_decay: float | None
    decay_mode: str
    peak: float | None
    lazy: bool
    steps: int
    taken: int  # steps taken before
    way: str  # "engines", or one of cases.MODES
    arrays: list
    options: dict  # Keras's: clipping and accumulation; more of the constructor's go here
    scale: float | None  # of the gradients, for the engines


def chance(rng, probability):
    return bool(rng.random() < probability)


def pick(rng, *values):
    return values[rng.integers(len(values))]


def power(rng, low, high):
    return float(10.0 ** rng.uniform(low, high))


def draw_beta(rng, arithmetics):
    # 1 - beta^t is as good as the oracle's extended precision: one digit less for each 9.
    nearly_1 = 1 - power(rng, -3.9 if Arithmetic.of(np.float64) in arithmetics else -9, -3)
    return pick(
        rng, 0.0, 0.5, 0.9, 0.9, 0.99, 0.999, 0.999, float(rng.random()), power(rng, -6, -1), nearly_1
    )


def draw_nu(rng):
    return pick(rng, 0.0, 1.0, 1.0, 0.7, 1.2, -0.3, 1.0, float(rng.uniform(-1, 2)))


def draw_terms(rng, cls, arithmetics):
    terms = {"beta_1": draw_beta(rng, arithmetics), "beta_2": draw_beta(rng, arithmetics)}
    terms["epsilon"] = pick(rng, 1e-8, 1e-8, 1e-7, 1e-6, 1e-3, 1.0, 0.0, 1e-30, power(rng, -12, 2))
    if cls is tav.AdamW:
        terms["amsgrad"] = chance(rng, 0.3)
    if cls in (tav.QHAdam, tav.QHAdamW):
        terms |= {"nu_1": draw_nu(rng), "nu_2": pick(rng, 1.0, draw_nu(rng))}
    if cls is tav.LAMB:
        terms |= {"bias_correction": chance(rng, 0.7), "grad_averaging": chance(rng, 0.7)}
        low, high = sorted([power(rng, -3, 2), power(rng, -3, 2)])
        terms |= {"trust_ratio_min": pick(rng, None, low, 0.0), "trust_ratio_max": pick(rng, None, high)}
    return terms


def draw_shape(rng, sparse):
    kind = rng.random()
    if kind < 0.03:
        shape = [int(rng.integers(60, 5000))]
    elif kind < 0.06:
        shape = [int(rng.integers(8, 50)), int(rng.integers(8, 50))]
    else:
        shape = [int(rng.integers(1, 8)) for _ in range(rng.integers(0, 6))]
        if shape and chance(rng, 0.08):
            shape[rng.integers(len(shape))] = 0
    if sparse and not shape:
        shape = [int(rng.integers(1, 8))]
    return tuple(shape)


def draw_values(rng, shape, dtype):
    """Values of a type, of one size or of widely different ones, with zeros and denormals among them."""
    half = dtype == tf.float16
    size = power(rng, -4, 2) if half else power(rng, -9, 4)
    values = size * rng.normal(size=shape)
    kind = rng.random()
    if kind < 0.08:
        values = np.zeros(shape)
    elif kind < 0.15:
        values = np.full(shape, pick(rng, 1.0, -1.0, size))
    elif kind < 0.3:
        values = values * 10.0 ** rng.uniform(-3, 1 if half else 3, size=shape)
    elif kind < 0.4:
        values = np.where(rng.random(shape) < 0.3, 0.0, values)
    elif kind < 0.43:
        values = values * (1e-4 if half else 1e-38)
    return np.asarray(np.clip(values, -6e4, 6e4)).astype(dtype.as_numpy_dtype)


def draw_slots(rng, shape, state, count, fresh):
    numbers = [np.zeros(shape, state) for _ in range(count)]
    if fresh:
        return numbers
    m = draw_values(rng, shape, tf.float32).astype(state)
    related = pick(rng, True, True, True, False)  # as a run's are, or anything
    v = np.square(
        m * (1 + rng.random(shape)) if related else draw_values(rng, shape, tf.float32).astype(state)
    )
    more = [v * np.where(rng.random(shape) < 0.5, 0.5, 2.0) for _ in range(count - 2)]
    return [np.asarray(x).astype(state) for x in (m, v, *more)]


def draw_array(rng, dtype, sparse, count, fresh):
    state = dtype if dtype in (tf.float32, tf.float64) else tf.float32
    shape = draw_shape(rng, sparse)
    return Array(
        dtype=dtype,
        gradient_dtype=pick(rng, dtype, state),
        weights=draw_values(rng, shape, dtype),
        slots=draw_slots(rng, shape, state.as_numpy_dtype, count, fresh),
        sparse=sparse,
        ids_dtype=pick(rng, tf.int32, tf.int64),
        decays=chance(rng, 0.7),
        adapts=chance(rng, 0.7),
        stream=int(rng.integers(2**31)),
    )


def draw_rounding(rng, arrays):
    """One of ROUNDINGS for all variables of half types, or none."""
    half = [array for array in arrays if array.dtype != array.state_dtype]
    rounding = pick(rng, None, *ROUNDINGS) if half else None
    for array in half:
        array.rounding = rounding
        if rounding == "master_weights":  # most weights are its rounding, some were assigned
            w = array.weights.astype(np.float32)
            near = w * (1 + 2.0**-10 * rng.uniform(-1, 1, w.shape))
            other = draw_values(rng, w.shape, tf.float32)
            array.master = np.where(rng.random(w.shape) < 0.8, near, other).astype(np.float32)
    return {rounding: True} if rounding else {}


def draw_options(rng):
    """Options of the constructor that every optimizer takes."""
    options = {}
    clipping = pick(rng, None, None, "clipnorm", "clipvalue", "global_clipnorm")
    if clipping:
        options[clipping] = power(rng, -4, 3)
    if chance(rng, 0.25):
        options["gradient_accumulation_steps"] = int(rng.integers(2, 4))
    return options


def draw(seed, number, way=None):
    """The case of this number, and the generator of its gradients."""
    rng = np.random.default_rng([seed, number])
    cls = pick(rng, *RULES)
    drawn = rng.random()
    if way is None:
        way = "engines"
        if drawn < 0.15:
            way = pick(rng, "eager", "fused eager")
        if drawn < 0.012:
            way = pick(rng, "graph", "graph", "fused graph", "fused graph", "xla")
    alone = way == "engines"  # an engine is given variables of one type
    count = int(rng.integers(1, 3 if alone else 5))
    dtypes = [pick(rng, *DTYPES)] * count if alone else [pick(rng, *DTYPES) for _ in range(count)]
    arithmetics = [Arithmetic.of(np.float64 if tf.float64 in dtypes else np.float32)]
    terms = draw_terms(rng, cls, arithmetics)
    fresh = chance(rng, 0.4)
    steps = pick(rng, 1, 1, 1, 2, 3)
    rate = pick(rng, 1e-3, 0.0, 1e-30, 1e6, power(rng, -10, 1), power(rng, -5, 0), power(rng, -5, 0))
    mode = (
        pick(rng, "learning_rate", "schedule", "independent")
        if cls in (tav.AdamW, tav.QHAdamW)
        else "learning_rate"
    )
    slots = 3 if terms.get("amsgrad") else 2
    case = Case(
        cls=cls,
        terms=terms,
        learning_rate=float(np.float32(rate)),
        weight_decay=None if cls is tav.QHAdam else pick(rng, None, 0.0, 0.004, 0.1, power(rng, -4, 1)),
        decay_mode=mode,
        peak=float(np.float32(power(rng, -4, 0))) if mode == "schedule" else None,
        lazy=chance(rng, 0.5),
        steps=steps,
        taken=0 if fresh else int(power(rng, 0, 6)),
        way=way,
        arrays=[draw_array(rng, dtype, chance(rng, 0.4), slots, fresh) for dtype in dtypes],
        options={} if alone else draw_options(rng),
        scale=power(rng, -3, 0) if alone and chance(rng, 0.15) else None,
    )
    rounding = draw_rounding(rng, case.arrays)
    if not alone:
        case.options |= rounding
    if not alone and case.decay_mode == "schedule" and case.weight_decay is None:
        case.weight_decay = 0.0
    return case, rng


@dataclasses.dataclass
class Gradient:
    """What a step is given for a variable: a dense array, or ids and values."""

    values: np.ndarray
    ids: np.ndarray | None
    shape: tuple

    def tensor(self, static=True):
        values = tf.constant(self.values)
        if self.ids is None:
            return values
        return tf.IndexedSlices(values, tf.constant(self.ids), tf.constant(self.shape, self.ids.dtype))

    def interval(self, arithmetic):
        """The dense gradient: repeated ids are summed in any order."""
        if self.ids is None:
            return Interval.of(self.values, arithmetic)
        total, size = (np.zeros(self.shape, np.longdouble) for _ in range(2))
        values = self.values.astype(np.longdouble)
        np.add.at(total, self.ids, values)
        np.add.at(size, self.ids, np.abs(values))
        often = np.bincount(self.ids, minlength=self.shape[0]).reshape([-1] + [1] * (len(self.shape) - 1))
        repeated = np.maximum(often - 1, 0) * (arithmetic.unit * size + arithmetic.least * (size > 0))
        exact = Interval.of(total, arithmetic)
        return Interval(exact.low - repeated, exact.high + repeated, arithmetic)

    @property
    def rows(self):
        return np.unique(self.ids)


def draw_gradient(rng, array, none_at_all=0.0):
    if chance(rng, none_at_all):
        return None
    shape = array.weights.shape
    if not array.sparse:
        return Gradient(draw_values(rng, shape, array.gradient_dtype), None, shape)
    rows = shape[0]
    kind = pick(rng, "none", "one", "repeated", "all", "shuffled", "some", "some") if rows else "none"
    ids = {
        "none": lambda: [],
        "one": lambda: rng.integers(rows, size=1),
        "repeated": lambda: rng.choice(rng.integers(rows, size=2), size=rng.integers(2, 12)),
        "all": lambda: np.arange(rows),
        "shuffled": lambda: rng.permutation(rows),
        "some": lambda: rng.integers(rows, size=rng.integers(1, 2 * rows + 1)),
    }[kind]()
    ids = np.asarray(ids, array.ids_dtype.as_numpy_dtype)
    return Gradient(draw_values(rng, (len(ids), *shape[1:]), array.gradient_dtype), ids, shape)


# -- what the oracle allows ----------------------------------------------------------------------------------


def oracle_kwargs(case, betas):
    """The oracle's hyperparameters, in extended precision where it computes with them alone."""
    terms = case.terms | betas
    return {k: np.longdouble(v) if isinstance(v, float) else v for k, v in terms.items()}


def rounded_betas(case, dtype):
    """The betas of kernels that compute 1 - beta in the variable's type."""
    number = dtype.as_numpy_dtype
    names = ("beta_1", "beta_2")
    return {name: 1 - np.longdouble(number(1) - number(case.terms[name])) for name in names}


def allowed(case, array, before, gradient, t, betas):
    """The intervals of the weights and slots after step t, from exact ones before it."""
    # The engines multiply numerator and denominator by sqrt(1 - beta_2^t), so that they underflow sooner.
    root = np.sqrt(1 - np.longdouble((case.terms | betas)["beta_2"]) ** t)
    arithmetic = dataclasses.replace(array.arithmetic, least=float(array.arithmetic.least / root))
    rate = np.longdouble(case.learning_rate)
    decay = np.longdouble(case.weight_decay or 0.0) * array.decays
    if case.cls is not tav.LAMB:
        decay *= {"learning_rate": rate, "independent": 1, "schedule": rate / (case.peak or 1)}[
            case.decay_mode
        ]
    own = oracle_kwargs(case, betas) | ({"adapted": array.adapts} if case.cls is tav.LAMB else {})
    names = ("m", "v", "vhat")
    w, *old = (Interval.of(x, arithmetic) for x in before)
    slots = dict(zip(names, old, strict=False))
    try:
        new = RULES[case.cls](w, gradient, t, slots, rate, decay, **own)
    except Ambiguous:  # the moments are made before
        new = Interval(np.full_like(w.low, np.nan), np.full_like(w.low, np.nan), arithmetic)
    return [new, *(slots[name] for name in names[: len(old)])]


# -- comparing -----------------------------------------------------------------------------------------------

tally = collections.Counter()


def read(variables):
    return [v.numpy() for v in variables]


def rounding_of(array, t, rows):
    """How a float32 result becomes a weight of this variable; None: it stays as it is."""
    if array.dtype == array.state_dtype or array.rounding == "master_weights":
        return None
    if array.rounding is None:
        return lambda x: x.astype(array.dtype.as_numpy_dtype).astype(np.float32)
    elements = np.arange(array.weights.size).reshape(array.weights.shape)
    elements = elements if rows is None else elements[rows]
    key = oracle.rounding_key(SEED, t - 1)
    return lambda x: oracle.rounded_at_random(x, array.dtype.name, key, array.stream, elements)


def compare(array, intervals, after, rounded, where):
    """Raise for the first element that is outside its interval."""
    if array.rounding == "master_weights":
        weights, after = after[0], [after[-1], *after[1:-1]]
        with np.errstate(over="ignore"):
            wrong = after[0].astype(array.dtype.as_numpy_dtype) != weights
        if np.any(wrong & ~np.isnan(after[0])):
            raise Failure(f"{where}: weights are not the rounding of their master weights")
    for name, interval, actual in zip(("weights", *SLOTS), intervals, after, strict=False):
        values = actual.astype(np.longdouble)
        inside = interval.holds(values, rounded if name == "weights" else None)
        tally["elements"] += values.size
        tally["bounded"] += int(np.sum(interval.finite()))
        if np.all(inside):
            continue
        at = tuple(int(i) for i in np.argwhere(~inside)[0])
        low, high = (float(np.broadcast_to(x, values.shape)[at]) for x in (interval.low, interval.high))
        raise Failure(f"{where}: {name}{list(at)} is {float(values[at])!r}, not in [{low!r}, {high!r}]")


def check_step(case, array, before, after, gradient, rows, t, betas, where):
    """Compare one variable's step with the oracle's.

    Args:
        gradient: the interval of the dense gradient.
        rows: those that a lazy step may change; None: all of them.
    """
    if rows is not None:
        others = np.setdiff1d(np.arange(len(before[0])), rows)
        for name, old, new in zip(("weights", *SLOTS, "master weights"), before, after, strict=False):
            if old[others].tobytes() != new[others].tobytes():
                raise Failure(f"{where}: {name} changed in a row that no id names")
        if not len(rows):
            return
        before, after, gradient = [x[rows] for x in before], [x[rows] for x in after], gradient[rows]
    intervals = allowed(case, array, array.weights_of(before), gradient, t, betas)
    compare(array, intervals, after, rounding_of(array, t, rows), where)


# -- the engines ---------------------------------------------------------------------------------------------


def run_engines(case, rng):
    """The steps, straight through each engine that takes them."""
    steps = [[draw_gradient(rng, a) for a in case.arrays] for _ in range(case.steps)]
    hyperparameters = Hyperparameters(
        **case.terms,
        weight_decay=case.weight_decay,
        weight_decay_mode=case.decay_mode,
        peak_learning_rate=case.peak,
        trust_ratio=case.cls is tav.LAMB,
    )
    for name, engine in ENGINES.items():
        dtype = case.arrays[0].dtype
        devices = frozenset({("/job:localhost/replica:0/task:0/device:CPU:0",)})
        lazy = case.lazy and any(a.sparse for a in case.arrays)
        if engine.unsupported_reason(hyperparameters, GroupSpec(dtype, lazy, devices)):
            tally[f"not by {name}"] += 1
            continue
        tally[name] += 1
        run_engine(case, name, engine, hyperparameters, steps)


def run_engine(case, name, engine, hyperparameters, steps):
    dtype = case.arrays[0].dtype
    betas = rounded_betas(case, dtype) if name == "resource_apply" else {}
    state = [[tf.Variable(x) for x in a.values()] for a in case.arrays]
    for i, step_gradients in enumerate(steps):
        before = [read(variables) for variables in state]
        taken = case.taken + i
        rate = tf.constant(case.learning_rate, tf.float32)
        scale = tf.constant(case.scale, tf.float64) if case.scale else None
        inputs = StepInputs(tf.constant(taken, tf.int64), rate, scale, tf.constant(SEED, tf.uint32))
        states = [
            make_state(case, a, s, g, engine)
            for a, s, g in zip(case.arrays, state, step_gradients, strict=True)
        ]
        engine.step(states, hyperparameters, inputs, exact=not case.lazy)
        for j, (array, gradient) in enumerate(zip(case.arrays, step_gradients, strict=True)):
            interval = gradient.interval(array.arithmetic)
            if case.scale:
                interval = interval * np.longdouble(case.scale)
            rows = gradient.rows if array.sparse and case.lazy else None
            where = f"{name}, step {i}, variable {j}"
            check_step(case, array, before[j], read(state[j]), interval, rows, taken + 1, betas, where)


def make_state(case, array, variables, gradient, engine):
    """As the optimizer makes it."""
    gradient, indices = gradient.tensor(), None
    if array.sparse and not engine.accepts_indexed_slices:
        rows = array.weights.shape[0]
        if case.lazy:
            gradient = gradients.sum_repeated_indices(gradient, rows, array.state_dtype)
            indices, gradient = gradient.indices, gradient.values
            variables = [Rows(v, indices) for v in variables]
        else:
            gradient = gradients.to_dense(gradient, rows, array.state_dtype)
    names = ["variable", *SLOTS[: len(array.slots)], *([] if array.master is None else ["master_weight"])]
    return VariableState(
        **dict(zip(names, variables, strict=True)),
        gradient=gradient,
        weight_decay=array.decays,
        layer_adaptation=array.adapts,
        rng_stream=array.stream if array.rounding == "stochastic_rounding" else None,
        indices=indices,
    )


# -- the whole optimizer -------------------------------------------------------------------------------------


def make(case):
    """The optimizer and its variables, with the slots and the number of steps set."""
    for i, array in enumerate(case.arrays):
        array.stream = i
    weights = [tf.Variable(a.weights, name=f"array_{i}/w") for i, a in enumerate(case.arrays)]
    arguments = case.terms | case.options
    if case.cls is not tav.QHAdam:
        arguments["weight_decay"] = case.weight_decay
        if excluded := [f"array_{i}/" for i, a in enumerate(case.arrays) if not a.decays]:
            arguments["exclude_from_weight_decay"] = excluded
    if case.cls in (tav.AdamW, tav.QHAdamW):
        arguments |= {"weight_decay_mode": case.decay_mode, "peak_learning_rate": case.peak}
    if case.cls is tav.LAMB:
        unadapted = [f"array_{i}/" for i, a in enumerate(case.arrays) if not a.adapts]
        arguments["exclude_from_layer_adaptation"] = unadapted
    optimizer = case.cls(
        case.learning_rate,
        sparse_update="lazy" if case.lazy else "exact",
        fused=case.way.startswith("fused"),
        **arguments,
    )
    optimizer.build(weights)
    slots = [
        [
            v.value
            for name in (*SLOTS, "master_weight")
            for v in optimizer.variables
            if re.search(rf"/array_{i}_w\w*_{name}$", v.path)
        ]
        for i in range(len(weights))
    ]
    for array, variables in zip(case.arrays, slots, strict=True):
        for variable, value in zip(variables, array.values()[1:], strict=True):
            variable.assign(value)
    for seed in (v for v in optimizer.variables if v.name == "rounding_seed"):
        seed.assign(SEED)
    optimizer.variables[0].assign(case.taken * case.options.get("gradient_accumulation_steps", 1))
    return optimizer, weights, slots


def run_optimizer(case, rng):
    """The steps, through `apply`."""
    tally[case.way] += 1
    optimizer, weights, slots = make(case)
    accumulate = case.options.get("gradient_accumulation_steps", 1)
    missing = [len(weights) > 1 and chance(rng, 0.1) for _ in weights]
    if all(missing):
        missing[0] = False
    given = [i for i, none in enumerate(missing) if not none]

    def apply(tensors):
        some = dict(zip(given, tensors, strict=True))
        optimizer.apply([some.get(i) for i in range(len(weights))], weights)

    if not case.way.endswith("eager"):
        apply = tf.function(apply, jit_compile=case.way == "xla", reduce_retracing=True)
    state = [[w, *s] for w, s in zip(weights, slots, strict=True)]
    for i in range(case.steps):
        before = [read(variables) for variables in state]
        gradients = [[draw_gradient(rng, case.arrays[j]) for j in given] for _ in range(accumulate)]
        for part in gradients:
            apply([g.tensor() for g in part])
        arrays = [case.arrays[j] for j in given]
        dense = [mean(array, [part[k] for part in gradients]) for k, array in enumerate(arrays)]
        dense = clipped(case, dense)
        for j, array in enumerate(case.arrays):
            where = f"{case.way}, step {i}, variable {j}"
            after = read(state[j])
            if j not in given:
                if any(x.tobytes() != y.tobytes() for x, y in zip(before[j], after, strict=True)):
                    raise Failure(f"{where}: changed without a gradient")
                continue
            k = given.index(j)
            rows = None
            if array.sparse and case.lazy:
                rows = lazy_rows([part[k] for part in gradients], dense[k])
                if rows is None:
                    continue
            check = functools.partial(
                check_step, case, array, before[j], after, dense[k], rows, case.taken + i + 1, where=where
            )
            try:
                check({})
            except Failure:
                if case.way.startswith("fused") or array.dtype != array.state_dtype:
                    raise
                check(rounded_betas(case, array.dtype))  # by TensorFlow's kernels


def mean(array, parts):
    """The mean of accumulated gradients."""
    if len(parts) == 1:
        return parts[0].interval(array.arithmetic)
    return functools.reduce(np.add, (g.interval(array.arithmetic) for g in parts)) / np.longdouble(len(parts))


def lazy_rows(parts, dense):
    """The rows of the ids; of accumulated gradients those that are not all zeros. None: rounding decides."""
    if len(parts) == 1:
        return parts[0].rows
    axes = tuple(range(1, dense.low.ndim))
    least = dense.arithmetic.least  # TensorFlow may read denormal numbers as 0
    certain = np.any((dense.low >= least) | (dense.high <= -least), axis=axes)
    possible = np.any((dense.low != 0) | (dense.high != 0), axis=axes)
    return np.flatnonzero(certain) if np.all(certain == possible) else None


def clipped(case, gradients):
    """The oracle's clipping. A norm over several types is as exact as the least of them."""
    names = ("clipnorm", "clipvalue", "global_clipnorm")
    clipping = {k: np.longdouble(v) for k, v in case.options.items() if k in names}
    own = [g.arithmetic for g in gradients]
    clipped = oracle.clip(gradients, **clipping)
    # `tf.clip_by_norm` multiplies by the bound before it divides by the norm, which is at least as large: the
    # product may have been too small for the type.
    bound = clipping.get("clipnorm", np.inf)
    return [
        Interval(g.low - a.least / bound, g.high + a.least / bound, a)
        for g, a in zip(clipped, own, strict=True)
    ]


# -- the program ---------------------------------------------------------------------------------------------


def run(seed, number, way=None):
    """Run one case; None, or what is wrong with it."""
    case, rng = draw(seed, number, way)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Keras warns of missing gradients
            (run_engines if case.way == "engines" else run_optimizer)(case, rng)
    except Failure as failure:
        return str(failure)
    except Exception:
        return f"{case.way}: {traceback.format_exc(limit=-3)}"
    return None


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cases", type=int, default=100_000)
    parser.add_argument("--first", type=int, default=0, help="the number of the first case")
    parser.add_argument("--case", type=int, help="run this one only, and show what it is")
    parser.add_argument("--stop", type=int, default=20, help="stop after so many failures")
    options = parser.parse_args()
    tf.get_logger().setLevel("ERROR")  # it warns of functions that are traced often
    if options.case is not None:
        print(draw(options.seed, options.case)[0])
        wrong = run(options.seed, options.case)
        print(wrong or "it agrees with the oracle")
        return int(wrong is not None)
    from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    failures, done, start = 0, 0, time.time()
    columns = [*Progress.get_default_columns()[:2], MofNCompleteColumn(), TimeRemainingColumn()]
    progress = Progress(*columns, TextColumn("{task.fields[failures]} failures"))
    with progress, contextlib.suppress(KeyboardInterrupt):
        task = progress.add_task("cases", total=options.cases, failures=0)
        for number in range(options.first, options.first + options.cases):
            if wrong := run(options.seed, number):
                failures += 1
                again = f"python tests/tools/fuzz.py --seed {options.seed} --case {number}"
                progress.console.print(f"{again}\n    {wrong}", markup=False, highlight=False, soft_wrap=True)
            done += 1
            progress.update(task, advance=1, failures=failures)
            if failures == options.stop:
                break
    seconds = time.time() - start
    print(f"{done} cases, {failures} failures, {seconds:.0f} s, {done / seconds:.0f} cases a second")
    print(f"{tally['bounded'] / max(tally['elements'], 1):.1%} of {tally['elements']} elements had a bound")
    print(
        ", ".join(
            f"{name}: {count}" for name, count in sorted(tally.items()) if name not in ("elements", "bounded")
        )
    )
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main())
