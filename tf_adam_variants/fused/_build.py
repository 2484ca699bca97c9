"""Compile the library with this machine's C++ compiler, for the TensorFlow that is installed."""

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
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import tensorflow as tf

from tf_adam_variants.fused import _library

_ALL = ["-fPIC", "-fvisibility=hidden"]
_PLAIN = ["-std=c++17", *_ALL]
_LOOPS = ["-O3", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast", "-fopenmp-simd"]
_LINK = ["-shared", "-Wl,--no-undefined"]
_TRY = (
    "import sys, tensorflow as tf; o = tf.load_op_library(sys.argv[1]); [getattr(o, n) for n in sys.argv[2:]]"
)


class BuildError(RuntimeError):
    """The library cannot be built. The message says why."""


def compiler() -> list[str]:
    """The command of the C++ compiler: $CXX, else the first of c++, g++ and clang++ on the PATH."""
    wanted = os.environ.get("CXX", "").split()
    for command in [wanted] if wanted else [["c++"], ["g++"], ["clang++"]]:
        if path := shutil.which(command[0]):
            return [path, *command[1:]]
    where = f"CXX={' '.join(wanted)} is not on the PATH" if wanted else "no c++, g++ or clang++ on the PATH"
    raise BuildError(f"A C++ compiler is needed: {where}. Install one or set CXX to one")


def version(command: Sequence[str]) -> str:
    """How a compiler introduces itself."""
    return _run([*command, "--version"]).partition("\n")[0]


def build(force: bool = False) -> Path:
    """Build the library into the cache, unless it is there, and say on stdout what is done.

    Args:
        force: whether to build it even if it is there.

    Returns:
        Its folder.

    Raises:
        BuildError: there is no compiler, it failed, or what it made cannot be loaded.
    """
    begin = time.monotonic()

    def say(text: str) -> None:
        print(f"{time.monotonic() - begin:6.1f} s  {text}", flush=True)

    command = compiler()
    built_by = version(command)
    units = _units(command)
    flags = "; ".join(shlex.join(unit) for unit in [*units, _LINK])
    flags = flags.replace(tf.sysconfig.get_lib(), "TENSORFLOW")  # virtual environments share a library
    sources = _library.source_hash()
    key = hashlib.sha256("\n".join([built_by, sysconfig.get_platform(), flags, sources]).encode()).hexdigest()
    folder = _library.cache() / f"tf{tf.__version__}-{key[:16]}"
    if not force and _fits(folder):
        print(f"Already built: {folder / _library.NAME} (--force builds it anew)")
        return folder

    print(f"TensorFlow {tf.__version__}, {built_by}, sources in {_library.sources()}", flush=True)
    with _scratch() as scratch:
        made = Path(scratch, "made")
        made.mkdir()

        def compile_one(number: int) -> str:
            source, *own = units[number]
            target = str(Path(scratch, f"{number}.o"))
            _run([*command, *own, "-c", str(_library.sources() / source), "-o", target])
            say(" ".join([source, *(flag for flag in own if flag.startswith("-DTFAV_SET"))]))
            return target

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = list(pool.map(compile_one, range(len(units))))
        if _library.source_hash() != sources:
            raise BuildError(f"The sources in {_library.sources()} have changed while they were compiled")
        library = made / _library.NAME
        _run([*command, *_LINK, *objects, *tf.sysconfig.get_link_flags(), "-o", str(library)])
        say("linked")
        _run([sys.executable, "-c", _TRY, str(library), *_library.OPS])  # it may crash, and not this process
        say("loaded by a new process")
        size, digest = _library.fingerprint(library)
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        description = _library.Build(
            tf.__version__, sysconfig.get_platform(), sources, size, digest, built_by, flags, now
        )
        (made / "build.json").write_text(json.dumps(description._asdict(), indent=2) + "\n")
        _put(made, folder, force)
    say(str(folder / _library.NAME))
    return folder


def _units(command: Sequence[str]) -> list[list[str]]:
    """What is compiled: a source and its flags. The slowest first."""
    levels: dict[str, list[str]] = {"baseline": []}
    if platform.machine() == "x86_64":
        levels = {"baseline": ["-march=x86-64"]}
        probe = [*command, "-march=x86-64-v4", "-fsyntax-only", "-x", "c++", os.devnull]
        if subprocess.run(probe, capture_output=True).returncode == 0:  # not so before GCC 11 and Clang 12
            levels |= {level: [f"-march=x86-64-{level}"] for level in ("v3", "v4")}
    # Headers of the system give no warnings.
    tensorflow = [re.sub("^-I", "-isystem", flag) for flag in tf.sysconfig.get_compile_flags()]
    return [
        ["step_ops.cc", "-O3", *_ALL, *tensorflow],
        *(["loops.cc", *_PLAIN, *_LOOPS, f"-DTFAV_SET={name}", *march] for name, march in levels.items()),
        ["dispatch.cc", "-O2", *_PLAIN, *(["-DTFAV_X86_LEVELS"] if len(levels) > 1 else [])],
    ]


def _run(command: Sequence[str]) -> str:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    output = done.stdout.decode(errors="replace")
    if done.returncode != 0:
        end = "\n".join(output.splitlines()[-30:])
        raise BuildError(f"Exit status {done.returncode} of\n  {shlex.join(command)}\n{end}")
    return output


def _scratch() -> tempfile.TemporaryDirectory[str]:
    """A folder beside the library's, so that it can be renamed into place."""
    cache = _library.cache()
    try:
        cache.mkdir(parents=True, exist_ok=True)
        return tempfile.TemporaryDirectory(dir=cache, prefix=".building-")
    except OSError as error:
        message = f"The cache cannot be written: {error}. Set TF_ADAM_VARIANTS_CACHE to a folder that can be"
        raise BuildError(message) from error


def _put(made: Path, folder: Path, force: bool) -> None:
    """Rename `made` to `folder`, unless another process was faster."""
    while True:
        try:
            made.rename(folder)
            return
        except OSError:
            if not folder.exists():
                raise
        if not force and _fits(folder):
            return
        # What is there goes the way of the scratch. Somebody else may take it away, or put another there.
        try:
            folder.rename(tempfile.mkdtemp(dir=made.parent))
        except FileNotFoundError:
            continue


def _fits(folder: Path) -> bool:
    try:
        _library.checked(folder)
    except ValueError:
        return False
    return True
