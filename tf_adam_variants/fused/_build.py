"""Compile the fused kernels with this machine's C++ compiler, for the TensorFlow that is installed."""

from __future__ import annotations

import datetime
import hashlib
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import tensorflow as tf

from tf_adam_variants.fused import _cache, _library

_ALL = ["-fPIC", "-fvisibility=hidden"]
_PLAIN = ["-std=c++17", *_ALL]
_LOOPS = ["-O3", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast", "-fopenmp-simd"]
_LINK = ["-shared", "-Wl,--no-undefined"]
# CUDA's runtime is static, hidden, and comes before TensorFlow, which exports functions of the same names.
_CUDA_LINK = ["-shared", "-cudart", "none", "-nodlink", "-Xlinker", "--no-undefined,--exclude-libs=ALL"]
_CUDA_RUNTIME = ["-lcudart_static", "-lrt", "-lpthread", "-ldl"]
CUDA_ARCHITECTURES = ("80", "90")
_OLDEST_CUDA = (11, 8)
_TRY = (
    "import sys, tensorflow as tf; o = tf.load_op_library(sys.argv[1]); [getattr(o, n) for n in sys.argv[2:]]"
)


class BuildError(RuntimeError):
    """The fused kernels cannot be built. The message says why."""


def compiler() -> list[str]:
    """The command of the C++ compiler: $CXX, else the first of c++, g++ and clang++ on the PATH."""
    wanted = os.environ.get("CXX", "").split()
    for command in [wanted] if wanted else [["c++"], ["g++"], ["clang++"]]:
        if path := shutil.which(command[0]):
            return [path, *command[1:]]
    where = f"CXX={' '.join(wanted)} is not on the PATH" if wanted else "no c++, g++ or clang++ on the PATH"
    raise BuildError(f"A C++ compiler is needed: {where}. Install one or set CXX to one")


class Cuda(NamedTuple):
    """How the kernels for GPUs are compiled."""

    nvcc: list[str]
    version: str
    architectures: tuple[str, ...]

    def __str__(self) -> str:
        return f"{', '.join(self.architectures)} and PTX of {self.architectures[-1]}, by {self.version}"

    @property
    def flags(self) -> list[str]:
        """Flags for machine code of each architecture, and for PTX, which later GPUs compile."""
        codes = [f"arch=compute_{a},code=sm_{a}" for a in self.architectures]
        newest = self.architectures[-1]
        codes.append(f"arch=compute_{newest},code=compute_{newest}")
        gencodes = [flag for code in codes for flag in ("-gencode", code)]
        return ["-std=c++17", "-O3", *gencodes, "-Xcompiler", ",".join(_ALL)]


def cuda_compiler(command: Sequence[str], architectures: Sequence[str] = CUDA_ARCHITECTURES) -> Cuda | str:
    """Find out how to compile kernels for these architectures, or why that is not possible.

    Args:
        command: the C++ compiler, which nvcc needs for host code.
        architectures: compute capabilities without the dot.
    """
    home = next(
        (f"{name}={os.environ[name]}" for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)), ""
    )
    candidates = [f"{home.partition('=')[2]}/bin/nvcc"] if home else ["nvcc", "/usr/local/cuda/bin/nvcc"]
    nvcc = next(filter(None, map(shutil.which, candidates)), None)
    if nvcc is None:
        return f"{home} has no bin/nvcc" if home else "no nvcc on the PATH or in /usr/local/cuda/bin"
    try:
        output = _run([nvcc, "--version"])
    except BuildError as error:
        return f"{nvcc} does not run: {error}"
    release = re.search(r"release (\d+)\.(\d+)", output)
    if release is None or (int(release[1]), int(release[2])) < _OLDEST_CUDA:
        oldest = ".".join(map(str, _OLDEST_CUDA))
        return f"CUDA {oldest} or later is needed; {nvcc} is {(output.splitlines() or ['of no release'])[-1]}"
    host = ["-ccbin", command[0]] if len(command) == 1 else []
    ordered = sorted(set(architectures), key=int)
    return Cuda([nvcc, *host], f"nvcc {release[1]}.{release[2]}", tuple(ordered))


def version(command: Sequence[str]) -> str:
    """The first line of what a compiler prints for --version."""
    return _run([*command, "--version"]).partition("\n")[0]


def build(force: bool = False, cuda: bool = True, architectures: Sequence[str] = ()) -> Path:
    """Build the library into the cache, unless it is there, and print the progress.

    Args:
        force: whether to build it even if it is there.
        cuda: whether to compile the kernels for GPUs too, where there is nvcc.
        architectures: the GPUs to build for, as compute capabilities without the dot. If they are given, a
            build without kernels for GPUs is an error.

    Returns:
        The folder of the library.

    Raises:
        BuildError: there is no compiler, no nvcc where there are architectures, a compiler failed, or the
            library cannot be loaded.
    """
    begin = time.monotonic()

    def report(text: str) -> None:
        print(f"{time.monotonic() - begin:6.1f} s  {text}", flush=True)

    plan = _make_plan(cuda, architectures)
    sources = _library.hash_sources()
    folder = _cache.folder_of(plan.hash_with(sources))
    if not force and _cache.is_usable(folder):
        os.utime(folder)  # the newest is the one that is used
        print(f"Already built: {folder / _library.NAME} (--force builds it anew)")
        return folder

    print(
        f"TensorFlow {tf.__version__}, {plan.compiler}, kernels for GPUs: {plan.cuda}, "
        f"sources in {_library.sources()}",
        flush=True,
    )
    with _make_scratch() as scratch:
        built = Path(scratch, "built")
        built.mkdir()
        objects = _compile(plan.units, Path(scratch), report)
        if _library.hash_sources() != sources:
            raise BuildError(f"The sources in {_library.sources()} have changed while they were compiled")
        library = built / _library.NAME
        _run([*plan.link, *objects, *plan.libraries, "-o", str(library)])
        report("linked")
        _run([sys.executable, "-c", _TRY, str(library), *_library.OPS])  # a crash ends only that process
        report("loaded by a new process")
        manifest = _library.Build(
            tensorflow=tf.__version__,
            platform=sysconfig.get_platform(),
            sources=sources,
            sha256=_library.hash_file(library),
            compiler=plan.compiler,
            flags=plan.flags,
            time=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            cuda=plan.cuda,
        )
        (built / "build.json").write_text(json.dumps(manifest._asdict(), indent=2) + "\n")
        _cache.install(built, folder, force)
    report(str(folder / _library.NAME))
    return folder


class _Unit(NamedTuple):
    """A source file and how to compile it."""

    compiler: Sequence[str]
    source: str
    flags: list[str]


class _Plan(NamedTuple):
    """The commands of a build."""

    compiler: str  # its version
    cuda: str  # the architectures of the kernels for GPUs, or why there are none
    units: list[_Unit]
    link: list[str]
    libraries: list[str]

    @property
    def flags(self) -> str:
        """All flags, the same in all virtual environments."""
        commands = [*([unit.source, *unit.flags] for unit in self.units), [*self.link, *self.libraries]]
        flags = "; ".join(shlex.join(words) for words in commands)
        return flags.replace(tf.sysconfig.get_lib(), "TENSORFLOW")

    def hash_with(self, sources: str) -> str:
        """Hash everything that a library of these sources depends on."""
        key = [self.compiler, sysconfig.get_platform(), self.flags, sources]
        return hashlib.sha256("\n".join(key).encode()).hexdigest()


def _make_plan(cuda: bool, architectures: Sequence[str]) -> _Plan:
    command = compiler()
    kernels = cuda_compiler(command, architectures or CUDA_ARCHITECTURES) if cuda else "--no-cuda"
    units, libraries = _units(command), [*tf.sysconfig.get_link_flags()]
    if isinstance(kernels, Cuda):
        return _Plan(
            version(command),
            str(kernels),
            _cuda_units(command, kernels) + units,
            [*kernels.nvcc, *_CUDA_LINK],
            [*_CUDA_RUNTIME, *libraries],
        )
    if architectures:
        raise BuildError(f"Kernels for the GPUs {', '.join(architectures)} cannot be compiled: {kernels}")
    return _Plan(version(command), f"none ({kernels})", units, [*command, *_LINK], libraries)


def _compile(units: Sequence[_Unit], folder: Path, report: Callable[[str], None]) -> list[str]:
    """Compile all units at once. Return the object files."""

    def compile_one(number: int) -> str:
        unit = units[number]
        target = str(folder / f"{number}.o")
        try:
            _run([*unit.compiler, *unit.flags, "-c", str(_library.sources() / unit.source), "-o", target])
        except BuildError as error:
            without = "\n--no-cuda builds without kernels for GPUs" if unit.source.endswith(".cu") else ""
            raise BuildError(f"{error}{without}") from None
        report(" ".join([unit.source, *(flag for flag in unit.flags if flag.startswith("-DTFAV_SET"))]))
        return target

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(compile_one, range(len(units))))


def _units(command: Sequence[str]) -> list[_Unit]:
    """The units for CPUs, the slowest first."""
    levels: dict[str, list[str]] = {"baseline": []}
    if platform.machine() == "x86_64":
        levels = {"baseline": ["-march=x86-64"]}
        probe = [*command, "-march=x86-64-v4", "-fsyntax-only", "-x", "c++", os.devnull]
        if subprocess.run(probe, capture_output=True).returncode == 0:  # not so before GCC 11 and Clang 12
            levels |= {level: [f"-march=x86-64-{level}"] for level in ("v3", "v4")}
    loops = [
        _Unit(command, "loops.cc", [*_PLAIN, *_LOOPS, f"-DTFAV_SET={name}", *march])
        for name, march in levels.items()
    ]
    chosen = ["-DTFAV_X86_LEVELS"] if len(levels) > 1 else []
    return [
        _Unit(command, "cpu_ops.cc", _with_tensorflow()),
        _Unit(command, "ops.cc", _with_tensorflow()),
        *loops,
        _Unit(command, "dispatch.cc", ["-O2", *_PLAIN, *chosen]),
    ]


def _cuda_units(command: Sequence[str], cuda: Cuda) -> list[_Unit]:
    return [
        _Unit(cuda.nvcc, "gpu_sparse.cu", cuda.flags),
        _Unit(cuda.nvcc, "gpu_dense.cu", cuda.flags),
        _Unit(cuda.nvcc, "gpu_coefficients.cu", cuda.flags),
        _Unit(command, "gpu_ops.cc", _with_tensorflow()),
    ]


def _with_tensorflow() -> list[str]:
    # Headers of the system give no warnings.
    flags = [re.sub("^-I", "-isystem", flag) for flag in tf.sysconfig.get_compile_flags()]
    return ["-O3", *_ALL, *flags]


def _run(command: Sequence[str]) -> str:
    process = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    output = process.stdout.decode(errors="replace")
    if process.returncode != 0:
        end = "\n".join(output.splitlines()[-30:])
        raise BuildError(f"Exit status {process.returncode} of\n  {shlex.join(command)}\n{end}")
    return output


def _make_scratch() -> tempfile.TemporaryDirectory[str]:
    try:
        return _cache.make_scratch()
    except ValueError as error:
        raise BuildError(f"What is built there would not be loaded: {error}") from error
    except OSError as error:
        message = f"The cache cannot be written: {error}. Set TF_ADAM_VARIANTS_CACHE to a folder that can be"
        raise BuildError(message) from error
