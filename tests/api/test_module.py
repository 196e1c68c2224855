"""gpu_embed.Embedding where torch.nn.Embedding stood: what other code asks of the layer, and its errors."""

import copy
import inspect
import io
import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from cases import integer_gradient, table
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune
from torch.utils import _pytree as pytree

import gpu_embed
from gpu_embed.functional import embedding

LAYERS = (gpu_embed.Embedding, nn.Embedding)
# torch's own: jagged tensors and layers made for inference are prototypes there, old ones deprecated.
pytestmark = [
    pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype"),
    pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated"),
]

CONSTRUCTED = {
    "plain": {},
    "padding": {"padding_idx": 1},
    "padding from the end": {"padding_idx": -2},
    "first row is padding": {"padding_idx": 0},
    "max_norm": {"max_norm": 1.5, "norm_type": 1.0},
    "scaled": {"scale_grad_by_freq": True},
    "sparse": {"sparse": True},
    "frozen": {"_weight": torch.arange(15.0).view(5, 3), "_freeze": True},
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


def weight_gradient(layer, indices, parameter="weight"):
    """The dense gradient of a lookup weighted by small integers."""
    output = layer(indices)
    output.backward(integer_gradient(tuple(output.shape), output.dtype, output.device))
    return layer.get_parameter(parameter).grad.to_dense()


# The class.


def test_only_forward_is_overridden():
    """Drop-in: subclass, override forward, a padding row's zeros, from_pretrained; a new torch brings the rest."""
    generated = {"__module__", "__doc__", "__firstlineno__", "__static_attributes__"}
    assert set(vars(gpu_embed.Embedding)) - generated == {
        "forward",
        "from_pretrained",
        "_fill_padding_idx_with_zero",
    }
    assert gpu_embed.Embedding.__mro__[1] is nn.Embedding


def test_signatures_are_torchs():
    """As torch: every argument by the same name, in the same place, with the same default."""
    assert inspect.signature(gpu_embed.Embedding) == inspect.signature(nn.Embedding)
    ours, theirs = (
        [(p.name, p.kind, p.default) for p in inspect.signature(function).parameters.values()]
        for function in (embedding, F.embedding)
    )
    assert ours == theirs


@constructed
def test_attributes_state_and_repr_are_torchs(arguments):
    """Drop-in: transformers, PEFT, accelerate and others read them."""
    ours, theirs = pair(5, 3, **arguments)
    assert isinstance(ours, nn.Embedding)
    assert repr(ours) == repr(theirs)
    assert ours.__constants__ == theirs.__constants__
    for name in ours.__constants__:
        assert getattr(ours, name) == getattr(theirs, name)
        assert type(getattr(ours, name)) is type(getattr(theirs, name))
    assert type(ours.weight) is nn.Parameter
    assert ours.weight.requires_grad == theirs.weight.requires_grad
    assert ours.weight.dtype == theirs.weight.dtype
    assert ours.weight.device == theirs.weight.device
    assert list(ours.state_dict()) == list(theirs.state_dict()) == ["weight"]
    assert not list(ours.buffers())


@pytest.mark.parametrize("padding_idx", [None, 0, 2, -1])
def test_initial_values_are_torchs(padding_idx):
    """Drop-in: the same seed gives the same table, at construction and at reset_parameters."""
    ours, theirs = pair(5, 3, padding_idx)
    assert torch.equal(ours.weight, theirs.weight)
    for layer in (ours, theirs):
        torch.manual_seed(1)
        layer.reset_parameters()
    assert torch.equal(ours.weight, theirs.weight)
    if padding_idx is not None:
        assert ours.weight[padding_idx].eq(0).all()


@pytest.mark.parametrize("freeze", [True, False])
def test_from_pretrained_makes_our_layer(target, freeze):
    """Drop-in: the alternative constructor too, with every argument, around the caller's tensor."""
    weight = table(5, 3, torch.float32, target.device)
    arguments = {"padding_idx": 1, "max_norm": 2.0, "norm_type": 1.0, "sparse": True}
    layer = gpu_embed.Embedding.from_pretrained(weight, freeze=freeze, **arguments)
    assert type(layer) is gpu_embed.Embedding
    assert layer.weight.data_ptr() == weight.data_ptr()
    assert layer.weight.requires_grad == (not freeze)
    for name, value in arguments.items():
        assert getattr(layer, name) == value
    output = layer(torch.tensor([4, 0], device=target.device))
    assert torch.equal(output, weight[[4, 0]])


def test_attributes_changed_later_take_effect(target):
    """Drop-in: code in the wild sets padding_idx, or puts a larger table in, on a finished layer."""
    layer = gpu_embed.Embedding(5, 3, device=target.device)
    layer.weight = nn.Parameter(table(8, 3, torch.float32, target.device))
    layer.num_embeddings, layer.padding_idx, layer.max_norm = 8, 7, 1.0
    output = layer(torch.tensor([7, 6], device=target.device))
    output.sum().backward()
    assert torch.equal(output, layer.weight[[7, 6]])
    assert layer.weight.norm(dim=1)[[7, 6]].le(1.0 + 1e-6).all()
    assert layer.weight.grad[:, 0].tolist() == [0, 0, 0, 0, 0, 0, 1, 0]


# Copies, files and conversions.


@pytest.mark.parametrize("to_ours", [True, False], ids=["torch to ours", "ours to torch"])
@pytest.mark.parametrize("assign", [True, False], ids=["assign", "copy"])
def test_state_dicts_load_both_ways(to_ours, assign):
    """Drop-in: checkpoints are exchanged with torch's layer."""
    source, destination = (gpu_embed.Embedding(5, 3), nn.Embedding(5, 3))[:: -1 if to_ours else 1]
    buffer = io.BytesIO()
    torch.save(source.state_dict(), buffer)
    buffer.seek(0)
    result = destination.load_state_dict(torch.load(buffer, weights_only=True), assign=assign)
    assert not result.missing_keys
    assert not result.unexpected_keys
    assert torch.equal(destination.weight, source.weight)
    assert torch.equal(destination(torch.tensor([3])), source(torch.tensor([3])))


@pytest.mark.parametrize(
    "state", [{}, {"weight": torch.zeros(4, 3)}, {"weight": torch.zeros(5, 3), "x": torch.ones(1)}]
)
def test_state_dict_errors_are_torchs(state):
    """As torch: missing, misshapen and unexpected entries."""
    messages = []
    for layer in pair(5, 3):
        with pytest.raises(RuntimeError) as raised:
            layer.load_state_dict(state)
        messages.append(str(raised.value))
    assert messages[0] == messages[1]


def through_torch_save(layer):
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda layer: pickle.loads(pickle.dumps(layer)),
    "torch.save": through_torch_save,
}


@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)
def test_copies_work_alone(target, copied):
    """Drop-in: a copy is our layer, with its own table and every argument."""
    layer = gpu_embed.Embedding(5, 3, 1, 2.0, 1.0, True, device=target.device)
    twin = copied(layer)
    assert type(twin) is gpu_embed.Embedding
    assert repr(twin) == repr(layer)
    assert torch.equal(twin.weight, layer.weight)
    assert twin.weight.data_ptr() != layer.weight.data_ptr()
    indices = torch.tensor([0, 1, 0], device=target.device)
    grad = weight_gradient(twin, indices)
    assert grad[1].eq(0).all()
    assert layer.weight.grad is None


CONVERSIONS = {
    "to dtype": lambda layer: layer.to(torch.bfloat16),
    "half": lambda layer: layer.half(),
    "double": lambda layer: layer.double(),
    "to meta": lambda layer: layer.to("meta"),
    "meta and back": lambda layer: layer.to("meta").to_empty(device="cpu").apply(zero),
    "requires_grad_": lambda layer: layer.requires_grad_(False),
    "eval": lambda layer: layer.eval(),
    "share_memory": lambda layer: layer.share_memory(),
}


def zero(layer):
    nn.init.zeros_(layer.weight)


@pytest.mark.parametrize("convert", CONVERSIONS.values(), ids=CONVERSIONS)
def test_conversions(convert):
    """Drop-in: what nn.Module offers leaves our layer as it leaves torch's."""
    indices = torch.tensor([[4, 0]])
    ours, theirs = (convert(layer) for layer in pair(5, 3, padding_idx=1))
    output, expected = (layer(indices.to(layer.weight.device)) for layer in (ours, theirs))
    assert type(ours) is gpu_embed.Embedding
    for actual, wanted in ((ours.weight, theirs.weight), (output, expected)):
        assert actual.dtype == wanted.dtype
        assert actual.device == wanted.device
        assert actual.requires_grad == wanted.requires_grad
        assert actual.is_meta or torch.equal(actual, wanted)


def test_default_device_and_dtype():
    """Drop-in: torch's defaults reach the constructor."""
    with torch.device("meta"):
        assert gpu_embed.Embedding(5, 3).weight.is_meta
    torch.set_default_dtype(torch.float64)
    try:
        assert gpu_embed.Embedding(5, 3).weight.dtype == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)


def test_skip_init():
    """Drop-in: torch's helper inspects the constructor."""
    layer = nn.utils.skip_init(gpu_embed.Embedding, 5, 3, padding_idx=1)
    assert type(layer) is gpu_embed.Embedding
    assert layer.weight.shape == (5, 3)


def test_tied_weights(target):
    """Drop-in: input and output layer share one table, also in a copy; both gradients arrive."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = gpu_embed.Embedding(5, 3, device=target.device)
            self.head = nn.Linear(3, 5, bias=False, device=target.device)
            self.head.weight = self.table.weight

        def forward(self, indices):
            return self.head(self.table(indices))

    model = copy.deepcopy(Model())
    assert model.head.weight is model.table.weight
    assert len(list(model.parameters())) == 1
    weight = model.table.weight.detach().round()
    with torch.no_grad():
        model.table.weight.copy_(weight)
    indices = torch.tensor([3, 1, 3], device=target.device)
    model(indices).sum().backward()
    expected = weight[indices].sum(0).expand(5, 3).clone()
    expected[3] += 2 * weight.sum(0)
    expected[1] += weight.sum(0)
    assert torch.equal(model.table.weight.grad, expected)


# Layers whose weight is no plain parameter.


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight


PARAMETRIZED = {
    "custom": lambda layer: parametrize.register_parametrization(layer, "weight", Doubled()),
    "weight_norm": parametrizations.weight_norm,
    "orthogonal": parametrizations.orthogonal,
    "prune": lambda layer: prune.l1_unstructured(layer, "weight", amount=4),
}


@pytest.mark.parametrize("wrap", PARAMETRIZED.values(), ids=PARAMETRIZED)
def test_parametrized_weights(wrap):
    """Drop-in: a table that is computed gets its gradient through the lookup."""
    indices = torch.tensor([[4, 0, 4]])
    grads = []
    for layer in pair(5, 3, padding_idx=1, _weight=table(5, 3, torch.float32, "cpu")):
        torch.manual_seed(0)
        wrap(layer)
        output = layer(indices)
        assert torch.equal(output, layer.weight[indices])
        output.backward(integer_gradient((1, 3, 3), torch.float32, "cpu"))
        grads.append([parameter.grad for parameter in layer.parameters()])
    assert all(map(torch.equal, *grads))
    assert any(grad.abs().sum() > 0 for grad in grads[0])


def test_functional_call(target):
    """Drop-in: a stateless call uses the table it is given and leaves the layer's own alone."""
    layer = gpu_embed.Embedding(5, 3, padding_idx=1, device=target.device)
    weight = table(5, 3, torch.float32, target.device).requires_grad_()
    indices = torch.tensor([4, 1, 4], device=target.device)
    output = torch.func.functional_call(layer, {"weight": weight}, (indices,))
    output.sum().backward()
    assert torch.equal(output, weight[indices])
    assert weight.grad[:, 0].tolist() == [0, 0, 0, 0, 2]
    assert layer.weight.grad is None


class Wrapped(torch.Tensor):
    """A table in a wrapper, as torchao and DTensor have them: its lookup is its own affair."""

    seen: list = []  # noqa: RUF012

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)

    def __init__(self, inner):
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, op, types, args=(), kwargs=None):
        cls.seen.append(op)
        unwrapped = pytree.tree_map_only(cls, lambda x: x.inner, (args, kwargs or {}))
        result = op(*unwrapped[0], **unwrapped[1])
        return cls(result) if op is torch.ops.aten.detach.default else result


class Logged(torch.Tensor):
    """A table that follows torch's functions."""

    seen: list = []  # noqa: RUF012

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        cls.seen.append(function)
        return super().__torch_function__(function, types, args, kwargs or {})


def test_wrapper_subclass_weights_go_to_torch():
    """Drop-in: __torch_dispatch__ sees torch's op, which it knows, not ours."""
    inner = table(5, 3, torch.float32, "cpu")
    layer = gpu_embed.Embedding(5, 3, padding_idx=1)
    layer.weight = nn.Parameter(Wrapped(inner))
    Wrapped.seen.clear()
    output = layer(torch.tensor([4, 0]))
    assert torch.ops.aten.embedding.default in Wrapped.seen
    assert torch.equal(output, inner[[4, 0]])
    output.sum().backward()
    assert layer.weight.grad[:, 0].tolist() == [1, 0, 0, 0, 1]


@pytest.mark.parametrize("which", ["weight", "ids"])
def test_torch_function_subclasses_go_to_torch(which):
    """Drop-in: __torch_function__ sees torch's function, with our layer's arguments."""
    weight, indices = table(5, 3, torch.float32, "cpu"), torch.tensor([4, 0])
    if which == "weight":
        weight = weight.as_subclass(Logged)
    else:
        indices = indices.as_subclass(Logged)
    layer = gpu_embed.Embedding(5, 3, padding_idx=1, _weight=weight)
    Logged.seen.clear()
    output = layer(indices)
    assert F.embedding in Logged.seen
    assert type(output) is Logged
    assert torch.equal(output.as_subclass(torch.Tensor), table(5, 3, torch.float32, "cpu")[[4, 0]])


def test_jagged_ids():
    """Drop-in: ids in a nested tensor, as with torch's layer."""
    parts = [torch.tensor([0, 1]), torch.tensor([2])]
    results = []
    for layer in pair(5, 3):
        output = layer(torch.nested.nested_tensor(parts, layout=torch.jagged))
        output.values().sum().backward()
        results.append((output.values(), layer.weight.grad))
    assert all(map(torch.equal, *results))


@pytest.fixture
def mesh():
    """A mesh of one process; needs no network."""
    if not torch.distributed.is_available():
        pytest.skip("this torch has no torch.distributed")
    from torch.distributed.tensor import init_device_mesh

    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


def test_dtensor_weights(mesh):
    """Drop-in: a sharded table gives a DTensor; `tests/distributed` has more ranks."""
    from torch.distributed import tensor as dtensor

    layer = gpu_embed.Embedding(5, 3)
    whole = layer.weight.detach().clone()
    layer.weight = nn.Parameter(dtensor.distribute_tensor(whole, mesh, [dtensor.Shard(0)]))
    indices = dtensor.distribute_tensor(torch.tensor([4, 0, 4]), mesh, [dtensor.Replicate()])
    output = layer(indices)
    output.sum().backward()
    assert isinstance(output, dtensor.DTensor)
    assert torch.equal(output.full_tensor(), whole[[4, 0, 4]])
    assert layer.weight.grad.full_tensor()[:, 0].tolist() == [1, 0, 0, 0, 2]


def test_parallel_wrappers(mesh):
    """Drop-in: tensor parallelism asks isinstance; sharded and replicated data parallelism wrap."""
    from torch.distributed import tensor as dtensor
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.parallel import RowwiseParallel, parallelize_module

    indices = torch.tensor([4, 0, 4])
    plan = {"0": RowwiseParallel(input_layouts=dtensor.Replicate())}
    for wrap in (
        lambda model: parallelize_module(model, mesh, plan),
        lambda model: fully_shard(model, mesh=mesh),
        nn.parallel.DistributedDataParallel,
    ):
        layer = gpu_embed.Embedding(5, 3)
        expected = layer.weight.detach()[indices].clone()
        model = wrap(nn.Sequential(layer))
        output = model(indices)
        output.sum().backward()
        assert torch.equal(output, expected)
        (grad,) = (parameter.grad for parameter in model.parameters())
        grad = grad.full_tensor() if isinstance(grad, dtensor.DTensor) else grad
        assert grad[:, 0].tolist() == [1, 0, 0, 0, 2]


# Errors, and what is no error.

WRONG_CONSTRUCTIONS = {
    "nothing": lambda layer: layer(),
    "a negative size": lambda layer: layer(-1, 3),
    "a str size": lambda layer: layer("5", 3),
    "padding_idx past the end": lambda layer: layer(5, 3, 5),
    "padding_idx before the start": lambda layer: layer(5, 3, -6),
    "padding_idx a str": lambda layer: layer(5, 3, "1"),
    "a misshapen _weight": lambda layer: layer(5, 3, _weight=torch.ones(3, 5)),
    "integers that require grad": lambda layer: layer(5, 3, dtype=torch.int64),
    "an unknown dtype": lambda layer: layer(5, 3, dtype="float"),
    "an unknown device": lambda layer: layer(5, 3, device="gpu"),
    "an unknown argument": lambda layer: layer(5, 3, scale=True),
    "from_pretrained of 1-D": lambda layer: layer.from_pretrained(torch.ones(3)),
    "from_pretrained, padding_idx past the end": lambda layer: layer.from_pretrained(
        torch.ones(5, 3), padding_idx=5
    ),
}


@pytest.mark.parametrize("build", WRONG_CONSTRUCTIONS.values(), ids=WRONG_CONSTRUCTIONS)
def test_wrong_constructions_fail_as_in_torch(build):
    """As torch: same type and text."""
    errors = []
    for layer in LAYERS:
        with pytest.raises(Exception) as raised:
            build(layer)
        errors.append((raised.type, str(raised.value)))
    assert errors[0] == errors[1]


IDS = torch.tensor([[0, 4], [1, 1]])
WEIGHT = torch.arange(15.0).view(5, 3)

WRONG_CALLS = {
    "float ids": lambda f: f(IDS.float(), WEIGHT),
    "half ids": lambda f: f(IDS.half(), WEIGHT),
    "bool ids": lambda f: f(IDS.bool(), WEIGHT),
    "complex ids": lambda f: f(IDS.cfloat(), WEIGHT),
    "int8 ids": lambda f: f(IDS.to(torch.int8), WEIGHT),
    "uint16 ids": lambda f: f(IDS.to(torch.uint16), WEIGHT),
    "list ids": lambda f: f([0, 1], WEIGHT),
    "int ids": lambda f: f(1, WEIGHT),
    "None ids": lambda f: f(None, WEIGHT),
    "list weight": lambda f: f(IDS, [[1.0]]),
    "None weight": lambda f: f(IDS, None),
    "list ids and weight": lambda f: f([0], [[1.0]]),
    "0-D weight": lambda f: f(IDS, torch.tensor(1.0)),
    "1-D weight": lambda f: f(IDS, WEIGHT[0]),
    "3-D weight": lambda f: f(IDS, WEIGHT[None]),
    "1-D weight and float ids": lambda f: f(IDS.float(), WEIGHT[0]),
    "no weight": lambda f: f(IDS),
    "an unknown argument": lambda f: f(IDS, WEIGHT, scale=True),
    "too many arguments": lambda f: f(IDS, WEIGHT, None, None, 2.0, False, False, False),
    "padding_idx past the end": lambda f: f(IDS, WEIGHT, 5),
    "padding_idx before the start": lambda f: f(IDS, WEIGHT, -6),
    "padding_idx of no rows": lambda f: f(IDS, WEIGHT[:0], 1),
    "padding_idx a float": lambda f: f(IDS, WEIGHT, 1.0),
    "padding_idx a bool": lambda f: f(IDS, WEIGHT, True),
    "padding_idx a float tensor": lambda f: f(IDS, WEIGHT, torch.tensor(1.0)),
    "scale_grad_by_freq an int": lambda f: f(IDS, WEIGHT, scale_grad_by_freq=1),
    "scale_grad_by_freq a str": lambda f: f(IDS, WEIGHT, scale_grad_by_freq="no"),
    "scale_grad_by_freq a tensor": lambda f: f(IDS, WEIGHT, scale_grad_by_freq=torch.tensor(True)),
    "sparse an int": lambda f: f(IDS, WEIGHT, sparse=1),
    "sparse None": lambda f: f(IDS, WEIGHT, sparse=None),
    "max_norm a str": lambda f: f(IDS, WEIGHT, max_norm="1"),
    "max_norm a list": lambda f: f(IDS, WEIGHT, max_norm=[1.0]),
    "max_norm complex": lambda f: f(IDS, WEIGHT, max_norm=1j),
    "norm_type a str": lambda f: f(IDS, WEIGHT, max_norm=1.0, norm_type="2"),
    "norm_type None": lambda f: f(IDS, WEIGHT, max_norm=1.0, norm_type=None),
    "max_norm of integers": lambda f: f(IDS, WEIGHT.long(), max_norm=1.0),
    "max_norm of bools": lambda f: f(IDS, WEIGHT.bool(), max_norm=1.0),
    "max_norm of float8": lambda f: f(IDS, WEIGHT.to(torch.float8_e4m3fn), max_norm=1.0),
    "an id past the end": lambda f: f(IDS + 1, WEIGHT),
    "a negative id": lambda f: f(IDS - 1, WEIGHT),
    "sparse and scaled, backward": lambda f: (
        f(IDS, WEIGHT.clone().requires_grad_(), scale_grad_by_freq=True, sparse=True)
        .sum()
        .backward()
    ),
}


@pytest.mark.parametrize("call", WRONG_CALLS.values(), ids=WRONG_CALLS)
def test_wrong_calls_fail_as_in_torch(call):
    """As torch: same type, and a text that begins as torch's."""
    with pytest.raises(Exception) as theirs:
        call(F.embedding)
    with pytest.raises(Exception) as ours:
        call(embedding)
    assert ours.type is theirs.type
    # What torch got, it names by the type's C++ name for some dtypes.
    start = str(theirs.value).split("; but got")[0].split("\n")[0]
    assert str(ours.value).startswith(start)


FINE_CALLS = {
    "padding_idx of NumPy": {"padding_idx": np.int64(4)},
    "padding_idx a 0-d tensor": {"padding_idx": torch.tensor(4)},
    "padding_idx -5": {"padding_idx": -5},
    "max_norm an int": {"max_norm": 3},
    "max_norm True": {"max_norm": True},
    "max_norm of NumPy": {"max_norm": np.float32(3.0)},
    "max_norm a 0-d tensor": {"max_norm": torch.tensor(3.0)},
    "max_norm 0": {"max_norm": 0.0},
    "max_norm negative": {"max_norm": -3.0},
    "max_norm inf": {"max_norm": float("inf")},
    "max_norm nan": {"max_norm": float("nan")},
    "norm_type of NumPy": {"max_norm": 3.0, "norm_type": np.float32(1.0)},
    "norm_type an int": {"max_norm": 3.0, "norm_type": 1},
    "norm_type without max_norm": {"norm_type": "unused"},
}


@pytest.mark.parametrize("arguments", FINE_CALLS.values(), ids=FINE_CALLS)
def test_what_torch_accepts_is_accepted(arguments):
    """As torch: numbers in whatever dress torch takes them, with the same effect."""
    results = []
    for function in (embedding, F.embedding):
        weight = WEIGHT.clone().requires_grad_()
        output = function(IDS, weight, **arguments)
        output.sum().backward()
        results.append((output.detach(), weight.detach(), weight.grad))
    for actual, expected in zip(*results, strict=True):
        # A row scaled to max_norm is rounded a few times on its way: D squares and sums, root, quotient.
        assert torch.allclose(actual, expected, rtol=10 * 2**-23, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.int16, torch.uint8], ids=str)
def test_narrow_ids_work_on_purpose(dtype):
    """Beyond torch, which refuses them: half or an eighth of the memory for small tables."""
    with pytest.raises(RuntimeError, match="scalar types: Long, Int"):
        F.embedding(IDS.to(dtype), WEIGHT)
    assert torch.equal(embedding(IDS.to(dtype), WEIGHT), WEIGHT[IDS])


@pytest.mark.parametrize("elsewhere", ["ids", "weight"])
def test_devices_must_match_on_purpose(elsewhere):
    """Unlike torch, which fills the output of ids on meta with whatever lies in memory."""
    indices = IDS.to("meta") if elsewhere == "ids" else IDS
    weight = WEIGHT.to("meta") if elsewhere == "weight" else WEIGHT
    with pytest.raises(RuntimeError, match="Expected all tensors to be on the same device"):
        embedding(indices, weight)


BEYOND_THE_TABLE = {
    "with max_norm": lambda device: ([5], torch.ones(5, 3, device=device), {"max_norm": 1.0}),
    "no columns": lambda device: ([5], torch.ones(5, 0, device=device), {}),
    "no rows": lambda device: ([5], torch.ones(0, 3, device=device), {}),
}


@pytest.mark.parametrize("case", BEYOND_THE_TABLE.values(), ids=BEYOND_THE_TABLE)
def test_every_id_out_of_range_has_one_error_on_purpose(target, case):
    """Bounds: IndexError with the id, where torch has another error for each of these calls."""
    values, weight, arguments = case(target.device)
    indices = torch.tensor(values, device=target.device)
    with (
        gpu_embed.set_bounds_check("sync"),
        pytest.raises(IndexError, match="index out of range in self: id 5 at flat position 0"),
    ):
        embedding(indices, weight, **arguments)
