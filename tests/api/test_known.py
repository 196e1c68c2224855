"""Tables that were looked up before: the short way gives what the long way gives, and knows when it may not."""

import gc
import math
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.utils.checkpoint
from cases import GRADIENT_DTYPES, integer_gradient, same_bits, table
from targets import Target
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import Parameter

import gpu_embed
from gpu_embed.functional import embedding
from gpu_embed.ops.known import known_tables


def known_parameter(device: str, dtype: torch.dtype = torch.float32, **arguments: Any) -> Parameter:
    """A table [10, 4] that has been looked up once, with these arguments."""
    # One just like it, which is gone, may have been looked up with others.
    known_tables.clear()
    weight = Parameter(table(10, 4, dtype, device))
    # What is known of a table that is gone, of this address and id, has its arguments.
    known_tables.pop(id(weight), None)
    embedding(torch.tensor([1], device=device), weight, **arguments)
    assert id(weight) in known_tables
    return weight


@pytest.fixture
def weight() -> Parameter:
    return known_parameter("cpu")


IDS = torch.tensor([[3, 0, 9], [3, 3, 1]])


@pytest.mark.parametrize("dtype", GRADIENT_DTYPES)
def test_second_lookup_is_the_first(target: Target, dtype: torch.dtype) -> None:
    weight = known_parameter(target.device, dtype)
    ids = IDS.to(target.device)
    output = embedding(ids, weight)
    assert same_bits(output.detach(), weight.detach()[ids])
    grad_output = integer_gradient((2, 3, 4), dtype, target.device)
    output.backward(grad_output)
    expected = torch.zeros(10, 4, dtype=dtype, device=target.device)
    expected.index_add_(0, ids.flatten(), grad_output.flatten(0, 1))
    assert weight.grad is not None
    assert torch.equal(weight.grad, expected)


@pytest.mark.parametrize(
    "ids",
    [
        torch.empty(0, dtype=torch.int64),
        torch.empty(2, 0, 3, dtype=torch.int64),
        torch.tensor(4),
        torch.arange(10)[::3],
        torch.arange(6).view(2, 3).T,
        torch.tensor([2, 5], dtype=torch.uint8),
    ],
    ids=["empty", "empty-3d", "0d", "strided", "transposed", "uint8"],
)
def test_ids_of_every_form(target: Target, ids: Tensor) -> None:
    weight = known_parameter(target.device)
    output = embedding(ids.to(target.device), weight)
    assert torch.equal(output.cpu(), weight.detach().cpu()[ids.long()])
    assert output.is_contiguous()


def test_ids_out_of_range_are_reported(target: Target) -> None:
    weight = known_parameter(target.device)
    with gpu_embed.set_bounds_check("sync"):
        embedding(IDS.to(target.device), weight)
        with pytest.raises(IndexError, match=r"id 10 at position \(0, 1\)"):
            embedding(torch.tensor([[1, 10]], device=target.device), weight)
    with gpu_embed.set_bounds_check("off"):
        output = embedding(torch.tensor([1, 10], device=target.device), weight)
    assert torch.equal(output[1].cpu(), torch.zeros(4))


def shorter(weight: Parameter) -> None:
    weight.data = weight.data[:3]


def transposed(weight: Parameter) -> None:
    weight.data = weight.data[:4].T


def half(weight: Parameter) -> None:
    weight.data = weight.data.view(torch.float16)[:, :4]


def elsewhere(weight: Parameter) -> None:
    weight.data = weight.data + 1


def in_place(weight: Parameter) -> None:
    weight.data.add_(1)


@pytest.mark.parametrize("change", [shorter, transposed, half, elsewhere, in_place])
def test_changed_table(target: Target, change: Callable[[Parameter], None]) -> None:
    weight = known_parameter(target.device)
    change(weight)
    ids = torch.tensor([2, 0], device=target.device)
    for _ in range(2):
        assert same_bits(embedding(ids, weight).detach(), weight.detach()[ids])
    with gpu_embed.set_bounds_check("sync"), pytest.raises(IndexError):
        embedding(torch.tensor([len(weight)], device=target.device), weight)


def test_backend_chosen_later(weight: Parameter, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = gpu_embed.backends.load("reference")
    calls = []
    look_up = type(backend).embedding

    def counted(self: Any, *args: Any) -> Tensor:
        calls.append(args)
        return look_up(self, *args)

    monkeypatch.setattr(type(backend), "embedding", counted)
    with gpu_embed.use_backend("reference"):
        embedding(IDS, weight)
        assert len(calls) == 1
        embedding(IDS, weight)
        assert len(calls) == 2
    embedding(IDS, weight)
    assert len(calls) == 2


@pytest.fixture(params=["its own node", "ours"])
def node(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Which node known tables have on the CPU: what is tested with both is the same with both."""
    if request.param == "ours":
        looked_up = torch.embedding

        def refuse(weight: Tensor, indices: Tensor, *arguments: Any) -> Tensor:
            if arguments:
                raise IndexError
            return looked_up(weight, indices)

        monkeypatch.setattr(torch, "embedding", refuse)
    return str(request.param)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("id_dtype", [torch.int64, torch.int32, torch.uint8])
@pytest.mark.parametrize("padding_idx", [None, 3, -1])
@pytest.mark.parametrize("shape", [(6,), (2, 3), (), (0,), (2, 0, 3)], ids=str)
@pytest.mark.full
def test_first_and_second_derivatives(
    node: str,
    dtype: torch.dtype,
    id_dtype: torch.dtype,
    padding_idx: int | None,
    shape: tuple[int, ...],
) -> None:
    weight = known_parameter("cpu", dtype, padding_idx=padding_idx)
    ids = torch.tensor([3, 9, 3, 0, 9, 3])[: math.prod(shape)].view(shape).to(id_dtype)
    output = embedding(ids, weight, padding_idx)
    grad_output = integer_gradient((*shape, 4), dtype, "cpu").requires_grad_()
    (grad,) = torch.autograd.grad(output, weight, grad_output, create_graph=True)
    kept = torch.ones(10, 1, dtype=dtype)
    if padding_idx is not None:
        kept[padding_idx] = 0
    expected = torch.zeros(10, 4, dtype=dtype)
    expected.index_add_(0, ids.long().flatten(), grad_output.detach().view(-1, 4))
    assert torch.equal(grad, expected * kept)
    assert grad.stride() == (4, 1)
    (second,) = torch.autograd.grad(grad, grad_output, weight.detach(), create_graph=True)
    assert torch.equal(second, (weight.detach() * kept)[ids.long()])


def as_given(grad_output: Tensor) -> Tensor:
    return grad_output


def by_columns(grad_output: Tensor) -> Tensor:
    return grad_output.transpose(0, -1).contiguous().transpose(0, -1)


def expanded(grad_output: Tensor) -> Tensor:
    return grad_output[:1].expand(grad_output.shape)


def off_by_one(grad_output: Tensor) -> Tensor:
    """At an address that is no multiple of 16."""
    memory = grad_output.new_empty(grad_output.numel() + 1)
    memory[1:] = grad_output.flatten()
    return memory[1:].view(grad_output.shape)


@pytest.mark.parametrize("given", [as_given, by_columns, expanded, off_by_one])
@pytest.mark.parametrize("ids", ["adjacent", "apart", "uint8", "none"])
@pytest.mark.parametrize("method", ["auto", "deterministic", "sorted"])
@pytest.mark.full
def test_gradients_of_known_tables(
    target: Target, given: Callable[[Tensor], Tensor], ids: str, method: str
) -> None:
    """Those that a backend prepares, and those that it cannot."""
    weight = known_parameter(target.device, padding_idx=9)
    indices = torch.tensor([3, 0, 9, 3, 3, 1, 10, -1])
    indices = {
        "adjacent": indices,
        "apart": indices.repeat_interleave(2)[::2],
        "uint8": indices.to(torch.uint8),
        "none": indices[:0],
    }[ids].to(target.device)
    with gpu_embed.set_bounds_check("off"):
        embedding(indices, weight, 9)
        for _ in range(3):
            output = embedding(indices, weight, 9)
            grad_output = given(integer_gradient(output.shape, torch.float32, target.device))
            torch.use_deterministic_algorithms(method == "deterministic")
            try:
                with gpu_embed.use_gradient_method("sorted" if method == "sorted" else "auto"):
                    (grad,) = torch.autograd.grad(output, weight, grad_output)
            finally:
                torch.use_deterministic_algorithms(False)
            kept = (indices.long() >= 0) & (indices.long() < 9)
            expected = torch.zeros(10, 4, device=target.device)
            expected.index_add_(0, indices.long()[kept], grad_output[kept])
            assert torch.equal(grad, expected)


def test_the_node_is_torch_s_where_it_does_what_ours_does() -> None:
    def name(ids: Tensor = IDS, dtype: torch.dtype = torch.float32, **arguments: Any) -> str:
        weight = known_parameter("cpu", dtype, **arguments)
        output = embedding(ids, weight, **arguments)
        assert output.grad_fn is not None
        return str(output.grad_fn.name())

    theirs = "EmbeddingBackward0"
    assert name() == name(IDS.int()) == name(dtype=torch.float64, padding_idx=3) == theirs
    # It sums 16-bit numbers in 16 bits, has no int16 ids, and raises or is wrong in second derivatives of the others.
    for other in (
        {"dtype": torch.bfloat16},
        {"ids": IDS.short()},
        {"ids": IDS[:0]},
        {"sparse": True},
        {"scale_grad_by_freq": True},
    ):
        assert name(**other) == "KnownEmbeddingBackward", other  # type: ignore[arg-type]
    with gpu_embed.use_backend("reference"):
        assert name() == "KnownEmbeddingBackward"


def test_second_derivatives_that_torch_has_not() -> None:
    """Over the counts; and of sparse gradients of one padding id."""
    weight = known_parameter("cpu", scale_grad_by_freq=True)
    grad_output = torch.ones(2, 3, 4, requires_grad=True)
    output = embedding(IDS, weight, scale_grad_by_freq=True)
    (grad,) = torch.autograd.grad(output, weight, grad_output, create_graph=True)
    (second,) = torch.autograd.grad(grad, grad_output, weight.detach())
    counts = torch.tensor([[3, 1, 1], [3, 3, 1]])[..., None]
    assert torch.equal(second, weight.detach()[IDS] / counts)
    weight = known_parameter("cpu", sparse=True, padding_idx=3)
    embedding(torch.tensor(3), weight, 3, sparse=True).sum().backward()
    assert weight.grad is not None
    assert weight.grad._nnz() == 0


@pytest.mark.full
def test_gradients_of_many_outputs_at_once(node: str, weight: Parameter) -> None:
    many = integer_gradient((5, 2, 3, 4), torch.float32, "cpu")
    output = embedding(IDS, weight)
    (grads,) = torch.autograd.grad(output, weight, many, is_grads_batched=True)
    for grad_output, grad in zip(many, grads, strict=True):
        expected = torch.zeros(10, 4).index_add_(0, IDS.flatten(), grad_output.flatten(0, 1))
        assert torch.equal(grad, expected)


@pytest.mark.full
def test_hooks_of_saved_tensors_see_the_ids(node: str, weight: Parameter) -> None:
    seen = []

    def pack(saved: Tensor) -> Tensor:
        seen.append(saved)
        return saved + 1

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved - 1):
        output = embedding(IDS, weight)
    assert len(seen) == 1
    assert torch.equal(seen[0], IDS)
    again = torch.utils.checkpoint.checkpoint(embedding, IDS, weight, use_reentrant=False)
    (output + again).sum().backward()
    assert weight.grad is not None
    assert weight.grad[:, 0].tolist() == [2, 2, 0, 6, 0, 0, 0, 0, 0, 2]


def test_an_id_out_of_range_has_no_gradient(node: str, weight: Parameter) -> None:
    with gpu_embed.set_bounds_check("off"):
        embedding(IDS, weight)
        embedding(torch.tensor([10, 2, -1]), weight).sum().backward()
    assert weight.grad is not None
    assert weight.grad[:, 0].tolist() == [0, 0, 1, 0, 0, 0, 0, 0, 0, 0]


def test_other_arguments(weight: Parameter) -> None:
    ids = torch.tensor([1, 3, 3])
    embedding(ids, weight, padding_idx=3).sum().backward()
    assert weight.grad is not None
    assert weight.grad[:, 0].tolist() == [0, 1, 0, 0, 0, 0, 0, 0, 0, 0]
    weight.grad = None
    embedding(ids, weight, scale_grad_by_freq=True).sum().backward()
    assert weight.grad[3, 0] == 1
    weight.grad = None
    embedding(ids, weight, sparse=True).sum().backward()
    assert weight.grad.is_sparse
    assert embedding(ids, weight, max_norm=0.5).norm(dim=1).max() <= 0.5001


@pytest.mark.parametrize(
    "arguments",
    [
        {"padding_idx": True},
        {"padding_idx": 1.0},
        {"scale_grad_by_freq": 0},
        {"sparse": 1},
        {"max_norm": "1"},
    ],
    ids=str,
)
def test_errors_stay(arguments: dict[str, Any]) -> None:
    weight = Parameter(table(10, 4, torch.float32, "cpu"))
    embedding(IDS, weight, padding_idx=1)
    for _ in range(2):
        with pytest.raises(TypeError):
            embedding(IDS, weight, **arguments)


@pytest.mark.parametrize("input", [[1, 2], None, torch.tensor([1.0]), torch.tensor([True])])
def test_wrong_ids(weight: Parameter, input: Any) -> None:
    with pytest.raises((TypeError, RuntimeError)):
        embedding(input, weight)


def test_lazily_negative_ids(weight: Parameter) -> None:
    assert torch.equal(embedding(torch._neg_view(-IDS), weight), weight[IDS])


def test_transforms_see_a_known_table(weight: Parameter) -> None:
    ids = torch.tensor([1, 1, 2])
    rows = torch.func.vmap(lambda i: embedding(i, weight))(ids)
    assert torch.equal(rows, weight[ids])
    graph = make_fx(lambda i: embedding(i, weight))(ids)
    assert "gpu_embed.embedding" in graph.code
    graph = make_fx(lambda i: embedding(i, weight), pre_dispatch=True)(ids)
    assert "gpu_embed.embedding" in graph.code
    assert torch.equal(torch.compile(embedding, backend="eager")(ids, weight), weight[ids])
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(weight, torch.ones_like(weight))
        tangent = torch.autograd.forward_ad.unpack_dual(embedding(ids, dual)).tangent
    assert torch.equal(tangent, torch.ones(3, 4))


def test_double_backward(weight: Parameter) -> None:
    output = embedding(IDS, weight)
    grad_output = torch.ones_like(output, requires_grad=True)
    (grad_weight,) = torch.autograd.grad(output, weight, grad_output, create_graph=True)
    (grad,) = torch.autograd.grad(grad_weight, grad_output, weight.detach())
    assert torch.equal(grad, weight[IDS])


def test_ids_changed_after_the_lookup(weight: Parameter) -> None:
    ids = IDS.clone()
    output = embedding(ids, weight)
    ids.add_(0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


def test_profiler_sees_the_operator(weight: Parameter) -> None:
    with torch.profiler.profile() as profile:
        embedding(IDS, weight)
    assert "gpu_embed::embedding" in {event.key for event in profile.key_averages()}


def test_inference_mode(weight: Parameter) -> None:
    with torch.inference_mode():
        assert embedding(IDS, weight).is_inference()
    assert not embedding(IDS, weight).is_inference()


@pytest.mark.full
def test_tables_are_not_kept_alive(target: Target) -> None:
    weight = known_parameter(target.device)
    embedding(IDS.to(target.device), weight).sum().backward()
    # Not to the Parameter: an entry by a weak reference to it would keep it from being swapped.
    data = weakref.ref(weight.untyped_storage())
    del weight
    gc.collect()
    assert data() is None
