"""override_aten: torch's own lookup on our kernels, while a block runs and not a moment longer."""

import threading
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from cases import FORWARD_DTYPES, GRADIENT_DTYPES, integer_gradient, same_bits, table
from targets import Target
from torch import nn

import gpu_embed
from gpu_embed import backends, override_aten

OPERATORS = ("aten::embedding", "aten::embedding_dense_backward")


def registrations() -> list[str]:
    """All that the dispatcher knows of both operators."""
    return [torch._C._dispatch_dump(name) for name in OPERATORS]


BEFORE = registrations()


@pytest.fixture(autouse=True)
def no_leak():
    yield
    assert registrations() == BEFORE


@pytest.fixture
def routed(monkeypatch):
    """How often the forced backend was asked for each operation."""
    if not hasattr(torch.library, "get_kernel"):
        pytest.skip("this torch has no torch.library.get_kernel")
    counted = Counter()

    def count(backend, name):
        method = getattr(backend, name)

        def counting(*args):
            counted[name] += 1
            return method(*args)

        monkeypatch.setattr(backend, name, counting)

    for name in ("triton", "cupy", "torch", "reference"):
        for operation in ("embedding", "embedding_dense_backward"):
            count(backends.load(name), operation)
    return counted


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    """Where the triton backend is forced; on the CPU it takes the interpreter."""
    reason = backends.load("triton").unusable_reason(torch.device(request.param))
    if reason is not None:
        pytest.skip(reason)
    with gpu_embed.use_backend("triton"):
        yield request.param
        gpu_embed.check_bounds()


BOTH = {"embedding": 1, "embedding_dense_backward": 1}


def look_up(weight, indices, grad_output, **arguments):
    weight = weight.clone().requires_grad_()
    output = F.embedding(indices, weight, **arguments)
    output.backward(grad_output)
    return output.detach(), weight.grad


@pytest.mark.parametrize("ids_dtype", [torch.int64, torch.int32], ids=str)
@pytest.mark.parametrize("dtype", GRADIENT_DTYPES, ids=str)
def test_functional_calls_are_routed(device, routed, dtype, ids_dtype):
    weight = table(7, 5, dtype, device)
    indices = torch.tensor([[5, 1, 0], [1, 6, 1]], device=device, dtype=ids_dtype)
    grad_output = integer_gradient((2, 3, 5), dtype, device)
    for arguments in ({}, {"padding_idx": -6}, {"scale_grad_by_freq": True}):
        expected = look_up(weight, indices, grad_output, **arguments)
        assert not routed
        with override_aten():
            actual = look_up(weight, indices, grad_output, **arguments)
        assert routed == BOTH
        routed.clear()
        assert same_bits(actual[0], expected[0])
        if arguments.get("scale_grad_by_freq"):
            # Divided by the count, or multiplied by its inverse.
            torch.testing.assert_close(actual[1], expected[1])
        else:
            assert torch.equal(actual[1], expected[1])


@pytest.mark.parametrize("dtype", FORWARD_DTYPES, ids=str)
def test_every_dtype_is_looked_up(device, routed, dtype):
    weight = table(7, 5, dtype, device)
    indices = torch.tensor([5, 1], device=device)
    with override_aten():
        output = F.embedding(indices, weight)
    assert routed == {"embedding": 1}
    assert same_bits(output[0], weight[5])
    assert same_bits(output[1], weight[1])


def test_subclasses_are_routed(device, routed):
    class Scaled(nn.Embedding):
        def forward(self, input):
            return super().forward(input) * 2

    layer = Scaled(7, 5, device=device)
    with override_aten():
        layer(torch.tensor([5, 1], device=device)).sum().backward()
    assert routed == BOTH
    assert layer.weight.grad[:, 0].tolist() == [0, 2, 0, 0, 0, 2, 0]


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_scripted_models_are_routed(device, routed):
    layer = torch.jit.script(nn.Sequential(nn.Embedding(7, 5, device=device)))
    with override_aten():
        layer(torch.tensor([5, 1], device=device)).sum().backward()
    assert routed["embedding"] == routed["embedding_dense_backward"] == 1


@pytest.mark.full
def test_double_backward_and_vmap(device, routed):
    weight = table(7, 5, torch.float64, device).requires_grad_()
    indices = torch.tensor([5, 1, 1], device=device)
    with override_aten():
        assert torch.autograd.gradcheck(lambda w: F.embedding(indices, w), weight)
        assert torch.autograd.gradgradcheck(lambda w: F.embedding(indices, w), weight)
        tables = torch.stack([weight.detach(), 2 * weight.detach()])
        output = torch.func.vmap(F.embedding, (None, 0))(indices, tables)
    assert routed["embedding"] > 2
    assert routed["embedding_dense_backward"] > 2
    assert torch.equal(output, tables[:, indices])


def test_no_grad_and_inference_mode(device, routed):
    weight = table(7, 5, torch.float32, device)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode(), override_aten():
            output = F.embedding(torch.tensor([5], device=device), weight)
        assert torch.equal(output[0], weight[5])
    assert routed == {"embedding": 2}


def outcome(call):
    """What a call returns, or the error that it raises."""
    try:
        return call().tolist()
    except (RuntimeError, NotImplementedError) as error:
        return type(error), str(error)


def test_what_our_kernels_do_not_serve_goes_to_torch(device, routed):
    """The errors are torch's, word for word."""
    weight = table(7, 5, torch.float32, device)
    indices = torch.tensor([5, 1], device=device)
    rows = weight[:2]
    backward = torch.ops.aten.embedding_dense_backward
    calls = {
        "ids of a narrow dtype": lambda: torch.embedding(weight, indices.to(torch.uint8)),
        "ids that are no integers": lambda: torch.embedding(weight, indices.float()),
        "a table of one dimension": lambda: torch.embedding(weight[0], indices),
        "an integer gradient": lambda: backward(rows.int(), indices, 7, -1, False),
        "of another shape": lambda: backward(rows, indices[None], 7, -1, False),
    }
    if device == "cuda":
        calls["two devices"] = lambda: torch.embedding(weight, indices.cpu())
    for name, call in calls.items():
        expected = outcome(call)
        with override_aten():
            assert outcome(call) == expected, name
    assert not routed


def test_ids_out_of_range_raise(device, routed):
    """Bounds are checked in torch's own function too."""
    weight = table(7, 5, torch.float32, device)
    with (
        override_aten(),
        gpu_embed.set_bounds_check("sync"),
        pytest.raises(IndexError, match=r"id 7 at flat position 1 .* has 7 rows"),
    ):
        F.embedding(torch.tensor([5, 7], device=device), weight)
    assert routed == {"embedding": 1}


def test_the_torch_backend_finds_torchs_kernels():
    """It calls the operators that are replaced: one of them must not lead to the other without end."""
    weight = table(7, 5, torch.float32, "cpu").requires_grad_()
    indices = torch.tensor([5, 1])
    for name in ("torch", "auto"):
        with gpu_embed.use_backend(name), override_aten():
            output = gpu_embed.functional.embedding(indices, weight)
            F.embedding(indices, weight).sum().backward()
            output.sum().backward()
        assert torch.equal(output, weight[indices])
        assert weight.grad[:, 0].tolist() == [0, 2, 0, 0, 0, 2, 0]
        weight.grad = None


def test_our_own_layer_inside(target: Target):
    """A swapped model in the block: each lookup is served once."""
    weight = table(7, 5, torch.float32, target.device)
    layer = gpu_embed.Embedding.from_pretrained(weight, freeze=False)
    indices = torch.tensor([5, 1, 1], device=target.device)
    with override_aten():
        output = layer(indices)
        output.backward(torch.ones_like(output))
    assert torch.equal(output, weight[indices])
    assert layer.weight.grad[:, 0].tolist() == [0, 2, 0, 0, 0, 1, 0]


# Its end.


def is_routed(routed, device="cpu"):
    routed.clear()
    F.embedding(torch.tensor([1], device=device), torch.ones(2, 3, device=device))
    return bool(routed)


def test_blocks_nest(device, routed):
    with override_aten():
        with override_aten():
            inside = registrations()
        assert registrations() == inside != BEFORE
        assert is_routed(routed, device)
    assert not is_routed(routed, device)
    assert registrations() == BEFORE


def test_it_undoes_itself_on_exceptions(device, routed):
    for error in (ValueError, KeyboardInterrupt, GeneratorExit):
        with pytest.raises(error), override_aten(), override_aten():
            raise error
        assert not is_routed(routed, device)
        assert registrations() == BEFORE
    with override_aten():
        assert is_routed(routed, device)


def test_as_a_decorator(device, routed):
    @override_aten()
    def decorated():
        return is_routed(routed, device)

    assert [decorated(), is_routed(routed, device), decorated()] == [True, False, True]


def test_it_holds_for_all_threads_until_the_last_block_ends(device, routed):
    opened, ended = threading.Event(), threading.Event()

    def hold():
        with override_aten():
            opened.set()
            ended.wait(30)

    other = threading.Thread(target=hold)
    with override_aten():
        other.start()
        assert opened.wait(30)
    assert is_routed(routed, device)
    ended.set()
    other.join()
    assert not is_routed(routed, device)


def test_a_block_that_cannot_begin_changes_nothing(monkeypatch):
    def get_kernel(name, key, get_kernel=torch.library.get_kernel):
        if name.endswith("backward"):
            raise RuntimeError("no kernel")
        return get_kernel(name, key)

    with monkeypatch.context() as patch:
        patch.setattr(torch.library, "get_kernel", get_kernel)
        with pytest.raises(RuntimeError, match="no kernel") as error, override_aten():
            raise AssertionError
        # While the error's traceback still holds all that there was.
        assert registrations() == BEFORE
        assert error.traceback
        patch.delattr(torch.library, "get_kernel")
        with (
            pytest.raises(RuntimeError, match=r"needs torch\.library\.get_kernel"),
            override_aten(),
        ):
            raise AssertionError
    with override_aten():
        assert registrations() != BEFORE


def test_where_no_kernel_of_ours_runs_nothing_is_registered(monkeypatch):
    triton = backends.load("triton")
    monkeypatch.setattr(triton, "unusable_reason", lambda device: "broken")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with override_aten():
        assert registrations() == BEFORE


def test_an_override_that_was_there_before_stays(device):
    """Another library's kernel is what ours falls back on, and what is there afterwards."""
    called = []

    def theirs(weight, indices, *_):
        called.append(indices)
        return weight.index_select(0, indices)

    weight, indices = table(7, 5, torch.float32, device), torch.tensor([5], device=device)
    with torch.library._scoped_library("aten", "IMPL") as library:
        library.impl("embedding", theirs, device.upper())
        with override_aten():
            F.embedding(indices, weight)
            assert len(called) == 0
            with gpu_embed.use_backend("torch"):
                F.embedding(indices, weight)
            assert len(called) == 1
        F.embedding(indices, weight)
        assert len(called) == 2
