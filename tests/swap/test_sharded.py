"""The report and the proof of tables that DTensor shards: one process of a mesh of one, and shards by themselves."""

import pytest
import torch
from process_groups import one_process
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)

import gpu_embed
from gpu_embed import distributed, replace_embeddings
from gpu_embed.ops import bag as bags
from gpu_embed.ops import lookup as ops
from gpu_embed.swap.verification import COMPARISONS, Verified, _part

IDS = torch.tensor([[1, 2], [2, 6]])


@pytest.fixture(autouse=True)
def mesh():
    with one_process():
        yield init_device_mesh("cpu", (1,))


def sharded(module, style, mesh):
    model = nn.Sequential(module)
    report = replace_embeddings(model)
    return report, parallelize_module(model, mesh, {"0": style})


LOOKUP = (nn.Embedding, lambda: RowwiseParallel(input_layouts=Replicate()), {})
BAGS = [
    (nn.EmbeddingBag, distributed.RowwiseBagParallel, {"mode": mode})
    for mode in ("sum", "mean", "max")
]


@pytest.mark.parametrize(("kind", "style", "arguments"), [LOOKUP, *BAGS])
def test_verify_says_which_rows_were_looked_up(mesh, kind, style, arguments):
    report, model = sharded(kind(7, 4, padding_idx=2, **arguments), style(), mesh)
    assert isinstance(model[0].weight, DTensor)
    proof = report.verify(IDS)
    assert proof
    assert proof.modules[0].exact
    assert "gpu_embed (torch) in rows 0 to 6 of 7, bit-equal to torch's" in str(proof)


def test_columns_are_a_shard_where_there_are_others(mesh):
    report, _ = sharded(nn.Embedding(7, 4), ColwiseParallel(), mesh)
    assert "(torch), bit-equal" in str(report.verify(IDS))
    weight = torch.zeros(500_000, 32)
    assert _part(weight, None, 64) == "32 of 64 columns"
    expected = "rows 500,000 to 999,999 of 1,000,000, 32 of 64 columns"
    assert _part(weight, [500_000, 1_000_000], 64) == expected
    assert _part(weight[:0], [7, 7], 32) == "no rows of 7"
    one = Verified("", calls=1, lookups=1, served_by="triton", shard="no rows of 7")
    assert "gpu_embed (triton) in no rows of 7, bit-equal" in str(one)


def test_verify_finds_what_is_not_the_shards_row(mesh, monkeypatch):
    report, _ = sharded(nn.Embedding(7, 4), RowwiseParallel(input_layouts=Replicate()), mesh)
    backend = gpu_embed.backends.select(IDS.device)
    look_up = backend.embedding
    monkeypatch.setattr(backend, "embedding", lambda *args, **shard: look_up(*args, **shard) + 1)
    assert "in rows 0 to 6 of 7; 1 DIFFER" in str(report.verify(IDS))


def test_verify_leaves_a_sharded_table_as_it_was(mesh):
    """max_norm scales rows in the run, which are put back."""
    module = nn.Embedding(7, 4, max_norm=0.5)
    before = module.weight.detach().clone()
    report, model = sharded(module, RowwiseParallel(input_layouts=Replicate()), mesh)
    held = model[0].weight
    assert report.verify(IDS)
    assert model[0].weight is held
    assert torch.equal(held.to_local(), before)
    model(IDS)
    assert not torch.equal(held.to_local(), before)


def test_the_report_says_who_serves_a_sharded_table(mesh):
    model = nn.Sequential(nn.Embedding(7, 4))
    parallelize_module(model, mesh, {"0": RowwiseParallel(input_layouts=Replicate())})
    report = replace_embeddings(model)
    assert report.replaced[0].served_by == "torch"
    assert report.verify(IDS)


# What the proof compares, on shards of a table of 9 rows.

SHARDS = [([0, 9], 4), ([4, 9], 3), ([7, 9], 2), ([9, 9], 0)]
ALL_IDS = torch.tensor([1, 5, 8, 3, 3, 9, 6, 2, 0, 4])
CUT = (ALL_IDS, torch.tensor([0, 3, 3, 5, 6]), False)


def look_up(weight, shard):
    return ops.embedding, (weight, ALL_IDS, -1, False, False, shard)


def sums(weight, shard):
    scales = torch.linspace(-1, 1, len(ALL_IDS))
    return bags.embedding_bag, (weight, scales, *CUT, 5, "sum", False, False, shard)


def means(weight, shard):
    return bags.embedding_bag, (weight, None, *CUT, 5, "mean", False, False, shard)


def maxima(weight, shard):
    return bags.embedding_bag_shard_max, (weight, *CUT, 5, shard)


@pytest.mark.parametrize("operation", [look_up, sums, means, maxima])
@pytest.mark.parametrize(("shard", "num_rows"), SHARDS, ids=str)
def test_a_shard_is_compared_with_the_same_rows(operation, shard, num_rows):
    """Also other shards' rows, which are zeros; ids of no row have no answer."""
    weight = torch.arange(36.0).view(9, 4).sub(11)[shard[0] : shard[0] + num_rows]
    op, arguments = operation(weight, shard)
    with gpu_embed.set_bounds_check("off"):
        output = op(*arguments)
    assert COMPARISONS[op](output, *arguments) == (True, True)
    values = output[0] if operation is maxima else output
    for place in range(len(values)):
        # The id of no row, and the bag that it is in.
        if (operation is look_up and place == 5) or (operation in (sums, means) and place == 3):
            continue
        before = values[place].clone()
        values[place, 1] += 1
        assert COMPARISONS[op](output, *arguments) == (False, False)
        values[place] = before
