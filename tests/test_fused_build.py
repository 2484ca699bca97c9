"""The fused kernels are built, found and loaded where they fit; elsewhere there is a clear reason."""

import functools
import importlib.metadata
import json
import os
import pathlib
import platform
import shutil
import subprocess
import sys
import sysconfig
import threading
import time
import tomllib
import zipfile

import pytest
import tensorflow as tf

from tf_adam_variants import fused
from tf_adam_variants.fused import __main__ as cli
from tf_adam_variants.fused import _build, _cache, _library

ROOT = pathlib.Path(__file__).parents[1]
BUILD_IT = "python -m tf_adam_variants.fused build"


def compiler():
    try:
        return _build.compiler()
    except _build.BuildError:
        return None


needs_compiler = pytest.mark.skipif(not compiler(), reason="no C++ compiler")
needs_setuptools = pytest.mark.skipif(
    int(next((d.version for d in importlib.metadata.distributions(name="setuptools")), "0").split(".")[0])
    < 77,
    reason="no setuptools>=77",
)


@pytest.fixture(autouse=True, scope="module")
def _loaded():
    """Load the library of this process before a test changes where it is searched for."""
    _library.load()


def test_it_is_built_where_there_is_a_compiler():
    assert fused.is_available() or not compiler(), f"{_library.reason()} Run it before the tests."


# -- loading ---------------------------------------------------------------------------------------------


@pytest.fixture
def opened(tmp_path, monkeypatch):
    """An empty package, an empty cache, and the list of the libraries that are opened: none is loaded."""
    libraries = []
    sources = tmp_path / "sources"
    sources.mkdir()
    (sources / "loops.cc").write_text("one")
    monkeypatch.setenv("TF_ADAM_VARIANTS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(_library, "_HERE", tmp_path / "package")
    monkeypatch.setattr(_library, "sources", lambda: sources)
    monkeypatch.setattr(_library, "_open", lambda library: libraries.append(library) or "ops")
    return libraries


def write_entry(folder, contents=b"a library", **changes):
    """Write a library that fits but for these changes in its build.json."""
    folder.mkdir(parents=True)
    library = folder / _library.NAME
    library.write_bytes(contents)
    build = _library.Build(
        tensorflow=tf.__version__,
        platform=sysconfig.get_platform(),
        sources=_library.hash_sources(),
        sha256=_library.hash_file(library),
        compiler="c++",
        flags="",
        time="now",
        cuda="none",
    )
    (folder / "build.json").write_text(json.dumps(build._asdict() | changes))
    return library


def write_entry_in_cache(**changes):
    return write_entry(_library.cache() / f"tf{tf.__version__}-0", **changes)


def search():
    """Search as a new process does."""
    return _library._search.__wrapped__()


def assert_not_usable(folder, message):
    """A search finds nothing, and says of this folder why and what to do."""
    found = search()
    assert found.ops is None
    assert f"The compiled op in {folder} cannot be used: " in found.reason
    assert message in found.reason
    assert f"`{BUILD_IT} --force` builds it anew" in found.reason


def test_a_library_that_fits_is_loaded(opened):
    library = write_entry_in_cache()
    found = search()
    assert (found.ops, found.library, found.reason) == ("ops", library, "")
    assert opened == [library]
    (_library.cache() / f"tf{tf.__version__}-1").symlink_to("/nowhere")
    assert search().library == library


def test_the_wheels_library_comes_first_and_then_the_newest(opened, tmp_path):
    names = ["tf1.0-b", f"tf{tf.__version__}-c", f"tf{tf.__version__}-a", f"tf{tf.__version__}-b"]
    libraries = [write_entry(_library.cache() / name) for name in names]
    for age, library in enumerate(libraries):
        os.utime(library.parent, (1000 - age, 1000 - age))
    assert search().library == libraries[1]
    assert search().library != write_entry(tmp_path / "package" / "lib", tensorflow="1.0")
    shutil.rmtree(tmp_path / "package")
    assert search().library != write_entry(tmp_path / "package" / "lib") == search().library


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tensorflow": "1.15.0"}, f"built for TensorFlow 1.15.0; this is {tf.__version__}"),
        ({"tensorflow": None}, "built for TensorFlow None"),
        ({"platform": "linux-pdp11"}, "built for linux-pdp11"),
        ({"sources": "0" * 64}, "other sources"),
        ({"sha256": "0" * 64}, "not the file that was built"),
        ({"size": 9}, "malformed"),  # a version before this one wrote it
    ],
)
def test_a_library_that_does_not_fit_is_not_opened(opened, changes, message):
    assert_not_usable(write_entry_in_cache(**changes).parent, message)
    assert opened == []


def test_a_library_of_sources_that_have_changed_since(opened):
    library = write_entry_in_cache()
    (_library.sources() / "loops.h").write_text("two")
    assert_not_usable(library.parent, "other sources")
    assert opened == []


DAMAGE = {
    _library.NAME: (b"a lib", b"another  ", b"", None),
    "build.json": (
        *(b"", b"{", b"[]", b"null", b"3", b"\xff\x00", b"[" * 200_000, b'{"tensorflow": "2.0"}', None),
    ),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage(opened, name):
    file = write_entry_in_cache().parent / name
    for contents in DAMAGE[name]:
        file.unlink(missing_ok=True)
        if contents is not None:
            file.write_bytes(contents)
        assert_not_usable(file.parent, "it ")
    assert opened == []


def compile_library(tmp_path, code):
    source, library = tmp_path / "some.cc", tmp_path / "some.so"
    source.write_text(code)
    subprocess.run([*compiler(), "-shared", "-fPIC", str(source), "-o", str(library)], check=True)
    return library.read_bytes()


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize(
    ("code", "message"),
    [
        (None, "ELF"),
        ("", f"it lacks {', '.join(_library.OPS)}"),
        ("void nowhere(); void (*address)() = nowhere;", "undefined symbol"),
    ],
)
def test_what_cannot_be_loaded(opened, monkeypatch, tmp_path, code, message):
    monkeypatch.undo()
    monkeypatch.setenv("TF_ADAM_VARIANTS_CACHE", str(tmp_path / "cache"))
    write_entry_in_cache(contents=b"no library " * 1000 if code is None else compile_library(tmp_path, code))
    assert_not_usable(_library.cache() / f"tf{tf.__version__}-0", message)


def test_no_library_anywhere(opened, monkeypatch):
    for _ in ("no folder", "a file"):
        reason = search().reason
        assert f"The compiled op is not built: there is none in {_library.cache()}. `{BUILD_IT}`" in reason
        _library.cache().write_text("a file")

    def home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("TF_ADAM_VARIANTS_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(pathlib.Path, "home", home)
    assert "home directory" in search().reason


def test_where_the_cache_is(monkeypatch, tmp_path):
    for name in ("TF_ADAM_VARIANTS_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.setenv(name, "")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert _library.cache() == tmp_path / ".cache" / "tf_adam_variants"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "x"))
    assert _library.cache() == tmp_path / "x" / "tf_adam_variants"
    monkeypatch.setenv("TF_ADAM_VARIANTS_CACHE", "~/y")
    assert _library.cache() == tmp_path / "y"


def test_many_threads_load_once(opened, monkeypatch):
    write_entry_in_cache()
    opening = _library._open
    monkeypatch.setattr(_library, "_open", lambda library: time.sleep(0.1) or opening(library))
    monkeypatch.setattr(_library, "_search", functools.cache(_library._search.__wrapped__))
    results = []
    threads = [threading.Thread(target=lambda: results.append(_library.load())) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == ["ops"] * 8
    assert len(opened) == 1
    assert _library.reason() == ""


@pytest.mark.slow
def test_importing_the_package_loads_nothing():
    code = f"""
import tf_adam_variants
from tf_adam_variants.fused import _library
assert _library._search.cache_info().misses == 0
assert {_library.NAME!r} not in open("/proc/self/maps").read()
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


# -- building --------------------------------------------------------------------------------------------


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """An empty cache, and a script as $CXX that links by copying a file. Only a file that is given is loaded.

    If a release of CUDA is given, the script is nvcc, too.
    """
    monkeypatch.setenv("TF_ADAM_VARIANTS_CACHE", str(tmp_path / "cache"))

    def make(linked=None, compiling=":", cuda=None, pause=0):
        if linked is None:
            monkeypatch.setattr(_build, "_TRY", "")
        script = tmp_path / "stand-in-c++"
        monkeypatch.setenv("CUDA_HOME", str(tmp_path))
        if cuda:
            (tmp_path / "bin").mkdir()
            (tmp_path / "bin" / "nvcc").symlink_to(script)
        script.write_text(f"""#!/bin/sh
for last; do :; done
case "$*" in
--version) echo "stand-in 1.0"; echo "Cuda compilation tools, release {cuda}, V{cuda}.1" ;;
*-fsyntax-only*) ;;
*-shared*) sleep {pause}; cp "{linked or __file__}" "$last" ;;
*) {compiling} ;;
esac
""")
        script.chmod(0o755)
        monkeypatch.setenv("CXX", str(script))

    return make


def entries():
    return sorted(path.name for path in _library.cache().iterdir()) if _library.cache().exists() else []


def test_no_compiler(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("TF_ADAM_VARIANTS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("CXX", "/nowhere/c++ -g")
    assert cli.main(["build"]) == 1
    assert "CXX=/nowhere/c++ -g is not" in capsys.readouterr().err
    assert "compiler: none" in fused.status()
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", "")
    assert cli.main(["build"]) == 1
    assert "no c++, g++ or clang++ on the PATH" in capsys.readouterr().err
    assert not entries()


@pytest.mark.slow
def test_two_processes_build_at_once(stand_in):
    stand_in(pause=0.5)
    code = "from tf_adam_variants.fused import _build; _build._TRY = ''; _build.build()"
    command = [sys.executable, "-c", code]
    both = [subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    outputs = [process.communicate()[0] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    (name,) = entries()
    assert name.startswith(f"tf{tf.__version__}-")
    for output in outputs:
        assert str(_library.cache() / name / _library.NAME) in output
    assert _library.load_manifest(_library.cache() / name).compiler == "stand-in 1.0"


def test_who_comes_second_takes_what_is_there(opened, tmp_path):
    library = write_entry_in_cache(compiler="the first")
    for number, force in enumerate((False, True)):
        built = write_entry(tmp_path / str(number) / "built", compiler="the second").parent
        _cache.install(built, library.parent, force)
        assert _library.load_manifest(library.parent).compiler == ("the second" if force else "the first")
        assert built.exists() != force


def test_it_is_built_once_unless_forced(stand_in, capsys):
    stand_in()
    folder = _build.build()
    before = (folder / _library.NAME).stat().st_ino
    assert "linked" in capsys.readouterr().out
    assert cli.main(["build"]) == 0
    assert "Already built" in capsys.readouterr().out
    assert (folder / _library.NAME).stat().st_ino == before
    (folder / _library.NAME).write_bytes(b"cut off")
    assert cli.main(["build"]) == 0
    assert _library.load_manifest(folder)
    before = (folder / _library.NAME).stat().st_ino
    assert cli.main(["build", "--force"]) == 0
    assert (folder / _library.NAME).stat().st_ino != before
    assert entries() == [folder.name]


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize(("code", "message"), [(None, "ELF"), ("", "has no attribute")])
def test_what_cannot_be_loaded_is_not_installed(stand_in, tmp_path, capsys, code, message):
    library = tmp_path / "linked.so"
    library.write_bytes(b"no library " * 1000 if code is None else compile_library(tmp_path, code))
    stand_in(library)
    assert cli.main(["build"]) == 1
    assert message in capsys.readouterr().err
    assert not entries()


def test_a_compiler_that_fails(stand_in, capsys):
    stand_in(compiling="echo 'loops.cc:1: error: nonsense' >&2; exit 3")
    assert cli.main(["build"]) == 1
    error = capsys.readouterr().err
    assert "Exit status 3" in error
    assert "stand-in-c++ -O" in error
    assert "loops.cc:1: error: nonsense" in error
    assert not entries()


def test_sources_that_change_meanwhile(stand_in, monkeypatch, tmp_path, capsys):
    shutil.copytree(_library.sources(), tmp_path / "sources")
    monkeypatch.setattr(_library, "sources", lambda: tmp_path / "sources")
    stand_in(compiling=f"echo >> {tmp_path / 'sources' / 'loops.h'}")
    assert cli.main(["build"]) == 1
    assert "have changed" in capsys.readouterr().err
    assert not entries()


@pytest.mark.parametrize("cache", ["{tmp_path}/file/cache", "/proc/cache", "{tmp_path}/read-only"])
def test_a_cache_that_cannot_be_written(stand_in, monkeypatch, tmp_path, capsys, cache):
    if cache.endswith("read-only") and os.geteuid() == 0:
        pytest.skip("root writes everywhere")
    (tmp_path / "file").write_text("")
    (tmp_path / "read-only").mkdir(mode=0o500)
    stand_in()
    monkeypatch.setenv("TF_ADAM_VARIANTS_CACHE", cache.format(tmp_path=tmp_path))
    assert cli.main(["build"]) == 1
    assert "Set TF_ADAM_VARIANTS_CACHE" in capsys.readouterr().err


def test_a_cache_that_is_only_read(opened):
    library = write_entry_in_cache()
    library.parent.chmod(0o500)
    _library.cache().chmod(0o500)
    assert search().library == library
    _library.cache().chmod(0o700)
    library.parent.chmod(0o700)


def test_what_is_compiled_for_which_processor(monkeypatch):
    for machine, compiler, sets in (
        ("x86_64", "true", ["baseline", "v3", "v4"]),
        ("x86_64", "false", ["baseline"]),  # it does not know the newer levels
        ("aarch64", "true", ["baseline"]),
    ):
        monkeypatch.setattr(platform, "machine", lambda machine=machine: machine)
        units = _build._units([compiler])
        flags = [flag for unit in units for flag in unit.flags]
        assert [flag.partition("=")[2] for flag in flags if "TFAV_SET" in flag] == sets
        levels = [f"-march=x86-64{'' if name == 'baseline' else '-' + name}" for name in sets]
        assert [flag for flag in flags if "-march" in flag] == (levels if machine == "x86_64" else [])
        assert ("-DTFAV_X86_LEVELS" in flags) == (len(sets) > 1)


def test_every_source_is_compiled():
    cuda = _build.Cuda(["nvcc"], "nvcc 13.0", ("80",))
    units = _build._units(["c++"]) + _build._cuda_units(["c++"], cuda)
    sources = {file.name for pattern in ("*.cc", "*.cu") for file in _library.sources().glob(pattern)}
    assert {unit.source for unit in units} == sources - {"check.cc"}  # the sanitizers' program
    assert {unit.source for unit in units if unit.compiler == ["nvcc"]} == {
        name for name in sources if name.endswith(".cu")
    }


# -- kernels for GPUs ------------------------------------------------------------------------------------


def test_where_there_is_nvcc_kernels_for_gpus_are_compiled(stand_in, capsys):
    stand_in(cuda="12.4")
    folder = _build.build()
    kernels = "80, 90 and PTX of 90, by nvcc 12.4"
    assert f"kernels for GPUs: {kernels}" in capsys.readouterr().out
    build = _library.load_manifest(folder)
    assert build.cuda == kernels
    assert "-gencode arch=compute_90,code=sm_90 -gencode arch=compute_90,code=compute_90" in build.flags
    assert cli.main(["build", "--cuda-arch", "100,75,100"]) == 0
    assert "kernels for GPUs: 75, 100 and PTX of 100" in capsys.readouterr().out
    assert cli.main(["build", "--no-cuda"]) == 0
    assert "kernels for GPUs: none (--no-cuda)" in capsys.readouterr().out
    assert len(entries()) == 3


def test_the_library_asked_for_last_is_used(stand_in, capsys, monkeypatch):
    stand_in(cuda="12.4")
    monkeypatch.setattr(_library, "_open", lambda library: "ops")
    with_cuda = _build.build()
    os.utime(with_cuda, (1000, 1000))
    without = _build.build(cuda=False)
    assert search().library.parent == without
    os.utime(without, (2000, 2000))
    _build.build()
    assert search().library.parent == with_cuda


@pytest.mark.parametrize(
    ("nvcc", "message"),
    [
        (
            "echo Cuda compilation tools, release 11.7, V11.7.1",
            "CUDA 11.8 or later is needed; {nvcc} is Cuda comp",
        ),
        (
            "echo Cuda compilation tools, release 9.0, V9.0.1",
            "CUDA 11.8 or later is needed; {nvcc} is Cuda comp",
        ),
        ("exit 3", "{nvcc} does not run: Exit status 3"),
        (None, "CUDA_HOME={home} has no bin/nvcc"),
    ],
)
def test_an_nvcc_that_cannot_be_used(stand_in, tmp_path, capsys, nvcc, message):
    stand_in()
    program = tmp_path / "bin" / "nvcc"
    if nvcc:
        program.parent.mkdir()
        program.write_text(f"#!/bin/sh\n{nvcc}\n")
        program.chmod(0o755)
    reason = message.format(nvcc=program, home=tmp_path)
    folder = _build.build()
    assert f"kernels for GPUs: none ({reason}" in capsys.readouterr().out
    assert _library.load_manifest(folder).cuda.startswith(f"none ({reason}")
    assert cli.main(["build", "--cuda-arch", "90"]) == 1
    assert f"Kernels for the GPUs 90 cannot be compiled: {reason}" in capsys.readouterr().err


def test_an_nvcc_that_fails(stand_in, capsys):
    stand_in(compiling='case "$*" in *.cu*) echo unsupported GNU version; exit 1 ;; esac', cuda="12.4")
    assert cli.main(["build"]) == 1
    error = capsys.readouterr().err
    assert "unsupported GNU version" in error
    assert "--no-cuda" in error


def test_options_that_exclude_each_other(capsys):
    with pytest.raises(SystemExit, match="2"):
        cli.main(["build", "--no-cuda", "--cuda-arch", "80"])
    assert "not allowed with" in capsys.readouterr().err


def test_wrong_architectures(capsys):
    for text in ("", "sm_80", "80;90", "80,", "native", "90a", "80,100f"):
        with pytest.raises(SystemExit, match="2"):
            cli.main(["build", "--cuda-arch", text])
        error = " ".join(capsys.readouterr().err.split())
        assert "must be numbers, like 80,90" in error
        assert f"Received: {text!r}" in error


# -- who can write the cache -----------------------------------------------------------------------------


def test_a_cache_that_others_can_write_is_not_used(stand_in, monkeypatch, capsys):
    """Nothing is loaded from it, nothing is built in it."""
    stand_in()
    monkeypatch.setattr(_library, "_open", lambda library: "ops")
    library = _build.build() / _library.NAME
    cache = _library.cache()
    for mode in (0o775, 0o757):
        cache.chmod(mode)
        expected = f"others may write {cache} (mode {mode:o}). `chmod go-w {cache}` ends that"
        assert search().ops is None
        assert expected in search().reason
        assert cli.main(["build", "--force"]) == 1
        assert expected in capsys.readouterr().err
    cache.chmod(0o755)
    assert search().library == library


def test_a_cache_of_another_user_is_not_used(opened, monkeypatch):
    write_entry_in_cache()
    user = os.geteuid()
    owner = user + 1
    if user == 0:
        os.chown(_library.cache(), owner, -1)
    else:  # only root gives files away; others are another user for a while
        owner, user = user, owner
        monkeypatch.setattr(os, "geteuid", lambda: user)
    found = search()
    assert (found.ops, opened) == (None, [])
    assert f"belongs to user {owner}, and this is user {user}. Set TF_ADAM_VARIANTS_CACHE" in found.reason


def test_a_wheels_library_is_loaded_whoever_can_write_it(opened, tmp_path):
    """Who can write there can write the package's Python, too; conda's environments are often a group's."""
    library = write_entry(tmp_path / "package" / "lib")
    library.parent.chmod(0o775)
    assert search().library == library


@pytest.mark.parametrize("umask", [0o000, 0o077])
def test_others_cannot_write_a_built_library_whatever_the_umask(stand_in, monkeypatch, umask):
    stand_in()
    monkeypatch.setattr(_library, "_open", lambda library: "ops")
    before = os.umask(umask)
    try:
        folder = _build.build()
    finally:
        os.umask(before)
    assert search().library == folder / _library.NAME
    for path in (folder, *folder.iterdir()):
        assert not path.stat().st_mode & (umask | 0o022)


# -- status ----------------------------------------------------------------------------------------------


def test_status(capsys):
    assert cli.main(["status"]) == 0
    lines = dict(line.split(": ", 1) for line in capsys.readouterr().out.splitlines())
    assert lines["available"] == "yes"
    assert pathlib.Path(lines["library"]).is_file()
    assert lines["TensorFlow"] == tf.__version__
    assert "-O3" in lines["flags"]
    assert lines["GPU kernels"]
    assert lines["GPU"]
    assert lines["instruction set"] in ("baseline", "x86-64-v3", "x86-64-v4")
    assert lines["cache"] == str(_library.cache())
    assert lines["compiler"]


def test_status_without_a_library(monkeypatch, capsys):
    monkeypatch.setattr(_library, "_search", lambda: _library.Found(reason="It rains."))
    assert cli.main(["status"]) == 1
    assert capsys.readouterr().out.startswith("available: no. It rains.\n")
    assert not fused.is_available()


def test_help(capsys):
    with pytest.raises(SystemExit, match="0"):
        cli.main(["--help"])
    text = capsys.readouterr().out
    for word in ("build", "status", "CXX", "CUDA_HOME", "TF_ADAM_VARIANTS_CACHE"):
        assert word in text
    with pytest.raises(SystemExit, match="2"):
        cli.main([])


# -- packaging -------------------------------------------------------------------------------------------


def test_all_packages_and_sources_are_declared():
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    assert declared["package-dir"] == {"tf_adam_variants.fused.custom_ops": "custom_ops"}
    packages = {str(file.parent.relative_to(ROOT)) for file in ROOT.glob("tf_adam_variants/**/__init__.py")}
    assert {package.replace("/", ".") for package in packages} | set(declared["package-dir"]) == set(
        declared["packages"]
    )
    patterns = declared["package-data"]["tf_adam_variants.fused.custom_ops"]
    for file in (ROOT / "custom_ops").iterdir():
        assert any(file.match(pattern) for pattern in patterns), file


@pytest.fixture
def wheel(tmp_path):
    """Build a wheel from a source distribution of a copy of the repository."""

    def make(**environment):
        copy = tmp_path / "copy"
        copy.mkdir()
        for name in ("tf_adam_variants", "custom_ops"):
            shutil.copytree(ROOT / name, copy / name)
        for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
            shutil.copy(ROOT / name, copy)
        run = functools.partial(subprocess.run, check=True, cwd=copy, env=os.environ | environment)
        run([sys.executable, "-c", "from setuptools import build_meta; build_meta.build_sdist('.')"])
        (source,) = copy.glob("*.tar.gz")
        pip = [sys.executable, "-m", "pip", "wheel", "-q", "--no-build-isolation", "--no-deps"]
        run([*pip, "-w", str(tmp_path), str(source)])
        (built,) = tmp_path.glob("*.whl")
        return built

    return make


@needs_setuptools
@pytest.mark.slow
def test_a_wheel_carries_the_sources(wheel):
    built = wheel()
    assert built.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(built) as files:
        names = set(files.namelist())
    for file in (ROOT / "custom_ops").iterdir():
        assert f"tf_adam_variants/fused/custom_ops/{file.name}" in names
    assert not [name for name in names if "/lib/" in name or name.startswith("custom_ops")]


@needs_setuptools
@needs_compiler
@pytest.mark.slow
def test_a_wheel_with_the_library(wheel, tmp_path):
    built = wheel(TFAV_BUILD_OPS="1")
    tag = sysconfig.get_platform().replace("-", "_")
    assert built.name.endswith(f"+tf{tf.__version__}-py3-none-{tag}.whl")
    with zipfile.ZipFile(built) as files:
        files.extractall(tmp_path / "installed")
    package = tmp_path / "installed" / "tf_adam_variants" / "fused"
    code = f"""
from tf_adam_variants.fused import _library
assert str(_library.find_library().library) == {str(package / "lib" / _library.NAME)!r}, _library.reason()
"""
    environment = os.environ | {
        "PYTHONPATH": str(tmp_path / "installed"),
        "TF_ADAM_VARIANTS_CACHE": "/nowhere",
    }
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path, env=environment)
    (metadata,) = (tmp_path / "installed").glob("*.dist-info/METADATA")
    assert f"Requires-Dist: tensorflow=={tf.__version__}\n" in metadata.read_text()
