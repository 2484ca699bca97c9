"""Draw which module of the package imports which, from the code itself:

    python docs/import_graph.py docs/images/imports.svg

A module stands below all that import it. Arrows that follow from others are left out, and so are modules
without any arrow. Imports in a circle are an error.
"""

from __future__ import annotations

import argparse
import ast
import sys
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1] / "tf_adam_variants"
COLORS = {"engines": "#fde8cf", "fused": "#e3e3e3", "variant": "#d5e8d4", "": "#dae8fc"}
Graph = dict[str, set[str]]


def modules() -> dict[str, Path]:
    """The package's files by their names in it: "_step", "engines.formula", "engines" for its __init__."""
    files = {}
    for file in sorted(PACKAGE.rglob("*.py")):
        parts = file.relative_to(PACKAGE).with_suffix("").parts
        files[".".join(part for part in parts if part != "__init__") or "__init__"] = file
    return files


def imports() -> Graph:
    """The modules that each module imports when it is imported itself."""
    files = modules()
    graph: Graph = {}
    for name, file in files.items():
        graph[name] = set()
        for node in ast.parse(file.read_text()).body:
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(PACKAGE.name):
                inside = (node.module or "").removeprefix(PACKAGE.name).strip(".")
                for alias in node.names:
                    whole = f"{inside}.{alias.name}".strip(".")
                    graph[name].add(whole if whole in files else inside)
        graph[name] -= {name, ""}
    del graph["__init__"]  # it imports what is public
    return graph


def levels(graph: Graph) -> dict[str, int]:
    """0 for a module that none imports, otherwise one more than the lowest of those that import it."""
    found: dict[str, int] = {}

    def level(name: str, path: tuple[str, ...]) -> int:
        if name in path:
            raise ValueError("imports in a circle: " + " <- ".join((*path[path.index(name) :], name)))
        if name not in found:
            importers = sorted(other for other in graph if name in graph[other])
            found[name] = 1 + max((level(other, (*path, name)) for other in importers), default=-1)
        return found[name]

    for name in graph:
        level(name, ())
    return found


def reduced(graph: Graph) -> Graph:
    """Without the arrows that follow from others, and without modules that have no arrow."""

    def reach(name: str) -> set[str]:
        return graph[name].union(*(reach(other) for other in graph[name]))

    connected = {name for name in graph if graph[name]}.union(*graph.values())
    return {name: graph[name] - set().union(*map(reach, graph[name])) for name in graph if name in connected}


def draw(out: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "imports"
    import matplotlib.pyplot as plt
    from matplotlib.patches import FancyBboxPatch

    graph = reduced(imports())
    level = levels(graph)
    rows = [[name for name in sorted(level) if level[name] == i] for i in range(max(level.values()) + 1)]
    most = max(map(len, rows))
    x = {name: spread(i, row, most) for row in rows for i, name in enumerate(row)}
    for _ in range(
        20
    ):  # each module goes below or above the middle of its neighbours, and rows spread out again
        for row in (*rows, *rows[::-1]):

            def middle(name: str) -> float:
                near = graph[name] | {other for other in graph if name in graph[other]}
                return sum(x[one] for one in near) / len(near) if near else most + 1.0  # apart, on the right

            row.sort(key=lambda name: (middle(name), name))
            x.update({name: spread(i, row, most) for i, name in enumerate(row)})

    across, down, box_width, box_height = 1.68, 0.86, 1.54, 0.42  # inches
    figure, axes = plt.subplots(figsize=(across * most, down * len(rows)))
    for name, others in graph.items():
        for other in sorted(others):
            start = x[name] * across, -level[name] * down - box_height / 2
            end = x[other] * across, -level[other] * down + box_height / 2
            bend = 0.0 if level[other] - level[name] == 1 else 0.12 * (1 if x[other] >= x[name] else -1)
            style = {"arrowstyle": "-|>", "color": "#777777", "lw": 1.0, "shrinkA": 0, "shrinkB": 0}
            style["connectionstyle"] = f"arc3,rad={bend}"
            axes.annotate("", end, start, arrowprops=style, zorder=1)
    for name in graph:
        variant = "_declaration" in graph[name]
        color = COLORS["variant"] if variant else COLORS.get(name.partition(".")[0], COLORS[""])
        corner = x[name] * across - box_width / 2, -level[name] * down - box_height / 2
        style = {"boxstyle": "round,pad=0,rounding_size=0.06", "facecolor": color, "edgecolor": "#555555"}
        axes.add_patch(FancyBboxPatch(corner, box_width, box_height, lw=0.8, zorder=2, **style))
        title = name.replace(".", "/\n") + ("/" if name in ("engines", "fused") else ".py")
        middle_of_box = x[name] * across, -level[name] * down
        axes.text(*middle_of_box, title, fontsize=9.5, ha="center", va="center", zorder=3, linespacing=0.95)
    axes.set_xlim(0, across * most)
    axes.set_ylim(-(len(rows) - 1) * down - box_height, box_height)
    axes.axis("off")
    metadata = {"Date": None, "Description": described(graph)} if out.suffix == ".svg" else None
    figure.savefig(out, bbox_inches="tight", dpi=110, metadata=metadata)


def described(graph: Graph) -> str:
    """The arrows in words, for readers of the file and for the test that the picture is that of the code."""
    return "; ".join(
        f"{name} imports {', '.join(sorted(others))}" for name, others in graph.items() if others
    )


def spread(i: int, row: list[str], most: int) -> float:
    """Where the i-th module of a row stands: rows are centred, and short ones are spaced more widely."""
    space = min(most / len(row), 1.6)
    return most / 2 + (i - (len(row) - 1) / 2) * space


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=Path, help="the picture to write")
    try:
        draw(parser.parse_args().out)
    except ValueError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
