"""Writes the pictures and the tables of numbers of README.md and docs/ from the results that are kept.

    python docs/figures.py             # all of them
    python docs/figures.py --check     # writes nothing; an error where a table is not that of its results

A page marks what is written:

    <!-- numbers: which_one -->                     what which_one.py makes of which_one.json beside it
    <!-- numbers: benchmark small -->               with a part
    <!-- end of numbers -->

A program NAME.py in one of FOLDERS that keeps results as NAME.json beside it has a function `markdown`, for
such a mark, or `picture`, for docs/images/NAME.png, or an `experiment.Experiment`, which has both as methods.
"""

from __future__ import annotations

import argparse
import importlib
import json
import re
import sys
from pathlib import Path
from typing import Any

from rich.progress import track

ROOT = Path(__file__).parents[1]
IMAGES = ROOT / "docs" / "images"
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
MARK = re.compile(
    r"(<!-- numbers: (\w+)(?: ([\w-]+))? -->\n\n)(?:(?:(?!<!-- ).)*?\n\n)?(<!-- end of numbers -->)",
    re.DOTALL,
)


FOLDERS = ("examples", "examples/experiments", "examples/benchmarks", "tests/tools")
RESULTS = {path.stem: path for folder in FOLDERS for path in (ROOT / folder).glob("*.json")}

# The programs import one another, and what the tests share.
sys.path[:0] = [str(ROOT / folder) for folder in (*FOLDERS, "tests/helpers")]


def program(name: str) -> Any:
    if name not in RESULTS:
        raise SystemExit(f"A page wants the numbers of {name}.json, which is in none of {', '.join(FOLDERS)}")
    module = importlib.import_module(name)
    return getattr(module, "EXPERIMENT", module)


def numbers(name: str) -> Any:
    return json.loads(RESULTS[name].read_text())


def written(page: str) -> str:
    """The page with its tables."""

    def table(mark: re.Match[str]) -> str:
        begin, name, part, end = mark.groups()
        return begin + program(name).markdown(numbers(name), *([part] if part else [])) + "\n\n" + end

    return MARK.sub(table, page)


def pictures() -> list[str]:
    """The programs that draw one, of those that keep results."""
    return [name for name in sorted(RESULTS) if hasattr(program(name), "picture")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing, compare")
    options = parser.parse_args()
    stale = []
    for page in PAGES:
        before = page.read_text()
        after = written(before)
        if options.check and after != before:
            stale.append(page.relative_to(ROOT))
        elif after != before:
            page.write_text(after)
            print(f"{page.relative_to(ROOT)}: tables written")
    if stale:
        raise SystemExit(f"Not the tables of the results: {', '.join(map(str, stale))}. Run make figures")
    if not options.check:
        for name in track(pictures(), "pictures"):
            program(name).picture(numbers(name), IMAGES / f"{name}.png")


if __name__ == "__main__":
    main()
