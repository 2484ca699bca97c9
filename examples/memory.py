"""This process's memory, by Linux's own account: how much it has, and how far that grows."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any


def growth(run: Callable[[], Any]) -> float:
    """How many MiB more than now the process has at most while `run` runs."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # freed memory that `run` would get
    reset_peak()
    before = mib("VmRSS")
    run()
    return mib("VmHWM") - before


def reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def mib(what: str) -> float:
    """VmRSS, the process's memory now, or VmHWM, its peak since it was last reset."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(what)) / 2**10
