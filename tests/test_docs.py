"""What the package promises in words: arguments, examples, rows in the tables, versions."""

import doctest
import importlib
import inspect
import pathlib
import pkgutil
import re
import tomllib

import cases
import pytest

import tf_adam_variants as tav
from tf_adam_variants import _base

ROOT = pathlib.Path(__file__).parents[1]
OPTIMIZERS = [getattr(tav, name) for name in tav.__all__ if inspect.isclass(getattr(tav, name))]
PUBLIC = [*OPTIMIZERS, tav.schedules.LinearWarmup]
MODULES = sorted(module.name for module in pkgutil.walk_packages(tav.__path__, "tf_adam_variants."))


@pytest.mark.parametrize("name", ["tf_adam_variants", *MODULES])
def test_examples_in_docstrings(name):
    assert doctest.testmod(importlib.import_module(name)).failed == 0


def test_there_are_examples():
    attempted = {name: doctest.testmod(importlib.import_module(name)).attempted for name in MODULES}
    for name in ("adamw", "qhadam", "lamb", "converters", "schedules"):
        assert attempted[f"tf_adam_variants.{name}"] >= 3


@pytest.mark.parametrize("cls", PUBLIC, ids=lambda cls: cls.__name__)
def test_every_argument_is_documented(cls):
    arguments = set(inspect.signature(cls).parameters)
    documented = re.findall(r"^        \**(\w+): ", inspect.getdoc(cls).replace("\n    ", "\n        "), re.M)
    assert arguments <= set(documented)
    assert {"Args:", "Raises:", "Example:"} <= set(inspect.getdoc(cls).split())
    assert "https://arxiv.org/abs/" in cls.__doc__
    if cls in OPTIMIZERS:
        for argument in _base.KerasArguments.__annotations__:
            assert f"`{argument}`" in cls.__doc__


@pytest.mark.parametrize("module", [tav.converters, tav.schedules], ids=lambda module: module.__name__)
def test_every_public_function_is_documented(module):
    for name, item in vars(module).items():
        if inspect.getmodule(item) is module and not name.startswith("_"):
            assert inspect.getdoc(item), name


def test_every_optimizer_has_a_row_in_the_cases_table():
    assert {case.cls for case in cases.CASES} == set(OPTIMIZERS)
    assert {case.cls for case in cases.CASES if not case.terms} == set(OPTIMIZERS)


def test_every_optimizer_is_in_the_readme():
    readme = (ROOT / "README.md").read_text()
    for cls in OPTIMIZERS:
        assert f"`{cls.__name__}`" in readme
        for argument in inspect.signature(cls).parameters:
            assert argument in readme or argument == "keras_arguments", argument


def test_the_examples_in_the_readme_run(tmp_path, monkeypatch):
    """Its Python blocks, one after the other, as somebody would who follows it."""
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    assert len(blocks) >= 3
    names = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names)


def test_the_oldest_versions_tested_are_the_oldest_declared():
    dependencies = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    declared = dict(dependency.split(">=") for dependency in dependencies)
    makefile = (ROOT / "Makefile").read_text()
    for package in ("tensorflow", "keras"):
        assert re.search(rf"{package}=={re.escape(declared[package])}(\.0)?\b", makefile)


def test_the_version_is_in_the_changelog():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["version"] == tav.__version__
    assert f"## {tav.__version__}" in (ROOT / "CHANGELOG.md").read_text()


def test_imports_run_one_way():
    """Optimizers -> _decay -> _base -> the rest; no raw op outside _kernels."""
    for file in (ROOT / "tf_adam_variants").glob("*.py"):
        text = file.read_text()
        assert ("raw_ops" in text) == (file.name == "_kernels.py")
        if file.name in ("_formula.py", "_variables.py", "_checks.py", "_layout.py", "_peak.py"):
            assert not re.search(r"from tf_adam_variants(\._| import _)(base|decay|kernels)", text)
