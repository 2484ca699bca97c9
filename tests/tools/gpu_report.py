"""What the fused kernels do on a GPU, as one JSON file and one page: `make gpu-report`.

    python tests/tools/gpu_report.py            # wants a GPU, nvcc, NumPy, PyTorch; the last part TensorFlow
    python tests/tools/gpu_report.py --on-cpu   # a rehearsal: the kernels compiled for a CPU, small sets
    python tests/tools/gpu_report.py --page     # only the page, from the JSON

The parts, each in a process of its own: what there is (environment), the kernels built (build), whether they
are right (check), also under compute-sanitizer (its tools), how fast they are alone (bench), how many a step
launches (launches), and how fast a step is under TensorFlow (tensorflow). What a part has found is written
when it ends, or fails, or has taken too long; then the next begins. One that is there for the same sources,
GPU and versions is not run again, except the first (--again PART does). The limits of all are below ten
minutes together.
"""

import argparse
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import cuda_bench
import cuda_kernels

TOOLS = Path(__file__).resolve().parent
ROOT = TOOLS.parents[1]
DOCS, BUILD = ROOT / "docs", ROOT / "build" / "gpu-report"
SANITIZERS = ("memcheck", "racecheck", "initcheck")
PARTS = {  # seconds at most
    "environment": 20,
    "build": 60,
    "check": 150,
    **dict.fromkeys(SANITIZERS, 45),
    "bench": 80,
    "launches": 25,
    "tensorflow": 125,
}
NOT_MEASURED = "not measured yet"

# An H100 SXM. The bandwidth is NVIDIA's figure; that a copy reaches 90 % of it is an assumption.
NOMINAL, COPY_SHARE = 3.35e12, 0.9
AIMS = {"AdamW": 0.9, "QHAdamW": 0.9, "LAMB": 0.85}  # of a copy's bandwidth


class Setting(NamedTuple):
    """key: of the sources, the GPU and the versions. made: the folder for what is compiled."""

    on_cpu: bool
    key: str
    made: Path


# -- the parts: each yields names and what goes into the JSON under them -----------------------------------


def environment(at):
    yield "system", platform.platform()
    yield "python", platform.python_version()
    for name, line, command in (
        ("nvcc", -1, [cuda_kernels.nvcc() or "nvcc", "--version"]),
        ("gpu", 0, ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]),
    ):
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            yield name, done.stdout.strip().splitlines()[line]
        except (OSError, subprocess.CalledProcessError) as error:
            yield name, f"none ({error})"
    yield "compute-sanitizer", shutil.which("compute-sanitizer") or "none on the PATH"
    for module in ("numpy", "torch", "cupy", "tensorflow", "keras"):
        yield module, importlib.metadata.version(module) if is_installed(module) else "not installed"


def is_installed(module):
    return importlib.util.find_spec(module) is not None


def build(at):
    begin = time.monotonic()
    yield "library", library(at).name
    yield "seconds", round(time.monotonic() - begin, 1)


def library(at):
    """The kernels, compiled once for all parts."""
    path = at.made / f"kernels-{at.key[:16]}.so"
    if not path.exists():
        at.made.mkdir(parents=True, exist_ok=True)
        for old in at.made.glob("kernels-*.so"):
            old.unlink()
        with tempfile.TemporaryDirectory(dir=at.made) as folder:
            os.replace(cuda_kernels.build(folder, at.on_cpu), path)
    return path


def check(at):
    options = ["--on-cpu", "--quick", "--without", "dense", "sparse", "wide_rows"] if at.on_cpu else []
    yield from run_checks([], options, library(at))


def run_checks(before, options, library):
    """Yields the checks that passed, with what they said; an error with the end of what was printed."""
    program = [sys.executable, "-u", TOOLS / "cuda_kernels.py", "check", "--library", library, *options]
    printed = []
    with subprocess.Popen(
        [*before, *program], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as running:
        for line in running.stdout:
            say(line.rstrip())
            printed.append(line)
            if passed := re.match(r"ok +(.*) \((.* s)\)", line):
                yield passed[1], passed[2]
    if running.returncode:
        raise RuntimeError(f"exit status {running.returncode}: {''.join(printed)[-2000:]}")


def make_sanitizer(tool):
    def part(at):
        if at.on_cpu:
            yield "not run", "`make sanitize-cuda` is the form for a CPU"
        elif not shutil.which("compute-sanitizer"):
            yield "not run", "no compute-sanitizer on the PATH"
        else:
            os.environ["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
            # PyTorch asks CUDA for functions that it may lack. Errors of our calls are raised in Python.
            before = ["compute-sanitizer", "--tool", tool, "--report-api-errors", "no"]
            options = ["--quick", "--without", "huge", "many_chunks"]
            yield from run_checks([*before, "--error-exitcode", "1"], options, library(at))

    return part


def bench(at):
    if not at.on_cpu and not is_installed("torch"):
        yield "not run", "PyTorch is not installed"
        return
    kernels = cuda_kernels.Kernels(library(at))
    memory = cuda_kernels.OnCpu() if at.on_cpu else cuda_kernels.WithTorch()
    for name, results in cuda_bench.bench(kernels, memory, 3 if at.on_cpu else 11, 0 if at.on_cpu else 0.02):
        say(name)
        yield name, results


def launches(at):
    if not at.on_cpu and not is_installed("torch"):
        yield "not run", "PyTorch is not installed"
        return
    kernels = cuda_kernels.Kernels(library(at))
    yield from cuda_bench.launches(kernels, cuda_kernels.OnCpu() if at.on_cpu else cuda_kernels.WithTorch())


def tensorflow(at):
    """Milliseconds of an update of ResNet-50's variables, and how many kernels a step launches."""
    if not is_installed("tensorflow"):
        yield "not run", "TensorFlow is not installed"
        return
    sys.path[:0] = [str(ROOT), str(ROOT / "examples" / "benchmarks")]
    import shapes
    import tensorflow as tf

    gpus = tf.config.list_physical_devices("GPU")
    if not at.on_cpu and not gpus:
        yield "not run", "TensorFlow sees no GPU"
        return
    if not at.on_cpu:  # for this GPU alone, unless it is there
        major, minor = tf.config.experimental.get_device_details(gpus[0])["compute_capability"]
        command = [sys.executable, "-m", "tf_adam_variants.fused", "build", "--cuda-arch", f"{major}{minor}"]
        subprocess.run(command, cwd=ROOT, stdout=sys.stderr)  # where it fails, steps say so
    for rule in "AdamW", "LAMB":
        contestants = update_contestants(rule, [(8, 8), (8,)] if at.on_cpu else shapes.resnet50())
        yield from measure(tf, contestants, 2 if at.on_cpu else 11, 0 if at.on_cpu else 0.02).items()


def measure(tf, contestants, rounds, window):
    """They take turns."""
    results, steps, counts = {}, {}, {}

    def seconds(step, count):
        tf.test.experimental.sync_devices()
        begin = time.perf_counter()
        for _ in range(count):
            step()
        tf.test.experimental.sync_devices()
        return (time.perf_counter() - begin) / count

    for name, make in contestants.items():
        say(name)
        try:
            step = make()
            first = seconds(step, 1)
        except Exception as error:  # the fused kernels may be missing; the others can run
            results[name] = {"not run": " ".join(str(error).split())[:300]}
            continue
        steps[name], results[name] = step, {"first": first}
        counts[name] = cuda_bench.calls_of_a_window(seconds, step, window)
    times = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            step()
            times[name].append(seconds(step, counts[name]))
    for name, step in steps.items():
        results[name]["ms"] = 1e3 * sorted(times[name])[rounds // 2]
        results[name]["kernels"] = kernels_of(trace_step(tf, step))
    return results


def update_contestants(rule, set_shapes):
    """Functions that make an update step, by name. Split: XLA computes the gradients, the kernels update."""
    import keras
    import tensorflow as tf

    import tf_adam_variants as tav

    keras_class = {"AdamW": keras.optimizers.AdamW, "LAMB": keras.optimizers.Lamb}[rule]
    own_class = getattr(tav, rule)

    def contestant(cls, options, mode):
        variables = [keras.Variable(tf.random.normal(shape)) for shape in set_shapes]
        gradients = [tf.random.normal(shape) for shape in set_shapes]
        optimizer = cls(1e-3, weight_decay=0.01, **options)
        optimizer.build(variables)

        @tf.function(jit_compile=True)
        def by_xla():
            return [2.0 * g for g in gradients]

        def step():
            optimizer.apply(by_xla() if mode == "split" else gradients, variables)

        return step if mode == "eager" else tf.function(step, jit_compile=mode == "XLA")

    makers = {
        f"Keras {keras_class.__name__}, XLA": (keras_class, {}, "XLA"),
        f"{rule}, pure, XLA": (own_class, {"fused": False}, "XLA"),
        **{f"{rule}, fused, {how}": (own_class, {"fused": True}, how) for how in ("eager", "graph", "split")},
    }
    return {name: lambda told=told: contestant(*told) for name, told in makers.items()}


def trace_step(tf, step):
    """TensorFlow's profiler on one step."""
    from tensorflow.tsl.profiler.protobuf import xplane_pb2  # private, but the only reader that ships with it

    with tempfile.TemporaryDirectory() as folder:
        with tf.profiler.experimental.Profile(folder):
            step()
            tf.test.experimental.sync_devices()
        (trace,) = Path(folder).rglob("*.xplane.pb")
        return xplane_pb2.XSpace.FromString(trace.read_bytes())


def kernels_of(trace):
    """How many kernels ran on a GPU: what is on its streams, without copies. None where no GPU is in it."""
    planes = [plane for plane in trace.planes if plane.name.startswith("/device:GPU")]
    names = [
        plane.event_metadata[event.metadata_id].name
        for plane in planes
        for line in plane.lines
        if line.name.startswith("Stream")
        for event in line.events
    ]
    return sum(not name.startswith(("Mem", "mem")) for name in names) if planes else None


RUN = {
    "environment": environment,
    "build": build,
    "check": check,
    **{tool: make_sanitizer(tool) for tool in SANITIZERS},
    "bench": bench,
    "launches": launches,
    "tensorflow": tensorflow,
}


# -- running them --------------------------------------------------------------------------------------------


def say(text):
    print(f"    {text}", file=sys.stderr, flush=True)


def sources():
    """A hash of all that a result depends on."""
    digest = hashlib.sha256()
    for pattern in (
        *("custom_ops/*.h", "custom_ops/*.cc", "custom_ops/*.cu", "examples/benchmarks/shapes.py"),
        *("tests/tools/cuda_*.py", "tests/tools/cuda_on_cpu/**/*.*"),
        *("tests/helpers/oracle.py", "tf_adam_variants/**/*.py"),
    ):
        for file in sorted(ROOT.glob(pattern)):
            if file.suffix != ".pyc":
                digest.update(file.read_bytes())
    digest.update(Path(__file__).read_bytes())
    return digest.hexdigest()


def run_part(name, at):
    """The record of one part, run in a process of its own: what it found, and its error if there was one."""
    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        to = Path(folder, "found")
        to.touch()
        command = [sys.executable, __file__, "--part", name, "--to", to, "--key", at.key, "--made", at.made]
        status = run_for([*command, *(["--on-cpu"] if at.on_cpu else [])], PARTS[name])
        whole = to.read_text().rpartition("\n")[0]
    lines = [json.loads(line) for line in whole.splitlines()]
    things = dict(line for line in lines if isinstance(line, list))
    record = {"key": at.key, "on_cpu": at.on_cpu, "result": things}
    if status is None:
        record["error"] = f"not done after {PARTS[name]} s"
    elif status:
        record["error"] = lines[-1] if lines and isinstance(lines[-1], str) else f"exit status {status}"
    record["ended"] = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    return record | {"seconds": round(time.monotonic() - begin, 1)}


def run_for(command, seconds):
    """The exit status; None where it took longer. Nothing that it started goes on then."""
    with subprocess.Popen([*map(str, command)], start_new_session=True) as process:
        try:
            return process.wait(seconds)
        except BaseException as reason:
            os.killpg(process.pid, signal.SIGKILL)
            if isinstance(reason, subprocess.TimeoutExpired):
                return None
            raise


def as_child(name, at, to):
    """Run a part in this process. A line of JSON for each thing that it finds; a string is an error."""
    with to.open("a") as lines:
        try:
            for thing in RUN[name](at):
                print(json.dumps(thing), file=lines, flush=True)
        except Exception as error:
            print(json.dumps(f"{type(error).__name__}: {str(error)[-1500:]}"), file=lines)
            return 1
    return 0


def write(path, text):
    """All of it or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(".part")
    beside.write_text(text)
    os.replace(beside, path)


def read(path):
    return json.loads(path.read_text()) if path.exists() else {}


def run(out, on_cpu, again):
    """Run the parts that are missing. The number of those that failed."""
    numbers, page_file = out / "gpu-report.json", out / "gpu-report.md"
    report = read(numbers)
    at = Setting(on_cpu, sources(), BUILD if out == DOCS else out)
    for name in PARTS:
        known = report.get(name, {})
        there = known.get("key") == at.key and "error" not in known and name not in again
        if there and name != "environment":
            print(f"{name}: there already")
            continue
        print(f"{name} ...", flush=True)
        report[name] = record = run_part(name, at)
        print(f"{name}: {record.get('error', 'done')} ({record['seconds']} s)", flush=True)
        if name == "environment":  # what was found on another GPU or with other versions is found anew
            found_here = f"{at.key} {on_cpu} {record['result']}"
            at = at._replace(key=hashlib.sha256(found_here.encode()).hexdigest())
        write(numbers, json.dumps(report, indent=1) + "\n")
        write(page_file, page(report))
    print(page_file)
    return sum("error" in report[name] for name in PARTS)


# -- the page ------------------------------------------------------------------------------------------------


class Paper(NamedTuple):
    """A step as it should be. least: seconds at a copy's bandwidth; aim: at the share that is aimed at."""

    set: str
    name: str
    bytes: int
    launches: int | None  # by rows, cub's sort decides
    least: float
    aim: float | None


def on_paper():
    """For each set and each way to keep its variables; for each table, lazy and exact."""
    steps = [
        (set_name, kept.name, kept.bytes * sum(sizes), kept.launches(sizes), AIMS[kept.case.name])
        for set_name, sizes in cuda_bench.SETS.items()
        for kept in (cuda_bench.DENSE if set_name == "BERT-base" else cuda_bench.DENSE[:3])
    ]
    steps += [
        (table_name, cuda_bench.by_rows_name(exact), table.bytes(exact), None, None)
        for table_name, table in cuda_bench.tables(tiny=False).items()
        for exact in (False, True)
    ]
    for set_name, name, moved, count, aim in steps:
        least = moved / (NOMINAL * COPY_SHARE)
        yield Paper(set_name, name, moved, count, least, aim and least / aim)


def page(report):
    """The page of docs/, from the JSON alone."""
    results = {name: record["result"] for name, record in report.items()}
    parts = ["# The fused kernels on a GPU\n", "`make gpu-report` writes this page. Do not edit it.\n"]
    if any(record["on_cpu"] for record in report.values()):
        parts.append("**A rehearsal on a CPU: no figure on this page says anything about a GPU.**\n")
    parts.append("## On paper, and measured\n")
    parts.append(
        f"On an H100 SXM, whose memory moves {NOMINAL / 1e12:.2f} TB/s by NVIDIA's figure, of which a copy "
        f"is assumed to reach {COPY_SHARE:.0%}. The aim is {AIMS['AdamW']:.0%} of a copy's bandwidth for "
        f"AdamW and QHAdamW and {AIMS['LAMB']:.0%} for LAMB. Small sets fit into the cache of 50 MB and are "
        "bound by their launches, some microseconds each, instead; so are lazy steps. Under TensorFlow the "
        "scalars of a step are a launch more. Measured: from a CUDA graph, and in brackets the share of the "
        "bandwidth of a copy that moves as much as AdamW.\n"
    )
    rows = [paper_row(paper, results) for paper in on_paper()]
    headings = ["", "MB", "launches", "counted", "µs as a copy", "µs at the aim", "µs measured"]
    parts.append(table(headings, rows))
    kinds = "; ".join(f"{kept.name}: {kept.bytes}" for kept in cuda_bench.DENSE)
    parts.append(
        f"Bytes per parameter: {kinds}. By rows: 24 bytes for each element of a row that is named (lazy) or "
        "of all (exact), and 4 for each value. How many launches a step by rows takes is decided by cub's "
        "sort, too.\n"
    )
    for name in PARTS:
        parts.append(f"## {name.capitalize()}\n")
        record = report.get(name, {"result": {}})
        if "error" in record:
            lines = (f"    {line}\n" for line in record["error"].splitlines())
            parts.append("Failed:\n\n" + "".join(lines))
        if name not in report:
            parts.append(f"{NOT_MEASURED.capitalize()}.\n")
        elif record["result"]:
            show = format_list if "not run" in record["result"] else PAGES.get(name, format_list)
            parts.append(show(record["result"]))
    return "\n".join(parts)


def paper_row(paper, results):
    measured = results.get("bench", {}).get(paper.set, {})
    own, copied = measured.get(paper.name), measured.get("copy")
    counted = results.get("launches", {}).get(paper.set, {}).get(paper.name)
    shown = NOT_MEASURED
    if own:
        shown = f"{micro(best(own))} ({rate(own) / rate(copied):.0%})"
    return [
        f"{paper.set}: {paper.name}",
        f"{paper.bytes / 1e6:,.0f}",
        str(paper.launches or ""),
        NOT_MEASURED if counted is None else str(counted),
        micro(paper.least),
        micro(paper.aim) if paper.aim else "",
        shown,
    ]


def best(own):
    return own.get("graph", own["launched"])


def rate(own):
    return own["bytes"] / best(own)


def micro(seconds):
    return f"{seconds * 1e6:,.0f}" if seconds >= 1e-5 else f"{seconds * 1e6:.1f}"


def table(headings, rows):
    lines = ["| " + " | ".join(headings) + " |", "| --- |" + " ---: |" * (len(headings) - 1)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)]) + "\n"


def format_list(result):
    return "\n".join(f"- {name}: {value}" for name, value in result.items()) + "\n"


def bench_tables(result):
    """GB/s, and the share of the copy's that was measured in the same way."""
    made = []
    for set_name, contestants in result.items():
        rows, notes = [], []
        for name, own in contestants.items():
            cells = []
            for how in ("graph", "launched"):
                if how in own and how in contestants["copy"]:
                    own_rate, copied = (x["bytes"] / x[how] for x in (own, contestants["copy"]))
                    cells += [f"{own[how] * 1e6:,.1f}", f"{own_rate / 1e9:,.0f}", f"{own_rate / copied:.0%}"]
                else:
                    cells += ["", "", ""]
            rows.append([name, *cells])
            if "no graph" in own:
                notes.append(f"No graph of {name}: {own['no graph']}\n")
        made.append(f"### {set_name}\n")
        of = ("µs", "GB/s", "of the copy")
        made.append(table(["", *(f"{x}, graph" for x in of), *(f"{x}, launched" for x in of)], rows))
        made += notes
    return "\n".join(made)


def launches_table(result):
    rows = [[f"{set_name}: {name}", str(n)] for set_name, own in result.items() for name, n in own.items()]
    return table(["", "kernels a step"], rows)


def tensorflow_table(result):
    rows = [
        [name, f"`{own['not run']}`", "", ""]
        if "not run" in own
        else [name, f"{own['ms']:.3f}", f"{own['first']:.1f}", str(own["kernels"] or "no GPU traced")]
        for name, own in result.items()
    ]
    headings = ["", "ms", "first step, s", "kernels of a step, in TensorFlow's trace"]
    return "An update of ResNet-50's variables.\n\n" + table(headings, rows)


PAGES = {"bench": bench_tables, "launches": launches_table, "tensorflow": tensorflow_table}


def main(arguments=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--on-cpu", action="store_true", help="a rehearsal without a GPU")
    parser.add_argument("--out", type=Path, help="the folder; docs, or build/gpu-report with --on-cpu")
    parser.add_argument(
        "--again", nargs="*", choices=PARTS, default=[], help="parts to run even if they are there"
    )
    parser.add_argument("--page", action="store_true", help="only write the page, from the JSON")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    parser.add_argument("--to", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--key", help=argparse.SUPPRESS)
    parser.add_argument("--made", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.part:
        at = Setting(options.on_cpu, options.key, options.made)
        return as_child(options.part, at, options.to)
    out = (options.out or (BUILD if options.on_cpu else DOCS)).resolve()
    if options.on_cpu and out == DOCS:
        parser.error("a rehearsal is not written into docs: give another --out")
    if options.page:
        write(out / "gpu-report.md", page(read(out / "gpu-report.json")))
        return 0
    if not options.on_cpu:
        try:
            cuda_kernels.check_that_they_can_run()
        except cuda_kernels.CannotRunError as problem:
            print(f"The kernels cannot run: {problem}. `--on-cpu` needs only a C++ compiler", file=sys.stderr)
            return 2
    return 1 if run(out, options.on_cpu, options.again) else 0


if __name__ == "__main__":
    sys.exit(main())
