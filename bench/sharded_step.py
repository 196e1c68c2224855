"""One run of `distributed`: as many ranks as it is told, each with its rows of a table, on gloo.

The two layers of a pair take turns. Prints lines of JSON: one a turn, with its
seconds, and at the end what a rank sends and holds.
"""

from __future__ import annotations

import importlib
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
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from . import loopback
from .distributed import PAIRS, Shape
from .sharded_tables import KINDS, ShardedTable

# Of torch's functional collectives those that send nothing.
NO_TRANSFER = ("wait_tensor.default", "_wrap_tensor_autograd.default")


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
        elif func is torch.ops.c10d.alltoall_base_.default:
            self.total += args[1].nbytes
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


def have_equal_rows(theirs: ShardedTable, ours: ShardedTable) -> bool:
    return all(map(torch.equal, theirs.rows(), ours.rows()))


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
    pair = PAIRS[shape.pair]
    kinds = zip((pair.theirs, pair.ours), KINDS[shape.pair], strict=True)
    tables = {name: kind(shape, mesh) for name, kind in kinds}

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
        table.update()
    equal &= have_equal_rows(theirs, ours)
    sent = {name: sent_bytes(table.step, shape) for name, table in tables.items()}
    own_cpu = dict.fromkeys(tables, 0.0)
    for turn in range(shape.rounds):
        seconds = {}
        # There and back: nobody is always the first.
        for name in list(tables)[:: 1 if turn % 2 else -1]:
            dist.barrier()
            start, cpu = time.perf_counter(), time.process_time()
            tables[name].step()
            own_cpu[name] += time.process_time() - cpu
            dist.barrier()
            seconds[name] = time.perf_counter() - start
        say(seconds=seconds)
    equal &= have_equal_rows(theirs, ours)
    all_equal = of_all_ranks(int(equal), dist.ReduceOp.MIN)
    # A step's, in the mean of ranks and rounds.
    cpu_times = torch.tensor(list(own_cpu.values()), device="cpu")
    dist.all_reduce(cpu_times)
    cpu_times /= shape.ranks * shape.rounds
    cpu_seconds = dict(zip(tables, cpu_times.tolist(), strict=True))
    say(equal=bool(all_equal), sent_bytes=sent, gradient_bytes=gradient, cpu_seconds=cpu_seconds)
    dist.destroy_process_group()


def main() -> None:
    start_ranks(Shape(**json.loads(sys.argv[1])))


def start_ranks(shape: Shape) -> None:
    for package in PAIRS[shape.pair].packages:
        importlib.import_module(package)
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
