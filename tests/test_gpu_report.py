"""`make gpu-report`, as far as it can be seen without a GPU."""

import json
import os
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

    report["sanitize"] = {"key": gpu_report.key(True), "error": "killed", "ended": None, "seconds": 1}
    (tmp_path / "gpu-report.json").write_text(json.dumps(report))
    assert gpu_report.main(["--page", "--out", str(tmp_path)]) == 0
    assert "Failed: `killed`" in (tmp_path / "gpu-report.md").read_text()
    capsys.readouterr()
    assert gpu_report.main(["--on-cpu", "--out", str(tmp_path)]) == 0
    assert capsys.readouterr().out.count("there already") == len(gpu_report.PARTS) - 1
    assert (tmp_path / "gpu-report.md").read_text() == page


def command_line(pid):
    try:
        return Path("/proc", pid, "cmdline").read_text()
    except OSError:  # no process, or no more
        return ""


def test_a_part_that_takes_too_long_ends_with_its_children(tmp_path, monkeypatch, capsys):
    """What there is of it is kept, the others go on, and it is run again."""
    program = tmp_path / "part.py"
    program.write_text(
        "import subprocess, sys\n"
        'print(\'{"memcheck": "no error"}\', flush=True)\n'
        f"subprocess.run([sys.executable, '-c', 'import time; time.sleep(60)', {str(tmp_path)!r}])\n"
    )
    monkeypatch.setattr(gpu_report, "__file__", str(program))
    monkeypatch.setattr(gpu_report, "PARTS", {"sanitize": 2})
    for _ in range(2):
        assert gpu_report.main(["--on-cpu", "--out", str(tmp_path)]) == 1
        assert "sanitize: not done after 2 s" in capsys.readouterr().out
    page = (tmp_path / "gpu-report.md").read_text()
    assert "Failed: `not done after 2 s`" in page
    assert "- memcheck: no error" in page
    assert not [pid for pid in os.listdir("/proc") if str(tmp_path) in command_line(pid)]


def test_a_rehearsal_is_not_for_the_docs(capsys):
    for more in ([], ["--page"]):
        with pytest.raises(SystemExit, match="2"):
            gpu_report.main(["--on-cpu", *more, "--out", str(ROOT / "docs")])
        assert "not written into docs" in capsys.readouterr().err


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
