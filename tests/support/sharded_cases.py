"""What the tests of sharded tables share: placements by short names, integers, and how shards are compared."""

import torch
import torch.distributed as dist
from ranks import mesh
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor

from gpu_embed.distributed import ShardedEmbedding
from gpu_embed.functional import embedding, embedding_bag

# Divided by any count up to 12 it stays an integer.
MULTIPLE = 27_720


def placements(names: str) -> list[Placement]:
    """One letter a mesh dimension: r is replicated, a digit the dimension that is sharded."""
    return [Replicate() if name == "r" else Shard(int(name)) for name in names]


def distribute(tensor: torch.Tensor, mesh: DeviceMesh, names: str) -> DTensor:
    if tensor.dtype == torch.int16:
        # gloo does not send it.
        return distribute(tensor.int(), mesh, names).to(torch.int16)
    return distribute_tensor(tensor, mesh, placements(names))


def integers(
    *shape: int, seed: int = 0, dtype: torch.dtype = torch.float32, multiple: int = 1
) -> torch.Tensor:
    """Integers from -8 to 8 times `multiple`: the same on each rank, and their sums are exact."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randint(-8, 9, shape, generator=generator) * multiple).to(dtype)


def some_ids(num_embeddings: int, *shape: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
    """Ids, the last row's first; the same on each rank."""
    generator = torch.Generator().manual_seed(sum(shape))
    ids = torch.randint(0, num_embeddings, shape, generator=generator)
    ids.view(-1)[:1] = num_embeddings - 1
    return ids.to(dtype)


def assert_equal(actual: DTensor, expected: torch.Tensor) -> None:
    """Equal once its shards are put together; NaN equals NaN."""
    assert isinstance(actual, DTensor)
    torch.testing.assert_close(actual.full_tensor(), expected, rtol=0, atol=0, equal_nan=True)


def assert_lies_as(grad: DTensor | None, weight: DTensor) -> None:
    """A gradient has its weight's placements, and holds no more memory than that needs."""
    assert isinstance(grad, DTensor)
    assert grad.placements == weight.placements, (grad.placements, weight.placements)
    local, rows = grad.to_local(), weight.to_local()
    assert local.shape == rows.shape
    assert local.untyped_storage().nbytes() == rows.numel() * rows.element_size()


def part(tensor: torch.Tensor, dim: int, mesh: DeviceMesh | None = None) -> torch.Tensor:
    """What `Shard(dim)` gives this rank of a mesh of one dimension; without one, of all ranks."""
    ranks = dist.get_world_size() if mesh is None else mesh.size()
    rank = dist.get_rank() if mesh is None else mesh.get_local_rank()
    parts = tensor.chunk(ranks, dim)
    return parts[rank] if rank < len(parts) else tensor.narrow(dim, 0, 0)


# Cases, which several files run on their ranks.

# Bags 1 and 4 are empty.
OFFSETS = torch.tensor([0, 5, 5, 6, 18, 18])
FORMS = {
    "rows": {},
    "offsets": {"offsets": OFFSETS},
    "last offset": {"offsets": torch.tensor([0, 5, 5, 6, 18, 24]), "include_last_offset": True},
}


def _whole(weight, ids, grad, options):
    """The output, and the weight's gradient, of one process."""
    weight = weight.clone().requires_grad_()
    output = torch.nn.functional.embedding(ids.long(), weight, **options)
    output.backward(grad)
    return output.detach(), weight.grad


def lookup_equals_whole(
    mesh_shape, shape, table, ids_lie, options, ids=None, dtype=torch.float32, grads_lie=None
):
    """`table` and `ids_lie` have a letter a mesh dimension."""
    over = mesh(*mesh_shape)
    ids = some_ids(shape[0], 4, 6) if ids is None else ids
    weight = integers(*shape, dtype=dtype)
    multiple = MULTIPLE if options.get("scale_grad_by_freq") else 1
    grad = integers(*ids.shape, shape[1], seed=1, dtype=dtype, multiple=multiple)
    output, grad_weight = _whole(weight, ids, grad, options)

    sharded = distribute(weight, over, table).requires_grad_()
    actual = embedding(distribute(ids, over, ids_lie), sharded, **options)
    assert actual.shape == output.shape
    assert actual.dtype == dtype
    assert_equal(actual, output)
    if grads_lie is None:
        actual.full_tensor().backward(grad)
    else:
        actual.backward(distribute(grad, over, grads_lie))
    assert_lies_as(sharded.grad, sharded)
    assert_equal(sharded.grad, grad_weight)


def bag_equals_whole(
    mesh_shape, shape, table, ids_lie, form, mode, options, weighted=False, weight=None, ids=None
):
    over = mesh(*mesh_shape)
    if weight is None:
        # A mean is divided in the forward, and the gradient of scales is a product.
        weight = integers(*shape, multiple=1 if weighted else MULTIPLE)
    if ids is None:
        ids = some_ids(len(weight), 4, 6)
    if form != "rows":
        ids = ids.view(-1)
    arguments = {**FORMS[form], **options, "mode": mode}
    scales = integers(*ids.shape, seed=3).to(weight) if weighted else None

    def run(distributed):
        lay = distributed or (lambda tensor, _: tensor.clone())
        everywhere = "r" * len(mesh_shape)
        placed = {
            name: lay(value, everywhere) if isinstance(value, torch.Tensor) else value
            for name, value in arguments.items()
        }
        leaf = lay(weight, table).requires_grad_()
        factors = None if scales is None else lay(scales, ids_lie).requires_grad_()
        output = embedding_bag(lay(ids, ids_lie), leaf, **placed, per_sample_weights=factors)
        grad = integers(*output.shape, seed=1, multiple=MULTIPLE).to(weight.dtype)
        whole = output.full_tensor() if distributed else output
        whole.backward(grad)
        return output, leaf, factors

    expected, one, one_factors = run(None)
    actual, leaf, factors = run(lambda tensor, names: distribute(tensor, over, names))
    assert actual.shape == expected.shape
    assert actual.dtype == expected.dtype
    assert_equal(actual, expected.detach())
    assert_lies_as(leaf.grad, leaf)
    assert_equal(leaf.grad, one.grad)
    if weighted:
        assert_equal(factors.grad, one_factors.grad)


def renorm_equals_whole(mesh_shape, table, ids_lie, mode):
    """Each rank scales the rows that it has, of all ranks' ids; the others stay as they are."""
    over, ids = mesh(*mesh_shape), some_ids(11, 4, 3)
    weight = torch.zeros(11, 6)
    # Norms of 5 and 10, which become 5 exactly, or nearly.
    weight[:, 0], weight[:, 1] = 3, 4
    weight[::2] *= 2
    expected = weight.clone()
    sharded = distribute(weight.clone(), over, table).requires_grad_()
    placed = distribute(ids, over, ids_lie)
    if mode is None:
        one = embedding(ids, expected, max_norm=5.0)
        output = embedding(placed, sharded, max_norm=5.0)
    else:
        one = embedding_bag(ids, expected, max_norm=5.0, mode=mode)
        output = embedding_bag(placed, sharded, max_norm=5.0, mode=mode)
    torch.testing.assert_close(output.full_tensor(), one)
    output.sum().full_tensor().backward()
    assert not torch.equal(expected, weight)
    assert_equal(sharded.detach(), expected)
    other = torch.ones(11, dtype=torch.bool)
    other[ids.flatten()] = False
    assert other.any()
    assert torch.equal(sharded.detach().full_tensor()[other], weight[other])


# A ShardedEmbedding.


def plain_table(num_embeddings=11, embedding_dim=6, dtype=torch.float32, seed=0, **options):
    layer = nn.Embedding(num_embeddings, embedding_dim, dtype=dtype, **options)
    layer.weight.data = integers(num_embeddings, embedding_dim, seed=seed, dtype=dtype)
    return layer


def sharded_table(rows, distinct=True, **options):
    return ShardedEmbedding.from_module(
        plain_table(**options), mesh(dist.get_world_size()), rows, distinct
    )


def own_ids(num_embeddings, counts, dtype=torch.int64, seed=0):
    """Ids of each rank [2, count]; all of them, so that they are the same on each rank."""
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randint(num_embeddings, (2, count), generator=generator).to(dtype) for count in counts
    ]


def whole_rows(layer, rows):
    """What the ranks' rows are together, in the order of ids, without the layer's own way to say so."""
    parts = [None] * dist.get_world_size()
    dist.all_gather_object(parts, rows.detach())
    if not layer.sharding.round_robin:
        return torch.cat(parts)
    table = torch.empty(layer.num_embeddings, *rows.shape[1:], dtype=rows.dtype)
    for rank, part in enumerate(parts):
        table[rank :: len(parts)] = part
    return table


def table_equals_whole(rows, distinct, options, counts, id_dtype=torch.int64):
    """Outputs and gradients, bit for bit; gradients are integers, so their sums are exact."""
    rank, size = dist.get_rank(), dist.get_world_size()
    one, layer = plain_table(**options), sharded_table(rows, distinct, **options)
    ids = own_ids(layer.num_embeddings, [counts[r % len(counts)] for r in range(size)], id_dtype)
    dtype = one.weight.dtype
    grads = [
        integers(*x.shape, layer.embedding_dim, seed=r, dtype=dtype) for r, x in enumerate(ids)
    ]
    entries = []
    # torch adds no sparse gradients of fp16 on a CPU.
    steps = 1 if dtype == torch.float16 else 2
    for _ in range(steps):
        output = layer(ids[rank])
        assert output.dtype == dtype
        assert output.is_contiguous()
        assert torch.equal(output, one.weight.detach()[ids[rank].long()])
        output.backward(grads[rank])
        entries.append(layer.weight.grad._nnz())
    reference = one.weight.detach().double().requires_grad_()
    for x, grad in zip(ids, grads, strict=True):
        found = nn.functional.embedding(x.long(), reference, one.padding_idx)
        found.backward(steps * grad.double())
    assert layer.weight.grad.is_sparse
    gradient = layer.weight.grad.to(torch.float64).to_dense()
    assert torch.equal(whole_rows(layer, gradient), reference.grad)
    if distinct and dtype == torch.float32:
        # One entry for each id of a rank.
        wanted = torch.tensor(entries[0])
        dist.all_reduce(wanted)
        kept = [x[x != (-1 if one.padding_idx is None else one.padding_idx)] for x in ids]
        assert wanted == sum(len(x.unique()) for x in kept)
