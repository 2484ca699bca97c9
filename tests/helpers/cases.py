"""The table of optimizers under test: a new optimizer, or a new term of one, is one more row."""

import dataclasses
import itertools

import numpy as np
import oracle
import tensorflow as tf

import tf_adam_variants as tav


@dataclasses.dataclass(frozen=True)
class Case:
    """An optimizer with its terms, and the rule of the oracle that it has to follow."""

    cls: type
    rule: object
    terms: dict = dataclasses.field(default_factory=dict)

    @property
    def name(self):
        return "-".join([self.cls.__name__, *(f"{k}={v}" for k, v in self.terms.items())])

    @property
    def oracle_kwargs(self):
        """Arguments of the oracle: the optimizer's defaults, a weight decay that shows, the terms."""
        config = self.cls().get_config()
        names = ("beta_1", "beta_2", "epsilon", "nu_1", "nu_2")
        decay = {"weight_decay": 0.25} if self.decays else {}
        return {name: config[name] for name in names if name in config} | decay | self.terms

    @property
    def decays(self):
        return self.cls is not tav.QHAdam

    @property
    def has_modes(self):
        return self.cls in (tav.AdamW, tav.QHAdamW)


CASES = [
    Case(tav.AdamW, oracle.adamw),
    Case(tav.AdamW, oracle.adamw, {"amsgrad": True}),
    Case(tav.QHAdam, oracle.qhadam),
    Case(tav.QHAdam, oracle.qhadam, {"nu_1": 0.8, "nu_2": 0.6}),
    Case(tav.QHAdamW, oracle.qhadam),
    Case(tav.QHAdamW, oracle.qhadam, {"nu_1": 1.2, "nu_2": 0.9}),
    Case(tav.LAMB, oracle.lamb),
    Case(tav.LAMB, oracle.lamb, {"bias_correction": False, "grad_averaging": False}),
    Case(tav.LAMB, oracle.lamb, {"trust_ratio_min": 0.3, "trust_ratio_max": 0.6}),
]

PLAIN_CASES = [case for case in CASES if not case.terms]
CLASSES = [case.cls for case in PLAIN_CASES]

# How a step is run. "fused": by the fused kernels, which must be built; the first three: without them.
MODES = ("eager", "graph", "xla", "fused eager", "fused graph")


def product(axes, sensible=lambda row: True):
    """All sensible combinations of the axes' values, each as {axis: value}."""
    rows = (dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values()))
    return [row for row in rows if sensible(row)]


def cover_pairs(rows, seed=0):
    """Few of the rows that still have every pair of values: a greedy covering array."""
    rows = [rows[i] for i in np.random.default_rng(seed).permutation(len(rows))]
    pairs_of = [
        list(itertools.combinations([(axis, repr(value)) for axis, value in row.items()], 2)) for row in rows
    ]
    number = {pair: i for i, pair in enumerate(dict.fromkeys(itertools.chain.from_iterable(pairs_of)))}
    has = np.zeros((len(rows), len(number)), np.float32)
    for i, pairs in enumerate(pairs_of):
        has[i, [number[pair] for pair in pairs]] = 1
    missing, chosen = np.ones(len(number), np.float32), []
    while missing.any():
        best = int(np.argmax(has @ missing))
        chosen.append(rows[best])
        missing[has[best] > 0] = 0
    return chosen


PATHS = ("dense/kernel", "dense/bias", "norm/gamma", "out/kernel")
SHAPES = ((5, 4), (4,), (4,), (2, 3, 2))


def problem(steps, seed=0, dtype=np.float64):
    """Initial weights and gradients of a few variables; the gradients' sizes differ widely."""
    rng = np.random.default_rng(seed)
    scale = 10.0 ** rng.uniform(-3, 1, size=(steps, 1))
    inits = [rng.normal(size=shape).astype(dtype) for shape in SHAPES]
    grads = [[(s * rng.normal(size=shape)).astype(dtype) for shape in SHAPES] for s in scale[:, 0]]
    return inits, grads


def variables(inits, dtype, paths=PATHS):
    return [tf.Variable(w, dtype=dtype, name=path) for w, path in zip(inits, paths, strict=True)]


def compiled(mode, optimizer, step, **options):
    """A function that runs a step in one of MODES."""
    optimizer.fused = mode.startswith("fused")
    if mode.endswith("eager"):
        return step
    return tf.function(step, jit_compile=mode == "xla", **options)


def apply_in(mode, optimizer, weights):
    """A function of gradients that takes one step in one of MODES."""
    if not optimizer.built:
        optimizer.build(weights)
    return compiled(mode, optimizer, lambda grads: optimizer.apply(grads, weights))


def run(mode, optimizer, inits, grads, dtype=tf.float64, paths=PATHS):
    """Weights after each step, in float64."""
    weights = variables(inits, dtype, paths)
    step = apply_in(mode, optimizer, weights)
    history = []
    for step_grads in grads:
        step([tf.constant(g, dtype) for g in step_grads])
        history.append([w.numpy().astype(np.float64) for w in weights])
    return history


def worst(history, expected):
    """The largest error of any array at any step, relative to the array's largest element."""
    return max(
        np.max(np.abs(a - e)) / np.max(np.abs(e))
        for actual_step, expected_step in zip(history, expected, strict=True)
        for a, e in zip(actual_step, expected_step, strict=True)
    )


def address(variable):
    """Where a variable's memory is."""
    return np.asarray(memoryview(variable.read_value())).ctypes.data
