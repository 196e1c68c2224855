"""A next-word model whose table is spread over processes by rows, with a head that is tied to it.

    pip install ".[demo]"
    torchrun --nproc-per-node 2 examples/sharded.py

What shards is `sharded_model`, `train` and `save_and_load`; the rest is the command line.

No process ever holds the whole table, its gradient or its optimizer's state. On GPUs each process takes a card of its
own; on a CPU they talk over gloo. Without torchrun one process holds all rows.
"""

import argparse
import contextlib
import os
import signal
import sys
import tempfile
from collections.abc import Iterator

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as checkpoints
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    loss_parallel,
    parallelize_module,
)

import gpu_embed
from gpu_embed.bench.machine import readable_bytes
from gpu_embed.demo import next_word
from gpu_embed.demo.options import example_parser
from gpu_embed.demo.running import describe_backend, end_on_ctrl_c

FULL = next_word.Size(steps=300, vocabulary=4000)
QUICK = next_word.Size(steps=150, vocabulary=301, embedding_dim=16, context=2, batch=128)

LEFT = "nothing was written"


class NextWord(nn.Module):
    """Guess the next word from the rows of those before it, by the same rows."""

    def __init__(self, size: next_word.Size, device: str) -> None:
        super().__init__()
        rows, dim = size.vocabulary, size.embedding_dim
        self.table = gpu_embed.Embedding(rows, dim, device=device)
        self.position = nn.Parameter(torch.ones(size.context, dim, device=device))
        self.guess = nn.Linear(dim, rows, bias=False, device=device)

    def forward(self, context: Tensor) -> Tensor:
        return self.guess((self.table(context) * self.position).sum(dim=1))


def sharded_model(size: next_word.Size, mesh: DeviceMesh, seed: int) -> NextWord:
    """The model on the mesh, made where it will lie."""
    model = NextWord(size, device="meta")
    styles = {
        # Every process has the same words, and gets their rows.
        "table": RowwiseParallel(input_layouts=Replicate()),
        # Each guesses among its own rows alone, which the loss puts together.
        "guess": ColwiseParallel(output_layouts=Shard(-1), use_local_output=False),
    }
    parallelize_module(model, mesh, styles).to_empty(device=mesh.device_type)
    # Now, as each module has had a parameter of its own until here.
    model.guess.weight = model.table.weight
    # On a CPU torch would draw the same rows for all processes, so each draws its own.
    generator = torch.Generator(mesh.device_type).manual_seed(seed * mesh.size() + mesh.get_rank())
    with torch.no_grad():
        model.table.weight.to_local().normal_(std=0.02, generator=generator)
        model.position.fill_(1)
    return model


def loss_of(model: NextWord, context: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(model(context), target)


def train(
    model: NextWord, optimizer: torch.optim.Optimizer, ids: Tensor, args: argparse.Namespace
) -> list[float]:
    """The loss of every step. The seed is the same on all processes, and so are the batches."""
    losses = []
    with next_word.progress_bar(args.console) as progress:
        task = progress.add_task("training", total=args.size.steps, losses="")
        for context, target in next_word.random_batches(ids, args.size, args.seed):
            optimizer.zero_grad()
            with loss_parallel():
                loss = loss_of(model, context, target)
                loss.backward()
            optimizer.step()
            losses.append(loss.item())
            progress.update(task, advance=1, losses=f"{losses[-1]:.3f}")
    return losses


def say_what_lies_where(
    console: Console, model: NextWord, optimizer: torch.optim.Optimizer
) -> None:
    """A line for each process: its rows, and the bytes of what belongs to them."""
    table = model.table.weight
    state = [value.to_local() for value in optimizer.state[table].values() if value.dim()]
    held = {
        "table": table.to_local().nbytes,
        "gradient": table.grad.to_local().untyped_storage().nbytes(),
        "Adam's state": sum(moment.nbytes for moment in state),
    }
    said = ", ".join(f"{what} {readable_bytes(size)}" for what, size in held.items())
    lines: list[tuple[int, str]] = [(0, "")] * dist.get_world_size()
    dist.all_gather_object(lines, (len(table.to_local()), said))
    first = 0
    for rank, (rows, said) in enumerate(lines):
        where = f"rows {first} to {first + rows - 1}" if rows else "no rows"
        console.print(f"process {rank}: {where} of {len(table)}: {said}")
        first += rows


def save_and_load(
    folder: str, model: NextWord, optimizer: torch.optim.Optimizer, args: argparse.Namespace
) -> NextWord:
    """Write a checkpoint, each process its rows, and read it into a new model."""
    weights, state = get_state_dict(model, optimizer)
    checkpoints.save({"model": weights, "optimizer": state}, checkpoint_id=folder)
    restored = sharded_model(args.size, args.mesh, args.seed + 1)
    new_optimizer = torch.optim.Adam(restored.parameters(), lr=1.0)
    weights, state = get_state_dict(restored, new_optimizer)
    checkpoints.load({"model": weights, "optimizer": state}, checkpoint_id=folder)
    set_state_dict(restored, new_optimizer, model_state_dict=weights, optim_state_dict=state)
    return restored


@contextlib.contextmanager
def shared_folder() -> Iterator[str]:
    """A temporary folder that all processes of this machine know."""
    with contextlib.ExitStack() as stack:
        folder = [""]
        if dist.get_rank() == 0:
            folder = [stack.enter_context(tempfile.TemporaryDirectory())]
        dist.broadcast_object_list(folder)
        yield folder[0]
        # It goes when all have read it.
        dist.barrier()


@contextlib.contextmanager
def process_group(device: torch.device, left: str = LEFT) -> Iterator[None]:
    """The processes that torchrun has started, or this one alone. Where Ctrl-C ends them, one says what is `left`."""
    backend = "nccl" if device.type == "cuda" else "gloo"
    launched = dist.is_torchelastic_launched()
    if launched:
        # torchrun ends its processes so where one has failed.
        signal.signal(signal.SIGTERM, signal.default_int_handler)
    alone = {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    card = device if device.type == "cuda" else None
    if card is not None:
        torch.cuda.set_device(card)
    dist.init_process_group(backend, device_id=card, **({} if launched else alone))
    try:
        yield
    except KeyboardInterrupt as interrupt:
        if launched:
            # At once: an orderly end waits for the other processes, which end too.
            if dist.get_rank() == 0:
                print(f"\ninterrupted, {str(interrupt) or left}", file=sys.stderr, flush=True)
            os._exit(130)
        raise
    finally:
        dist.destroy_process_group()


def end_process() -> None:
    """End a process of torchrun at once: a thread of gloo that holds a tensor while Python ends would abort it."""
    if dist.is_torchelastic_launched():
        sys.stdout.flush()
        os._exit(0)


def main() -> None:
    args = example_parser(__doc__, "small and fast, to see that it runs", seed=True).parse_args()
    with process_group(args.device):
        run(args, args.device)
    end_process()


def run(args: argparse.Namespace, device: torch.device) -> None:
    ranks = dist.get_world_size()
    args.size = QUICK if args.quick else FULL
    args.mesh = init_device_mesh(device.type, (ranks,))
    args.console = console = Console(highlight=False, soft_wrap=True, quiet=dist.get_rank() > 0)
    console.print(describe_backend(device))
    if ranks == 1:
        console.print(
            "one process holds all rows: torchrun --nproc-per-node 2 examples/sharded.py spreads them"
        )
    corpus = next_word.encode_text(next_word.read_tokens(), args.size.vocabulary)
    ids = corpus.ids.to(device)
    model = sharded_model(args.size, args.mesh, args.seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    losses = train(model, optimizer, ids, args)
    console.print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")
    console.print(f"guessing by word frequency alone: {next_word.frequency_loss(corpus):.3f}")
    say_what_lies_where(console, model, optimizer)
    with shared_folder() as folder:
        restored = save_and_load(folder, model, optimizer, args)
    windows = ids.unfold(0, args.size.context + 1, 1)[:100]
    context, target = windows[:, :-1], windows[:, -1]
    with torch.no_grad(), loss_parallel():
        before, after = (loss_of(one, context, target).item() for one in (model, restored))
    console.print(f"a checkpoint, saved and read back: loss {before:.4f} and {after:.4f}")
    if before != after:
        sys.exit("the checkpoint has changed the model")


if __name__ == "__main__":
    end_on_ctrl_c(main, LEFT)
