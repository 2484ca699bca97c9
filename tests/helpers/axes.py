"""What tests vary, as marks of pytest: cases, modes, and the pairs of any of them.

XLA compiles each step for seconds: most of its rows are left to the slow tests.
"""

import cases
import pytest


def name_value(value):
    """A short name for pytest's list of tests."""
    if isinstance(value, dict):
        return "-".join(value) or "plain"
    if isinstance(value, type):
        return value.__name__
    return str(getattr(value, "name", None) or getattr(value, "__name__", None) or value)


def _slow_if_xla(mode, *values):
    return pytest.param(*values, marks=pytest.mark.slow if mode == "xla" else ())


def one_quick(values):
    """The values of a parameter, all but the last slow: where they hardly meet what the test is about."""
    *others, last = values
    return [*(pytest.param(value, marks=pytest.mark.slow) for value in others), last]


ALL_CASES = pytest.mark.parametrize("case", cases.CASES, ids=name_value)
PLAIN_CASES = pytest.mark.parametrize("case", cases.PLAIN_CASES, ids=name_value)
CLASSES = pytest.mark.parametrize("cls", cases.CLASSES, ids=name_value)
ALL_MODES = pytest.mark.parametrize("mode", cases.MODES)
MODES_XLA_SLOW = pytest.mark.parametrize("mode", [_slow_if_xla(mode, mode) for mode in cases.MODES])
FUSED = pytest.mark.parametrize("fused", [False, True], ids=["unfused", "fused"])
SPARSE_UPDATES = pytest.mark.parametrize("sparse_update", ["exact", "lazy"])


def few_graphs(row):
    """For `pairwise`: tf.functions of two cases only, as what a graph adds does not depend on the terms.

    AdamW steps by TensorFlow's kernels where it is not fused, LAMB by the formula.
    """
    return row["mode"] not in ("graph", "fused graph") or row["case"] in (cases.CASES[0], cases.CASES[6])


def pairwise(sensible=lambda row: True, xla_is_slow=True, **axes):
    """A mark with few combinations of the axes' values, among which is every pair of them."""
    rows = cases.product(axes, sensible)
    by_xla = [row for row in rows if xla_is_slow and row.get("mode") == "xla"]
    others = [row for row in rows if row not in by_xla]
    params = [_slow_if_xla(row.get("mode"), *row.values()) for row in cases.cover_pairs(by_xla)]
    params = [pytest.param(*row.values()) for row in cases.cover_pairs(others)] + params
    return pytest.mark.parametrize(tuple(axes), params, ids=name_value)
