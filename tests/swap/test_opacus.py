"""Opacus finds the rule for a layer by its exact type: ours have the rules of torch's."""

import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

import gpu_embed

grad_sample = pytest.importorskip("opacus.grad_sample", reason="Opacus is not installed")
opacus = pytest.importorskip("opacus", reason="Opacus is not installed")

pytestmark = [
    # Ids have no gradient.
    pytest.mark.filterwarnings("ignore:Full backward hook is firing"),
    pytest.mark.filterwarnings("ignore:Secure RNG turned off"),
]
IDS = torch.tensor([1, 2, 5, 3, 0])
OFFSETS = torch.tensor([0, 2])
ROWS = torch.tensor([[1, 2, 2], [3, 1, 1]])
# Integers whose half and third are integers: every sum and mean is exact.
GRAD_OUTPUT = 6.0 * torch.arange(1, 25)


@pytest.fixture(autouse=True)
def settable_flags() -> Iterator[None]:
    """Opacus sets cudnn's flags; torch's own test helpers, where another file has imported them, freeze them."""
    with torch.backends.__allow_nonbracketed_mutation():
        yield


def made(layer: str, arguments: dict[str, object], attach: Callable) -> tuple:
    module = getattr(gpu_embed, layer)(6, 4, **arguments)
    return module, attach(module)


def swapped_before(layer: str, arguments: dict[str, object], attach: Callable) -> tuple:
    module = getattr(torch.nn, layer)(6, 4, **arguments)
    gpu_embed.replace_embeddings(module)
    return module, attach(module)


def swapped_after(layer: str, arguments: dict[str, object], attach: Callable) -> tuple:
    module = getattr(torch.nn, layer)(6, 4, **arguments)
    attached = attach(module)
    gpu_embed.replace_embeddings(attached)
    return module, attached


def torchs(layer: str, arguments: dict[str, object], attach: Callable) -> tuple:
    module = getattr(torch.nn, layer)(6, 4, **arguments)
    return module, attach(module)


def backward(
    make: Callable, layer: str, arguments: dict[str, object], inputs: tuple, attach: Callable
) -> tuple:
    torch.manual_seed(0)
    module, attached = make(layer, arguments, attach)
    output = attached(*inputs)
    output.backward(GRAD_OUTPUT[: output.numel()].view_as(output))
    return module, attached


@pytest.mark.parametrize("make", [made, swapped_before, swapped_after])
@pytest.mark.parametrize(
    ("layer", "arguments", "inputs"),
    [
        ("Embedding", {}, (ROWS,)),
        ("Embedding", {"padding_idx": 2}, (ROWS,)),
        ("EmbeddingBag", {"mode": "sum"}, (IDS, OFFSETS)),
        ("EmbeddingBag", {"mode": "mean"}, (IDS, OFFSETS)),
        ("EmbeddingBag", {"mode": "mean", "padding_idx": 2}, (IDS, OFFSETS)),
        ("EmbeddingBag", {"mode": "max"}, (IDS, OFFSETS)),
    ],
    ids=str,
)
def test_per_sample_gradients_are_those_of_torchs_layers(
    make: Callable, layer: str, arguments: dict[str, object], inputs: tuple[Tensor, ...]
) -> None:
    attach = grad_sample.GradSampleModule
    module, _ = backward(make, layer, arguments, inputs, attach)
    expected, _ = backward(torchs, layer, arguments, inputs, attach)
    assert type(module) is getattr(gpu_embed, layer)
    assert torch.equal(module.weight.grad_sample, expected.weight.grad_sample)
    assert torch.equal(module.weight.grad, expected.weight.grad)


@pytest.mark.parametrize("make", [made, swapped_before, swapped_after])
@pytest.mark.parametrize("padding_idx", [None, 2])
@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
def test_per_sample_gradients_of_bags_in_rows(
    make: Callable, mode: str, padding_idx: int | None
) -> None:
    """Opacus has none for torch's layer; each is the gradient of that sample alone."""
    arguments = {"mode": mode, "padding_idx": padding_idx}
    # "sum": the gradient of the output is taken as it is.
    module, _ = backward(
        make,
        "EmbeddingBag",
        arguments,
        (ROWS,),
        lambda m: grad_sample.GradSampleModule(m, loss_reduction="sum"),
    )
    alone = torch.nn.EmbeddingBag(6, 4, **arguments, _weight=module.weight.detach().clone())
    for i, grad in enumerate(GRAD_OUTPUT[:8].view(2, 1, 4)):
        alone.zero_grad()
        alone(ROWS[i : i + 1]).backward(grad)
        assert torch.equal(module.weight.grad_sample[i], alone.weight.grad)


@pytest.mark.parametrize("make", [made, swapped_before, swapped_after])
@pytest.mark.parametrize(
    ("layer", "inputs"), [("Embedding", (ROWS,)), ("EmbeddingBag", (IDS, OFFSETS))], ids=str
)
def test_ghost_clipping(make: Callable, layer: str, inputs: tuple[Tensor, ...]) -> None:
    attach = grad_sample.GradSampleModuleFastGradientClipping
    _, attached = backward(make, layer, {}, inputs, attach)
    _, expected = backward(torchs, layer, {}, inputs, attach)
    assert torch.equal(attached.get_norm_sample(), expected.get_norm_sample())
    if layer == "Embedding":
        # Through the norms' own rule: the gradients are never made.
        assert gpu_embed.Embedding in attached.NORM_SAMPLERS


def test_private_training_is_that_of_torchs_layers() -> None:
    trained = []
    for replace in (False, True):
        torch.manual_seed(0)
        model = torch.nn.Sequential(
            torch.nn.Embedding(6, 4), torch.nn.Flatten(), torch.nn.Linear(12, 2)
        )
        if replace:
            gpu_embed.replace_embeddings(model)
        data = torch.utils.data.TensorDataset(ROWS.repeat(4, 1), torch.tensor([0, 1]).repeat(4))
        model, optimizer, loader = opacus.PrivacyEngine().make_private(
            module=model,
            optimizer=torch.optim.SGD(model.parameters(), lr=0.5),
            data_loader=torch.utils.data.DataLoader(data, batch_size=4),
            noise_multiplier=0.5,
            max_grad_norm=1.0,
            poisson_sampling=False,
        )
        for ids, labels in loader:
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(ids), labels).backward()
            optimizer.step()
        trained.append(model._module[0].weight.detach())
    assert torch.equal(*trained)


MAKE = "layer = gpu_embed.EmbeddingBag(6, 4, mode='sum')"
USE = """
import torch
attached = opacus.GradSampleModule(layer)
attached(torch.tensor([1, 2, 3]), torch.tensor([0, 2])).sum().backward()
assert layer.weight.grad_sample[:, :, 0].tolist() == [[0, 2, 2, 0, 0, 0], [0, 0, 0, 2, 0, 0]]
"""


@pytest.mark.parametrize(
    "lines",
    [
        ("import opacus", "import gpu_embed", MAKE),
        ("import gpu_embed", "import opacus", MAKE),
        ("import gpu_embed", MAKE, "import opacus"),
    ],
    ids=["before", "after", "after-the-layer"],
)
def test_order_of_imports(lines: tuple[str, ...]) -> None:
    script = "\n".join((*lines, USE))
    ran = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script], capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr


def test_opacus_is_not_imported_by_ours() -> None:
    script = """
import sys, torch, gpu_embed
layer = torch.nn.Sequential(torch.nn.Embedding(6, 4))
gpu_embed.replace_embeddings(layer)
layer[0].register_full_backward_hook(lambda *arguments: None)
layer(torch.tensor([1])).sum().backward()
assert not [name for name in sys.modules if name.startswith("opacus")]
"""
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
