"""The kernels for GPUs where there is no GPU: their source, compiled for a CPU, against the oracle and under
TensorFlow; where there is nvcc, what it reports of them. On a GPU: cuda_kernels.py and test_gpu.py.
"""

import os
import re
import subprocess
import sys
import textwrap
import types
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cuda_kernels
import pytest
import tensorflow as tf
from cuda_on_cpu import library

from tf_adam_variants import fused
from tf_adam_variants.fused import _build, _library

TESTS = Path(__file__).parent


def cuda():
    try:
        return _build.cuda_compiler(_build.compiler())
    except _build.BuildError as error:
        return str(error)


def has_compiler():
    try:
        return bool(_build.compiler())
    except _build.BuildError:
        return False


needs_compiler = pytest.mark.skipif(not has_compiler(), reason="no C++ compiler")
needs_nvcc = pytest.mark.skipif(not isinstance(cuda(), _build.Cuda), reason=f"no CUDA: {cuda()}")


def output_of(*command, **environment):
    done = subprocess.run(
        [*map(str, command)], env=os.environ | environment, capture_output=True, text=True, cwd=TESTS.parent
    )
    assert done.returncode == 0, f"{done.stdout[-5000:]}\n{done.stderr[-5000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def kernels_on_cpu(tmp_path_factory):
    return cuda_kernels.build(tmp_path_factory.mktemp("kernels"), on_cpu=True)


@needs_compiler
def test_the_kernels_against_the_oracle(kernels_on_cpu):
    kernels = cuda_kernels.Kernels(kernels_on_cpu)
    cuda_kernels.Checks(kernels, cuda_kernels.OnCpu(), quick=True).all()


def module(name, available):
    """One that finds a GPU, or not."""
    made = types.ModuleType(name)
    made.__version__, made.is_available = "1.0", lambda: available
    made.cuda = made
    return made


@pytest.mark.parametrize(
    ("nvcc", "torch", "cupy", "reason"),
    [
        (None, None, None, "CUDA's nvcc is neither on the PATH nor in /usr/local/cuda/bin"),
        ("nvcc", None, None, "there is neither PyTorch nor CuPy, for the GPU's memory"),
        ("nvcc", module("torch", False), None, "PyTorch 1.0 finds no GPU"),
        ("nvcc", None, module("cupy", False), "CuPy 1.0 finds no GPU"),
        ("nvcc", module("torch", False), module("cupy", False), "PyTorch 1.0 finds no GPU and CuPy 1.0"),
    ],
)
def test_what_the_checks_on_a_gpu_lack(nvcc, torch, cupy, reason, monkeypatch, capsys):
    monkeypatch.setattr(cuda_kernels, "nvcc", lambda: nvcc)
    monkeypatch.setitem(sys.modules, "torch", torch)  # None: it cannot be imported
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    assert cuda_kernels.main(["check"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert f": {reason}" in err
    assert "`check --on-cpu`" in err


@pytest.mark.skipif(bool(tf.config.list_physical_devices("GPU")), reason="there is a GPU")
def test_the_checks_on_a_gpu_end_with_a_sentence():
    command = [sys.executable, TESTS / "cuda_kernels.py", "check"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("The kernels cannot run on a GPU here: ")
    assert done.stderr.count("\n") == 1


@needs_compiler
def test_the_ops_with_the_kernels(tmp_path):
    """test_gpu.py, in a process of its own: ops can be loaded once."""
    library.build(tmp_path)
    output_of(
        *(sys.executable, "-m", "pytest", "-p", "no:xdist", "-p", "no:cacheprovider", TESTS / "test_gpu.py"),
        TF_ADAM_VARIANTS_CACHE=str(tmp_path),
        TFAV_TEST_DEVICE="CPU:0",
    )


@needs_nvcc
def test_what_nvcc_reports(tmp_path):
    """No kernel of ours keeps registers or arrays in memory, on any architecture of a default build."""
    made = cuda()
    units = [unit for unit in _build._cuda_units(_build.compiler(), made) if unit.source.endswith(".cu")]

    def report(unit):
        target = tmp_path / f"{unit.source}.o"
        command = [
            *unit.compiler,
            *unit.flags,
            "-Xptxas",
            "-v",
            "-c",
            _library.sources() / unit.source,
            "-o",
            target,
        ]
        return subprocess.run(command, check=True, capture_output=True, text=True).stderr

    with ThreadPoolExecutor(2) as pool:
        reports = "".join(pool.map(report, units))
    found = re.findall(
        r"Compiling entry function '(\S+)' for 'sm_(\d+)'\n.*\n +(\d+) bytes stack frame, (\d+) bytes spill",
        reports,
    )
    ours = [entry for entry in found if "4tfav" in entry[0] and not entry[0].startswith("_ZN3cub")]
    assert {architecture for _, architecture, _, _ in ours} == set(_build.CUDA_ARCHITECTURES)
    assert len(ours) > 100
    assert [entry for entry in ours if entry[2:] != ("0", "0")] == []


@needs_nvcc
def test_the_built_library_has_them():
    """They are registered, and call their own CUDA runtime, not TensorFlow's of the same names."""
    ops, path, build, _ = _library.found()
    assert ops
    assert build.cuda == str(cuda())
    program = """
        import sys
        import tensorflow as tf
        from tensorflow.python.framework import kernels
        tf.load_op_library(sys.argv[1])
        for name in ("DenseStep", "SparseStep", "SquaredNorm"):
            found = kernels.get_registered_kernels_for_op("TfAdamVariants>" + name).kernel
            print(sorted(kernel.device_type for kernel in found))
        """
    registered = output_of(sys.executable, "-c", textwrap.dedent(program), path)
    assert registered.splitlines() == ["['CPU', 'GPU']"] * 3
    names = output_of("nm", "-D", path)
    assert not re.search(r" _*cuda", names, re.IGNORECASE)
    assert "tfav_gpu_dense" in names


@needs_nvcc
@pytest.mark.skipif(bool(tf.config.list_physical_devices("GPU")), reason="there is a GPU")
def test_without_a_gpu_the_library_says_why():
    assert _library.gpu_reason() == "TensorFlow sees no GPU"
    assert f"GPU kernels: {cuda()}" in fused.status()
    assert "GPU: TensorFlow sees no GPU" in fused.status()
    assert "CUDA says of its device 3: " in _library._gpu_reason((3,))


@needs_compiler
def test_the_visible_gpus_are_asked(kernels_on_cpu, monkeypatch):
    """Of the stand-in's two, only the first has kernels."""
    found = _library.found()._replace(library=kernels_on_cpu)
    monkeypatch.setattr(_library, "found", lambda: found)
    gpus = ["first", "second"]
    monkeypatch.setattr(tf.config, "list_physical_devices", lambda kind: gpus)
    for visible, reason in {
        ("first",): "",
        ("second",): "device 1: no kernel image is available",
        ("first", "second"): "device 1: no kernel image is available",
        (): "TensorFlow sees no GPU",
    }.items():
        monkeypatch.setattr(tf.config, "get_visible_devices", lambda kind, visible=visible: visible)
        _library._gpu_reason.cache_clear()
        assert reason in _library.gpu_reason()
        assert bool(reason) == bool(_library.gpu_reason())
    _library._gpu_reason.cache_clear()


def test_a_library_without_them_says_so(monkeypatch):
    _, path, build, _ = _library.found()
    without = _library.Found("ops", path, build._replace(cuda="none (no nvcc)"), "")
    monkeypatch.setattr(_library, "found", lambda: without)
    monkeypatch.setattr(_library.ctypes, "CDLL", lambda path: object())
    assert "none (no nvcc). Where there is CUDA's nvcc, `python -m tf_adam_variants.fused build`" in (
        _library._gpu_reason.__wrapped__((0,))
    )


@needs_nvcc
def test_elements_are_moved_16_bytes_at_a_time(tmp_path):
    made = cuda()
    target = tmp_path / "dense.ptx"
    command = [*made.nvcc, "-std=c++17", "-arch=compute_80", "-ptx", _library.sources() / "gpu_dense.cu"]
    subprocess.run([*command, "-o", target], check=True)
    kernels = [
        part for part in target.read_text().split(".entry")[1:] if "elements" in part.partition("(")[0]
    ]
    assert len(kernels) == 74
    for kernel in kernels:  # two of 8 bytes, or four of 4; of half types alone, four of 2
        assert re.search(r"ld\.global\.(v2\.f64|v4\.[fu]32)", kernel)
        assert re.search(r"st\.global\.(v2\.f64|v4\.([fu]32|u16))", kernel)
