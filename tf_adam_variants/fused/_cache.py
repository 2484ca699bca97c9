"""The cache of libraries: a new one is put there whole or not at all; those that nothing uses are removed."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
import time
from pathlib import Path

import tensorflow as tf

from tf_adam_variants.fused import _library

UNUSED_DAYS = 30
_LEFT_BEHIND_DAYS = 1
_LIBRARIES = "tf*-" + "[0-9a-f]" * 16
_SCRATCH = ".building-"


def folder_of(key: str) -> Path:
    """Where the library goes that is made for this TensorFlow in the way that this hash is of."""
    return _library.cache() / f"tf{tf.__version__}-{key[:16]}"


def fits(folder: Path) -> bool:
    """Whether the library in this folder can be used."""
    try:
        _library.checked(folder)
    except ValueError:
        return False
    return True


def scratch() -> tempfile.TemporaryDirectory[str]:
    """A folder next to the library's, so that it can be renamed. ValueError where others write the cache."""
    cache = _library.cache()
    cache.parent.mkdir(parents=True, exist_ok=True)
    cache.mkdir(mode=0o755, exist_ok=True)
    _library.check_nobody_else_writes(cache)
    return tempfile.TemporaryDirectory(dir=cache, prefix=_SCRATCH)


def put(made: Path, folder: Path, force: bool) -> None:
    """Rename `made`, in a scratch folder, to `folder`, unless another process was faster."""
    for path in (made, *made.iterdir()):
        path.chmod(path.stat().st_mode & ~0o022)  # whatever the umask
    while True:
        try:
            made.rename(folder)
            return
        except OSError:
            if not folder.exists():
                raise
        if not force and fits(folder):
            return
        # What is there is moved into the scratch folder. Another process may remove or replace it meanwhile.
        try:
            folder.rename(tempfile.mkdtemp(dir=made.parent))
        except FileNotFoundError:
            continue


def remove_unused() -> None:
    """Remove libraries that nothing has loaded for long, and what killed builds have left; tell each.

    Other environments and machines may share the cache, with another TensorFlow or another version of this
    package, and nothing says what they have installed. That a library is not loaded does. A process that has
    loaded one keeps it: the file system removes what is mapped when it is mapped no more.
    """
    cache = _library.cache()
    for pattern, days in ((_LIBRARIES, UNUSED_DAYS), (f"{_SCRATCH}*", _LEFT_BEHIND_DAYS)):
        for folder in sorted(cache.glob(pattern)):
            try:
                unused = (time.time() - _last_used(folder)) / (24 * 60 * 60)
                if unused < days or folder.is_symlink():
                    continue
                size = sum(path.lstat().st_size for path in folder.rglob("*"))
                shutil.rmtree(folder)
            except FileNotFoundError:  # another build has ended or was faster
                continue
            except OSError as error:
                print(f"Not removed: {error}")
            else:
                print(f"Removed {folder}: {size / 2**20:.1f} MiB, unused for {unused:.0f} days")


def _last_used(folder: Path) -> float:
    """When its library was built or asked for by `build`, was marked by who loaded it, or was read."""
    times = [folder.stat().st_mtime]
    with contextlib.suppress(FileNotFoundError):
        library = (folder / _library.NAME).stat()
        times += [library.st_mtime, library.st_atime]  # who may not mark it has read it
    return max(times)
