"""One table with an all-to-all: what each rank looks up and learns, against the whole table in one process."""

import copy
import importlib.util
import io
import pickle

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from ranks import mesh
from sharded_cases import (
    integers,
    own_ids,
    plain_table,
    sharded_table,
    table_equals_whole,
    whole_rows,
)
from tiers import where
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

import gpu_embed
from gpu_embed.distributed import ShardedEmbedding

ROWS = ("blocks", "round_robin")


TABLES = {
    "uneven": {},
    "padding": {"padding_idx": 3},
    "last is padding": {"padding_idx": -1},
    "bf16": {"dtype": torch.bfloat16},
    "fp16": {"dtype": torch.float16, "padding_idx": 0},
    "fp64": {"dtype": torch.float64},
    "fewer rows than ranks": {"num_embeddings": 3},
    "one row": {"num_embeddings": 1},
    "no columns": {"embedding_dim": 0},
}
COUNTS = {
    "each its own": (5, 3, 0, 9),
    "none on rank 0": (0, 4),
    "none": (0,),
}


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("distinct", [True, False])
@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("counts", COUNTS)
@where(lambda table, counts: counts == "each its own" or table in ("uneven", "padding", "one row"))
def test_lookup_and_gradient(ranks, rows, distinct, table, counts):
    ranks.run(table_equals_whole, rows, distinct, TABLES[table], COUNTS[counts])


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.uint8], ids=str)
@pytest.mark.parametrize("rows", ROWS)
def test_ids_of_each_dtype(two, rows, dtype):
    two.run(table_equals_whole, rows, True, {"num_embeddings": 200}, (40,), dtype)


def shapes(rows):
    layer, rank = sharded_table(rows), dist.get_rank()
    weight = plain_table().weight.detach()
    for ids in (
        torch.tensor(rank),
        torch.empty(0, 3, dtype=torch.int64),
        torch.tensor([[[1]], [[7]]]),
    ):
        assert torch.equal(layer(ids), weight[ids])
    ids = torch.arange(8).view(2, 4).t()
    assert torch.equal(layer(ids), weight[ids])


@pytest.mark.parametrize("rows", ROWS)
def test_ids_of_any_shape(two, rows):
    two.run(shapes, rows)


def sums_are_rounded_once(rows):
    """In 16 bits a sum of ones stops at 256, or 2048, unless it is taken in 32."""
    layer = sharded_table(rows, dtype=torch.bfloat16)
    layer(torch.full((4096,), 7)).sum().backward()
    gradient = whole_rows(layer, layer.weight.grad.float().to_dense())
    assert (gradient[7] == 4096 * dist.get_world_size()).all()


def test_duplicates_in_16_bits_are_summed_in_32(two):
    two.run(sums_are_rounded_once, "blocks")


def many_rows():
    """Local rows are of 32 bits where those of the whole table are not."""
    from gpu_embed.distributed.sharded_embedding import RowSharding, _Route

    for num_embeddings, dtype in ((2**32 - 10, torch.int32), (2**33, torch.int64)):
        for round_robin in (False, True):
            sharding = RowSharding(mesh(2), num_embeddings, round_robin)
            ids = torch.tensor([num_embeddings - 1, 5, num_embeddings - 1, 0, num_embeddings])
            route = _Route(ids, sharding, distinct=True)
            assert route.local_rows.dtype == dtype
            count = int(route.wanted.sum())
            assert count == 3
            assert route.has_out_of_range
            owners = torch.arange(2).repeat_interleave(route.wanted)
            local = route.local_rows[:count].long()
            found = local * 2 + owners if round_robin else owners * sharding.chunk + local
            assert torch.equal(found[route.inverse[:4]], ids[:4])
            assert route.inverse[4] == count


def test_tables_beyond_32_bits(two):
    two.run(many_rows)


def renorm(rows):
    rank = dist.get_rank()
    one, layer = plain_table(max_norm=5.0), sharded_table(rows, max_norm=5.0)
    ids = own_ids(11, (3, 4))
    together = torch.cat([x.flatten() for x in ids])
    expected = one.weight.detach().clone()
    rows_of_all = gpu_embed.functional.embedding(together, expected, max_norm=5.0)
    output = layer(ids[rank])
    start = sum(x.numel() for x in ids[:rank])
    assert torch.equal(output.flatten(0, 1), rows_of_all[start : start + ids[rank].numel()])
    assert torch.equal(whole_rows(layer, layer.weight), expected)
    assert not torch.equal(expected, one.weight)
    output.sum().backward()


@pytest.mark.parametrize("rows", ROWS)
def test_max_norm_scales_what_any_rank_looks_up(two, rows):
    two.run(renorm, rows)


# Errors.


def out_of_range(rows, who, index):
    """All ranks raise at once, and the next call works."""
    rank, layer = dist.get_rank(), sharded_table(rows)
    ids = torch.tensor([[1, 2], [3, index if rank in who else 4]])
    before = layer.weight.detach().clone()
    with pytest.raises(IndexError) as caught:
        layer(ids)
    text = str(caught.value)
    if rank in who:
        assert f"id {index} at position (1, 1) of the input; the table has 11 rows" in text
    else:
        assert f"ranks {who} of the mesh" in text
    assert torch.equal(layer.weight, before)
    with gpu_embed.set_bounds_check("off"):
        output = layer(ids)
        expected = plain_table().weight.detach()[ids.clamp(0, 10)]
        if rank in who:
            expected[1, 1] = 0
        assert torch.equal(output, expected)
        output.backward(torch.ones_like(output))
        good = ids if rank not in who else ids.flatten()[:3]
        named = [None] * dist.get_world_size()
        dist.all_gather_object(named, good.flatten())
        gradient = torch.zeros(11, 6).index_add_(
            0, torch.cat(named), torch.ones(len(torch.cat(named)), 6)
        )
        assert torch.equal(whole_rows(layer, layer.weight.grad.to_dense()), gradient)


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("who", [[0], [1], [0, 1]], ids=str)
@pytest.mark.parametrize("index", [11, -1, 2**40])
def test_an_id_out_of_range_is_an_error_on_every_rank(two, rows, who, index):
    two.run(out_of_range, rows, who, index)


def refusals():
    over = mesh(dist.get_world_size())
    for layer, error, text in (
        (nn.Linear(2, 2), TypeError, "takes a torch.nn.Embedding, not Linear"),
        (nn.EmbeddingBag(2, 2), TypeError, "not EmbeddingBag; look up rows of an Embedding"),
        (plain_table(scale_grad_by_freq=True), ValueError, "scale_grad_by_freq.*RowwiseParallel"),
    ):
        with pytest.raises(error, match=text):
            ShardedEmbedding.from_module(layer, over)
    with pytest.raises(TypeError, match=r"takes a DeviceMesh, such as init_device_mesh\('cpu'"):
        ShardedEmbedding.from_module(plain_table(), dist.group.WORLD)
    with pytest.raises(TypeError, match=r"by ShardedEmbedding\.from_module"):
        ShardedEmbedding(100, 4)
    with pytest.raises(ValueError, match='"blocks" or "round_robin", got \'columns\''):
        ShardedEmbedding.from_module(plain_table(), over, rows="columns")
    with pytest.raises(ValueError, match=r'mesh\["tp"\]'):
        ShardedEmbedding.from_module(plain_table(), mesh(1, 2))
    with pytest.raises(ValueError, match=r"ascending order, got \[1, 0\]"):
        ShardedEmbedding.from_module(plain_table(), DeviceMesh("cpu", [1, 0]))
    first = DeviceMesh("cpu", [0])
    if dist.get_rank() == 1:
        with pytest.raises(ValueError, match="not in the mesh"):
            ShardedEmbedding.from_module(plain_table(), first)
    layer = plain_table()
    layer.weight = nn.Parameter(sharded_table("blocks").state_dict()["weight"])
    with pytest.raises(ValueError, match="sharded already"):
        ShardedEmbedding.from_module(layer, over)
    layer = sharded_table("blocks")
    for ids, error, text in (
        ([1, 2], TypeError, r"as_tensor"),
        (
            DTensor.from_local(torch.ones(2, dtype=torch.int64), over, [Shard(0)]),
            TypeError,
            "DTensor",
        ),
        (torch.ones(2), RuntimeError, "Long, Int"),
        (torch.ones(2, dtype=torch.int64, device="meta"), RuntimeError, "same device"),
    ):
        with pytest.raises(error, match=text):
            layer(ids)
    output = layer(torch.tensor([1, 2]))
    (gradient,) = torch.autograd.grad(output.square().sum(), layer.weight, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.to_dense().sum().backward()


def test_refusals(two):
    two.run(refusals)


def other_weights():
    """Each that this rank's rows do not fit, and each that takes their place."""
    layer, whole = sharded_table("blocks"), plain_table().weight.detach()
    for call in (
        lambda: torch.func.functional_call(layer, {"weight": whole}, torch.tensor([1])),
        lambda: ShardedEmbedding(whole, layer.sharding)(torch.tensor([1])),
    ):
        with pytest.raises(
            RuntimeError, match=r"must be this rank's rows, \[\d, 6\], but is \[11, 6\]"
        ):
            call()
    layer.weight = nn.Parameter(2 * layer.weight.detach())
    assert layer.weight.row_sharding is layer.sharding
    assert torch.equal(layer(torch.tensor([3, 10])), 2 * whole[[3, 10]])
    layer.padding_idx = 3
    layer(torch.tensor([3, 10])).sum().backward()
    gradient = whole_rows(layer, layer.weight.grad.to_dense())
    assert gradient.any(1).nonzero().flatten().tolist() == [10]
    layer.register_buffer("more", torch.ones(2))
    assert layer.state_dict().keys() == {"weight", "more"}
    layer.load_state_dict(layer.state_dict())


def test_other_weights(two):
    two.run(other_weights)


def tables_of_ranks_that_differ():
    rank, over = dist.get_rank(), mesh(2)
    for others in ({"num_embeddings": 12}, {"embedding_dim": 7}, {"dtype": torch.float64}):
        table = plain_table(**(others if rank else {}))
        layer = ShardedEmbedding.from_module(table, over)
        with pytest.raises(RuntimeError, match=rf"ranks \[{1 - rank}\] of the mesh have a table"):
            layer(torch.tensor([1, 2]))
    layer = ShardedEmbedding.from_module(plain_table(), over, ROWS[rank])
    with pytest.raises(RuntimeError, match=rf"than this rank, {rank}: every rank must give"):
        layer(torch.tensor([1, 2]))


def test_ranks_whose_tables_differ(two):
    two.run(tables_of_ranks_that_differ)


def clipped(rows):
    """The norm is that of all ranks' rows, and of other tables that they have alike."""
    layer, head = sharded_table(rows), nn.Parameter(torch.ones(4))
    whole = plain_table().weight
    ids = torch.tensor([1, 10, 10])
    whole.grad = torch.zeros_like(whole).index_add_(0, ids, torch.full((3, 6), 2.0))
    own = ids if dist.get_rank() == 0 else ids[:0]
    (2 * layer(own)).sum().backward()
    others = [nn.Parameter(torch.ones(4)) for _ in range(2)]
    for one in (head, *others):
        one.grad = torch.full((4,), 3.0)
    for norm_type in (2.0, 1.0, float("inf")):
        norm = gpu_embed.optim.clip_grad_norm_([layer.weight, head], 5.0, norm_type)
        expected = nn.utils.clip_grad_norm_([whole, others[0]], 5.0, norm_type)
        torch.testing.assert_close(norm, expected)
        torch.testing.assert_close(head.grad, others[0].grad)
        found = whole_rows(layer, layer.weight.grad.to_dense())
        torch.testing.assert_close(found, whole.grad)


@pytest.mark.parametrize("rows", ROWS)
def test_clipping_by_norm(two, rows):
    two.run(clipped, rows)


def scaled():
    layer, scaler = sharded_table("blocks"), torch.amp.GradScaler("cpu")
    arguments = {"lr": 0.5, "scaler": scaler}
    with pytest.raises(ValueError, match="ShardedGradScaler"):
        gpu_embed.optim.apply_in_backward(layer, gpu_embed.optim.SGD, **arguments)
    optimizer = gpu_embed.optim.SGD(layer.parameters(), lr=0.5)
    scaler = ShardedGradScaler("cpu", init_scale=4.0)
    before = layer.weight.detach().clone()
    # An infinity in a row of rank 1, from rank 0.
    loss = layer(torch.tensor([10])).sum() * (float("inf") if dist.get_rank() == 0 else 1)
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
    assert torch.equal(layer.weight, before)
    assert scaler.get_scale() == 2


def test_loss_scalers(two):
    two.run(scaled)


def under_ddp():
    rank = dist.get_rank()
    model = nn.Sequential(sharded_table("round_robin", num_embeddings=12), nn.Linear(6, 2))
    ids = torch.tensor([rank, 5])
    with pytest.raises(RuntimeError, match="_ddp_params_and_buffers_to_ignore"):
        nn.parallel.DistributedDataParallel(model)(ids)
    layer = sharded_table("round_robin", num_embeddings=12)
    model = nn.Sequential(layer, nn.Linear(6, 2))
    model._ddp_params_and_buffers_to_ignore = ["0.weight"]
    wrapped = nn.parallel.DistributedDataParallel(model)
    assert torch.equal(whole_rows(layer, layer.weight), plain_table(num_embeddings=12).weight)
    for _ in range(2):
        wrapped(ids).sum().backward()
    gradient = whole_rows(layer, layer.weight.grad.to_dense())
    assert torch.equal(gradient[5], 4 * model[1].weight.detach().sum(0))


def test_under_ddp(two):
    two.run(under_ddp)


def under_fsdp():
    model = nn.Sequential(sharded_table("blocks", num_embeddings=12), nn.Linear(6, 2))
    fully_shard(model, mesh=mesh(2))
    with pytest.raises(RuntimeError, match="ignored_params"):
        model(torch.tensor([1]))
    layer = sharded_table("blocks", num_embeddings=12)
    model = nn.Sequential(layer, nn.Linear(6, 2))
    fully_shard(model, mesh=mesh(2), ignored_params={layer.weight})
    model(torch.tensor([dist.get_rank(), 5])).sum().backward()
    gradient = whole_rows(layer, layer.weight.grad.to_dense())
    assert torch.equal(gradient[5], 2 * model[1].weight.full_tensor().sum(0))


def test_under_fsdp(two):
    two.run(under_fsdp)


# Optimizers and state.


def some_rows(user, item, few):
    return [
        {"params": [user, item], "rows": [0, 1, 4, 5, 10]},
        {"params": [few], "rows": torch.tensor([True, False, True])},
    ]


OPTIMIZERS = {
    "SGD": lambda params: gpu_embed.optim.SGD(params, lr=0.5, momentum=0.5),
    "Adagrad": lambda params: gpu_embed.optim.Adagrad(params, lr=0.5),
    "RowWiseAdagrad": lambda params: gpu_embed.optim.RowWiseAdagrad(params, lr=0.5),
    "Adam": lambda params: gpu_embed.optim.Adam(params, lr=0.125),
    "some rows": lambda params: gpu_embed.optim.Adagrad(some_rows(*params), lr=0.5),
}


class Model(nn.Module):
    """Tables of which the ranks have unequal numbers of rows, and some of four none of the last."""

    def __init__(self, rows=None, seed=0):
        super().__init__()
        layers = [
            plain_table(sparse=True, padding_idx=3, seed=seed),
            plain_table(sparse=True, seed=seed + 1),
            plain_table(3, sparse=True, seed=seed + 2),
        ]
        if rows is not None:
            over, tables = mesh(dist.get_world_size()), layers
            layers = [ShardedEmbedding.from_module(layer, over, rows) for layer in tables]
        self.user, self.item, self.few = layers

    def forward(self, ids):
        return self.user(ids) + 2 * self.item(ids) + self.few(ids % 3)


def train(model, optimizer, seeds, alone=False):
    """Steps whose gradients are integers; alone, one process takes the ids of four."""
    rank, size = dist.get_rank(), dist.get_world_size()
    for seed in seeds:
        ids = torch.cat(own_ids(11, (4,) * 12, seed=seed))
        grads = integers(*ids.shape, 6, seed=seed)
        if not alone:
            ids, grads = ids.chunk(size)[rank], grads.chunk(size)[rank]
        model(ids).backward(grads)
        optimizer.step()
        optimizer.zero_grad()


def expected_after(optimizer, seeds):
    model = Model()
    whole_optimizer = OPTIMIZERS[optimizer](model.parameters())
    train(model, whole_optimizer, seeds, alone=True)
    return model, whole_optimizer


def assert_trained(model, optimizer, one, whole_optimizer):
    for layer, table in zip(model.children(), one.children(), strict=True):
        rows = (
            whole_rows(layer, layer.weight) if isinstance(layer, ShardedEmbedding) else layer.weight
        )
        assert torch.equal(rows, table.weight)
    states = optimizer.state_dict()["state"], whole_optimizer.state_dict()["state"]
    assert states[0].keys() == states[1].keys()
    for number, state in states[1].items():
        assert states[0][number].keys() == state.keys()
        for name, value in state.items():
            actual = states[0][number][name]
            if isinstance(actual, DTensor):
                assert actual.placements == (Shard(0),)
                actual = actual.full_tensor()
            if isinstance(value, torch.Tensor):
                assert torch.equal(actual, value), name
            else:
                assert actual == value, name


def trains(rows, optimizer, in_backward):
    one, whole_optimizer = expected_after(optimizer, (0, 1, 2))
    model = Model(rows)
    if in_backward:
        kind, options = in_backward
        own = gpu_embed.optim.apply_in_backward(model, kind, **options).optimizer
        assert [param for group in own.param_groups for param in group["params"]] == list(
            model.parameters()
        )
    else:
        own = OPTIMIZERS[optimizer](model.parameters())
    train(model, own, (0, 1, 2))
    assert_trained(model, own, one, whole_optimizer)
    # Also as torch loads and copies it.
    again, other = copy.deepcopy(model), pickle.loads(pickle.dumps(model.state_dict()))
    again.load_state_dict(other)
    own.load_state_dict(own.state_dict())
    assert_trained(again, own, one, whole_optimizer)


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_training(ranks, rows, optimizer):
    ranks.run(trains, rows, optimizer, None)


@pytest.mark.parametrize("rows", ROWS)
def test_training_in_backward(two, rows):
    in_backward = gpu_embed.optim.Adam, {"lr": 0.125}
    two.run(trains, rows, "Adam", in_backward)


def by_sparse_adam(rows):
    one, model = Model(), Model(rows)
    train(one, torch.optim.SparseAdam(one.parameters(), lr=0.125), (0, 1), alone=True)
    train(model, torch.optim.SparseAdam(model.parameters(), lr=0.125), (0, 1))
    for layer, table in zip(model.children(), one.children(), strict=True):
        assert torch.equal(whole_rows(layer, layer.weight), table.weight)


def test_torch_sparse_adam(two):
    two.run(by_sparse_adam, "round_robin")


def save(folder, rows, optimizer_name):
    model = Model(rows)
    optimizer = OPTIMIZERS[optimizer_name](model.parameters())
    train(model, optimizer, (0, 1))
    state, optimizer_state = get_state_dict(model, optimizer)
    dcp.save({"model": state, "optimizer": optimizer_state}, checkpoint_id=folder)


def load(folder, rows, optimizer_name):
    """What was saved, and one more step: as one process that made all steps; without rows, into plain layers."""
    model = Model(rows, seed=5)
    optimizer = OPTIMIZERS[optimizer_name](model.parameters())
    state, optimizer_state = get_state_dict(model, optimizer)
    state = {"model": state, "optimizer": optimizer_state}
    dcp.load(state, checkpoint_id=folder)
    set_state_dict(
        model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"]
    )
    assert_trained(model, optimizer, *expected_after(optimizer_name, (0, 1)))
    train(model, optimizer, (2,))
    assert_trained(model, optimizer, *expected_after(optimizer_name, (0, 1, 2)))


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("rows", ROWS)
def test_saved_on_two_and_read_on_others(groups, tmp_path, rows, optimizer):
    other = ROWS[1 - ROWS.index(rows)]
    groups[2].run(save, str(tmp_path), rows, optimizer)
    for size in (1, 3, 4):
        groups[size].run(load, str(tmp_path), rows, optimizer)
    groups[2].run(load, str(tmp_path), other, optimizer)
    groups[1].run(load, str(tmp_path), None, optimizer)


def loads(rows):
    """A plain table, one that rank 0 alone has, one made on meta; and what is refused."""
    table = integers(11, 6, seed=7)
    for assign in (False, True):
        layer = sharded_table(rows, padding_idx=3)
        layer.load_state_dict({"weight": table}, assign=assign)
        assert torch.equal(whole_rows(layer, layer.weight), table)
        assert layer.weight.row_sharding is layer.sharding
    layer = sharded_table(rows)
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    given = {"weight": table} if dist.get_rank() == 0 else {}
    set_model_state_dict(layer, given, options=options)
    assert torch.equal(whole_rows(layer, layer.weight), table)
    full = get_model_state_dict(layer, options=StateDictOptions(full_state_dict=True))
    assert torch.equal(full["weight"], table)

    made = plain_table(padding_idx=3).to("meta")
    layer = ShardedEmbedding.from_module(made, mesh(dist.get_world_size()), rows)
    assert layer.weight.is_meta
    layer.to_empty(device="cpu")
    assert layer.weight.row_sharding is layer.sharding
    # The same seed on all ranks, which have other rows all the same.
    torch.manual_seed(0)
    layer.reset_parameters()
    drawn = whole_rows(layer, layer.weight)
    assert not drawn[3].any()
    assert len(drawn.unique()) == 10 * 6 + 1
    layer.load_state_dict({"weight": table})
    assert torch.equal(whole_rows(layer, layer.weight), table)

    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert other.weight.row_sharding is other.sharding
        assert torch.equal(other(torch.tensor([4, 10])), table[[4, 10]])

    before = layer.weight.detach().clone()
    with pytest.raises(RuntimeError, match=r"size mismatch for weight.*\[10, 6\].*\[11, 6\]"):
        layer.load_state_dict({"weight": table[:10]})
    with pytest.raises(RuntimeError, match="Missing key"):
        layer.load_state_dict({})
    elsewhere = distribute_tensor(table, mesh(1, 2), [Replicate(), Shard(0)])
    with pytest.raises(
        ValueError, match=r"the table to be loaded lies on DeviceMesh.*and this one on"
    ):
        layer.load_state_dict({"weight": elsewhere})
    with pytest.raises(RuntimeError, match="Unexpected key"):
        layer.load_state_dict({"weight": table, "bias": table})
    assert torch.equal(layer.weight, before)

    saved = io.BytesIO()
    torch.save(full, saved)
    saved.seek(0)
    layer.load_state_dict(torch.load(saved))
    assert f"11, 6, padding_idx=3, rows='{rows}', distinct=True, " in repr(layer)


@pytest.mark.parametrize("rows", ROWS)
def test_state_dict(two, rows):
    two.run(loads, rows)


def chosen_rows(rows):
    """rows= names rows of the whole table, as ids or as a mask."""
    mask = torch.zeros(11, dtype=torch.bool)
    mask[[0, 3, 10]] = True
    layer = sharded_table(rows)
    for given in ([0, 3, 10], mask):
        optimizer = gpu_embed.optim.SGD([layer.weight], rows=given)
        assert torch.equal(whole_rows(layer, optimizer.param_groups[0]["rows"]), mask)
    others = ShardedEmbedding.from_module(plain_table(), mesh(2), ROWS[1 - ROWS.index(rows)])
    with pytest.raises(ValueError, match="a group of its own"):
        gpu_embed.optim.SGD([layer.weight, others.weight], rows=[0])
    with pytest.raises(ValueError, match=r"ids must be from 0 to 10, got \[11\]"):
        gpu_embed.optim.SGD([layer.weight], rows=[11])
    own = torch.ones(layer.sharding.num_rows, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"the mask must be of shape \[11\]"):
        gpu_embed.optim.SGD([layer.weight], rows=own)
    made = gpu_embed.optim.SGD([layer.weight], rows=mask)
    _, other = copy.deepcopy((layer, made))
    assert torch.equal(whole_rows(layer, other.param_groups[0]["rows"]), mask)
    other.load_state_dict(made.state_dict())
    assert torch.equal(whole_rows(layer, other.param_groups[0]["rows"]), mask)


@pytest.mark.parametrize("rows", ROWS)
def test_rows_that_may_change(two, rows):
    two.run(chosen_rows, rows)


def compiled():
    layer = sharded_table("blocks")
    ids = torch.tensor([dist.get_rank(), 9, 9])
    step = torch.compile(lambda x: layer(x) * 2, backend="eager")
    assert torch.equal(step(ids), 2 * plain_table().weight.detach()[ids])


def test_in_a_compiled_function_it_breaks_the_graph(two):
    two.run(compiled)


def on_triton(rows):
    with gpu_embed.use_backend("triton"):
        table_equals_whole(rows, True, {"padding_idx": 3}, (5, 3))


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_on_the_triton_kernels(two):
    two.run(on_triton, "round_robin")
