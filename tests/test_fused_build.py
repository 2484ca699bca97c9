"""The compiled library: found, built and loaded where it fits; a clear reason and nothing worse elsewhere."""

import ctypes
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
    """What this process finds, it finds before a test sends it elsewhere."""
    _library.load()


def test_it_is_built_where_there_is_a_compiler():
    assert fused.is_available() or not compiler(), f"{_library.reason()} Run it before the tests."


# -- loading ---------------------------------------------------------------------------------------------


@pytest.fixture
def opened(tmp_path, monkeypatch):
    """An empty package and an empty cache, and the libraries that are opened there: told, not loaded."""
    libraries = []
    sources = tmp_path / "sources"
    sources.mkdir()
    (sources / "loops.cc").write_text("one")
    monkeypatch.setenv("TF_ADAM_VARIANTS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(_library, "_HERE", tmp_path / "package")
    monkeypatch.setattr(_library, "sources", lambda: sources)
    monkeypatch.setattr(_library, "_open", lambda library: libraries.append(library) or "ops")
    return libraries


def entry(folder, contents=b"a library", **changes):
    """A library that fits but for these changes in its build.json."""
    folder.mkdir(parents=True)
    library = folder / _library.NAME
    library.write_bytes(contents)
    size, digest = _library.fingerprint(library)
    build = _library.Build(
        tf.__version__,
        sysconfig.get_platform(),
        _library.source_hash(),
        size,
        digest,
        "c++",
        "",
        "now",
        "none",
    )
    (folder / "build.json").write_text(json.dumps(build._replace(**changes)._asdict()))
    return library


def search():
    """A search as a new process makes it."""
    return _library._found.__wrapped__()


def entry_in_cache(**changes):
    return entry(_library.cache() / f"tf{tf.__version__}-0", **changes)


def test_a_library_that_fits_is_loaded(opened):
    library = entry_in_cache()
    found = search()
    assert (found.ops, found.library, found.reason) == ("ops", library, "")
    assert opened == [library]


def test_a_link_to_nowhere_hides_no_library(opened):
    library = entry_in_cache()
    (_library.cache() / f"tf{tf.__version__}-1").symlink_to("/nowhere")
    assert search().library == library


def test_the_wheels_library_comes_first_and_then_the_newest(opened, tmp_path):
    names = ["tf1.0-b", f"tf{tf.__version__}-c", f"tf{tf.__version__}-a", f"tf{tf.__version__}-b"]
    libraries = [entry(_library.cache() / name) for name in names]
    for age, library in enumerate(libraries):
        os.utime(library.parent, (1000 - age, 1000 - age))
    assert search().library == libraries[1]
    assert search().library != entry(tmp_path / "package" / "lib", tensorflow="1.0")
    shutil.rmtree(tmp_path / "package")
    assert search().library != entry(tmp_path / "package" / "lib") == search().library


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tensorflow": "1.15.0"}, f"built for TensorFlow 1.15.0; this is {tf.__version__}"),
        ({"tensorflow": None}, "built for TensorFlow None"),
        ({"platform": "linux-pdp11"}, "built for linux-pdp11"),
        ({"sources": "0" * 64}, "other sources"),
        ({"size": 1}, "not the file that was built"),
        ({"sha256": "0" * 64}, "not the file that was built"),
    ],
)
def test_a_library_that_does_not_fit_is_not_opened(opened, changes, message):
    library = entry_in_cache(**changes)
    found = search()
    assert found.ops is None
    assert message in found.reason
    assert str(library.parent) in found.reason
    assert BUILD_IT in found.reason
    assert opened == []


def test_a_library_of_sources_that_have_changed_since(opened):
    entry_in_cache()
    (_library.sources() / "loops.h").write_text("two")
    assert "other sources" in search().reason
    assert opened == []


@pytest.mark.parametrize(
    ("name", "contents"),
    [
        (_library.NAME, b"a lib"),
        (_library.NAME, b"another  "),
        (_library.NAME, b""),
        (_library.NAME, None),
        ("build.json", b""),
        ("build.json", b"{"),
        ("build.json", b"[]"),
        ("build.json", b"null"),
        ("build.json", b"3"),
        ("build.json", b"\xff\x00"),
        ("build.json", b"[" * 200_000),
        ("build.json", b'{"tensorflow": "2.0"}'),
        ("build.json", None),
    ],
)
def test_damage(opened, name, contents):
    file = entry_in_cache().parent / name
    file.unlink()
    if contents is not None:
        file.write_bytes(contents)
    found = search()
    assert found.ops is None
    assert f"The compiled op in {file.parent} cannot be used" in found.reason
    assert BUILD_IT in found.reason
    assert opened == []


def shared_object(tmp_path, code):
    source, library = tmp_path / "some.cc", tmp_path / "some.so"
    source.write_text(code)
    subprocess.run([*compiler(), "-shared", "-fPIC", str(source), "-o", str(library)], check=True)
    return library.read_bytes()


@needs_compiler
@pytest.mark.parametrize(
    ("code", "message"),
    [
        (None, "ELF"),
        (
            "",
            "it lacks tf_adam_variants_dense_step, tf_adam_variants_sparse_step, "
            "tf_adam_variants_squared_norm, tf_adam_variants_coefficients",
        ),
        ("void nowhere(); void (*address)() = nowhere;", "undefined symbol"),
    ],
)
def test_what_cannot_be_loaded(opened, monkeypatch, tmp_path, code, message):
    monkeypatch.undo()
    monkeypatch.setenv("TF_ADAM_VARIANTS_CACHE", str(tmp_path / "cache"))
    entry_in_cache(contents=b"no library " * 1000 if code is None else shared_object(tmp_path, code))
    found = search()
    assert found.ops is None
    assert message in found.reason
    assert f"{BUILD_IT} --force" in found.reason


def test_no_library_anywhere(opened):
    found = search()
    assert "is not built" in found.reason
    assert str(_library.cache()) in found.reason
    assert BUILD_IT in found.reason
    _library.cache().write_text("a file")
    assert "is not built" in search().reason


def test_nobody_is_at_home(opened, monkeypatch):
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
    entry_in_cache()
    opening = _library._open
    monkeypatch.setattr(_library, "_open", lambda library: time.sleep(0.1) or opening(library))
    monkeypatch.setattr(_library, "_found", functools.cache(_library._found.__wrapped__))
    results = []
    threads = [threading.Thread(target=lambda: results.append(_library.load())) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == ["ops"] * 8
    assert len(opened) == 1
    assert _library.reason() == ""


def test_importing_the_package_loads_nothing():
    code = f"""
import tf_adam_variants
from tf_adam_variants.fused import _library
assert _library._found.cache_info().misses == 0
assert {_library.NAME!r} not in open("/proc/self/maps").read()
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


# -- building --------------------------------------------------------------------------------------------


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """An empty cache, and a $CXX that links by copying a file, which is not loaded unless it is given.

    There is an nvcc of the same kind where a release of CUDA is given.
    """
    monkeypatch.setenv("TF_ADAM_VARIANTS_CACHE", str(tmp_path / "cache"))

    def make(linked=None, compiling=":", cuda=None):
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
*-shared*) sleep 0.5; cp "{linked or __file__}" "$last" ;;
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


def test_two_processes_build_at_once(stand_in):
    stand_in()
    code = "from tf_adam_variants.fused import _build; _build._TRY = ''; _build.build()"
    command = [sys.executable, "-c", code]
    both = [subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    outputs = [process.communicate()[0] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    (name,) = entries()
    assert name.startswith(f"tf{tf.__version__}-")
    for output in outputs:
        assert str(_library.cache() / name / _library.NAME) in output
    assert _library.checked(_library.cache() / name).compiler == "stand-in 1.0"


def test_who_comes_second_takes_what_is_there(opened, tmp_path):
    library = entry_in_cache(compiler="the first")
    for number, force in enumerate((False, True)):
        made = entry(tmp_path / str(number) / "made", compiler="the second").parent
        _cache.put(made, library.parent, force)
        assert _library.checked(library.parent).compiler == ("the second" if force else "the first")
        assert made.exists() != force


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
    assert _library.checked(folder)
    before = (folder / _library.NAME).stat().st_ino
    assert cli.main(["build", "--force"]) == 0
    assert (folder / _library.NAME).stat().st_ino != before
    assert entries() == [folder.name]


@needs_compiler
@pytest.mark.parametrize(("code", "message"), [(None, "ELF"), ("", "has no attribute")])
def test_what_cannot_be_loaded_is_not_installed(stand_in, tmp_path, capsys, code, message):
    library = tmp_path / "linked.so"
    library.write_bytes(b"no library " * 1000 if code is None else shared_object(tmp_path, code))
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
    library = entry_in_cache()
    library.parent.chmod(0o500)
    _library.cache().chmod(0o500)
    assert search().library == library
    _library.cache().chmod(0o700)
    library.parent.chmod(0o700)


@pytest.mark.parametrize(
    ("machine", "accepts", "sets"),
    [
        ("x86_64", True, ["baseline", "v3", "v4"]),
        ("x86_64", False, ["baseline"]),
        ("aarch64", True, ["baseline"]),
    ],
)
def test_what_is_compiled_for_which_processor(monkeypatch, machine, accepts, sets):
    monkeypatch.setattr(platform, "machine", lambda: machine)
    units = _build._units(["true" if accepts else "false"])
    loops = [unit.flags for unit in units if unit.source == "loops.cc"]
    assert [flag[len("-DTFAV_SET=") :] for flags in loops for flag in flags if "TFAV_SET" in flag] == sets
    marches = [flag for unit in units for flag in unit.flags if flag.startswith("-march")]
    levels = [f"-march=x86-64{'' if name == 'baseline' else '-' + name}" for name in sets]
    assert marches == (levels if machine == "x86_64" else [])
    assert any("-DTFAV_X86_LEVELS" in unit.flags for unit in units) == (len(sets) > 1)


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
    told = "80, 90 and PTX of 90, by nvcc 12.4"
    assert f"kernels for GPUs: {told}" in capsys.readouterr().out
    build = _library.checked(folder)
    assert build.cuda == told
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


@pytest.mark.parametrize("release", ["11.7", "9.0"])
def test_an_old_nvcc(stand_in, capsys, release):
    stand_in(cuda=release)
    folder = _build.build()
    nvcc = f"{os.environ['CUDA_HOME']}/bin/nvcc"
    assert f"none (CUDA 11.8 or later is needed; {nvcc} is Cuda comp" in capsys.readouterr().out
    assert _library.checked(folder).cuda.startswith("none (CUDA 11.8 or later")


def test_no_nvcc(stand_in, capsys):
    stand_in()
    folder = _build.build()
    told = f"none (CUDA_HOME={os.environ['CUDA_HOME']} has no bin/nvcc)"
    assert f"kernels for GPUs: {told}" in capsys.readouterr().out
    assert _library.checked(folder).cuda == told
    assert cli.main(["build", "--cuda-arch", "90"]) == 1
    assert "Kernels for the GPUs 90 cannot be compiled: CUDA_HOME=" in capsys.readouterr().err


def test_an_nvcc_that_does_not_run(stand_in, tmp_path, capsys):
    stand_in()
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text("#!/bin/sh\nexit 3\n")
    nvcc.chmod(0o755)
    _build.build()
    assert f"none ({nvcc} does not run: Exit status 3" in capsys.readouterr().out


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


@pytest.mark.parametrize("text", ["", "sm_80", "80;90", "80,", "native", "90a", "80,100f"])
def test_architectures_that_are_none(capsys, text):
    with pytest.raises(SystemExit, match="2"):
        cli.main(["build", "--cuda-arch", text])
    error = " ".join(capsys.readouterr().err.split())
    assert "must be numbers, like 80,90" in error
    assert f"Received: {text!r}" in error


# -- what is left in the cache ---------------------------------------------------------------------------


def long_unused(name, **changes):
    """A library in the cache that was built and used 31 days ago."""
    library = entry(_library.cache() / name, **changes)
    before = time.time() - 31 * 24 * 60 * 60
    for path in (library, library.parent):
        os.utime(path, (before, before))
    return library


@pytest.mark.parametrize("how", ["built", "already built", "kept"])
def test_build_removes_what_nothing_uses(stand_in, capsys, how):
    """Whatever it was built for: who uses it loads it."""
    stand_in()
    if how == "already built":
        _build.build()
    day, now = 24 * 60 * 60, time.time()
    old = [
        long_unused("tf1.15.0-0123456789abcdef", tensorflow="1.15.0", contents=b"0" * 2**20),
        long_unused(f"tf{tf.__version__}-0123456789abcde0"),
        long_unused(f"tf{tf.__version__}-0123456789abcde1"),
    ]
    old[2].with_name("build.json").unlink()
    os.utime(old[2].parent, (0, now - 31 * day))
    asked_for, marked, read = (long_unused(f"tf{tf.__version__}-0123456789abcdf{n}") for n in range(3))
    os.utime(asked_for.parent, (0, now - 29 * day))
    os.utime(marked, (0, now - 29 * day))
    os.utime(read, (now - 29 * day, 0))
    others = [long_unused("tf-models"), long_unused("tf2.21.0-notes")]
    (_library.cache() / "tf0-0123456789abcdef").symlink_to(others[0].parent)
    for name, age in {".building-killed": 2 * day, ".building-now": day / 2}.items():
        (_library.cache() / name / "made").mkdir(parents=True)
        os.utime(_library.cache() / name, (now - age, now - age))
    (_library.cache() / ".building-ended").symlink_to("/nowhere")

    before = {*entries()}
    capsys.readouterr()
    assert cli.main(["build", *(["--keep"] if how == "kept" else [])]) == 0
    printed = capsys.readouterr().out
    gone = {*(library.parent.name for library in old), ".building-killed"} if how != "kept" else set()
    assert before - {*entries()} == gone
    assert len({*entries()} - before) == (how != "already built")
    told = [line for line in printed.splitlines() if "emoved" in line]
    assert len(told) == len(gone)
    for name in gone:
        size, days = ("1.0", 31) if name.startswith("tf1") else ("0.0", 2 if name.startswith(".") else 31)
        assert f"Removed {_library.cache() / name}: {size} MiB, unused for {days} days" in told


def test_who_loads_a_library_marks_it(opened, tmp_path):
    library = long_unused(f"tf{tf.__version__}-0123456789abcdef")
    built = library.parent.stat().st_mtime
    assert search().library == library
    assert library.stat().st_mtime > time.time() - 1000
    assert library.parent.stat().st_mtime == built  # the order in which they are searched
    _cache.remove_unused()
    assert search().library == library


def test_what_cannot_be_removed(stand_in, monkeypatch, capsys):
    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    stand_in()
    library = long_unused(f"tf{tf.__version__}-0123456789abcdef")
    monkeypatch.setattr(shutil, "rmtree", refuse)  # root can remove whatever a test can make
    _cache.remove_unused()
    assert capsys.readouterr().out == f"Not removed: [Errno 13] Permission denied: '{library.parent}'\n"


@needs_compiler
def test_who_has_loaded_what_is_removed_keeps_it(opened, tmp_path):
    code = 'extern "C" int seven() { return 7; } extern "C" const char* text() { return "still here"; }'
    library = long_unused("tf0-0123456789abcdef", contents=shared_object(tmp_path, code))
    functions = ctypes.CDLL(str(library))
    os.utime(library, (0, 0))
    _cache.remove_unused()
    assert not entries()
    functions.text.restype = ctypes.c_char_p
    assert (functions.seven(), functions.text()) == (7, b"still here")


PATHS = {
    "the cache": lambda library: library.parents[1],
    "its folder": lambda library: library.parent,
    "the library": lambda library: library,
}


@pytest.mark.parametrize("path", PATHS)
def test_what_others_can_write_is_not_loaded(opened, path):
    library = entry_in_cache()
    suspect = PATHS[path](library)
    mode = suspect.stat().st_mode & 0o755
    for more in (0o020, 0o002):
        suspect.chmod(mode | more)
        found = search()
        assert (found.ops, opened) == (None, [])
        assert f"others may write {suspect} (mode {mode | more:o}). `chmod go-w {suspect}`" in found.reason
    suspect.chmod(mode)
    assert search().library == library


@pytest.mark.parametrize("path", PATHS)
def test_what_belongs_to_another_user_is_not_loaded(opened, path, monkeypatch):
    library = entry_in_cache()
    suspect, user = PATHS[path](library), os.geteuid()
    owner = user + 1
    if user == 0:
        os.chown(suspect, owner, -1)
    else:  # who is not root cannot give files away, but can be told to be another
        owner, user = user, owner
        monkeypatch.setattr(os, "geteuid", lambda: user)
    found = search()
    assert (found.ops, opened) == (None, [])
    assert f"belongs to user {owner}, and this is user {user}. Set TF_ADAM_VARIANTS_CACHE" in found.reason


def test_a_wheels_own_library_is_loaded_as_the_package_is(opened, tmp_path):
    """Who can write there can write the package's Python, too; conda's environments are often a group's."""
    library = entry(tmp_path / "package" / "lib")
    library.parent.chmod(0o775)
    assert search().library == library


@pytest.mark.parametrize("umask", [0o000, 0o002, 0o077])
def test_what_is_built_is_loaded_whatever_the_umask(stand_in, monkeypatch, umask):
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


def test_a_cache_that_others_can_write_is_not_built_in(stand_in, capsys):
    stand_in()
    _library.cache().mkdir()
    _library.cache().chmod(0o777)
    assert cli.main(["build"]) == 1
    assert f"`chmod go-w {_library.cache()}`" in capsys.readouterr().err
    _library.cache().chmod(0o755)
    assert cli.main(["build"]) == 0


# -- telling ---------------------------------------------------------------------------------------------


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
    monkeypatch.setattr(_library, "_found", lambda: _library.Found(reason="It rains."))
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
    """Builds one from a source distribution that was built from a copy of the repository."""

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
        (made,) = tmp_path.glob("*.whl")
        return made

    return make


@needs_setuptools
def test_a_wheel_carries_the_sources(wheel):
    made = wheel()
    assert made.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(made) as files:
        names = set(files.namelist())
    for file in (ROOT / "custom_ops").iterdir():
        assert f"tf_adam_variants/fused/custom_ops/{file.name}" in names
    assert not [name for name in names if "/lib/" in name or name.startswith("custom_ops")]


@needs_setuptools
@needs_compiler
def test_a_wheel_with_the_library(wheel, tmp_path):
    made = wheel(TFAV_BUILD_OPS="1")
    tag = sysconfig.get_platform().replace("-", "_")
    assert made.name.endswith(f"+tf{tf.__version__}-py3-none-{tag}.whl")
    with zipfile.ZipFile(made) as files:
        files.extractall(tmp_path / "installed")
    package = tmp_path / "installed" / "tf_adam_variants" / "fused"
    code = f"""
from tf_adam_variants.fused import _library
assert str(_library.found().library) == {str(package / "lib" / _library.NAME)!r}, _library.reason()
"""
    environment = os.environ | {
        "PYTHONPATH": str(tmp_path / "installed"),
        "TF_ADAM_VARIANTS_CACHE": "/nowhere",
    }
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path, env=environment)
    (metadata,) = (tmp_path / "installed").glob("*.dist-info/METADATA")
    assert f"Requires-Dist: tensorflow=={tf.__version__}\n" in metadata.read_text()
