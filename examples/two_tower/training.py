"""Train a TwoTower, measure it, and keep it in a checkpoint from which the training goes on as if nothing had been."""

import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from rich.progress import Progress
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh

import gpu_embed
from gpu_embed.demo.running import CannotRunError, hold_ctrl_c, write_whole
from gpu_embed.optim import RowWiseAdagrad, apply_in_backward

from .clicks import Clicks
from .model import TwoTower, shard_tables

BATCH = 1024
TOP = 10
LR = 0.05
# Whole tensors, whatever lies where: another number of processes may go on.
WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)


def in_backward(model: TwoTower) -> torch.optim.Optimizer:
    """The backward pass updates the tables and leaves no gradient."""
    return apply_in_backward(model.tables(), RowWiseAdagrad, lr=LR).optimizer


# Whose layers, whether their gradients are sparse, and what updates the tables. Ours is first.
SETUPS: dict[str, tuple[ModuleType, bool, Callable[[TwoTower], torch.optim.Optimizer]]] = {
    "gpu_embed, RowWiseAdagrad in backward": (gpu_embed, True, in_backward),
    "torch, sparse, Adagrad": (nn, True, lambda model: torch.optim.Adagrad(model.tables(), LR)),
    "torch, sparse, SparseAdam": (nn, True, lambda model: torch.optim.SparseAdam(model.tables())),
    "torch, dense, Adagrad": (nn, False, lambda model: torch.optim.Adagrad(model.tables(), LR)),
}
OURS = next(iter(SETUPS))


class Result(NamedTuple):
    """What an epoch has brought; `loss` is its mean, and nan before the first one."""

    loss: float
    recall: float
    ndcg: float


class Trainer:
    """A model and what updates it: one of SETUPS for the tables, Adam for the towers."""

    def __init__(
        self, clicks: Clicks, buckets: int, setup: str, device: torch.device, seed: int
    ) -> None:
        torch.manual_seed(seed)
        layers, sparse, update_tables = SETUPS[setup]
        self.model = TwoTower(clicks, buckets, layers, sparse).to(device)
        self.rank, self.ranks, self.seed = 0, 1, seed
        if dist.is_initialized():
            self.rank, self.ranks = dist.get_rank(), dist.get_world_size()
            shard_tables(self.model, init_device_mesh(device.type, (self.ranks,)))
        self.towers = [*self.model.user_tower.parameters(), *self.model.item_tower.parameters()]
        self.adam = torch.optim.Adam(self.towers, lr=1e-3)
        self.of_tables = update_tables(self.model)
        # What is updated in the backward pass has no step to call.
        self.stepped = [self.adam] if setup == OURS else [self.adam, self.of_tables]
        self.log_share = (clicks.counts / clicks.counts.sum()).log().to(device)
        self.clicks, self.train = clicks, clicks.train.to(device)
        self.batches = -(-len(self.train) // BATCH)  # of an epoch
        self.steps = 0
        self.losses: list[float] = []  # of the epoch that has begun
        self.results: list[Result] = []

    def step(self, places: Tensor, interrupted: bool = False) -> bool:
        """Forward, backward and update on a batch, of which each process takes its share; waits for the GPU.

        Tells whether any process was `interrupted`, so that all of them end at the same step.
        """
        # Drawn anew for each step, so that a training that goes on needs no state of a generator.
        torch.manual_seed(self.seed * 2**31 + self.steps * self.ranks + self.rank)
        own = places[self.rank :: self.ranks].to(self.train.device)
        # The gradients are summed over the processes: those of the tables always, here those of the towers too.
        loss = self.model.loss(self.train[own], self.log_share) * (len(own) / len(places))
        for optimizer in self.stepped:
            optimizer.zero_grad()
        loss.backward()
        total = loss.detach()
        if self.ranks > 1:
            # One exchange for all, as each has to wait for the slowest process.
            stop = torch.tensor(float(interrupted), device=loss.device)
            summed = [total, stop, *(weight.grad for weight in self.towers)]
            flat = torch.cat([tensor.flatten() for tensor in summed])
            dist.all_reduce(flat)
            for tensor, part in zip(summed, flat.split([t.numel() for t in summed]), strict=True):
                tensor.copy_(part.view_as(tensor))
            interrupted = bool(stop)
        for optimizer in self.stepped:
            optimizer.step()
        self.steps += 1
        self.losses.append(total.item())
        return interrupted

    def order(self, epoch: int) -> tuple[Tensor, ...]:
        """The batches of an epoch, as places in `train`: the same on all processes."""
        drawn = torch.Generator("cpu").manual_seed(self.seed * 2**31 + epoch)
        return torch.randperm(len(self.train), generator=drawn, device="cpu").split(BATCH)

    @torch.no_grad()
    def score(self, examples: Tensor) -> tuple[float, float]:
        """Recall and NDCG of the model on `valid` or `test`."""
        self.model.eval()
        device = self.train.device
        items = self.model.item_vectors(torch.arange(len(self.clicks.counts), device=device))

        def score(some: Tensor) -> Tensor:
            some = some.to(device)
            return (self.model.user_vectors(some[:, 0], some[:, 2:]) @ items.t()).cpu()

        found = ranking(self.clicks, examples, score)
        self.model.train()
        return found

    def state(self) -> dict[str, Any]:
        """All that a training needs to go on; every process calls it, and the first one gets it whole."""
        model, optimizers = get_state_dict(self.model, [self.adam, self.of_tables], options=WHOLE)
        place = {"steps": self.steps, "losses": self.losses}
        results = [tuple(result) for result in self.results]
        return {"model": model, "optimizers": optimizers, "results": results, **place}

    def load(self, state: dict[str, Any]) -> None:
        set_state_dict(
            self.model,
            [self.adam, self.of_tables],
            model_state_dict=state["model"],
            optim_state_dict=state["optimizers"],
            options=WHOLE,
        )
        self.steps, self.losses = state["steps"], state["losses"]
        self.results = [Result(*result) for result in state["results"]]


class Checkpoint:
    """A file from which a training goes on, and what it was made for."""

    def __init__(self, path: Path, clicks: Clicks, **options: object) -> None:
        self.path = path
        self.has_ours = False  # it can be gone on from
        self.made_for = {
            "torch": str(torch.__version__),
            "gpu_embed": gpu_embed.__version__,
            "data": clicks.fingerprint(),
            **options,
        }

    def read(self, epochs: int) -> dict[str, Any]:
        """What `save` has written. Raises CannotRunError for what cannot go on to the end of so many epochs."""
        other = "start anew without --resume, or name another file by --checkpoint"
        if not self.path.is_file():
            raise CannotRunError(f"--resume: there is no checkpoint {self.path}; {other}")
        try:
            state = torch.load(self.path, map_location="cpu", weights_only=True)
            made_for = dict(state.get("made_for"))
        # A damaged file may raise anything.
        except Exception:
            raise CannotRunError(
                f"--resume: {self.path} is damaged, or no checkpoint of this program; {other}"
            ) from None
        for what, ours in self.made_for.items():
            theirs = made_for.get(what)
            if theirs != ours:
                raise CannotRunError(
                    f"--resume: {self.path} is of another training: {what} was {theirs}, and is {ours}; {other}"
                )
        # One that has begun has losses.
        epochs_begun = len(state["results"]) - 1 + bool(state["losses"])
        if epochs_begun > epochs:
            raise CannotRunError(
                f"--resume: {self.path} has begun epoch {epochs_begun}, choose --epochs {epochs_begun} or more"
            )
        self.has_ours = True
        return state

    def save(self, trainer: Trainer) -> None:
        """Write the file in one piece; every process calls it."""
        state = {"made_for": self.made_for, **trainer.state()}
        if trainer.rank > 0:
            return  # the first process has it all

        def write(part: Path) -> None:
            # Into a file of Python's, which says why it cannot be written.
            with part.open("wb") as file:
                torch.save(state, file)

        try:
            write_whole(self.path, write)
        except (OSError, RuntimeError) as problem:
            # What torch raises itself tells of the end of the file that it cannot write then either.
            first = problem.__context__ or problem
            reason = str(first).splitlines()[0]
            raise CannotRunError(f"cannot write the checkpoint {self.path}: {reason}") from None
        self.has_ours = True


def ranking(
    clicks: Clicks, examples: Tensor, score: Callable[[Tensor], Tensor]
) -> tuple[float, float]:
    """Recall and NDCG of the first TOP, where `score` gives some of the examples' scores of all items.

    With one right item for each user, recall is the share of users who find it. Ties count as found. What a user
    clicked before is left out.
    """
    seen = clicks.seen(
        (clicks.train,) if examples is clicks.valid else (clicks.train, clicks.valid)
    )
    hits = gains = 0.0
    for some in examples.split(512):
        scores = score(some).masked_fill(seen[some[:, 0]], -math.inf)
        better = (scores > scores.gather(1, some[:, 1:2])).sum(1)
        hits += (better < TOP).sum().item()
        gains += ((better < TOP) / (better + 2).log2()).sum().item()
    return hits / len(examples), gains / len(examples)


def popularity(clicks: Clicks, examples: Tensor) -> tuple[float, float]:
    """Recall and NDCG of recommending to everyone what is chosen most often."""
    return ranking(clicks, examples, lambda some: clicks.counts.float().expand(len(some), -1))


def train(trainer: Trainer, epochs: int, checkpoint: Checkpoint, bar: Progress) -> None:
    """Go on to the end of so many epochs, each of which leaves a checkpoint, as Ctrl-C does."""
    total = epochs * trainer.batches
    task = bar.add_task("training", total=total, completed=trainer.steps, said="")
    valid = trainer.clicks.valid
    if not trainer.results:
        trainer.results.append(Result(math.nan, *trainer.score(valid)))
    with hold_ctrl_c() as interrupted:
        while trainer.steps < total:
            epoch, done = divmod(trainer.steps, trainer.batches)
            for places in trainer.order(epoch)[done:]:
                stop = trainer.step(places, interrupted())
                bar.advance(task)
                if stop and trainer.steps % trainer.batches:
                    checkpoint.save(trainer)
                    raise KeyboardInterrupt
            result = Result(statistics.fmean(trainer.losses), *trainer.score(valid))
            trainer.results.append(result)
            trainer.losses = []
            checkpoint.save(trainer)
            bar.update(task, said=f"loss {result.loss:.3f}, recall@{TOP} {result.recall:.3f}")
            if stop:
                raise KeyboardInterrupt


def step_times(
    trainers: dict[str, Trainer], rounds: int, advance: Callable[[], None]
) -> dict[str, float]:
    """The time of the fastest step in ms, as on a busy machine the others wait.

    Before them come two, which make the optimizer's state and compile kernels.
    """
    times: dict[str, list[float]] = {name: [] for name in trainers}
    drawn = torch.Generator("cpu").manual_seed(0)
    for _ in range(2 + rounds):
        # By turns, so that whatever else the machine does meets all alike.
        for name, trainer in trainers.items():
            places = torch.randint(len(trainer.train), (BATCH,), generator=drawn, device="cpu")
            start = time.perf_counter()
            trainer.step(places)
            times[name].append(1e3 * (time.perf_counter() - start))
            advance()
    return {name: min(own[2:]) for name, own in times.items()}


def compared(ms: dict[str, float]) -> str:
    """Which is faster, in words; nothing is claimed where there is nothing to compare with."""
    ours = ms[OURS]
    said = f"A step takes {ours:,.1f} ms with gpu_embed"
    others = {name: value for name, value in ms.items() if name != OURS}
    if not others:
        return said
    name = min(others, key=others.__getitem__)
    fastest = others[name]
    said += (
        f" and {fastest:,.1f} ms with torch's fastest of {len(others)} ({name.partition(', ')[2]})"
    )
    if abs(fastest - ours) < 0.05 * ours:
        return f"{said}: neither is faster by 5 %."
    if ours < fastest:
        return f"{said}: gpu_embed is {fastest / ours:.1f} times as fast."
    return f"{said}: gpu_embed is slower, and takes {ours / fastest:.1f} times as long."
