"""Sorted keys: exactly torch's stable sort, whatever the ids; and what happens past what torch.sort takes."""

import pytest
import torch
from cases import ID_DTYPES, ids, same_bits
from torch import Tensor

import gpu_embed
from gpu_embed import backends
from gpu_embed.backends._plan import sort
from gpu_embed.backends._plan.access import rows_of_keys
from gpu_embed.backends._plan.gradient_method import choose
from gpu_embed.backends._torch.sort import RADIX_SORT_FROM, sort_ids
from gpu_embed.functional import embedding


@pytest.fixture
def backend(kernel_target):
    return backends.select(torch.device(kernel_target.device))


def check(backend, device: str, indices: Tensor, num_embeddings: int, padding_idx: int = -1):
    """Keys and positions against torch's sort."""
    keys, order = backend._sorted_keys(indices.to(device), num_embeddings, padding_idx)
    wide = indices.flatten().long()
    kept = (wide >= 0) & (wide < num_embeddings) & (wide != padding_idx)
    expected, positions = torch.sort(torch.where(kept, wide, num_embeddings), stable=True)
    assert torch.equal(rows_of_keys(keys.cpu()), expected)
    assert torch.equal(order.cpu().long(), positions)


def drawn(num_indices: int, high: int, dtype: torch.dtype = torch.int64, low: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(num_indices)
    return torch.randint(low, high, (num_indices,), generator=generator).to(dtype)


KINDS = {
    "one": lambda: torch.tensor([29]),
    "equal": lambda: torch.full((600,), 29),
    "reversed": lambda: torch.arange(600).flip(0) * 30 // 600,
    "zipf": lambda: ids("zipf", 600, 30),
    "nothing but bad ids": lambda: torch.full((600,), -1),
    "apart": lambda: drawn(300, 30).view(2, 150).t()[::2],
}


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_any_distribution(kernel_target, backend, kind):
    """Stable: equal ids keep their order, so the positions are compared as well."""
    check(backend, kernel_target.device, kind(), 30)


@pytest.mark.parametrize("num_embeddings", [1, 255, 256, 32768, 65535, 65536, 2**31 - 1, 2**31])
def test_any_number_of_rows(kernel_target, backend, num_embeddings):
    """Around each width of the keys."""
    indices = drawn(300, num_embeddings)
    indices[:3] = torch.tensor([num_embeddings - 1, 0, num_embeddings - 1])
    check(backend, kernel_target.device, indices, num_embeddings)


@pytest.mark.parametrize("dtype", ID_DTYPES, ids=str)
def test_every_dtype_of_ids(kernel_target, backend, dtype):
    check(backend, kernel_target.device, drawn(300, 100, dtype), 70_000)


@pytest.mark.parametrize("num_embeddings", [15, 16])
def test_bad_ids_and_padding_come_last(kernel_target, backend, num_embeddings):
    """As one key, num_embeddings, and so in the order they came in."""
    indices = drawn(300, 20, low=-5)
    indices[7], indices[-1] = 2**62, -(2**62)
    check(backend, kernel_target.device, indices, num_embeddings, padding_idx=3)


@pytest.mark.parametrize(
    ("dtype", "deterministic", "scale", "expected"),
    [
        (torch.float32, False, False, "atomic"),
        (torch.float64, False, False, "atomic"),
        (torch.bfloat16, False, False, None),
        (torch.float16, False, False, None),
        (torch.float32, True, False, None),
        (torch.float32, False, True, None),
    ],
)
def test_the_choice_past_what_can_be_sorted(dtype, deterministic, scale, expected):
    """Few rows, where fewer ids would be sorted."""
    arguments = (1000, dtype, deterministic, scale)
    assert choose(2**31 - 1, *arguments) == "sorted"
    if expected is not None:
        assert choose(2**31, *arguments) == expected
        return
    with pytest.raises(
        NotImplementedError, match=r"at most 2147483647; got 2147483648\. Split the batch"
    ):
        choose(2**31, *arguments)


def test_more_ids_than_can_be_sorted(kernel_target, monkeypatch):
    """fp32 goes to atomics; all else says what to do, and leaves the table and its gradient as they were."""
    monkeypatch.setattr(sort, "MAX_SORTED_IDS", 10)
    indices = drawn(11, 2).to(kernel_target.device)

    def gradient(ids: Tensor, dtype: torch.dtype) -> Tensor:
        weight = torch.zeros(2, 4, dtype=dtype, device=kernel_target.device, requires_grad=True)
        embedding(ids, weight).sum().backward()
        return weight.grad

    expected = torch.stack([(indices == row).sum() for row in range(2)])[:, None].expand(2, 4)
    assert torch.equal(gradient(indices, torch.float32), expected.float())
    assert same_bits(gradient(indices[:10], torch.bfloat16).isnan(), expected.isnan())
    weight = torch.full((2, 4), 3.0, device=kernel_target.device, requires_grad=True)
    with pytest.raises(NotImplementedError, match="Split the batch"):
        gradient(indices, torch.bfloat16)
    with pytest.raises(NotImplementedError, match="Split the batch"):
        embedding(indices, weight, max_norm=1.0)
    optimizer = gpu_embed.optim.SGD([weight], lr=1.0, momentum=0.5, dampening=0.5)
    embedding(indices, weight, sparse=True).sum().backward()
    with pytest.raises(NotImplementedError, match="Split the batch"):
        optimizer.step()
    assert weight.eq(3).all()
    # Nor has the step been counted: the first one begins the momentum.
    assert optimizer.state[weight]["step"] == 0
    optimizer.zero_grad()
    embedding(indices[:1], weight, sparse=True).sum().backward()
    optimizer.step()
    assert weight[indices[0]].eq(2).all()


@pytest.mark.parametrize("num_rows", [200, 2**16 - 1, 2**20, 2**40])
@pytest.mark.parametrize("num_ids", [1, 100, RADIX_SORT_FROM - 1, RADIX_SORT_FROM])
def test_the_torch_backend_brings_equal_ids_together(num_rows, num_ids):
    """In the order of the input, by NumPy's sort and by torch's."""
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(num_rows - 100, num_rows, (num_ids,), generator=generator)
    for indices in (drawn, drawn - (num_rows - 100)):
        keys, order = sort_ids(indices, num_rows)
        sorted_ids = indices[order]
        assert torch.equal(order.sort()[0], torch.arange(num_ids))
        begins = sorted_ids[1:] != sorted_ids[:-1]
        assert torch.equal(begins, keys[1:] != keys[:-1])
        assert int(begins.sum()) + 1 == len(indices.unique())
        assert torch.equal(begins | (order[1:] > order[:-1]), torch.ones(num_ids - 1).bool())
