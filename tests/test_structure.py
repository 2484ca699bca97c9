"""How the package is built: layers, sizes, and what it touches that is not public."""

import ast
import html
import importlib.util
import pathlib
import re

import keras
import pytest

import tf_adam_variants as tav
from tf_adam_variants.utils import internals

ROOT = pathlib.Path(__file__).parents[1]
PACKAGE = ROOT / "tf_adam_variants"
FILES = {str(file.relative_to(PACKAGE)): file.read_text() for file in PACKAGE.rglob("*.py")}
TREES = {name: ast.parse(text) for name, text in FILES.items()}

spec = importlib.util.spec_from_file_location("import_graph", ROOT / "docs" / "import_graph.py")
import_graph = importlib.util.module_from_spec(spec)
spec.loader.exec_module(import_graph)


def test_imports_run_down_the_layers():
    graph = import_graph.imports()  # raises for a circle
    assert import_graph.upward(graph) == []
    for variant in ("adamw", "qhadam", "qhadamw", "lamb"):
        assert "optimizer.variant" in graph[variant]
    for engine in ("engines.fused", "engines.resource_apply", "engines.formula"):
        assert all(import_graph.layer_of(name) in ("engines", "fused", "utils") for name in graph[engine])


def test_an_import_up_the_layers_is_seen():
    assert import_graph.upward({"engines.formula": {"optimizer.base"}}) == [
        ("engines.formula", "optimizer.base")
    ]


def test_the_picture_of_the_imports_is_that_of_the_code():
    """`make docs` draws it."""
    picture = html.unescape((ROOT / "docs" / "images" / "imports.svg").read_text())
    arrows = set(re.findall("<title>(\\S+)->(\\S+)</title>", picture))
    graph = import_graph.reduced(import_graph.imports())
    assert arrows == {(name, other) for name, others in graph.items() for other in others}


def test_files_and_classes_stay_small():
    for name, text in FILES.items():
        assert len(text.splitlines()) <= 300, name
    for name, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                methods = [item for item in node.body if isinstance(item, ast.FunctionDef)]
                assert len(methods) <= 20, (name, node.name)


def own_names():
    """All names that the package itself defines: functions, classes, arguments, attributes that it sets."""
    names = set()
    for node in (node for tree in TREES.values() for node in ast.walk(tree)):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            names.add(node.attr)
        elif isinstance(node, ast.alias):
            names.add((node.asname or node.name).rpartition(".")[2])
    # Set by name, with setattr or object.__setattr__.
    return names | {"_hyperparameters", "_momentums", "_velocities", "_velocity_hats", "_master_weights"}


def foreign_private_names(tree, own):
    """The private attributes that a module reads of objects that are not the package's."""
    documented = {"_replace", "_asdict", "_fields", "_make", "_getframe"}
    attributes = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    private = {name for name in attributes if name.startswith("_") and not name.startswith("__")}
    return private - own - documented


def test_private_names_of_others_are_in_one_module():
    """But those of Keras's optimizer, from which ours inherits: these the module lists."""
    own = own_names() - set(internals.INHERITED)
    inherited = set()
    for name, tree in TREES.items():
        if name != "utils/internals.py":
            inherited |= foreign_private_names(tree, own)
            assert "tensorflow.python" not in FILES[name], name
            assert "keras.src" not in FILES[name], name
            assert "__internal__" not in FILES[name], name
    assert inherited == set(internals.INHERITED)


def test_the_private_names_of_keras_exist():
    optimizer = tav.AdamW(use_ema=True, gradient_accumulation_steps=2)
    optimizer.build([keras.Variable([1.0])])
    for name in (*internals.INHERITED, *internals.OVERRIDDEN):
        assert hasattr(optimizer, name), name


def test_the_overridden_private_methods_are_listed():
    bases = {name for base in keras.optimizers.Optimizer.__mro__ for name in vars(base)}
    ours = {
        name
        for cls in (tav.AdamW, *tav.AdamW.__mro__)
        for name in vars(cls)
        if cls.__module__.startswith("tf_adam")
    }
    overridden = {name for name in ours & bases if name.startswith("_") and not name.startswith("__")}
    assert overridden - set(internals.INHERITED) == set(internals.OVERRIDDEN)
    assert len(overridden) <= 3


@pytest.mark.parametrize("name", sorted(name for name in FILES if not name.endswith("__init__.py")))
def test_every_module_says_what_it_is_for(name):
    assert ast.get_docstring(TREES[name]), name
    assert len(FILES[name].splitlines()) > 15, f"{name}: a module of a dozen lines for one function"
