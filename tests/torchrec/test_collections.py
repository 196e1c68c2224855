"""Collections sharded by our sharders equal whole ones with torch's layers, bit for bit."""

import pytest
import tiers
import torch
import torch.distributed as dist
from collections_of_tables import (
    assert_slices,
    bag_collection,
    batch,
    columns_of,
    layers_of,
    loss_of,
    outputs_of,
    row_collection,
    shard,
    variable_batch,
)

import gpu_embed
from gpu_embed.torchrec import EmbeddingBagCollectionSharder, EmbeddingCollectionSharder

OPTIMIZERS = {
    "SGD": (gpu_embed.optim.SGD, {"lr": 0.5}),
    "RowWiseAdagrad": (gpu_embed.optim.RowWiseAdagrad, {"lr": 0.5}),
    "Adam": (gpu_embed.optim.Adam, {"lr": 0.125}),
}
# Where rows lie on several ranks, TorchRec divides a mean behind the exchange, by the count and 1e-6.
BY_ROWS = ["row-wise", "table-row-wise"]
KINDS = [*BY_ROWS, "grid", "column-wise", "table-wise", "columns on one rank"]
STEPS = 2


def collection_of(what):
    """ "rows", "sum", "mean" or "weighted"."""
    if what == "rows":
        return row_collection()
    return bag_collection("mean" if what == "mean" else "sum", weighted=what == "weighted")


def sharder_of(what, optimizer):
    cls, arguments = OPTIMIZERS.get(optimizer, (None, {}))
    sharder = EmbeddingCollectionSharder if what == "rows" else EmbeddingBagCollectionSharder
    return sharder(cls, **arguments)


def equals_whole(what, kinds, optimizer, variable=None):
    """Train both, and compare outputs, weights and states.

    Args:
        optimizer: of `OPTIMIZERS`, in backward; None: dense gradients, to torch's SGD.
        variable: "even" or "uneven" if each feature has a number of bags of its own.
    """
    rank, world, weighted = dist.get_rank(), dist.get_world_size(), what == "weighted"
    by_rows = kinds in BY_ROWS or (isinstance(kinds, dict) and set(kinds.values()) & set(BY_ROWS))
    tolerance = 1e-4 if what == "mean" and by_rows else 0
    whole = collection_of(what)
    kernel = "dense" if optimizer is None else "fused"
    model = shard(whole, kinds, kernel, sharder_of(what, optimizer))
    cut = {name: columns_of(weight) for name, weight in model.state_dict().items()}
    layers = layers_of(whole)
    for layer in layers.values():
        layer.sparse = optimizer is not None
    reference = Reference(whole, cut, optimizer)
    if optimizer is None:
        step = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.5)

    def batches(rank, number):
        if variable is None:
            return [batch(rank, weighted, number)] * 2
        return variable_batch(rank, number, variable == "uneven")

    for number in range(STEPS):
        total = torch.zeros(())
        for other in range(world):
            own, in_full = batches(other, number)
            outputs = outputs_of(whole(in_full))
            total = total + loss_of(outputs, other) / world
            if other == rank:
                expected, given = outputs, own
        total.backward()
        outputs = outputs_of(model(given))
        assert outputs.keys() == expected.keys()
        for name in outputs if number == 0 else ():
            torch.testing.assert_close(outputs[name], expected[name], rtol=tolerance, atol=0)
        loss_of(outputs, rank).backward()
        if optimizer is None:
            step.step()
            step.zero_grad()
        reference.step()
        state = model.state_dict()
        assert state.keys() == whole.state_dict().keys()
        for name, weight in whole.state_dict().items():
            assert_slices(state[name], weight, tolerance)
    saved = model.fused_optimizer.state_dict()["state"]
    if optimizer is None:
        assert not saved
    for name, states in saved.items():
        reference.check(name, states, tolerance)


class Reference:
    """A whole collection's tables, each as its column shards, and an optimizer of them in one process."""

    def __init__(self, whole, cut, optimizer):
        self.weights = dict(whole.named_parameters())
        self.parts = {
            name: [torch.nn.Parameter(self.weights[name].detach()[:, a:b].clone()) for a, b in ends]
            for name, ends in cut.items()
        }
        self.cut = cut
        params = [part for parts in self.parts.values() for part in parts]
        if optimizer is None:
            self.optimizer = torch.optim.SGD(params, lr=0.5, momentum=0.5)
        else:
            cls, arguments = OPTIMIZERS[optimizer]
            self.optimizer = cls(params, **arguments)

    @torch.no_grad()
    def step(self):
        for name, parts in self.parts.items():
            weight = self.weights[name]
            for part, (a, b) in zip(parts, self.cut[name], strict=True):
                grad = weight.grad
                if grad.is_sparse:
                    values = grad._values()[:, a:b].contiguous()
                    size = grad.shape[0], b - a
                    part.grad = torch.sparse_coo_tensor(grad._indices(), values, size)
                else:
                    part.grad = grad[:, a:b].clone()
        self.optimizer.step()
        for name, parts in self.parts.items():
            self.weights[name].copy_(torch.cat(list(parts), 1))
            self.weights[name].grad = None

    def check(self, name, states, tolerance):
        table = name.split(".")[1]
        kept = [self.optimizer.state[part] for part in self.parts[name]]
        keys = [key for key in kept[0] if key != "step"]
        expected = {f"{table}.{key}" for key in ["momentum1", *keys[1:]][: len(keys)]}
        assert states.keys() - {f"{table}.step"} == expected
        for key in keys:
            whole = torch.cat([state[key] for state in kept], kept[0][key].dim() - 1)
            saved = states[f"{table}.momentum1" if key == keys[0] else f"{table}.{key}"]
            assert_slices(saved, whole, tolerance)
        if isinstance(self.optimizer, gpu_embed.optim.Adam):
            assert states[f"{table}.step"] == STEPS


def can_compare(what, kinds, optimizer):
    """TorchRec leaves a grid's means undivided, and Adam makes much of the last bit of a gradient."""
    is_inexact = what == "mean" and kinds in BY_ROWS and optimizer == "Adam"
    return not is_inexact and not (what == "mean" and kinds == "grid")


@tiers.where(can_compare)
@pytest.mark.parametrize("optimizer", [None, *OPTIMIZERS])
@pytest.mark.parametrize("kinds", KINDS)
@pytest.mark.parametrize("what", ["sum", "mean", "weighted"])
def test_bags_equal_whole_ones(two, what, kinds, optimizer):
    two.run(equals_whole, what, kinds, optimizer)


@tiers.where(can_compare)
@pytest.mark.parametrize(
    ("what", "optimizer"), [("sum", "RowWiseAdagrad"), ("mean", None), ("weighted", "Adam")]
)
@pytest.mark.parametrize("kinds", KINDS)
def test_bags_on_four_ranks(four, what, kinds, optimizer):
    four.run(equals_whole, what, kinds, optimizer)


@pytest.mark.parametrize("optimizer", [None, *OPTIMIZERS])
@pytest.mark.parametrize("kinds", ["row-wise", "column-wise", "table-wise"])
def test_rows_equal_whole_ones(ranks, kinds, optimizer):
    ranks.run(equals_whole, "rows", kinds, optimizer)


def test_each_table_its_own_way(four):
    kinds = {"many": "row-wise", "few": "data-parallel", "more": "column-wise"}
    four.run(equals_whole, "sum", kinds, None)
    four.run(equals_whole, "rows", {**kinds, "few": "table-wise"}, "Adam")


@pytest.mark.parametrize("optimizer", [None, "SGD"])
def test_means_of_some_tables_by_rows(two, optimizer):
    kinds = {"many": "row-wise", "few": "table-wise", "more": "column-wise"}
    two.run(equals_whole, "mean", kinds, optimizer)


def means_with_weights_in_the_batch(kinds):
    whole = collection_of("mean")
    model = shard(whole, kinds, "fused", sharder_of("mean", "SGD"))
    given = batch(dist.get_rank(), weighted=True)
    expected, outputs = outputs_of(whole(given)), outputs_of(model(given))
    for name, output in outputs.items():
        torch.testing.assert_close(output, expected[name], rtol=1e-4, atol=0)
    assert given.weights_or_none() is not None


@pytest.mark.parametrize("kinds", ["row-wise", "table-wise"])
def test_a_collection_without_weights_ignores_those_of_a_batch(two, kinds):
    two.run(means_with_weights_in_the_batch, kinds)


def a_feature_twice():
    tables = {"many": (11, 16, ["a", "a"]), "few": (3, 16, ["b"])}
    whole = bag_collection(tables=tables)
    model = shard(whole, "column-wise", "fused", sharder_of("sum", "SGD"))
    given = batch(dist.get_rank())
    expected = whole(given).values()
    assert torch.equal(model(given).wait().values().sort(1)[0], expected.sort(1)[0])


def test_a_table_may_list_a_feature_twice(two):
    two.run(a_feature_twice)


def a_learning_rate_that_is_a_tensor():
    lr = torch.tensor(0.5)
    sharder = EmbeddingBagCollectionSharder(gpu_embed.optim.SGD, lr=lr)
    kinds = {"many": "row-wise", "few": "table-wise", "more": "column-wise"}
    models = [shard(collection_of("sum"), kinds, "fused", sharder) for _ in range(2)]
    first = models[0].fused_optimizer
    first.param_groups[0]["lr"] = 0.25
    first.step()
    own = [group["lr"] for model in models for group in model.fused_optimizer.param_groups]
    assert lr == 0.5
    assert own.count(0.25) == 1
    assert len(own) > 2


def test_each_group_of_tables_has_its_own_learning_rate(two):
    two.run(a_learning_rate_that_is_a_tensor)


def half_outputs():
    whole = collection_of("sum")
    cls, arguments = OPTIMIZERS["SGD"]
    settings = {"output_dtype": torch.float16}
    sharder = EmbeddingBagCollectionSharder(cls, fused_params=settings, **arguments)
    # The first ranks have no table.
    model = shard(whole, "table-wise", "fused", sharder)
    given = batch(dist.get_rank())
    expected, outputs = outputs_of(whole(given)), outputs_of(model(given))
    for name, output in outputs.items():
        assert output.dtype == torch.float16
        assert torch.equal(output.float(), expected[name])


def test_outputs_of_16_bits_from_some_ranks_alone(four):
    four.run(half_outputs)


@tiers.where(can_compare)
@pytest.mark.parametrize("optimizer", [None, "RowWiseAdagrad"])
@pytest.mark.parametrize("kinds", [*BY_ROWS, "column-wise", "table-wise", "columns on one rank"])
@pytest.mark.parametrize("what", ["sum", "mean"])
def test_a_batch_size_for_each_feature(two, what, kinds, optimizer):
    two.run(equals_whole, what, kinds, optimizer, "even" if kinds in BY_ROWS else "uneven")


def test_a_batch_size_for_each_feature_on_four_ranks(four):
    kinds = {"many": "row-wise", "few": "table-wise", "more": "column-wise"}
    four.run(equals_whole, "sum", kinds, "Adam", "even")
