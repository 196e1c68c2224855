"""Gradients: exact sums of integers, one rounding, determinism, and the choice of kernel."""

from math import gcd

import pytest
import torch
from cases import (
    GRADIENT_DTYPES,
    ID_DTYPES,
    INT16_KEYS,
    ids,
    ids_around_the_middle,
    integer_gradient,
    same_bits,
    table,
)
from targets import has_kernels, has_method
from tiers import where

import gpu_embed
from gpu_embed import backends
from gpu_embed.backends._plan.access import row_matrix, row_numbers
from gpu_embed.backends._plan.carries import chunk_size
from gpu_embed.backends._plan.gradient_method import LIMITS, RULES, Limit, choose
from gpu_embed.functional import embedding
from gpu_embed.settings import GRADIENT_METHOD

pytestmark = where(has_method)

METHODS = tuple(RULES)


def gradient(indices, num_embeddings, grad_output, **arguments):
    """weight.grad of one lookup, and the reference's answer."""
    weight = torch.zeros(num_embeddings, grad_output.shape[-1]).to(grad_output)
    found = []
    for backend in (None, "reference"):
        leaf = weight.clone().requires_grad_()
        if backend is None:
            embedding(indices, leaf, **arguments).backward(grad_output)
        else:
            with gpu_embed.use_backend(backend):
                embedding(indices, leaf, **arguments).backward(grad_output)
        found.append(leaf.grad)
    return found


@pytest.fixture(params=METHODS)
def method(request, target):
    """Forces one gradient kernel where the backend has several; the others run once."""
    with gpu_embed.use_gradient_method(request.param):
        yield request.param


def serves_dtype(method, dtype):
    return dtype in (RULES[method].dtypes or GRADIENT_DTYPES)


# (V, D, N): one row, a hot table, odd and even widths, runs over many chunks.
SHAPES = [
    (1, 1, 1),
    (7, 2, 10),
    (3, 5, 3073),
    (40, 8, 100),
    (6, 33, 70),
    (17, 12, 90),
    (300, 50, 20),
    (2, 300, 40),
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", ["uniform", "equal", "zipf"])
def test_integer_gradients_sum_exactly(target, method, shape, kind):
    """Accumulation: fp32 sums of small integers are exact in any order."""
    num_embeddings, embedding_dim, num_indices = shape
    indices = ids(kind, num_indices, num_embeddings, target.device)
    grad_output = integer_gradient((num_indices, embedding_dim), torch.float32, target.device)
    actual, expected = gradient(indices, num_embeddings, grad_output)
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("dtype", GRADIENT_DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["sorted", "alternating", "zipf"])
def test_every_dtype_and_order(target, dtype, kind):
    """Accumulation: exact in every dtype of the table."""
    indices = ids(kind, 100, 9, target.device)
    grad_output = integer_gradient((100, 12), dtype, target.device)
    actual, expected = gradient(indices, 9, grad_output)
    assert actual.dtype == dtype
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("method", ["sorted"], indirect=True)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_4096_ones_make_4096(target, method, dtype):
    """Accumulation: sums are taken in fp32; in bf16 they would stop at 256, in fp16 at 2048."""
    indices = torch.full((4096,), 1, device=target.device)
    actual, _ = gradient(indices, 3, torch.ones(4096, 2, dtype=dtype, device=target.device))
    assert actual.tolist() == [[0, 0], [4096, 4096], [0, 0]]


@pytest.mark.parametrize("method", ["sorted"], indirect=True)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_sums_are_rounded_once(target, method, dtype):
    """Accumulation: 1 + eps/2 + eps/2 is 1 + eps, which two roundings would lose."""
    eps = torch.finfo(dtype).eps
    grad_output = torch.tensor([[1.0], [eps / 2], [eps / 2]], dtype=dtype, device=target.device)
    actual, _ = gradient(torch.tensor([0, 0, 0], device=target.device), 1, grad_output)
    assert actual.item() == 1 + eps


@where(serves_dtype)
@pytest.mark.parametrize("dtype", GRADIENT_DTYPES, ids=str)
def test_random_gradients_stay_within_the_bound_of_fp32_sums(target, method, dtype):
    """Accumulation: |actual - exact| <= count * eps32 * sum(|grad|), and half an ulp for the rounding."""
    generator = torch.Generator().manual_seed(3)
    grad_output = torch.randn(100, 7, generator=generator).to(dtype).to(target.device)
    indices = ids("zipf", 100, 5, target.device)
    actual, _ = gradient(indices, 5, grad_output)
    with gpu_embed.use_gradient_method("auto"):
        _, exact = gradient(indices, 5, grad_output.double())
        _, magnitude = gradient(indices, 5, grad_output.double().abs())
    most = indices.bincount().max().item()
    bound = most * torch.finfo(torch.float32).eps * magnitude
    bound += torch.finfo(dtype).eps / 2 * exact.abs()
    assert ((actual.double() - exact).abs() <= bound).all()


@pytest.mark.parametrize("dtype", ID_DTYPES, ids=str)
@pytest.mark.parametrize("num_embeddings", [100, 200, 256, 300, 40_000])
def test_every_dtype_of_ids_and_of_sort_keys(target, method, dtype, num_embeddings):
    """Sort keys are as narrow as the table allows; ids keep their own dtype."""
    indices = torch.tensor([0, 99, 5, 99, 0, 7], device=target.device).to(dtype)
    grad_output = integer_gradient((6, 4), torch.float32, target.device)
    actual, expected = gradient(indices, num_embeddings, grad_output)
    assert torch.equal(actual, expected)


@INT16_KEYS
def test_rows_that_int16_holds_as_negative_keys(target, method, num_embeddings):
    """And the sentinel of padding and of ids out of range, which comes last."""
    indices = ids_around_the_middle(num_embeddings, target.device)
    indices[7], indices[50] = -1, num_embeddings
    grad_output = integer_gradient((100, 4), torch.float32, target.device)
    with gpu_embed.set_bounds_check("off"):
        actual, expected = gradient(indices, num_embeddings, grad_output, padding_idx=1)
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("padding_idx", [0, 2, -1, -5])
def test_padding_gets_no_gradient(target, method, padding_idx):
    """As torch: padding_idx drops the gradient of its row; negative ones count from the end."""
    indices = torch.tensor([[0, 1, 2], [2, 4, 4]], device=target.device)
    grad_output = integer_gradient((2, 3, 4), torch.float32, target.device) + 5
    actual, expected = gradient(indices, 5, grad_output, padding_idx=padding_idx)
    assert actual[padding_idx].eq(0).all()
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("bad", [-1, 5, 2**40], ids=str)
def test_what_has_no_row_is_not_even_read(target, method, bad):
    """Bounds: the gradients of ids out of range, and of padding, may be anything."""
    indices = torch.tensor([0, bad, 2, 3, 2, bad], device=target.device)
    grad_output = integer_gradient((6, 4), torch.float32, target.device) + 5
    grad_output[1], grad_output[3], grad_output[5] = float("nan"), float("inf"), float("-inf")
    with gpu_embed.set_bounds_check("off"):
        actual, _ = gradient(indices, 5, grad_output, padding_idx=3)
    expected = torch.zeros_like(actual)
    expected[0], expected[2] = grad_output[0], grad_output[2] + grad_output[4]
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("kind", ["equal", "zipf"])
@pytest.mark.parametrize("padding_idx", [None, 0])
def test_scale_grad_by_freq_divides_by_the_count(target, kind, padding_idx):
    """As torch: exact against torch in fp64, over runs that cross chunks."""
    indices = ids(kind, 150, 6, target.device)
    grad_output = integer_gradient((150, 3), torch.float64, target.device)
    arguments = {"padding_idx": padding_idx, "scale_grad_by_freq": True}
    actual, expected = gradient(indices, 6, grad_output, **arguments)
    theirs = torch.zeros(6, 3, dtype=torch.float64, requires_grad=True)
    torch.nn.functional.embedding(indices.cpu(), theirs, **arguments).backward(grad_output.cpu())
    # torch multiplies each term (at most 2) by 1 / count: two roundings a term, at most 150 terms.
    assert torch.allclose(actual.cpu(), theirs.grad, rtol=0, atol=150 * 2 * 2 * 2**-52)
    if target.backend != "torch":
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("scale_grad_by_freq", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_infinities_and_nans_stay_where_they_are(target, dtype, scale_grad_by_freq):
    """Accumulation: what overflows in one place of one row is finite everywhere else."""
    grad_output = torch.ones(70, 3, dtype=dtype, device=target.device)
    grad_output[0, 0], grad_output[69, 1] = float("inf"), float("nan")
    indices = torch.tensor([0] * 40 + [2] * 30, device=target.device)
    actual, _ = gradient(indices, 4, grad_output, scale_grad_by_freq=scale_grad_by_freq)
    counts = (1.0, 1.0) if scale_grad_by_freq else (40.0, 30.0)
    inf, nan = float("inf"), float("nan")
    expected = [[inf, counts[0], counts[0]], [0.0] * 3, [counts[1], nan, counts[1]], [0.0] * 3]
    # torch's CPU kernel multiplies by 1 / count, which is rounded.
    close = {"rtol": 0, "atol": 40 * 2 * 2**-24 if target.backend == "torch" else 0}
    assert torch.allclose(actual.float().cpu(), torch.tensor(expected), equal_nan=True, **close)


STRIDED_GRADIENTS = {
    "expanded scalar": lambda g: g[0, 0].expand(g.shape),
    "expanded row": lambda g: g[:1].expand(g.shape),
    "transposed": lambda g: g.t().contiguous().t(),
    "every other column": lambda g: g.repeat_interleave(2, 1)[:, ::2],
    "sliced row": lambda g: torch.cat([g, g], 1)[:, 1 : 1 + g.shape[1]],
}


@pytest.mark.parametrize("view", STRIDED_GRADIENTS.values(), ids=STRIDED_GRADIENTS)
def test_gradients_of_any_strides(target, method, view):
    """Exact copy, strides of grad_output: stride 0 (from .sum()) and transposed ones."""
    indices = ids("zipf", 40, 6, target.device)
    grad_output = view(integer_gradient((40, 12), torch.float32, target.device) + 1)
    actual, expected = gradient(indices, 6, grad_output)
    assert torch.equal(actual, expected)


STRIDED_BATCHES = {
    "transposed": lambda g: g.transpose(0, 1).contiguous().transpose(0, 1),
    "one row a text": lambda g: g[:, :1].expand(g.shape),
    "one text for all": lambda g: g[:1].expand(g.shape),
    "one column": lambda g: g[..., :1].expand(g.shape),
    "every other text and word": lambda g: g.repeat_interleave(2, 0).repeat_interleave(2, 1)[
        ::2, ::2
    ],
    "columns outside": lambda g: g.permute(2, 1, 0).contiguous().permute(2, 1, 0),
    "one text": lambda g: g[:1, None].transpose(0, 2),
    "lines of words, one text for all": lambda g: g[:1].unflatten(1, (5, 2)).expand(4, 5, 2, 12),
}


@pytest.mark.parametrize("view", STRIDED_BATCHES.values(), ids=STRIDED_BATCHES)
def test_gradients_of_batches_of_any_strides(target, method, view):
    """Texts by words by columns, whose rows no single stride leads through."""
    grad_output = view(integer_gradient((4, 10, 12), torch.float32, target.device) + 1)
    indices = ids("zipf", 40, 6, target.device)[: grad_output[..., 0].numel()]
    indices = indices.view(grad_output.shape[:-1])
    actual, expected = gradient(indices, 6, grad_output)
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("view", STRIDED_BATCHES.values(), ids=STRIDED_BATCHES)
def test_rows_of_a_batch_are_found_where_they_lie(view):
    """No copy, and as few rows as the gradient's memory holds: their distance decides how wide a kernel reads."""
    grad_output = view(torch.randn(4, 10, 12))
    matrix, steps = row_matrix(grad_output)
    rows = row_numbers(steps, matrix.device)
    assert matrix.data_ptr() == grad_output.data_ptr()
    assert matrix.stride(1) == grad_output.stride(-1)
    assert torch.equal(matrix if rows is None else matrix[rows], grad_output.reshape(-1, 12))
    if rows is not None:
        assert gcd(*rows.tolist()) == 1


def test_complex_tables_train(target):
    """Beyond torch, which refuses to differentiate complex lookups."""
    weight = table(4, 3, torch.complex64, target.device).requires_grad_()
    indices = torch.tensor([2, 0, 2], device=target.device)
    grad_output = torch.complex(torch.ones(3, 3), 2 * torch.ones(3, 3)).to(target.device)
    embedding(indices, weight).backward(grad_output)
    assert torch.equal(weight.grad[:, 0].cpu(), torch.tensor([1 + 2j, 0, 2 + 4j, 0]))


def test_float8_gradients_are_refused_as_torch_does(target):
    """As torch: torch has no gradient for 8-bit floats either."""
    weight = table(4, 3, torch.float8_e4m3fn, target.device).requires_grad_()
    output = embedding(torch.tensor([1], device=target.device), weight)
    with pytest.raises(NotImplementedError, match="not implemented for 'Float8_e4m3fn'"):
        output.backward(output.detach())


@pytest.mark.parametrize("method", ["sorted"], indirect=True)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_deterministic_gradients_repeat_bit_for_bit(target, method, dtype):
    """Determinism: torch.use_deterministic_algorithms(True) needs no atomics and raises no error."""
    generator = torch.Generator().manual_seed(5)
    # More chunks than one.
    grad_output = torch.randn(200, 3, generator=generator).to(dtype).to(target.device)
    indices = ids("zipf", 200, 20, target.device)
    torch.use_deterministic_algorithms(True)
    try:
        runs = [gradient(indices, 20, grad_output)[0] for _ in range(3)]
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(same_bits(run, runs[0]) for run in runs)
    assert not runs[0].isnan().any()


def sum_in_order(grad_output, indices, num_embeddings, chunk_size):
    """Each run of sorted ids, chunk by chunk: its rows from left to right, and so the sums of its chunks; in fp32."""
    order = indices.cpu().argsort(stable=True)
    grads, keys = grad_output.cpu().float()[order], indices.cpu()[order]
    total = torch.zeros(num_embeddings, grad_output.shape[1])
    for start in range(0, len(keys), chunk_size):
        part = torch.zeros_like(total)
        chunk = slice(start, start + chunk_size)
        for key, grad in zip(keys[chunk].tolist(), grads[chunk], strict=True):
            part[key] += grad
        total += part
    return total.to(grad_output.dtype)


@pytest.mark.parametrize("method", ["sorted"], indirect=True)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["uniform", "equal", "zipf"])
@where(has_kernels)
def test_all_kernels_add_in_the_same_order(target, method, dtype, kind):
    """Determinism: the bits of each backend are those of the order that is written down in numerics.md."""
    grad_output = torch.randn(700, 12, generator=torch.Generator().manual_seed(6)).to(dtype)
    grad_output = grad_output.to(target.device)
    indices = ids(kind, 700, 40, target.device)
    expected = sum_in_order(grad_output, indices, 40, chunk_size(700, 12, 4))
    assert same_bits(gradient(indices, 40, grad_output)[0].cpu(), expected)


@pytest.mark.parametrize(
    ("num_indices", "num_embeddings", "dtype", "deterministic", "scale", "expected"),
    [
        (4096, 50_000, torch.float32, False, False, "atomic"),
        (4096, 50_000, torch.float64, False, False, "atomic"),
        (4096, 50_000, torch.bfloat16, False, False, "sorted"),
        (4096, 50_000, torch.float16, False, False, "sorted"),
        (4096, 50_000, torch.float32, True, False, "sorted"),
        (4096, 50_000, torch.float32, False, True, "sorted"),
        (1024, 2, torch.float32, False, False, "atomic"),
        (1025, 2, torch.float32, False, False, "sorted"),
        (4096, 8192, torch.float64, False, False, "atomic"),
        (4096, 8191, torch.float64, False, False, "sorted"),
    ],
)
def test_the_choice_of_method(num_indices, num_embeddings, dtype, deterministic, scale, expected):
    """Determinism: never atomics where determinism is asked for, nor for 16-bit tables."""
    chosen = choose(num_indices, num_embeddings, dtype, deterministic, scale)
    assert chosen == expected


def test_only_methods_that_are_known_to_pay_are_chosen():
    forced_only = {name for name, limits in LIMITS.items() if {*limits.values()} == {Limit()}}
    assert forced_only == {"sorted_atomic"}
    assert GRADIENT_METHOD.choices == ("auto", *RULES)


REFUSALS = {
    "atomic-bf16": ("atomic", torch.bfloat16, (4, 4), {}, "a gradient of torch.bfloat16"),
    "sorted_atomic-fp16": (
        "sorted_atomic",
        torch.float16,
        (4, 4),
        {},
        "a gradient of torch.float16",
    ),
    **{
        f"{method}-scale": (
            method,
            torch.float32,
            (4, 4),
            {"scale_grad_by_freq": True},
            "scale_grad_by_f",
        )
        for method in METHODS
        if method != "sorted"
    },
}


@pytest.mark.parametrize(
    ("method", "dtype", "shape", "arguments", "reason"),
    REFUSALS.values(),
    ids=REFUSALS,
    indirect=["method"],
)
def test_a_forced_method_that_cannot_serve_is_an_error(
    target, method, dtype, shape, arguments, reason
):
    """Forced choice, for the gradient method: no silent fallback; the error says what to do."""
    weight = table(*shape, dtype, target.device).requires_grad_()
    output = embedding(torch.tensor([1], device=target.device), weight, **arguments)
    message = f"gradient method '{method}' is forced but cannot serve {reason}.*use_gradient_method"
    with pytest.raises(RuntimeError, match=message):
        output.sum().backward()


def test_methods_that_are_not_deterministic_are_refused(target, method):
    """Determinism: even a forced method does not break the promise."""
    grad_output = integer_gradient((2, 4), torch.float32, target.device)
    indices = torch.tensor([1, 1], device=target.device)
    torch.use_deterministic_algorithms(True)
    try:
        if method == "sorted":
            gradient(indices, 2, grad_output)
        else:
            with pytest.raises(RuntimeError, match=f"'{method}' is forced .*deterministic"):
                gradient(indices, 2, grad_output)
    finally:
        torch.use_deterministic_algorithms(False)


KERNELS_OF = {
    "atomic": ["scatter_add_kernel"],
    "sorted_atomic": ["sort_keys_kernel", "segment_sum_kernel"],
    "sorted": ["sort_keys_kernel", *["segment_sum_kernel"] * 2],
}


@where(has_kernels)
def test_a_forced_method_launches_its_own_kernels(target, method, monkeypatch):
    """Forced choice: what is asked for is what runs."""
    backend = backends.load(target.backend)
    launched = []

    def launch(kernel, *arguments, **settings):
        launched.append(getattr(kernel, "__name__", None) or kernel.expression.split("<")[0])
        return type(backend)._launch(backend, kernel, *arguments, **settings)

    monkeypatch.setattr(backend, "_launch", launch)
    indices = ids("zipf", 64, 9, target.device)
    grad_output = integer_gradient((64, 4), torch.float32, target.device)
    backend.embedding_dense_backward(grad_output, indices, 9, -1, False)
    assert launched == KERNELS_OF[method]


def test_the_default_dtype_does_not_matter(target):
    indices = torch.tensor([1, 1], device=target.device)
    grad_output = torch.ones(2, 3, dtype=torch.bfloat16, device=target.device)
    torch.set_default_dtype(torch.float64)
    try:
        actual, _ = gradient(indices, 2, grad_output)
    finally:
        torch.set_default_dtype(torch.float32)
    assert actual.tolist() == [[0] * 3, [2] * 3]


def test_an_empty_table_has_an_empty_gradient(target):
    """Bounds: every id is out of range, and none has a gradient."""
    indices = torch.tensor([0, 4], device=target.device)
    with gpu_embed.set_bounds_check("off"):
        actual, _ = gradient(indices, 0, torch.ones(2, 3, device=target.device))
    assert actual.shape == (0, 3)
