"""`make gpu-report`, as far as it can be seen without a GPU."""

import json
import os
import shutil
from pathlib import Path

import cuda_bench
import cuda_kernels
import gpu_report
import pytest

ROOT = Path(__file__).parents[1]


def report_in(folder):
    return json.loads((folder / "gpu-report.json").read_text())


@pytest.mark.slow
def test_the_rehearsal(tmp_path, capsys):
    """All parts; a second run passes over what is there, and one that failed leaves the others alone."""
    assert gpu_report.main(["--on-cpu", "--out", str(tmp_path)]) == 0
    report = report_in(tmp_path)
    assert list(report) == list(gpu_report.PARTS)
    assert len(report["check"]["result"]) > 8
    measured, counted = (report[name]["result"] for name in ("bench", "launches"))
    assert set(measured["tiny"]) == {"copy", *(kept.name for kept in cuda_bench.DENSE)}
    assert set(report["tensorflow"]["result"]["LAMB, fused, split"]) == {"first", "ms", "kernels"}
    for name, sizes in cuda_bench.TINY.items():
        expected = {kept.name: kept.launches(sizes, cuda_kernels.CUTS_ON_CPU) for kept in cuda_bench.DENSE}
        assert counted[name] == expected
    assert [counted[name]["LAMB"] for name in cuda_bench.TINY] == [3, 4, 6]
    page = (tmp_path / "gpu-report.md").read_text()
    assert "**A rehearsal on a CPU" in page
    assert "Failed" not in page

    report["initcheck"]["error"] = "killed\n`there`"
    (tmp_path / "gpu-report.json").write_text(json.dumps(report))
    assert gpu_report.main(["--page", "--out", str(tmp_path)]) == 0
    assert "Failed:\n\n    killed\n    `there`\n" in (tmp_path / "gpu-report.md").read_text()
    capsys.readouterr()
    assert gpu_report.main(["--on-cpu", "--out", str(tmp_path)]) == 0
    assert capsys.readouterr().out.count("there already") == len(gpu_report.PARTS) - 2
    assert (tmp_path / "gpu-report.md").read_text() == page


@pytest.mark.slow
def test_parts_that_fail(tmp_path, monkeypatch, capsys):
    """Without a compiler; the others go on. On another machine nothing is taken over."""
    limits = {"environment": 20, "build": 20, "bench": 0.01, "memcheck": 20}
    monkeypatch.setattr(gpu_report, "PARTS", limits)
    with monkeypatch.context() as without:
        without.setenv("PATH", str(tmp_path))
        assert gpu_report.main(["--on-cpu", "--out", str(tmp_path)]) == 1
    report = report_in(tmp_path)
    assert "FileNotFoundError" in report["build"]["error"]
    assert report["bench"]["error"] == "not done after 0.01 s"
    assert "not run" in report["memcheck"]["result"]
    assert "**A rehearsal on a CPU" in (tmp_path / "gpu-report.md").read_text()

    monkeypatch.setattr(gpu_report, "PARTS", {name: limits[name] for name in ("environment", "memcheck")})
    tool = tmp_path / "compute-sanitizer"
    tool.touch(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    capsys.readouterr()
    gpu_report.main(["--on-cpu", "--out", str(tmp_path)])
    assert "already" not in capsys.readouterr().out
    tool.unlink()


def test_what_was_found_before_an_error_is_kept(tmp_path, monkeypatch):
    def part(at):
        yield "first", {"ms": 1}
        raise RuntimeError("second")

    monkeypatch.setitem(gpu_report.RUN, "bench", part)
    to = tmp_path / "found"
    assert gpu_report.as_child("bench", gpu_report.Setting(True, "", tmp_path), to) == 1
    lines = [json.loads(line) for line in to.read_text().splitlines()]
    assert lines == [["first", {"ms": 1}], "RuntimeError: second"]


@pytest.mark.slow
def test_what_was_found_in_time_is_kept(tmp_path, monkeypatch):
    """Of a part that takes too long; it is run again."""
    program = tmp_path / "part.py"
    program.write_text(
        "import sys, time\n"
        "with open(sys.argv[sys.argv.index('--to') + 1], 'a') as lines:\n"
        '    print(\'["tiny", {}]\\n["half a\', file=lines, end="", flush=True)\n'
        "    time.sleep(60)\n"
    )
    monkeypatch.setattr(gpu_report, "__file__", str(program))
    monkeypatch.setattr(gpu_report, "PARTS", {"launches": 2})
    monkeypatch.setattr(gpu_report, "sources", lambda: "the same")
    for _ in range(2):
        assert gpu_report.main(["--on-cpu", "--out", str(tmp_path)]) == 1
        record = report_in(tmp_path)["launches"]
        assert (record["result"], record["error"]) == ({"tiny": {}}, "not done after 2 s")
        assert record.pop("ended")
    assert "Failed:\n\n    not done after 2 s\n" in (tmp_path / "gpu-report.md").read_text()


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("sh"), reason="no shell")
def test_nothing_goes_on_after_a_part_that_took_too_long(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    reading = os.open(tmp_path / "fifo", os.O_RDONLY | os.O_NONBLOCK)
    script = f"exec 3> {tmp_path / 'fifo'}; (sleep 10; echo alive >&3) & wait"
    assert gpu_report.run_for(["sh", "-c", script], 1) is None
    os.set_blocking(reading, True)
    assert os.read(reading, 100) == b""  # the end, when nobody holds it any more
    os.close(reading)
    assert gpu_report.run_for(["sh", "-c", "exit 3"], 60) == 3


def test_a_rehearsal_is_not_written_into_docs(capsys):
    for more in (["--out", "docs/../docs"], ["--page", "--out", "docs"]):
        with pytest.raises(SystemExit, match="2"):
            gpu_report.main(["--on-cpu", *more[:-1], str(ROOT / more[-1])])
        assert "not written into docs" in capsys.readouterr().err


def test_limits_and_names():
    assert sum(gpu_report.PARTS.values()) < 600
    assert list(gpu_report.RUN) == list(gpu_report.PARTS)


def test_the_figures_on_paper():
    paper = {(x.set, x.name): x for x in gpu_report.on_paper()}
    large = paper["one of 100 million", "AdamW"]
    assert (large.bytes, large.launches) == (28 * 10**8, 1)
    assert large.least == pytest.approx(28e8 / (3.35e12 * 0.9))
    assert large.aim == pytest.approx(large.least / 0.9)
    assert paper["500 small", "AdamW"].launches == 2
    assert paper["500 small", "LAMB"][2:4] == (40 * 250 * (64 * 64 + 64), 6)
    # A variable of 4,096 chunks has one launch more.
    assert [paper[name, "LAMB"].launches for name in ("BERT-base", "ResNet-50")] == [4, 3]
    lamb = cuda_bench.DENSE[2]
    assert [lamb.launches([4095 * 4096 + more]) for more in (0, 1)] == [3, 4]
    have = {kept.name: kept.bytes for kept in cuda_bench.DENSE}
    assert (have["AdamW, bfloat16"], have["AdamW, bfloat16, master weights"]) == (22, 30)
    assert have["LAMB, bfloat16, master weights"] == 24 + 20
    wide = paper["8 x 1,000,000, all rows", "AdamW, lazy"]
    assert wide.bytes == paper["8 x 1,000,000, all rows", "AdamW, exact"].bytes == 28 * 8 * 10**6


def test_kernels_in_a_trace():
    """Copies and other lines are not counted."""
    from tensorflow.tsl.profiler.protobuf import xplane_pb2

    trace = xplane_pb2.XSpace()
    assert gpu_report.kernels_of(trace) is None
    plane = trace.planes.add(name="/device:GPU:0")
    for number, name in enumerate(("elements", "MemcpyD2D", "trust_ratios")):
        plane.event_metadata[number].name = name
    for name in "Stream #13(Compute,MemcpyD2D)", "XLA Ops":
        line = plane.lines.add(name=name)
        for number in 0, 1, 2, 0:
            line.events.add(metadata_id=number)
    trace.planes.add(name="/host:CPU").lines.add(name="Stream").events.add()
    assert gpu_report.kernels_of(trace) == 3


def test_the_page_is_that_of_the_numbers():
    report = gpu_report.read(ROOT / "docs" / "gpu-report.json")
    assert (ROOT / "docs" / "gpu-report.md").read_text() == gpu_report.page(report)
