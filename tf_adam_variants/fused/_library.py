"""The library of the fused kernels: find it, check that it fits, and load it once.

A library is a folder with a shared object and a `build.json` that says how it was built. Nothing is read
before `load()` is called. A library is not loaded if it is damaged, if it was built for another TensorFlow or
from other sources, or if somebody else can write the cache.
"""

from __future__ import annotations

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
    """What build.json says of a library."""

    tensorflow: str
    platform: str
    sources: str
    sha256: str
    compiler: str
    flags: str
    time: str
    cuda: str  # the architectures of its kernels for GPUs, or why it has none


class Found(NamedTuple):
    """The result of a search: a library that is loaded, or the reason why there is none."""

    ops: Any = None
    library: Path | None = None
    build: Build | None = None
    reason: str = ""


def load() -> Any:
    """The module of the fused kernels, or None where no library can be used."""
    return find_library().ops


def reason() -> str:
    """Why `load()` returns None and what to do about it; '' where it does not."""
    return find_library().reason


def gpu_reason() -> str:
    """Why the fused kernels cannot run on the GPUs that TensorFlow uses; '' where they can."""
    # "/physical_device:GPU:1" is CUDA's number 1, also where TensorFlow is shown no other.
    devices = [int(device.name.rpartition(":")[2]) for device in tf.config.get_visible_devices("GPU")]
    if not devices and tf.config.list_physical_devices("GPU"):
        return "TensorFlow is shown no GPU"
    return _gpu_reason(tuple(devices or [0]))


@functools.cache
def _gpu_reason(devices: tuple[int, ...]) -> str:
    """Why the fused kernels cannot run on these CUDA devices. Asking a device takes some of its memory."""
    _, library, build, reason = find_library()
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


def find_library() -> Found:
    """Find and load the library of this process. The first call searches."""
    with _lock:
        return _search()


def sources() -> Path:
    """The folder of the C++ sources: a wheel has them inside the package, a checkout next to it."""
    inside = _HERE / "custom_ops"
    return inside if inside.is_dir() else _HERE.parents[1] / "custom_ops"


def hash_sources() -> str:
    """Hash the C++ sources."""
    digest = hashlib.sha256()
    for file in sorted(sources().iterdir()):
        if file.suffix in (".h", ".cc", ".cu"):
            contents = file.read_bytes()
            digest.update(f"{file.name} {len(contents)}\n".encode() + contents)
    return digest.hexdigest()


def hash_file(path: Path) -> str:
    """Hash a file's contents."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def cache() -> Path:
    """The folder with the libraries that were built on this machine, a subfolder each."""
    if chosen := os.environ.get("TF_ADAM_VARIANTS_CACHE"):
        return Path(chosen).expanduser().absolute()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").absolute() / "tf_adam_variants"


def check_nobody_else_writes(path: Path) -> None:
    """Raise a ValueError where somebody but this user and root can write a folder."""
    status, user = path.stat(), os.geteuid()
    if status.st_uid not in (0, user):
        raise ValueError(
            f"{path} belongs to user {status.st_uid}, and this is user {user}. Set TF_ADAM_VARIANTS_CACHE "
            "to a folder of your own, and build there"
        )
    mode = stat.S_IMODE(status.st_mode)
    if mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise ValueError(f"others may write {path} (mode {mode:o}). `chmod go-w {path}` ends that")


def load_manifest(folder: Path) -> Build:
    """Load the description of the library in this folder. ValueError unless the library fits and is whole."""
    try:
        build = Build(**json.loads((folder / "build.json").read_text()))
        if build.tensorflow != tf.__version__:
            raise ValueError(f"it was built for TensorFlow {build.tensorflow}; this is {tf.__version__}")
        if build.platform != sysconfig.get_platform():
            raise ValueError(f"it was built for {build.platform}; this is {sysconfig.get_platform()}")
        if build.sources != hash_sources():
            raise ValueError(f"it was built from other sources than those in {sources()}")
        if build.sha256 != hash_file(folder / NAME):  # to load a file that is cut off crashes the process
            raise ValueError("it is not the file that was built: cut off or overwritten")
    except (OSError, TypeError, json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"it cannot be read or its build.json is malformed ({error})") from error
    return build


@functools.cache
def _search() -> Found:
    command = "`python -m tf_adam_variants.fused build"
    problems = []
    try:
        for folder in _list_folders():
            try:
                if folder != _HERE / "lib":  # who can write a wheel's folder can write this file, too
                    check_nobody_else_writes(cache())
                build = load_manifest(folder)
                return Found(_open(folder / NAME), folder / NAME, build)
            except Exception as error:  # training continues without the library, whatever is wrong with it
                problems.append(
                    f"The compiled op in {folder} cannot be used: {error}. {command} --force` builds it anew."
                )
        nothing = f"The compiled op is not built: there is none in {cache()}. {command}` builds it."
    except Exception as error:
        nothing = f"The compiled op cannot be searched for: {error}. {command}` builds it."
    return Found(reason=(problems or [nothing])[0])


def _list_folders() -> list[Path]:
    """The wheel's library folder, then those in the cache: this TensorFlow's first, the newest first."""

    def rank(folder: Path) -> tuple[bool, float]:
        return folder.name.startswith(f"tf{tf.__version__}-"), folder.stat().st_mtime

    folders = [folder for folder in cache().glob("tf*") if folder.is_dir()]  # not a link to nowhere
    own = [_HERE / "lib"] if (_HERE / "lib").is_dir() else []
    return own + sorted(folders, key=rank, reverse=True)


def _open(library: Path) -> Any:
    ops = tf.load_op_library(str(library))
    if missing := [name for name in OPS if not hasattr(ops, name)]:
        raise ValueError(f"it lacks {', '.join(missing)}")
    return ops
