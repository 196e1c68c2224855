"""What the demo and the examples share: the backend in words, a clean end, pictures in one piece, checks."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch

import gpu_embed

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.console import Console


class CannotRunError(Exception):
    """Something that the user must change before the demo can start."""


class Checks:
    """Print each claim with its outcome, and remember whether all held."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.all_held = True

    def __call__(self, claim: str, holds: bool) -> None:
        self.all_held &= holds
        self.console.print(
            f"{'ok' if holds else 'FAILED':6}  {claim}", style="green" if holds else "red"
        )


def describe_backend(device: torch.device | str | None = None) -> str:
    """Which backend serves a device (None: cuda if there is one); on a CPU also what cannot be seen there."""
    said = f"backend: {gpu_embed.backends.explain(device)}"
    if not said.startswith("backend: torch serves cpu"):
        return said
    return f"{said}\nOn a CPU torch's own operators run: only a CUDA device shows gpu_embed's kernels and their speed."


def end_on_ctrl_c(main: Callable[[], None], left: str = "no picture was written") -> None:
    """Run a program's `main`; Ctrl-C ends it with one line, which says what is `left`, and with code 130."""
    try:
        main()
    except KeyboardInterrupt:
        print(f"\ninterrupted, {left}", file=sys.stderr)
        sys.exit(130)


def save_figure(figure: Figure, out: Path) -> None:
    """Draw into a file beside ``out`` and move it there, so that no half picture is ever seen."""
    part = part_file(out)
    try:
        figure.savefig(part, format=out.suffix[1:] or "png")
        os.replace(part, out)
    finally:
        part.unlink(missing_ok=True)


def part_file(out: Path) -> Path:
    """Name a file beside ``out`` that no other process writes."""
    return out.with_name(f".{out.stem}.{os.getpid()}.part")
