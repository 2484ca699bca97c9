"""The compiled library: where it may be, whether it fits, and loading it once.

A library is a folder with a shared object and a `build.json` that describes how it was made. Nothing is read
before `load()` is called, and nothing is loaded that is damaged, was built for another TensorFlow or from
other sources, or lies in the cache where somebody else can write.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import json
import os
import stat
import sysconfig
import threading
from pathlib import Path
from typing import Any, NamedTuple

import tensorflow as tf

NAME = "tf_adam_variants_ops.so"
OPS = tuple(
    f"tf_adam_variants_{name}" for name in ("dense_step", "sparse_step", "squared_norm", "coefficients")
)

_HERE = Path(__file__).parent
_lock = threading.Lock()


class Build(NamedTuple):
    """What build.json holds."""

    tensorflow: str
    platform: str
    sources: str
    size: int
    sha256: str
    compiler: str
    flags: str
    time: str
    cuda: str  # the architectures of its kernels for GPUs, or why it has none


class Found(NamedTuple):
    """What a search came to: a library that is loaded, or the reason why there is none."""

    ops: Any = None
    library: Path | None = None
    build: Build | None = None
    reason: str = ""


def load() -> Any:
    """The module of the ops, or None where there is no library that can be used."""
    return found().ops


def reason() -> str:
    """Why `load()` returns None and what to do about it; '' where it does not."""
    return found().reason


def gpu_reason() -> str:
    """Why the ops cannot run on the GPUs that TensorFlow uses; '' where they can."""
    # "/physical_device:GPU:1" is CUDA's number 1, also where TensorFlow is shown no other.
    devices = [int(device.name.rpartition(":")[2]) for device in tf.config.get_visible_devices("GPU")]
    if not devices and tf.config.list_physical_devices("GPU"):
        return "TensorFlow is shown no GPU"
    return _gpu_reason(tuple(devices or [0]))


@functools.cache
def _gpu_reason(devices: tuple[int, ...]) -> str:
    """The same of these devices of CUDA. To ask one takes some of its memory: no other is asked."""
    _, library, build, reason = found()
    if library is None or build is None:
        return reason
    functions = ctypes.CDLL(str(library))
    if not hasattr(functions, "tfav_gpu_ready"):
        return (
            f"Of kernels for GPUs, the compiled op has {build.cuda}. Where there is CUDA's nvcc, "
            "`python -m tf_adam_variants.fused build` builds them"
        )
    functions.tfav_gpu_error.restype = ctypes.c_char_p
    for device in devices:
        if error := functions.tfav_gpu_ready(device):
            message = functions.tfav_gpu_error(error).decode()
            return f"CUDA says of GPU {device}: {message}. The op's kernels are for {build.cuda}"
    return ""


def found() -> Found:
    """The library of this process, searched for at the first call."""
    with _lock:
        return _found()


def sources() -> Path:
    """The folder of the C++ sources: a wheel has them inside the package, a checkout next to it."""
    inside = _HERE / "custom_ops"
    return inside if inside.is_dir() else _HERE.parents[1] / "custom_ops"


def source_hash() -> str:
    """A hash of the C++ sources."""
    digest = hashlib.sha256()
    for file in sorted(sources().iterdir()):
        if file.suffix in (".h", ".cc", ".cu"):
            contents = file.read_bytes()
            digest.update(f"{file.name} {len(contents)}\n".encode() + contents)
    return digest.hexdigest()


def fingerprint(library: Path) -> tuple[int, str]:
    """A file's size and hash."""
    contents = library.read_bytes()
    return len(contents), hashlib.sha256(contents).hexdigest()


def cache() -> Path:
    """The folder of the libraries that were built on this machine, each in a folder of its own."""
    if chosen := os.environ.get("TF_ADAM_VARIANTS_CACHE"):
        return Path(chosen).expanduser().absolute()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").absolute() / "tf_adam_variants"


def check_nobody_else_writes(path: Path) -> None:
    """Raise a ValueError where somebody but this user and root may have written a file or folder."""
    found, user = path.stat(), os.geteuid()
    if found.st_uid not in (0, user):
        raise ValueError(
            f"{path} belongs to user {found.st_uid}, and this is user {user}. Set TF_ADAM_VARIANTS_CACHE "
            "to a folder of your own, and build there"
        )
    mode = stat.S_IMODE(found.st_mode)
    if mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise ValueError(f"others may write {path} (mode {mode:o}). `chmod go-w {path}` ends that")


def checked(folder: Path) -> Build:
    """The description of the library in this folder. ValueError unless it fits, is whole, and is the user's.

    It is not asked whose a wheel's own folder is: who can write there can write this file, too.
    """
    try:
        if folder != _HERE / "lib":
            for path in (folder.parent, folder, folder / NAME):
                check_nobody_else_writes(path)
        build = Build(**json.loads((folder / "build.json").read_text()))
        if build.tensorflow != tf.__version__:
            raise ValueError(f"it was built for TensorFlow {build.tensorflow}; this is {tf.__version__}")
        if build.platform != sysconfig.get_platform():
            raise ValueError(f"it was built for {build.platform}; this is {sysconfig.get_platform()}")
        if build.sources != source_hash():
            raise ValueError(f"it was built from other sources than those in {sources()}")
        if fingerprint(folder / NAME) != (
            build.size,
            build.sha256,
        ):  # one that is cut off crashes who loads it
            raise ValueError("it is not the file that was built: cut off or overwritten")
    except (OSError, TypeError, json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"it cannot be read or its build.json is malformed ({error})") from error
    return build


@functools.cache
def _found() -> Found:
    command = "`python -m tf_adam_variants.fused build"
    problems = []
    try:
        for folder in _folders():
            try:
                build = checked(folder)
                ops = _open(folder / NAME)
                if folder != _HERE / "lib":
                    with contextlib.suppress(OSError):  # another user's
                        os.utime(folder / NAME)  # it is in use: `build` leaves it
                return Found(ops, folder / NAME, build)
            except Exception as error:  # whatever is wrong with it, training goes on without
                problems.append(
                    f"The compiled op in {folder} cannot be used: {error}. {command} --force` builds it anew."
                )
        nothing = f"The compiled op is not built: there is none in {cache()}. {command}` builds it."
    except Exception as error:
        nothing = f"The compiled op cannot be searched for: {error}. {command}` builds it."
    return Found(reason=(problems or [nothing])[0])


def _folders() -> list[Path]:
    """Where libraries are: the wheel's own, then those for this TensorFlow in the cache, the newest first."""

    def promise(folder: Path) -> tuple[bool, float]:
        return folder.name.startswith(f"tf{tf.__version__}-"), folder.stat().st_mtime

    folders = [folder for folder in cache().glob("tf*") if folder.is_dir()]  # not a link to nowhere
    own = [_HERE / "lib"] if (_HERE / "lib").is_dir() else []
    return own + sorted(folders, key=promise, reverse=True)


def _open(library: Path) -> Any:
    ops = tf.load_op_library(str(library))
    if missing := [name for name in OPS if not hasattr(ops, name)]:
        raise ValueError(f"it lacks {', '.join(missing)}")
    return ops
