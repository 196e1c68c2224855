"""One run of `distributed`: as many ranks as it is told, each with its rows of a table, on gloo.

Torch's layer and ours, both under torch's RowwiseParallel, take turns. Prints lines of JSON: one a turn, with its
seconds, and at the end what a rank sends and holds.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.parallel import RowwiseParallel, parallelize_module
from torch.utils._python_dispatch import TorchDispatchMode

import gpu_embed

from . import ids as ids_module
from . import loopback
from .distributed import DISTRIBUTION, LAYERS, Shape

KINDS = dict(zip(LAYERS, (torch.nn.Embedding, gpu_embed.Embedding), strict=True))
# Of torch's functional collectives those that send nothing.
NO_TRANSFER = ("wait_tensor.default", "_wrap_tensor_autograd.default")


class ShardedTable:
    """A table of fp32 whose rows are spread over the ranks, and its training step."""

    def __init__(self, kind: type[torch.nn.Embedding], shape: Shape, mesh: DeviceMesh) -> None:
        rowwise = RowwiseParallel(input_layouts=Replicate())
        module = parallelize_module(
            kind(shape.rows, shape.dim, device="meta"), mesh, rowwise
        ).to_empty(device="cpu")
        assert isinstance(module.weight, DTensor)
        self.module = module
        self.weight: DTensor = module.weight
        own_rows = torch.Generator("cpu").manual_seed(dist.get_rank())
        with torch.no_grad():
            self.rows.normal_(generator=own_rows)
        self.ids = ids_module.draw(DISTRIBUTION, shape.ids, shape.rows)
        # Small integers, whose sums are exact.
        values = torch.Generator("cpu").manual_seed(0)
        size = (shape.ids, shape.dim)
        self.grad_output = torch.randint(-2, 3, size, generator=values, device="cpu").float()
        self.optimizer = torch.optim.SGD(module.parameters(), lr=2.0**-3)

    @property
    def rows(self) -> Tensor:
        """The rows of this rank."""
        return self.weight.to_local()

    def backward(self) -> Tensor:
        """Forward and backward; returns the output."""
        self.optimizer.zero_grad()
        output: Tensor = self.module(self.ids)
        output.backward(self.grad_output)
        return output.detach()

    def step(self) -> None:
        self.backward()
        self.optimizer.step()

    def gradient_bytes(self) -> int:
        """Of this rank's part of the gradient, which may be all of it."""
        assert isinstance(self.weight.grad, DTensor)
        return self.weight.grad.to_local().untyped_storage().nbytes()


class GivenBytes(TorchDispatchMode):
    """Sums the bytes that collectives are given by this rank."""

    total = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        # DTensor's own dispatch comes first: it is what calls the collectives.
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented
        if func.namespace == "_c10d_functional" and func.__name__ not in NO_TRANSFER:
            self.total += args[0].nbytes
        return func(*args, **(kwargs or {}))


def sent_bytes(step: Callable[[], object], shape: Shape) -> int:
    """What a rank sends in a step, in the mean of the ranks."""
    if not shape.has_namespace:
        with GivenBytes() as given:
            step()
        return given.total
    dist.barrier()
    before = loopback.sent_bytes()
    step()
    dist.barrier()
    return (loopback.sent_bytes() - before) // shape.ranks


def of_all_ranks(value: int, op: Any) -> int:
    """The largest, or the smallest, of the ranks' values."""
    number = torch.tensor(value, device="cpu")
    dist.all_reduce(number, op)
    return int(number)


def run_rank(rank: int, shape: Shape, store: str) -> None:
    # Whoever waits for another rank would not hear of an interruption.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{store}", rank=rank, world_size=shape.ranks)
    mesh = init_device_mesh("cpu", (shape.ranks,))
    tables = {name: ShardedTable(kind, shape, mesh) for name, kind in KINDS.items()}

    def say(**words: object) -> None:
        if rank == 0:
            print(json.dumps(words), flush=True)

    theirs, ours = tables.values()
    equal = torch.equal(theirs.backward(), ours.backward())
    gradient = {
        name: of_all_ranks(table.gradient_bytes(), dist.ReduceOp.MAX)
        for name, table in tables.items()
    }
    for table in tables.values():
        table.optimizer.step()
    equal &= torch.equal(theirs.rows, ours.rows)
    sent = {name: sent_bytes(table.step, shape) for name, table in tables.items()}
    for turn in range(shape.rounds):
        seconds = {}
        # There and back: nobody is always the first.
        for name in list(tables)[:: 1 if turn % 2 else -1]:
            dist.barrier()
            start = time.perf_counter()
            tables[name].step()
            dist.barrier()
            seconds[name] = time.perf_counter() - start
        say(seconds=seconds)
    equal &= torch.equal(theirs.rows, ours.rows)
    all_equal = of_all_ranks(int(equal), dist.ReduceOp.MIN)
    say(equal=bool(all_equal), sent_bytes=sent, gradient_bytes=gradient)
    dist.destroy_process_group()


def main() -> None:
    shape = Shape(**json.loads(sys.argv[1]))
    if shape.has_namespace:
        loopback.bring_up()
    if sys.platform == "linux":
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.start_processes(
            run_rank,
            (shape, str(Path(folder, "store"))),
            shape.ranks,
            # Torch is imported once, and no thread runs yet.
            start_method="fork" if sys.platform == "linux" else "spawn",
        )


if __name__ == "__main__":
    main()
