"""IndexedSlices, and what their steps should give."""

import cases
import numpy as np
import tensorflow as tf

import tf_adam_variants as tav

KINDS = ["repeated", "one index many times", "unsorted", "single", "all rows", "empty"]


def dense(indices, values, shape):
    gradient = np.zeros(shape)
    np.add.at(gradient, indices, values)
    return gradient


def slices(indices, values, dtype=tf.float64, indices_dtype=tf.int64, shape=None):
    return tf.IndexedSlices(tf.constant(values, dtype), tf.constant(indices, indices_dtype), shape)


def draw_steps(kind, rows, shape, count=5, seed=0):
    """Indices and values of some steps."""
    rng = np.random.default_rng(seed)
    draw = {
        "repeated": lambda: rng.choice(rows // 2, size=7),
        "one index many times": lambda: [3] * 6,
        "unsorted": lambda: rng.permutation(rows)[:4],
        "single": lambda: [int(rng.integers(rows))],
        "all rows": lambda: rng.permutation(rows),
        "empty": lambda: [],
    }[kind]
    drawn = [np.asarray(draw(), np.int64) for _ in range(count)]
    return [(indices, rng.normal(size=(len(indices), *shape))) for indices in drawn]


def train(optimizer, table, steps, dtype=tf.float64, mode="graph", indices_dtype=tf.int64, signature=None):
    """The table after each step of indices and values."""
    weights = tf.Variable(table, dtype=dtype, name="table")
    optimizer.build([weights])

    def apply(indices, values):
        optimizer.apply([tf.IndexedSlices(values, indices)], [weights])

    step = cases.compiled(mode, optimizer, apply, **({"input_signature": signature} if signature else {}))
    history = []
    for indices, values in steps:
        step(tf.constant(indices, indices_dtype), tf.constant(values, dtype))
        history.append([weights.numpy().astype(np.float64)])
    return history


def _train_lazily_by_oracle(case, table, steps, rate):
    """Each named row is a variable whose step is the global one. LAMB has one ratio for all of them."""
    terms = case.oracle_kwargs
    decay = terms.pop("weight_decay", 0.0)
    table, slots, history = np.array(table, np.float64), {}, []
    for t, (indices, values) in enumerate(steps, 1):
        rows = sorted(set(indices))
        if rows:
            g = dense(indices, values, table.shape)[rows]
            own = {key: whole[rows] for key, whole in slots.items()}
            share = decay * (1.0 if case.cls is tav.LAMB else rate)
            table[rows] = case.rule(table[rows], g, t, own, rate, share, **terms)
            for key, value in own.items():
                slots.setdefault(key, np.zeros_like(table))[rows] = value
        history.append([table.copy()])
    return history


def train_by_oracle(case, sparse_update, table, steps, rate):
    """The same by the oracle: exact by the dense gradients."""
    if sparse_update == "lazy":
        return _train_lazily_by_oracle(case, table, steps, rate)
    grads = [[dense(*step, table.shape)] for step in steps]
    return cases.oracle.train(case.rule, [table], grads, [rate] * len(steps), **case.oracle_kwargs)
