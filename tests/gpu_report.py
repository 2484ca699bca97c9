"""What the compiled op does on a GPU, as one JSON file and one page: `make gpu-report`.

    python tests/gpu_report.py            # wants a GPU, nvcc, NumPy and PyTorch; for the last part TensorFlow
    python tests/gpu_report.py --on-cpu   # a rehearsal: the kernels compiled for a CPU, small sets
    python tests/gpu_report.py --page     # the page anew, from the JSON alone

The parts, each in a process of its own: what there is (environment), whether the kernels are right (check),
also under compute-sanitizer (sanitize), how fast they are alone (bench) and under TensorFlow (tensorflow). A
part's result is written when it ends. One that is there for the same sources is not run again (--again PART
does), and one that fails leaves its error and the others go on. Each has a limit of time; all together are
below ten minutes.
"""

import argparse
import datetime
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import cuda_bench
import cuda_kernels

TESTS = Path(__file__).resolve().parent
ON_CPU = TESTS / "cuda_on_cpu"
ROOT = TESTS.parent
PARTS = {"environment": 30, "check": 150, "sanitize": 180, "bench": 150, "tensorflow": 85}  # seconds at most
SANITIZERS = ("memcheck", "racecheck", "initcheck")
NOT_MEASURED = "not measured yet"

# An H100 SXM. The bandwidth is NVIDIA's figure; that a copy reaches 90 % of it is an assumption.
NOMINAL, COPY_SHARE = 3.35e12, 0.9
AIMS = {"AdamW": 0.9, "QHAdamW": 0.9, "LAMB": 0.85}  # of a copy's bandwidth


# -- the parts: each returns what goes into the JSON ------------------------------------------------------


def output_of(*command, timeout=20):
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout)
    if done.returncode:
        raise RuntimeError(f"exit status {done.returncode}: {(done.stdout + done.stderr)[-2000:]}")
    return done.stdout


def environment(on_cpu):
    found = {"system": platform.platform(), "python": platform.python_version(), "on_cpu": on_cpu}
    for name, command in {
        "nvcc": [cuda_kernels.nvcc() or "nvcc", "--version"],
        "gpu": ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"],
    }.items():
        try:
            found[name] = output_of(*command).strip().splitlines()[-1 if name == "nvcc" else 0]
        except (OSError, RuntimeError) as error:
            found[name] = f"none ({str(error).splitlines()[0]})"
    for module in ("torch", "cupy", "tensorflow", "keras"):
        there = importlib.util.find_spec(module)
        found[module] = importlib.metadata.version(module) if there else "not installed"
    return found


def check(on_cpu):
    how = ["--on-cpu", "--quick", "--without", "dense", "sparse"] if on_cpu else []
    printed = output_of(sys.executable, TESTS / "cuda_kernels.py", "check", *how, timeout=PARTS["check"])
    return {"passed": [line for line in printed.splitlines() if line.startswith("ok")]}


def sanitize(on_cpu):
    if on_cpu:
        return {"not run": "`make sanitize-cuda` is the form for a CPU"}
    if not shutil.which("compute-sanitizer"):
        return {"not run": "no compute-sanitizer on the PATH"}
    os.environ["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
    with tempfile.TemporaryDirectory() as folder:
        library, results = cuda_kernels.build(folder), {}
        for tool in SANITIZERS:
            say(tool)
            results[tool] = sanitized(tool, library)
            keep(results)
        return results


def sanitized(tool, library):
    program = [sys.executable, TESTS / "cuda_kernels.py", "check", "--quick", "--library", library]
    command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "1", *program]
    done = subprocess.run(
        [*command, "--without", "huge", "many_chunks"],
        capture_output=True,
        text=True,
        timeout=PARTS["sanitize"],
    )
    return "no error" if done.returncode == 0 else (done.stdout + done.stderr)[-2000:]


def bench(on_cpu):
    memory = cuda_kernels.OnCpu() if on_cpu else cuda_kernels.WithTorch()
    with tempfile.TemporaryDirectory() as folder:
        kernels = cuda_kernels.Kernels(cuda_kernels.build(folder, on_cpu))
        return cuda_bench.bench(kernels, memory, 3 if on_cpu else 11, say, keep)


def tensorflow(on_cpu):
    """Milliseconds of an update of ResNet-50's variables, and how many kernels a step launches."""
    if not importlib.util.find_spec("tensorflow"):
        return {"not run": "TensorFlow is not installed"}
    sys.path[:0] = [str(ROOT), str(ROOT / "examples")]
    import shapes
    import tensorflow as tf

    from tf_adam_variants import fused

    if not on_cpu and not tf.config.list_physical_devices("GPU"):
        return {"not run": "TensorFlow sees no GPU"}
    if not fused.is_available():
        return {"not run": fused._library.reason()}
    if not on_cpu and fused._library.gpu_reason():
        return {"not run": fused._library.gpu_reason()}
    contestants = update_contestants([(8, 8), (8,)] if on_cpu else shapes.resnet50())
    times = {name: [] for name in contestants}
    for name, step in contestants.items():
        say(name)
        step()
    for _ in range(2 if on_cpu else 15):
        for name, step in contestants.items():
            step()
            times[name].append(timed(tf, step, 2 if on_cpu else 10))
    results = {name: {"ms": 1e3 * sorted(own)[len(own) // 2]} for name, own in times.items()}
    for name, step in contestants.items():
        results[name]["kernels"] = kernels_of(tf, step)
    return results


def timed(tf, step, count):
    tf.test.experimental.sync_devices()
    begin = time.perf_counter()
    for _ in range(count):
        step()
    tf.test.experimental.sync_devices()
    return (time.perf_counter() - begin) / count


def update_contestants(set_shapes):
    """Steps of an update alone, by name. Split: XLA yields the gradients, and the op takes the step."""
    import keras
    import tensorflow as tf

    import tf_adam_variants as tav

    makers = {
        "Keras AdamW, XLA": (keras.optimizers.AdamW, {}, "xla"),
        "AdamW, pure, XLA": (tav.AdamW, {"fused": False}, "xla"),
        "AdamW, fused, eager": (tav.AdamW, {"fused": True}, "eager"),
        "AdamW, fused, graph": (tav.AdamW, {"fused": True}, "graph"),
        "AdamW, fused, split": (tav.AdamW, {"fused": True}, "split"),
        "Keras Lamb, XLA": (keras.optimizers.Lamb, {}, "xla"),
        "LAMB, pure, XLA": (tav.LAMB, {"fused": False}, "xla"),
        "LAMB, fused, graph": (tav.LAMB, {"fused": True}, "graph"),
    }

    def contestant(optimizer, mode):
        variables = [keras.Variable(tf.random.normal(shape)) for shape in set_shapes]
        gradients = [tf.random.normal(shape) for shape in set_shapes]
        optimizer.build(variables)

        @tf.function(jit_compile=True)
        def by_xla():
            return [2.0 * g for g in gradients]

        def step():
            optimizer.apply(by_xla() if mode == "split" else gradients, variables)

        return step if mode == "eager" else tf.function(step, jit_compile=mode == "xla")

    return {
        name: contestant(cls(1e-3, weight_decay=0.01, **options), mode)
        for name, (cls, options, mode) in makers.items()
    }


def kernels_of(tf, step):
    """How many kernels a step launches on GPUs, by a trace of TensorFlow's profiler."""
    from tensorflow.tsl.profiler.protobuf import xplane_pb2  # private, but the only reader that ships with it

    with tempfile.TemporaryDirectory() as folder:
        with tf.profiler.experimental.Profile(folder):
            step()
            tf.test.experimental.sync_devices()
        (trace,) = Path(folder).rglob("*.xplane.pb")
        space = xplane_pb2.XSpace.FromString(trace.read_bytes())
    planes = [plane for plane in space.planes if plane.name.startswith("/device:GPU")]
    return sum(len(line.events) for plane in planes for line in plane.lines if line.name.startswith("Stream"))


# -- running them --------------------------------------------------------------------------------------------


def say(text):
    print(f"    {text}", file=sys.stderr, flush=True)


def keep(results):
    """Leave what there is of a part, should its time end."""
    print(json.dumps(results), flush=True)


def key(on_cpu):
    """A hash of all that a result depends on: the sources and the device."""
    files = [*(ROOT / "custom_ops").glob("*.*"), *(ROOT / "tf_adam_variants").rglob("*.py")]
    files += [
        *TESTS.glob("cuda_*.py"),
        *ON_CPU.glob("*.h"),
        TESTS / "oracle.py",
        ROOT / "examples" / "shapes.py",
    ]
    digest = hashlib.sha256()
    for file in sorted([*files, Path(__file__)]):
        digest.update(file.read_bytes())
    device = "a CPU" if on_cpu else output_of("nvidia-smi", "-L")
    return hashlib.sha256(device.encode() + digest.digest()).hexdigest()


def run_part(name, on_cpu):
    """The record of one part, run in a process of its own, whose children end with it."""
    begin = time.monotonic()
    command = [sys.executable, __file__, "--part", name, *(["--on-cpu"] if on_cpu else [])]
    record = {"key": key(on_cpu)}
    with tempfile.TemporaryFile("w+") as printed:
        part = subprocess.Popen(command, stdout=printed, start_new_session=True)
        try:
            status = part.wait(PARTS[name])
            error = f"exit status {status}" if status else None
        except subprocess.TimeoutExpired:
            error = f"not done after {PARTS[name]} s"
            os.killpg(part.pid, signal.SIGKILL)
            part.wait()
        printed.seek(0)
        lines = printed.read().splitlines()
    results = [line for line in lines if line.startswith("{")]
    if results:
        record["result"] = json.loads(results[-1])
    if error:
        last = lines[-1] if lines and not lines[-1].startswith("{") else ""
        record["error"] = f"{error}. {last}".removesuffix(". ")
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    return record | {"ended": now, "seconds": round(time.monotonic() - begin, 1)}


def as_child(name, on_cpu):
    """Run a part in this process; the last line printed is its result, or its error."""
    try:
        print(json.dumps(globals()[name](on_cpu)))
    except Exception as error:
        print(f"{type(error).__name__}: {' '.join(str(error).split())[-1500:]}")
        return 1
    return 0


def write(path, text):
    """All of it or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(".part")
    beside.write_text(text)
    os.replace(beside, path)


def run(out, on_cpu, again):
    """Run the parts that are missing. The number of those that failed."""
    numbers, page_file = out / "gpu-report.json", out / "gpu-report.md"
    report = json.loads(numbers.read_text()) if numbers.exists() else {}
    for name in PARTS:
        known = report.get(name, {})
        if "result" in known and "error" not in known and known["key"] == key(on_cpu) and name not in again:
            print(f"{name}: there already")
            continue
        print(f"{name} ...", flush=True)
        report[name] = run_part(name, on_cpu)
        print(f"{name}: {report[name].get('error', 'done')} ({report[name]['seconds']} s)", flush=True)
        write(numbers, json.dumps(report, indent=1) + "\n")
        write(page_file, page(report))
    write(page_file, page(report))
    print(page_file)
    return sum("error" in report[name] for name in PARTS)


# -- the page ------------------------------------------------------------------------------------------------


def table(headings, rows):
    lines = ["| " + " | ".join(headings) + " |", "| --- |" + " ---: |" * (len(headings) - 1)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)]) + "\n"


def on_paper():
    """For each set and rule: bytes, launches, and microseconds at a copy's bandwidth and at the aim."""
    found = {}
    for set_name, sizes in cuda_bench.SETS.items():
        for kept in cuda_bench.DENSE[:3]:
            moved = kept.bytes * sum(sizes)
            launches = kept.launches * -(-len(sizes) // cuda_bench.VARIABLES_A_LAUNCH)
            least = moved / (NOMINAL * COPY_SHARE)
            found[set_name, kept.name] = moved, launches, least, least / AIMS[kept.name]
    return found


def page(report):
    """The page of docs/, from the JSON alone."""
    results = {name: record["result"] for name, record in report.items() if "result" in record}
    measured = results.get("bench", {})
    rehearsal = results.get("environment", {}).get("on_cpu", False)
    parts = ["# The compiled op on a GPU\n", "`make gpu-report` writes this page. Do not edit it.\n"]
    if rehearsal:
        parts.append("**A rehearsal on a CPU: no figure on this page says anything about a GPU.**\n")
    parts.append("## On paper, and measured\n")
    aims = f"{AIMS['AdamW']:.0%} of a copy's bandwidth for AdamW and QHAdamW (28 bytes a parameter) and "
    aims += f"{AIMS['LAMB']:.0%} for LAMB (40)"
    parts.append(
        f"Float32 on an H100 SXM, whose memory moves {NOMINAL / 1e12:.2f} TB/s by NVIDIA's figure, of which "
        f"a copy is assumed to reach {COPY_SHARE:.0%}. The aim is {aims}. Small sets fit into the cache of "
        "50 MB and are bound by their launches, some microseconds each, instead.\n"
    )
    rows = []
    for (set_name, rule), (moved, launches, least, aim) in on_paper().items():
        own = measured.get(set_name, {}).get(rule)
        seconds = own and own.get("graph", own["launched"])
        shown = f"{seconds * 1e6:,.0f}" if own else NOT_MEASURED
        micro = [f"{value * 1e6:,.0f}" if value >= 1e-5 else f"{value * 1e6:.1f}" for value in (least, aim)]
        rows.append([f"{set_name}, {rule}", f"{moved / 1e6:,.0f}", str(launches), *micro, shown])
    parts.append(table(["", "MB", "launches", "µs as a copy", "µs at the aim", "µs measured"], rows))
    kinds = "; ".join(f"{kept.name}: {kept.bytes}" for kept in cuda_bench.DENSE)
    parts.append(
        f"Bytes a parameter: {kinds}. By rows: 24 bytes for each element of a row that is named (lazy) or of "
        "all (exact), and 4 for each value.\n"
    )
    for name in PARTS:
        parts.append(f"## {name.capitalize()}\n")
        record = report.get(name)
        if record is None:
            parts.append(f"{NOT_MEASURED.capitalize()}.\n")
            continue
        if "error" in record:
            parts.append(f"Failed: `{record['error']}`\n")
        if "result" in record:
            parts.append(PAGES[name](record["result"]))
    return "\n".join(parts)


def listed(result):
    return "\n".join(f"- {name}: {value}" for name, value in result.items()) + "\n"


def checks_listed(result):
    return "\n".join(f"- {line}" for line in result["passed"]) + "\n"


def bench_tables(result):
    """GB/s, and the share of a copy's on the same device."""
    made = []
    for set_name, contestants in result.items():
        rows = []
        for name, own in contestants.items():
            cells = []
            for how in ("graph", "launched"):
                if how in own:
                    rate, copied = (x["bytes"] / x[how] for x in (own, contestants["copy"]))
                    cells += [f"{own[how] * 1e6:,.1f}", f"{rate / 1e9:,.0f}", f"{rate / copied:.0%}"]
                else:
                    cells += ["", "", ""]
            rows.append([name, *cells])
        made.append(f"### {set_name}\n")
        of = ("µs", "GB/s", "of the copy")
        made.append(table(["", *(f"{x}, graph" for x in of), *(f"{x}, launched" for x in of)], rows))
    return "\n".join(made)


def tensorflow_table(result):
    if "not run" in result:
        return listed(result)
    rows = [[name, f"{own['ms']:.3f}", str(own["kernels"])] for name, own in result.items()]
    return "An update of ResNet-50's variables.\n\n" + table(["", "ms", "kernels launched"], rows)


PAGES = {
    "environment": listed,
    "check": checks_listed,
    "sanitize": listed,
    "bench": bench_tables,
    "tensorflow": tensorflow_table,
}


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
    options = parser.parse_args(arguments)
    out = options.out or (ROOT / "build" / "gpu-report" if options.on_cpu else ROOT / "docs")
    if options.on_cpu and out.resolve() == ROOT / "docs":
        parser.error("a rehearsal is not written into docs")
    if options.page:
        numbers = out / "gpu-report.json"
        write(out / "gpu-report.md", page(json.loads(numbers.read_text()) if numbers.exists() else {}))
        return 0
    if options.part:
        return as_child(options.part, options.on_cpu)
    if not options.on_cpu:
        try:
            cuda_kernels.check_that_they_can_run()
        except cuda_kernels.CannotRunError as problem:
            print(f"The kernels cannot run: {problem}. `--on-cpu` needs only a C++ compiler", file=sys.stderr)
            return 2
    return 1 if run(out, options.on_cpu, options.again) else 0


if __name__ == "__main__":
    sys.exit(main())
