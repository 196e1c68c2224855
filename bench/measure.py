"""One measurement: build the provider, check its result, and only then time it.

Protocol: the table and the gradients are random, never zeros. Several id sets take turns. The table's gradient
is cleared before each call that makes one; its zero-fill and cast are part of the call. Where a call adds to a
gradient, that is there before and stays, the same memory for all providers. A step is the whole of
forward, backward and optimizer. warm: call after call; cold: the last cache is flushed before each. The byte
formulas stand in byte_floor.py, the clocks in timing.py, the bounds in check.py, the optimizers in optimizers.py.
"""

from __future__ import annotations

import gc
import os
import zlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from . import ids as ids_module
from .byte_floor import Counts, bytes_moved, count, state_bytes
from .check import (
    Verdict,
    check_accumulation,
    check_bags,
    check_forward,
    check_gradient,
    check_step,
    check_steps,
)
from .layer import Layer
from .machine import load, readable_bytes
from .memory import cuda_peak, peak_of_step
from .optimizers import LEARNING_RATE, by_hand
from .providers import Provider, first_line
from .results import Row
from .shapes import ACCUMULATE, DTYPES, ID_DTYPES, STEPS, Cell
from .timing import Call, Effort, host_us, time_calls

NUM_ID_SETS = 4
# Of the integers that steps are checked with; fewer where their sums would not be exact.
LARGEST_INTEGER = 8
# Bytes from which memory counts more than the collector's time.
LARGE_TABLE = 2**24
# Where the host's time is measured: next to no work.
TINY = Cell(vocab=128, dim=16, num_ids=8)
TINY_HOTNESS = 4


def draw_ids(cell: Cell, seed: int) -> Tensor:
    """One id set, int64 on the CPU: [N], or [bags, hotness]; of T tables [T, N / T], [T, bags / T, hotness].

    Raises IdsError if the ids do not fit the cell.
    """
    if cell.vocab - 1 > torch.iinfo(ID_DTYPES[cell.id_dtype]).max:
        raise ids_module.IdsError(f"{cell.id_dtype} ids cannot reach {cell.vocab:,} rows")
    if cell.num_ids % (cell.tables * cell.hotness):
        of_tables = f" for {cell.tables} tables" if cell.tables > 1 else ""
        raise ids_module.IdsError(
            f"{cell.num_ids:,} ids do not make whole bags of {cell.hotness}{of_tables}"
        )
    if cell.tables > 1 and cell.padding:
        raise ids_module.IdsError("padding is measured in one table alone")
    length, seed = cell.num_ids // cell.tables, seed * cell.tables
    padded = (cell.padding, cell.padding_idx)
    drawn = [
        ids_module.draw(cell.distribution, length, cell.vocab, seed + table, *padded)
        for table in range(cell.tables)
    ]
    ids = drawn[0] if cell.tables == 1 else torch.stack(drawn)
    return ids.unflatten(-1, (-1, cell.hotness)) if cell.pooled else ids


def places(cell: Cell, ids: Tensor) -> Tensor:
    """An id set as rows of all tables, one under another: int64 [N] or [bags, hotness]."""
    if cell.tables == 1:
        return ids.long()
    first = torch.arange(cell.tables, device=ids.device) * cell.vocab
    return (ids.flatten(1).long() + first[:, None]).view_as(ids).flatten(0, 1)


class Problem:
    """The tensors of one cell, the same for every provider: tables, rotated ids, gradients."""

    def __init__(self, cell: Cell, device: torch.device, seed: int, num_id_sets: int) -> None:
        self.cell = cell
        self.device = device
        self.padding_idx = cell.padding_idx
        self.id_sets = [
            draw_ids(cell, seed * 1009 + i).to(device, ID_DTYPES[cell.id_dtype])
            for i in range(num_id_sets)
        ]
        self.counts: Counts = count(self.places(0), self.padding_idx)
        generator = torch.Generator(device).manual_seed(seed + zlib.crc32(str(cell).encode()))
        self._random: dict[str, Any] = {"dtype": DTYPES[cell.dtype], "generator": generator}
        rows = self._in_widths(torch.randn((cell.rows, cell.dim), device=device, **self._random))
        self.weight = torch.nn.Parameter(rows)
        self._grad_output: Tensor | None = None
        self._gradient: Tensor | None = None

    @property
    def grad_output(self) -> Tensor:
        """Random gradient of the output, [N or bags, D]."""
        if self._grad_output is None:
            shape = (self.cell.num_outputs, self.cell.dim)
            device = self.weight.device
            self._grad_output = self._in_widths(torch.randn(shape, device=device, **self._random))
        return self._grad_output

    def _in_widths(self, rows: Tensor) -> Tensor:
        """Rows of all tables, one under another, with zeros behind the width of each."""
        for part, width in zip(rows.chunk(self.cell.tables), self.cell.widths, strict=True):
            part[:, width:] = 0
        return rows

    def gradient(self, dtype: torch.dtype) -> Tensor:
        """A gradient of the tables that exists, [T * V, D]: random at first, then what was added to it."""
        if self._gradient is None or self._gradient.dtype != dtype:
            # Not two at a time.
            self._gradient = None
            random = {**self._random, "dtype": dtype}
            self._gradient = torch.randn(self.weight.shape, device=self.device, **random)
        return self._gradient

    def integer_grad_output(self) -> Tensor:
        """The same of integers so small that every sum of them is exact in fp32."""
        largest = min(LARGEST_INTEGER, 2**24 // self.cell.num_ids)
        shape, device = self.grad_output.shape, self.weight.device
        return torch.randint(-largest, largest + 1, shape, device=device, **self._random)

    def ids(self, i: int) -> Tensor:
        return self.id_sets[i % len(self.id_sets)]

    def places(self, i: int) -> Tensor:
        return places(self.cell, self.ids(i))


def needed_bytes(
    cell: Cell,
    mode: str,
    num_id_sets: int = NUM_ID_SETS,
    tables_beside: int = 1,
    copies: int = 0,
    layers: int = 1,
) -> int:
    """What a cell takes in a mode: table, ids, output and gradients; for a step the optimizer's state and a copy.

    Args:
        tables_beside: how many of the table's size the providers hold in a step, such as its gradient.
        copies: how many they make in the other modes.
        layers: how many providers are there at the same time.
    """
    itemsize = DTYPES[cell.dtype].itemsize
    table, rows = cell.rows * cell.dim * itemsize, cell.num_outputs * cell.dim * itemsize
    ids = num_id_sets * cell.num_ids * ID_DTYPES[cell.id_dtype].itemsize
    if mode in STEPS:
        # The check compares with the table as it was.
        tables = (2 + tables_beside) * table + layers * cell.rows * state_bytes(cell, mode)
    elif mode in ACCUMULATE:
        # The one that is there, the check's copy of it, and one that is made and cast.
        gradient = cell.rows * cell.dim * cell.gradient_dtype(mode).itemsize
        tables = (2 + copies) * table + 3 * gradient
    else:
        tables = ({"forward": 1, "backward": 2, "full": 2}[mode] + copies) * table
    outputs = layers if mode == "forward" else 2 * layers
    if cell.tables > 1:
        # The check puts together what a loop leaves apart.
        outputs += 1
        tables += table if mode in ("backward", "full") else 0
    return tables + outputs * rows + ids


@dataclass
class Bench:
    """What all measurements of a run have in common."""

    device: torch.device
    copy_gbps: float
    facts: dict[str, str]  # the columns device, torch, triton, commit
    memory: int  # bytes that a cell may take
    seed: int = 0
    effort: Effort = field(default_factory=Effort)
    _host: dict[tuple[str, ...], list[float]] = field(default_factory=dict)
    _parts: dict[tuple[torch.Size, torch.dtype], dict[str, Any]] = field(default_factory=dict)

    def row(self, set_name: str, cell: Cell, mode: str, provider: str) -> Row:
        """The row of a measurement that is still to be made."""
        shape: dict[str, Any] = asdict(cell)
        facts: dict[str, Any] = {**self.facts, "status": "ok", "unique_ids": None}
        return Row(set=set_name, mode=mode, provider=provider, **shape, **facts)

    def problem(self, cell: Cell) -> Problem:
        """Make the cell's tensors. Raises IdsError, or the allocator's error."""
        return Problem(cell, self.device, self.seed, NUM_ID_SETS)

    def does_not_fit(
        self, cell: Cell, mode: str, tables_beside: int = 1, copies: int = 0, layers: int = 1
    ) -> str | None:
        """Why there is not enough memory for the cell; None: there is."""
        needed = needed_bytes(cell, mode, NUM_ID_SETS, tables_beside, copies, layers)
        if needed <= self.memory:
            return None
        return f"needs {readable_bytes(needed)}, {readable_bytes(self.memory)} may be used"

    def measure(self, problem: Problem, provider: Provider, mode: str, row: Row) -> Row:
        """Check and time one provider; whatever it raises ends up in the row's status and note."""
        try:
            with provider.setting():
                (done,) = self.measure_in_turns(problem, [provider], mode, [row])
                return done
        except Exception as error:
            return failed(row, error)

    def measure_in_turns(
        self, problem: Problem, providers: Sequence[Provider], mode: str, rows: Sequence[Row]
    ) -> list[Row]:
        """The same for providers that need no setting, which are in memory together and take turns."""
        done = self.measure_together(problem, providers, mode, rows)
        timed = [i for i, row in enumerate(done) if row.status == "ok"]
        try:
            host = self._host_us([providers[i] for i in timed], problem.cell, mode)
        except Exception as error:
            return [failed(row, error) if i in timed else row for i, row in enumerate(done)]
        for i, us in zip(timed, host, strict=True):
            done[i] = replace(done[i], host_us=us)
        return done

    def measure_together(
        self, problem: Problem, providers: Sequence[Provider], mode: str, rows: Sequence[Row]
    ) -> list[Row]:
        """The same without the host's time."""
        checked = []
        for provider, row in zip(providers, rows, strict=True):
            try:
                checked.append(self._checked(problem, provider, mode, row))
            except Exception as error:
                checked.append((failed(row, error), None))
        calls = [call for _, call in checked if call is not None]
        ready = [row for row, call in checked if call is not None]
        try:
            timed = iter(self._timed(calls, ready, problem, mode) if calls else [])
        except Exception as error:
            timed = iter([failed(row, error) for row in ready])
        return [row if call is None else next(timed) for row, call in checked]

    def _checked(
        self, problem: Problem, provider: Provider, mode: str, row: Row
    ) -> tuple[Row, Call | None]:
        """The row with its verdict, and what to time; None: the result is wrong."""
        row = replace(row, unique_ids=problem.counts.unique)
        # Both before the layer is there, whose gradient or state would take its place in memory too.
        parts = self._gradient_parts(problem, mode)
        step_peak = _step_peak_bytes(provider, problem, mode) if mode in STEPS else None
        row = replace(row, **parts)
        layer = _build(provider, problem, mode)
        verdict = self._check(layer, problem, mode, provider)
        row = replace(row, match=verdict.match)
        if not verdict.ok:
            return replace(row, status="wrong", zero_fill_ms=None, cast_ms=None), None
        call = _call(layer, problem, mode)
        extra = None if mode in STEPS else _peak_extra_bytes(call, layer, problem, mode)
        return replace(row, peak_extra_bytes=extra, step_peak_bytes=step_peak), call

    def _check(self, layer: Layer, problem: Problem, mode: str, provider: Provider) -> Verdict:
        """The gate of one mode, on the second id set, so that the first is not the only one right."""
        places, cell, fp32 = problem.places(1), problem.cell, provider.sums_in_fp32
        table = layer.weight.detach().view(problem.weight.shape)
        outputs = layer.outputs(problem.ids(1))
        rows = layer.order.gathered(tuple(output.detach() for output in outputs), cell.tables)
        if cell.pooled:
            verdict = check_bags(rows, table, places, fp32)
        else:
            verdict = check_forward(rows, table, places)
        del rows
        if mode == "forward" or not verdict.ok:
            return verdict
        if mode in STEPS:
            del outputs
            return _check_step(layer, table, problem)
        grads = _handed_out(layer, problem)
        if mode in ACCUMULATE:
            before = _accumulated(layer, table).clone()
            torch.autograd.backward(outputs, grads)
            del outputs
            after = _accumulated(layer, table)
            of_ids = (problem.grad_output, places, problem.padding_idx)
            return check_accumulation(before, after, *of_ids, fp32, provider.in_place)
        gradients = torch.autograd.grad(outputs, layer.leaves, grads)
        del outputs
        gradient = layer.gathered_gradients(gradients)
        return check_gradient(
            gradient.view_as(table), problem.grad_output, places, problem.padding_idx, fp32
        )

    def _timed(self, calls: list[Call], rows: list[Row], problem: Problem, mode: str) -> list[Row]:
        warm = time_calls(calls, self.device, self.effort)
        cold = time_calls(calls, self.device, self.effort, cold=True) if self.effort.cold else None
        moved = bytes_moved(problem.cell, mode, problem.counts)
        busy = _load_of_a_core()
        timed = []
        for i, row in enumerate(rows):
            p20, p50, p80 = warm[i]
            cold_p50 = cold[i].p50 if cold else None
            row = replace(row, ms_p20=p20, ms_p50=p50, ms_p80=p80, cold_ms_p50=cold_p50, load=busy)
            dram, logical = (size / p50 / 1e6 for size in (moved.dram, moved.logical))
            share = 100 * dram / self.copy_gbps
            row = replace(row, gbps_dram=dram, gbps_logical=logical, percent_of_copy=share)
            timed.append(row)
        return timed

    def _gradient_parts(self, problem: Problem, mode: str) -> dict[str, Any]:
        """Milliseconds of what is no sum in a dense gradient, by columns; measured once for each size.

        Of the modes whose gradient is dense with everybody. None for a cast: no 16-bit table, or too little memory.
        """
        if mode not in ("backward", "full"):
            return {}
        shape, dtype = problem.weight.shape, problem.weight.dtype
        if (shape, dtype) not in self._parts:
            effort = replace(self.effort, seconds=self.effort.seconds / 4)
            gradient = torch.zeros_like(problem.weight, requires_grad=False)
            (filled,) = time_calls([Call(lambda i: gradient.zero_())], self.device, effort)
            cast = None
            sums = shape.numel() * torch.float32.itemsize
            if dtype.itemsize == 2 and needed_bytes(problem.cell, mode) + sums <= self.memory:
                wide = torch.ones(shape, device=self.device)
                (rounded,) = time_calls([Call(lambda i: gradient.copy_(wide))], self.device, effort)
                cast = rounded.p50
            self._parts[shape, dtype] = {"zero_fill_ms": filled.p50, "cast_ms": cast}
        return self._parts[shape, dtype]

    def _host_us(
        self, providers: Sequence[Provider], cell: Cell, mode: str
    ) -> Sequence[float | None]:
        """The host's time per call of each, on a tiny table of the same dtypes; measured once for each."""
        if not providers or not self.effort.host_seconds or cell.operation == "embedding_graph":
            return [None] * len(providers)
        key = (*(provider.name for provider in providers), mode, cell.operation, cell.dtype)
        key += (cell.id_dtype, str(cell.tables))
        if key not in self._host:
            tiny = replace(
                TINY,
                num_ids=TINY.num_ids * cell.tables,
                tables=cell.tables,
                operation=cell.operation,
                hotness=TINY_HOTNESS if cell.pooled else 1,
                dtype=cell.dtype,
                id_dtype=cell.id_dtype,
            )
            problem = Problem(tiny, self.device, self.seed, NUM_ID_SETS)
            calls = [_call(_build(each, problem, mode), problem, mode) for each in providers]
            self._host[key] = host_us(calls, self.device, self.effort.host_seconds)
        return self._host[key]


def _load_of_a_core() -> float | None:
    mean = load()
    return None if mean is None else mean[0] / (os.cpu_count() or 1)


def failed(row: Row, error: Exception) -> Row:
    """The row of a measurement that raised."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "allocate memory" in str(error):
        return replace(row, status="oom", note=first_line(error))
    return replace(row, status="error", note=first_line(error))


def _build(provider: Provider, problem: Problem, mode: str) -> Layer:
    """The provider's layer, on a leaf of its own in the problem's memory; if it adds to a gradient, with that."""
    weight = torch.nn.Parameter(problem.weight.detach())
    layer = provider.build(weight, problem.cell, mode)
    if mode in ACCUMULATE:
        gradient = problem.gradient(problem.cell.gradient_dtype(mode))
        parts = gradient.view(-1).split([leaf.numel() for leaf in layer.leaves])
        for leaf, part in zip(layer.leaves, parts, strict=True):
            if leaf.dtype != part.dtype:
                leaf.grad_dtype = part.dtype
            leaf.grad = part.view_as(leaf)
    return layer


def _accumulated(layer: Layer, table: Tensor) -> Tensor:
    """The gradients of all leaves, as the table [T * V, D]; a copy where there are several."""
    gradients = [leaf.grad for leaf in layer.leaves if leaf.grad is not None]
    return layer.gathered_gradients(gradients).view_as(table)


def _call(layer: Layer, problem: Problem, mode: str) -> Call:
    """What is timed in a mode."""
    if problem.cell.operation == "embedding_graph":
        return _graph_call(layer, problem)
    if mode == "forward":
        return Call(lambda i: layer.lookup(problem.ids(i)))
    grads = _handed_out(layer, problem)
    if mode == "backward" or mode in ACCUMULATE:
        # An edge keeps the graph and lets the output's memory go.
        edges = [
            [torch.autograd.graph.get_gradient_edge(output) for output in layer.outputs(ids)]
            for ids in problem.id_sets
        ]

        def backward(i: int) -> object:
            of_output = edges[i % len(edges)]
            return torch.autograd.grad(of_output, layer.leaves, grads, retain_graph=True)

        def accumulate(i: int) -> None:
            torch.autograd.backward(edges[i % len(edges)], grads, retain_graph=True)

        return Call(accumulate if mode in ACCUMULATE else backward)
    if mode == "full":
        return Call(lambda i: _full(layer, problem.ids(i), grads))
    step = _stepper(layer)
    return Call(lambda i: step(problem.ids(i), grads))


def _handed_out(layer: Layer, problem: Problem) -> tuple[Tensor, ...]:
    """The gradient of each of the layer's outputs."""
    return layer.order.handed_out(problem.grad_output, problem.cell.tables)


def _full(layer: Layer, ids: Tensor, grads: Sequence[Tensor]) -> None:
    for leaf in layer.leaves:
        leaf.grad = None
    torch.autograd.backward(layer.outputs(ids), grads)


def _stepper(layer: Layer) -> Callable[[Tensor, Sequence[Tensor]], None]:
    """One training step, given ids and the gradients of the outputs."""
    update = by_hand(layer.leaves) if layer.update is None else layer.update

    def step(ids: Tensor, grads: Sequence[Tensor]) -> None:
        _full(layer, ids, grads)
        if update.run is not None:
            update.run()

    return step


def _check_step(layer: Layer, table: Tensor, problem: Problem) -> Verdict:
    """One step of SGD; of an optimizer with state two, as its definition shows from the second on."""
    definition = None if layer.update is None else layer.update.definition
    before, step, padding_idx = table.clone(), _stepper(layer), problem.padding_idx
    if definition is None:
        step(problem.ids(1), _handed_out(layer, problem))
        return check_step(
            before, table, problem.grad_output, problem.places(1), padding_idx, LEARNING_RATE
        )
    grad_output = problem.integer_grad_output()
    grads = layer.order.handed_out(grad_output, problem.cell.tables)
    for i in (1, 2):
        step(problem.ids(i), grads)
    places = [problem.places(1), problem.places(2)]
    return check_steps(definition, before, table, grad_output, places, padding_idx)


def _step_peak_bytes(provider: Provider, problem: Problem, mode: str) -> int:
    """Memory at the peak of a step: the table, and what is not there before the provider is built."""
    table = problem.weight
    given = problem.grad_output
    beside = 0

    def build() -> Callable[[], None]:
        nonlocal beside
        layer = _build(provider, problem, mode)
        if layer.weight.data_ptr() == table.data_ptr():
            beside += table.nbytes
        step = _stepper(layer)
        grads = _handed_out(layer, problem)
        # The gradient that a model would hand in is not the step's.
        if grads[0].data_ptr() != given.data_ptr():
            beside -= given.nbytes
        return lambda: step(problem.ids(0), grads)

    peak = peak_of_step(build, problem.device)
    collect_cycles(problem)
    return peak + beside


def collect_cycles(problem: Problem) -> None:
    """Free what hooks and optimizers hold in cycles: the state of a large table is as large as that."""
    if problem.weight.nbytes >= LARGE_TABLE:
        gc.collect()


def _graph_call(layer: Layer, problem: Problem) -> Call:
    """Forward and backward captured once; new ids are copied into the graph's before each replay."""
    if problem.device.type != "cuda":
        raise RuntimeError("CUDA graphs need a CUDA device")
    ids, grads = problem.ids(0).clone(), _handed_out(layer, problem)
    side = torch.cuda.Stream(problem.device)
    side.wait_stream(torch.cuda.current_stream(problem.device))
    with torch.cuda.stream(side):
        for _ in range(3):
            _full(layer, ids, grads)
    torch.cuda.current_stream(problem.device).wait_stream(side)
    layer.weight.grad = None
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = layer.lookup(ids)
        output.backward(*grads)
    gradient = layer.weight.grad
    assert gradient is not None
    ids.copy_(problem.ids(1))
    graph.replay()
    table = layer.weight.detach().view(problem.weight.shape)
    verdict = check_forward(output.detach(), table, ids)
    if verdict.ok:
        verdict = check_gradient(
            gradient.view_as(table), problem.grad_output, ids, problem.padding_idx, fp32=False
        )
    if not verdict.ok:
        raise RuntimeError(f"the replayed graph is wrong: {verdict.match}")
    return Call(lambda i: graph.replay(), before=lambda i: ids.copy_(problem.ids(i)))


def _peak_extra_bytes(call: Call, layer: Layer, problem: Problem, mode: str) -> int | None:
    """Memory at the peak of one call, beyond its inputs, its output and the table's gradient.

    On the CPU of modes that add to a gradient alone.
    """
    if mode in ACCUMULATE:
        return peak_of_step(lambda: partial(call.run, 0), problem.device)
    if problem.device.type != "cuda" or problem.cell.operation == "embedding_graph":
        return None
    cell, gradient = problem.cell, problem.weight.nbytes
    output = cell.num_outputs * cell.dim * problem.weight.itemsize
    results = {"forward": output, "backward": gradient}.get(mode, output + gradient)
    for leaf in layer.leaves:
        leaf.grad = None
    peak = cuda_peak(lambda: call.run(0), problem.device)
    # A full pass may free the output before: never less than nothing.
    return max(0, peak - results)
