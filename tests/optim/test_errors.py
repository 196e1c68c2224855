"""What the optimizers say of parameters and numbers that do not fit."""

import copy
import math

import pytest
import torch

import gpu_embed
from gpu_embed import optim

CLASSES = (optim.SGD, optim.Adagrad, optim.RowWiseAdagrad, optim.Adam, optim.AdamW)
every_class = pytest.mark.parametrize("optimizer_class", CLASSES, ids=lambda one: one.__name__)


def batched():
    return gpu_embed.TableBatchedEmbeddingBag({"user": (7, 4), "item": (3, 4)}, sparse=True)


def model():
    return torch.nn.Sequential(gpu_embed.Embedding(9, 4, sparse=True), torch.nn.Linear(4, 8))


NO_TABLE = {
    "parameters": (lambda: model().parameters(), "parameter 2 of shape [8] is torch.float32"),
    "named": (
        lambda: model().named_parameters(),
        "parameter 2 ('1.bias') of shape [8] is torch.float32",
    ),
    "half named": (
        lambda: model().half().named_parameters(prefix="net"),
        "parameter 2 ('net.1.bias') of shape [8] is torch.float16",
    ),
    "groups": (
        lambda: [{"params": model()[0].parameters()}, {"params": model()[1].named_parameters()}],
        "should be with/without names",
    ),
    "second group": (
        lambda: [{"params": model()[0].parameters()}, {"params": model()[1].parameters()}],
        "parameter 2 of shape [8] is torch.float32",
    ),
    "complex": (
        lambda: [torch.zeros(3, 2, dtype=torch.complex64)],
        "parameter 0 of shape [3, 2] is torch.complex64, torch.strided",
    ),
    "sparse": (
        lambda: [torch.zeros(3, 2).to_sparse()],
        "parameter 0 of shape [3, 2] is torch.float32, torch.sparse_coo",
    ),
}


@every_class
@pytest.mark.parametrize(("params", "message"), NO_TABLE.values(), ids=NO_TABLE)
def test_a_parameter_that_is_no_table_is_named(optimizer_class, params, message):
    with pytest.raises(ValueError) as raised:
        optimizer_class(params())
    text = str(raised.value)
    assert message in text
    if "with/without" not in message:
        assert text.startswith(f"{optimizer_class.__name__} updates dense tables [num_embeddings,")
        assert "layers with sparse=True, or apply_in_backward(model, ...)" in text


@every_class
def test_a_dense_gradient_names_its_parameter(optimizer_class):
    """A linear layer's weight looks like a table until it has a gradient."""
    layers = torch.nn.Sequential(
        gpu_embed.Embedding(9, 4, sparse=True), torch.nn.Linear(4, 8, bias=False)
    )
    optimizer = optimizer_class(layers.named_parameters())
    layers(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(
        RuntimeError, match=r"leave out parameter 1 \('1.weight'\) of shape \[8, 4\]"
    ):
        optimizer.step()


MODULES = {
    "a model": lambda layer: model(),
    "a layer": lambda layer: layer,
    "a table": lambda layer: layer.user,
    "in a list": lambda layer: [layer],
    "with a name": lambda layer: [("layer", layer)],
    "in a group": lambda layer: [{"params": layer}],
    "in a group's list": lambda layer: [{"params": [layer]}],
}


@every_class
@pytest.mark.parametrize("params", MODULES.values(), ids=MODULES)
def test_a_module_is_refused(optimizer_class, params):
    message = rf"^{optimizer_class.__name__} takes parameters, but got a module, \w+: .*layer.parameters\(\)"
    with pytest.raises(TypeError, match=message):
        optimizer_class(params(batched()))


def views_of(layer):
    rows = layer["user"]
    with torch.no_grad():
        outside = layer["user"]
    return {"a view": rows, "without grad": outside, "a slice": layer.weight[:2]}


@every_class
@pytest.mark.parametrize("name", ["a view", "without grad", "a slice"])
@pytest.mark.parametrize(
    "given",
    [lambda view: view, lambda view: [view], lambda view: [{"params": view}], lambda view: [("user", view)]],
    ids=["alone", "list", "group", "named"],
)  # fmt: skip
def test_a_view_of_a_parameter_is_refused(optimizer_class, name, given):
    view = views_of(batched())[name]
    with pytest.raises(
        ValueError, match=r"can't optimize a non-leaf Tensor.*parameters_of\('user'\)"
    ):
        optimizer_class(given(view))


@every_class
@pytest.mark.parametrize("params", [[], (), iter([])], ids=["list", "tuple", "iterator"])
def test_no_parameters_are_refused(optimizer_class, params):
    """As torch does; a batched layer's table has none of its own."""
    for given in (params, batched().user.parameters()):
        with pytest.raises(ValueError, match=r"empty parameter list.*layer.parameters_of\(name\)"):
            optimizer_class(given)


@every_class
def test_what_is_given_rightly_is_taken(optimizer_class):
    layer, buffer = batched(), torch.nn.Parameter(torch.zeros(10))
    for params in (
        layer.parameters(),
        layer.named_parameters(),
        layer.parameters_of("user"),
        [layer.weight.detach()],
        # A parameter of its own, though its memory is another's.
        [torch.nn.Parameter(buffer.view(5, 2))],
        [{"params": layer.parameters_of("user"), "lr": 0.5}, {"params": layer.parameters_of("item")}],
        [{"params": []}],
    ):  # fmt: skip
        optimizer_class(params)


@every_class
def test_torch_refuses_sets_and_groups_without_params(optimizer_class):
    with pytest.raises(TypeError, match="ordered collections"):
        optimizer_class([{"params": {torch.zeros(2, 2)}}])
    with pytest.raises(KeyError, match="params"):
        optimizer_class([{"lr": 0.1}])
    with pytest.raises(TypeError, match="iterable of Tensors or dicts"):
        optimizer_class(torch.zeros(2, 2))


NUMBERS = {
    **dict.fromkeys(CLASSES, ("lr",)),
    optim.Adagrad: ("lr", "lr_decay", "initial_accumulator_value", "eps"),
    optim.RowWiseAdagrad: ("lr", "lr_decay", "initial_accumulator_value", "eps"),
    optim.Adam: ("lr", "eps"),
    optim.AdamW: ("lr", "eps", "weight_decay"),
}
CASES = [(one, name) for one, names in NUMBERS.items() for name in names]


def refused(optimizer_class, name, value, kind, message):
    """By the constructor, in a group, in a group that is added, and in a state to be loaded: nothing is changed."""
    optimizer = optimizer_class([torch.zeros(2, 2)])
    before = str(optimizer.state_dict())
    saved = copy.deepcopy(optimizer.state_dict())
    saved["param_groups"][0][name] = value
    ways = (
        lambda: optimizer_class([torch.zeros(2, 2)], **{name: value}),
        lambda: optimizer_class([{"params": [torch.zeros(2, 2)], name: value}]),
        lambda: optimizer.add_param_group({"params": [torch.zeros(2, 2)], name: value}),
        lambda: optimizer.load_state_dict(saved),
    )
    for way in ways:
        with pytest.raises(kind, match=message):
            way()
        assert str(optimizer.state_dict()) == before


WRONG_NUMBERS = {
    "str": "0.1",
    "None": None,
    "bool": True,
    "bool tensor": torch.tensor(True),
    "complex": 1j,
    "list": [0.1],
}


@pytest.mark.parametrize(("optimizer_class", "name"), CASES)
@pytest.mark.parametrize("value", WRONG_NUMBERS.values(), ids=WRONG_NUMBERS)
def test_what_is_no_number_is_refused(optimizer_class, name, value):
    said = {"lr": "learning rate", "eps": "eps(ilon value)?"}.get(name, rf"{name}( value)?")
    refused(
        optimizer_class, name, value, TypeError, rf"^Invalid {said}: .*, expected a number$"
    )  # fmt: skip


@every_class
@pytest.mark.parametrize(("value", "said"), [(-1.0, "-1.0"), (math.nan, "nan")])
def test_an_lr_out_of_range_is_refused_everywhere(optimizer_class, value, said):
    refused(optimizer_class, "lr", value, ValueError, f"^Invalid learning rate: {said}$")


@pytest.mark.parametrize("optimizer_class", [optim.Adam, optim.AdamW])
@pytest.mark.parametrize(
    ("betas", "kind", "message"),
    [
        (0.9, TypeError, r"betas: 0.9, expected two numbers"),
        (None, TypeError, r"betas: None, expected two numbers"),
        ("ab", TypeError, r"betas: 'ab', expected two numbers"),
        ((0.9,), TypeError, r"betas: \(0.9,\), expected two numbers"),
        ((0.9, 0.99, 0.999), TypeError, r"betas: .*, expected two numbers"),
        (("0.9", 0.99), TypeError, r"beta parameter at index 0: '0.9', expected a number"),
        ((0.9, True), TypeError, r"beta parameter at index 1: True, expected a number"),
        ((0.9, 1.0), ValueError, r"beta parameter at index 1: 1.0$"),
        ((math.nan, 0.9), ValueError, r"beta parameter at index 0: nan$"),
    ],
    ids=str,
)  # fmt: skip
def test_betas_are_two_numbers(optimizer_class, betas, kind, message):
    refused(optimizer_class, "betas", betas, kind, f"^Invalid {message}")


@every_class
@pytest.mark.parametrize("seed", ["3", True, 1.5, torch.tensor(3)], ids=str)
def test_a_seed_is_an_int(optimizer_class, seed):
    refused(optimizer_class, "seed", seed, TypeError, "^Invalid seed: .*, expected an int or None")


@every_class
@pytest.mark.parametrize("rows", ["x", [None]], ids=str)
def test_rows_are_a_mask_or_ids(optimizer_class, rows):
    refused(optimizer_class, "rows", rows, TypeError, "^rows: expected a bool mask or integer ids")


@every_class
@pytest.mark.parametrize("lr", [0, 1, 0.5, torch.tensor(0.5), torch.tensor([0.5])], ids=str)
def test_every_kind_of_number_is_taken(optimizer_class, lr):
    optimizer = optimizer_class([torch.zeros(2, 2)], lr=lr)
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert float(optimizer.param_groups[0]["lr"]) == float(lr)


RANGES = {
    "momentum": (optim.SGD, {"momentum": -0.5}, ValueError, r"Invalid momentum( value)?: -0\.5"),
    "dampening": (optim.SGD, {"dampening": float("nan")}, ValueError, "Invalid dampening: nan"),
    "nesterov": (optim.SGD, {"nesterov": True}, ValueError, "Nesterov momentum requires"),
    "nesterov, dampened": (
        optim.SGD,
        {"nesterov": True, "momentum": 0.9, "dampening": 0.1},
        ValueError,
        "Nesterov momentum requires",
    ),
    "decay": (optim.SGD, {"decay_touched_rows": -1.0}, ValueError, "Invalid decay_touched_rows"),
    "eps": (optim.Adam, {"eps": -1.0}, ValueError, "Invalid eps"),
    "weight_decay": (optim.AdamW, {"weight_decay": -1.0}, ValueError, "Invalid weight_decay"),
    "lr_decay": (optim.Adagrad, {"lr_decay": -1.0}, ValueError, "Invalid lr_decay"),
    "maximize": (optim.RowWiseAdagrad, {"maximize": "no"}, TypeError, "Invalid maximize: 'no'"),
}


@pytest.mark.parametrize(
    ("optimizer_class", "override", "error", "message"), RANGES.values(), ids=RANGES
)
@pytest.mark.parametrize("where", ["constructor", "group", "added group"])
def test_a_group_is_held_to_the_same_ranges(optimizer_class, override, error, message, where):
    first, second = (torch.nn.Parameter(torch.zeros(3, 2)) for _ in range(2))
    optimizer = optimizer_class([first])
    make = {
        "constructor": lambda: optimizer_class([second], **override),
        "group": lambda: optimizer_class([{"params": [second], **override}]),
        "added group": lambda: optimizer.add_param_group({"params": [second], **override}),
    }
    with pytest.raises(error, match=message.replace("Invalid eps", "Invalid (eps|epsilon value)")):
        make[where]()
    assert len(optimizer.param_groups) == 1
