"""The target ptx-cpu: the compiled code of our kernels gives the bits that are wanted, and notices a wrong launch.

The full tier runs the operations' own tests on it (PTX_FILES in tests/support/tiers.py).
"""

import pytest
import targets
import torch
from cases import integer_gradient, same_bits, table
from ptx_backend import CheckedPtxBackend

import gpu_embed
from gpu_embed import backends
from gpu_embed.bench.ptx.counts import counting
from gpu_embed.bench.ptx.parse import PtxError
from gpu_embed.functional import embedding, embedding_bag
from gpu_embed.ops.take import take_rows

if reason := targets.unusable_reason(targets.PTX):
    pytest.skip(reason, allow_module_level=True)
BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64


@pytest.fixture
def run_on(monkeypatch):
    """Serves the lookups that follow."""
    load = backends.load

    def serve(backend):
        monkeypatch.setattr(
            backends, "load", lambda name: backend if name == "triton" else load(name)
        )
        return backend

    with gpu_embed.use_backend("triton"):
        yield serve
    # What the error of a wrong launch has left behind.
    backends._selected.clear()


@pytest.fixture
def compiled(run_on):
    backend = run_on(CheckedPtxBackend())
    yield backend
    assert backend.launches


@pytest.mark.parametrize(
    ("shape", "dtype", "ids_dtype", "step"),
    [
        ((9, 50), FP32, torch.int64, 1),
        ((300, 64), BF16, torch.int32, 1),
        ((5, 33), FP16, torch.uint8, 1),
        ((7, 5), FP64, torch.int16, 2),
        ((4, 1), torch.int8, torch.int64, 3),
    ],
)
def test_rows_are_copied(compiled, shape, dtype, ids_dtype, step):
    rows, dim = shape
    weight = table(rows, dim * step, dtype, "cpu")[:, ::step]
    ids = torch.arange(70, dtype=ids_dtype) % rows
    assert same_bits(embedding(ids, weight), weight[ids.long()])


def test_an_id_out_of_range_is_recorded(compiled):
    weight, ids = table(9, 16, FP32, "cpu"), torch.arange(40) % 9
    ids[33] = 9
    with gpu_embed.set_bounds_check("sync"), pytest.raises(IndexError, match=r"9.*33"):
        embedding(ids, weight)


# 16-bit gradients are always sorted.
@pytest.mark.parametrize(
    ("method", "dtype"), [("atomic", FP32), ("atomic", FP64), ("sorted", FP32), ("sorted", BF16)]
)
def test_gradients_sum_exactly(compiled, method, dtype):
    weight = table(11, 20, dtype, "cpu").requires_grad_()
    ids = torch.arange(200) ** 2 % 11
    grad_output = integer_gradient((200, 20), dtype, "cpu")
    with gpu_embed.use_gradient_method(method):
        embedding(ids, weight, padding_idx=4).backward(grad_output)
    expected = torch.zeros(11, 20).index_add_(0, ids, grad_output.float())
    expected[4] = 0
    assert torch.equal(weight.grad, expected.to(dtype))


# Where a card is, Triton is imported without its interpreter.
@pytest.mark.skipif(targets.CUDA, reason="Triton compiles here")
@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
def test_bags_have_the_bits_of_the_interpreter(run_on, mode):
    ids, offsets = torch.arange(60) * 7 % 13, torch.tensor([0, 3, 3, 40])
    grad_output = integer_gradient((4, 24), FP32, "cpu")
    results = []
    for backend in (CheckedPtxBackend(), backends.load("triton")):
        run_on(backend)
        gpu_embed.use_backend("triton")
        weight = table(13, 24, FP32, "cpu").round().requires_grad_()
        output = embedding_bag(ids, weight, offsets, mode=mode)
        output.backward(grad_output)
        results.append((output, weight.grad))
    (output, gradient), expected = results
    assert same_bits(output, expected[0])
    assert torch.allclose(gradient, expected[1], rtol=2**-20, atol=2**-20)


def test_many_tables_are_looked_up_at_once(compiled):
    sizes = {"user": (5, 8), "item": (7, 4)}
    layer = gpu_embed.TableBatchedEmbeddingBag(sizes)
    ids, offsets = torch.tensor([0, 4, 2, 6, 1, 1]), torch.tensor([0, 2, 3, 5, 6])
    output = layer(ids, offsets)
    expected = [
        torch.nn.functional.embedding_bag(
            ids[first:last], layer[name], torch.tensor(starts), mode="sum"
        )
        for name, first, last, starts in (("user", 0, 3, [0, 2]), ("item", 3, 6, [0, 2]))
    ]
    assert torch.allclose(output, torch.cat(expected, 1), rtol=2**-20, atol=2**-20)


def test_rows_are_taken_and_converted(compiled):
    weight, ids = table(7, 6, FP32, "cpu"), torch.tensor([-1, 0, 3])
    assert same_bits(take_rows(weight, ids, BF16), weight[[6, 0, 3]].to(BF16))


def test_what_a_lookup_moves_is_counted(compiled):
    weight, ids = table(64, 64, FP32, "cpu"), torch.arange(64)
    with counting() as launches:
        embedding(ids, weight)
    (counts,) = launches
    assert counts.kernel.startswith("gather")
    assert counts.loads.distinct_sectors == (weight.nbytes + ids.nbytes) // 32
    assert counts.stores.distinct_sectors == counts.stores.sectors == weight.nbytes // 32
    assert 0 < counts.longest_warp <= counts.instructions // counts.num_warps


# A wrong launch of the gather.


class Changed(CheckedPtxBackend):
    """Compiles for what is asked, and launches something else."""

    def __init__(self, change):
        super().__init__()
        self._change = change

    def _run(self, binary, grid, arguments):
        super()._run(binary, *self._change(grid, arguments))


def with_argument(name, change):
    return lambda grid, arguments: (grid, {**arguments, name: change(arguments[name])})


def swapped(first, second):
    return lambda grid, arguments: (
        grid,
        {**arguments, first: arguments[second], second: arguments[first]},
    )


CHANGES = {
    "one program too few": lambda grid, arguments: ((grid[0] - 1, *grid[1:]), arguments),
    "one id too many": with_argument("num_indices", lambda n: n + 1),
    "a row too few": with_argument("num_embeddings", lambda n: n - 1),
    "a doubled stride": with_argument("weight_row_stride", lambda stride: 2 * stride),
    "swapped numbers": swapped("num_indices", "num_embeddings"),
    "swapped pointers": swapped("indices_ptr", "output_ptr"),
    # Compiled for addresses that are multiples of 16 bytes.
    "a wrong claim of alignment": with_argument(
        "weight_ptr", lambda words: words.tensor.view(-1)[1:]
    ),
}


def gather(run_on, change):
    weight, ids = table(300, 64, FP32, "cpu"), torch.arange(65) * 37 % 300
    ids[0] = 299
    run_on(Changed(change))
    gpu_embed.use_backend("triton")
    former = torch.are_deterministic_algorithms_enabled()
    # What no program writes is NaN.
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with gpu_embed.set_bounds_check("off"):
            return same_bits(embedding(ids, weight), weight[ids])
    finally:
        torch.use_deterministic_algorithms(former)


def test_a_launch_that_is_not_changed_is_right(run_on):
    assert gather(run_on, lambda grid, arguments: (grid, arguments))


@pytest.mark.parametrize("change", CHANGES)
def test_a_wrong_launch_is_noticed(run_on, change):
    try:
        right = gather(run_on, CHANGES[change])
    except PtxError:
        right = False
    assert not right
