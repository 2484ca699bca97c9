"""A cluster of TensorFlow processes on this machine, on 127.0.0.1: started, listened to, and always ended."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any


class PortTaken(Exception):
    """Somebody opened a port between the moment it was found free and the moment a process wanted it."""


def run(
    command: Sequence[str],
    jobs: dict[str, int],
    directory: Path,
    report: Callable[[dict[str, Any]], None] = print,
    limit: float = 300.0,
) -> list[int]:
    """Run a command as each task of a cluster until all have ended, and return their exit codes.

    Once one fails or is killed, the others, which may wait for it for ever, are killed.

    Args:
        command: what all tasks run. TF_CONFIG tells each its place. Its standard input ends when this process
            does, in whatever way; see `end_with_the_launcher`.
        jobs: the number of tasks of each job, such as {"worker": 2}.
        directory: where their standard errors go, to a file a task such as worker-0.log.
        report: called with each line that they print to their standard output, which must be JSON.
        limit: seconds, after which those still running are killed.
    """
    for _ in range(3):
        with contextlib.suppress(PortTaken):
            return _run(command, jobs, directory, report, limit)
    raise RuntimeError("found no free ports that stayed free")


def _run(
    command: Sequence[str],
    jobs: dict[str, int],
    directory: Path,
    report: Callable[[dict[str, Any]], None],
    limit: float,
) -> list[int]:
    deadline = time.monotonic() + limit
    tasks = [(job, index) for job, count in jobs.items() for index in range(count)]
    ports = iter(free_ports(len(tasks)))
    cluster = {job: [f"127.0.0.1:{next(ports)}" for _ in range(count)] for job, count in jobs.items()}
    logs = [directory / f"{job}-{index}.log" for job, index in tasks]
    printed: queue.Queue[tuple[subprocess.Popen[str], str]] = queue.Queue()
    processes: list[subprocess.Popen[str]] = []
    try:
        for (job, index), log in zip(tasks, logs, strict=True):
            place = {"cluster": cluster, "task": {"type": job, "index": index}}
            with log.open("w") as file:
                process = subprocess.Popen(
                    command,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=file,
                    text=True,
                    env=os.environ | {"TF_CONFIG": json.dumps(place)},
                )
            processes.append(process)
            threading.Thread(target=_listen, args=(process, printed), daemon=True).start()
        running = set(processes)
        while running and time.monotonic() < deadline:
            with contextlib.suppress(queue.Empty):
                process, line = printed.get(timeout=0.1)
                if line:
                    report(json.loads(line))
                    continue
                running.remove(process)
                if process.wait():  # the others would wait for it
                    break
    finally:
        for process in processes:
            process.kill()
            process.wait()
    if any("Could not start gRPC server" in log.read_text() for log in logs):
        raise PortTaken
    return [process.returncode for process in processes]


def _listen(process: subprocess.Popen[str], printed: queue.Queue[tuple[subprocess.Popen[str], str]]) -> None:
    """Pass on what a process prints, and then an empty line."""
    for line in process.stdout or ():
        printed.put((process, line))
    printed.put((process, ""))


def free_ports(count: int) -> list[int]:
    """Ports of 127.0.0.1 that nobody has opened at the moment."""
    with contextlib.ExitStack() as stack:  # all open at once, so that they differ
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


def end_with_the_launcher() -> None:
    """For a task: end this process once its standard input has ended."""

    def watch() -> None:
        os.read(sys.stdin.fileno(), 1)  # unbuffered: a lock held here would abort the interpreter's exit
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
