"""What the first lookup of a process costs: imports, compilation, the lookup, its gradient.

Each start is a process of its own. Without a card the Triton backend goes up to the driver, as in `host_time`: it
compiles for a card that is not there, and launches nothing.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch

import gpu_embed
from gpu_embed import backends

# What is timed of a start, in this order.
PHASES = ("import torch", "import gpu_embed", "first tensors", "first lookup", "its gradient")
CHILD = Path(__file__).with_name("first_lookup.py")
ARCHITECTURE = 90


class StartError(Exception):
    """A start that failed, and its last words."""


@dataclass(frozen=True)
class Way:
    """How a process comes to its first lookup."""

    name: str
    who: str  # as first_lookup.py takes it
    warm: bool | None = (
        None  # whether Triton's cache holds the kernels; None: Triton has no part in it
    )


@dataclass(frozen=True)
class ColdStart:
    """One way's seconds, each the median of the starts."""

    way: Way
    seconds: dict[str, float]  # by PHASES


def ways(device: torch.device) -> list[Way]:
    found = [Way("torch", "torch")]
    name = "gpu_embed, triton"
    if device.type == "cpu":
        found.append(Way("gpu_embed, torch backend", "gpu_embed"))
        name += " up to the driver"
    if importlib.util.find_spec("triton") is not None:
        found += [Way(f"{name}, empty cache", "triton", False)]
        found += [Way(f"{name}, warm cache", "triton", True)]
    return found


def measure_cold_start(
    device: torch.device, starts: int, advance: Callable[[], Any] = lambda: None
) -> list[ColdStart]:
    """The ways in turns, so that what else the machine does meets all of them. Raises StartError."""
    seconds: dict[Way, list[list[float]]] = {way: [] for way in ways(device)}
    with tempfile.TemporaryDirectory() as folder:
        # Before the first turn every file is read once, and the warm cache filled.
        for turn in range(starts + 1):
            for way, taken in seconds.items():
                cache = Path(folder, "warm" if way.warm else f"empty-{turn}")
                laps = _start(way.who, device, cache)
                if turn:
                    taken.append(laps)
                advance()
    return [
        ColdStart(way, dict(zip(PHASES, map(median, zip(*taken, strict=True)), strict=True)))
        for way, taken in seconds.items()
    ]


def _start(who: str, device: torch.device, cache: Path) -> list[float]:
    """The laps of one process."""
    environ = {**os.environ, "TRITON_CACHE_DIR": str(cache)}
    environ.pop("TRITON_INTERPRET", None)
    # By its path, so that the package is not imported for it.
    code = "import runpy, sys; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
    command = [sys.executable, "-c", code, str(CHILD), who, str(device)]
    done = subprocess.run(command, env=environ, capture_output=True, text=True)
    if done.returncode:
        said = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise StartError(f"the first lookup of {who} failed: {said[-1]}")
    laps: list[float] = json.loads(done.stdout)
    return laps


def force_triton(device: torch.device) -> None:
    """Lookups go to the Triton backend; on a CPU to one that compiles what it would launch, and no more.

    There outputs are uninitialised: this is for the time alone.
    """
    gpu_embed.use_backend("triton")
    if device.type == "cuda":
        return
    from .codegen.compile import CompilingBackend

    backends._selected["triton", device] = CompilingBackend(ARCHITECTURE)
