"""One measurement: build the provider, check its result, and only then time it.

Protocol: the table and the gradients are random, never zeros. Several id sets take turns. The table's gradient
is cleared before each call that makes one; its zero-fill and cast are part of the call. A step is the whole of
forward, backward and optimizer. warm: call after call; cold: the last cache is flushed before each. The byte
formulas stand in traffic.py, the clocks in timing.py, the bounds in check.py, the optimizers in optimizers.py.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from . import ids as ids_module
from .check import (
    Verdict,
    check_bags,
    check_forward,
    check_gradient,
    check_step,
    check_steps,
)
from .machine import readable_bytes
from .memory import peak_of_step
from .optimizers import LEARNING_RATE, by_hand
from .providers import Layer, Provider, first_line
from .results import Row
from .shapes import DTYPES, ID_DTYPES, STEPS, Cell
from .timing import Call, Effort, host_us, time_calls
from .traffic import Counts, count, state_bytes, traffic

NUM_ID_SETS = 4
# Of the integers that steps are checked with; fewer where their sums would not be exact.
LARGEST_INTEGER = 8
# Where the host's time is measured: next to no work.
TINY = Cell(vocab=128, dim=16, num_ids=8)
TINY_HOTNESS = 4


class Problem:
    """The tensors of one cell, the same for every provider: table, rotated ids, gradients."""

    def __init__(self, cell: Cell, device: torch.device, seed: int, num_id_sets: int) -> None:
        self.cell = cell
        self.device = device
        self.padding_idx = cell.padding_idx
        id_dtype = ID_DTYPES[cell.id_dtype]
        if cell.vocab - 1 > torch.iinfo(id_dtype).max:
            raise ids_module.IdsError(f"{cell.id_dtype} ids cannot reach {cell.vocab:,} rows")
        if cell.num_ids % cell.hotness:
            raise ids_module.IdsError(
                f"{cell.num_ids:,} ids do not make whole bags of {cell.hotness}"
            )
        shape = (-1, cell.hotness) if cell.pooled else (-1,)
        self.id_sets: list[Tensor] = []  # each [N], or [bags, hotness]
        for i in range(num_id_sets):
            drawn = ids_module.draw(
                cell.distribution,
                cell.num_ids,
                cell.vocab,
                seed * 1009 + i,
                cell.padding,
                self.padding_idx,
            )
            self.id_sets.append(drawn.to(device, id_dtype).view(shape))
        self.counts: Counts = count(self.id_sets[0], self.padding_idx)
        generator = torch.Generator(device).manual_seed(seed + zlib.crc32(str(cell).encode()))
        self._generator = generator
        self.weight = torch.nn.Parameter(self._random(cell.vocab))
        self._grad_output: Tensor | None = None

    @property
    def grad_output(self) -> Tensor:
        """Random gradient of the output, [N or bags, D]."""
        if self._grad_output is None:
            self._grad_output = self._random(self.cell.num_outputs)
        return self._grad_output

    def integer_grad_output(self) -> Tensor:
        """The same of integers so small that every sum of them is exact in fp32."""
        largest = min(LARGEST_INTEGER, 2**24 // self.cell.num_ids)
        return torch.randint(
            -largest,
            largest + 1,
            self.grad_output.shape,
            generator=self._generator,
            dtype=self.weight.dtype,
            device=self.device,
        )

    def ids(self, i: int) -> Tensor:
        return self.id_sets[i % len(self.id_sets)]

    def _random(self, rows: int) -> Tensor:
        return torch.randn(
            (rows, self.cell.dim),
            generator=self._generator,
            dtype=DTYPES[self.cell.dtype],
            device=self.device,
        )


def needed_bytes(
    cell: Cell, mode: str, num_id_sets: int = NUM_ID_SETS, tables_beside: int = 1
) -> int:
    """What a cell takes in a mode: table, ids, output and gradients; for a step the optimizer's state and a copy.

    Args:
        tables_beside: how many of the table's size a provider holds in a step, such as its gradient.
    """
    itemsize = DTYPES[cell.dtype].itemsize
    table, rows = cell.vocab * cell.dim * itemsize, cell.num_outputs * cell.dim * itemsize
    ids = num_id_sets * cell.num_ids * ID_DTYPES[cell.id_dtype].itemsize
    if mode in STEPS:
        # The check compares with the table as it was.
        tables = (2 + tables_beside) * table + cell.vocab * state_bytes(cell, mode)
    else:
        tables = {"forward": 1, "backward": 2, "full": 2}[mode] * table
    outputs = 1 if mode == "forward" else 2
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
    _host: dict[tuple[str, ...], float | None] = field(default_factory=dict)

    def row(self, set_name: str, cell: Cell, mode: str, provider: str, status: str = "ok") -> Row:
        """The row of a measurement that is still to be made."""
        return Row(
            set=set_name,
            operation=cell.operation,
            mode=mode,
            dtype=cell.dtype,
            id_dtype=cell.id_dtype,
            vocab=cell.vocab,
            dim=cell.dim,
            num_ids=cell.num_ids,
            hotness=cell.hotness,
            distribution=cell.distribution,
            unique_ids=None,
            padding=cell.padding,
            provider=provider,
            status=status,
            device=self.facts["device"],
            torch=self.facts["torch"],
            triton=self.facts["triton"],
            commit=self.facts["commit"],
        )

    def problem(self, cell: Cell) -> Problem:
        """Make the cell's tensors. Raises IdsError, or the allocator's error."""
        return Problem(cell, self.device, self.seed, NUM_ID_SETS)

    def does_not_fit(self, cell: Cell, mode: str, tables_beside: int = 1) -> str | None:
        """Why there is not enough memory for the cell; None: there is."""
        needed = needed_bytes(cell, mode, tables_beside=tables_beside)
        if needed <= self.memory:
            return None
        return f"needs {readable_bytes(needed)}, {readable_bytes(self.memory)} may be used"

    def measure(self, problem: Problem, provider: Provider, mode: str, row: Row) -> Row:
        """Check and time one provider; whatever it raises ends up in the row's status and note."""
        try:
            with provider.setting():
                checked, call = self._checked(problem, provider, mode, row)
                if call is None:
                    return checked
                timed = self._timed([call], [checked], problem, mode)[0]
                return replace(timed, host_us=self._host_us(provider, problem.cell, mode))
        except Exception as error:
            return failed(row, error)
        finally:
            problem.weight.grad = None

    def measure_together(
        self, problem: Problem, providers: Sequence[Provider], mode: str, rows: Sequence[Row]
    ) -> list[Row]:
        """The same for providers that need no setting, timed in turns: fairer on a busy machine."""
        checked = [
            self._checked(problem, provider, mode, row)
            for provider, row in zip(providers, rows, strict=True)
        ]
        ready = [(row, call) for row, call in checked if call is not None]
        timed = iter(
            self._timed([call for _, call in ready], [row for row, _ in ready], problem, mode)
        )
        problem.weight.grad = None
        return [row if call is None else next(timed) for row, call in checked]

    def _checked(
        self, problem: Problem, provider: Provider, mode: str, row: Row
    ) -> tuple[Row, Call | None]:
        """The row with its verdict, and what to time; None: the result is wrong."""
        row = replace(row, unique_ids=problem.counts.unique)
        # Before the layer is there, whose state would take its place in memory too.
        step_peak = _step_peak_bytes(provider, problem, mode) if mode in STEPS else None
        layer = provider.build(problem.weight, problem.cell, mode)
        verdict = self._check(layer, problem, mode, provider.sums_in_fp32)
        row = replace(row, match=verdict.match)
        if not verdict.ok:
            return replace(row, status="wrong"), None
        extra = None if mode in STEPS else _peak_extra_bytes(layer, problem, mode)
        row = replace(row, peak_extra_bytes=extra, step_peak_bytes=step_peak)
        return row, _call(layer, problem, mode)

    def _check(self, layer: Layer, problem: Problem, mode: str, fp32: bool) -> Verdict:
        """The gate of one mode, on the second id set, so that the first is not the only one right."""
        ids, cell = problem.ids(1), problem.cell
        table = layer.weight.detach().view(cell.vocab, cell.dim)
        output = layer.lookup(ids)
        if cell.pooled:
            verdict = check_bags(output.detach(), table, ids, fp32)
        else:
            verdict = check_forward(output.detach(), table, ids)
        if mode == "forward" or not verdict.ok:
            return verdict
        if mode in STEPS:
            del output
            return _check_step(layer, table, problem)
        (gradient,) = torch.autograd.grad(output, layer.weight, problem.grad_output)
        del output
        return check_gradient(
            gradient.view(cell.vocab, cell.dim), problem.grad_output, ids, problem.padding_idx, fp32
        )

    def _timed(self, calls: list[Call], rows: list[Row], problem: Problem, mode: str) -> list[Row]:
        warm = time_calls(calls, self.device, self.effort)
        cold = time_calls(calls, self.device, self.effort, cold=True) if self.effort.cold else None
        moved = traffic(problem.cell, mode, problem.counts)
        timed = []
        for i, row in enumerate(rows):
            gbps = moved.dram / warm[i].p50 / 1e6
            timed.append(
                replace(
                    row,
                    status="ok",
                    ms_p20=warm[i].p20,
                    ms_p50=warm[i].p50,
                    ms_p80=warm[i].p80,
                    cold_ms_p50=cold[i].p50 if cold else None,
                    gbps_dram=gbps,
                    gbps_logical=moved.logical / warm[i].p50 / 1e6,
                    percent_of_copy=100 * gbps / self.copy_gbps,
                )
            )
        return timed

    def _host_us(self, provider: Provider, cell: Cell, mode: str) -> float | None:
        """The host's time per call, on a tiny table of the same dtypes; measured once for each."""
        if not self.effort.host_seconds or cell.operation == "embedding_graph":
            return None
        key = (provider.name, mode, cell.operation, cell.dtype, cell.id_dtype)
        if key not in self._host:
            tiny = replace(
                TINY,
                operation=cell.operation,
                hotness=TINY_HOTNESS if cell.pooled else 1,
                dtype=cell.dtype,
                id_dtype=cell.id_dtype,
            )
            problem = Problem(tiny, self.device, self.seed, NUM_ID_SETS)
            layer = provider.build(problem.weight, tiny, mode)
            call = _call(layer, problem, mode)
            self._host[key] = host_us([call], self.device, self.effort.host_seconds)[0]
        return self._host[key]


def failed(row: Row, error: Exception) -> Row:
    """The row of a measurement that raised."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "allocate memory" in str(error):
        return replace(row, status="oom", note=first_line(error))
    return replace(row, status="error", note=first_line(error))


def _call(layer: Layer, problem: Problem, mode: str) -> Call:
    """What is timed in a mode."""
    if problem.cell.operation == "embedding_graph":
        return _graph_call(layer, problem)
    if mode == "forward":
        return Call(lambda i: layer.lookup(problem.ids(i)))
    grad_output = problem.grad_output
    if mode == "backward":
        # An edge keeps the graph and lets the output's memory go.
        edges = [
            torch.autograd.graph.get_gradient_edge(layer.lookup(ids)) for ids in problem.id_sets
        ]
        return Call(
            lambda i: torch.autograd.grad(
                edges[i % len(edges)], layer.weight, grad_output, retain_graph=True
            )
        )
    if mode == "full":
        return Call(lambda i: _full(layer, problem.ids(i), grad_output))
    step = _stepper(layer)
    return Call(lambda i: step(problem.ids(i), grad_output))


def _full(layer: Layer, ids: Tensor, grad_output: Tensor) -> None:
    layer.weight.grad = None
    layer.lookup(ids).backward(grad_output)


def _stepper(layer: Layer) -> Callable[[Tensor, Tensor], None]:
    """One training step, given ids and the output's gradient."""
    update = by_hand(layer.weight) if layer.update is None else layer.update

    def step(ids: Tensor, grad_output: Tensor) -> None:
        _full(layer, ids, grad_output)
        if update.run is not None:
            update.run()

    return step


def _check_step(layer: Layer, table: Tensor, problem: Problem) -> Verdict:
    """One step of SGD; of an optimizer with state two, as its definition shows from the second on."""
    definition = None if layer.update is None else layer.update.definition
    before, step, padding_idx = table.clone(), _stepper(layer), problem.padding_idx
    if definition is None:
        ids, grad_output = problem.ids(1), problem.grad_output
        step(ids, grad_output)
        return check_step(before, table, grad_output, ids, padding_idx, LEARNING_RATE)
    grad_output, id_sets = problem.integer_grad_output(), [problem.ids(1), problem.ids(2)]
    for ids in id_sets:
        step(ids, grad_output)
    return check_steps(definition, before, table, grad_output, id_sets, padding_idx)


def _step_peak_bytes(provider: Provider, problem: Problem, mode: str) -> int:
    """Memory at the peak of a step: the table, and what is not there before the provider is built."""
    table = problem.weight
    is_copy = False
    grad_output = problem.grad_output

    def build() -> Callable[[], None]:
        nonlocal is_copy
        layer = provider.build(table, problem.cell, mode)
        is_copy = layer.weight.data_ptr() != table.data_ptr()
        step = _stepper(layer)
        return lambda: step(problem.ids(0), grad_output)

    peak = peak_of_step(build, problem.device)
    table.grad = None
    return peak if is_copy else peak + table.nbytes


def _graph_call(layer: Layer, problem: Problem) -> Call:
    """Forward and backward captured once; new ids are copied into the graph's before each replay."""
    if problem.device.type != "cuda":
        raise RuntimeError("CUDA graphs need a CUDA device")
    ids, grad_output = problem.ids(0).clone(), problem.grad_output
    side = torch.cuda.Stream(problem.device)
    side.wait_stream(torch.cuda.current_stream(problem.device))
    with torch.cuda.stream(side):
        for _ in range(3):
            _full(layer, ids, grad_output)
    torch.cuda.current_stream(problem.device).wait_stream(side)
    layer.weight.grad = None
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = layer.lookup(ids)
        output.backward(grad_output)
    gradient = layer.weight.grad
    assert gradient is not None
    ids.copy_(problem.ids(1))
    graph.replay()
    table = layer.weight.detach().view(problem.cell.vocab, problem.cell.dim)
    verdict = check_forward(output.detach(), table, ids)
    if verdict.ok:
        verdict = check_gradient(
            gradient.view_as(table), grad_output, ids, problem.padding_idx, fp32=False
        )
    if not verdict.ok:
        raise RuntimeError(f"the replayed graph is wrong: {verdict.match}")
    return Call(lambda i: graph.replay(), before=lambda i: ids.copy_(problem.ids(i)))


def _peak_extra_bytes(layer: Layer, problem: Problem, mode: str) -> int | None:
    """Device memory at the peak of one call, beyond its inputs, its output and the table's gradient."""
    if problem.device.type != "cuda" or problem.cell.operation == "embedding_graph":
        return None
    grad_output = None if mode == "forward" else problem.grad_output
    cell, itemsize = problem.cell, problem.weight.element_size()
    output, gradient = cell.num_outputs * cell.dim * itemsize, cell.vocab * cell.dim * itemsize
    results = {"forward": output, "backward": gradient}.get(mode, output + gradient)
    layer.weight.grad = None
    edge = None
    if mode == "backward":
        edge = torch.autograd.graph.get_gradient_edge(layer.lookup(problem.ids(0)))
    torch.cuda.synchronize(problem.device)
    before = torch.cuda.memory_allocated(problem.device)
    torch.cuda.reset_peak_memory_stats(problem.device)
    if mode == "forward":
        layer.lookup(problem.ids(0))
    elif edge is not None:
        torch.autograd.grad(edge, layer.weight, grad_output)
    else:
        _full(layer, problem.ids(0), problem.grad_output)
    torch.cuda.synchronize(problem.device)
    peak = torch.cuda.max_memory_allocated(problem.device) - before
    # A full pass may free the output before: never less than nothing.
    return max(0, peak - results)
