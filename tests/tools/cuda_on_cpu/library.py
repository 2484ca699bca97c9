"""Builds the fused kernels with those for GPUs in place of those for CPUs, as a cache of libraries:

    python tests/tools/cuda_on_cpu/library.py FOLDER
    TF_ADAM_VARIANTS_CACHE=FOLDER python -m pytest tests/test_fused.py

This tests everything but CUDA: the way from TensorFlow's variables to the kernels, the arithmetic of the
kernels, their order, their scratch memory.
"""

import json
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import tensorflow as tf

from tf_adam_variants.fused import _build, _library

HERE = Path(__file__).parent


def build(cache):
    """Build into a new folder of this cache and return the folder."""
    folder = Path(cache, f"tf{tf.__version__}-on-cpu")
    folder.mkdir(parents=True)
    compiler = _build.compiler()
    units = {unit.source: unit for unit in _build._units(compiler)}
    with_tensorflow = [*units["ops.cc"].flags, "-O1", "-w", "-DTFAV_GPU_DEVICE=DEVICE_CPU"]
    kernels = ["-std=c++17", "-O2", "-fPIC", "-fvisibility=hidden", f"-I{HERE}"]
    kernels += ["-Wno-unknown-pragmas", "-x", "c++"]
    commands = {
        "ops.cc": with_tensorflow,
        "gpu_ops.cc": with_tensorflow,
        "gpu_dense.cu": kernels,
        "gpu_sparse.cu": kernels,
        "gpu_coefficients.cu": kernels,
        "loops.cc": ["-std=c++17", "-fPIC"],
        "dispatch.cc": ["-std=c++17", "-fPIC"],
    }

    def compile_one(source):
        target = folder / f"{source}.o"
        command = [*compiler, *commands[source], "-c", str(_library.sources() / source), "-o", str(target)]
        subprocess.run(command, check=True)
        return str(target)

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compile_one, commands))
    library = folder / _library.NAME
    subprocess.run(
        [*compiler, *_build._LINK, *objects, "-pthread", *tf.sysconfig.get_link_flags(), "-o", str(library)],
        check=True,
    )
    made = _library.Build(
        tf.__version__,
        sysconfig.get_platform(),
        _library.hash_sources(),
        _library.hash_file(library),
        "c++",
        "-O3",
        "now",
        "on a CPU",
    )
    (folder / "build.json").write_text(json.dumps(made._asdict()))
    return folder


def kernels(folder):
    """The kernels in this folder as a separate library without TensorFlow, for cuda_kernels.py."""
    alone = folder / "kernels.so"
    objects = sorted(map(str, folder.glob("gpu_*.cu.o")))
    subprocess.run([*_build.compiler(), "-shared", *objects, "-pthread", "-o", str(alone)], check=True)
    return alone


if __name__ == "__main__":
    build(sys.argv[1])
