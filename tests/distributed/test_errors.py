"""What a sharded table refuses, on which ranks, and that the process group works afterwards."""

import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from ranks import mesh
from sharded_cases import assert_equal, distribute, integers, renorm_equals_whole, some_ids
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)

import gpu_embed
from gpu_embed.distributed import ColwiseBagParallel, RowwiseBagParallel
from gpu_embed.functional import embedding, embedding_bag

every_placement = pytest.mark.parametrize("table", "r01")


def still_works():
    ranks = torch.ones(())
    dist.all_reduce(ranks)
    assert ranks == dist.get_world_size()


def mixed(lookup, name):
    """One argument is a DTensor, and the others are plain."""
    over = mesh(dist.get_world_size())
    tensors = {"input": some_ids(11, 12), "weight": integers(11, 6)}
    if lookup is embedding_bag:
        tensors |= {"offsets": torch.tensor([0, 5]), "per_sample_weights": torch.ones(12)}
    tensors[name] = distribute(tensors[name], over, "r")
    options = {"mode": "sum"} if lookup is embedding_bag else {}
    with pytest.raises(
        RuntimeError, match=f"got mixed torch.Tensor and DTensor: .*{name} a DTensor"
    ):
        lookup(**tensors, **options)
    still_works()


@pytest.mark.parametrize(
    ("lookup", "name"),
    [
        *((embedding, name) for name in ("input", "weight")),
        *((embedding_bag, name) for name in ("input", "weight", "offsets", "per_sample_weights")),
    ],
)
def test_plain_tensors_beside_a_dtensor(two, lookup, name):
    two.run(mixed, lookup, name)


def raises_everywhere(table, ids_lie, wrong, lookup):
    over = mesh(dist.get_world_size())
    ids = some_ids(11, 4, 6)
    ids[2, 3] = wrong
    weight = distribute(integers(11, 6), over, table).requires_grad_()
    before = weight.detach().to_local().clone()
    if lookup == "embedding":
        call, said = lambda ids: embedding(ids, weight), rf"id {wrong} at position \(2, 3\)"
    else:
        call, said = lambda ids: embedding_bag(ids, weight, mode=lookup), f"{wrong}, .* of bag 2 "
    with pytest.raises(IndexError, match=f"{said}.* 11 rows"):
        call(distribute(ids, over, ids_lie))
    assert torch.equal(weight.detach().to_local(), before)
    still_works()
    # Nothing is left of the error.
    ids = some_ids(11, 4, 6)
    call(distribute(ids, over, ids_lie)).sum().full_tensor().backward()
    still_works()


@pytest.mark.parametrize("lookup", ["embedding", "sum", "mean", "max"])
@pytest.mark.parametrize("wrong", [11, -1, 2**40])
@pytest.mark.parametrize("ids_lie", "r0")
@pytest.mark.parametrize("table", "01")
def test_an_id_out_of_range_raises_on_every_rank(ranks, table, ids_lie, wrong, lookup):
    """Bounds: the id and the rows are those of the whole table; ids that are gathered are seen by all."""
    ranks.run(raises_everywhere, table, ids_lie, wrong, lookup)


@pytest.mark.parametrize("lookup", ["embedding", "sum", "max"])
def test_an_id_out_of_range_of_a_replicated_table(ranks, lookup):
    ranks.run(raises_everywhere, "r", "r", 11, lookup)


def raises_on_one(lookup):
    over, own = mesh(dist.get_world_size()), dist.get_rank() == 1
    ids = some_ids(11, dist.get_world_size(), 6)
    ids[1, 3] = 99
    weight = distribute(integers(11, 6), over, "r")
    sharded = distribute(ids, over, "0")
    call = embedding if lookup == "embedding" else embedding_bag
    if own:
        with pytest.raises(IndexError, match=r"\b99\b.*\b11 rows"):
            call(sharded, weight)
    else:
        call(sharded, weight)
    still_works()
    return own


@pytest.mark.parametrize("lookup", ["embedding", "embedding_bag"])
def test_an_id_of_one_rank_raises_there(ranks, lookup):
    """Bounds: of a replicated table nobody else sees the id."""
    assert sum(ranks.run(raises_on_one, lookup)) == 1


def without_check():
    over, ids = mesh(dist.get_world_size()), some_ids(11, 4, 6)
    ids[2, 3] = 11
    weight = distribute(integers(11, 6), over, "0").requires_grad_()
    with gpu_embed.set_bounds_check("off"):
        output = embedding(distribute(ids, over, "r"), weight).full_tensor()
    expected = integers(11, 6)[ids.clamp(max=10)]
    expected[2, 3] = 0
    assert torch.equal(output, expected)


def test_bounds_check_off(two):
    two.run(without_check)


TORCHRUN = """
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import RowwiseParallel, parallelize_module
import gpu_embed

mesh = dist.device_mesh.init_device_mesh("cpu", (2,))
model = torch.nn.Sequential(gpu_embed.Embedding(11, 6))
if "{case}" == "same ids":
    plan = {{"0": RowwiseParallel(input_layouts=Replicate())}}
    parallelize_module(model, mesh, plan)
    ids = torch.tensor([1, 2, 11])
elif "{case}" == "all-to-all":
    # The other rank fails elsewhere while this one waits for it.
    if dist.get_rank() == 0:
        model = gpu_embed.distributed.ShardedEmbedding.from_module(model[0], mesh)
    ids = torch.tensor([1, 2, 3 + 8 * dist.get_rank()])
else:
    fully_shard(model, mesh=mesh)
    ids = torch.tensor([1, 2, 3 + 8 * dist.get_rank()])
model(ids).sum().backward()
"""


@pytest.mark.parametrize("case", ["same ids", "own ids", "all-to-all"])
def test_torchrun_ends_when_a_rank_fails(tmp_path, case):
    script = tmp_path / "script.py"
    script.write_text(TORCHRUN.format(case=case))
    paths = str(Path(gpu_embed.__file__).parents[1]), os.environ.get("PYTHONPATH", "")
    env = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    env["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    ran = subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node",
            "2",
            script,
        ],
        env=env,
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert ran.returncode != 0
    assert re.search(r"IndexError: .*\b11\b.*\b11 rows", ran.stderr), ran.stderr


# max_norm.


@pytest.mark.parametrize("mode", [None, "sum", "mean", "max"])
@pytest.mark.parametrize("ids_lie", "r01")
@pytest.mark.parametrize("table", "r0")
def test_max_norm_of_whole_rows(ranks, table, ids_lie, mode):
    ranks.run(renorm_equals_whole, (ranks.size,), table, ids_lie, mode)


@pytest.mark.parametrize("table", ["00", "0r", "r0"])
def test_max_norm_on_two_mesh_dimensions(four, table):
    four.run(renorm_equals_whole, (2, 2), table, "0r", None)


def refused_by_columns(call):
    over, ids = mesh(dist.get_world_size()), some_ids(11, 4, 6)
    if call == "layer":
        layer = gpu_embed.Embedding(11, 6, max_norm=1.0)
        style = ColwiseParallel(input_layouts=Replicate())
    else:
        layer = gpu_embed.EmbeddingBag(11, 6, max_norm=1.0)
        style = ColwiseBagParallel()
    model = nn.Sequential(layer)
    parallelize_module(model, over, {"0": style})
    before = layer.weight.detach().to_local().clone()
    with pytest.raises(NotImplementedError, match=r"max_norm.*columns.*shard it by rows"):
        model(ids)
    assert torch.equal(layer.weight.detach().to_local(), before)
    still_works()


@pytest.mark.parametrize("call", ["layer", "bag"])
def test_max_norm_by_columns_is_refused(ranks, call):
    ranks.run(refused_by_columns, call)


def refused_under_fsdp(bag, way):
    over, ids = mesh(dist.get_world_size()), some_ids(11, 4, 6)
    layer = (gpu_embed.EmbeddingBag if bag else gpu_embed.Embedding)(11, 6, max_norm=1.0)
    model = nn.Sequential(layer)
    if way == "layer":
        fully_shard(layer, mesh=over)
    if way == "tensor parallel":
        style = RowwiseBagParallel() if bag else RowwiseParallel(input_layouts=Replicate())
        parallelize_module(model, mesh(2, 2)["tp"], {"0": style})
        over = mesh(2, 2)["dp"]
    if way == "first version":
        model = FullyShardedDataParallel(model, device_id=torch.device("cpu"))
    else:
        fully_shard(model, mesh=over)
    with pytest.raises(NotImplementedError, match=r"max_norm under FSDP.*RowwiseParallel"):
        model(ids)
    still_works()


@pytest.mark.parametrize("way", ["model", "layer", "first version"])
@pytest.mark.parametrize("bag", [False, True], ids=["lookup", "bag"])
def test_max_norm_under_fsdp_is_refused(ranks, bag, way):
    ranks.run(refused_under_fsdp, bag, way)


@pytest.mark.parametrize("bag", [False, True], ids=["lookup", "bag"])
def test_max_norm_under_fsdp_over_tensor_parallel_is_refused(four, bag):
    four.run(refused_under_fsdp, bag, "tensor parallel")


def remedies_of_fsdp(remedy):
    """What the error proposes works: the table itself is scaled."""
    over, ids = mesh(dist.get_world_size()), some_ids(11, 4, 6)
    model = nn.Sequential(gpu_embed.Embedding(11, 6, max_norm=1.0), nn.Linear(6, 4))
    model[0].weight.data = integers(11, 6)
    if remedy == "ignored":
        fully_shard(model, mesh=over, ignored_params={model[0].weight})
    else:
        fully_shard(model[1], mesh=over)
    model(ids).sum().backward()
    assert (model[0].weight.detach()[ids.flatten()].norm(dim=1) <= 1.0001).all()


@pytest.mark.parametrize("remedy", ["ignored", "a module of its own"])
def test_max_norm_beside_fsdp(two, remedy):
    two.run(remedies_of_fsdp, remedy)


def warned_under_ddp():
    ids = some_ids(11, 4, 6)
    model = nn.parallel.DistributedDataParallel(
        nn.Sequential(gpu_embed.Embedding(11, 6, max_norm=1.0))
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            model(ids).sum().backward()
    found = [one for one in caught if "max_norm under DistributedDataParallel" in str(one.message)]
    assert len(found) == 1, [str(one.message) for one in caught]
    return str(found[0].message)


def test_max_norm_under_ddp_warns_once(two):
    assert "RowwiseParallel" in two.run(warned_under_ddp)[0]


# Other refusals.


def refuses(case):
    over, ids = mesh(dist.get_world_size()), some_ids(11, 4, 6)
    weight = integers(11, 6).requires_grad_()
    table, placed = distribute(weight.detach(), over, "0"), distribute(ids, over, "r")
    if case == "sparse":
        with pytest.raises(NotImplementedError, match=r"gpu_embed\.distributed\.ShardedEmbedding"):
            embedding(placed, table, sparse=True)
        with pytest.raises(NotImplementedError, match=r"gpu_embed\.distributed\.ShardedEmbedding"):
            embedding_bag(placed, table, sparse=True, mode="sum")
    elif case == "plain ids":
        for call in (embedding, embedding_bag):
            with pytest.raises(
                RuntimeError, match=r"mixed torch.Tensor and DTensor: input.*from_local"
            ):
                call(ids, table)
    elif case == "plain table":
        for call in (embedding, embedding_bag):
            with pytest.raises(RuntimeError, match=r"mixed.*: weight.*distribute_tensor"):
                call(placed, weight)
    elif case == "plain offsets":
        with pytest.raises(RuntimeError, match=r"mixed.*: offsets.*from_local"):
            embedding_bag(distribute(ids.view(-1), over, "r"), table, torch.tensor([0, 5]))
    elif case == "plain scales":
        with pytest.raises(RuntimeError, match=r"mixed.*: per_sample_weights.*from_local"):
            embedding_bag(placed, table, mode="sum", per_sample_weights=torch.ones(4, 6))
    elif case == "float ids":
        with pytest.raises(RuntimeError, match=r"scalar types: Long, Int"):
            embedding(distribute(ids.float(), over, "r"), table)
    elif case == "padding_idx":
        with pytest.raises(AssertionError, match="within num_embeddings"):
            embedding(placed, table, padding_idx=11)
    elif case == "bag style on torch's":
        model = nn.Sequential(nn.EmbeddingBag(11, 6), nn.Linear(6, 6))
        with pytest.raises(NotImplementedError, match="replace_embeddings"):
            parallelize_module(model, over, {"0": RowwiseBagParallel()})
        with pytest.raises(NotImplementedError, match="Linear"):
            parallelize_module(model, over, {"1": RowwiseBagParallel()})
    elif case == "bag layouts":
        for layout in (Shard(1), Shard(-1)):
            with pytest.raises(ValueError, match=r"input_layouts must be Replicate\(\)"):
                RowwiseBagParallel(input_layouts=layout)
    elif case == "row-wise optimizer":
        table.requires_grad_()
        embedding(placed, table).sum().full_tensor().backward()
        optimizer = gpu_embed.optim.SGD([table], lr=1.0)
        with pytest.raises(RuntimeError, match=r"dense gradients.*torch\.optim"):
            optimizer.step()
        assert torch.equal(table.detach().full_tensor(), weight)
    elif case == "own offsets":
        model = nn.Sequential(gpu_embed.EmbeddingBag(11, 6))
        parallelize_module(model, over, {"0": RowwiseBagParallel(input_layouts=Shard(0))})
        with pytest.raises(NotImplementedError, match="padding_idx"):
            model[0](ids.view(-1), torch.tensor([0, 5]))
    still_works()


CASES = (
    "sparse, plain ids, plain table, plain offsets, plain scales, float ids, padding_idx, "
    "bag style on torch's, bag layouts, own offsets, row-wise optimizer"
)


@pytest.mark.parametrize("case", CASES.split(", "))
def test_refusals(two, case):
    two.run(refuses, case)


def under_implicit_replication():
    """Where torch takes plain tensors for replicated ones, so do we."""
    from torch.distributed.tensor.experimental import implicit_replication

    over, ids, weight = mesh(dist.get_world_size()), some_ids(11, 4, 6), integers(11, 6)
    with implicit_replication():
        assert_equal(embedding(ids, distribute(weight, over, "0")), weight[ids])
        assert_equal(embedding(distribute(ids, over, "0"), weight), weight[ids])


def test_implicit_replication(two):
    two.run(under_implicit_replication)
