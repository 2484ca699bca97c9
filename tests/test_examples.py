"""The examples with large models, as --quick runs them."""

import json
import pathlib
import subprocess
import sys

import pytest

EXAMPLES = pathlib.Path(__file__).parents[1] / "examples"


def run(name, *options):
    command = [sys.executable, EXAMPLES / f"{name}.py", "--quick", *options]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("bert_classifier", "resnet50")]


@pytest.mark.parametrize("name", [*SLOW, "two_tower"])
def test_quick(name, tmp_path):
    printed = run(name, "--json", tmp_path / "numbers.json")
    numbers = json.loads((tmp_path / "numbers.json").read_text())
    results = numbers["results"]
    for own in results:
        assert own in printed
    alone, theirs, pure, fused = results.values()
    assert abs(alone["last_loss"] - alone["first_loss"]) < 0.1  # no weight was changed
    for own in theirs, pure, fused:
        assert own["last_loss"] < 0.9 * own["first_loss"]
        assert abs(own["last_loss"] - theirs["last_loss"]) < 0.3 * theirs["first_loss"]
        assert own["step_ms"] > 0
    if name != "resnet50":  # whose batch normalisation amplifies rounding
        assert abs(pure["last_loss"] - fused["last_loss"]) < 1e-3


def test_the_first_turn_in_a_process_of_its_own():
    printed = run("two_tower", "--one", "tav.AdamW, fused=True")
    numbers = json.loads(printed.splitlines()[-1])
    assert set(numbers) == {"mib", "first_step_s"}
    assert min(numbers.values()) > 0


def test_trust_ratio(tmp_path):
    printed = run("trust_ratio", "--log-dir", tmp_path)
    assert printed.count("  hidden/kernel ") == 2
    assert all(list((tmp_path / name).iterdir()) for name in ("LAMB", "AdamW"))


def test_split_step(tmp_path):
    run("split_step", "--models", "10 small dense layers", "--json", tmp_path / "numbers.json")
    (results,) = json.loads((tmp_path / "numbers.json").read_text())["results"].values()
    losses = [own.pop("last_loss") for own in results.values()]
    assert max(losses) - min(losses) < 1e-3
    assert min(value for own in results.values() for value in own.values()) > 0
