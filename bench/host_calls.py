"""How many of this package's own Python functions a warm call runs, counted by `sys.setprofile`.

Times on a shared machine are noisy; these counts are the same each time. The triton backend is counted up to the
driver, as in `host_time`: what a user of a GPU pays, but for one more call a launch, which the stub replaces, and
for the few functions that only tensors on the CPU, or only those on a GPU, reach.
"""

from __future__ import annotations

import csv
import importlib.util
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import astuple, dataclass, fields
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor

import gpu_embed

from .host_time import DIM, NUM_IDS, VOCAB, stub_triton
from .timing import no_garbage_collection

PATH = Path(__file__).with_name("host_calls.csv")
PACKAGE = os.path.dirname(gpu_embed.__file__) + os.sep
# Folders of the package whose functions are not counted: the measurement itself, device code, and the tuner, whose
# driver stands in for the card's.
OTHERS = tuple(PACKAGE + folder + os.sep for folder in ("bench", "kernels", "tune"))
# No calls from Python 3.12 on.
INLINED = ("<listcomp>", "<dictcomp>", "<setcomp>")
BACKENDS = ("torch", "triton")
FEATURES, BAGS = 4, 2
Counted = tuple[str, str, Callable[[], Callable[[], object]]]  # operation, input, prepare


@dataclass(frozen=True)
class HostCalls:
    """One operation's calls on one backend; `functions` are what was called, in order."""

    operation: str
    backend: str
    input: str
    calls: int
    functions: tuple[str, ...] = ()


def own_calls(call: Callable[[], object]) -> list[str]:
    """The package's functions that `call` runs in this thread, in order, each as file:line function."""
    seen = []

    def profile(frame: FrameType, event: str, _: object) -> None:
        code = frame.f_code
        name = code.co_filename
        is_own = name.startswith(PACKAGE) and not name.startswith(OTHERS)
        if event == "call" and is_own and code.co_name not in INLINED:
            # The whole name has a class in it, from Python 3.11 on.
            function = getattr(code, "co_qualname", code.co_name)
            seen.append(f"{name[len(PACKAGE) :]}:{code.co_firstlineno} {function}")

    former = sys.getprofile()
    # A finalizer would be counted where it happens to run.
    with no_garbage_collection():
        sys.setprofile(profile)
        try:
            call()
        finally:
            sys.setprofile(former)
    return seen


def measure_host_calls() -> list[HostCalls]:
    """Each operation's third call, on each backend that is here: the second may still prepare the others."""
    rows = []
    for backend in BACKENDS:
        if importlib.util.find_spec(backend) is None:
            continue
        with stub_triton() if backend == "triton" else gpu_embed.use_backend(backend):
            for operation, given, prepare in _operations():
                for _ in range(2):
                    prepare()()
                functions = own_calls(prepare())
                rows.append(HostCalls(operation, backend, given, len(functions), tuple(functions)))
    return rows


def _operations() -> Iterator[Counted]:
    """What is counted. `prepare` makes one call ready, which alone is counted."""
    ids = torch.arange(NUM_IDS, device="cpu")
    bags = torch.arange(0, NUM_IDS, NUM_IDS // BAGS, device="cpu")
    batch = (
        torch.arange(FEATURES * NUM_IDS, device="cpu"),
        torch.arange(0, FEATURES * NUM_IDS + 1, NUM_IDS // BAGS, device="cpu"),
    )
    one = f"{NUM_IDS} int64 ids, table {VOCAB} x {DIM} float32"

    frozen = gpu_embed.Embedding(VOCAB, DIM, device="cpu").requires_grad_(False)
    yield "lookup, inference", one, lambda: partial(frozen, ids)
    yield from _trained("lookup", one, gpu_embed.Embedding(VOCAB, DIM, device="cpu"), ids)
    bag = gpu_embed.EmbeddingBag(VOCAB, DIM, mode="sum", device="cpu")
    yield from _trained("bag", f"{one}, {BAGS} bags by offsets, sum", bag, ids, bags)

    sizes = f"{FEATURES} tables {VOCAB} x {DIM} float32"
    many = f"{FEATURES * NUM_IDS} int64 ids, {FEATURES * BAGS} bags by offsets"
    tables = [(VOCAB, DIM)] * FEATURES
    for sparse in (False, True):
        rows = gpu_embed.TableBatchedEmbedding(tables, sparse=sparse, device="cpu")
        yield from _trained("batched rows", f"{many}, {sizes}", rows, *batch, sparse=sparse)
        pooled = gpu_embed.TableBatchedEmbeddingBag(tables, sparse=sparse, device="cpu")
        yield from _trained("batched bags", f"{many}, {sizes}, sum", pooled, *batch, sparse=sparse)
    mixed = f"{many}, {FEATURES} tables {VOCAB} x {DIM} and {2 * DIM} float32, sum"
    tables = [(VOCAB, DIM), (VOCAB, 2 * DIM)] * (FEATURES // 2)
    pooled = gpu_embed.TableBatchedEmbeddingBag(tables, sparse=True, device="cpu")
    yield from _trained("batched bags", mixed, pooled, *batch, sparse=True)
    call = _keras_call(ids)
    if call is not None:
        yield "Keras layer", one, lambda: call


def _trained(
    operation: str, given: str, layer: torch.nn.Module, *batch: Tensor, sparse: bool | None = None
) -> Iterator[Counted]:
    """A layer's forward with gradients and its backward; with the optimizer in it for sparse gradients."""

    def backward() -> Callable[[], object]:
        layer.zero_grad()
        output = layer(*batch)
        return partial(output.backward, torch.ones_like(output))

    if sparse is not None:
        given += f", sparse={sparse}"
    yield f"{operation}, forward", given, lambda: partial(layer, *batch)
    yield f"{operation}, backward", given, backward
    layer.zero_grad()
    if sparse:
        for kind in (gpu_embed.optim.RowWiseAdagrad, gpu_embed.optim.Adam):
            updates = gpu_embed.optim.apply_in_backward(layer, kind, lr=0.01)
            yield f"{operation}, backward with optimizer", f"{given}, {kind.__name__}", backward
            updates.remove()


def _keras_call(ids: Tensor) -> Callable[[], Any] | None:
    """None where Keras is not installed, or runs on something else than torch."""
    if importlib.util.find_spec("keras") is None:
        return None
    os.environ.setdefault("KERAS_BACKEND", "torch")
    import keras

    if keras.backend.backend() != "torch":
        return None
    import gpu_embed.keras

    layer = gpu_embed.keras.Embedding(VOCAB, DIM)

    def call() -> Any:
        # Keras puts tensors on the GPU where there is one.
        with keras.device("cpu"):
            return layer(ids)

    return call


COLUMNS = [field.name for field in fields(HostCalls)][:-1]


def write_table(path: Path, rows: list[HostCalls]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        table = [COLUMNS, *(astuple(row)[:-1] for row in rows)]
        csv.writer(file, lineterminator="\n").writerows(table)


def read_table(path: Path) -> list[HostCalls]:
    """The committed counts; none where the package was installed without its table."""
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return [
            HostCalls(row["operation"], row["backend"], row["input"], int(row["calls"]))
            for row in csv.DictReader(file)
        ]


def more_calls(old: list[HostCalls], new: list[HostCalls]) -> list[str]:
    """What is worse in `new`, in words; a row that `new` lacks could not be counted there."""
    allowed = {(row.operation, row.backend, row.input): row.calls for row in old}
    return [
        f"{row.operation}, {row.backend}: {row.calls} calls, was {most} ({row.input})"
        for row in new
        if row.calls > (most := allowed.get((row.operation, row.backend, row.input), row.calls))
    ]
