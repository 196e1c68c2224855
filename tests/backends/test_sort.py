"""The radix sort: exactly torch's stable sort, whatever the ids, and gradients through it."""

from dataclasses import replace

import pytest
import torch
from cases import ID_DTYPES, ids, integer_gradient, same_bits
from torch import Tensor

import gpu_embed
from gpu_embed import backends
from gpu_embed.backends._plan import gradient as kernel_backend
from gpu_embed.functional import embedding


@pytest.fixture
def backend(target, monkeypatch):
    """A backend that hands every sort to the radix sort."""
    if target.backend not in ("triton", "cupy"):
        pytest.skip(f"{target.backend} has no sort of its own")
    monkeypatch.setattr(kernel_backend, "max_torch_sort_ids", lambda key_bytes: 0)
    return backends.select(torch.device(target.device))


def check(backend, target, indices: Tensor, num_embeddings: int, padding_idx: int = -1) -> Tensor:
    """Keys and positions against torch's sort; returns the positions."""
    keys, order = backend._sorted_keys(indices.to(target.device), num_embeddings, padding_idx)
    wide = indices.flatten().long()
    kept = (wide >= 0) & (wide < num_embeddings) & (wide != padding_idx)
    expected, positions = torch.sort(torch.where(kept, wide, num_embeddings), stable=True)
    assert torch.equal(keys.cpu().long(), expected)
    assert torch.equal(order.cpu().long(), positions)
    return order


def drawn(num_indices: int, high: int, dtype: torch.dtype = torch.int64, low: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(num_indices)
    return torch.randint(low, high, (num_indices,), generator=generator).to(dtype)


EDGES = {
    "one": 1,
    "a step less one": lambda step: step - 1,
    "a step": lambda step: step,
    "a step and one": lambda step: step + 1,
    "steps and one": lambda step: 3 * step + 1,
}


@pytest.mark.parametrize("edge", EDGES.values(), ids=EDGES)
def test_any_number_of_ids(target, backend, edge):
    """Keys are padded to whole steps of the kernels' loops; what is added stays behind."""
    num_indices = edge(backend.sort_tiles.STEP) if callable(edge) else edge
    check(backend, target, drawn(num_indices, 40), 40)


@pytest.mark.parametrize("tiles", [1, 2])
def test_tiles_of_several_steps(target, backend, monkeypatch, tiles):
    """A tile counts on from block to block; the last tile may be shorter than the others."""
    monkeypatch.setattr(backend, "sort_tiles", replace(backend.sort_tiles, TILES=tiles))
    check(backend, target, drawn(4 * backend.sort_tiles.STEP + 1, 20), 20)


def test_a_tile_ends_where_a_byte_has_counted_all_it_can(target, backend, monkeypatch):
    """All ids the same: every counter counts as far as it ever has to."""
    tiles = replace(backend.sort_tiles, TILES=1, MAX_STEPS=min(backend.sort_tiles.MAX_STEPS, 300))
    monkeypatch.setattr(backend, "sort_tiles", tiles)
    check(backend, target, torch.full((tiles.STEP * tiles.MAX_STEPS + 1,), 7), 8)


KINDS = {
    "equal": lambda n: torch.full((n,), 29),
    "sorted": lambda n: torch.arange(n) * 30 // n,
    "reversed": lambda n: torch.arange(n).flip(0) * 30 // n,
    "zipf": lambda n: ids("zipf", n, 30),
    "lowest digit": lambda n: torch.arange(n) % 16,
    "highest digit": lambda n: torch.arange(n) % 2 * 16,
}


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_any_distribution(target, backend, kind):
    """Stable: equal ids keep their order, so the positions are compared as well."""
    check(backend, target, kind(600), 30)


ROWS = [1, 2, 15, 16, 17, 255, 256, 257, 32767, 32768, 2**20 - 1, 2**20, 2**31 - 1, 2**31]


@pytest.mark.parametrize("num_embeddings", ROWS)
def test_any_number_of_rows(target, backend, num_embeddings):
    """Around each number of digits, and around each width of the keys; the last positions travel alone."""
    indices = drawn(300, num_embeddings)
    indices[:3] = torch.tensor([num_embeddings - 1, 0, num_embeddings - 1])
    check(backend, target, indices, num_embeddings)


@pytest.mark.parametrize("dtype", ID_DTYPES, ids=str)
@pytest.mark.parametrize("num_embeddings", [100, 70_000])
def test_every_dtype_of_ids(target, backend, dtype, num_embeddings):
    check(backend, target, drawn(300, 100, dtype), num_embeddings)


@pytest.mark.parametrize("num_embeddings", [15, 16])
def test_bad_ids_and_padding_come_last(target, backend, num_embeddings):
    """As one key, num_embeddings, and so in the order they came in."""
    indices = drawn(300, 20, low=-5)
    indices[7], indices[-1] = 2**62, -(2**62)
    check(backend, target, indices, num_embeddings, padding_idx=3)


def test_nothing_but_bad_ids(target, backend):
    check(backend, target, torch.full((600,), -1), 15)


def test_ids_that_lie_apart(target, backend):
    check(backend, target, drawn(300, 40).view(2, 150).t()[::2], 40)


def test_positions_of_64_bits(target, backend, monkeypatch):
    """From 2**31 ids on; here for fewer, so positions travel alone though keys are narrow."""
    monkeypatch.setattr(kernel_backend, "MAX_INT32_IDS", 100)
    order = check(backend, target, drawn(300, 40), 40)
    assert order.dtype == torch.int64


@pytest.mark.parametrize("scale_grad_by_freq", [False, True])
@pytest.mark.parametrize("wide", [False, True], ids=["", "64 bits"])
def test_gradients(target, backend, monkeypatch, scale_grad_by_freq, wide):
    """Positions of either width lead to the right rows, over several levels of partial sums."""
    if wide:
        monkeypatch.setattr(kernel_backend, "MAX_INT32_IDS", 100)
    indices = ids("zipf", 300, 20, target.device)
    grad_output = integer_gradient((300, 12), torch.bfloat16, target.device)
    grads = []
    for name in (target.backend, "reference"):
        weight = torch.zeros(20, 12, device=target.device).bfloat16().requires_grad_()
        with gpu_embed.use_backend(name), gpu_embed.use_gradient_method("sorted"):
            output = embedding(
                indices, weight, padding_idx=2, scale_grad_by_freq=scale_grad_by_freq
            )
            output.backward(grad_output)
        grads.append(weight.grad)
    assert same_bits(*grads)


def test_renorm(target, backend):
    weight = torch.full((40, 3), 2.0, device=target.device)
    embedding(drawn(300, 20).to(target.device), weight, max_norm=1.0, norm_type=float("inf"))
    assert weight[:20].eq(weight[0]).all()
    assert weight[0, 0] < 1.01
    assert weight[20:].eq(2).all()
