"""How fast the kernels for GPUs are, beside a copy on the device and PyTorch's optimizers: for gpu_report.py.

A contestant is a step and the bytes that it must move. Contestants take turns, round by round, in windows of
at least 20 ms; each is measured by launches one after the other and, where PyTorch can record one, by a CUDA
graph of 20 steps, which takes the host's time out. The copy moves as many bytes as AdamW's step does.
"""

import ctypes
import functools
import math
import statistics
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from cuda_kernels import (
    BFLOAT16,
    CASES,
    CUTS_ON_GPU,
    FLOAT,
    MASTER,
    NEAREST,
    Case,
    KernelConfig,
    Launch,
    OnCpu,
    VariableState,
)

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples" / "benchmarks"))
import shapes

ADAMW, QHADAMW, LAMB = CASES[0], Case("QHAdamW", CASES[2].rule, CASES[2].terms), CASES[4]
WINDOW = 0.02  # seconds
STEPS_OF_A_GRAPH = 20

SETS = {
    "BERT-base": [math.prod(shape) for shape in shapes.bert()],
    "ResNet-50": [math.prod(shape) for shape in shapes.resnet50()],
    "one of 100 million": [10**8],
    "500 small": [math.prod(shape) for shape in shapes.small()],
}
TINY = {"tiny": [3000, 17], "large": [17, 70_000], "61 small": [5] * 61}


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

    def launches(self, sizes, cuts=CUTS_ON_GPU):
        """LAMB: norms, trust ratios, weights; where a variable has many chunks, their groups as well."""
        batches = [sizes[i : i + cuts.variables] for i in range(0, len(sizes), cuts.variables)]
        if not self.case.lamb:
            return len(batches)
        return sum(3 + (max(batch) > (cuts.many_chunks - 1) * cuts.chunk) for batch in batches)


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
    recorded: Any  # the step for a CUDA graph; None where it must not be recorded


class Memory:
    """Arrays of random numbers in the memory of the device, kept as long as this lives."""

    def __init__(self, memory):
        self.memory, self.kept, self.capture_failed = memory, [], False
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

    def free(self):
        self.kept.clear()
        if self.torch and not self.capture_failed:  # after which this is an error inside PyTorch
            self.torch.cuda.empty_cache()


def ours(kernels, memory, kept, sizes):
    element = 2 if kept.type is BFLOAT16 else 4
    parameters = (VariableState * len(sizes))()
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

    return Contestant(step, kept.bytes * sum(sizes), step)


def launch_of(memory, kept):
    case = kept.case
    config = KernelConfig(
        kept.type.number, kept.type.number, kept.rounding, case.squared_gradient, case.amsgrad, case.lamb
    )
    return Launch(config, False, memory.of(case.coefficients(10, 1e-4, 1e-6, 1.0)))


def by_rows(kernels, memory, table, exact):
    parameter = (VariableState * 1)()
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

    return Contestant(step, table.bytes(exact), step)


def copy(kernels, memory, moved):
    """Reads half of so many bytes, and writes them."""
    size = moved // 8
    source, target = (memory.random(size, 4) for _ in range(2))
    step = lambda: kernels.copy(target, source, 4 * size, memory.stream())  # noqa: E731
    return Contestant(step, 8 * size, step)


def of_torch(torch, sizes):
    """AdamW's two fast forms, which move what ours moves, on variables that they share. In a graph the count
    of steps must be on the device (capturable), which costs `foreach` some kernels: it has that there alone.
    """
    weights = [torch.rand(size, device="cuda", requires_grad=True) for size in sizes]
    for w in weights:
        w.grad = torch.rand_like(w)
    made = {}
    for form in ("fused", "foreach"):
        step, recorded = (
            torch.optim.AdamW(weights, lr=1e-4, weight_decay=0.01, capturable=capturable, **{form: True}).step
            for capturable in (False, True)
        )
        made[f"torch AdamW, {form}"] = Contestant(step, 28 * sum(sizes), recorded)
    return made


def sparse_adam_of_torch(torch, table):
    """Its gradient has each id once. A graph would repeat one step: it counts them on the host."""
    w = torch.rand(table.rows, table.width, device="cuda", requires_grad=True)
    ids = torch.from_numpy(table.ids.astype(np.int64)).cuda()[None]
    w.grad = torch.sparse_coo_tensor(
        ids, torch.rand(ids.shape[1], table.width, device="cuda"), w.shape
    ).coalesce()
    moved = table._replace(ids=np.unique(table.ids)).bytes(False)
    return Contestant(torch.optim.SparseAdam([w], lr=1e-4).step, moved, None)


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


def calls_of_a_window(seconds, call, window=WINDOW):
    """How many calls take as long as a window. seconds(call, count): of one of so many."""
    count = 1
    while seconds(call, count) * count < window:
        count *= 2
    return count


def graph_of(torch, step):
    """A function that launches STEPS_OF_A_GRAPH steps at once."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    # The outer one brings the stream back even where recording fails.
    with torch.cuda.stream(torch.cuda.current_stream()), torch.cuda.graph(graph):
        for _ in range(STEPS_OF_A_GRAPH):
            step()
    return graph.replay


def measure(memory, contestants, rounds, window=WINDOW):
    """Of each contestant: bytes, and seconds of a step, as launched and, where it can be, from a graph."""
    torch = memory.torch
    seconds = functools.partial(seconds_on_gpu, torch) if torch else seconds_on_cpu
    found = {name: {"bytes": contestant.bytes} for name, contestant in contestants.items()}
    calls = {}  # name, how: a function, and how many steps it is
    for name, contestant in contestants.items():
        calls[name, "launched"] = contestant.step, 1
        if torch and contestant.recorded:
            try:
                calls[name, "graph"] = graph_of(torch, contestant.recorded), STEPS_OF_A_GRAPH
            except RuntimeError as error:
                found[name]["no graph"] = str(error).partition("\n")[0]
                memory.capture_failed = True
    counts = {}
    for key, (call, _) in calls.items():
        call()  # what happens once
        counts[key] = calls_of_a_window(seconds, call, window)
    times = {key: [] for key in calls}
    for _ in range(rounds):
        for key, (call, steps) in calls.items():
            call()  # after the others' work, for the caches
            times[key].append(seconds(call, counts[key]) / steps)
    for (name, how), own in times.items():
        found[name][how] = statistics.median(own)
    return found


# -- what is measured --------------------------------------------------------------------------------------


def contestants_of(kernels, memory, tiny):
    """For each set and table: its name; functions that make our steps, and PyTorch's, by their names; how
    much the copy moves.
    """
    for name, sizes in (TINY if tiny else SETS).items():
        yield (
            name,
            lambda sizes=sizes: {kept.name: ours(kernels, memory, kept, sizes) for kept in DENSE},
            lambda torch, sizes=sizes: of_torch(torch, sizes),
            28 * sum(sizes),
        )
    for name, table in tables(tiny).items():
        yield (
            name,
            lambda table=table: {
                by_rows_name(exact): by_rows(kernels, memory, table, exact) for exact in (False, True)
            },
            lambda torch, table=table: {"torch SparseAdam": sparse_adam_of_torch(torch, table)},
            table.bytes(True),
        )


def by_rows_name(exact):
    return f"AdamW, {'exact' if exact else 'lazy'}"


def bench(kernels, memory, rounds, window=WINDOW):
    """Yields each set's or table's name with its contestants' results."""
    held = Memory(memory)
    for name, make, make_rivals, moved in contestants_of(kernels, held, isinstance(memory, OnCpu)):
        contestants = {"copy": copy(kernels, held, moved), **make()}
        if held.torch:
            contestants |= make_rivals(held.torch)
        yield name, measure(held, contestants, rounds, window)
        contestants.clear()
        held.free()


def launches(kernels, memory):
    """Yields each set's or table's name with how many kernels our steps launch. Timings come before: what
    counts may slow later launches down.
    """
    held = Memory(memory)
    count = count_on_gpu if held.torch else count_on_cpu
    for name, make, _, _ in contestants_of(kernels, held, isinstance(memory, OnCpu)):
        contestants = make()
        for contestant in contestants.values():
            contestant.step()  # what happens once
        yield name, {which: count(kernels, held, own.step) for which, own in contestants.items()}
        contestants.clear()
        held.free()


def count_on_cpu(kernels, memory, step):
    counter = ctypes.c_int64.in_dll(kernels.library, "cuda_on_cpu_launches")
    before = counter.value
    step()
    return counter.value - before


def count_on_gpu(kernels, memory, step):
    torch = memory.torch
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as trace:
        step()
        torch.cuda.synchronize()
    on_device = [e.name for e in trace.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    return sum(not name.startswith("Mem") for name in on_device)  # Memset, Memcpy
