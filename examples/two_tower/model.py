"""A two-tower recommender, in one piece or with its tables spread over processes."""

import math
from itertools import combinations_with_replacement
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from gpu_embed.distributed import ShardedEmbedding
from gpu_embed.text import hash_ids

from .clicks import NOTHING, Clicks

DIM = 32
DROPOUT = 0.3


def hashed(traits: Tensor, buckets: int) -> Tensor:
    """Each trait, and each pair of traits that go together, hashed into [1, buckets); NOTHING where one is missing."""
    pairs = combinations_with_replacement(traits.unbind(1), 2)
    one, other = (torch.stack(side, 1) for side in zip(*pairs, strict=True))
    rows = 1 + hash_ids(one * 2**32 + other, buckets - 1)
    return torch.where((one == NOTHING) | (other == NOTHING), NOTHING, rows)


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
        self.register_buffer(
            "crosses_of_user", hashed(clicks.user_traits, buckets), persistent=False
        )
        self.register_buffer(
            "crosses_of_item", hashed(clicks.item_traits, buckets), persistent=False
        )

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
        nn.Dropout(DROPOUT), nn.Linear(inputs, 2 * DIM), nn.ReLU(), nn.Linear(2 * DIM, DIM)
    )


class ShardedMean(ShardedEmbedding):
    """The mean of the rows of each row of ids, as of an EmbeddingBag, from a table that is spread over processes."""

    def forward(self, ids: Tensor) -> Tensor:
        some = (ids != NOTHING)[:, :, None].float()  # [bags, ids, 1]
        return (super().forward(ids) * some).sum(1) / some.sum(1).clamp(min=1)


def shard_tables(model: TwoTower, mesh: DeviceMesh) -> None:
    """Leave each process some rows of every table. Larger tables would be made on the meta device."""
    for name, layer in list(model.named_children()):
        if isinstance(layer, nn.Embedding):
            # The rows of frequent items are neighbours, so each goes to another process.
            sharded = ShardedEmbedding.from_module(layer, mesh, rows="round_robin")
            setattr(model, name, sharded)
        elif isinstance(layer, nn.EmbeddingBag):
            table = nn.Embedding(*layer.weight.shape, padding_idx=NOTHING, _weight=layer.weight)
            setattr(model, name, ShardedMean.from_module(table, mesh, rows="round_robin"))
