"""The kernels for GPUs without a GPU: compiled for a CPU, against the oracle and under TensorFlow.

Where there is nvcc, its reports are checked. On a GPU: cuda_kernels.py and test_gpu.py.
"""

import os
import re
import subprocess
import sys
import textwrap
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


@pytest.mark.slow
@needs_compiler
def test_the_kernels_and_the_ops_with_them(tmp_path):
    """The ops run in a separate process, since a process can load them only once."""
    folder = library.build(tmp_path)
    kernels = cuda_kernels.Kernels(library.kernels(folder))
    cuda_kernels.Checks(kernels, cuda_kernels.OnCpu(), quick=True).all()
    output_of(
        *(sys.executable, "-m", "pytest", "-p", "no:xdist", "-p", "no:cacheprovider"),
        *(TESTS / name for name in ("test_gpu.py", "test_coefficients.py")),
        TF_ADAM_VARIANTS_CACHE=str(tmp_path),
        TFAV_TEST_DEVICE="CPU:0",
    )


@needs_nvcc
@pytest.mark.slow
def test_what_nvcc_reports(tmp_path):
    """No kernel spills registers or has a stack frame, on any architecture of a default build."""
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


@pytest.mark.slow
@needs_nvcc
def test_the_built_library_has_them():
    """They are registered, and call their own CUDA runtime, not that of TensorFlow with the same names."""
    ops, path, build, _ = _library.find_library()
    assert ops
    assert build.cuda == str(cuda())
    program = """
        import sys
        import tensorflow as tf
        from tensorflow.python.framework import kernels
        tf.load_op_library(sys.argv[1])
        for name in ("DenseStep", "SparseStep", "SquaredNorm", "Coefficients"):
            found = kernels.get_registered_kernels_for_op("TfAdamVariants>" + name).kernel
            print(sorted(kernel.device_type for kernel in found))
        """
    registered = output_of(sys.executable, "-c", textwrap.dedent(program), path)
    assert registered.splitlines() == ["['CPU', 'GPU']"] * 4
    names = output_of("nm", "-D", path)
    assert not re.search(r" _*cuda", names, re.IGNORECASE)
    assert "tfav_gpu_dense" in names


@needs_nvcc
@pytest.mark.skipif(bool(tf.config.list_physical_devices("GPU")), reason="there is a GPU")
def test_without_a_gpu_the_library_says_why():
    assert "CUDA says of GPU 0: " in _library.gpu_reason()
    assert f"GPU kernels: {cuda()}" in fused.status()
    assert "GPU: CUDA says of GPU 0: " in fused.status()


@pytest.mark.skipif(bool(tf.config.list_physical_devices("GPU")), reason="there is a GPU")
def test_cuda_is_asked_for_the_gpu_that_is_visible(monkeypatch):
    class Ready:
        def __init__(self, path):
            self.tfav_gpu_error = lambda error: b"no kernel image"
            self.tfav_gpu_ready = lambda device: 209 if device == 1 else 0

    monkeypatch.setattr(_library.ctypes, "CDLL", Ready)
    _library._gpu_reason.cache_clear()
    gpus = [tf.config.PhysicalDevice(f"/physical_device:GPU:{number}", "GPU") for number in range(3)]
    monkeypatch.setattr(tf.config, "list_physical_devices", lambda kind: gpus)
    for visible, reason in (  # which can change after the first question
        (gpus[:1], ""),
        (gpus[1:2], "CUDA says of GPU 1: no kernel image"),
        (gpus, "CUDA says of GPU 1: no kernel image"),
        (gpus[2:], ""),
        ([], "TensorFlow is shown no GPU"),
    ):
        monkeypatch.setattr(tf.config, "get_visible_devices", lambda kind, visible=visible: visible)
        assert _library.gpu_reason().partition(". ")[0] == reason
    _library._gpu_reason.cache_clear()


@pytest.mark.skipif(bool(tf.config.list_physical_devices("GPU")), reason="there is a GPU")
def test_the_program_says_what_is_missing():
    for command in (["cuda_kernels.py", "check"], ["gpu_report.py"]):
        done = subprocess.run(
            [sys.executable, TESTS / "tools" / command[0], *command[1:]], capture_output=True, text=True
        )
        assert done.returncode == 2
        assert re.fullmatch(r"The kernels cannot run: .*--on-cpu` needs only.*\n", done.stderr)


def test_a_library_without_them_says_so(monkeypatch):
    _, path, build, _ = _library.find_library()
    without = _library.Found("ops", path, build._replace(cuda="none (no nvcc)"), "")
    monkeypatch.setattr(_library, "find_library", lambda: without)
    monkeypatch.setattr(_library.ctypes, "CDLL", lambda path: object())
    assert "none (no nvcc). Where there is CUDA's nvcc, `python -m tf_adam_variants.fused build`" in (
        _library._gpu_reason.__wrapped__((0,))
    )


@pytest.mark.slow
@needs_nvcc
def test_elements_are_moved_16_bytes_at_a_time(tmp_path):
    made = cuda()
    target = tmp_path / "dense.ptx"
    command = [*made.nvcc, "-std=c++17", "-arch=compute_80", "-ptx", _library.sources() / "gpu_dense.cu"]
    subprocess.run([*command, "-o", target], check=True)
    kernels = [
        part for part in target.read_text().split(".entry")[1:] if "update_chunks" in part.partition("(")[0]
    ]
    assert len(kernels) == 74
    for kernel in kernels:  # two of 8 bytes, four of 4; for half precision also four of 2
        assert re.search(r"ld\.global\.(v2\.f64|v4\.[fu]32)", kernel)
        assert re.search(r"st\.global\.(v2\.f64|v4\.([fu]32|u16))", kernel)
