"""gpu_embed.EmbeddingBag where torch.nn.EmbeddingBag stood: what other code asks of it, and its errors."""

import copy
import inspect
import io
import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F
from cases import integer_gradient
from tiers import where
from torch import fx, nn
from torch.utils._python_dispatch import TorchDispatchMode

import gpu_embed
from gpu_embed.functional import embedding_bag

LAYERS = (gpu_embed.EmbeddingBag, nn.EmbeddingBag)
# torch's own: jagged tensors are a prototype there.
pytestmark = pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype")

CONSTRUCTED = {
    "plain": {},
    "sum": {"mode": "sum"},
    "max with padding": {"mode": "max", "padding_idx": 1},
    "padding from the end": {"padding_idx": -2},
    "first row is padding": {"padding_idx": 0},
    "max_norm": {"max_norm": 1.5, "norm_type": 1.0},
    "scaled": {"scale_grad_by_freq": True},
    "sparse": {"sparse": True},
    "last offset": {"include_last_offset": True},
    "given": {"_weight": torch.arange(15.0).view(5, 3)},
    "float64": {"dtype": torch.float64},
    "meta": {"device": "meta"},
}
constructed = pytest.mark.parametrize("arguments", CONSTRUCTED.values(), ids=CONSTRUCTED)


def pair(*args, **kwargs):
    """Our layer and torch's, made from the same seed."""
    layers = []
    for layer in LAYERS:
        torch.manual_seed(0)
        layers.append(layer(*args, **kwargs))
    return layers


IDS = torch.tensor([[4, 1, 1, 0], [2, 2, 3, 3]])
OFFSETS = torch.tensor([0, 2, 8])


# The class.


def test_only_forward_is_overridden():
    """Drop-in: subclass, override forward and a sharded padding row's zeros; a new torch brings the rest."""
    generated = {"__module__", "__doc__", "__firstlineno__", "__static_attributes__"}
    assert set(vars(gpu_embed.EmbeddingBag)) - generated == {
        "forward",
        "from_pretrained",
        "_fill_padding_idx_with_zero",
    }
    assert gpu_embed.EmbeddingBag.__mro__[1] is nn.EmbeddingBag


def test_signatures_are_torchs():
    """As torch: every argument by the same name, in the same place, with the same default."""
    assert inspect.signature(gpu_embed.EmbeddingBag) == inspect.signature(nn.EmbeddingBag)
    for ours, theirs in (
        (embedding_bag, F.embedding_bag),
        (gpu_embed.EmbeddingBag.forward, nn.EmbeddingBag.forward),
    ):
        parameters = [
            [(p.name, p.kind, p.default) for p in inspect.signature(f).parameters.values()]
            for f in (ours, theirs)
        ]
        assert parameters[0] == parameters[1]


@constructed
def test_attributes_state_and_repr_are_torchs(arguments):
    """Drop-in: others read them."""
    ours, theirs = pair(5, 3, **arguments)
    assert repr(ours) == repr(theirs)
    assert ours.__constants__ == theirs.__constants__
    for name in ours.__constants__:
        assert getattr(ours, name) == getattr(theirs, name)
    assert type(ours.weight) is nn.Parameter
    assert list(ours.state_dict()) == list(theirs.state_dict()) == ["weight"]
    if ours.weight.device.type != "meta":
        assert torch.equal(ours.weight, theirs.weight)


@where(lambda arguments: arguments.get("device") != "meta")
@constructed
def test_the_layer_equals_torchs(target, arguments):
    """As torch: no argument is ignored, and no result differs."""
    ours, theirs = (layer.double().to(target.device) for layer in pair(5, 3, **arguments))
    indices = IDS.to(target.device)
    # Some 20 roundings of numbers below 10.
    close = {"rtol": 0, "atol": 200 * 2**-53}
    for given in ((indices,), (indices.flatten(), OFFSETS.to(target.device))):
        output, expected = ours(*given), theirs(*given)
        assert torch.allclose(output, expected, **close)
        assert torch.allclose(ours.weight, theirs.weight, **close)
        grad_output = integer_gradient(tuple(output.shape), output.dtype, target.device)
        for layer, result in ((ours, output), (theirs, expected)):
            layer.weight.grad = None
            result.backward(grad_output)
        if not ours.scale_grad_by_freq:  # torch's CPU kernel divides by another id's count
            grads = [layer.weight.grad.to_dense() for layer in (ours, theirs)]
            assert torch.allclose(*grads, **close)


@pytest.mark.parametrize("freeze", [True, False])
def test_from_pretrained_makes_our_layer(target, freeze):
    weight = torch.arange(15.0, device=target.device).view(5, 3)
    layer = gpu_embed.EmbeddingBag.from_pretrained(
        weight, freeze, mode="max", padding_idx=4, include_last_offset=True
    )
    assert type(layer) is gpu_embed.EmbeddingBag
    assert layer.weight.requires_grad is not freeze
    output = layer(IDS.flatten().to(target.device), OFFSETS.to(target.device))
    assert torch.equal(output, weight[[1, 3]])


@constructed
def test_copies_and_files_keep_everything(arguments):
    """Drop-in: deepcopy, pickle, torch.save, state_dict in both directions."""
    ours, theirs = pair(5, 3, **arguments)
    copies = [copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))]
    if ours.weight.device.type != "meta":
        file = io.BytesIO()
        torch.save(ours, file)
        file.seek(0)
        copies.append(torch.load(file, weights_only=False))
        loaded = gpu_embed.EmbeddingBag(5, 3, dtype=ours.weight.dtype)
        loaded.load_state_dict(theirs.state_dict())
        theirs.load_state_dict(loaded.state_dict())
    for other in copies:
        assert type(other) is gpu_embed.EmbeddingBag
        assert repr(other) == repr(ours)
        if ours.weight.device.type != "meta":
            assert torch.equal(other.weight, ours.weight)


def test_the_weights_of_samples_reach_the_kernel(target):
    layer = gpu_embed.EmbeddingBag(5, 3, mode="sum", device=target.device)
    indices = IDS.to(target.device)
    weights = torch.arange(8.0, device=target.device).view(2, 4)
    expected = (layer.weight[indices] * weights[..., None]).sum(1)
    assert torch.allclose(layer(indices, per_sample_weights=weights), expected)
    assert torch.allclose(layer(indices, None, weights), expected)


# Errors.

WEIGHT = torch.arange(12.0).view(4, 3)
FLAT = torch.tensor([0, 1, 2, 3, 1])
CUT = torch.tensor([0, 2])
ERRORS = {
    "no offsets": lambda f: f(FLAT, WEIGHT),
    "offsets for 2-D ids": lambda f: f(FLAT[None], WEIGHT, CUT),
    "offsets of two dimensions": lambda f: f(FLAT, WEIGHT, CUT[None]),
    "ids of no dimension": lambda f: f(FLAT[0], WEIGHT, CUT),
    "ids of three dimensions": lambda f: f(FLAT[None, None], WEIGHT),
    "a table of one dimension": lambda f: f(FLAT, WEIGHT[0], CUT),
    "bags of no length": lambda f: f(torch.empty(3, 0, dtype=torch.int64), WEIGHT),
    "an unknown mode": lambda f: f(FLAT, WEIGHT, CUT, mode="prod"),
    "a mode that is a number": lambda f: f(FLAT, WEIGHT, CUT, mode=0),
    "max and scaled": lambda f: f(FLAT, WEIGHT, CUT, mode="max", scale_grad_by_freq=True),
    "max and sparse": lambda f: f(FLAT, WEIGHT, CUT, mode="max", sparse=True),
    "weights and mean": lambda f: f(FLAT, WEIGHT, CUT, per_sample_weights=torch.ones(5)),
    "weights and max": lambda f: f(FLAT, WEIGHT, CUT, mode="max", per_sample_weights=torch.ones(5)),
    "too few weights": lambda f: f(FLAT, WEIGHT, CUT, mode="sum", per_sample_weights=torch.ones(4)),
    "weights of another dtype": lambda f: f(
        FLAT, WEIGHT, CUT, mode="sum", per_sample_weights=torch.ones(5).double()
    ),
    "weights that are a list": lambda f: f(FLAT, WEIGHT, CUT, mode="sum", per_sample_weights=[1]),
    "a padding past the end": lambda f: f(FLAT, WEIGHT, CUT, padding_idx=4),
    "a padding before the start": lambda f: f(FLAT, WEIGHT, CUT, padding_idx=-5),
    "a padding that is true": lambda f: f(FLAT, WEIGHT, CUT, padding_idx=True),
    "a padding that is a float": lambda f: f(FLAT, WEIGHT, CUT, padding_idx=1.0),
    "a padding without rows": lambda f: f(FLAT[:0], WEIGHT[:0], CUT[:1], padding_idx=0),
    "scaled that is a number": lambda f: f(FLAT, WEIGHT, CUT, scale_grad_by_freq=1),
    "sparse that is a string": lambda f: f(FLAT, WEIGHT, CUT, sparse="yes"),
    "last offset that is a number": lambda f: f(FLAT, WEIGHT, CUT, include_last_offset=1),
    "last offset without offsets": lambda f: f(FLAT, WEIGHT, CUT[:0], include_last_offset=True),
    "float ids": lambda f: f(FLAT.float(), WEIGHT, CUT),
    "float ids, 2-D": lambda f: f(FLAT[None].float(), WEIGHT),
    "complex ids": lambda f: f(FLAT.to(torch.complex64), WEIGHT, CUT),
    "float offsets": lambda f: f(FLAT, WEIGHT, CUT.float()),
    "int8 ids, 2-D": lambda f: f(FLAT[None].char(), WEIGHT),
    "an int32 table": lambda f: f(FLAT, WEIGHT.int(), CUT),
    "an int64 table": lambda f: f(FLAT, WEIGHT.long(), CUT),
    "a complex table": lambda f: f(FLAT, WEIGHT.to(torch.complex64), CUT),
    "an 8-bit table": lambda f: f(FLAT, WEIGHT.to(torch.float8_e5m2), CUT),
    "a table that is a list": lambda f: f(FLAT, [[1.0]], CUT),
    "ids that are a list": lambda f: f([0, 1], WEIGHT, CUT),
    "offsets that are a list": lambda f: f(FLAT, WEIGHT, [0, 2]),
    "a max_norm that is a string": lambda f: f(FLAT, WEIGHT, CUT, max_norm="1"),
    "a norm_type that is a string": lambda f: f(FLAT, WEIGHT, CUT, max_norm=1.0, norm_type="2"),
    "max_norm of an int32 table": lambda f: f(FLAT, WEIGHT.int(), CUT, max_norm=1.0),
    "float weights of another dtype": lambda f: f(
        FLAT, WEIGHT, CUT, mode="sum", per_sample_weights=torch.ones(5).bfloat16()
    ),
    "weights of a bf16 table": lambda f: f(
        FLAT, WEIGHT.bfloat16(), CUT, mode="sum", per_sample_weights=torch.ones(5)
    ),
    "complex weights": lambda f: f(
        FLAT, WEIGHT, CUT, mode="sum", per_sample_weights=torch.ones(5).to(torch.complex64)
    ),
    "a bool table": lambda f: f(FLAT, WEIGHT.bool(), CUT),
    "bool ids and offsets": lambda f: f(FLAT.bool(), WEIGHT, CUT.bool()),
    "bf16 offsets": lambda f: f(FLAT, WEIGHT, CUT.bfloat16()),
    "a late first offset": lambda f: f(FLAT, WEIGHT, torch.tensor([1, 2])),
    "a late first offset, int32": lambda f: f(FLAT.int(), WEIGHT, torch.tensor([1, 2]).int()),
    "a last offset past the end": lambda f: f(FLAT, WEIGHT, torch.tensor([0, 6])),
}


def refused(name, value):
    """A call with one wrong argument, and with max_norm, which would scale the rows."""
    arguments = {"input": FLAT, "offsets": CUT, "mode": "sum", "max_norm": 0.5, name: value}
    return lambda f, weight: f(weight=weight, **arguments)


REFUSED = {
    "float ids": refused("input", FLAT.float()),
    "float offsets": refused("offsets", CUT.float()),
    "scaled that is a number": refused("scale_grad_by_freq", 1),
    "sparse that is a number": refused("sparse", 1),
    "last offset that is a number": refused("include_last_offset", 1),
    "a padding past the end": refused("padding_idx", 4),
    "weights of another dtype": refused("per_sample_weights", torch.ones(5).double()),
    "offsets that begin late": refused("offsets", torch.tensor([1, 2])),
    "offsets past the end": refused("offsets", torch.tensor([0, 99])),
}


@pytest.mark.parametrize("call", REFUSED.values(), ids=REFUSED)
def test_a_refused_call_has_not_scaled_rows(call):
    weight = WEIGHT.clone()
    with pytest.raises((TypeError, RuntimeError)):
        call(embedding_bag, weight)
    assert torch.equal(weight, WEIGHT)


def outcome(function, call):
    try:
        call(function)
    except Exception as error:
        return type(error), str(error)
    pytest.fail("no error")


@pytest.mark.parametrize("call", ERRORS.values(), ids=ERRORS)
def test_errors_are_torchs(call):
    """As torch: same exception type and wording, behind which may stand what to do."""
    (ours, said), (theirs, wording) = outcome(embedding_bag, call), outcome(F.embedding_bag, call)
    assert ours is theirs
    assert said == wording or said.startswith(f"{wording}; ")


@pytest.mark.parametrize("offsets", [[0, 4, 2], [0, -3, 2], [0, 9, 2]], ids=str)
@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
def test_decreasing_offsets_are_an_error_on_the_cpu(mode, offsets):
    """Bounds: torch reads what lies outside of the ids, or leaves the output as it found it."""
    offsets = torch.tensor(offsets)
    with pytest.raises(RuntimeError, match="offsets must not decrease, but offsets"):
        embedding_bag(FLAT, WEIGHT, offsets, mode=mode)


def test_uint8_offsets_do_not_wrap_around():
    """A difference of unsigned offsets is never negative."""
    with pytest.raises(RuntimeError, match=r"offsets\[1\] is 3 and offsets\[2\] is 2"):
        embedding_bag(FLAT, WEIGHT, torch.tensor([0, 3, 2], dtype=torch.uint8))


@pytest.mark.parametrize("include_last_offset", [0, 1, None, "no"])
def test_the_last_offset_means_nothing_without_offsets(include_last_offset):
    """As torch: torch does not look at it."""
    for function in (embedding_bag, F.embedding_bag):
        output = function(FLAT[None], WEIGHT, include_last_offset=include_last_offset)
        assert torch.equal(output, WEIGHT[FLAT].sum(0, keepdim=True) / 5)


def test_the_old_order_of_arguments_still_works():
    """As torch: with torch's warning, that points to the caller."""
    ids = torch.tensor([[0, 1]])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        output = embedding_bag(WEIGHT, ids, mode="sum")
        F.embedding_bag(WEIGHT, ids, mode="sum")
    assert torch.equal(output, WEIGHT[:2].sum(0, keepdim=True))
    ours, theirs = caught
    assert ours.category is theirs.category is UserWarning
    assert str(ours.message) == str(theirs.message)
    assert ours.filename == __file__


def test_devices_must_agree():
    """torch reads through the addresses of tensors on another device."""
    given = {
        "input": FLAT,
        "offsets": CUT,
        "per_sample_weights": torch.ones(5),
    }
    for name in given:
        moved = {**given, name: given[name].to("meta")}
        with pytest.raises(RuntimeError, match="Expected all tensors to be on the same device"):
            embedding_bag(weight=WEIGHT, mode="sum", **moved)


# Tensors that are not plain.


class Recorded(torch.Tensor):
    """A tensor subclass that writes down which functions it was given to."""

    seen: tuple = ()

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        cls.seen = (*cls.seen, function)
        return super().__torch_function__(function, types, args, kwargs or {})


@pytest.mark.parametrize("name", ["input", "weight", "offsets", "per_sample_weights"])
def test_subclasses_go_to_torchs_function(name):
    """Drop-in: DTensor, torchao and others bring their own."""
    arguments = {
        "input": FLAT,
        "weight": WEIGHT,
        "offsets": CUT,
        "per_sample_weights": torch.ones(5),
    }
    arguments[name] = arguments[name].as_subclass(Recorded)
    Recorded.seen = ()
    output = embedding_bag(mode="sum", **arguments)
    assert F.embedding_bag in Recorded.seen
    assert torch.equal(output, F.embedding_bag(FLAT, WEIGHT, CUT, mode="sum"))


def test_jagged_ids_go_to_torchs_function():
    jagged = torch.nested.nested_tensor([FLAT[:2], FLAT[2:]], layout=torch.jagged)
    output = embedding_bag(jagged, WEIGHT, mode="sum")
    assert torch.equal(output, F.embedding_bag(FLAT, WEIGHT, CUT, mode="sum"))


class CallsLayer(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = gpu_embed.EmbeddingBag(5, 3, mode="sum")

    def forward(self, ids, offsets):
        return self.table(ids, offsets) * 2


def test_fx_tracing():
    """torch.fx records the function as ours."""
    layer = CallsLayer()
    assert torch.equal(fx.symbolic_trace(layer)(FLAT, CUT), layer(FLAT, CUT))

    def call(ids, weight, offsets):
        return embedding_bag(ids, weight, offsets, mode="max")

    traced = fx.symbolic_trace(call)
    assert embedding_bag in [node.target for node in traced.graph.nodes]
    assert torch.equal(traced(FLAT, WEIGHT, CUT), call(FLAT, WEIGHT, CUT))


def test_dispatch_modes_see_the_operators():
    """What intercepts operators (fake tensors, profilers) is not gone past."""

    class Names(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.names = []

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.names.append(func.name())
            return func(*args, **(kwargs or {}))

    for mode, name in (("sum", "embedding_bag"), ("max", "embedding_bag_max")):
        with Names() as seen:
            embedding_bag(FLAT, WEIGHT, CUT, mode=mode)
        assert f"gpu_embed::{name}" in seen.names
