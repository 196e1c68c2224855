"""The layer at work: two phrases by hand, then real text, beside torch's own layer.

Run it with ``python -m gpu_embed.demo``; ``--help`` lists the options.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import importlib.util
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

import gpu_embed

from .next_word import FULL, QUICK, Run, run_text
from .options import example_parser, positive
from .phrases import PhraseTable, run_phrases
from .running import CannotRunError, Checks, describe_backend, save_figure


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = example_parser(
        __doc__,
        "a small model and few steps, to see that it runs",
        picture="gpu_embed_demo.png",
        seed=True,
    )
    parser.prog = "python -m gpu_embed.demo"
    parser.description = (
        "Train gpu_embed.Embedding on two phrases, then on real text beside torch.nn.Embedding, and "
        "draw both. Takes under two minutes on two CPU cores; uses a CUDA GPU when there is one."
    )
    parser.epilog = (
        "Exit code: 0 all checks hold, 1 one failed, 2 it cannot start, 130 interrupted."
    )
    parser.add_argument(
        "--steps", type=positive, help=f"training steps on the real text (default: {FULL.steps})"
    )
    return parser.parse_args(argv)


def check_extra() -> None:
    for name in ("rich", "matplotlib"):
        if importlib.util.find_spec(name) is None:
            raise CannotRunError(
                f'the demo needs {name}: install the extra "demo" (from a clone: pip install ".[demo]")'
            )
    try:
        importlib.import_module("gpu_embed.demo.picture")
    except Exception as problem:  # a broken install, or MPLBACKEND set to nonsense
        raise CannotRunError(f"matplotlib does not work here: {problem}") from problem


def check_backend(device: torch.device) -> None:
    """Look one row up: a forced backend that cannot run, or a misspelt setting, raises."""
    try:
        gpu_embed.Embedding(1, 1, device=device)(torch.zeros(1, dtype=torch.int64, device=device))
    except (RuntimeError, ValueError) as problem:
        raise CannotRunError(str(problem).removeprefix("gpu_embed: ")) from problem


def save_picture(phrases: PhraseTable, runs: Sequence[Run], guessing: float, out: Path) -> None:
    """Draw both parts into one picture."""
    from . import picture

    figure = picture.draw(
        phrases.words,
        phrases.before,
        phrases.after,
        {run.name: run.losses for run in runs},
        guessing,
    )
    save_figure(figure, out)


def run_demo(args: argparse.Namespace) -> bool:
    """Run both parts and save the picture; tell whether all checks held."""
    check_extra()
    device = args.device
    check_backend(device)
    from rich.console import Console

    console = Console(markup=False, highlight=False, emoji=False, soft_wrap=True)
    checks = Checks(console)
    size = QUICK if args.quick else FULL
    if args.steps is not None:
        size = dataclasses.replace(size, steps=args.steps)

    start = time.perf_counter()
    threads = f", threads: {torch.get_num_threads()}" if device.type == "cpu" else ""
    console.print(f"gpu_embed demo on {device}{threads}, torch {torch.__version__}")
    console.print(describe_backend(device))
    console.rule("1. Two phrases")
    phrases = run_phrases(checks, device, args.seed)
    console.rule("2. Real text")
    runs, guessing = run_text(checks, device, args.seed, size)
    save_picture(phrases, runs, guessing, args.out)
    console.print(f"picture: {args.out} ({time.perf_counter() - start:.0f} s in all)")
    return checks.all_held


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    try:
        return 0 if run_demo(args) else 1
    except CannotRunError as problem:
        print(f"gpu_embed demo: {problem}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ngpu_embed demo: interrupted, no picture was written", file=sys.stderr)
        return 130


if __name__ == "__main__":
    # At this size more threads save little, and on a busy machine they wait for each other.
    torch.set_num_threads(1)
    sys.exit(main())
