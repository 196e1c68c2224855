"""The training step of tables whose rows are spread over processes: ours, beside torch's and TorchRec's.

On the CPU and gloo. So it is about how much is computed, held and sent, and says nothing of a GPU or NCCL.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from . import loopback
from .console import make_table
from .machine import readable_bytes
from .timing import percentiles

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True)
class Pair:
    """Two ways to do the same, which are measured in turns: ours, and what it is compared with."""

    what: str
    theirs: str
    ours: str = "gpu_embed"
    packages: tuple[str, ...] = ()  # that it needs beside torch
    multiple: int = 1  # that the number of ids is of


_TORCHREC = ("torchrec", "fbgemm_gpu")
# Of TorchRec's bags: tables, and ids of a bag.
TABLES, BAG = 4, 4
# sharded_tables.py says how each is made.
PAIRS = {
    "rowwise": Pair("torch's RowwiseParallel, ids that are the same on all ranks", "torch"),
    "distinct": Pair("ShardedEmbedding, ids of each rank's own", "distinct=False", "distinct=True"),
    "exchange": Pair(
        "a table by rows, ids of each rank's own", "EmbeddingCollection", packages=_TORCHREC
    ),
    "bags-dense": Pair(
        f"TorchRec's bags of {BAG} ids in {TABLES} tables by rows, compute kernel DENSE",
        "TorchRec",
        packages=_TORCHREC,
        multiple=TABLES * BAG,
    ),
    "bags-fused": Pair(
        f"TorchRec's bags of {BAG} ids in {TABLES} tables by rows, compute kernel FUSED",
        "FBGEMM",
        packages=_TORCHREC,
        multiple=TABLES * BAG,
    ),
}
DISTRIBUTION = "zipf:1.05"
# How the bytes of a step were counted.
COUNTED = {
    "loopback": "on the loopback of a network namespace of their own",
    "collectives": "as what collectives are given, since this machine allows no network namespace",
}


class RankError(Exception):
    """Ranks that failed, and their last words."""


@dataclass(frozen=True)
class Shape:
    """What is measured, and whether the ranks have a network namespace of their own."""

    pair: str  # of PAIRS
    ranks: int
    rows: int
    dim: int
    ids: int  # of each rank
    rounds: int
    has_namespace: bool


@dataclass(frozen=True)
class ShardedStep:
    """A layer's training step, and how it stands to the other's in the same rounds."""

    pair: str
    layer: str  # of the pair, theirs first
    ranks: int
    rows: int
    dim: int
    ids: int
    rounds: int
    ms_p20: float
    ms_p50: float
    ms_p80: float
    # Of the rounds' quotients.
    times_theirs_p20: float
    times_theirs_p50: float
    times_theirs_p80: float
    cpu_ms: float  # a rank and step, in the mean: other programs hardly change it
    sent_bytes: int  # a rank and step
    sent_counted: str  # by COUNTED
    gradient_bytes: int  # of the rank that holds most
    equal: int  # 1 where outputs and tables of both are equal, bit for bit


def measure_distributed(
    shape: Shape, advance: Callable[[], Any] = lambda: None
) -> list[ShardedStep]:
    """One line a layer; `advance` is called after each round. Raises RankError."""
    *rounds, end = list(_spoken(shape, advance))
    pair = PAIRS[shape.pair]
    seconds = {
        layer: [one["seconds"][layer] for one in rounds] for layer in (pair.theirs, pair.ours)
    }
    found = []
    for layer, own in seconds.items():
        ms = percentiles([1e3 * one for one in own])
        against = percentiles([a / b for a, b in zip(own, seconds[pair.theirs], strict=True)])
        counted = "loopback" if shape.has_namespace else "collectives"
        cpu_ms = 1e3 * end["cpu_seconds"][layer]
        sent, gradient = end["sent_bytes"][layer], end["gradient_bytes"][layer]
        sizes = shape.ranks, shape.rows, shape.dim, shape.ids, shape.rounds
        bits = int(end["equal"])
        found.append(
            ShardedStep(
                shape.pair, layer, *sizes, *ms, *against, cpu_ms, sent, counted, gradient, bits
            )
        )
    return found


def _spoken(shape: Shape, advance: Callable[[], Any]) -> list[dict[str, Any]]:
    """What the ranks say, line by line."""
    said = []
    with tempfile.TemporaryFile("w+") as errors:
        with subprocess.Popen(
            command(shape), stdout=subprocess.PIPE, stderr=errors, text=True, env=_environ()
        ) as process:
            assert process.stdout is not None
            try:
                for line in process.stdout:
                    # Gloo may have words of its own.
                    if line.startswith("{"):
                        said.append(json.loads(line))
                        advance()
            finally:
                # Its ranks end with it.
                process.terminate()
        errors.seek(0)
        words = errors.read().strip().splitlines()
    if len(said) != shape.rounds + 1:
        raise RankError(f"{shape.ranks} ranks: {words[-1] if words else process.returncode}")
    return said


def command(shape: Shape) -> list[str]:
    """What starts the ranks."""
    own_network = loopback.UNSHARE if shape.has_namespace else ()
    module = "gpu_embed.bench.sharded_step"
    return [*own_network, sys.executable, "-m", module, json.dumps(asdict(shape))]


def _environ() -> dict[str, str]:
    """Without what a launcher has set for ranks of its own."""
    launched = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    return {name: value for name, value in os.environ.items() if name not in launched}


def needed_bytes(ranks: int, elements: int) -> int:
    """Of all ranks, at the peak: two tables, and torch's gradient, whole on each rank and once more when it is cut."""
    return 4 * elements * (2 + 2 * ranks)


def rich_table(steps: Sequence[ShardedStep]) -> Table:
    """The steps of one pair and size, and several numbers of ranks; theirs before ours."""
    first = steps[0]
    title = (
        f"{PAIRS[first.pair].what}: a training step of {first.rows:,} x {first.dim} fp32 on gloo,\n"
        f"{first.ids:,} ids a rank ({DISTRIBUTION}).\n"
        f"Median of {first.rounds} rounds in turns, the ratio with its 20th and 80th percentile.\n"
        f"A rank's mean of the CPU's time and of the bytes, counted {COUNTED[first.sent_counted]}"
    )
    columns = ("layer", ">ms", ">x theirs", ">ms of CPU", ">sent", ">x theirs", ">gradient")
    table = make_table(title, ">ranks", *columns, ">x theirs", "equal")
    theirs = {step.ranks: step for step in reversed(steps)}
    for step in steps:
        of = theirs[step.ranks]
        low, middle, high = step.times_theirs_p20, step.times_theirs_p50, step.times_theirs_p80
        table.add_row(
            str(step.ranks),
            step.layer,
            f"{step.ms_p50:.4g}",
            "1" if step is of else f"{middle:.2f} ({low:.2f} to {high:.2f})",
            f"{step.cpu_ms:.3g} ({step.cpu_ms / of.cpu_ms:.2f})",
            f"{step.sent_bytes / 1e6:.4g} MB",
            ratio(step.sent_bytes, of.sent_bytes),
            readable_bytes(step.gradient_bytes),
            ratio(step.gradient_bytes, of.gradient_bytes),
            "yes" if step.equal else "NO",
        )
    return table


def ratio(bytes_: int, theirs: int) -> str:
    return f"{bytes_ / theirs:.4g}" if theirs else ""
