"""The experiments: as --quick runs them, and what they conclude from numbers whose answer is known."""

import importlib
import json

import adamw_decoupling
import experiment
import lamb_large_batch
import numpy as np
import pandas as pd
import pytest
import qhadam_early_gain
import which_one

PROGRAMS = (
    *("adamw_decoupling", "which_one", "tune"),
    *("qhadam_early_gain", "lamb_large_batch", "loss_against_seconds"),
)


@pytest.mark.slow
@pytest.mark.parametrize("name", PROGRAMS)
def test_quick(name, tmp_path, capsys):
    program = importlib.import_module(name)
    kept, picture = tmp_path / "results.json", tmp_path / "picture.png"
    experiment.main(program.EXPERIMENT, "", ["--quick", "--json", str(kept), "--out", str(picture)])
    printed = capsys.readouterr().out
    assert "trials in" in printed
    assert picture.stat().st_size > 10_000
    numbers = json.loads(kept.read_text())
    assert len({len(column) for column in numbers.values()}) == 1  # a row per trial
    again = program.EXPERIMENT.markdown(numbers)
    assert again.startswith("| ")
    sentence = again.split("\n\n", 1)[1].split()
    assert all(word in printed for word in sentence if word.isalpha())


def test_a_trial_that_fails_ends_the_experiment():
    results = experiment.in_processes(json.loads, lambda quick, frame: [{"s": "1"}, {"s": "{"}], processes=1)
    for quick in True, False:
        with pytest.raises(json.JSONDecodeError):
            results(quick, experiment.Console())


def test_numbers_are_kept_with_six_digits(tmp_path):
    frame = pd.DataFrame({"a": [1 / 3, float("nan")], "b": [[1e-9 / 3, 2.0], [1.0]], "c": ["x", None]})
    experiment.save(frame, tmp_path / "kept.json")
    kept = json.loads((tmp_path / "kept.json").read_text())
    assert kept == {"a": [0.333333, None], "b": [[3.33333e-10, 2.0], [1.0]], "c": ["x", None]}


@pytest.mark.slow
def test_the_best_decay_moves_with_a_planted_power_of_the_rate():
    powers = {"L2": 0.5, "learning_rate": 0.0, "schedule": 1.0}
    rows = []
    for kind, decays in adamw_decoupling.DECAYS.items():
        middle = np.log10(decays[len(decays) // 2])
        for rate in adamw_decoupling.RATES:
            best = middle + powers[kind] * np.log10(rate / 2**-6)
            for decay in decays:
                for seed in range(5):
                    loss = 1 + 0.1 * (np.log10(decay) - best) ** 2 + 1e-3 * seed
                    row = {"kind": kind, "rate": rate, "decay": decay, "seed": seed, "loss": loss}
                    rows.append({"examples": 256} | row)
    frame = pd.DataFrame(rows).sample(frac=1, random_state=0)
    for kind, power in powers.items():
        found = adamw_decoupling.shift_of(frame, kind)
        assert [found.factor, *found.interval] == pytest.approx([4**power] * 3)
    report = adamw_decoupling.report(pd.concat([frame, frame.assign(examples=1024)]))
    assert report.count('; least with AdamW, `"learning_rate"`.') == 2


def test_a_best_decay_at_the_edge_of_the_grid_is_none():
    decays = np.array([1e-3, 1e-2, 1e-1])
    falling, flat, inside = [3.0, 2.0, 1.0], [1.0, 0.99, 1.0], [1.0, 0.5, 1.0]
    best = adamw_decoupling.best_decays(decays, np.array([falling, flat, inside]))
    assert np.isnan(best).tolist() == [True, True, False]
    assert best[2] == pytest.approx(-2)


def test_a_rate_that_does_not_learn_is_not_counted():
    decays, bowl = np.array([1e-3, 1e-2, 1e-1]), np.array([1.0, 0.5, 1.0])
    assert adamw_decoupling.usable(decays, np.array([bowl, 1.2 * bowl, 1.3 * bowl])).tolist() == [
        True,
        True,
        False,
    ]


def test_the_kind_that_depends_least_is_named_where_the_draws_agree():
    still, moving = np.full(100, 1.1), np.full(100, 2.0)
    unsure, unknown = np.r_[np.full(90, 1.05), moving[:10]], np.r_[still[:90], np.full(10, np.nan)]

    def least(**draws):
        shifts = {kind: adamw_decoupling.Shift(own[0], own) for kind, own in draws.items()}
        return adamw_decoupling.least_dependent(shifts)

    assert least(a=moving, b=still, c=1 / moving) == "b"
    assert least(a=unsure, b=still, c=moving) is None
    assert least(a=unknown, b=moving, c=moving) is None


def test_where_no_decay_helps_nothing_is_said_of_its_moves():
    rows = [
        {"examples": 256, "kind": kind, "rate": rate, "decay": decay, "seed": seed, "loss": 1.0}
        for kind, decays in adamw_decoupling.DECAYS.items()
        for rate in adamw_decoupling.RATES
        for decay in decays
        for seed in range(2)
    ]
    assert "too few rates" in adamw_decoupling.report(pd.DataFrame(rows))


def test_ratios_of_paired_seeds():
    theirs = np.arange(1.0, 6.0)
    assert np.exp(qhadam_early_gain.log_ratio(0.9 * theirs, theirs)) == pytest.approx([0.9] * 3)
    # Student's own sleep data: the mean difference 1.58 lies between 0.70 and 2.46.
    differences = np.array([1.2, 2.4, 1.3, 1.3, 0.0, 1.0, 1.8, 0.8, 4.6, 1.4])
    assert experiment.mean_interval(differences) == pytest.approx((1.58, 0.70, 2.46), abs=0.005)
    assert experiment.mean_interval(np.array([3.0])) == (3, -np.inf, np.inf)


def test_the_rate_is_tuned_on_the_other_seeds():
    rows = [
        {
            "task": "images",
            "optimizer": "Adam",
            "rate": rate,
            "seed": seed,
            "validation": abs(rate - 0.1) if seed >= 100 else -rate,
            "losses": [1.0, 2.0 - rate if seed >= 100 else rate] if rate < 2 else [1.0, float("nan")],
        }
        for rate in (0.1, 1.0, 2.0)
        for seed in (0, 1, 100, 101)
    ]
    frame = pd.DataFrame(rows)
    for by, rate in ("validation", 0.1), ("training", 1.0):
        chosen = qhadam_early_gain.tuned(frame, by)
        assert set(chosen.rate) == {rate}
        assert set(chosen.seed) == {0, 1}


def test_an_optimizer_falls_behind():
    steps = {
        "LAMB": [100, 50, 25],
        "LAMB, warm-up": [200, 50, 25],
        "AdamW": [100, 70, 50],
        "AdamW, warm-up": [99, 99, 99],
    }
    rows = [
        {
            "optimizer": optimizer,
            "batch": batch,
            "rate": 0.1,
            "seed": seed,
            "taken": taken + seed,
            "reached": not (optimizer == "AdamW, warm-up" and batch == 512),
            "scale": 1.0,
        }
        for optimizer, own in steps.items()
        for batch, taken in zip((32, 128, 512), own, strict=True)
        for seed in range(5)
    ]
    slower = [
        row | {"scale": 0.25, "taken": 7 if row["optimizer"] == "LAMB, warm-up" else 10}
        for row in rows
        if row["batch"] == 512
    ]
    report = lamb_large_batch.report(pd.DataFrame(rows + slower))
    sentence = report.split("\n\n")[1]
    assert sentence == (
        "Falling behind: LAMB nowhere; LAMB, warm-up at 32; AdamW at 512; AdamW, warm-up at 128, 512. "
        "At 512 with a fourth of the scaled rate: LAMB in 10 steps, LAMB, warm-up in 7 steps, AdamW in 10 "
        "steps, AdamW, warm-up in most seeds not. A warm-up saves LAMB 3 of them (3 to 3, seeds in pairs: 5)."
    )
    assert "- (0 of 5)" in report


def test_ranks_and_relative_losses():
    means = {"Adam": [1.0, 4.0], "SGD with momentum": [2.0, 2.0], "AdamW": [4.0, 8.0], "LAMB": [4.0, 2.0]}
    off = {"LAMB": [-0.02, 0.02, -0.02, 0.03]}  # which no other search is
    rows = [
        {
            "task": task,
            "optimizer": optimizer,
            "search": search,
            "seed": 2 * search + number,
            "test": loss * np.exp(off.get(optimizer, [1e-6] * 4)[search] + 1e-7 * number),
        }
        for optimizer, losses in means.items()
        for task, loss in zip(("images", "text"), losses, strict=True)
        for search in range(4)
        for number in range(2)
    ]
    found = which_one.Losses.of(pd.DataFrame(rows).sample(frac=1, random_state=0))
    relative = pd.DataFrame(found.relative(), found.tasks, found.optimizers)
    assert relative["Adam"].to_dict() == pytest.approx({"images": 1, "text": 2}, rel=1e-2)
    assert relative["AdamW"].to_dict() == pytest.approx({"images": 4, "text": 4}, rel=1e-2)
    overall = dict(zip(found.optimizers, which_one.overall(found.relative()), strict=True))
    assert overall == pytest.approx(
        {"Adam": 1, "SGD with momentum": 1, "AdamW": 8**0.5, "LAMB": 2**0.5}, rel=1e-2
    )
    ranks = dict(zip(found.optimizers, which_one.rank(found.relative()), strict=True))
    assert ranks["AdamW"] in (3.5, 4)
    assert ranks["Adam"] == 2
    *of_tasks, _ = found.best()
    best = dict(zip(found.tasks, of_tasks, strict=True))
    assert best == {"images": "Adam", "text": "SGD with momentum, LAMB"}


@pytest.mark.slow  # to import KerasHub takes seconds
def test_seconds_to_the_loss_that_all_reach():
    import loss_against_seconds

    losses = np.array([[4.0, 4.0, 4.0, 4.0, 2.0, 2.0, 2.0, 2.0]] * 2)
    seconds = np.arange(1.0, 9.0) * np.ones((2, 1))
    pair = loss_against_seconds.Pair("x", ("a", "b"), (losses, losses), (2 * seconds, seconds), (None, None))
    assert pair.target == 2
    for tracing, seconds in (True, [16, 8]), (False, [14, 7]):
        theirs, ours = pair.seconds_to_target(tracing)
        assert theirs.tolist() == [seconds[0]] * 2
        assert ours.tolist() == [seconds[1]] * 2
