"""The cache of built libraries: a library is put there whole or not at all."""

from __future__ import annotations

import tempfile
from pathlib import Path

import tensorflow as tf

from tf_adam_variants.fused import _library


def folder_of(key: str) -> Path:
    """The folder of the library for this TensorFlow that is built in the way that this hash describes."""
    return _library.cache() / f"tf{tf.__version__}-{key[:16]}"


def is_usable(folder: Path) -> bool:
    """Whether this folder holds a library that can be used."""
    try:
        _library.load_manifest(folder)
    except ValueError:
        return False
    return True


def make_scratch() -> tempfile.TemporaryDirectory[str]:
    """Make a folder in the cache, so that a rename installs it. ValueError where others write the cache."""
    cache = _library.cache()
    cache.parent.mkdir(parents=True, exist_ok=True)
    cache.mkdir(mode=0o755, exist_ok=True)
    _library.check_nobody_else_writes(cache)
    return tempfile.TemporaryDirectory(dir=cache, prefix=".building-")


def install(built: Path, folder: Path, force: bool) -> None:
    """Rename `built`, in a scratch folder, to `folder`, unless another process was faster."""
    for path in (built, *built.iterdir()):
        path.chmod(path.stat().st_mode & ~0o022)  # whatever the umask
    while True:
        try:
            built.rename(folder)
            return
        except OSError:
            if not folder.exists():
                raise
        if not force and is_usable(folder):
            return
        # The scratch folder takes the old one. Another process may remove or replace it meanwhile.
        try:
            folder.rename(tempfile.mkdtemp(dir=built.parent))
        except FileNotFoundError:
            continue
