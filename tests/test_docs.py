"""The documentation: examples run, links resolve, arguments and public names are documented."""

import doctest
import importlib
import importlib.util
import inspect
import pathlib
import pkgutil
import re
import subprocess
import sys
import tomllib

import cases
import pytest

import tf_adam_variants as tav
from tf_adam_variants.fused import __main__ as fused_main
from tf_adam_variants.optimizer import arguments

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
    parameters = set(inspect.signature(cls).parameters)
    documented = re.findall(r"^        \**(\w+): ", inspect.getdoc(cls).replace("\n    ", "\n        "), re.M)
    assert parameters <= set(documented)
    assert {"Args:", "Raises:", "Example:"} <= set(inspect.getdoc(cls).split())
    assert "https://arxiv.org/abs/" in cls.__doc__
    if cls in OPTIMIZERS:
        assert set(arguments.COMMON) <= parameters


@pytest.mark.parametrize(
    "module", [tav.callbacks, tav.converters, tav.schedules], ids=lambda module: module.__name__
)
def test_every_public_function_is_documented(module):
    for name, item in vars(module).items():
        if inspect.getmodule(item) is module and not name.startswith("_"):
            assert inspect.getdoc(item), name


def test_every_optimizer_has_a_row_in_the_cases_table():
    assert {case.cls for case in cases.CASES} == set(OPTIMIZERS)
    assert {case.cls for case in cases.CASES if not case.terms} == set(OPTIMIZERS)


PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
ALL_PAGES = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def test_every_argument_is_on_the_page_of_arguments():
    text = (ROOT / "docs" / "arguments.md").read_text()
    for cls in OPTIMIZERS:
        for argument in inspect.signature(cls).parameters:
            assert f"`{argument}" in text, argument


# Each starts TensorFlow: only README.md runs with every change.
PAGES_WITH_EXAMPLES = [
    pytest.param(page, marks=[] if page.name == "README.md" else [pytest.mark.slow], id=page.name)
    for page in PAGES
    if "```python" in page.read_text()
]


@pytest.mark.parametrize("page", PAGES_WITH_EXAMPLES)
def test_the_examples_of_a_page_run(page, tmp_path):
    """Its Python blocks run one after the other in a separate process, as for a reader who follows it."""
    program = tmp_path / "page.py"  # a file: AutoGraph reads the source of what it traces
    program.write_text("\n\n".join(re.findall(r"```python\n(.*?)```", page.read_text(), re.S)))
    done = subprocess.run([sys.executable, program], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


def anchor(title):
    """The anchor of a heading, on the site and on GitHub."""
    return re.sub(r"\s+", "-", re.sub(r"[^\w\s-]", "", title.lower()))


@ALL_PAGES
def test_links_resolve(page):
    for target in re.findall(r"\]\(([^)]+)\)", page.read_text()):
        if not target.startswith("http"):
            file, _, heading = target.partition("#")
            assert (page.parent / file).exists() or not file, target
            if heading:
                text = (page.parent / file if file else page).read_text()
                titles = re.findall(r"^#+ (.*)$", text, re.M)
                assert heading in map(anchor, titles), target


@ALL_PAGES
def test_files_named_on_a_page_exist(page):
    """`tests/golden`, `examples/*.json`, and programs in commands."""
    folders = "tests|examples|docs|custom_ops|tf_adam_variants"
    for name in re.findall(rf"(?<![\w/.])(?:{folders})/[\w*./-]*\w", page.read_text()):
        assert any(ROOT.glob(name)) or name.startswith(("docs/", "tf_adam_variants/")), name


def test_every_page_is_in_the_navigation():
    listed = set(re.findall(r": (\S+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.M))
    assert listed == {str(page.relative_to(ROOT / "docs")) for page in PAGES[1:]}


def test_every_public_name_has_a_page():
    pages = "".join(page.read_text() for page in (ROOT / "docs" / "reference").iterdir())
    rendered = set(re.findall(r"^::: tf_adam_variants\.(\S+)", pages, re.M))
    assert rendered >= {cls.__name__ for cls in OPTIMIZERS}
    for module in (tav.callbacks, tav.converters, tav.fused, tav.schedules):
        path = module.__name__.partition(".")[2]
        for name, item in vars(module).items():
            if is_public(name, item, module):
                assert f"{path}.{name}" in rendered or re.search(rf"^ +- {name}$", pages, re.M), name


def is_public(name, item, module):
    """Whether it is a class or a function of this module or package, and its name is public."""
    own = (getattr(item, "__module__", None) or "").startswith(module.__name__)
    return own and callable(item) and not name.startswith("_")


@pytest.mark.parametrize("command", ["build", "status"])
def test_every_option_of_the_command_line_is_in_the_reference(command, capsys):
    with pytest.raises(SystemExit):
        fused_main.main([command, "--help"])
    page = (ROOT / "docs" / "reference" / "fused.md").read_text()
    options = set(re.findall(r"--[a-z-]+", capsys.readouterr().out)) - {"--help"}
    assert options <= set(re.findall(r"--[a-z-]+", page))


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


def test_every_common_argument_has_a_type_and_a_text():
    assert set(arguments.COMMON) == set(arguments.Common.__annotations__)
    assert all(argument.text for argument in arguments.COMMON.values())
