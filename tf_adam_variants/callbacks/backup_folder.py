"""A folder of backups, of which a kill at any moment leaves one that is whole.

A backup is a folder of two files, and SHA256SUMS with their digests, as the program sha256sum writes and
checks it. It is written beside, forced to the disk and renamed; the one before is kept. Nothing here knows
what is backed up: bytes, and a description of them.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

DESCRIPTION, ARRAYS, DIGESTS = "backup.json", "variables.bin", "SHA256SUMS"
_NAME = re.compile(r"backup-\d{8,}")
_UNFINISHED = ".unfinished"  # being written, or being removed
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class Backup(NamedTuple):
    """A backup that is whole, and those after it that are not: what is wrong with each."""

    path: Path
    description: dict[str, Any]
    damaged: list[str]

    def open(self) -> BinaryIO:
        """The arrays' bytes, one after the other."""
        return open(self.path / ARRAYS, "rb")


class BackupFolder:
    """The backups in a folder, which are numbered. One process at a time may write there."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._before: Path | None = None  # the newest that is known to be whole

    def prepare(self) -> None:
        """Make the folder, and try to write and to read there.

        Raises:
            OSError: where that cannot be done; NotADirectoryError where a file is in the place of a folder.
        """
        in_the_way = next(
            (path for path in (self.folder, *self.folder.parents) if os.path.lexists(path)), None
        )
        if in_the_way is not None and not os.path.isdir(in_the_way):
            raise NotADirectoryError(errno.ENOTDIR, f"{in_the_way} is no folder")
        self._make()
        os.rmdir(tempfile.mkdtemp(_UNFINISHED, "backup-", self.folder))
        self._paths()

    def find_whole(self) -> Backup | None:
        """The newest backup whose digests are right; None where there is none at all.

        Raises:
            OSError: where there are backups, and none of them is whole.
        """
        self._remove_unfinished()
        damaged = []
        for path in reversed(self._paths()):
            try:
                _check(path)
                description = json.loads((path / DESCRIPTION).read_bytes())
            except OSError as error:
                damaged.append(f"{path.name} ({error.strerror or error})")
            else:
                self._before = path
                return Backup(path, description, damaged)
        if damaged:
            raise OSError(
                f"There are backups in {self.folder}, and all of them are damaged: {', '.join(damaged)}. "
                "Bring the folder back from a copy, or remove it to begin the training anew"
            )
        return None

    def write(self, description: dict[str, Any], arrays: Iterable[np.ndarray]) -> None:
        """Add a backup, and remove all but the one before it.

        Raises:
            OSError: that names the folder, where it cannot be written. The one before stays.
        """
        numbers = [int(path.name.removeprefix("backup-")) for path in self._paths()]
        path = self.folder / f"backup-{max(numbers, default=0) + 1:08}"
        unfinished = path.with_name(path.name + _UNFINISHED)
        try:
            self._make()
            unfinished.mkdir()
            with _open_new(unfinished / ARRAYS) as (file, arrays_digest):
                for array in arrays:
                    _append(array.reshape(-1).view(np.uint8).data, file, arrays_digest)
            with _open_new(unfinished / DESCRIPTION) as (file, description_digest):
                _append(json.dumps(description).encode(), file, description_digest)
            with _open_new(unfinished / DIGESTS) as (file, _):
                file.write(_format_digests(arrays_digest.hexdigest(), description_digest.hexdigest()))
            _sync(unfinished)
            os.rename(unfinished, path)
            _sync(self.folder)
        except OSError as error:
            shutil.rmtree(unfinished, ignore_errors=True)  # what is left of it takes room
            whole = (
                f"The backup before it, {self._before}, is whole" if self._before else "There is none before"
            )
            remedy = "Make room" if error.errno in _NO_ROOM else "Make it a folder that can be written"
            raise OSError(
                error.errno,
                f"No backup could be written in {self.folder}: {error.strerror or error}. {whole}. {remedy} "
                "and start the program again",
            ) from error
        keep, self._before = {self._before, path}, path
        self._remove(path for path in self._paths() if path not in keep)

    def remove_all(self) -> None:
        """Remove the backups, the oldest first, and the folder if nothing else is in it."""
        self._remove(self._paths())
        self._before = None
        with contextlib.suppress(OSError):
            self.folder.rmdir()

    def _make(self) -> None:
        if not self.folder.exists():
            self.folder.mkdir(parents=True)
            _sync(self.folder.parent)

    def _paths(self) -> list[Path]:
        """The backups, the oldest first."""
        if not self.folder.exists():
            return []
        found = [path for path in self.folder.iterdir() if _NAME.fullmatch(path.name)]
        return sorted(found, key=lambda path: int(path.name.removeprefix("backup-")))

    def _remove(self, paths: Iterable[Path]) -> None:
        for path in paths:  # a kill in the middle must not leave a part of it under its name
            unfinished = path.with_name(path.name + _UNFINISHED)
            os.rename(path, unfinished)
            shutil.rmtree(unfinished, ignore_errors=True)

    def _remove_unfinished(self) -> None:
        """Those of processes that were killed."""
        for path in self.folder.glob("backup-*" + _UNFINISHED):
            shutil.rmtree(path, ignore_errors=True)


@contextlib.contextmanager
def _open_new(path: Path) -> Iterator[tuple[BinaryIO, Any]]:
    """A new file, on the disk when the block is left, and a digest to update."""
    with open(path, "xb") as file:
        yield file, hashlib.sha256()
        file.flush()
        os.fsync(file.fileno())


def _append(data: Any, file: BinaryIO, digest: Any) -> None:
    file.write(data)
    digest.update(data)


def _sync(folder: Path) -> None:
    """Force the names in a folder to the disk, as fsync does with a file's contents."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _format_digests(arrays: str, description: str) -> bytes:
    return f"{arrays}  {ARRAYS}\n{description}  {DESCRIPTION}\n".encode()


def _check(path: Path) -> None:
    """Raise an OSError where a backup is not as it was written."""
    found = []
    for name in (ARRAYS, DESCRIPTION):
        with open(path / name, "rb") as file:
            found.append(hashlib.file_digest(file, "sha256").hexdigest())
    if (path / DIGESTS).read_bytes() != _format_digests(*found):
        raise OSError(f"its files are not those of {DIGESTS}")
