"""`make gpu-report`, as far as it can be seen without a GPU."""

import json
import subprocess
import sys
from pathlib import Path

import cuda_bench
import gpu_report
import pytest

ROOT = Path(__file__).parents[1]


def test_the_rehearsal(tmp_path, capsys):
    """All parts; a second run passes over what is there, and one that failed leaves the others alone."""
    assert gpu_report.main(["--on-cpu", "--out", str(tmp_path)]) == 0
    report = json.loads((tmp_path / "gpu-report.json").read_text())
    assert list(report) == list(gpu_report.PARTS)
    assert len(report["check"]["result"]["passed"]) > 8
    assert set(report["bench"]["result"]["tiny"]) == {"copy", *(kept.name for kept in cuda_bench.DENSE)}
    page = (tmp_path / "gpu-report.md").read_text()
    assert "**A rehearsal on a CPU" in page
    assert "AdamW, fused, split" in page
    assert "Failed" not in page

    report["sanitize"] = {"sources": gpu_report.sources(), "error": "killed", "ended": None, "seconds": 1}
    (tmp_path / "gpu-report.json").write_text(json.dumps(report))
    assert gpu_report.main(["--page", "--out", str(tmp_path)]) == 0
    assert "Failed: `killed`" in (tmp_path / "gpu-report.md").read_text()
    capsys.readouterr()
    assert gpu_report.main(["--on-cpu", "--out", str(tmp_path)]) == 0
    assert capsys.readouterr().out.count("there already") == len(gpu_report.PARTS) - 1
    assert (tmp_path / "gpu-report.md").read_text() == page


def test_a_part_that_fails(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu_report, "PARTS", {"environment": 0.01, "sanitize": 20})
    assert gpu_report.main(["--on-cpu", "--out", str(tmp_path)]) == 1
    assert "environment: not done after 0.01 s" in capsys.readouterr().out
    assert "result" in json.loads((tmp_path / "gpu-report.json").read_text())["sanitize"]
    command = [sys.executable, gpu_report.__file__, "--part", "check"]  # without a GPU, or without nvcc
    if gpu_report.cuda_kernels.nvcc() is None:
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 1


def test_the_figures_on_paper():
    paper = gpu_report.on_paper()
    moved, launches, least, aim = paper["one of 100 million", "AdamW"]
    assert (moved, launches) == (28 * 10**8, 1)
    assert least == pytest.approx(28e8 / (3.35e12 * 0.9))
    assert aim == pytest.approx(least / 0.9)
    assert paper["500 small", "AdamW"][1] == 2
    assert paper["500 small", "LAMB"][:2] == (40 * 250 * (64 * 64 + 64), 6)
    have = {kept.name: kept.bytes for kept in cuda_bench.DENSE}
    assert (have["AdamW, bfloat16"], have["AdamW, bfloat16, master weights"]) == (22, 30)


def test_the_page_is_that_of_the_numbers():
    numbers = ROOT / "docs" / "gpu-report.json"
    report = json.loads(numbers.read_text()) if numbers.exists() else {}
    assert (ROOT / "docs" / "gpu-report.md").read_text() == gpu_report.page(report)
