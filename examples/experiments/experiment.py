"""What the experiments share: trials in processes, results as JSON, a picture and a conclusion from those.

An experiment is a program with a few functions (see `Experiment`) and these options:

    --quick           few and short trials: under a minute, to see that it runs
    --json FILE       keep the results, one row a trial
    --results FILE    train nothing: take the results from there
    --out FILE        the picture
"""

from __future__ import annotations

import argparse
import concurrent.futures
import json
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import matplotlib
import numpy as np
import pandas as pd
import scipy.stats
from rich.console import Console
from rich.markdown import Markdown
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

matplotlib.use("Agg")

Trial = dict[str, Any]  # the arguments of one training
Round = Callable[
    [bool, pd.DataFrame], list[Trial]
]  # with True a few; a later round depends on the results so far


class Experiment(NamedTuple):
    """What is tried, and what is made of it."""

    results: Callable[[bool, Console], pd.DataFrame]  # a row a trial; with True, of few and short ones
    report: Callable[[pd.DataFrame], str]  # Markdown: a table and a conclusion
    draw: Callable[[pd.DataFrame, Path], None]

    def markdown(self, numbers: dict[str, Any], part: str = "") -> str:
        """The report on numbers from a JSON, or of it its "conclusion", which is the last paragraph."""
        report = self.report(pd.DataFrame(numbers))
        return report.split("\n\n")[-1] if part == "conclusion" else report

    def picture(self, numbers: dict[str, Any], path: Path) -> None:
        self.draw(pd.DataFrame(numbers), path)


def use_one_thread() -> None:
    """Of a process that trains, so that processes side by side do not wait for each other."""
    import tensorflow as tf

    tf.get_logger().setLevel("ERROR")  # it warns of functions traced often: each trial has its own
    tf.config.threading.set_intra_op_parallelism_threads(1)
    tf.config.threading.set_inter_op_parallelism_threads(1)


def in_processes(
    run: Callable[..., dict[str, Any]], *rounds: Round, processes: int = os.cpu_count() or 1
) -> Callable[[bool, Console], pd.DataFrame]:
    """The results of trials that run side by side, each on one thread; with 1 process, on all of them.

    `run` takes a trial as keyword arguments and returns its results. It is a function of a module. Quick
    trials run one after another in this process, sooner done than others are started.
    """

    def results(quick: bool, console: Console) -> pd.DataFrame:
        columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
        pool: concurrent.futures.Executor
        if quick:
            pool = concurrent.futures.ThreadPoolExecutor(1)
        else:
            pool = concurrent.futures.ProcessPoolExecutor(
                processes,
                mp_context=multiprocessing.get_context("spawn"),
                initializer=use_one_thread if processes > 1 else None,
            )
        frame = pd.DataFrame()
        with Progress(*columns, console=console) as progress, pool:
            for number, trials_of in enumerate(rounds, 1):
                trials = trials_of(quick, frame)
                bar = progress.add_task(f"round {number} of {len(rounds)}", total=len(trials))
                futures = [pool.submit(run, **trial) for trial in trials]
                for done, future in enumerate(concurrent.futures.as_completed(futures), 1):
                    if error := future.exception():
                        pool.shutdown(cancel_futures=True)
                        raise error
                    progress.advance(bar)
                    # Bars that move are for terminals, a log needs lines.
                    if not console.is_terminal and 10 * done // len(trials) > 10 * (done - 1) // len(trials):
                        console.print(f"round {number}: {done} of {len(trials)} trials")
                rows = [trial | future.result() for trial, future in zip(trials, futures, strict=True)]
                frame = pd.concat([frame, pd.DataFrame(rows)], ignore_index=True)
        return frame

    return results


def main(experiment: Experiment, description: str, arguments: Sequence[str] | None = None) -> None:
    """The command line, or these arguments."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="few and short trials: under a minute")
    parser.add_argument("--json", type=Path, help="where to keep the results")
    parser.add_argument("--results", type=Path, help="train nothing: take the results from this JSON")
    parser.add_argument("--out", type=Path, help="the picture to draw")
    options = parser.parse_args(arguments)
    console = Console(width=None if Console().is_terminal else 110)
    if options.results:
        frame = pd.DataFrame(json.loads(options.results.read_text()))
    else:
        begin = time.perf_counter()
        frame = experiment.results(options.quick, console)
        console.print(f"{len(frame)} trials in {(time.perf_counter() - begin) / 60:.1f} minutes")
    if options.json:
        save(frame, options.json)
    console.print(Markdown(experiment.report(frame)))
    if options.out:
        experiment.draw(frame, options.out)
        console.print(f"The picture: {options.out.resolve()}", soft_wrap=True)


def save(frame: pd.DataFrame, path: Path) -> None:
    """A column a line, numbers with six digits."""
    columns = (
        f'"{name}": {json.dumps(list(map(rounded, frame[name])), separators=(",", ":"))}' for name in frame
    )
    path.write_text("{\n" + ",\n".join(columns) + "\n}\n")


def rounded(value: Any) -> Any:
    if isinstance(value, list):
        return [rounded(one) for one in value]
    if isinstance(value, (float, np.floating)):
        return None if np.isnan(value) else float(f"{value:.6g}")
    return value.item() if isinstance(value, np.generic) else value


def table(headings: list[str], rows: list[list[str]]) -> str:
    """In Markdown; all columns but the first are numbers."""
    lines = [headings, ["---"] + ["---:"] * (len(headings) - 1), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def resampled(seeds: int, times: int = 2000) -> Iterator[np.ndarray]:
    """Indices of seeds drawn with replacement: a statistic of each draw tells how far it depends on them.

    Of five seeds, an interval that holds 95 % of the draws holds the truth in some 85 % of the cases.
    """
    yield from np.random.default_rng(0).integers(seeds, size=(times, seeds))


def mean_interval(values: np.ndarray) -> tuple[float, float, float]:
    """The mean of a few values, and the 95 % interval of it by Student's t; endless for a single one."""
    mean, count = float(np.mean(values)), len(values)
    if count < 2:
        return mean, -np.inf, np.inf
    reach = float(scipy.stats.t.ppf(0.975, count - 1) * np.std(values, ddof=1) / np.sqrt(count))
    return mean, mean - reach, mean + reach
