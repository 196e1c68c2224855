"""The CUDA C++ kernels and CupyBackend's host code, run on the CPU through tests/host_shim."""

import ast
import math
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import cuda_host_backend
import numpy as np
import pytest
import torch
from cases import FAR_ROWS, mapped, needs_mapping
from cuda_host_backend import HostShimCupyBackend
from torch import Tensor

from gpu_embed import reference
from gpu_embed.backends._cupy.nvrtc import Kernel
from gpu_embed.backends._plan.access import rows_of_keys, sort_key_dtype
from gpu_embed.backends._plan.gradient_method import use_gradient_method
from gpu_embed.bags import Bags
from gpu_embed.bounds import BoundsRecord
from gpu_embed.fused_rows import FusedRows, dequantize, quantize_rows
from gpu_embed.reference.renorm import row_norm
from gpu_embed.shard import Shard
from gpu_embed.take import QuantizedTable, fused_table

KERNELS_DIR = Path(__file__).parents[2] / "kernels"
FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
ID_DTYPES = (torch.int64, torch.int32, torch.int16, torch.uint8)
# The backend as it is on a card of that age, and once with the threads in descending order.
BACKENDS = {
    "sm_80": {"capability": (8, 0)},
    "sm_90": {"capability": (9, 0)},
    "descending": {"capability": (9, 0), "descending": True},
}


def make_backend(name: str) -> HostShimCupyBackend:
    reason = cuda_host_backend.unusable_reason()
    if reason is not None:
        if os.environ.get("CI"):
            pytest.fail(f"CI must build the kernels: {reason}")
        pytest.skip(reason)
    return HostShimCupyBackend(cuda_host_backend.compiled_library(), **BACKENDS[name])


@pytest.fixture(params=["sm_90", "descending"])
def backend(request: pytest.FixtureRequest) -> HostShimCupyBackend:
    return make_backend(request.param)


@pytest.fixture
def sm_90() -> HostShimCupyBackend:
    return make_backend("sm_90")


@pytest.fixture
def poison() -> Iterator[None]:
    """Uninitialized tensors hold NaN, or the largest integer, so that an unwritten output shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def launched(backend: HostShimCupyBackend, name: str) -> list[str]:
    return [k.expression for k in backend.launched if k.expression.startswith(name)]


def record() -> BoundsRecord:
    return BoundsRecord(torch.device("cpu"))


# 16-bit floats.


def same_bits_or_nan(actual: Tensor, expected: Tensor) -> bool:
    bits = {2: torch.int16, 4: torch.int32}[expected.element_size()]
    same = actual.view(bits) == expected.view(bits)
    return bool((same | (actual.isnan() & expected.isnan())).all())


@pytest.mark.parametrize(("name", "dtype"), [("float16", torch.half), ("bfloat16", torch.bfloat16)])
def test_every_16_bit_float_widens_as_in_torch(
    sm_90: HostShimCupyBackend, name: str, dtype: torch.dtype
) -> None:
    narrow = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    wide = torch.full((2**16,), 7.0)
    kernel = Kernel("conversions", f"widen_kernel<{name}>")
    sm_90._launch(kernel, (256, 1), (256, 1), wide.device, narrow, wide, 2**16)
    assert same_bits_or_nan(wide, narrow.float())


@pytest.mark.parametrize(("name", "dtype"), [("float16", torch.half), ("bfloat16", torch.bfloat16)])
def test_floats_round_to_16_bits_as_in_torch(
    sm_90: HostShimCupyBackend, name: str, dtype: torch.dtype
) -> None:
    """Random bit patterns, every 16-bit value, the middle to its neighbour, and a float to either side."""
    random = torch.randint(-(2**31), 2**31, (2**20,), generator=seeded()).to(torch.int32)
    exact = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype).float().view(torch.int32)
    middle = exact + (1 << (12 if dtype == torch.half else 15))
    near = torch.cat([bits + step for bits in (exact, middle) for step in (-1, 0, 1)])
    # Halves below 2**-14 are wider apart.
    subnormal = (torch.arange(0, 2**13) / 2**26).repeat_interleave(3).view(torch.int32)
    subnormal = subnormal + torch.tensor([-1, 0, 1], dtype=torch.int32).repeat(2**13)
    wide = torch.cat([random, near, subnormal]).view(torch.float32)
    narrow = torch.full((len(wide),), 7.0, dtype=dtype)
    kernel = Kernel("conversions", f"narrow_kernel<{name}>")
    sm_90._launch(kernel, (-(-len(wide) // 256), 1), (256, 1), wide.device, wide, narrow, len(wide))
    assert same_bits_or_nan(narrow, wide.to(dtype))


# Gather.


def shifted(weight: Tensor) -> Tensor:
    """The same table, one item behind an aligned address."""
    room = weight.new_empty(weight.numel() + 1)
    room[1:] = weight.flatten()
    return room[1:].view(weight.shape)


def transposed(weight: Tensor) -> Tensor:
    return weight.t().contiguous().t()


WORD_CASES: list[tuple[str, torch.dtype, int, Callable[[Tensor], Tensor], str]] = [
    ("bool odd", torch.bool, 7, lambda w: w, "gather_flat_kernel<word1, 4, false>"),
    ("bool even", torch.bool, 48, lambda w: w, "gather_flat_kernel<word16, 4, false>"),
    ("float8", torch.float8_e4m3fn, 64, lambda w: w, "gather_flat_kernel<word16, 4, false>"),
    ("fp16 odd", torch.float16, 7, lambda w: w, "gather_flat_kernel<word2, 4, false>"),
    ("fp32 odd", torch.float32, 7, lambda w: w, "gather_flat_kernel<word4, 4, false>"),
    ("fp32 50", torch.float32, 50, lambda w: w, "gather_flat_kernel<word8, 4, false>"),
    ("fp32 300", torch.float32, 300, lambda w: w, "gather_flat_kernel<word16, 4, false>"),
    ("fp32 512", torch.float32, 512, lambda w: w, "gather_rows_kernel<word16, 4, false>"),
    ("fp32 1024", torch.float32, 1024, lambda w: w, "gather_rows_kernel<word16, 4, false>"),
    ("fp32 1025", torch.float32, 1025, lambda w: w, "gather_rows_kernel<word4, 4, false>"),
    ("fp64 64", torch.float64, 64, lambda w: w, "gather_rows_kernel<word16, 4, false>"),
    ("int16 33", torch.int16, 33, lambda w: w, "gather_flat_kernel<word2, 4, false>"),
    ("complex64", torch.complex64, 3, lambda w: w, "gather_flat_kernel<word8, 4, false>"),
    ("complex128", torch.complex128, 3, lambda w: w, "gather_flat_kernel<word16, 4, false>"),
    ("fp32 shifted", torch.float32, 4, shifted, "gather_flat_kernel<word4, 4, false>"),
    ("bf16 shifted", torch.bfloat16, 512, shifted, "gather_rows_kernel<word2, 4, false>"),
    ("fp64 shifted", torch.float64, 4, shifted, "gather_flat_kernel<word8, 4, false>"),
    ("transposed", torch.float32, 64, transposed, "gather_rows_kernel<word4, 4, false>"),
    ("apart", torch.float32, 8, lambda w: w[:, ::2], "gather_flat_kernel<word4, 4, false>"),
    ("first columns", torch.float32, 9, lambda w: w[:, :4], "gather_flat_kernel<word4, 4, false>"),
    ("every second row", torch.float32, 8, lambda w: w[::2], "gather_flat_kernel<word16, 4, false>"),
    ("one row", torch.float32, 8, lambda w: w[:1].expand(9, 8), "gather_flat_kernel<word16, 4, false>"),
    ("one column", torch.float32, 8, lambda w: w[:, 3:4], "gather_flat_kernel<word4, 4, false>"),
    ("complex128 apart", torch.complex128, 3, transposed, "gather_flat_kernel<word16, 4, false>"),
]  # fmt: skip


@pytest.mark.parametrize("case", WORD_CASES, ids=lambda case: case[0])
def test_gather_copies_bits_in_the_widest_words(
    backend: HostShimCupyBackend,
    case: tuple[str, torch.dtype, int, Callable[[Tensor], Tensor], str],
) -> None:
    _, dtype, columns, view, kernel = case
    raw = torch.randint(0, 256, (40, columns * dtype.itemsize), generator=seeded())
    raw = raw.to(torch.uint8) if dtype != torch.bool else (raw & 1).to(torch.uint8)
    weight = view(raw.view(dtype))
    indices = torch.randint(0, len(weight), (131,), generator=seeded(1))
    output = backend.embedding(weight, indices, -1, record())
    assert launched(backend, "gather") == [kernel]
    assert output.is_contiguous()
    assert output.dtype == dtype
    expected = weight.contiguous()[indices]
    assert torch.equal(output.view(torch.uint8), expected.view(torch.uint8))


def test_the_record_keeps_the_first_bad_id_until_it_is_cleared(sm_90: HostShimCupyBackend) -> None:
    weight = torch.randn(20, 5)
    found = record()
    sm_90.embedding(weight, torch.tensor([3, 99, 98]), -1, found)
    sm_90.embedding(weight, torch.tensor([97]), -1, found)
    assert found.words.tolist() == [1, 1, 99, 20, 0, 0, 0]
    with pytest.raises(IndexError, match="id 99"):
        found.raise_if_claimed()
    sm_90.embedding(weight, torch.tensor([4]), -1, found)
    assert found.words.tolist() == [0] * 7
    assert found.flag.tolist() == [0]


# Gradients.


def power_law(count: int, rows: int) -> Tensor:
    return (rows * torch.rand(count, generator=seeded()) ** 8).long()


DISTRIBUTIONS: dict[str, Callable[[int, int], Tensor]] = {
    "uniform": lambda n, v: torch.randint(0, v, (n,), generator=seeded()),
    "all equal": lambda n, v: torch.full((n,), v - 1),
    "sorted": lambda n, v: torch.arange(n) * v // n,
    "power law": power_law,
    "hot row": lambda n, v: torch.where(torch.arange(n) % 9 == 0, torch.arange(n) % v, v // 2),
    "all padding": lambda n, v: torch.full((n,), 1),
    "some bad": lambda n, v: torch.randint(-v, 2 * v, (n,), generator=seeded()),
    "all bad": lambda n, v: torch.full((n,), v),
}


def exact_gradient(
    grad_output: Tensor, indices: Tensor, rows: int, padding_idx: int, scale: bool
) -> Tensor:
    """The sum in fp64, divided and rounded as the kernels document it."""
    flat = indices.reshape(-1).long().numpy()
    grads = grad_output.reshape(len(flat), grad_output.shape[-1]).double().numpy()
    total = torch.from_numpy(reference.embedding_dense_backward(grads, flat, rows, padding_idx))
    acc = torch.promote_types(grad_output.dtype, torch.float32)
    total = total.to(acc)
    if scale:
        counts = torch.from_numpy(reference.embedding_counts(flat, rows))
        total = total / counts.clamp(min=1)[:, None].to(acc)
    return total.to(grad_output.dtype)


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("columns", [1, 6, 136])
@pytest.mark.parametrize("scale", [False, True], ids=["", "scale_grad_by_freq"])
@pytest.mark.usefixtures("poison")
def test_sorted_gradient(
    backend: HostShimCupyBackend, distribution: str, dtype: torch.dtype, columns: int, scale: bool
) -> None:
    indices = DISTRIBUTIONS[distribution](3073, 300)
    grad_output = torch.randint(-4, 5, (3073, columns), generator=seeded()).to(dtype)
    with use_gradient_method("sorted"):
        actual = backend.embedding_dense_backward(grad_output, indices, 300, 1, scale)
    # Small integers have exact sums, whatever their order.
    assert torch.equal(actual, exact_gradient(grad_output, indices, 300, 1, scale))
    # The walk and the join.
    assert len(launched(backend, "segment_sum_kernel")) == 2


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("dtype", FLOATS[:2], ids=str)
@pytest.mark.parametrize("columns", [1, 6, 136])
@pytest.mark.parametrize("card", BACKENDS)
def test_atomic_gradient(distribution: str, dtype: torch.dtype, columns: int, card: str) -> None:
    backend = make_backend(card)
    indices = DISTRIBUTIONS[distribution](3073, 300)
    grad_output = torch.randint(-4, 5, (3073, columns), generator=seeded()).to(dtype)
    with use_gradient_method("atomic"):
        actual = backend.embedding_dense_backward(grad_output, indices, 300, 1, False)
    assert torch.equal(actual, exact_gradient(grad_output, indices, 300, 1, False))
    assert not launched(backend, "segment_sum_kernel")


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("dtype", FLOATS[:2], ids=str)
@pytest.mark.parametrize("columns", [1, 6, 136])
def test_sorted_gradient_with_atomic_ends(
    backend: HostShimCupyBackend, distribution: str, dtype: torch.dtype, columns: int
) -> None:
    indices = DISTRIBUTIONS[distribution](3073, 300)
    grad_output = torch.randint(-4, 5, (3073, columns), generator=seeded()).to(dtype)
    with use_gradient_method("sorted_atomic"):
        actual = backend.embedding_dense_backward(grad_output, indices, 300, 1, False)
    assert torch.equal(actual, exact_gradient(grad_output, indices, 300, 1, False))
    assert len(launched(backend, "segment_sum_kernel")) == 1


@pytest.mark.parametrize("count", [1, 2, 15, 16, 17, 32, 33, 80, 81, 512, 513])
@pytest.mark.parametrize("method", ["sorted", "atomic", "sorted_atomic"])
def test_gradient_of_few_ids(sm_90: HostShimCupyBackend, count: int, method: str) -> None:
    """Around the chunk of 16, and around the four that one step of the join adds."""
    grad_output = torch.randint(-4, 5, (count, 5), generator=seeded()).float()
    for distribution in DISTRIBUTIONS.values():
        indices = distribution(count, 40)
        with use_gradient_method(method):
            actual = sm_90.embedding_dense_backward(grad_output, indices, 40, 1, False)
        assert torch.equal(actual, exact_gradient(grad_output, indices, 40, 1, False))


def test_only_new_cards_add_vectors(sm_90: HostShimCupyBackend) -> None:
    sm_80 = make_backend("sm_80")
    indices = torch.arange(10)
    with use_gradient_method("atomic"):
        for backend in (sm_80, sm_90):
            for columns in (4, 6, 7):
                backend.embedding_dense_backward(torch.ones(10, columns), indices, 10, -1, False)
            backend.embedding_dense_backward(torch.ones(10, 4).double(), indices, 10, -1, False)
    names = [f"scatter_add_kernel<float, float, {vec}, 4, false, false>" for vec in (4, 2, 1)]
    fp64 = "scatter_add_kernel<double, double, 1, 4, false, false>"
    assert launched(sm_90, "scatter") == [*names, fp64]
    assert launched(sm_80, "scatter") == [names[2]] * 3 + [fp64]


def test_subnormal_gradients_are_not_lost(backend: HostShimCupyBackend) -> None:
    tiny = torch.full((4, 1), 2.0**-133, dtype=torch.bfloat16)
    indices = torch.zeros(4, dtype=torch.long)
    grad_weight = backend.embedding_dense_backward(tiny, indices, 1, -1, False)
    assert grad_weight.item() == 2.0**-131


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("scale", [False, True], ids=["", "scale_grad_by_freq"])
def test_sorted_gradient_does_not_depend_on_the_order_of_threads(
    dtype: torch.dtype, scale: bool
) -> None:
    """Nor on the width of the card's atomics: random floats, whose sums differ with every order."""
    indices = power_law(5000, 300)
    grad_output = torch.randn(5000, 6, generator=seeded()).to(dtype)
    with use_gradient_method("sorted"):
        results = [
            make_backend(name).embedding_dense_backward(grad_output, indices, 300, -1, scale)
            for name in BACKENDS
        ]
    assert all(torch.equal(result, results[0]) for result in results)
    exact = exact_gradient(grad_output.double(), indices, 300, -1, scale)
    torch.testing.assert_close(results[0].double(), exact, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize(
    ("dtype", "into_dtype"),
    [*((dtype, dtype) for dtype in FLOATS), *((dtype, torch.float32) for dtype in FLOATS[2:])],
    ids=str,
)
@pytest.mark.parametrize("scale", [False, True], ids=["", "scale_grad_by_freq"])
def test_a_sum_in_place_does_not_depend_on_the_order_of_threads(
    dtype: torch.dtype, into_dtype: torch.dtype, scale: bool
) -> None:
    """No thread reads a row that another one writes: runs cross many chunks, of random floats."""
    indices = power_law(2000, 300)
    grad_output = torch.randn(2000, 6, generator=seeded()).to(dtype)
    into = torch.randn(300, 6, generator=seeded(1)).to(into_dtype)
    acc = torch.promote_types(dtype, torch.float32)
    with use_gradient_method("sorted"):
        results = [
            make_backend(name).embedding_dense_backward(
                grad_output, indices, 300, 1, scale, into.clone()
            )
            for name in BACKENDS
        ]
        total = make_backend("sm_90").embedding_dense_backward(
            grad_output.to(acc), indices, 300, 1, scale
        )
    expected = (into.to(acc) + total).to(into_dtype)
    assert all(torch.equal(result, expected) for result in results)


@pytest.mark.parametrize("method", ["sorted", "atomic", "sorted_atomic"])
@pytest.mark.parametrize(
    ("view", "vec"),
    [
        (lambda storage: storage[:, :8], 4),
        (lambda storage: storage[:, 2:10], 2),
        (lambda storage: storage[:, 3:11], 1),
        (lambda storage: storage[::2, :8], 4),
        (lambda storage: storage[:, ::2], 1),
    ],
    ids=["aligned", "half aligned", "unaligned", "every other row", "every other column"],
)
def test_the_gradient_in_place_decides_how_wide_it_is_read(
    sm_90: HostShimCupyBackend, method: str, view: Callable[[Tensor], Tensor], vec: int
) -> None:
    """Values could be moved four at once."""
    into = view(torch.zeros(40, 16))
    grad_output = torch.randint(-4, 5, (60, 8), generator=seeded()).float()
    indices = power_law(60, len(into))
    with use_gradient_method(method):
        sm_90.embedding_dense_backward(grad_output, indices, len(into), -1, False, into)
    assert torch.equal(into, exact_gradient(grad_output, indices, len(into), -1, False))
    kernels = launched(sm_90, "scatter_add" if method == "atomic" else "segment_sum")
    assert kernels
    assert all(f"<float, float, {vec}, " in kernel for kernel in kernels)


def test_sorted_gradient_adds_in_the_same_order_as_triton(sm_90: HostShimCupyBackend) -> None:
    pytest.importorskip("triton")
    from gpu_embed.backends._triton import TritonBackend

    triton = TritonBackend()
    if triton.unusable_reason(torch.device("cpu")) is not None:
        pytest.skip("Triton's interpreter is off")
    indices = power_law(700, 40)
    grad_output = torch.randn(700, 3, generator=seeded())
    with use_gradient_method("sorted"):
        ours, theirs = (
            backend.embedding_dense_backward(grad_output, indices, 40, -1, False)
            for backend in (sm_90, triton)
        )
    assert torch.equal(ours, theirs)


# Renorm and counts.

NORM_TYPES = (math.inf, -math.inf, 0.0, 1.0, 2.0, 3.0, 0.5, -1.0, -2.5)


@pytest.mark.parametrize("norm_type", NORM_TYPES)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("columns", [1, 50, 300])
def test_renorm_of_every_norm(
    backend: HostShimCupyBackend, norm_type: float, dtype: torch.dtype, columns: int
) -> None:
    weight = torch.randn(60, columns, generator=seeded(), dtype=torch.float64).to(dtype)
    indices = torch.randint(0, 50, (20, 2), generator=seeded())
    norms = row_norm(weight.double().numpy(), norm_type)
    max_norm = float(np.median(norms))
    expected = torch.from_numpy(
        reference.embedding_renorm(weight.double().numpy(), indices.numpy(), max_norm, norm_type)
    )
    actual = weight.clone()
    backend.embedding_renorm_(actual, indices, max_norm, norm_type)
    untouched = torch.ones(60, dtype=torch.bool)
    untouched[indices] = False
    assert torch.equal(actual[untouched], weight[untouched])
    bound = 2e-6 if dtype == torch.float32 else 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(actual.double(), expected, rtol=bound, atol=0)


@pytest.mark.parametrize("id_dtype", ID_DTYPES, ids=str)
@pytest.mark.parametrize("count", [0, 1, 3073])
def test_counts(backend: HostShimCupyBackend, id_dtype: torch.dtype, count: int) -> None:
    indices = torch.randint(0, 120, (count,), generator=seeded()).to(id_dtype)
    counts = backend.embedding_counts(indices, 100)
    assert counts.dtype == torch.int32
    assert counts.tolist() == torch.bincount(indices.long(), minlength=120)[:100].tolist()


# Shards of a table: what holds on every backend is in tests/backends/test_shard.py.

SHARDS = (Shard(0, 50), Shard(20, 50), Shard(20, 50), Shard(33, 50))
SHARD_ROWS = (slice(0, 20), slice(20, 20), slice(20, 33), slice(33, 50))


def bags_of(indices: Tensor) -> Bags:
    return Bags(indices, torch.tensor([0, 1, 1, 30, 100]), 5)


@pytest.mark.parametrize("columns", [6, 512])
@pytest.mark.parametrize("card", BACKENDS)
def test_shards_put_together(card: str, columns: int) -> None:
    """In any order of threads, and with the atomics of any card."""
    backend = make_backend(card)
    weight = torch.randint(-9, 9, (50, columns), generator=seeded()).float()
    indices = power_law(131, 50)
    bags, mine = bags_of(indices), torch.arange(131)
    outputs, sums, largest, positions = [], [], [], []
    for shard, rows in zip(SHARDS, SHARD_ROWS, strict=True):
        part = weight[rows].clone()
        outputs.append(backend.embedding(part, indices, 21, record(), shard))
        sums.append(backend.embedding_bag(part, None, bags, 21, "sum", record(), shard))
        values, found = backend.embedding_bag_max(part, bags, 21, True, record(), shard)
        largest.append(torch.where(found < 0, -math.inf, values))
        positions.append(torch.where(found < 0, len(mine), found))
    assert torch.equal(sum(outputs), backend.embedding(weight, indices, 21, None))
    assert torch.equal(sum(sums), backend.embedding_bag(weight, None, bags, 21, "sum", None))
    values, elements = backend.embedding_bag_max(weight, bags, 21, True, None)
    wins = torch.stack(largest) == values
    first = torch.where(wins, torch.stack(positions), len(mine)).amin(0)
    expected = torch.cat([indices, torch.zeros(1, dtype=torch.int64)])[first] * columns
    expected += torch.arange(columns)
    assert torch.equal(torch.where(first == len(mine), -1, expected), elements)


@pytest.mark.parametrize("method", ["sorted", "atomic", "sorted_atomic"])
@pytest.mark.parametrize("card", BACKENDS)
def test_gradients_of_shards_put_together(card: str, method: str) -> None:
    backend = make_backend(card)
    indices = DISTRIBUTIONS["some bad"](600, 50)
    grad_output = torch.randint(-4, 5, (600, 4), generator=seeded()).float()
    with use_gradient_method(method):
        parts = [
            backend.embedding_dense_backward(
                grad_output, indices, rows.stop - rows.start, 21, False, None, shard
            )
            for shard, rows in zip(SHARDS, SHARD_ROWS, strict=True)
        ]
    assert torch.equal(torch.cat(parts), exact_gradient(grad_output, indices, 50, 21, False))


def test_a_whole_table_has_kernels_that_know_no_shard(sm_90: HostShimCupyBackend) -> None:
    indices = torch.arange(50)
    for shard in (None, Shard(0, 50)):
        for weight in (torch.ones(50, 6), torch.ones(50, 512)):
            sm_90.embedding(weight, indices, -1, None, shard)
        sm_90.embedding_bag(weight, None, bags_of(indices), -1, "mean", None, shard)
        sm_90.embedding_bag_max(weight, bags_of(indices), -1, False, None, shard)
    names = [kernel.expression for kernel in sm_90.launched if "join" not in kernel.expression]
    assert [name.endswith(", true>") for name in names] == [False] * 4 + [True] * 4
    assert [name.removesuffix("true>") for name in names[4:]] == [
        name.removesuffix("false>") for name in names[:4]
    ]


class TestIdsAtTheEnds:
    """64-bit addresses: an id less the first row wraps around, and names no row then either."""

    shard = Shard(2**62, 2**63 - 1)
    indices = torch.tensor(
        [2**62 + 2, -(2**63), 2**62, 2**63 - 1, 2**62 + 3, 2**62 - 1, 2**62 + 2, 2**62 - 2**63]
    )
    rows = torch.tensor([2, 9, 0, 9, 9, 9, 2, 9])
    weight = torch.arange(12.0).view(3, 4) + 1

    def test_lookup(self, backend: HostShimCupyBackend) -> None:
        found = record()
        output = backend.embedding(self.weight, self.indices, 2**62, found, self.shard)
        expected = backend.embedding(self.weight, self.rows, 0, None)
        assert torch.equal(output, expected)
        assert found.words[1:4].tolist() in [
            [n, int(self.indices[n]), 2**63 - 1] for n in (1, 3, 7)
        ]

    @pytest.mark.parametrize("method", ["sorted", "atomic", "sorted_atomic"])
    def test_gradient(self, backend: HostShimCupyBackend, method: str) -> None:
        grad_output = torch.arange(32.0).view(8, 4)
        with use_gradient_method(method):
            actual = backend.embedding_dense_backward(
                grad_output, self.indices, 3, 2**62, False, None, self.shard
            )
            expected = backend.embedding_dense_backward(grad_output, self.rows, 3, 0, False)
        assert torch.equal(actual, expected)

    def test_counts(self, backend: HostShimCupyBackend) -> None:
        assert backend.embedding_counts(self.indices, 3, self.shard).tolist() == [1, 0, 2]

    def test_bags(self, backend: HostShimCupyBackend) -> None:
        bags, near = (Bags(ids, None, 2) for ids in (self.indices, self.rows))
        for mode in ("sum", "mean"):
            actual = backend.embedding_bag(self.weight, None, bags, 2**62, mode, None, self.shard)
            assert torch.equal(
                actual, backend.embedding_bag(self.weight, None, near, 0, mode, None)
            )
        largest = backend.embedding_bag_max(self.weight, bags, 2**62, True, None, self.shard)
        assert torch.equal(largest[0], self.weight[[2, 2]])
        assert largest[1].tolist() == [[0] * 4, [6] * 4]
        grads = backend.embedding_bag_sample_weights_backward(
            self.weight[:2], self.weight, bags, 2**62, self.shard
        )
        assert torch.equal(
            grads,
            backend.embedding_bag_sample_weights_backward(self.weight[:2], self.weight, near, 0),
        )

    def test_renorm(self, backend: HostShimCupyBackend) -> None:
        whole, actual, expected = (self.weight.clone() for _ in range(3))
        backend.embedding_renorm_(whole, self.indices, 1.0, math.inf, self.shard)
        assert torch.equal(whole, self.weight)
        inside = (self.indices >= 0) & (self.indices < 2**63 - 1)
        backend.embedding_renorm_(actual, self.indices[inside], 1.0, math.inf, self.shard)
        backend.embedding_renorm_(expected, torch.tensor([2, 0]), 1.0, math.inf)
        assert torch.equal(actual, expected)
        assert not torch.equal(actual, self.weight)


@pytest.mark.parametrize("rows", [0, 1, 254, 255, 2**15, 2**16 - 2, 2**16 - 1])
@pytest.mark.parametrize("id_dtype", ID_DTYPES, ids=str)
def test_sort_keys_of_a_shard(sm_90: HostShimCupyBackend, rows: int, id_dtype: torch.dtype) -> None:
    """Behind the rows comes one sentinel of other shards' ids and padding, and one of ids out of range."""
    shard = Shard(100, 100 + rows + 20)
    indices = torch.tensor([101, -1, 100, 99, 0, 100 + rows - 1, 100 + rows, shard.num_embeddings])
    ids = indices.clamp(0, 255) if id_dtype == torch.uint8 else indices.clamp(max=2**15 - 1)
    ids = (indices if id_dtype.itemsize > 2 else ids).to(id_dtype)
    keys, order = sm_90._sorted_keys(ids, rows, 101, shard)
    local = shard.local(ids, rows, 101)
    expected = torch.where(local < 0, rows, local).sort(stable=True)
    assert keys.dtype == sort_key_dtype(rows + 1)
    assert torch.equal(rows_of_keys(keys), expected.values)
    assert torch.equal(order, expected.indices)


# Addresses past 2**31 elements. The tables are mapped but never filled, so they cost an address range alone.


@needs_mapping
class TestFarRows:
    """64-bit addresses: row times columns is computed in 64 bits before the first multiplication."""

    indices = torch.tensor([FAR_ROWS - 1, 3, FAR_ROWS - 2, FAR_ROWS - 1])

    @pytest.mark.parametrize("dtype", [torch.uint8, torch.float16, torch.float32], ids=str)
    def test_gather(self, sm_90: HostShimCupyBackend, dtype: torch.dtype) -> None:
        weight = mapped(FAR_ROWS, 8, dtype)
        weight[-2:] = torch.arange(16).view(2, 8).to(dtype)
        expected = torch.stack([weight[i] for i in self.indices.tolist()])
        assert torch.equal(sm_90.embedding(weight, self.indices, -1, None), expected)

    def test_take(self, sm_90: HostShimCupyBackend) -> None:
        weight = mapped(FAR_ROWS, 8, torch.float16)
        weight[-2:] = torch.arange(16).view(2, 8).half()
        expected = torch.stack([weight[i] for i in self.indices.tolist()]).float()
        for ids in (self.indices, self.indices - FAR_ROWS):
            assert torch.equal(sm_90.take_rows(weight, ids, torch.float32, None), expected)

    @pytest.mark.parametrize("bits", [8, 4])
    def test_dequantize(self, sm_90: HostShimCupyBackend, bits: int) -> None:
        """Of more than 2**31 scales and zeros too."""
        columns = 64 // bits
        values, zero = (mapped(FAR_ROWS, 8, torch.int8) for _ in range(2))
        scale = mapped(FAR_ROWS, 8, torch.float16)
        values[-1] = 0x11
        scale[-1], zero[-1] = 2.0, -3
        table = QuantizedTable(values, scale, zero, columns, columns // 8, bits)
        output = sm_90.dequantize_rows(table, self.indices, torch.float32, None)
        number = 0x11 if bits == 8 else 1
        assert output[0].eq(2.0 * (number + 3)).all()
        assert torch.equal(output[3], output[0])
        assert not output[1:3].any()

    @pytest.mark.parametrize("bits", [8, 4])
    def test_fused_rows(self, sm_90: HostShimCupyBackend, bits: int) -> None:
        layout = FusedRows(8, 8, bits)
        weight = mapped(FAR_ROWS, layout.row_bytes, torch.uint8)
        weight[-1] = quantize_rows(torch.arange(8.0)[None], layout)
        output = sm_90.dequantize_rows(
            fused_table(weight, layout), self.indices, torch.float32, None
        )
        assert torch.equal(output[0], dequantize(weight[-1], layout))
        assert output[0].any()
        assert torch.equal(output[3], output[0])
        assert not output[1:3].any()

    @pytest.mark.parametrize("method", ["sorted", "atomic", "sorted_atomic"])
    def test_gradient(
        self, sm_90: HostShimCupyBackend, method: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        grad_weight = mapped(FAR_ROWS, 8, torch.float32)
        monkeypatch.setattr(Tensor, "new_zeros", lambda *_: grad_weight)
        grad_output = torch.arange(32).view(4, 8).float()
        with use_gradient_method(method):
            sm_90.embedding_dense_backward(grad_output, self.indices, FAR_ROWS, -1, False)
        assert torch.equal(grad_weight[-1], grad_output[0] + grad_output[3])
        assert torch.equal(grad_weight[-2], grad_output[2])
        assert torch.equal(grad_weight[3], grad_output[1])

    def test_renorm(self, sm_90: HostShimCupyBackend) -> None:
        weight = mapped(FAR_ROWS, 8, torch.float32)
        weight[-1] = 3.0
        sm_90.embedding_renorm_(weight, self.indices, 1.5, math.inf)
        torch.testing.assert_close(weight[-1], torch.full((8,), 1.5))

    def test_counts(self, sm_90: HostShimCupyBackend, monkeypatch: pytest.MonkeyPatch) -> None:
        counts = mapped(2**31 + 8, 1, torch.int32).view(-1)
        monkeypatch.setattr(torch, "zeros", lambda *_, **__: counts)
        sm_90.embedding_counts(torch.tensor([2**31 + 7, 2**31 + 7]), 2**31 + 8)
        assert counts[-1] == 2


# The build itself.


def test_the_host_build_sees_a_misaligned_access(sm_90: HostShimCupyBackend) -> None:
    weight = shifted(torch.zeros(2, 4))
    indices = torch.zeros(1, dtype=torch.long)
    output = torch.zeros(1, 4)
    arguments = (weight, indices, output, None, None, 1, 2, 0, 0, -1, 1, 1, 1, 8)
    kernel = Kernel("gather", "gather_flat_kernel<word16, 4, false>")
    with pytest.raises(RuntimeError, match="misaligned"):
        sm_90._launch(kernel, (1, 1), (32, 1), weight.device, *arguments)


def test_the_host_build_knows_no_other_kernel(sm_90: HostShimCupyBackend) -> None:
    with pytest.raises(LookupError, match="no_kernel"):
        sm_90._launch(Kernel("counts", "no_kernel"), (1, 1), (1, 1), torch.device("cpu"))


def triton_parameters() -> dict[str, tuple[list[str], list[str]]]:
    """For each Triton kernel: its arguments, and its constants."""
    found = {}
    for path in sorted(KERNELS_DIR.glob("*.py")):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.FunctionDef) and node.name.endswith("_kernel"):
                # Those with a default are for the kernels that call this one.
                passed = node.args.args[: len(node.args.args) - len(node.args.defaults)]
                constants = [a.arg for a in passed if is_constant(a)]
                arguments = [a.arg for a in passed if not is_constant(a)]
                found[f"{path.stem}/{node.name}"] = (arguments, constants)
    return found


def is_constant(argument: ast.arg) -> bool:
    return argument.annotation is not None and ast.unparse(argument.annotation) == "tl.constexpr"


def cuda_parameters() -> dict[str, list[str]]:
    found = {}
    for path in sorted(KERNELS_DIR.glob("*.cu")):
        code = re.sub(r"//.*", "", path.read_text())
        for name, arguments in re.findall(r"__global__ void (\w+)\(([^{]*)\) \{", code):
            names = [re.findall(r"\w+", argument)[-1] for argument in arguments.split(",")]
            found[f"{path.stem}/{name}"] = names
    return found


def test_each_cuda_kernel_has_the_name_and_the_arguments_of_its_triton_twin() -> None:
    """Behind the shared arguments come Triton's constants, and the widths and ends that its launches know."""
    triton, cuda = triton_parameters(), cuda_parameters()
    assert triton
    assert triton.keys() == cuda.keys()
    for name, (arguments, constants) in triton.items():
        # A C++ loop over a range of its own needs no count from the host.
        arguments = [argument for argument in arguments if not argument.endswith("search_steps")]
        assert cuda[name][: len(arguments)] == arguments, name
        rest = [argument for argument in cuda[name][len(arguments) :] if argument not in constants]
        widths = {"index_bytes", "order_bytes", "key_bytes", "bag_bytes"}
        widths |= {"offset_bytes", "output_bag_bytes", "max_position_bytes", "index_kind"}
        assert set(rest) <= {*widths, "num_runs", "zero_padding"}, name
