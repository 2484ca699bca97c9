"""Checks the kernels for GPUs without TensorFlow. cuda_bench.py measures their speed.

    python tests/tools/cuda_kernels.py check           # needs an NVIDIA GPU, nvcc, NumPy, and PyTorch or CuPy
    python tests/tools/cuda_kernels.py check --on-cpu  # the same kernels, compiled for a CPU: cuda_on_cpu/

`check` compares steps with the oracle of the other tests (float64, from the papers): all types of variables
and gradients; random and special numbers; odd, unaligned, tiny and huge arrays; one variable and thousands;
sparse gradients with repeated indices. Every array lies between two stretches of poison, which no kernel may
write; scratch memory is poison at first; every step runs twice and must be bit-exact; gradients must not
change.
"""

import argparse
import ctypes
import itertools
import math
import shutil
import subprocess
import sys
import tempfile
import time
import types
from pathlib import Path
from typing import NamedTuple

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests" / "helpers"))
import oracle  # noqa: E402

SOURCES = [ROOT / "custom_ops" / name for name in ("gpu_dense.cu", "gpu_sparse.cu", "gpu_coefficients.cu")]
ON_CPU = Path(__file__).parent / "cuda_on_cpu"
POISON = 0xFF  # NaN in every type

# -- the library -----------------------------------------------------------------------------------------


def nvcc():
    return shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")


def build(folder, on_cpu=False, flags=()):
    """The kernels as a library without TensorFlow."""
    library = Path(folder, "kernels.so")
    if on_cpu:
        command = ["c++", "-std=c++17", "-O2", "-g", "-fPIC", "-fvisibility=hidden", "-shared", "-pthread"]
        command += ["-Wno-unknown-pragmas", f"-I{ON_CPU}", *flags, "-x", "c++"]
    else:
        command = [
            nvcc() or "nvcc",
            "-std=c++17",
            "-O3",
            "-arch=native",
            "-shared",
            "-Xcompiler",
            "-fPIC",
            *flags,
        ]
    subprocess.run([*command, *map(str, SOURCES), "-o", str(library)], check=True)
    return library


class VariableState(ctypes.Structure):
    """tfav::VariableState of variable_state.h."""

    _fields_ = [(name, ctypes.c_void_p) for name in ("w", "m", "v", "v_max", "master", "g")]
    _fields_ += [
        ("size", ctypes.c_int64),
        ("weight_decay", ctypes.c_bool),
        ("layer_adaptation", ctypes.c_bool),
        ("rng_stream", ctypes.c_uint32),
    ]


class KernelConfig(ctypes.Structure):
    """tfav::KernelConfig of variable_state.h."""

    _fields_ = [(name, ctypes.c_int) for name in ("variable", "gradient", "rounding")]
    _fields_ += [(name, ctypes.c_bool) for name in ("squared_gradient", "amsgrad", "trust_ratio")]


class Launch(ctypes.Structure):
    """tfav::GpuLaunch of gpu.h."""

    _fields_ = [("config", KernelConfig), ("coefficients_on_host", ctypes.c_bool)]
    _fields_ += [("coefficients", ctypes.c_void_p), ("scratch", ctypes.c_void_p)]
    _fields_ += [("scratch_bytes", ctypes.c_int64), ("stream", ctypes.c_void_p)]


class StepInputs(ctypes.Structure):
    """tfav::StepInputs of coefficients.h."""

    _fields_ = [
        (name, ctypes.c_void_p)
        for name in ("iterations", "float_rate", "double_rate", "gradient_scale", "rounding_seed")
    ]


class Kernels:
    """The functions of gpu.h. Those that launch kernels raise where CUDA returns an error."""

    def __init__(self, library):
        self.library = ctypes.CDLL(str(library))
        wide, pointer = ctypes.c_int64, ctypes.c_void_p
        launch, states = ctypes.POINTER(Launch), ctypes.POINTER(VariableState)
        self.library.tfav_gpu_error.restype = ctypes.c_char_p
        for name, arguments in {
            "dense": (states, wide, launch),
            "sparse": (states, wide, pointer, wide, ctypes.c_int, ctypes.c_int, launch),
            "squared_norm": (states, wide, pointer, launch),
            "coefficients": (ctypes.POINTER(ctypes.c_double), ctypes.POINTER(StepInputs), pointer, pointer),
            "copy": (pointer, pointer, wide, pointer),
            "ready": (ctypes.c_int,),
        }.items():
            setattr(self, name, self._raise_errors(name, arguments))
        for name, arguments in {
            "dense_scratch": (states, wide, launch),
            "sparse_scratch": (states, wide, wide, ctypes.c_int),
            "squared_norm_scratch": (states, wide),
        }.items():
            function = getattr(self.library, f"tfav_gpu_{name}")
            function.argtypes, function.restype = arguments, wide
            setattr(self, name, function)

    def _raise_errors(self, name, arguments):
        function = getattr(self.library, f"tfav_gpu_{name}")
        function.argtypes = arguments

        def call(*given):
            if error := function(*given):
                raise RuntimeError(f"{name}: {self.library.tfav_gpu_error(error).decode()} ({error})")

        return call


# -- memory ----------------------------------------------------------------------------------------------


class OnCpu:
    """The host's memory, for kernels that were compiled for it."""

    name = "the CPU"
    stream = None

    def allocate(self, size):
        buffer = np.full(size + 16, POISON, np.uint8)
        return buffer[-buffer.ctypes.data % 16 :][:size]

    zeros = staticmethod(lambda size: np.zeros(size, np.uint8))
    address = staticmethod(lambda buffer: buffer.ctypes.data)
    write = staticmethod(lambda buffer, data: buffer.__setitem__(slice(None), data))
    read = staticmethod(lambda buffer: buffer.copy())
    free_bytes = staticmethod(lambda: 0)


class WithTorch:
    """A GPU's memory through PyTorch."""

    def __init__(self):
        import torch

        self.torch = torch
        self.name = torch.cuda.get_device_name()
        self.stream = torch.cuda.current_stream().cuda_stream

    def allocate(self, size):
        return self.torch.full((size,), POISON, dtype=self.torch.uint8, device="cuda")

    def zeros(self, size):
        return self.torch.zeros(size, dtype=self.torch.uint8, device="cuda")

    def free_bytes(self):
        return self.torch.cuda.mem_get_info()[0]

    address = staticmethod(lambda buffer: buffer.data_ptr())
    read = staticmethod(lambda buffer: buffer.cpu().numpy())

    def write(self, buffer, data):
        buffer.copy_(self.torch.from_numpy(data))


class WithCupy:
    """A GPU's memory through CuPy."""

    def __init__(self):
        import cupy

        self.cupy = cupy
        self.name = cupy.cuda.runtime.getDeviceProperties(0)["name"].decode()
        self.stream = cupy.cuda.get_current_stream().ptr

    def allocate(self, size):
        return self.cupy.full(size, POISON, self.cupy.uint8)

    def zeros(self, size):
        return self.cupy.zeros(size, self.cupy.uint8)

    def free_bytes(self):
        return self.cupy.cuda.runtime.memGetInfo()[0]

    address = staticmethod(lambda buffer: buffer.data.ptr)
    read = staticmethod(lambda buffer: buffer.get())
    write = staticmethod(lambda buffer, data: buffer.set(data))


class Cuts(NamedTuple):
    """As in the .cu files: elements per chunk, variables per launch, the number of chunks from which norms
    are summed in groups, sorted indices per window.
    """

    chunk: int
    variables: int
    many_chunks: int
    window: int


CUTS_ON_GPU, CUTS_ON_CPU = Cuts(4096, 448, 4096, 128), Cuts(512, 60, 128, 4)


class CannotRunError(Exception):
    """The message says what is missing."""


def on_gpu():
    """The class that allocates memory of the first GPU. Nothing is allocated yet."""
    try:
        import torch
    except ImportError:
        try:
            import cupy
        except ImportError:
            raise CannotRunError("neither PyTorch nor CuPy can be imported") from None
        try:
            cupy.cuda.runtime.getDeviceCount()
        except cupy.cuda.runtime.CUDARuntimeError as error:
            raise CannotRunError(f"CuPy finds no GPU ({error})") from None
        return WithCupy
    if not torch.cuda.is_available():
        raise CannotRunError("PyTorch finds no GPU")
    return WithTorch


def check_that_they_can_run(library=None):
    """The class that allocates memory of the first GPU. Raises without a GPU, or without nvcc and library."""
    memory = on_gpu()
    if not (library or nvcc()):
        raise CannotRunError("there is no nvcc on the PATH or in /usr/local/cuda/bin")
    return memory


class DType(NamedTuple):
    """A type of elements: its NumPy type (for bfloat16 that of its bits), and half its spacing at 1."""

    number: int
    storage: type
    rounding: float

    @property
    def slot(self):
        return DOUBLE if self is DOUBLE else FLOAT

    def round(self, values):
        """The nearest numbers of this type, as NumPy stores them."""
        if self is not BFLOAT16:
            with np.errstate(over="ignore"):
                return np.asarray(values, self.storage)
        bits = np.atleast_1d(np.asarray(values, np.float32)).view(np.uint32)
        rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
        return np.where(np.isnan(values), 0x7FC0, rounded).astype(np.uint16)

    def to_float64(self, stored):
        if self is BFLOAT16:
            return (stored.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
        return stored.astype(np.float64)


HALF, BFLOAT16 = DType(0, np.float16, 2.0**-11), DType(1, np.uint16, 2.0**-8)
FLOAT, DOUBLE = DType(2, np.float32, 2.0**-24), DType(3, np.float64, 2.0**-53)
NAMES = {HALF: "float16", BFLOAT16: "bfloat16", FLOAT: "float32", DOUBLE: "float64"}
ROUNDINGS = NEAREST, STOCHASTIC, MASTER = range(3)  # tfav::Rounding
PAIRS = [
    (FLOAT, FLOAT),
    (DOUBLE, DOUBLE),
    (HALF, HALF),
    (BFLOAT16, BFLOAT16),
    (HALF, FLOAT),
    (BFLOAT16, FLOAT),
]


class Array:
    """Elements in the device's memory, between two stretches of poison."""

    MARGIN = 64

    def __init__(self, memory, elements, shift=0):
        """shift: the distance from an address that is a multiple of 16, in elements."""
        self.memory, self.elements = memory, elements
        self.begin = self.MARGIN + int(shift) * elements.itemsize
        self.buffer = memory.allocate(self.begin + elements.nbytes + self.MARGIN)
        data = np.full(self.begin + elements.nbytes + self.MARGIN, POISON, np.uint8)
        data[self.begin : self.begin + elements.nbytes] = (
            np.ascontiguousarray(elements).reshape(-1).view(np.uint8)
        )
        memory.write(self.buffer, data)
        self.address = memory.address(self.buffer) + self.begin

    def read(self):
        data = self.memory.read(self.buffer)
        assert (data[: self.begin] == POISON).all(), "written before the beginning"
        assert (data[self.begin + self.elements.nbytes :] == POISON).all(), "written beyond the end"
        return (
            data[self.begin : self.begin + self.elements.nbytes]
            .view(self.elements.dtype)
            .reshape(self.elements.shape)
        )


# -- what is checked -------------------------------------------------------------------------------------

DEFAULTS = {"beta_1": 0.9, "beta_2": 0.99, "epsilon": 1e-6}
RNG_KEY = 0xFEDCBA98


class Case(NamedTuple):
    """A rule of the oracle with its terms."""

    name: str
    rule: object
    terms: dict = types.MappingProxyType({})

    @property
    def all_terms(self):
        return ({"nu_1": 1.0, "nu_2": 1.0} if self.rule is oracle.qhadam else {}) | DEFAULTS | self.terms

    @property
    def lamb(self):
        return self.rule is oracle.lamb

    @property
    def amsgrad(self):
        return self.terms.get("amsgrad", False)

    @property
    def squared_gradient(self):
        return self.terms.get("nu_2", 1.0) != 1

    def coefficients(self, t, rate, decay, scale):
        """The coefficients of step t: struct Coefficients of adam_math.h, in its order."""
        b1, b2, epsilon = (self.all_terms[name] for name in DEFAULTS)
        nu_1, nu_2 = self.terms.get("nu_1", 1.0), self.terms.get("nu_2", 1.0)
        corrected = self.terms.get("bias_correction", True)
        c1, c2 = (1 - b1**t, 1 - b2**t) if corrected else (1.0, 1.0)
        factor = 1.0 if self.lamb else rate
        if nu_2 == 1:  # numerator and denominator times sqrt(c2)
            k = math.sqrt(c2)
            direction = [k * factor * nu_1 / c1, k * factor * (1 - nu_1), 1.0, 0.0, k * epsilon]
        else:
            direction = [factor * nu_1 / c1, factor * (1 - nu_1), nu_2 / c2, 1 - nu_2, epsilon]
        m_weight = 1 - b1 if self.terms.get("grad_averaging", True) else 1.0
        low, high = self.terms.get("trust_ratio_min"), self.terms.get("trust_ratio_max")
        bounds = [0.0 if low is None else low, math.inf if high is None else high]
        first = [scale, 1.0, 1 - b1, m_weight, 1.0, 1 - b2, 1 - b2]
        return np.array([*first, *direction, decay, rate, *bounds, RNG_KEY])

    def config(self, variable):
        return KernelConfig(
            variable.type.number, variable.gradient.number, variable.rounding,
            self.squared_gradient, self.amsgrad, self.lamb,
        )  # fmt: skip


CASES = [
    Case("AdamW", oracle.adamw),
    Case("AdamW amsgrad", oracle.adamw, {"amsgrad": True}),
    Case("QHAdam", oracle.qhadam, {"nu_1": 0.7}),
    Case("QHAdam nu_2", oracle.qhadam, {"nu_1": 0.8, "nu_2": 0.6}),
    Case("LAMB", oracle.lamb),
    Case("LAMB plain", oracle.lamb, {"bias_correction": False, "grad_averaging": False}),
    Case("LAMB bounded", oracle.lamb, {"trust_ratio_min": 0.3, "trust_ratio_max": 0.6}),
]


ARRAYS = ("w", "m", "v", "v_max", "master", "g")
ALIGNED = (0,) * len(ARRAYS)


class Variable:
    """One variable before a step, in its types."""

    def __init__(
        self, rng, type_, gradient, size, weight_decay=True, layer_adaptation=True, draw=None,
        rounding=NEAREST, rng_stream=0,
    ):  # fmt: skip
        self.rounding, self.rng_stream = rounding, rng_stream
        draw = draw or (lambda: rng.normal(size=size))
        self.type, self.gradient, self.weight_decay, self.layer_adaptation = (
            type_,
            gradient,
            weight_decay,
            layer_adaptation,
        )
        slot = type_.slot
        self.w = type_.round(draw())
        self.m = slot.round(0.1 * draw())
        self.v = slot.round(0.01 + np.abs(draw()))
        self.v_max = slot.round(slot.to_float64(self.v) * 1.01)
        self.g = gradient.round(draw())
        # Most weights are their master's rounding; some were assigned.
        near = type_.to_float64(self.w) * (1 + 0.4 * type_.rounding * rng.uniform(-1, 1, self.w.shape))
        assigned = rng.uniform(size=self.w.shape) < 0.2
        self.master = slot.round(np.where(assigned, rng.normal(size=self.w.shape), near))

    def arrays(self, memory, amsgrad, shifts=ALIGNED):
        absent = {"v_max": not amsgrad, "master": self.rounding != MASTER}
        return [
            None if absent.get(name) else Array(memory, getattr(self, name), shift)
            for name, shift in zip(ARRAYS, shifts, strict=True)
        ]

    def state(self, arrays):
        addresses = [None if array is None else array.address for array in arrays]
        return VariableState(
            *addresses, self.w.size, self.weight_decay, self.layer_adaptation, self.rng_stream
        )

    def weights(self):
        """The weights before the step."""
        w = self.type.to_float64(self.w)
        if self.rounding != MASTER:
            return w
        rounded = self.type.to_float64(self.type.round(self.master))
        return np.where(rounded == w, self.type.slot.to_float64(self.master), w)

    def expected(self, case, t, rate, decay, scale, g=None):
        """The oracle's w, m, v and largest v after the step, each with a tolerance for rounding."""
        slot = self.type.slot
        ulp = 2 * slot.rounding
        w, m, v = self.weights(), slot.to_float64(self.m), slot.to_float64(self.v)
        g = scale * (self.gradient.to_float64(self.g) if g is None else g)
        terms = dict(case.all_terms)
        decay = decay if self.weight_decay else 0.0
        weighed = decay if case.lamb else decay * rate
        if case.lamb:
            terms["adapted"] = self.layer_adaptation
        slots = {"m": m, "v": v} | ({"vhat": slot.to_float64(self.v_max)} if case.amsgrad else {})
        with np.errstate(all="ignore"):
            want = case.rule(w, g, t, slots, rate, weighed, **terms)
            # The same without cancellation: rounding errors are relative to these.
            sizes = {"m": np.abs(m), "v": v} | ({"vhat": slot.to_float64(self.v_max)} if case.amsgrad else {})
            if case.lamb:
                terms["adapted"] = False
                moved = case.rule(w, g, t, {"m": m, "v": v}, rate, weighed, **terms) - w
                taken = np.sqrt(np.sum((want - w) ** 2) / max(np.sum(moved**2), 1e-300))
                u = rate * weighed * np.abs(w)
                most = taken * (np.abs(case.rule(0 * w, np.abs(g), t, sizes, rate, 0.0, **terms)) + u)
            else:
                most = np.abs(case.rule(0 * w, np.abs(g), t, sizes, rate, 0.0, **terms)) + weighed * np.abs(w)
        ulps = 8 + (math.sqrt(w.size) if case.lamb and slot is DOUBLE else 0)
        smallest = 6e-8 if self.type is HALF else 1e-37
        largest = np.maximum(np.abs(w), np.abs(want))
        room = ulps * ulp * most + ulp * largest
        tops = slots.get("vhat", slots["v"])
        rounding = self.type.rounding * (2 if self.rounding == STOCHASTIC else 1)
        return {
            "w": (want, room + rounding * largest + smallest),
            "master": (want, room + 1e-37),
            "m": (slots["m"], 4 * ulp * sizes["m"] + 1e-37),
            "v": (slots["v"], 4 * ulp * slots["v"] + 1e-37),
            "v_max": (tops, 4 * ulp * tops + 1e-37),
        }


class Checks:
    """All checks of one library with the memory of one device."""

    def __init__(self, kernels, memory, quick=False):
        self.kernels, self.memory, self.quick = kernels, memory, quick
        self.on_cpu = isinstance(memory, OnCpu)
        self.cuts = CUTS_ON_CPU if self.on_cpu else CUTS_ON_GPU
        self.rng = np.random.default_rng(1)

    # Runs a step of `variables` and returns their arrays after it.
    def step(
        self, case, variables, coefficients, shifts=None, on_host=False, poison=POISON, indices=None, **rows
    ):
        arrays = [
            x.arrays(self.memory, case.amsgrad, shifts[i] if shifts else ALIGNED)
            for i, x in enumerate(variables)
        ]
        states = (VariableState * len(variables))(
            *(x.state(a) for x, a in zip(variables, arrays, strict=True))
        )
        given = Array(OnCpu() if on_host else self.memory, coefficients)
        launch = Launch(case.config(variables[0]), on_host, given.address, None, 0, self.memory.stream)
        if indices is None:
            needed = self.kernels.dense_scratch(states, len(variables), launch)
        else:
            values = Array(self.memory, rows["values"], rows.get("shift", 0))
            index_array = Array(self.memory, indices)
            states[0].g = values.address
            needed = self.kernels.sparse_scratch(states, rows["rows"], indices.size, rows["exact"])
        scratch = Array(self.memory, np.full(needed, poison, np.uint8))
        launch.scratch, launch.scratch_bytes = scratch.address, needed
        if indices is None:
            self.kernels.dense(states, len(variables), launch)
        else:
            wide = indices.dtype == np.int64
            self.kernels.sparse(
                states, rows["rows"], index_array.address, indices.size, wide, rows["exact"], launch
            )
            assert (values.read() == rows["values"]).all(), "a gradient was written"
            assert (index_array.read() == indices).all(), "the indices were written"
        scratch.read()  # checks its margins
        after = [[None if a is None else a.read() for a in own] for own in arrays]
        for x, own in zip(variables, after, strict=True):
            assert own[-1].tobytes() == x.g.tobytes(), "a gradient was written"
        return after

    def step_twice(self, case, variables, coefficients, **options):
        first = self.step(case, variables, coefficients, **options)
        again = self.step(case, variables, coefficients, **options, poison=0x5A)
        for a, b in zip(first, again, strict=True):
            for x, y in zip(a, b, strict=True):
                assert x is None or x.tobytes() == y.tobytes(), "other bits the second time"
        return first

    def compare(self, case, variable, after, expected, where=slice(None)):
        slot = variable.type.slot
        for name, stored in zip(ARRAYS[:-1], after, strict=False):
            if stored is None:
                continue
            type_ = variable.type if name == "w" else slot
            have = type_.to_float64(stored)[where]
            want, room = (values[where] for values in expected[name])
            if type_ is HALF:  # larger numbers are inf
                have, want = np.clip(have, -65504, 65504), np.clip(want, -65504, 65504)
            wrong = ~(np.abs(have - want) <= room)
            if wrong.any():
                i = np.flatnonzero(wrong.reshape(-1))[0]
                raise AssertionError(
                    f"{case.name}, {NAMES[variable.type]}: {name}[{i}] of {have.size} is "
                    f"{have.reshape(-1)[i]!r}, not {want.reshape(-1)[i]!r} within {room.reshape(-1)[i]:.3g} "
                    f"({wrong.sum()} such)"
                )

    def coefficients(self):
        """Early and late steps, with and without the optional inputs."""
        seed = 0xFEDCBA98
        for case, t, given in itertools.product(CASES, (1, 2, 1000, 10**7), (False, True)):
            rate, scale, peak = (0.125, 0.3, 0.5) if given else (np.float32(0.1), 1.0, 0.0)
            numbers = {"iterations": np.int64(t - 1), "double_rate" if given else "float_rate": rate}
            if given:
                numbers |= {"gradient_scale": scale, "rounding_seed": np.uint32(seed)}
            arrays = {name: Array(self.memory, np.array([x])) for name, x in numbers.items()}
            inputs = StepInputs(**{name: array.address for name, array in arrays.items()})
            static = case.coefficients(math.inf, 1.0, 0.25, 1.0)  # late, when the bias corrections are 1
            static[-1] = 0.0
            logs = [math.log(case.all_terms[name]) for name in ("beta_1", "beta_2")]
            if not case.terms.get("bias_correction", True):
                logs = [-math.inf] * 2
            static = np.array([*static, *logs, peak, case.lamb])
            result = Array(self.memory, np.full(17, np.nan))
            address = static.ctypes.data_as(ctypes.POINTER(ctypes.c_double))
            self.kernels.coefficients(address, inputs, result.address, self.memory.stream)
            want = case.coefficients(t, float(rate), 0.25 * float(rate) / peak if peak else 0.25, scale)
            want[-1] = oracle.rounding_key(seed, t - 1) if given else 0.0
            # In `want`, 1 - beta^t cancels: two digits for a beta of 0.99.
            np.testing.assert_allclose(result.read(), want, rtol=1e-13)
            for name, array in arrays.items():
                assert array.read() == numbers[name], "an input was written"

    def dense(self):
        """Sizes around those of packs, chunks, batches; aligned or not, with decay and adaptation or not."""
        sizes = [0, 1, 3, 4, 8, 17, 511, 512, 513, 1025] + ([] if self.quick else [4095, 4096, 4097, 20011])
        for case, (type_, gradient), rounding in itertools.product(CASES, PAIRS, ROUNDINGS):
            if rounding != NEAREST and type_ not in (HALF, BFLOAT16):
                continue
            variables = [
                Variable(
                    self.rng,
                    type_,
                    gradient,
                    size,
                    i % 2 == 0,
                    i % 3 != 0,
                    rounding=rounding,
                    rng_stream=3 * i + 1,
                )
                for i, size in enumerate(sizes)
            ]
            for shifted, on_host in (False, False), (True, True):
                shifts = [self.rng.integers(0, 3, len(ARRAYS)) * shifted for _ in sizes]
                self.dense_step(case, variables, 3, 0.125, 0.25, 0.5, shifts=shifts, on_host=on_host)

    def dense_step(self, case, variables, t, rate, decay, scale, **options):
        weighed = decay if case.lamb else decay * rate
        after = self.step_twice(case, variables, case.coefficients(t, rate, weighed, scale), **options)
        for x, own in zip(variables, after, strict=True):
            if x.w.size:
                expected = x.expected(case, t, rate, decay, scale)
                self.compare(case, x, own, expected)
                self.check_rounding(case, x, own, expected, np.arange(x.w.size))
            else:
                assert own[0].size == 0

    def check_rounding(self, case, x, after, expected, elements):
        """Half precision: bit-exact, except where the last bit of float32 decides."""
        w, master = after[0], after[4]
        if x.rounding == MASTER:
            assert w.tobytes() == x.type.round(master).tobytes(), "not the master weight's rounding"
        if x.rounding == STOCHASTIC:
            want, room = expected["master"]  # before it is rounded
            low, high = (
                oracle.rounded_at_random(
                    np.float32(value), NAMES[x.type], RNG_KEY, x.rng_stream, elements.reshape(want.shape)
                )
                for value in (want - room, want + room)
            )
            sure = low == high
            wrong = sure & (x.type.to_float64(w) != low)
            assert not wrong.any(), (case.name, NAMES[x.type], np.flatnonzero(wrong)[:5])
            assert sure.mean() > 0.9 or x.w.size < 100 or case.lamb, sure.mean()

    def many_variables(self):
        """More variables than one launch updates, of all sizes, with decay and adaptation or not."""
        count = 140 if self.quick else 2500
        for case in CASES:
            variables = [
                Variable(self.rng, FLOAT, FLOAT, int(self.rng.integers(0, 40)), i % 3 != 0, i % 2 == 0)
                for i in range(count)
            ]
            self.dense_step(case, variables, 1, 0.125, 0.25, 1.0)
        self.step(CASES[0], [Variable(self.rng, FLOAT, FLOAT, 0)], CASES[0].coefficients(1, 0.1, 0.0, 1.0))

    def magnitudes(self):
        """Gradients from 1e-18 to 1e18, and weights of unrelated magnitude."""
        for case, type_ in itertools.product(CASES, (FLOAT, BFLOAT16, DOUBLE)):
            draw = lambda: self.rng.normal(size=3000) * 10.0 ** self.rng.uniform(-18, 18, 3000)  # noqa: E731
            x = Variable(self.rng, type_, type_.slot, 3000, draw=draw)
            x.m, x.v = x.m * 0, x.v * 0
            x.v_max = x.v
            after = self.step_twice(case, [x], case.coefficients(1, 0.125, 0.0, 1.0))
            self.compare(case, x, after[0], x.expected(case, 1, 0.125, 0.0, 1.0))

    def special_values(self):
        """Zeros, denormals, inf and NaN: the result of IEEE 754 arithmetic, element by element."""
        specials = [0.0, -0.0, 1e-40, 6e-8, 3e4, 1e30, np.inf, -np.inf, np.nan, 1.0, -2.0]
        pairs = np.array(list(itertools.product(specials, specials)))
        for case, type_ in itertools.product(CASES[:4], (HALF, BFLOAT16, FLOAT, DOUBLE)):
            x = Variable(self.rng, type_, type_, len(pairs), weight_decay=False)
            with np.errstate(all="ignore"):
                x.w, x.g = type_.round(pairs[:, 0]), type_.round(pairs[:, 1])
                s = case.coefficients(2, 0.125, 0.0, 1.0).astype(type_.slot.storage)
                m_decay, m_weight, v_weight = s[2], s[3], s[6]
                c_m, c_g, c_v, c_g2, epsilon = s[7:12]
                read = lambda stored, t=type_: t.to_float64(stored).astype(t.slot.storage)  # noqa: E731
                w, g, m, v = read(x.w), read(x.g), x.m, x.v
                m = m + (m_weight * g - m_decay * m)
                v = v + v_weight * (g * g - v)
                largest = np.where(x.v_max >= v, x.v_max, v) if case.amsgrad else v
                squared = c_v * largest + c_g2 * (g * g) if case.squared_gradient else largest
                want = w - (c_m * m + c_g * g) / (np.sqrt(squared) + epsilon)
                want = type_.to_float64(type_.round(want))
            have = self.step_twice(case, [x], case.coefficients(2, 0.125, 0.0, 1.0))[0]
            np.testing.assert_allclose(
                type_.to_float64(have[0]),
                want,
                rtol=4 * type_.rounding + 4e-6,
                atol=6e-8 if type_ is HALF else 1e-30,
            )
        for bad in (np.nan, np.inf):  # LAMB: the norm spreads it to all elements
            x = Variable(self.rng, FLOAT, FLOAT, 1500)
            x.g[700] = bad
            have = self.step_twice(CASES[4], [x], CASES[4].coefficients(2, 0.125, 0.1, 1.0))[0]
            assert np.isnan(have[0][700])

    def sparse(self):
        """Indices that repeat, none, out of range, out of order; lazy and exact."""
        pairs = [(*pair, NEAREST) for pair in (PAIRS[:1] if self.quick else PAIRS)]
        pairs += [(HALF, HALF, STOCHASTIC), (BFLOAT16, FLOAT, MASTER)]
        for case, (type_, gradient, rounding) in itertools.product(CASES, pairs):
            widths = (
                (1, 3, 64, 300) if self.quick else (1, 3, 64, 300, 5000, 5001)
            )  # the last two: several spans
            for width, exact in itertools.product(widths, (False, True)):
                count = 211 if width < 300 else 23 if width == 300 else 11
                x = Variable(self.rng, type_, gradient, (count, width), rounding=rounding, rng_stream=5)
                x.g = x.g[:0]
                for pattern, indices in enumerate(
                    (
                        self.rng.integers(0, count // 2, 2 * count),
                        np.array([count, 0, -1, 7, 7 - 256, 7, 2**40, 7 + 2**40, 7, count + 3], np.int64),
                        np.zeros(0, np.int64),
                        np.full(9, count - 1),
                        np.arange(count)[::-1],
                        # One that repeats so often that it is summed in parts.
                        self.rng.permutation(
                            np.append(np.full(5 * self.cuts.window + 2, 7), np.arange(count))
                        ),
                    )
                ):
                    indices = np.ascontiguousarray(indices, np.int64 if pattern % 2 == 1 else np.int32)
                    values = gradient.round(self.rng.normal(size=(indices.size, width)))
                    self.sparse_step(case, x, indices, values.reshape(indices.size, width), exact)

    def wide_rows(self):
        """Few rows of many spans, in packs or not: by the width, by the address of gradient or variable."""
        few, wide = (3, 9 * 64) if self.quick else (8, 100 * 2048)
        pairs = [(FLOAT, FLOAT, NEAREST), (DOUBLE, DOUBLE, NEAREST), (BFLOAT16, FLOAT, MASTER)]
        for case, (type_, gradient, rounding) in itertools.product([CASES[i] for i in (0, 1, 3, 4)], pairs):
            for width, exact in itertools.product((wide, wide + 2, wide - 7), (False, True)):
                x = Variable(self.rng, type_, gradient, (few, width), rounding=rounding, rng_stream=5)
                x.g = x.g[:0]
                indices = np.array([few - 1, 0, few - 1, few])
                values = gradient.round(self.rng.normal(size=(indices.size, width)))
                for shifts in {"shift": 0}, {"shift": 1}, {"shift": 0, "shifts": [(0, 0, 1, 0, 0, 0)]}:
                    self.sparse_step(case, x, indices, values, exact, **shifts)

    def hot_id(self):
        """One index that repeats more often than all others: alone, among others, and out of range."""
        count, wide = (103, 64 + 8) if self.quick else (100_003, 64)
        for case, (type_, gradient) in itertools.product((CASES[0], CASES[4]), PAIRS):
            for width, exact in itertools.product((3, wide), (False, True)):
                x = Variable(self.rng, type_, gradient, (7, width))
                x.g = x.g[:0]
                mixed = np.where(self.rng.uniform(size=count) < 0.9, 2, self.rng.integers(0, 7, count))
                for indices in np.full(count, 3), mixed, np.where(mixed == 2, 7, mixed):
                    values = gradient.round(self.rng.integers(-8, 9, (count, width)) / 8)  # exact sums
                    self.sparse_step(case, x, indices, values, exact, shift=0)

    def sparse_step(self, case, x, indices, values, exact, **shifts):
        rows, width = x.w.shape
        valid = (indices >= 0) & (indices < rows)
        g = np.zeros((rows, width))
        np.add.at(g, indices[valid], x.gradient.to_float64(values)[valid])
        summed = self.sum_rows(indices, x.gradient.to_float64(values).astype(x.type.slot.storage), rows)
        assert np.allclose(summed, g, atol=1e-4)
        shifts = shifts or {"shift": self.rng.integers(0, 3)}
        c = case.coefficients(2, 0.125, 0.25 if case.lamb else 0.25 * 0.125, 1.0)
        after = self.step_twice(
            case, [x], c, indices=indices, values=values, rows=rows, exact=exact, **shifts
        )[0]
        named = np.unique(indices[valid])
        whole, touched = x, np.ones(rows, bool)
        if not exact:
            touched = np.isin(np.arange(rows), named)
            for have, before in zip(after[:3], (x.w, x.m, x.v), strict=True):
                assert have[~touched].tobytes() == before[~touched].tobytes(), "a row without an index"
            whole = Variable(self.rng, x.type, x.gradient, 0, rounding=x.rounding, rng_stream=x.rng_stream)
            for name in ARRAYS[:-1]:
                setattr(whole, name, getattr(x, name)[named])
            summed = summed[named]
        if touched.any():
            expected = whole.expected(case, 2, 0.125, 0.25, 1.0, g=summed.astype(np.float64))
            after = [None if a is None else a[touched] for a in after[:-1]]
            self.compare(case, x, after, expected)
            elements = np.arange(x.w.size).reshape(x.w.shape)[touched]
            self.check_rounding(case, whole, after, expected, elements)

    def sum_rows(self, indices, values, rows):
        """Sum the values of each row in their type and order, each window of sorted indices first."""
        keys = np.where((indices >= 0) & (indices < rows), indices, rows)
        order = np.argsort(keys, kind="stable")
        keys, values = keys[order], values[order]
        of_windows = np.zeros((len(keys) // self.cuts.window, *values.shape[1:]), values.dtype)
        for i in range(len(of_windows) * self.cuts.window):
            of_windows[i // self.cuts.window] += values[i]
        sums = np.zeros((rows, *values.shape[1:]), values.dtype)
        for row in np.unique(keys[keys < rows]):
            begin, end = np.searchsorted(keys, row), np.searchsorted(keys, row, "right")
            first, last = -(-begin // self.cuts.window), end // self.cuts.window  # the windows in between
            parts = [values[begin:end]]
            if first < last:
                before, behind = (
                    values[begin : first * self.cuts.window],
                    values[last * self.cuts.window : end],
                )
                parts = [before, of_windows[first:last], behind]
            for value in np.concatenate(parts):
                sums[row] += value
        return sums

    def many_chunks(self):
        """So many chunks that their norms are summed in groups, which may span variables."""
        many = self.cuts.many_chunks * self.cuts.chunk
        for sizes in ([many + 3], [5 * self.cuts.chunk, many // 2 + 7, 3, many // 2 + 5]):
            variables = [Variable(self.rng, FLOAT, FLOAT, size, i % 2 == 0) for i, size in enumerate(sizes)]
            self.dense_step(CASES[4], variables, 2, 0.125, 0.25, 1.0)
            self.norm_of(FLOAT, sizes)

    def an_old_driver(self):
        """Before CUDA 12.1 the driver accepts only kernels with few parameters: smaller batches."""
        if not self.on_cpu:
            return
        driver = ctypes.c_int.in_dll(self.kernels.library, "cuda_on_cpu_driver")
        driver.value, newest = 12000, driver.value
        try:
            self.many_variables()
            self.norm_of(FLOAT, [3] * 70)
        finally:
            driver.value = newest

    def ready(self):
        """`ready` checks the given device, and the current device does not change."""
        self.kernels.ready(0)
        if not self.on_cpu:
            return
        for device, message in (1, "no kernel image"), (2, "invalid device"):
            text = f"device {device} is ready"
            try:
                self.kernels.ready(device)
            except RuntimeError as error:
                text = str(error)
            assert message in text, text
        assert self.kernels.library.cuda_on_cpu_device() == 0

    def squared_norm(self):
        for type_ in (HALF, BFLOAT16, FLOAT, DOUBLE):
            for sizes in ([5], [0], [0, 1, 17, 512, 40000], [3] * (100 if self.quick else 1200)):
                self.norm_of(type_, sizes)

    def norm_of(self, type_, sizes):
        variables = [Variable(self.rng, type_, type_, size) for size in sizes]
        arrays = [Array(self.memory, x.g, i % 3) for i, x in enumerate(variables)]
        states = (VariableState * len(sizes))(
            *(VariableState(g=a.address, size=a.elements.size) for a in arrays)
        )
        launch = Launch(KernelConfig(gradient=type_.number), stream=self.memory.stream)
        needed = self.kernels.squared_norm_scratch(states, len(sizes))
        scratch = Array(self.memory, np.full(needed, POISON, np.uint8))
        launch.scratch, launch.scratch_bytes = scratch.address, needed
        want = sum(np.sum(type_.to_float64(x.g) ** 2) for x in variables)
        results = []
        for _ in range(2):
            result = Array(self.memory, np.full(1, np.nan))
            self.kernels.squared_norm(states, len(sizes), result.address, launch)
            results.append(result.read()[0])
        scratch.read()
        assert results[0] == results[1]
        assert abs(results[0] - want) <= 1e-12 * want, (results, want)

    def errors(self):
        """Invalid input is an error before anything is written."""
        case = CASES[4]
        x = Variable(self.rng, FLOAT, FLOAT, 100)
        states = (VariableState * 1)(x.state(x.arrays(self.memory, False)))
        coefficients = Array(self.memory, case.coefficients(1, 0.1, 0.0, 1.0))
        wrong = {
            "without scratch": case.config(x),
            "types": KernelConfig(FLOAT.number, DOUBLE.number),
            "rounding": KernelConfig(FLOAT.number, FLOAT.number, STOCHASTIC),
        }
        for what, config in wrong.items():
            try:
                self.kernels.dense(states, 1, Launch(config, False, coefficients.address))
            except RuntimeError:
                continue
            raise AssertionError(f"no error {what}")

    def empty_rows(self):
        for shape in (0, 3), (5, 0):
            x = Variable(self.rng, FLOAT, FLOAT, shape)
            x.g = x.g[:0]
            indices, values = np.zeros(2, np.int64), np.zeros((2, shape[1]), np.float32)
            for case in CASES:
                c = case.coefficients(1, 0.1, 0.0, 1.0)
                self.step(case, [x], c, indices=indices, values=values, rows=shape[0], exact=True)

    def copy(self):
        source = Array(self.memory, self.rng.normal(size=1001))
        target = Array(self.memory, np.zeros(1001), shift=1)
        self.kernels.copy(target.address, source.address, 8008, self.memory.stream)
        assert (target.read() == source.elements).all()

    def huge(self):
        """The last elements of an array of more than 2^31. On a CPU the blocks before them do not run."""
        case, size, tail = CASES[0], 2**31 + 4096 + 5, 4096 + 5
        if not self.on_cpu and self.memory.free_bytes() < 13 * size:
            print("       not run: it takes 26 GiB of the GPU's memory")
            return
        x = Variable(self.rng, BFLOAT16, BFLOAT16, tail)
        parts = [x.w, x.m, x.v, x.g]
        buffers = [self.memory.zeros(part.itemsize * size) for part in parts]
        for buffer, part in zip(buffers, parts, strict=True):
            self.memory.write(buffer[-part.nbytes :], part.view(np.uint8))
        w, m, v, g = map(self.memory.address, buffers)
        states = (VariableState * 1)(VariableState(w, m, v, None, None, g, size, True, True))
        coefficients = Array(self.memory, case.coefficients(2, 0.125, 0.25 * 0.125, 1.0))
        launch = Launch(case.config(x), False, coefficients.address, None, 0, self.memory.stream)
        first = (
            ctypes.c_int64.in_dll(self.kernels.library, "cuda_on_cpu_first_block") if self.on_cpu else None
        )
        if first is not None:
            first.value = 2**31 // 512
        self.kernels.dense(states, 1, launch)
        if first is not None:
            first.value = 0
        after = [
            self.memory.read(buffer[-part.nbytes :]).view(part.dtype)
            for buffer, part in zip(buffers[:3], parts[:3], strict=True)
        ]
        self.compare(case, x, after, x.expected(case, 2, 0.125, 0.25, 1.0))

    def all(self, without=()):
        checks = (
            self.dense,
            self.many_variables,
            self.magnitudes,
            self.special_values,
            self.sparse,
            self.wide_rows,
            self.hot_id,
            self.empty_rows,
            self.squared_norm,
            self.many_chunks,
            self.an_old_driver,
            self.coefficients,
            self.ready,
            self.errors,
            self.copy,
            self.huge,
        )
        for check in checks:
            if check.__name__ not in without:
                begin = time.monotonic()
                check()
                name = check.__name__.replace("_", " ")
                print(f"ok     {name} ({time.monotonic() - begin:.1f} s)", flush=True)


def main(arguments=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["check"])
    parser.add_argument("--on-cpu", action="store_true", help="check the kernels as compiled for a CPU")
    parser.add_argument("--quick", action="store_true", help="fewer and smaller arrays: for sanitizers")
    parser.add_argument("--without", nargs="*", default=[], help="checks to leave out")
    parser.add_argument("--library", type=Path, help="the kernels, built before; otherwise they are built")
    parser.add_argument("--flag", action="append", default=[], help="one more for the compiler")
    parsed = parser.parse_args(arguments)
    try:
        memory = OnCpu() if parsed.on_cpu else check_that_they_can_run(parsed.library)()
    except CannotRunError as problem:
        print(
            f"The kernels cannot run: {problem}. `check --on-cpu` needs only a C++ compiler", file=sys.stderr
        )
        return 2
    with tempfile.TemporaryDirectory() as folder:
        kernels = Kernels(parsed.library or build(folder, parsed.on_cpu, parsed.flag))
        kernels.ready(0)
        print(f"The kernels on {memory.name}")
        Checks(kernels, memory, parsed.quick).all(parsed.without)
    return 0


if __name__ == "__main__":
    sys.exit(main())
