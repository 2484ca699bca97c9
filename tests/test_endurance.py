"""No Python object is kept a step: the exact half of `make endurance`."""

import endurance
import pytest

STEPS = {"eagerly": (50, 10), "retraced": (60, 20), "in fit": (200, 100)}


@pytest.mark.parametrize(
    ("way", "name", "fused"),
    [
        pytest.param("eagerly", "AdamW", False, marks=pytest.mark.slow),
        ("eagerly", "LAMB, lazy", True),
        ("retraced", "AdamW", True),
        pytest.param("eagerly", "AdamW", True, marks=pytest.mark.slow),
        pytest.param("retraced", "AdamW", False, marks=pytest.mark.slow),
        pytest.param("retraced", "LAMB, lazy", True, marks=pytest.mark.slow),
        pytest.param("in fit", "AdamW", False, marks=pytest.mark.slow),
        pytest.param("in fit", "AdamW", True, marks=pytest.mark.slow),
        pytest.param("in fit", "LAMB, lazy", True, marks=pytest.mark.slow),
    ],
)
def test_no_object_is_kept(way, name, fused):
    steps, warm_up = STEPS[way]
    objects, _ = endurance.growth(endurance.WAYS[way](endurance.OPTIMIZERS[name](fused)), steps, warm_up)
    assert objects <= steps // 10  # a few once, and none a step


def test_one_object_a_step_would_be_seen():
    kept = []

    def run(steps):
        kept.extend([] for _ in range(steps))

    objects, blocks = endurance.growth(run, 50, 5)
    assert objects >= 50
    assert blocks >= 50
