"""What only a GPU can show of the candidates: TMA, tensor cores, contention, graphs, huge tables."""

from collections.abc import Iterator

import pytest
import torch
from cases import ID_DTYPES, ids, same_bits, table
from gpu_cases import DEVICE, captured, forced, integers, random_ids
from torch import Tensor

from gpu_embed import backends
from gpu_embed.bench.candidates import launch as candidates

pytestmark = pytest.mark.gpu


@pytest.fixture
def triton() -> Iterator[backends.Backend]:
    for name in forced("triton"):
        yield backends.load(name)


@pytest.fixture
def descriptors(triton: backends.Backend) -> backends.Backend:
    if torch.cuda.get_device_capability() < candidates.DESCRIPTOR_CAPABILITY:
        pytest.skip("tensor descriptors need compute capability 9.0")
    return triton


@pytest.fixture
def deterministic() -> Iterator[None]:
    """torch fills uninitialised memory with NaN meanwhile."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def exact_gradient(indices: Tensor, num_embeddings: int, grad_output: Tensor) -> Tensor:
    """In fp64, by torch's own operator: exact for small integers, in any order."""
    total = torch.zeros(num_embeddings, grad_output.shape[-1], dtype=torch.float64, device=DEVICE)
    return total.index_add_(0, indices.long(), grad_output.double())


# (V, D, N, dtype): rows of 16 bytes, of no power of two of words, around the longest copy, and of many copies.
DESCRIPTOR_TABLES = [
    (50_000, 4, 100_000, torch.float32),
    (1000, 12, 33, torch.float32),
    (70_000, 64, 1_000_000, torch.bfloat16),
    (5000, 300, 3073, torch.float32),
    (5000, 768, 8192, torch.bfloat16),
    (300, 4096, 4099, torch.float16),
    (300, 4100, 515, torch.float32),
    (40, 48, 1, torch.uint8),
    (40, 3, 70, torch.complex128),
]


@pytest.mark.parametrize("shape", DESCRIPTOR_TABLES, ids=str)
def test_bulk_copies_look_up_bit_for_bit(descriptors, shape):
    """Exact copy: whole programs and ragged ones, bad ids and zeroed ones among them."""
    num_embeddings, embedding_dim, num_indices, dtype = shape
    weight = table(num_embeddings, embedding_dim, dtype, DEVICE)
    indices = random_ids(num_indices, num_embeddings)
    zero_idx = indices[num_indices // 2].item()
    indices[::5] = num_embeddings + 3
    indices[1::5] = -1
    indices[2::5] = 2**40
    before = weight.clone()
    output = candidates.gather(descriptors, weight, indices, zero_idx, None)
    kept = (indices >= 0) & (indices < num_embeddings) & (indices != zero_idx)
    expected = torch.zeros_like(output)
    expected[kept] = weight[indices[kept]]
    assert same_bits(output, expected)
    assert same_bits(weight, before)


@pytest.mark.parametrize("index_dtype", ID_DTYPES, ids=str)
def test_bulk_copies_take_every_id_dtype(descriptors, index_dtype):
    weight = table(256, 32, torch.float32, DEVICE)
    highest = min(256, torch.iinfo(index_dtype).max + 1)
    indices = random_ids(3073, highest).to(index_dtype)
    output = candidates.gather(descriptors, weight, indices, -1, None)
    assert same_bits(output, weight[indices.long()])


def test_bulk_copies_of_part_of_a_table(descriptors):
    """Exact copy: rows that lie apart, at an offset; what lies between them is not read or written."""
    whole = table(1000, 96, torch.float32, DEVICE)
    weight = whole[8:900:2, 32:64]
    indices = random_ids(5000, len(weight))
    assert same_bits(candidates.gather(descriptors, weight, indices, -1, None), weight[indices])


def test_bulk_copies_allocate_the_output_alone(descriptors):
    weight = table(5000, 1024, torch.float32, DEVICE)
    indices = random_ids(10_000, 5000)
    candidates.gather(descriptors, weight, indices, -1, None)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    output = candidates.gather(descriptors, weight, indices, -1, None)
    torch.cuda.synchronize()
    assert torch.cuda.max_memory_allocated() - before == output.numel() * 4


@pytest.mark.large
def test_bulk_copies_past_2_31_elements(descriptors):
    """64-bit addresses: coordinates are 32 bit, addresses are not."""
    num_embeddings, embedding_dim = 19_345_706, 128
    middle = 2**31 // embedding_dim
    rows = [0, 1, middle - 1, middle, middle + 1, num_embeddings - 2, num_embeddings - 1]
    values = torch.arange(len(rows) * embedding_dim, device=DEVICE).view(len(rows), -1) % 251.0
    rows = torch.tensor(rows, device=DEVICE)
    weight = torch.zeros(num_embeddings, embedding_dim, device=DEVICE)
    weight[rows] = values
    choice = random_ids(3073, len(rows))
    output = candidates.gather(descriptors, weight, rows[choice], -1, None)
    assert torch.equal(output, values[choice])
    del weight
    grad_output = integers(3073, embedding_dim)
    grad_weight = candidates.scatter_add(descriptors, grad_output, rows[choice], num_embeddings, -1)
    expected = exact_gradient(choice, len(rows), grad_output).float()
    assert torch.equal(grad_weight[rows], expected)
    assert grad_weight.abs().sum(dtype=torch.float64) == expected.abs().sum(dtype=torch.float64)


BULK_GRADIENTS = [
    (50_000, 768, 8192),
    (100_000, 4, 100_000),
    (30_000, 300, 50_000),
    (7, 8, 100_000),
    (2000, 384, 713_268),
]


@pytest.mark.parametrize("shape", BULK_GRADIENTS, ids=str)
@pytest.mark.parametrize("kind", ["zipf", "equal"])
def test_bulk_additions_sum_exactly(descriptors, shape, kind):
    """Accumulation: also where all rows meet on one, and with gradients of every stride."""
    num_embeddings, embedding_dim, num_indices = shape
    indices = ids(kind, num_indices, num_embeddings, DEVICE)
    grad_output = integers(num_indices, embedding_dim)
    views = [grad_output, grad_output[:1].expand_as(grad_output)]
    if grad_output.numel() < 2**25:
        views.append(grad_output.t().contiguous().t())
    for view in views:
        actual = candidates.scatter_add(descriptors, view, indices, num_embeddings, -1)
        assert torch.equal(actual, exact_gradient(indices, num_embeddings, view).float())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("num_embeddings", [1, 2, 16, 17, 64, 100, 256])
@pytest.mark.parametrize("embedding_dim", [1, 33, 768, 4096])
def test_one_hot_products_sum_exactly(triton, dtype, num_embeddings, embedding_dim):
    """Accumulation: fp32 sums on tensor cores, rounded once; padding and bad ids are not read."""
    num_indices = 30_000
    indices = random_ids(num_indices, num_embeddings)
    grad_output = integers(num_indices, embedding_dim, dtype=dtype)
    grad_output[::7] = float("nan")
    indices[::7] = num_embeddings
    actual = candidates.one_hot(triton, grad_output, indices, num_embeddings, -1)
    kept = indices < num_embeddings
    exact = exact_gradient(indices[kept], num_embeddings, grad_output[kept])
    assert torch.equal(actual, exact.to(dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_one_hot_products_stay_within_the_bound_and_repeat(triton, deterministic, dtype):
    """Accumulation and determinism: random floats; tensor cores may round a sum down, which eps allows for."""
    indices = random_ids(50_000, 50)
    generator = torch.Generator(DEVICE).manual_seed(0)
    grad_output = torch.randn(50_000, 384, generator=generator, device=DEVICE).to(dtype)
    runs = [candidates.one_hot(triton, grad_output, indices, 50, -1) for _ in range(20)]
    assert all(same_bits(run, runs[0]) for run in runs)
    exact = exact_gradient(indices, 50, grad_output)
    bound = exact_gradient(indices, 50, grad_output.abs())
    bound *= indices.bincount().max() * torch.finfo(torch.float32).eps
    bound += torch.finfo(dtype).eps / 2 * (exact.abs() + bound).clamp(min=torch.finfo(dtype).tiny)
    assert ((runs[0].double() - exact).abs() <= bound).all()


@pytest.mark.parametrize(
    ("gradient", "dtype"),
    [(candidates.scatter_add, torch.float32), (candidates.one_hot, torch.bfloat16)],
    ids=["descriptor", "one_hot"],
)
def test_candidates_run_in_cuda_graphs(descriptors, gradient, dtype):
    """No host sync: descriptors are arguments of the launch, so a replay finds them."""
    weight = table(200, 64, dtype, DEVICE)
    indices = random_ids(3073, 200)
    grad_output = integers(3073, 64, dtype=dtype)

    def step() -> tuple[Tensor, Tensor]:
        output = candidates.gather(descriptors, weight, indices, -1, None)
        return output, gradient(descriptors, grad_output, indices, 200, -1)

    graph, (output, grad_weight) = captured(step)
    indices.copy_(random_ids(3073, 200, seed=1))
    graph.replay()
    assert same_bits(output, weight[indices])
    assert torch.equal(grad_weight, exact_gradient(indices, 200, grad_output).to(dtype))


def test_sanitizer_finds_nothing_in_candidates(descriptors):
    """Bounds: bulk copies, bulk additions and one-hot products, ragged at every edge, bad ids included."""
    indices = ids("zipf", 77, 19, DEVICE)
    indices[5], indices[-1] = 19, -1
    for embedding_dim in (4, 36, 300, 1100):
        weight = table(19, embedding_dim, torch.float32, DEVICE)
        output = candidates.gather(descriptors, weight, indices, -1, None)
        assert not output[[5, -1]].any()
        candidates.scatter_add(descriptors, integers(77, embedding_dim), indices, 19, 2)
    for num_embeddings in (19, 200):
        grad_output = integers(77, 33, dtype=torch.bfloat16)
        candidates.one_hot(descriptors, grad_output, indices, num_embeddings, -1)
    torch.cuda.synchronize()
