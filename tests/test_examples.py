"""The examples and a benchmark run as programs, from any folder."""

import json
import pathlib
import subprocess
import sys

import pytest

pytestmark = pytest.mark.slow
EXAMPLES = pathlib.Path(__file__).parents[1] / "examples"


def run(folder, name, *options):
    """Run a program in a folder; return what it prints."""
    command = [sys.executable, EXAMPLES / f"{name}.py", *options]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_quickstart(tmp_path):
    assert "accuracy: 0.9" in run(tmp_path, "quickstart").splitlines()[-1]


def test_digits(tmp_path):
    printed = run(tmp_path, "digits", "--epochs", "1", "--seeds", "1", "--json", "numbers.json")
    runs = json.loads((tmp_path / "numbers.json").read_text())
    assert all(f"{label} " in printed for label in runs)
    assert [len(run["loss"]) for (run,) in runs.values()] == [1] * 5
    assert (tmp_path / "digits.png").stat().st_size > 10_000


@pytest.mark.parametrize("name", ["bert_classifier", "resnet50", "two_tower"])
def test_quick(name, tmp_path):
    printed = run(tmp_path, name, "--quick", "--json", "numbers.json")
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


def test_the_first_turn_in_a_new_process(tmp_path):
    printed = run(tmp_path, "two_tower", "--quick", "--one", "tav.AdamW, fused=True")
    numbers = json.loads(printed.splitlines()[-1])
    assert set(numbers) == {"mib", "first_step_s"}
    assert min(numbers.values()) > 0


def test_trust_ratio(tmp_path):
    printed = run(tmp_path, "trust_ratio", "--quick", "--log-dir", ".")
    assert printed.count("  hidden/kernel ") == 2
    assert all(list((tmp_path / name).iterdir()) for name in ("LAMB", "AdamW"))


def test_split_step(tmp_path):
    models = ("--models", "10 small dense layers")
    run(tmp_path, "benchmarks/split_step", "--quick", *models, "--json", "numbers.json")
    (results,) = json.loads((tmp_path / "numbers.json").read_text())["results"].values()
    losses = [own.pop("last_loss") for own in results.values()]
    assert max(losses) - min(losses) < 1e-3
    assert min(value for own in results.values() for value in own.values()) > 0


def test_an_experiment(tmp_path):
    """The other ones are in test_experiments.py. This one shares code with an example."""
    run(tmp_path, "experiments/half_precision", "--quick", "--out", "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 10_000


def test_the_benchmarks(tmp_path):
    """The dense one takes minutes: it only says what it does."""
    assert "--no-memory" in run(tmp_path, "benchmarks/benchmark", "--help")
    options = ("--alone", "tav.AdamW lazy, fused", "--rows", "10000", "--rounds", "3")
    printed = run(tmp_path, "benchmarks/sparse_benchmark", *options)
    assert json.loads(printed.splitlines()[-1])["ms"] > 0
