"""Compiled code of shards, and what lies beside one: where a fault leaves a lookup's usual results right."""

from functools import partial
from importlib.util import find_spec

import pytest
import torch
from cases import integer_gradient, same_bits, table

import gpu_embed
from gpu_embed import backends
from gpu_embed.bags import Bags
from gpu_embed.bounds import BoundsRecord
from gpu_embed.shard import Shard

full = partial(pytest.param, marks=pytest.mark.full)
# Rows 3 and 4 of eight.
SHARD = Shard(3, 8)


def here(target) -> backends.Backend:
    return backends.select(torch.device(target.device))


@pytest.mark.parametrize(
    ("columns", "dtype", "index_dtype", "first_row"),
    [
        full(64, torch.float32, torch.int64, 5),
        (64, torch.float32, torch.int64, 2**40),
        (5, torch.float64, torch.int16, 0),
        full(12, torch.float32, torch.uint8, 200),
        full(1024, torch.bfloat16, torch.int32, 2**31 - 40),
        (50, torch.float16, torch.int64, 2**31 - 9),
    ],
    ids=str,
)
def test_rows_and_their_sums(target, columns, dtype, index_dtype, first_row):
    """Exact copy: the ids around a shard, and where numbers begin to need 64 bits."""
    local = torch.arange(-4, 21, device=target.device).repeat_interleave(3)
    indices = (local + first_row).to(index_dtype)
    local = indices.long() - first_row
    shard, padding_idx = Shard(first_row, first_row + 20), first_row + 2
    weight = table(17, columns, dtype, target.device)
    read = (local >= 0) & (local < 17) & (local != 2)
    record = BoundsRecord(torch.device(target.device))
    rows = here(target).embedding(weight, indices, padding_idx, record, shard)
    assert same_bits(rows, torch.where(read[:, None], weight[local.clamp(0, 16)], 0))
    grad_output = integer_gradient((len(indices), columns), dtype, target.device)
    with gpu_embed.use_gradient_method("sorted" if dtype.itemsize == 2 else "atomic"):
        sums = here(target).embedding_dense_backward(
            grad_output, indices, 17, padding_idx, False, None, shard
        )
    exact = torch.zeros(17, columns, dtype=torch.float64, device=target.device)
    assert torch.equal(sums, exact.index_add_(0, local[read], grad_output[read].double()).to(dtype))


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
