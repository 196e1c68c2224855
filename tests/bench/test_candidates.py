"""Kernels that wait for a measurement: their results are as exact as those of the package's own."""

import dataclasses
from collections.abc import Iterator
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pytest
import targets
import torch
from cases import FORWARD_DTYPES, ID_DTYPES, ids, integer_gradient, same_bits, table
from targets import Target
from torch._subclasses.fake_tensor import FakeTensorMode

pytest.importorskip("triton")

import gpu_embed
from gpu_embed import backends
from gpu_embed.backends._triton.device import TritonDevice
from gpu_embed.bench import measure, timing
from gpu_embed.bench.candidates import launch as candidates
from gpu_embed.bench.providers import PROVIDERS
from gpu_embed.bench.shapes import Cell
from gpu_embed.bounds import BoundsRecord


class Where(NamedTuple):
    """What launches, and where its tensors go."""

    triton: TritonDevice
    device: str


@pytest.fixture(params=targets.params(*(t for t in targets.COLLECTED if t.backend == "triton")))
def where(request: pytest.FixtureRequest) -> Iterator[Where]:
    chosen: Target = request.param
    targets.require(chosen)
    with gpu_embed.use_backend("triton"):
        yield Where(backends.load("triton"), chosen.device)


@pytest.fixture
def descriptors(where: Where) -> Where:
    on_cuda = where.device == "cuda"
    if on_cuda and torch.cuda.get_device_capability() < candidates.DESCRIPTOR_CAPABILITY:
        pytest.skip("tensor descriptors need compute capability 9.0")
    return where


def expected_gradient(grad_output, indices, num_embeddings, padding_idx=-1):
    """Exact sums in fp64, rounded once."""
    flat, rows = indices.long().reshape(-1), grad_output.double().flatten(0, -2)
    kept = (flat >= 0) & (flat < num_embeddings) & (flat != padding_idx)
    total = rows.new_zeros(num_embeddings, rows.shape[1]).index_add_(0, flat[kept], rows[kept])
    return total.to(grad_output.dtype)


# Lookups through tensor descriptors.


@pytest.mark.parametrize("dtype", FORWARD_DTYPES, ids=str)
def test_descriptors_copy_every_dtype_bit_for_bit(descriptors, dtype):
    triton, device = descriptors
    weight = table(9, 16, dtype, device)
    indices = torch.tensor([[8, 0, 3], [3, 3, 7]], device=device)
    in_bytes = weight.view(torch.uint8).unflatten(1, (16, -1))
    output = candidates.gather(triton, weight, indices, -1, None)
    assert same_bits(output, in_bytes[indices].flatten(-2).view(dtype))


# One word of 16 bytes, a ragged last block, one block, a row longer than a program copies.
@pytest.mark.parametrize("embedding_dim", [4, 12, 128, 300, 4100])
@pytest.mark.parametrize("shape", [(), (0,), (1,), (3, 5), (16,), (33,)], ids=str)
def test_descriptors_copy_rows_of_every_width(descriptors, embedding_dim, shape):
    triton, device = descriptors
    weight = table(5, embedding_dim, torch.float32, device)
    indices = torch.randint(5, shape, generator=torch.Generator().manual_seed(0)).to(device)
    assert same_bits(candidates.gather(triton, weight, indices, -1, None), weight[indices])


@pytest.mark.parametrize("dtype", ID_DTYPES, ids=str)
def test_descriptors_take_every_id_dtype(descriptors, dtype):
    triton, device = descriptors
    weight = table(300, 4, torch.float32, device)
    indices = torch.tensor([0, 1, 127, 200 if dtype == torch.uint8 else 99], device=device)
    output = candidates.gather(triton, weight, indices.to(dtype), -1, None)
    assert same_bits(output, weight[indices])


def test_ids_out_of_range_and_zeroed_ones_read_as_zeros(descriptors):
    triton, device = descriptors
    weight = table(5, 8, torch.float32, device)
    indices = torch.tensor([4, 1, 5, -1, 2**40, 0], device=device)
    record = BoundsRecord(torch.device(device))
    output = candidates.gather(triton, weight, indices, 1, record)
    assert same_bits(output[[0, 5]], weight[[4, 0]])
    assert not output[1:5].any()
    if device == "cuda":
        torch.cuda.synchronize()
    with pytest.raises(IndexError, match="index out of range in self"):
        record.raise_if_claimed()


def test_descriptors_read_part_of_a_table(descriptors):
    triton, device = descriptors
    weight = table(20, 96, torch.float32, device)[1:18:2, 32:64]
    indices = ids("zipf", 40, len(weight), device)
    assert same_bits(candidates.gather(triton, weight, indices, -1, None), weight[indices])


REFUSED_TABLES = {
    "12 bytes a row": lambda device: torch.zeros(5, 3, device=device),
    "transposed": lambda device: torch.zeros(8, 5, device=device).t(),
    "expanded": lambda device: torch.zeros(1, 8, device=device).expand(5, 8),
    "off by one item": lambda device: torch.zeros(41, device=device)[1:].view(5, 8),
}


@pytest.mark.parametrize("make", REFUSED_TABLES.values(), ids=REFUSED_TABLES)
def test_descriptors_refuse_rows_that_are_not_aligned_and_apart(descriptors, make):
    triton, device = descriptors
    with pytest.raises(ValueError, match=r"^rows of \d x torch.float32 at strides .* 16 bytes"):
        candidates.gather(triton, make(device), torch.tensor([1], device=device), -1, None)


@pytest.mark.parametrize(("rows", "num_indices", "what"), [(2**31, 1, "rows"), (1, 2**31, "ids")])
def test_descriptors_refuse_what_no_coordinate_reaches(rows, num_indices, what):
    weight = torch.empty(rows, 4, device="meta")
    refusal = candidates.descriptor_refusal(weight, num_indices)
    assert refusal == f"{2**31} {what}; it takes {2**31 - 1}"


def test_descriptors_refuse_older_cards(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    with FakeTensorMode():
        weight = torch.empty(5, 4, device="cuda")
    assert candidates.descriptor_refusal(weight, 1) == "compute capability 8.6; it needs 9.0"


# Gradients.


# (V, D, N): one row, a hot table, ragged rows, columns beyond a block.
SHAPES = [(1, 4, 1), (7, 8, 100), (3, 12, 75), (300, 52, 20), (2, 300, 40)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", ["equal", "zipf"])
def test_bulk_additions_sum_exactly(descriptors, shape, kind):
    triton, device = descriptors
    num_embeddings, embedding_dim, num_indices = shape
    indices = ids(kind, num_indices, num_embeddings, device)
    grad_output = integer_gradient((num_indices, embedding_dim), torch.float32, device)
    for view in (grad_output, grad_output[:1].expand_as(grad_output), grad_output.flip(1)):
        actual = candidates.scatter_add(triton, view, indices, num_embeddings, -1)
        assert torch.equal(actual, expected_gradient(view, indices, num_embeddings))


@pytest.mark.parametrize("num_embeddings", [1, 16, 17, 33, 65, 129, 255, 256])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_one_hot_products_sum_exactly(where, num_embeddings, dtype):
    """Tables of every number of tiles, and more ids than one split takes."""
    triton, device = where
    indices = ids("uniform", 2500, num_embeddings, device)
    grad_output = integer_gradient((2500, 19), dtype, device)
    actual = candidates.one_hot(triton, grad_output, indices, num_embeddings, 0)
    assert torch.equal(actual, expected_gradient(grad_output, indices, num_embeddings, 0))


GRADIENTS = pytest.mark.parametrize(
    ("gradient", "dtype"),
    [(candidates.scatter_add, torch.float32), (candidates.one_hot, torch.bfloat16)],
    ids=["descriptor", "one_hot"],
)


@GRADIENTS
@pytest.mark.parametrize("index_dtype", ID_DTYPES, ids=str)
def test_gradients_skip_padding_and_ids_out_of_range(descriptors, gradient, dtype, index_dtype):
    triton, device = descriptors
    indices = torch.tensor([[3, 0, 3], [99, 5, 1]], device=device).to(index_dtype)
    grad_output = integer_gradient((2, 3, 8), dtype, device)
    grad_output[1, 0] = float("nan")  # of id 99, and so not read
    for view in (grad_output, grad_output.mT.contiguous().mT):
        actual = gradient(triton, view, indices, 5, 3)
        assert torch.equal(actual, expected_gradient(view, indices, 5, 3))


@GRADIENTS
@pytest.mark.parametrize(("num_embeddings", "shape"), [(3, (0, 4)), (3, (2, 0)), (0, (2, 4))])
def test_gradients_without_numbers(descriptors, gradient, dtype, num_embeddings, shape):
    triton, device = descriptors
    grad_output = torch.ones(shape, dtype=dtype, device=device)
    indices = torch.zeros(shape[:1], dtype=torch.int64, device=device)
    actual = gradient(triton, grad_output, indices, num_embeddings, -1)
    assert actual.tolist() == [[0.0] * shape[1]] * num_embeddings


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_one_hot_sums_are_fp32_and_rounded_once(where, dtype):
    """In bf16 ones would stop adding up at 256; 1 + eps/2 + eps/2 is 1 + eps, which two roundings lose."""
    triton, device = where
    indices = torch.full((4096,), 1, device=device)
    ones = torch.ones(4096, 2, dtype=dtype, device=device)
    actual = candidates.one_hot(triton, ones, indices, 3, -1)
    assert actual.tolist() == [[0, 0], [4096, 4096], [0, 0]]
    eps = torch.finfo(dtype).eps
    grad_output = torch.tensor([[1.0], [eps / 2], [eps / 2]], dtype=dtype, device=device)
    indices = torch.zeros(3, dtype=torch.int64, device=device)
    assert candidates.one_hot(triton, grad_output, indices, 1, -1).item() == 1 + eps


def test_one_hot_products_repeat_bit_for_bit(where):
    """More splits than one, summed in one order."""
    triton, device = where
    grad_output = torch.randn(600, 3, generator=torch.Generator().manual_seed(5))
    grad_output = grad_output.bfloat16().to(device)
    indices = ids("zipf", 600, 20, device)
    runs = [candidates.one_hot(triton, grad_output, indices, 20, -1) for _ in range(3)]
    assert all(same_bits(run, runs[0]) for run in runs)


@pytest.mark.filterwarnings("ignore:invalid value encountered in matmul")
def test_one_hot_products_spread_what_is_not_finite(where):
    """What keeps them out of the package."""
    triton, device = where
    grad_output = torch.ones(3, 2, dtype=torch.bfloat16, device=device)
    grad_output[0, 0] = float("inf")
    indices = torch.tensor([0, 1, 1], device=device)
    actual = candidates.one_hot(triton, grad_output, indices, 3, -1)
    assert actual[0, 0] == float("inf")
    assert actual[1:, 0].isnan().all()
    assert actual[:, 1].tolist() == [1, 2, 0]


def test_gradients_refuse_what_they_cannot_serve(descriptors):
    triton, device = descriptors
    indices = torch.tensor([1], device=device)

    def refusal(gradient, dtype, shape):
        grad_output = torch.ones(1, shape[1], dtype=dtype, device=device)
        with pytest.raises(ValueError) as raised:
            gradient(triton, grad_output, indices, shape[0], -1)
        return str(raised.value)

    scatter_add, one_hot = candidates.scatter_add, candidates.one_hot
    assert refusal(scatter_add, torch.float64, (4, 4)) == "no bulk additions to torch.float64"
    assert refusal(scatter_add, torch.float32, (4, 3)).startswith("rows of 3 x torch.float32")
    assert refusal(one_hot, torch.float32, (4, 4)) == "its tables are not float32"
    assert refusal(one_hot, torch.bfloat16, (257, 4)) == "its tables have 256 rows at most"


# As providers of the benchmark.


@pytest.mark.parametrize(
    ("name", "mode"),
    [
        (f"gpu_embed-{name}", mode)
        for name in ("gather-descriptor", "descriptor", "one-hot")
        for mode in PROVIDERS[f"gpu_embed-{name}"].modes
    ],
)
def test_candidates_pass_the_gate_and_are_timed(descriptors, name, mode, monkeypatch):
    monkeypatch.setattr(timing, "flush", lambda device: None)
    dtype = "bfloat16" if name == "gpu_embed-one-hot" else "float32"
    cell = Cell(50, 8, 40, dtype, "int32", padding=0.3)
    effort = timing.Effort(seconds=0.002, min_samples=3, max_samples=4, host_seconds=0.002)
    facts = {"device": "one", "torch": "2", "triton": "3", "commit": "abc"}
    bench = measure.Bench(torch.device(descriptors.device), 10.0, facts, 2**30, effort=effort)
    provider = dataclasses.replace(PROVIDERS[name], cpu=True)
    assert provider.missing_reason(bench.device) is None
    row = bench.measure(bench.problem(cell), provider, mode, bench.row("A", cell, mode, name))
    assert row.status == "ok", row
    assert row.ms_p50 > 0


@pytest.mark.parametrize("check", ["raise", "sync", "off"])
def test_a_candidate_records_ids_out_of_range_as_the_package_does(descriptors, check):
    weight = torch.nn.Parameter(table(5, 4, torch.float32, descriptors.device))
    layer = PROVIDERS["gpu_embed-gather-descriptor"].build(weight, Cell(5, 4, 1), "forward")
    indices = torch.tensor([7], device=descriptors.device)

    def look_up():
        rows = layer.lookup(indices)
        gpu_embed.check_bounds()
        return rows

    with gpu_embed.set_bounds_check(check):
        if check == "off":
            assert not look_up().any()
            return
        with pytest.raises(IndexError, match="id 7"):
            look_up()


# What is added to Triton's interpreter.


@pytest.fixture
def interpreter():
    triton = pytest.importorskip("triton")
    if not triton.knobs.runtime.interpret:
        pytest.skip("the interpreter is off")
    from triton.runtime import interpreter

    return interpreter


def handle(values, dtype):
    from triton.runtime import interpreter

    return interpreter.TensorHandle(np.array(values, interpreter._get_np_dtype(dtype)), dtype)


@pytest.mark.parametrize(
    ("dtype", "stride", "fits"),
    [("float32", 4, True), ("float32", 6, False), ("bfloat16", 8, True), ("bfloat16", 4, False)],
)
def test_strides_of_descriptors_are_multiples_of_16_bytes(
    interpreter, dtype, stride, fits, monkeypatch
):
    """Below Triton 3.6 they had to be of 16 elements."""
    from triton import language as tl

    from gpu_embed.bench.candidates import interpreter as ours

    def validate_as_below_3_6(self):
        assert all(stride.data.item() % 16 == 0 for stride in self.strides[:-1])
        assert self.strides[-1].data.item() == 1

    monkeypatch.setattr(interpreter.TensorDescHandle, "validate", validate_as_below_3_6)
    ours.check_strides_in_bytes()
    descriptor = object.__new__(interpreter.TensorDescHandle)
    descriptor.base = handle([0], tl.pointer_type(getattr(tl, dtype)))
    strides = descriptor.strides = [handle(stride, tl.int64), handle(1, tl.int64)]
    if fits:
        descriptor.validate()
    else:
        with pytest.raises(AssertionError):
            descriptor.validate()
    assert descriptor.strides is strides
    assert strides[0].data.item() == stride


@pytest.mark.parametrize("typed", [False, True], ids=["array", "handle"])
def test_descriptors_say_what_is_inside_in_either_way(interpreter, typed, monkeypatch):
    """An array below Triton 3.9, a handle from there on."""
    from triton import language as tl

    from gpu_embed.bench.candidates import interpreter as ours

    ours.complete()
    inside = np.array([True, False])
    masks = handle(inside, tl.int1) if typed else inside
    descriptor = SimpleNamespace(materialize_pointers=lambda offsets: ("pointers", masks))
    passed = []
    monkeypatch.setattr(
        interpreter.InterpreterBuilder,
        "create_atomic_rmw",
        lambda self, kind, pointers, value, mask, *order: passed.append(mask),
    )
    interpreter.interpreter_builder.create_descriptor_reduce(
        interpreter._ir.DESCRIPTOR_REDUCE_KIND.ADD, descriptor, handle([1.0, 2.0], tl.float32), []
    )
    (mask,) = passed
    assert mask.dtype == tl.int1
    assert np.array_equal(mask.data, inside)
    assert isinstance(mask.data, np.ndarray)
