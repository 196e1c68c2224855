"""What the tests of sharded tables share: placements by short names, integers, and how shards are compared."""

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor

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
