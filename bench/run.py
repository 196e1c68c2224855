"""A run: which cells, modes and providers, in which order; every row on disk before the next is measured."""

from __future__ import annotations

import gc
import itertools
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from . import ids as ids_module
from .measure import Bench, Problem, collect_cycles, failed
from .providers import PROVIDERS, Provider
from .results import Row, RowWriter
from .shapes import SETS, Cell, varied


@dataclass(frozen=True)
class Job:
    """One cell in one mode, for one provider."""

    set: str
    cell: Cell
    mode: str
    provider: Provider

    def row(self, bench: Bench) -> Row:
        return bench.row(self.set, self.cell, self.mode, self.provider.name)


@dataclass(frozen=True)
class Choice:
    """What is to be run; None: whatever the sets say."""

    sets: Sequence[str]
    providers: Sequence[str] | None = None
    modes: Sequence[str] | None = None
    axes: Mapping[str, Sequence[Any] | None] = field(default_factory=dict)  # by Cell's fields
    limit: int | None = None  # cells


def plan(choice: Choice, device: torch.device) -> list[Job]:
    """The jobs, cell by cell.

    A mode that a cell does not have gets none. A provider that cannot run here, does not measure a mode, or is a
    candidate that refuses a cell, gets no job, unless it was asked for by name: then its row says why.

    Raises IdsError if a file of ids does not fit a table.
    """
    named = choice.providers is not None
    providers = [PROVIDERS[name] for name in choice.providers or PROVIDERS]
    if not named:
        providers = [p for p in providers if p.missing_reason(device) is None]
    cells = list(itertools.islice(_cells(choice), choice.limit))
    for distribution, vocab in {(cell.distribution, cell.vocab) for _, cell in cells}:
        if distribution.endswith(ids_module.FILE_SUFFIXES):
            ids_module.draw(distribution, 1, vocab)
    return [
        Job(name, cell, mode, provider)
        for name, cell in cells
        for mode in choice.modes or SETS[name].modes
        if cell.has(mode)
        for provider in providers
        if named or provider.is_planned(cell, mode)
    ]


def _cells(choice: Choice) -> Iterable[tuple[str, Cell]]:
    for name in choice.sets:
        for distribution in choice.axes.get("distribution") or (None,):
            axes = dict(choice.axes)
            if distribution is not None:
                # A file is read once through, unless the number of ids is given.
                length = ids_module.length_of_file(distribution)
                axes["distribution"] = [distribution]
                axes["num_ids"] = axes.get("num_ids") or ([length] if length else None)
            yield from ((name, cell) for cell in varied(SETS[name].cells, **axes))


def execute(
    bench: Bench,
    jobs: Sequence[Job],
    writer: RowWriter,
    on_start: Callable[[Job], Any] = lambda job: None,
    on_row: Callable[[Row], Any] = lambda row: None,
    on_skip: Callable[[Job], Any] = lambda job: None,
    last_start: float = float("inf"),
    in_turns: bool = False,
) -> list[Row]:
    """Measure the jobs that the file lacks, in order, and write each row; returns the new rows.

    Args:
        last_start: by time.monotonic(); the jobs that are left then are skipped.
        in_turns: the providers of a cell and mode take turns; those that need a setting are measured alone.
    """
    rows = []
    for cell, of_cell in itertools.groupby(jobs, key=lambda job: job.cell):
        problem: Problem | Exception | None = None
        for group in _groups(of_cell, in_turns):
            known: dict[Job, Row] = {}
            for job in group:
                row = job.row(bench)
                if row.key in writer.done or time.monotonic() > last_start:
                    on_skip(job)
                    continue
                on_start(job)
                known[job] = _refused(bench, job, row) or row
            open_jobs = [job for job, row in known.items() if row.status == "ok"]
            if len(open_jobs) > 1:
                known.update(_too_large(bench, open_jobs, known))
                open_jobs = [job for job, row in known.items() if row.status == "ok"]
            if open_jobs and problem is None:
                try:
                    problem = bench.problem(cell)
                except Exception as error:
                    problem = error
            if open_jobs and isinstance(problem, Problem):
                known.update(_measured(bench, problem, open_jobs, known))
                collect_cycles(problem)
                _free(bench.device)
            for job, row in known.items():
                if job in open_jobs and isinstance(problem, ids_module.IdsError):
                    row = replace(row, status="missing", note=str(problem))
                elif job in open_jobs and isinstance(problem, Exception):
                    row = failed(row, problem)
                writer.write(row)
                rows.append(row)
                on_row(row)
        problem = None
        _free(bench.device)
    return rows


def _groups(jobs: Iterable[Job], in_turns: bool) -> Iterable[list[Job]]:
    """The jobs of one cell that are measured together."""
    for _, of_mode in itertools.groupby(jobs, key=lambda job: (job.set, job.mode)):
        group: list[Job] = []
        for job in of_mode:
            if in_turns and job.provider.needs_no_setting:
                group.append(job)
            else:
                yield [job]
        if group:
            yield group


def _measured(
    bench: Bench, problem: Problem, jobs: Sequence[Job], rows: Mapping[Job, Row]
) -> dict[Job, Row]:
    """The jobs' rows with their results."""
    mode = jobs[0].mode
    if len(jobs) == 1:
        (job,) = jobs
        return {job: bench.measure(problem, job.provider, mode, rows[job])}
    providers = [job.provider for job in jobs]
    done = bench.measure_in_turns(problem, providers, mode, [rows[job] for job in jobs])
    return dict(zip(jobs, done, strict=True))


def _too_large(bench: Bench, jobs: Sequence[Job], rows: Mapping[Job, Row]) -> dict[Job, Row]:
    """The rows of jobs that fit one by one and not together; empty if they fit."""
    beside = sum(job.provider.tables_beside for job in jobs)
    copies = sum(job.provider.copies for job in jobs)
    full = bench.does_not_fit(jobs[0].cell, jobs[0].mode, beside, copies, len(jobs))
    if full is None:
        return {}
    return {job: replace(rows[job], status="oom", note=f"in turns {full}") for job in jobs}


def _refused(bench: Bench, job: Job, row: Row) -> Row | None:
    """The row of a job that needs no measurement to be known; None: measure it."""
    provider, cell = job.provider, job.cell
    reason = provider.missing_reason(bench.device) or provider.refuses(cell, job.mode)
    if cell.operation == "embedding_graph" and bench.device.type != "cuda":
        reason = reason or "CUDA graphs need a CUDA device"
    if reason is not None:
        return replace(row, status="missing", note=reason)
    full = bench.does_not_fit(cell, job.mode, provider.tables_beside, provider.copies)
    return None if full is None else replace(row, status="oom", note=full)


def _free(device: torch.device) -> None:
    """Give the memory of the last provider back, so that the next finds the same."""
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()
