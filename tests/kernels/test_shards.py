"""What the kernels make of the rows beside a shard: where a fault leaves a lookup's usual results right."""

from importlib.util import find_spec

import pytest
import torch

from gpu_embed import backends
from gpu_embed.bags import Bags
from gpu_embed.shard import Shard

# Rows 3 and 4 of eight.
SHARD = Shard(3, 8)


def here(target) -> backends.Backend:
    return backends.select(torch.device(target.device))


def test_renorm_leaves_the_row_behind_a_shard(target):
    """Other shards' ids are sorted behind its rows, as if they named the next one."""
    table = torch.full((3, 4), 64.0, device=target.device)
    indices = torch.tensor([3, 6, 0], device=target.device)
    here(target).embedding_renorm_(table[:2], indices, 1.0, 2.0, SHARD)
    assert table[0].norm() < 1.5
    assert table[1:].eq(64).all()


@pytest.mark.parametrize(
    ("first", "padding_idx", "position"),
    [(0, -1, 2), (0, 0, 1), (4, 4, 1), (7, 7, 1), (-1, -1, 1), (8, -1, 1)],
    ids=[
        "another shard's",
        "padding there",
        "padding here",
        "last padding",
        "negative",
        "too large",
    ],
)
def test_nan_is_the_largest_behind_what_takes_no_part(target, first, padding_idx, position):
    rows = torch.tensor([[torch.nan], [5.0]], device=target.device)
    bags = Bags(torch.tensor([first, 3, 4], device=target.device), None, 1)
    output, argmax = here(target).embedding_bag_max(rows, bags, padding_idx, True, None, SHARD)
    assert argmax.tolist() == [[position]]
    assert output.isnan().all() == (position == 1)


@pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
def test_ranks_share_one_binary():
    """Their first rows differ, and Triton compiles anew for 0, 1 and multiples of 16."""
    from gpu_embed.backends._triton import TritonBackend
    from gpu_embed.bench.ptx.launch import compiled_kernel

    with_shards = {}
    for name, kernel in vars(TritonBackend()._kernels).items():
        parameters = {one.name: one for one in compiled_kernel(kernel).params}
        if "first_row" in parameters:
            with_shards[name] = parameters["first_row"].do_not_specialize
    assert len(with_shards) == 8
    assert all(with_shards.values()), with_shards
