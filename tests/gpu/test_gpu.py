"""What only a GPU can show: huge tensors, CUDA graphs, streams, host syncs, memory, contention, late errors.

The other files run their cases on CUDA too, through the `target` fixture.
"""

import re
import time
from collections.abc import Callable, Iterator

import pytest
import torch
from cases import ID_DTYPES, ids, same_bits, table
from gpu_cases import DEVICE, captured, forced, integers, no_host_sync, random_ids, require
from tiers import where
from torch import Tensor

import gpu_embed
from gpu_embed import Embedding, backends, bounds, optim
from gpu_embed.bags import Bags
from gpu_embed.functional import embedding, embedding_bag
from gpu_embed.shard import Shard

pytestmark = pytest.mark.gpu

# Every kernel that can compute a gradient of each dtype, whatever the shape and the backend.
METHODS = [
    pytest.param(dtype, method, id=f"{dtype}-{method}".removeprefix("torch."))
    for dtype, method in (
        (torch.float32, "atomic"),
        (torch.float32, "sorted"),
        (torch.float32, "sorted_atomic"),
        (torch.float64, "atomic"),
        (torch.float64, "sorted"),
        (torch.float64, "sorted_atomic"),
        (torch.bfloat16, "sorted"),
        (torch.float16, "sorted"),
    )
]
every_method = pytest.mark.parametrize(("dtype", "method"), METHODS)
ARGUMENTS = {
    "plain": {},
    "padding_idx": {"padding_idx": 3},
    "scale_grad_by_freq": {"scale_grad_by_freq": True},
    "max_norm": {"max_norm": 2.0},
    "all": {"padding_idx": -1, "scale_grad_by_freq": True, "max_norm": 2.0, "norm_type": 3.0},
}


@pytest.fixture(params=["triton", "cupy"])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each backend with kernels of our own, forced; no error of an earlier lookup may be left over."""
    yield from forced(request.param)


@pytest.fixture
def triton() -> Iterator[str]:
    """For what does not depend on whose kernels run."""
    yield from forced("triton")


def gradient(
    indices: Tensor, num_embeddings: int, grad_output: Tensor, **arguments: object
) -> Tensor:
    """The table's gradient after one lookup."""
    shape = (num_embeddings, grad_output.shape[-1])
    weight = torch.zeros(shape, dtype=grad_output.dtype, device=DEVICE, requires_grad=True)
    embedding(indices, weight, **arguments).backward(grad_output)
    assert weight.grad is not None
    return weight.grad


def exact_gradient(indices: Tensor, num_embeddings: int, grad_output: Tensor) -> Tensor:
    """The same in fp64, by torch's own operator: exact for small integers, in any order."""
    total = torch.zeros(num_embeddings, grad_output.shape[-1], dtype=torch.float64, device=DEVICE)
    return total.index_add_(0, indices.long(), grad_output.double())


# Past 2**31 elements. The kernels count in words of up to 8 bytes, so the words are what must be so many.


@pytest.mark.large
@pytest.mark.parametrize(
    ("num_embeddings", "embedding_dim", "dtype"),
    [(19_345_706, 128, torch.float64), (70_000_001, 33, torch.uint8)],
    ids=["whole rows of 8-byte words", "odd rows of bytes"],
)
def test_rows_past_2_31_words_are_read(backend, num_embeddings, embedding_dim, dtype):
    """64-bit addresses: 64-bit addresses of the table's rows."""
    assert num_embeddings * embedding_dim > 2**31
    weight = torch.zeros(num_embeddings, embedding_dim, dtype=dtype, device=DEVICE)
    rows, values = distinct_rows(num_embeddings, embedding_dim)
    for row, value in zip(rows.tolist(), values, strict=True):
        weight[row] = value
    choice = random_ids(3073, len(rows))
    output = embedding(rows[choice], weight)
    assert torch.equal(output, values.to(dtype)[choice])


def distinct_rows(num_embeddings: int, embedding_dim: int) -> tuple[Tensor, Tensor]:
    """Ids at both ends of the table and at its element 2**31, and small values for their rows."""
    middle = 2**31 // embedding_dim
    rows = [0, 1, middle - 1, middle, middle + 1, num_embeddings - 2, num_embeddings - 1]
    values = torch.arange(len(rows) * embedding_dim, device=DEVICE).view(len(rows), -1) % 251
    return torch.tensor(rows, device=DEVICE), values


@pytest.mark.large
@pytest.mark.parametrize(
    ("dtype", "method"),
    [(torch.float32, "atomic"), (torch.float32, "sorted"), (torch.bfloat16, "sorted")],
    ids=str,
)
def test_gradient_rows_past_2_31_elements_are_written(backend, dtype, method):
    """64-bit addresses: 64-bit addresses of the gradient's rows."""
    num_embeddings, embedding_dim = 19_345_706, 128
    rows, _ = distinct_rows(num_embeddings, embedding_dim)
    choice = random_ids(300, len(rows))
    grad_output = integers(300, embedding_dim, dtype=dtype)
    with gpu_embed.use_gradient_method(method):
        grad_weight = torch.ops.gpu_embed.embedding_dense_backward(
            grad_output, rows[choice], num_embeddings, -1, False
        )
    expected = exact_gradient(choice, len(rows), grad_output)
    for row, total in zip(rows.tolist(), expected, strict=True):
        assert torch.equal(grad_weight[row], total.to(dtype)), row
    # Every gradient is in one of those rows, and nowhere else.
    total = expected.to(dtype).abs().sum(dtype=torch.float64)
    assert grad_weight.abs().sum(dtype=torch.float64) == total


@pytest.mark.large
@pytest.mark.parametrize(
    ("num_indices", "embedding_dim", "dtype"),
    [(524_289, 4096, torch.float64), (524_545, 4095, torch.uint8)],
    ids=["whole rows of 8-byte words", "odd rows of bytes"],
)
def test_outputs_past_2_31_words_are_written(backend, num_indices, embedding_dim, dtype):
    """64-bit addresses: 64-bit addresses of the output's rows."""
    assert num_indices * embedding_dim > 2**31
    weight = torch.randint(251, (100, embedding_dim), device=DEVICE).to(dtype)
    indices = random_ids(num_indices, 100)
    output = embedding(indices, weight)
    for start in range(0, num_indices, 2**15):
        part = slice(start, start + 2**15)
        assert torch.equal(output[part], weight[indices[part]]), start


@pytest.mark.large
@pytest.mark.parametrize(
    ("dtype", "method"),
    [(torch.float32, "atomic"), (torch.float32, "sorted"), (torch.bfloat16, "sorted")],
    ids=str,
)
def test_gradients_past_2_31_elements_are_read(backend, dtype, method):
    """64-bit addresses: 64-bit addresses of grad_output's rows."""
    num_indices, embedding_dim, num_embeddings = 524_289, 4096, 1000
    assert num_indices * embedding_dim > 2**31
    per_row = integers(num_indices, 1, dtype=dtype)
    per_column = 1 + torch.arange(embedding_dim, device=DEVICE) % 2
    indices = random_ids(num_indices, num_embeddings)
    with gpu_embed.use_gradient_method(method):
        actual = torch.ops.gpu_embed.embedding_dense_backward(
            per_row * per_column.to(dtype), indices, num_embeddings, -1, False
        )
    expected = exact_gradient(indices, num_embeddings, per_row) * per_column
    assert torch.equal(actual, expected.to(dtype))


@pytest.mark.large
def test_more_than_2_31_ids_are_looked_up(backend):
    """64-bit addresses: 64-bit positions."""
    num_indices = 2**31 + 16
    weight = torch.randperm(256, device=DEVICE).to(torch.uint8)[:, None]
    indices = torch.randint(256, (num_indices,), dtype=torch.uint8, device=DEVICE)
    output = embedding(indices, weight)[:, 0]
    for start in range(0, num_indices, 2**27):
        part = slice(start, start + 2**27)
        assert torch.equal(output[part], weight[:, 0][indices[part].int()]), start


@pytest.mark.large
@pytest.mark.parametrize("method", ["atomic", "sorted"])
def test_more_than_2_31_ids_are_summed(backend, method):
    """64-bit addresses: 64-bit positions."""
    if method == "sorted" and torch.cuda.mem_get_info()[0] < 70 * 2**30:
        pytest.skip("needs 70 GiB of GPU memory")
    num_indices, num_embeddings = 2**31 + 16, 1_000_000
    indices = torch.randint(num_embeddings, (num_indices,), dtype=torch.int32, device=DEVICE)
    ones = torch.ones(num_indices, 1, device=DEVICE)
    with gpu_embed.use_gradient_method(method):
        grad_weight = torch.ops.gpu_embed.embedding_dense_backward(
            ones, indices, num_embeddings, -1, False
        )
    expected = sum(torch.bincount(part, minlength=num_embeddings) for part in indices.split(2**27))
    assert torch.equal(grad_weight[:, 0], expected.float())


# CUDA graphs.


@every_method
@pytest.mark.parametrize("num_indices", [3073, 1_000_000, 4_000_000])
def test_cuda_graphs_replay_forward_and_backward(backend, dtype, method, num_indices):
    """No host sync: one capture serves ids and gradients that change, at any number of ids."""
    num_embeddings, embedding_dim = 50_000, 64
    weight = table(num_embeddings, embedding_dim, dtype, DEVICE).requires_grad_()
    indices = random_ids(num_indices, num_embeddings)
    grad_output = integers(num_indices, embedding_dim, dtype=dtype)

    def step() -> tuple[Tensor, Tensor]:
        output = embedding(indices, weight)
        return output, *torch.autograd.grad(output, weight, grad_output)

    with gpu_embed.use_gradient_method(method):
        graph, (output, grad_weight) = captured(step)
        for seed in (1, 2):
            indices.copy_(random_ids(num_indices, num_embeddings, seed))
            grad_output.copy_(integers(num_indices, embedding_dim, dtype=dtype, seed=seed))
            graph.replay()
            assert same_bits(output, weight.detach()[indices])
            expected = exact_gradient(indices, num_embeddings, grad_output)
            assert torch.equal(grad_weight, expected.to(dtype))
            assert torch.equal(grad_weight, step()[1])


@pytest.mark.parametrize("arguments", ARGUMENTS.values(), ids=ARGUMENTS)
def test_cuda_graphs_take_every_argument(backend, arguments):
    """No host sync: nothing on the dense path depends on the data."""
    first = table(500, 33, torch.float32, DEVICE)
    weight = first.clone().requires_grad_()
    indices = random_ids(3073, 500)
    grad_output = integers(3073, 33)

    def step() -> tuple[Tensor, Tensor]:
        output = embedding(indices, weight, **arguments)
        return output, *torch.autograd.grad(output, weight, grad_output)

    graph, results = captured(step)
    with torch.no_grad():
        weight.copy_(first)
    indices.copy_(random_ids(3073, 500, seed=1))
    graph.replay()
    replayed = [result.clone() for result in (*results, weight.detach())]
    with torch.no_grad():
        weight.copy_(first)
    eager = (*step(), weight.detach())
    assert all(torch.equal(a, b) for a, b in zip(replayed, eager, strict=True))


def test_replayed_lookups_report_bad_ids(backend):
    """No host sync and bounds: the captured kernel writes the record; a later replay is right again."""
    weight = table(50, 8, torch.float32, DEVICE)
    indices = random_ids(100, 50)
    graph, (output,) = captured(lambda: (embedding(indices, weight),))
    good = indices.clone()
    indices[7] = 50
    graph.replay()
    with pytest.raises(IndexError, match=r"id 50 at flat position 7 .* has 50 rows"):
        gpu_embed.check_bounds()
    assert output[7].eq(0).all()
    indices.copy_(good)
    graph.replay()
    gpu_embed.check_bounds()
    assert same_bits(output, weight[good])


# Streams and devices.

# Cycles that make the GPU sleep for a few tenths of a second.
SLEEP = 400_000_000


@every_method
def test_forward_on_a_side_stream_and_backward_on_the_default(backend, dtype, method):
    """The kernels run on the caller's stream: what that stream writes first, they read."""
    weight = torch.zeros(1000, 48, dtype=dtype, device=DEVICE, requires_grad=True)
    indices = torch.zeros(3073, dtype=torch.int64, device=DEVICE)
    expected, expected_ids = table(1000, 48, dtype, DEVICE), random_ids(3073, 1000)
    grad_output = integers(3073, 48, dtype=dtype)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with gpu_embed.use_gradient_method(method):
        with torch.cuda.stream(side):
            torch.cuda._sleep(SLEEP)
            with torch.no_grad():
                weight.copy_(expected)
            indices.copy_(expected_ids)
            output = embedding(indices, weight)
        torch.cuda.current_stream().wait_stream(side)
        output.backward(grad_output)
    assert same_bits(output.detach(), expected[expected_ids])
    exact = exact_gradient(expected_ids, 1000, grad_output)
    assert torch.equal(weight.grad, exact.to(dtype))


def test_two_streams_at_once(backend):
    """Nothing but the bounds record is shared between calls."""
    streams = [torch.cuda.Stream() for _ in range(2)]
    weights = [table(rows, 64, torch.float32, DEVICE).requires_grad_() for rows in (300, 700)]
    for stream in streams:
        stream.wait_stream(torch.cuda.current_stream())
    seen: list[list[tuple[Tensor, Tensor, Tensor, Tensor]]] = [[], []]
    for method in ("atomic", "sorted"):
        with gpu_embed.use_gradient_method(method):
            for seed in range(20):
                for stream, weight, results in zip(streams, weights, seen, strict=True):
                    with torch.cuda.stream(stream):
                        indices = random_ids(3073, len(weight), seed)
                        grad_output = integers(3073, 64, seed=seed)
                        output = embedding(indices, weight)
                        (grad,) = torch.autograd.grad(output, weight, grad_output)
                        results.append((indices, grad_output, output.detach(), grad))
    torch.cuda.synchronize()
    for weight, results in zip(weights, seen, strict=True):
        for indices, grad_output, output, grad in results:
            assert same_bits(output, weight.detach()[indices])
            assert torch.equal(grad, exact_gradient(indices, len(weight), grad_output).float())


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU at most")
@every_method
def test_tensors_on_a_device_that_is_not_current(backend, dtype, method):
    device = torch.device("cuda", 1)
    weight = table(100, 48, dtype, device).requires_grad_()
    indices = ids("uniform", 300, 100).to(device)
    grad_output = torch.ones(300, 48, dtype=dtype, device=device)
    assert torch.cuda.current_device() == 0
    with gpu_embed.use_gradient_method(method):
        output = embedding(indices, weight, max_norm=1e6)
        output.backward(grad_output)
    assert torch.cuda.current_device() == 0
    assert same_bits(output.detach(), weight.detach()[indices])
    assert torch.equal(weight.grad[:, 0], torch.bincount(indices, minlength=100).to(dtype))
    embedding(torch.tensor([100], device=device), weight)
    gpu_embed.check_bounds(0)
    with pytest.raises(IndexError, match="id 100"):
        gpu_embed.check_bounds(1)


# No host syncs.


def test_the_guard_against_syncs_works():
    with pytest.raises(RuntimeError, match="synchroniz"), no_host_sync():
        torch.ones(1, device=DEVICE).item()


# Atomics do not divide by the counts.
@where(lambda method, arguments: method != "atomic" or not arguments.get("scale_grad_by_freq"))
@every_method
@pytest.mark.parametrize("arguments", ARGUMENTS.values(), ids=ARGUMENTS)
def test_no_host_sync(backend, dtype, method, arguments):
    """No host sync: forward, backward and double backward are all queued while the GPU is still busy."""
    weight = table(500, 48, dtype, DEVICE).requires_grad_()
    indices = random_ids(3073, 500)
    grad_output = integers(3073, 48, dtype=dtype).requires_grad_()

    def step() -> None:
        output = embedding(indices, weight, **arguments)
        (grad,) = torch.autograd.grad(output, weight, grad_output, create_graph=True)
        torch.autograd.grad(grad, grad_output, torch.ones_like(grad))

    with gpu_embed.use_gradient_method(method):
        step()
        with no_host_sync():
            torch.cuda._sleep(SLEEP)
            woken = torch.cuda.Event()
            woken.record()
            step()
            # Syncs outside of torch, as in CuPy's launch, would show here.
            assert not woken.query()


@pytest.mark.parametrize("padding_idx", [None, 3])
def test_no_host_sync_for_sparse_gradients(backend, padding_idx):
    """No host sync: even the sparse gradient does not wait."""
    weight = table(500, 48, torch.float32, DEVICE).requires_grad_()
    indices = random_ids(3073, 500)
    embedding(indices, weight, padding_idx, sparse=True).sum().backward()
    weight.grad = None
    with no_host_sync():
        embedding(indices, weight, padding_idx, sparse=True).sum().backward()
    assert weight.grad.is_sparse


# Out-of-range ids.


def bad_lookup() -> tuple[Tensor, Tensor, Tensor]:
    """A lookup with one bad id, finished on the GPU but not reported: weight, indices, output."""
    weight = table(50, 8, torch.float32, DEVICE).requires_grad_()
    indices = torch.tensor([[3, 49, 1], [2, 50, 0]], device=DEVICE)
    output = embedding(indices, weight)
    torch.cuda.synchronize()
    return weight, indices, output


MESSAGE = "index out of range in self: id 50 at flat position 4 of the input; .* has 50 rows"


def test_the_backward_of_a_bad_lookup_raises(backend):
    """Bounds, mode "raise": the first point after the lookup that needs no stall."""
    weight, _, output = bad_lookup()
    with pytest.raises(IndexError, match=MESSAGE):
        output.sum().backward()
    assert weight.grad is None


def test_the_next_call_on_the_device_raises(backend):
    """Bounds, mode "raise"."""
    bad_lookup()
    with pytest.raises(IndexError, match=MESSAGE):
        embedding(random_ids(5, 7), table(7, 2, torch.float32, DEVICE))


def test_check_bounds_raises(backend):
    """Bounds, mode "raise"."""
    bad_lookup()
    with pytest.raises(IndexError, match=MESSAGE):
        gpu_embed.check_bounds(DEVICE)


def test_sync_raises_at_the_call(backend):
    """Bounds, mode "sync": there the ids' shape is known."""
    with (
        gpu_embed.set_bounds_check("sync"),
        pytest.raises(IndexError, match=r"id 50 at position \(1, 1\) of the input"),
    ):
        bad_lookup()


def test_off_records_nothing(backend):
    """Bounds, mode "off"."""
    with gpu_embed.set_bounds_check("off"):
        weight, indices, output = bad_lookup()
        output.sum().backward()
    gpu_embed.check_bounds()
    assert output[1, 1].eq(0).all()
    good = indices.flatten()[[0, 1, 2, 3, 5]]
    assert weight.grad[:, 0].nonzero().flatten().tolist() == sorted(good.tolist())


@pytest.mark.parametrize("mode", ["raise", "sync", "off"])
@every_method
def test_work_goes_on_after_bad_ids(backend, dtype, method, mode):
    """Bounds: context alive, record clear, table and ids untouched, the next calls right."""
    weight = table(1000, 48, dtype, DEVICE).requires_grad_()
    before = weight.detach().clone()
    indices = random_ids(3073, 1000)
    bad = indices.clone()
    bad[::7] = 2**40
    bad[1::7] = -1
    bad_before = bad.clone()
    grad_output = integers(3073, 48, dtype=dtype)
    with gpu_embed.set_bounds_check(mode), gpu_embed.use_gradient_method(method):
        for _ in range(3):
            weight.grad = None
            caught = None
            try:
                embedding(bad, weight, max_norm=0.01).backward(grad_output)
                gpu_embed.check_bounds()
            except IndexError as error:
                caught = error
            assert (caught is None) == (mode == "off")
            torch.cuda.synchronize()
            gpu_embed.check_bounds()
            assert same_bits(weight.detach(), before)
            assert torch.equal(bad, bad_before)
            weight.grad = None
            output = embedding(indices, weight)
            output.backward(grad_output)
            assert same_bits(output.detach(), before[indices])
            assert torch.equal(weight.grad, exact_gradient(indices, 1000, grad_output).to(dtype))


@pytest.mark.parametrize("index_dtype", ID_DTYPES, ids=str)
def test_a_million_bad_ids(backend, index_dtype):
    """Bounds: of many bad ids one is recorded, whole: an id and the position where it stands."""
    weight = table(100, 8, torch.float32, DEVICE)
    low, high = (100, 256) if index_dtype == torch.uint8 else (-(2**15), 0)
    indices = torch.randint(low, high, (1_000_000,), device=DEVICE).to(index_dtype)
    for _ in range(5):
        output = embedding(indices, weight)
        with pytest.raises(IndexError) as caught:
            gpu_embed.check_bounds()
        found = re.search(r"id (-?\d+) at flat position (\d+) .* has 100 rows", str(caught.value))
        assert indices[int(found[2])].item() == int(found[1])
        assert not output.any()


def test_the_flag_is_seen_without_waiting_for_the_gpu(backend):
    """Bounds: the kernel writes to host memory, so looking for an error is a read."""
    weight = table(50, 8, torch.float32, DEVICE)
    good = random_ids(10, 50)
    embedding(good, weight)
    record = bounds.record_for(weight.device)
    flag = record.flag.numpy()
    assert flag[0] == 0
    embedding(torch.full_like(good, 77), weight)
    deadline = time.monotonic() + 10
    while not flag[0] and time.monotonic() < deadline:
        time.sleep(0.001)
    assert flag[0] == 1
    with pytest.raises(IndexError, match="id 77"):
        embedding(good, weight)
    assert flag[0] == 0


def test_looking_for_an_error_does_not_wait(backend):
    """Bounds: a bad id behind a long queue is reported later, not waited for."""
    weight = table(50, 8, torch.float32, DEVICE)
    good, bad = random_ids(10, 50), torch.tensor([50], device=DEVICE)
    embedding(good, weight)
    torch.cuda.synchronize()
    torch.cuda._sleep(SLEEP)
    woken = torch.cuda.Event()
    woken.record()
    embedding(bad, weight)
    output = embedding(good, weight)
    assert not woken.query()
    with pytest.raises(IndexError, match="id 50"):
        gpu_embed.check_bounds()
    assert same_bits(output, weight[good])


# Gradients: exact, deterministic, within memory.

SHAPES = [
    (50_000, 768, 8192),
    pytest.param((128_256, 4096, 4096), marks=pytest.mark.large),
    (100_000, 50, 100_000),
    (30_000, 300, 50_000),
    (1_000_000, 1, 1_000_000),
    (5_000, 33, 200_000),
    (7, 8, 100_000),
]


@every_method
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_integer_gradients_sum_exactly(backend, shape, dtype, method):
    """Accumulation: atomics, sorted segments and torch agree bit for bit, and 16 bits are rounded once."""
    num_embeddings, embedding_dim, num_indices = shape
    indices = ids("zipf", num_indices, num_embeddings, DEVICE)
    grad_output = integers(num_indices, embedding_dim, dtype=dtype)
    with gpu_embed.use_gradient_method(method):
        actual = gradient(indices, num_embeddings, grad_output)
    exact = exact_gradient(indices, num_embeddings, grad_output)
    assert torch.equal(actual, exact.to(dtype))


@every_method
@pytest.mark.parametrize("kind", ["uniform", "zipf", "equal"])
def test_random_gradients_stay_within_the_bound(backend, dtype, method, kind):
    """Accumulation: |actual - exact| <= count * eps32 * sum(|grad|), and half an ulp for the rounding."""
    num_embeddings, embedding_dim, num_indices = 2000, 384, 50_000
    indices = ids(kind, num_indices, num_embeddings, DEVICE)
    generator = torch.Generator(DEVICE).manual_seed(0)
    grad_output = torch.randn(num_indices, embedding_dim, generator=generator, device=DEVICE).to(
        dtype
    )
    with gpu_embed.use_gradient_method(method):
        actual = gradient(indices, num_embeddings, grad_output)
    exact = exact_gradient(indices, num_embeddings, grad_output)
    bound = exact_gradient(indices, num_embeddings, grad_output.abs())
    acc_dtype = torch.promote_types(dtype, torch.float32)
    bound *= indices.bincount().max() * torch.finfo(acc_dtype).eps
    if dtype != acc_dtype:
        largest = (exact.abs() + bound).clamp(min=torch.finfo(dtype).tiny)
        bound += torch.finfo(dtype).eps / 2 * largest
    else:
        # The fp64 sum that we compare with is rounded as well.
        bound *= 2
    assert ((actual.double() - exact).abs() <= bound).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("embedding_dim", [1, 2, 33, 768])
def test_4096_ones_make_4096(backend, dtype, embedding_dim):
    """Accumulation: sums are taken in fp32."""
    indices = torch.full((4096,), 1, device=DEVICE)
    actual = gradient(indices, 3, torch.ones(4096, embedding_dim, dtype=dtype, device=DEVICE))
    assert actual.float().mean(1).tolist() == [0, 4096, 0]
    assert actual[1].eq(4096).all()


# In fp16 the sum would be infinite.
@pytest.mark.parametrize(("dtype", "method"), METHODS[:-1])
def test_every_id_the_same(backend, dtype, method):
    """Accumulation under the worst contention: 713,268 ones on one row of a table of 2000 x 384."""
    num_indices = 713_268
    indices = torch.full((num_indices,), 1234, device=DEVICE)
    grad_output = torch.ones((), dtype=dtype, device=DEVICE).expand(num_indices, 384).contiguous()
    with gpu_embed.use_gradient_method(method):
        actual = gradient(indices, 2000, grad_output)
    expected = torch.zeros(2000, 384, device=DEVICE)
    expected[1234] = num_indices
    assert torch.equal(actual, expected.to(dtype))


@pytest.fixture
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("arguments", [{}, ARGUMENTS["all"]], ids=["plain", "all arguments"])
def test_gradients_repeat_bit_for_bit(backend, deterministic, dtype, arguments):
    """Determinism: 20 runs, random floats, hot rows, and uninitialised memory filled with NaN."""
    indices = ids("zipf", 100_000, 3000, DEVICE)
    generator = torch.Generator(DEVICE).manual_seed(0)
    grad_output = torch.randn(100_000, 300, generator=generator, device=DEVICE).to(dtype)
    runs = [gradient(indices, 3000, grad_output, **arguments) for _ in range(20)]
    assert not runs[0].isnan().any()
    assert runs[0].any()
    assert all(same_bits(run, runs[0]) for run in runs)


@every_method
@pytest.mark.parametrize(
    "shape",
    [
        (128_256, 2048, 4096),
        (128_256, 2048, 100_000),
        (1_000_000, 16, 2_000_000),
        (1_000_000, 16, 20_000_000),
        (100, 1, 100_000_000),
    ],
    ids=str,
)
def test_memory_of_a_backward(backend, shape, dtype, method):
    """Beyond the gradient 40 bytes an id and 64 MiB: no copy of grad_output, nor of a 16-bit table in fp32."""
    num_embeddings, embedding_dim, num_indices = shape
    indices = random_ids(num_indices, num_embeddings)
    grad_output = torch.ones(num_indices, embedding_dim, dtype=dtype, device=DEVICE)
    arguments = (grad_output, indices, num_embeddings, -1, False)
    with gpu_embed.use_gradient_method(method):
        torch.ops.gpu_embed.embedding_dense_backward(*arguments)
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        grad_weight = torch.ops.gpu_embed.embedding_dense_backward(*arguments)
        peak = torch.cuda.max_memory_allocated() - before
    assert grad_weight.nbytes <= peak <= grad_weight.nbytes + 40 * num_indices + 64 * 2**20


@every_method
def test_gradients_are_added_in_place(backend, dtype, method):
    """No host sync and no second table of gradients: each replay of a captured backward adds to the same one."""
    indices = random_ids(2048, 128_256)
    grad_output = integers(2048, 512, dtype=dtype)
    grad_weight = integers(128_256, 512, dtype=dtype)
    total = exact_gradient(indices, 128_256, grad_output)
    own = backends.load(backend)

    def step() -> tuple[Tensor]:
        arguments = (grad_output, indices, 128_256, -1, False)
        return (own.embedding_dense_backward(*arguments, grad_weight),)

    with gpu_embed.use_gradient_method(method):
        graph, _ = captured(step)
        torch.cuda.synchronize()
        before = grad_weight.clone()
        allocated = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        with no_host_sync():
            step()
        peak = torch.cuda.max_memory_allocated() - allocated
    graph.replay()
    assert torch.equal(grad_weight, (before.double() + 2 * total).to(dtype))
    assert peak <= 40 * 2048 + 64 * 2**20


@pytest.mark.parametrize("kind", ["uniform", "zipf", "equal", "sorted"])
@pytest.mark.parametrize("num_embeddings", [15, 1_000_000])
def test_gradients_of_many_ids(backend, kind, num_embeddings):
    """Many chunks of partial sums, whatever the runs."""
    num_indices = 10_000_001
    indices = ids(kind, num_indices, num_embeddings, DEVICE).int()
    grad_output = integers(num_indices, 2)
    with gpu_embed.use_gradient_method("sorted"):
        actual = gradient(indices, num_embeddings, grad_output, padding_idx=3)
    expected = exact_gradient(indices, num_embeddings, grad_output)
    expected[3] = 0
    assert torch.equal(actual, expected.float())


def test_gradients_of_batches_are_not_copied(backend):
    """Texts by words, transposed and expanded: rows are read where they lie."""
    indices = random_ids(300_000, 50_000).view(300, 1000)
    grad_output = integers(1000, 300, 64)
    for method in ("atomic", "sorted"):
        for view in (grad_output.transpose(0, 1), grad_output[0][:, None].expand(300, 1000, 64)):
            with gpu_embed.use_gradient_method(method):
                actual = gradient(indices, 50_000, view)
            expected = exact_gradient(indices.flatten(), 50_000, view.reshape(-1, 64))
            assert torch.equal(actual, expected.float())


# Training.


Loss = Callable[[Tensor, Tensor], Tensor]


def loss_of(layer: torch.nn.Embedding) -> Loss:
    return lambda indices, factor: (layer(indices) * factor).sum()


def train(layer: torch.nn.Embedding, loss_of_batch: Loss, steps: int = 5) -> Tensor:
    """SGD whose sums are exact in any order, since all numbers are quarters; the losses and the table."""
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.25)
    losses = []
    for seed in range(steps):
        optimizer.zero_grad()
        indices = random_ids(3000, layer.num_embeddings, seed).view(30, 100)
        loss = loss_of_batch(indices, integers(30, 100, layer.embedding_dim, seed=seed))
        loss.backward()
        optimizer.step()
        losses.append(loss.detach().clone())
    return torch.cat([torch.stack(losses), layer.weight.detach().flatten()])


def layers(arguments: dict[str, object]) -> tuple[torch.nn.Embedding, torch.nn.Embedding]:
    """Ours and torch's, with one table of small integers."""
    weight = table(300, 48, torch.float32, DEVICE).round()
    ours = gpu_embed.Embedding(300, 48, _weight=weight.clone(), **arguments)
    theirs = torch.nn.Embedding(300, 48, _weight=weight.clone(), **arguments)
    return ours, theirs


@pytest.mark.parametrize("method", ["atomic", "sorted"])
@pytest.mark.parametrize("arguments", [{}, {"padding_idx": 5}, {"sparse": True}], ids=str)
def test_training_equals_torchs_layer(backend, method, arguments):
    """Drop-in: the same losses and the same table, bit for bit."""
    ours, theirs = layers(arguments)
    before = ours.weight.detach().clone()
    with gpu_embed.use_gradient_method(method):
        actual = train(ours, loss_of(ours))
    assert torch.equal(actual, train(theirs, loss_of(theirs)))
    assert not torch.equal(ours.weight, before)


@pytest.mark.full
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
@pytest.mark.parametrize("arguments", [{}, {"padding_idx": 5}], ids=str)
def test_compiled_training_equals_eager(triton, arguments, mode):
    """Drop-in: inductor, one graph, forward and backward; no host sync: and inside its CUDA graphs."""
    torch._dynamo.reset()
    eager, _ = layers(arguments)
    compiled, _ = layers(arguments)
    loss = torch.compile(loss_of(compiled), fullgraph=True, mode=mode)
    assert torch.equal(train(compiled, loss, 8), train(eager, loss_of(eager), 8))


# Triton and CUDA C++ side by side.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("embedding_dim", [1, 33, 50, 300, 768, 4096])
def test_triton_and_cupy_agree(dtype, embedding_dim):
    """Forced choice: a forced backend gives the same results."""
    require("triton")
    require("cupy")
    indices = ids("zipf", 5000, 900, DEVICE)
    grad_output = integers(5000, embedding_dim, dtype=dtype)
    results = []
    for name in ("triton", "cupy"):
        weight = table(900, embedding_dim, dtype, DEVICE).requires_grad_()
        with gpu_embed.use_backend(name):
            output = embedding(indices, weight, padding_idx=3, scale_grad_by_freq=True)
            output.backward(grad_output)
            clipped = weight.detach().clone()
            embedding(indices, clipped, max_norm=1.0)
        results.append((output.detach(), weight.grad, clipped))
    (output, grad, clipped), (cupy_output, cupy_grad, cupy_clipped) = results
    assert same_bits(output, cupy_output)
    assert torch.equal(grad, cupy_grad)
    # The norms are summed in different orders.
    rtol = max(2 * torch.finfo(dtype).eps, 1e-5)
    assert torch.allclose(clipped, cupy_clipped, rtol=rtol, atol=0)


# Optimizers.

OPTIMIZERS = (optim.SGD, optim.Adagrad, optim.RowWiseAdagrad, optim.Adam, optim.AdamW)


def sparse_layer(num_embeddings: int, embedding_dim: int, **arguments: object) -> Embedding:
    layer = Embedding(num_embeddings, embedding_dim, sparse=True, device=DEVICE, **arguments)
    with torch.no_grad():
        layer.weight.zero_()
    return layer


@pytest.mark.large
@pytest.mark.parametrize("optimizer_class", [optim.RowWiseAdagrad, optim.Adagrad])
def test_rows_past_2_31_elements_are_updated(backend, optimizer_class):
    """64-bit addresses: 64-bit addresses of weight and state."""
    layer = sparse_layer(19_345_706, 128, dtype=torch.bfloat16)
    optimizer = optimizer_class(layer.parameters(), lr=0.5)
    rows, _ = distinct_rows(*layer.weight.shape)
    layer(rows.repeat(5)).sum().backward()
    optimizer.step()
    # A constant gradient of 5: both move by lr times its sign, but for eps.
    assert torch.allclose(layer.weight[rows].float(), layer.weight.new_full((), -0.5).float())
    assert layer.weight.count_nonzero() == len(rows) * 128


@pytest.mark.parametrize("optimizer_class", OPTIMIZERS)
@pytest.mark.parametrize("in_backward", [False, True])
def test_no_host_sync_for_optimizers(backend, optimizer_class, in_backward):
    """No host sync: not for padding, ids out of range, a tensor lr, chosen rows, random rounding or clipping."""
    layer = sparse_layer(500, 48, dtype=torch.bfloat16, padding_idx=7)
    arguments = {
        "lr": torch.tensor(0.1, device=DEVICE),
        "rows": range(400),
        "stochastic_rounding": True,
        "seed": 1,
    }
    if in_backward:
        optim.apply_in_backward(layer, optimizer_class, **arguments)
    else:
        optimizer = optimizer_class(layer.parameters(), **arguments)

    def step() -> None:
        layer(indices).sum().backward()
        if not in_backward:
            optim.clip_grad_norm_(layer.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()

    indices = random_ids(3073, 500)
    step()
    with no_host_sync():
        step()


@pytest.mark.parametrize("optimizer_class", [optim.SGD, optim.Adagrad, optim.RowWiseAdagrad])
def test_cuda_graphs_replay_steps(backend, optimizer_class):
    """No host sync: ids, gradients and the learning rate may change between replays."""
    layers = [sparse_layer(1000, 48) for _ in range(2)]
    lr = torch.tensor(0.5, device=DEVICE)
    indices = random_ids(3073, 1000)
    grad_output = integers(3073, 48)
    optimizers = [optimizer_class(layer.parameters(), lr=lr) for layer in layers]

    def step(which: int = 0) -> tuple[Tensor, ...]:
        optimizers[which].zero_grad()
        layers[which](indices).backward(grad_output)
        optimizers[which].step()
        return ()

    graph, _ = captured(step)
    # What the warm-up did, the twin does too; capturing itself runs nothing.
    for _ in range(2):
        step(1)
    for seed in (1, 2):
        indices.copy_(random_ids(3073, 1000, seed))
        grad_output.copy_(integers(3073, 48, seed=seed))
        lr.fill_(0.25 * seed)
        graph.replay()
        step(1)
        assert same_bits(layers[0].weight.detach(), layers[1].weight.detach())


def test_steps_with_numbers_of_their_own_are_not_captured(triton):
    layer = sparse_layer(100, 8)
    optimizer = optim.Adam(layer.parameters())

    def step() -> None:
        layer(torch.arange(5, device=DEVICE)).sum().backward()
        optimizer.step()

    step()
    graph = torch.cuda.CUDAGraph()
    with (
        pytest.raises(RuntimeError, match="a CUDA graph would repeat the step"),
        torch.cuda.graph(graph),
    ):
        step()


@pytest.mark.parametrize("optimizer_class", OPTIMIZERS)
def test_memory_of_a_step(backend, optimizer_class):
    """Beyond state and gradient: 32 bytes an id and 64 MiB, whatever the table's height."""
    layer = sparse_layer(4_000_000, 64)
    optimizer = optimizer_class(layer.parameters())
    for indices in (random_ids(10, 4_000_000), random_ids(100_000, 4_000_000)):
        optimizer.zero_grad()
        layer(indices).sum().backward()
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        optimizer.step()
        peak = torch.cuda.max_memory_allocated() - before
    sums = 0
    if backend == "cupy" and optimizer_class is optim.RowWiseAdagrad:
        sums = layer.weight.grad._values().nbytes  # it takes two steps there
    assert peak <= 32 * 100_000 + 64 * 2**20 + sums


@pytest.mark.parametrize("optimizer_class", OPTIMIZERS)
def test_two_streams_update_two_tables(backend, optimizer_class):
    """The kernels run on the caller's stream: what that stream writes first, they read."""
    layers = [sparse_layer(300, 64) for _ in range(2)]
    optimizers = [optimizer_class(layer.parameters(), lr=0.5) for layer in layers]
    streams = [torch.cuda.Stream() for _ in range(2)]
    grad_output = integers(3073, 64)
    indices = random_ids(3073, 300)
    for stream, layer, optimizer in zip(streams, layers, optimizers, strict=True):
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                optimizer.zero_grad()
                output = layer(indices)
                torch.cuda._sleep(SLEEP // 20)
                output.backward(grad_output)
                optimizer.step()
    torch.cuda.synchronize()
    assert layers[0].weight.any()
    assert same_bits(layers[0].weight.detach(), layers[1].weight.detach())


# Small enough to run under compute-sanitizer: `make gpu` picks tests by the word in their names.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_sanitizer_finds_nothing_in_any_kernel(backend, dtype):
    """Bounds: no access outside of any tensor, bad ids included; every kernel, ragged at every edge."""
    methods = ("atomic", "sorted", "sorted_atomic") if dtype == torch.float32 else ("sorted",)
    for embedding_dim in (1, 8, 33, 300):
        indices = ids("zipf", 77, 19, DEVICE)
        weight = table(19, embedding_dim, dtype, DEVICE).requires_grad_()
        grad_output = integers(77, embedding_dim, dtype=dtype)
        for method in methods:
            with gpu_embed.use_gradient_method(method):
                weight.grad = None
                output = embedding(indices, weight, padding_idx=2)
                output.backward(grad_output)
                expected = exact_gradient(indices, 19, grad_output)
                expected[2] = 0
                assert torch.equal(weight.grad, expected.to(dtype))
                arguments = (grad_output, indices, 19, 2, False, weight.grad)
                backends.load(backend).embedding_dense_backward(*arguments)
                assert torch.equal(weight.grad, (2 * expected).to(dtype))
        gradient(indices, 19, grad_output, scale_grad_by_freq=True, max_norm=1.0)
        check_bad_ids(indices, weight.detach())


def check_bad_ids(indices: Tensor, weight: Tensor) -> None:
    indices = indices.clone()
    indices[5], indices[-1] = len(weight), -1
    output = embedding(indices, weight)
    with pytest.raises(IndexError, match="index out of range in self"):
        gpu_embed.check_bounds()
    with gpu_embed.set_bounds_check("off"):
        gradient(indices, len(weight), torch.ones_like(output), scale_grad_by_freq=True)
    assert not output[[5, -1]].any()


@pytest.mark.parametrize("optimizer_class", OPTIMIZERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_sanitizer_finds_nothing_in_updates(backend, optimizer_class, dtype):
    """Bounds: no access outside of any tensor; rows in one warp, in several and in none."""
    for embedding_dim in (1, 8, 33, 300, 5000):
        weight = torch.nn.Parameter(table(19, embedding_dim, dtype, DEVICE))
        optimizer = optimizer_class([weight], rows=range(18), stochastic_rounding=True, seed=0)
        indices = ids("zipf", 77, 19, DEVICE)
        weight.grad = torch.sparse_coo_tensor(
            indices[None], integers(77, embedding_dim, dtype=dtype), weight.shape
        )
        optimizer.step()
    torch.cuda.synchronize()


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float16, torch.complex128], ids=str)
def test_sanitizer_finds_nothing_in_copies(backend, dtype):
    """Exact copy: words of every width, contiguous and strided tables."""
    for embedding_dim in (2, 3, 16, 100):
        weight = table(23, embedding_dim, dtype, DEVICE)
        for view in (weight, weight[:, 1:], weight[::2], weight.t().contiguous().t()):
            indices = random_ids(77, len(view))
            assert same_bits(embedding(indices, view), view[indices])
    torch.cuda.synchronize()


@pytest.mark.parametrize("first_row", [5, 2**31 + 5, 2**40], ids=str)
def test_sanitizer_finds_nothing_around_shards(backend, first_row):
    """Bounds, without a host sync: ids before and behind the shard's rows touch nothing."""
    kernels, shard = backends.load(backend), Shard(first_row, first_row + 40)
    weight, grad_output = integers(19, 33), integers(77, 33)
    local = random_ids(77, 29) - 5
    read = (local >= 0) & (local < 19)
    indices, bags = local + first_row, Bags(local + first_row, None, 7)
    with no_host_sync():
        rows = kernels.embedding(weight, indices, -1, None, shard)
        sums = kernels.embedding_bag(weight, None, bags, -1, "sum", None, shard)
        largest, position = kernels.embedding_bag_max(weight, bags, -1, True, None, shard)
    expected = torch.where(read[:, None], weight[local.clamp(0, 18)], 0)
    assert torch.equal(rows, expected)
    assert torch.equal(sums, expected.view(7, 11, 33).sum(1))
    found = torch.where(read[:, None], expected, -torch.inf).view(7, 11, 33).max(1).values
    assert torch.equal(largest, torch.where(found.isinf(), 0, found))
    assert torch.equal(largest, torch.where(position < 0, 0, rows.gather(0, position.clamp(0))))
    for method in ("atomic", "sorted", "sorted_atomic"):
        with gpu_embed.use_gradient_method(method), no_host_sync():
            actual = kernels.embedding_dense_backward(
                grad_output, indices, 19, -1, False, None, shard
            )
        exact = exact_gradient(local[read], 19, grad_output[read])
        assert torch.equal(actual, exact.float())


# Bags.

BAG_MODES = {
    "sum": {"mode": "sum"},
    "mean": {"mode": "mean"},
    "max": {"mode": "max"},
    "weighted": {"mode": "sum"},
    "mean, padding, scaled": {"mode": "mean", "padding_idx": 3, "scale_grad_by_freq": True},
}
each_bag_mode = pytest.mark.parametrize("kind", BAG_MODES)


def bag_arguments(kind: str, indices: Tensor, dtype: torch.dtype) -> dict:
    arguments = dict(BAG_MODES[kind])
    if kind == "weighted":
        arguments["per_sample_weights"] = integers(len(indices), dtype=dtype).requires_grad_()
    return arguments


def cuts(num_bags: int, num_indices: int, seed: int = 0) -> Tensor:
    """Offsets of bags of random sizes, some of them empty."""
    begins = random_ids(num_bags, num_indices, seed).sort().values
    begins[0] = 0
    return begins


def exact_bags(indices: Tensor, weight: Tensor, offsets: Tensor, arguments: dict) -> Tensor:
    """The same in fp64, by torch's own operator, whose CUDA kernel is right where its CPU kernel is not."""
    wide = {
        name: value.double() if isinstance(value, Tensor) else value
        for name, value in arguments.items()
    }
    return torch.nn.functional.embedding_bag(indices.long(), weight.double(), offsets, **wide)


@where(lambda method, kind: method != "atomic" or "scaled" not in kind)
@each_bag_mode
@every_method
def test_bags_equal_torchs_in_fp64(backend, dtype, method, kind):
    """Accumulation: small integers, so sums and maxima are exact; means are divided once."""
    weight = integers(500, 48, dtype=dtype).requires_grad_()
    indices, offsets = random_ids(20_000, 500), cuts(1500, 20_000)
    arguments = bag_arguments(kind, indices, dtype)
    leaves = [weight, *(v for v in arguments.values() if isinstance(v, Tensor))]
    output = embedding_bag(indices, weight, offsets, **arguments)
    expected = exact_bags(indices, weight, offsets, arguments)
    grad_output = integers(*output.shape, dtype=dtype, seed=1)
    with gpu_embed.use_gradient_method(method):
        grads = torch.autograd.grad(output, leaves, grad_output)
    exact = torch.autograd.grad(expected, leaves, grad_output.double())
    quotients = "mean" in kind
    eps = torch.finfo(dtype).eps
    assert torch.allclose(output.double(), expected, rtol=eps if quotients else 0, atol=0)
    for actual, right in zip(grads, exact, strict=True):
        bound = eps * right.abs()
        if quotients:
            # At most 200 terms, each of them at most 2, with two roundings each and one of each sum.
            bound += 200 * 2 * 3 * torch.finfo(torch.promote_types(dtype, torch.float32)).eps
        assert ((actual.double() - right).abs() <= bound).all()


def test_wrong_offsets_never_read_outside_of_the_ids(backend):
    """Bounds: on CUDA nobody looks at the offsets before the kernel, which keeps to the ids."""
    weight = table(4, 3, torch.float32, DEVICE).requires_grad_()
    indices = torch.tensor([1, 2, 3], device=DEVICE)
    for offsets in ([0, 2, 1], [0, 99, 2], [0, -7, 2], [1, 2, 3], [0, 1, 2**40]):
        offsets = torch.tensor(offsets, device=DEVICE)
        for mode in ("sum", "mean", "max"):
            output = embedding_bag(indices, weight, offsets, mode=mode)
            with pytest.raises(RuntimeError, match=r"offsets\[\d\] is "):
                gpu_embed.check_bounds()
            with gpu_embed.set_bounds_check("off"):
                output.sum().backward()


@pytest.mark.parametrize("kind", ["sum", "mean", "max"])
@pytest.mark.parametrize("num_bags", [1, 3, 1000])
def test_long_bags(backend, kind, num_bags):
    """A million ids in a bag or three, or nearly all in the last of many: several programs a bag, in a fixed order."""
    weight = integers(1000, 33)
    indices, offsets = random_ids(1_000_000, 1000), cuts(num_bags, 1_000_000)
    if num_bags == 1000:
        offsets = torch.arange(0, 20 * num_bags, 20, device=indices.device)
    output = embedding_bag(indices, weight, offsets, mode=kind)
    # Every partial sum is an integer below 2**24.
    expected = exact_bags(indices, weight, offsets, {"mode": kind})
    assert torch.equal(output, expected.float())
    assert same_bits(output, embedding_bag(indices, weight, offsets, mode=kind))


@each_bag_mode
@pytest.mark.parametrize("num_indices", [3073, 1_000_000])
def test_cuda_graphs_replay_bags(backend, kind, num_indices):
    """No host sync: one capture serves ids, offsets and gradients that change."""
    weight = integers(5000, 64).requires_grad_()
    indices, offsets = random_ids(num_indices, 5000), cuts(1000, num_indices)
    grad_output = integers(1000, 64)
    arguments = bag_arguments(kind, indices, torch.float32)

    def step() -> tuple[Tensor, Tensor]:
        output = embedding_bag(indices, weight, offsets, **arguments)
        return output, *torch.autograd.grad(output, weight, grad_output)

    # Atomics add means in any order.
    with gpu_embed.use_gradient_method("sorted"):
        graph, results = captured(step)
        indices.copy_(random_ids(num_indices, 5000, 1))
        offsets.copy_(cuts(1000, num_indices, 1))
        grad_output.copy_(integers(1000, 64, seed=1))
        graph.replay()
        replayed = [result.clone() for result in results]
        assert all(torch.equal(a, b) for a, b in zip(replayed, step(), strict=True))


@each_bag_mode
def test_no_host_sync_for_bags(backend, kind):
    """No host sync: forward, backward and double backward wait for nothing."""
    weight = table(500, 48, torch.float32, DEVICE).requires_grad_()
    indices, offsets = random_ids(3073, 500), cuts(700, 3073)
    grad_output = integers(700, 48).requires_grad_()
    arguments = bag_arguments(kind, indices, torch.float32)

    def step() -> None:
        output = embedding_bag(indices, weight, offsets, **arguments)
        (grad,) = torch.autograd.grad(output, weight, grad_output, create_graph=True)
        torch.autograd.grad(grad, grad_output, torch.ones_like(grad))

    step()
    with no_host_sync():
        step()


@pytest.mark.large
@pytest.mark.parametrize("kind", ["sum", "max"])
@pytest.mark.parametrize("method", ["atomic", "sorted"])
def test_bags_of_rows_past_2_31_elements(backend, method, kind):
    """64-bit addresses: 64-bit addresses of the table's rows, read and written."""
    num_embeddings, embedding_dim = 2**26 + 5, 32
    assert num_embeddings * embedding_dim > 2**31
    weight = torch.zeros(num_embeddings, embedding_dim, device=DEVICE)
    weight[-3:] = 1 + torch.arange(3.0, device=DEVICE)[:, None]
    indices = torch.tensor([[num_embeddings - 1, num_embeddings - 3], [0, 1]], device=DEVICE)
    weight.requires_grad_()
    output = embedding_bag(indices, weight, mode=kind)
    assert output[:, 0].tolist() == ([4, 0] if kind == "sum" else [3, 0])
    with gpu_embed.use_gradient_method(method):
        (grad,) = torch.autograd.grad(output[0].sum(), weight)
    assert grad[-3:, 0].tolist() == ([1, 0, 1] if kind == "sum" else [0, 0, 1])
    assert grad.sum().item() == embedding_dim * (2 if kind == "sum" else 1)


@pytest.mark.large
def test_bags_past_2_31_elements(backend):
    """64-bit addresses: 64-bit addresses of the output and of its gradient."""
    num_bags, embedding_dim = 2**26 + 5, 32
    weight = integers(100, embedding_dim).requires_grad_()
    indices = random_ids(num_bags, 100)[:, None]
    output = embedding_bag(indices, weight, mode="sum")
    for start in range(0, num_bags, 2**22):
        part = slice(start, start + 2**22)
        assert torch.equal(output[part], weight[indices[part, 0]]), start
    with gpu_embed.use_gradient_method("sorted"):
        output.backward(torch.ones(1, 1, device=DEVICE).expand_as(output))
    assert torch.equal(weight.grad[:, 0], indices[:, 0].bincount(minlength=100).float())


@pytest.mark.parametrize("kind", ["sum", "mean", "max"])
def test_bad_ids_of_bags_are_reported_late(backend, kind):
    """Bounds: with the bag, at the backward of the call, and the table and the next call are right."""
    weight = table(50, 8, torch.float32, DEVICE).requires_grad_()
    indices, offsets = random_ids(100, 50), torch.arange(0, 100, 10, device=DEVICE)
    good = embedding_bag(indices, weight, offsets, mode=kind)
    bad = indices.clone()
    bad[37] = 50
    output = embedding_bag(bad, weight, offsets, mode=kind)
    torch.cuda.synchronize()
    with pytest.raises(IndexError, match="found idx to be 50, at position 7 of bag 3"):
        output.sum().backward()
    assert torch.equal(embedding_bag(indices, weight, offsets, mode=kind), good)
    good.sum().backward()


@each_bag_mode
def test_sanitizer_finds_nothing_in_bags(backend, kind):
    """Bounds: of any width, with ids and offsets that are wrong; run under compute-sanitizer by `make gpu`."""
    for embedding_dim in (1, 3, 32, 50, 130):
        weight = integers(19, embedding_dim).requires_grad_()
        indices, offsets = random_ids(300, 19), cuts(40, 300)
        arguments = bag_arguments(kind, indices, torch.float32)
        for method in ("auto", "sorted"):
            with gpu_embed.use_gradient_method(method):
                embedding_bag(indices, weight, offsets, **arguments).sum().backward()
        indices[5], indices[-1], offsets[7], offsets[9] = 19, -1, 2**40, -5
        with gpu_embed.set_bounds_check("off"):
            embedding_bag(indices, weight, offsets, **arguments).sum().backward()
    torch.cuda.synchronize()
