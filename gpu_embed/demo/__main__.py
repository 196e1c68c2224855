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
from .phrases import PhraseTable, run_phrases
from .running import CannotRunError, Checks, describe_backend, part_file, save_figure


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m gpu_embed.demo",
        description="Train gpu_embed.Embedding on two phrases, then on real text beside "
        "torch.nn.Embedding, and draw both. Takes under two minutes on two CPU cores; uses a CUDA "
        "GPU when there is one.",
        epilog="Exit code: 0 all checks hold, 1 one failed, 2 it cannot start, 130 interrupted.",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("gpu_embed_demo.png"),
        help="the picture (default: %(default)s)",
    )
    parser.add_argument(
        "--steps", type=int, help=f"training steps on the real text (default: {FULL.steps})"
    )
    parser.add_argument("--seed", type=int, default=0, help="for all that is random (default: 0)")
    parser.add_argument(
        "--quick", action="store_true", help="a small model and few steps, to see that it runs"
    )
    parser.add_argument(
        "--device", help="such as cpu or cuda:1 (default: cuda if there is one, else cpu)"
    )
    return parser.parse_args(argv)


def check_numbers(steps: int | None, seed: int) -> None:
    if steps is not None and steps < 1:
        raise CannotRunError(f"--steps {steps}: a training needs 1 step or more")
    if not 0 <= seed < 2**63:
        raise CannotRunError(f"--seed {seed}: choose a number from 0 to 2**63 - 1")


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


def check_out(out: Path) -> None:
    """Find out before the training whether the picture can be saved after it."""
    if out.suffix.lower() != ".png":
        raise CannotRunError(f"--out {out}: the picture is a PNG, choose a name that ends in .png")
    if not out.parent.is_dir():
        raise CannotRunError(
            f"--out {out}: there is no folder {out.parent}, make it or choose another"
        )
    if out.is_dir():
        raise CannotRunError(f"--out {out}: this is a folder, name a file in it")
    probe = part_file(out)
    try:
        probe.touch()
        probe.unlink()
    except OSError as problem:
        raise CannotRunError(
            f"--out {out}: cannot write there ({problem.strerror}), choose another folder"
        ) from None


def choose_device(name: str | None) -> torch.device:
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    # A torch built without CUDA raises AssertionError.
    except (RuntimeError, AssertionError) as problem:
        reason = str(problem).splitlines()[0]
        raise CannotRunError(f"--device {name}: {reason}; --device cpu always works") from None
    return device


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
    check_numbers(args.steps, args.seed)
    check_extra()
    check_out(args.out)
    device = choose_device(args.device)
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
