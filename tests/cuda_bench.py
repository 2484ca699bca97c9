"""How fast the kernels for GPUs are, beside a copy on the device and PyTorch's optimizers: for gpu_report.py.

A contestant is a step and the bytes that it must move. Contestants take turns, round by round, in windows of
at least 20 ms; each is measured by launches one after the other and, where PyTorch can record one, by a CUDA
graph of its steps, which takes the host's time out.
"""

import functools
import math
import statistics
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from cuda_kernels import BFLOAT16, CASES, FLOAT, MASTER, NEAREST, Case, Kind, Launch, OnCpu, Parameter

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))
import shapes

ADAMW, QHADAMW, LAMB = CASES[0], Case("QHAdamW", CASES[2].rule, CASES[2].terms), CASES[4]
VARIABLES_A_LAUNCH = 448
WINDOW = 0.02  # seconds

SETS = {
    "BERT-base": [math.prod(shape) for shape in shapes.bert()],
    "ResNet-50": [math.prod(shape) for shape in shapes.resnet50()],
    "one of 100 million": [10**8],
    "500 small": [math.prod(shape) for shape in shapes.small()],
}
TINY = {"tiny": [3000, 17]}


class Kept(NamedTuple):
    """A case, the type of the variables, and how they are kept."""

    case: Case
    type: Any
    rounding: int

    @property
    def name(self):
        kept = {FLOAT: "", BFLOAT16: ", bfloat16"}[self.type] + ", master weights" * (self.rounding == MASTER)
        return f"{self.case.name}{kept}"

    @property
    def bytes(self):
        """What a step moves for each parameter. LAMB's second pass reads all but the gradient again."""
        element = 2 if self.type is BFLOAT16 else 4
        master = 4 if self.rounding == MASTER else 0
        once = element + master + 8  # weights, their master weights, both moments
        if self.case.lamb:  # the norms, which change the moments; the weights
            return (once + 8 + element) + (once + element + master)
        return once + once + element

    @property
    def launches(self):
        return 3 if self.case.lamb else 1


DENSE = [
    Kept(ADAMW, FLOAT, NEAREST),
    Kept(QHADAMW, FLOAT, NEAREST),
    Kept(LAMB, FLOAT, NEAREST),
    Kept(ADAMW, BFLOAT16, NEAREST),
    Kept(ADAMW, BFLOAT16, MASTER),
    Kept(LAMB, BFLOAT16, MASTER),
]


class Table(NamedTuple):
    """A step by rows: a table, and the ids that a gradient names."""

    rows: int
    width: int
    ids: np.ndarray

    def bytes(self, exact):
        """float32: rows with their moments, read and written, and the values of all ids."""
        rows = self.rows if exact else len(np.unique(self.ids))
        return 24 * rows * self.width + 4 * self.ids.size * self.width


def tables(tiny):
    rng = np.random.default_rng(0)
    rows, ids, wide, hot = (50, 40, 3000, 300) if tiny else (10**6, 8192, 10**6, 10**5)
    return {
        f"{rows:,} x 64, {ids:,} Zipf ids": Table(rows, 64, rng.zipf(1.3, ids) % rows),
        f"8 x {wide:,}, all rows": Table(8, wide, np.arange(8)),
        f"{rows:,} x 64, one id {hot:,} times": Table(rows, 64, np.full(hot, 7)),
    }


class Contestant(NamedTuple):
    step: Any
    bytes: int


class Memory:
    """Arrays of random numbers in the memory of the device, kept as long as this lives."""

    def __init__(self, memory):
        self.memory, self.kept = memory, []
        self.torch = getattr(memory, "torch", None)

    def stream(self):
        """Where PyTorch launches just now: it changes while a graph is recorded."""
        return self.torch.cuda.current_stream().cuda_stream if self.torch else None

    def random(self, size, element):
        if self.torch:
            dtype = {2: self.torch.bfloat16, 4: self.torch.float32}[element]
            array = self.torch.rand(size, dtype=self.torch.float32, device="cuda").to(dtype)
            self.kept.append(array)
            return array.data_ptr()
        array = np.full(size, 0.5, np.float32) if element == 4 else np.full(size, 0x3F00, np.uint16)
        return self.of(array)

    def of(self, values):
        array = self.memory.allocate(max(values.nbytes, 16))
        self.memory.write(array[: values.nbytes], np.ascontiguousarray(values).view(np.uint8).reshape(-1))
        self.kept.append(array)
        return self.memory.address(array)

    def scratch(self, launch, needed):
        launch.scratch, launch.scratch_bytes = self.of(np.zeros(max(needed, 16), np.uint8)), needed


def ours(kernels, memory, kept, sizes):
    element = 2 if kept.type is BFLOAT16 else 4
    parameters = (Parameter * len(sizes))()
    for t, size in zip(parameters, sizes, strict=True):
        t.w, t.g = (memory.random(size, element) for _ in "wg")
        t.m, t.v = (memory.random(size, 4) for _ in "mv")
        t.master = memory.random(size, 4) if kept.rounding == MASTER else None
        t.size, t.weight_decay, t.layer_adaptation = size, True, True
    launch = launch_of(memory, kept)
    memory.scratch(launch, kernels.dense_scratch(parameters, len(sizes), launch))

    def step():
        launch.stream = memory.stream()
        kernels.dense(parameters, len(sizes), launch)

    return Contestant(step, kept.bytes * sum(sizes))


def launch_of(memory, kept):
    case = kept.case
    kind = Kind(
        kept.type.number, kept.type.number, kept.rounding, case.squared_gradient, case.amsgrad, case.lamb
    )
    return Launch(kind, False, memory.of(case.step(10, 1e-4, 1e-6, 1.0)))


def by_rows(kernels, memory, table, exact):
    parameter = (Parameter * 1)()
    parameter[0].w, parameter[0].m, parameter[0].v = (
        memory.random(table.rows * table.width, 4) for _ in "wmv"
    )
    parameter[0].g = memory.random(table.ids.size * table.width, 4)
    parameter[0].size, parameter[0].weight_decay = table.rows * table.width, True
    ids = memory.of(table.ids.astype(np.int64))
    launch = launch_of(memory, DENSE[0])
    memory.scratch(launch, kernels.sparse_scratch(parameter, table.rows, table.ids.size, exact))

    def step():
        launch.stream = memory.stream()
        kernels.sparse(parameter, table.rows, ids, table.ids.size, 1, exact, launch)

    return Contestant(step, table.bytes(exact))


def copy(kernels, memory, size):
    source, target = (memory.random(size, 4) for _ in range(2))
    step = lambda: kernels.copy(target, source, 4 * size, memory.stream())  # noqa: E731
    return Contestant(step, 8 * size)


def of_torch(torch, sizes):
    """AdamW's two fast forms, on variables that they share. `capturable`, for graphs, costs launches."""
    weights = [torch.rand(size, device="cuda", requires_grad=True) for size in sizes]
    for w in weights:
        w.grad = torch.rand_like(w)
    made = {}
    for form in ("fused", "foreach"):
        optimizer = torch.optim.AdamW(weights, lr=1e-4, weight_decay=0.01, capturable=True, **{form: True})
        made[f"torch AdamW, {form}"] = Contestant(optimizer.step, 28 * sum(sizes))
    return made


def sparse_adam_of_torch(torch, table):
    w = torch.rand(table.rows, table.width, device="cuda", requires_grad=True)
    ids = torch.from_numpy(table.ids.astype(np.int64)).cuda()[None]
    w.grad = torch.sparse_coo_tensor(
        ids, torch.rand(ids.shape[1], table.width, device="cuda"), w.shape
    ).coalesce()
    moved = 28 * w.grad._nnz() * table.width  # the ids are summed before: it does less than ours
    return Contestant(torch.optim.SparseAdam([w], lr=1e-4).step, moved)


# -- time --------------------------------------------------------------------------------------------------


def seconds_on_cpu(step, count):
    begin = time.perf_counter()
    for _ in range(count):
        step()
    return (time.perf_counter() - begin) / count


def seconds_on_gpu(torch, step, count):
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(count):
        step()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3 / count


def graph_of(torch, step, count):
    """A function that launches `count` steps at once."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(count):
            step()
    return graph.replay


def measure(memory, contestants, rounds, say):
    """Of each contestant: bytes, and seconds of a step, as launched and, where it can be, from a graph."""
    torch = memory.torch
    seconds = functools.partial(seconds_on_gpu, torch) if torch else seconds_on_cpu
    timed = {}  # name, how: a function, how often it is called in a window, and how many steps a call has

    def add(name, how, call, steps):
        call()
        count = max(3, min(20_000, math.ceil(WINDOW / max(seconds(call, 3), 1e-7)))) if torch else 1
        timed[name, how] = call, count, steps

    for name, (step, _) in contestants.items():
        add(name, "launched", step, 1)
        if torch:
            try:
                add(name, "graph", graph_of(torch, step, 20), 20)
            except RuntimeError as error:
                say(f"no graph of {name}: {str(error).splitlines()[0]}")
                torch.cuda.synchronize()
    times = {key: [] for key in timed}
    for _ in range(rounds):
        for key, (call, count, steps) in timed.items():
            call()  # after the others' work, for the caches
            times[key].append(seconds(call, count) / steps)
    found = {name: {"bytes": moved} for name, (_, moved) in contestants.items()}
    for (name, how), own in times.items():
        found[name][how] = statistics.median(own)
    return found


def bench(kernels, memory, rounds, say=lambda text: None, keep=lambda results: None):
    """The results of all sets and tables, by their names and the contestants'; kept after each one."""
    tiny = isinstance(memory, OnCpu)
    results = {}
    for name, sizes in (TINY if tiny else SETS).items():
        say(name)
        held = Memory(memory)
        contestants = {"copy": copy(kernels, held, sum(sizes))}
        contestants |= {kept.name: ours(kernels, held, kept, sizes) for kept in DENSE}
        if held.torch:
            contestants |= of_torch(held.torch, sizes)
        results[name] = measure(held, contestants, rounds, say)
        keep(results)
        free(held, contestants)
    for name, table in tables(tiny).items():
        say(name)
        held = Memory(memory)
        contestants = {"copy": copy(kernels, held, table.rows * table.width)}
        for exact in (False, True):
            contestants[f"AdamW, {'exact' if exact else 'lazy'}"] = by_rows(kernels, held, table, exact)
        if held.torch:
            contestants["torch SparseAdam, ids summed before"] = sparse_adam_of_torch(held.torch, table)
        results[name] = measure(held, contestants, rounds, say)
        keep(results)
        free(held, contestants)
    return results


def free(memory, contestants):
    contestants.clear()
    memory.kept.clear()
    if memory.torch:
        memory.torch.cuda.empty_cache()
