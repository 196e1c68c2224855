"""`torch.utils.swap_tensors` gives a looked-up table other content: ours look that up, as torch's layers do."""

import gc
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from cases import integer_gradient, same_bits, table
from targets import Target
from torch import Tensor
from torch.nn import Parameter
from torch.testing._internal.two_tensor import TwoTensor

import gpu_embed
from gpu_embed import optim
from gpu_embed.functional import embedding
from gpu_embed.ops.known import KnownTables, known_tables

IDS = torch.tensor([[3, 0, 3], [1, 1, 5]])


@pytest.fixture
def swap_mode() -> Iterator[None]:
    """Modules swap their parameters' content where they would set its data."""
    former = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(True)
    yield
    torch.__future__.set_swap_module_params_on_conversion(former)


def run(layer: torch.nn.Module, ids: Tensor = IDS) -> tuple[Tensor, Tensor | None]:
    """A layer's output, and its weight's new gradient if it is trained; all integers."""
    layer.weight.grad = None
    output = layer(ids)
    if not layer.weight.requires_grad:
        return output, None
    output.backward(integer_gradient(tuple(output.shape), output.dtype, "cpu").to(output.device))
    grad = layer.weight.grad
    # Else the next swap finds the gradient in use.
    layer.weight.grad = None
    return output.detach(), grad if grad.is_meta else grad.to_dense()


def assert_runs_as(layer: torch.nn.Module, expected: torch.nn.Module, ids: Tensor = IDS) -> None:
    """Twice: the first lookup after a change may be the long way, the second is not."""
    for _ in range(2):
        (output, grad), (wanted, wanted_grad) = run(layer, ids), run(expected, ids)
        assert output.device == wanted.device
        if output.is_meta:
            assert (output.shape, output.dtype) == (wanted.shape, wanted.dtype)
            continue
        assert same_bits(output, wanted)
        assert (grad is None) == (wanted_grad is None)
        if grad is not None:
            assert torch.equal(grad, wanted_grad)


def layers(
    kind: str, dtype: torch.dtype, arguments: dict[str, Any], frozen: bool, replace: bool
) -> tuple[torch.nn.Module, torch.nn.Module]:
    """Ours, which has been looked up twice, and torch's with the same values."""
    values = integer_gradient((6, 4), dtype, "cpu")
    expected, layer = (
        getattr(package, kind)(6, 4, dtype=dtype, _weight=values.clone(), **arguments)
        for package in (torch.nn, torch.nn if replace else gpu_embed)
    )
    if replace:
        gpu_embed.replace_embeddings(layer)
    for one in (expected, layer):
        one.weight.requires_grad_(not frozen)
    assert_runs_as(layer, expected)
    return layer, expected


LAYERS = [
    ("Embedding", {}),
    ("Embedding", {"padding_idx": 1}),
    ("Embedding", {"sparse": True}),
    ("Embedding", {"max_norm": 1e6}),
    ("EmbeddingBag", {"mode": "sum"}),
    ("EmbeddingBag", {"mode": "max"}),
]


@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
@pytest.mark.parametrize("replace", [False, True], ids=["made", "replaced"])
@pytest.mark.parametrize(("kind", "arguments"), LAYERS, ids=str)
@pytest.mark.parametrize(
    "to", [torch.float64, torch.bfloat16, torch.float32, "meta", "cpu"], ids=str
)
def test_module_to(
    swap_mode: None, kind: str, arguments: dict[str, Any], frozen: bool, replace: bool, to: Any
) -> None:
    layer, expected = layers(kind, torch.float32, arguments, frozen, replace)
    weight = layer.weight
    for one in (layer, expected):
        one.to(to)
    assert layer.weight is weight
    ids = IDS.to(layer.weight.device)
    if layer.weight.is_meta:
        # torch's own rescaling has no form for meta tensors.
        expected.max_norm = None
    assert_runs_as(layer, expected, ids)


@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
@pytest.mark.parametrize("replace", [False, True], ids=["made", "replaced"])
@pytest.mark.parametrize(("kind", "arguments"), LAYERS, ids=str)
@pytest.mark.parametrize("assign", [False, True], ids=["copied", "assigned"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_load_state_dict(
    swap_mode: None,
    kind: str,
    arguments: dict[str, Any],
    frozen: bool,
    replace: bool,
    assign: bool,
    dtype: torch.dtype,
) -> None:
    layer, expected = layers(kind, dtype, arguments, frozen, replace)
    weight = layer.weight
    for one in (layer, expected):
        one.load_state_dict({"weight": torch.arange(24.0).view(6, 4).to(dtype)}, assign=assign)
    assert layer.weight is weight
    assert layer.weight[5, 3] == 23
    assert_runs_as(layer, expected)


def other_values() -> Tensor:
    return torch.arange(24.0).view(6, 4)


def fewer_rows() -> Tensor:
    return torch.arange(16.0).view(4, 4)[:, :2]


def transposed() -> Tensor:
    return torch.arange(24.0).view(4, 6).T


def complex_numbers() -> Tensor:
    return torch.complex(other_values(), other_values().flip(0))


def integers() -> Tensor:
    return torch.arange(24).view(6, 4)


def meta() -> Tensor:
    return torch.empty(6, 4, device="meta")


@pytest.mark.parametrize(
    "content", [other_values, fewer_rows, transposed, complex_numbers, integers, meta]
)
def test_any_content(target: Target, content: Callable[[], Tensor]) -> None:
    weight = Parameter(table(6, 4, torch.float32, target.device), requires_grad=False)
    ids = torch.tensor([[3, 0, 3], [1, 1, 2]], device=target.device)
    for _ in range(2):
        embedding(ids, weight)
    values = content()
    if not values.is_meta:
        values = values.to(target.device)
    torch.utils.swap_tensors(weight, Parameter(values.clone(), requires_grad=False))
    for _ in range(2):
        if values.is_meta:
            output = embedding(ids.to("meta"), weight)
            assert (output.shape, output.device.type) == ((2, 3, 4), "meta")
        else:
            assert same_bits(embedding(ids, weight), values[ids])


@pytest.mark.parametrize("data", [False, True], ids=["swapped", "data-set"])
@pytest.mark.parametrize("dtype", [torch.complex64, torch.float32])
def test_the_same_memory_read_conjugated(target: Target, data: bool, dtype: torch.dtype) -> None:
    values = table(6, 4, torch.complex64, target.device)
    before, after = values, values.conj()
    if dtype is torch.float32:
        before, after = before.imag, after.imag
    weight = Parameter(before, requires_grad=False)
    ids = IDS.to(target.device)
    for _ in range(2):
        assert torch.equal(embedding(ids, weight), before[ids])
    if data:
        weight.data = after
    else:
        torch.utils.swap_tensors(weight, Parameter(after, requires_grad=False))
    for _ in range(2):
        assert torch.equal(embedding(ids, weight), after[ids])


class Doubled(Tensor):
    """A subclass whose embedding is its own."""

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if function is torch.nn.functional.embedding:
            return 2 * torch.embedding(args[1].as_subclass(Tensor), args[0])
        return super().__torch_function__(function, types, args, kwargs or {})


@pytest.mark.parametrize("kind", ["Embedding", "EmbeddingBag"])
@pytest.mark.parametrize("replace", [False, True], ids=["made", "replaced"])
def test_a_tensor_subclass_goes_to_torchs_own_function(kind: str, replace: bool) -> None:
    """`_apply` swaps such content in, whatever the mode."""
    layer, expected = layers(kind, torch.float32, {}, True, replace)
    weight = layer.weight
    for one in (layer, expected):
        one._apply(lambda values: TwoTensor(values + 1, values + 2))
    assert layer.weight is weight
    assert type(layer.weight) is TwoTensor
    output, wanted = layer(IDS), expected(IDS)
    assert type(output) is type(wanted) is TwoTensor
    assert torch.equal(output.a, wanted.a)
    assert torch.equal(output.b, wanted.b)


def test_an_embedding_of_a_subclasss_own() -> None:
    weight = Parameter(table(6, 4, torch.float32, "cpu"), requires_grad=False)
    for _ in range(2):
        embedding(IDS, weight)
    values = weight.detach().clone()
    # Of the same memory, which the known table describes.
    torch.utils.swap_tensors(weight, weight.detach().as_subclass(Doubled))
    for _ in range(2):
        assert torch.equal(embedding(IDS, weight), 2 * values[IDS])


@pytest.mark.parametrize(
    "content",
    [
        lambda: torch.eye(6, 4).to_sparse(),
        lambda: torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)]),
    ],
    ids=["sparse", "nested"],
)
def test_what_has_no_address_or_shape(content: Callable[[], Tensor]) -> None:
    """torch refuses these, as where the table was never looked up."""
    weight, fresh = (
        Parameter(table(6, 4, torch.float32, "cpu"), requires_grad=False) for _ in range(2)
    )
    embedding(IDS, weight)
    errors = []
    for one in (weight, fresh):
        torch.utils.swap_tensors(one, Parameter(content(), requires_grad=False))
        with pytest.raises(Exception) as raised:
            embedding(IDS, one)
        errors.append((raised.type, str(raised.value)))
    assert errors[0] == errors[1]


def test_content_comes_back() -> None:
    first, second = (Parameter(torch.full((6, 4), value)) for value in (1.0, 2.0))
    for value in (1, 2, 1, 2):
        assert (embedding(IDS, first) == value).all()
        assert (embedding(IDS, second) == 3 - value).all()
        torch.utils.swap_tensors(first, second)


def test_a_swap_between_forward_and_backward_is_torchs_error(swap_mode: None) -> None:
    layer = gpu_embed.Embedding(6, 4)
    run(layer)
    output = layer(IDS)
    layer.to(torch.float64)
    with pytest.raises(RuntimeError, match="poisoned by swap_tensors"):
        output.sum().backward()


OPTIMIZERS = [optim.SGD, optim.Adagrad, optim.RowWiseAdagrad, optim.Adam]


@pytest.mark.parametrize("make", OPTIMIZERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("change", ["to", "load"])
def test_optimizers(
    swap_mode: None, make: Callable[..., Any], dtype: torch.dtype, change: str
) -> None:
    """A step after a swap is that of a layer whose data was set."""
    stepped = []
    for swap in (True, False):
        torch.__future__.set_swap_module_params_on_conversion(swap)
        layer = gpu_embed.Embedding(6, 4, sparse=True, dtype=dtype)
        layer.load_state_dict({"weight": torch.arange(24.0).view(6, 4)})
        optimizer = make(layer.parameters(), lr=0.5)
        for _ in range(2):
            optimizer.zero_grad()
            layer(IDS).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            if change == "to":
                layer.to("cpu")
            else:
                layer.load_state_dict({"weight": layer.weight.detach() + 1})
        stepped.append(layer.weight.detach())
    assert torch.equal(*stepped)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("widths", [(4, 4), (4, 2)], ids=["one-width", "widths"])
@pytest.mark.parametrize(
    ("make", "sparse"), [(None, False), (None, True), *((make, True) for make in OPTIMIZERS)]
)
@pytest.mark.parametrize("to", [torch.float16, torch.float64, "meta", "load"], ids=str)
def test_batched_tables(
    swap_mode: None,
    dtype: torch.dtype,
    widths: tuple[int, int],
    make: Callable[..., Any] | None,
    sparse: bool,
    to: Any,
) -> None:
    """After a forward, a backward and a step: as a new layer with these values."""
    shapes = {"a": (6, widths[0]), "b": (5, widths[1])}
    ids = torch.tensor([1, 2, 2, 0, 3])
    offsets = torch.tensor([0, 2, 3, 4, 5])
    layer = gpu_embed.TableBatchedEmbeddingBag(shapes, sparse=sparse, dtype=dtype)
    layer.load_state_dict(
        {f"{n}.weight": integer_gradient(s, dtype, "cpu") for n, s in shapes.items()}
    )
    optimizer = make and make(layer.parameters(), lr=0.5)
    weight = layer.weight
    for _ in range(2):
        layer(ids, offsets).sum().backward()
        if optimizer:
            optimizer.step()
        layer.zero_grad()
    state = {name: value.clone() for name, value in layer.state_dict().items()}
    if to == "load":
        to = dtype
        state = {name: value + 1 for name, value in state.items()}
        layer.load_state_dict(state)
    else:
        layer.to(to)
    assert layer.weight is weight
    if to == "meta":
        output = layer(ids.to(to), offsets.to(to))
        assert output.is_meta
        assert output.shape == (2, sum(widths))
        return
    fresh = gpu_embed.TableBatchedEmbeddingBag(shapes, sparse=sparse, dtype=to)
    fresh.load_state_dict({name: value.to(to) for name, value in state.items()})
    for _ in range(2):
        outputs = [one(ids, offsets) for one in (layer, fresh)]
        assert same_bits(*(output.detach() for output in outputs))
        grads = []
        for one, output in zip((layer, fresh), outputs, strict=True):
            output.sum().backward()
            grads.append(one.weight.grad.to_dense())
            one.zero_grad()
        assert torch.equal(*grads)


@pytest.mark.full
def test_a_table_that_is_gone_is_let_go(target: Target) -> None:
    """Its memory and its module; what stays of it holds neither."""
    layer = gpu_embed.Embedding(6, 4, device=target.device)
    ids = IDS.to(target.device)
    for _ in range(2):
        layer(ids).sum().backward()
    assert id(layer.weight) in known_tables
    gone = weakref.ref(layer), weakref.ref(layer.weight.untyped_storage())
    del layer
    gc.collect()
    assert [one() for one in gone] == [None, None]


@pytest.mark.full
def test_content_that_was_swapped_out_is_let_go(target: Target) -> None:
    weight = Parameter(table(6, 4, torch.float32, target.device))
    ids = IDS.to(target.device)
    for _ in range(2):
        embedding(ids, weight).sum().backward()
    gone = weakref.ref(weight.untyped_storage())
    torch.utils.swap_tensors(weight, Parameter(torch.zeros(6, 4, device=target.device)))
    gc.collect()
    assert gone() is None


def test_nothing_is_kept_on_the_parameter() -> None:
    weight = Parameter(table(6, 4, torch.float32, "cpu"))
    embedding(IDS, weight)
    assert id(weight) in known_tables
    assert vars(weight) == {}
    assert weakref.getweakrefcount(weight) == 0


def test_number_of_known_tables_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(KnownTables, "MAX_TABLES", 50)
    tables = []
    for i in range(120):
        # Alive, so that no two have one id.
        tables.append(Parameter(torch.full((6, 4), float(i)), requires_grad=False))
        embedding(IDS, tables[-1])
        assert id(tables[-1]) in known_tables
        assert len(known_tables) <= 50
    for i, weight in enumerate(tables):
        assert (embedding(IDS, weight) == i).all()


def test_an_id_that_names_another_table_now(target: Target) -> None:
    """Python gives the id of a table that is gone to the next one."""
    ids, reused = IDS.to(target.device), 0
    for i in range(50):
        shape = (6, 4) if i % 3 else (6, 2)
        values = table(*shape, torch.float16 if i % 2 else torch.float32, target.device)
        weight = Parameter(values, requires_grad=False)
        reused += id(weight) in known_tables
        for _ in range(2):
            assert same_bits(embedding(ids, weight), values[ids])
        del weight
    assert reused


def test_threads() -> None:
    """Each looks up tables of its own, which come and go, and their entries with them."""
    errors: list[BaseException] = []

    def look_up(value: float) -> None:
        try:
            for i in range(200):
                weight = Parameter(torch.full((6, 4), value + i), requires_grad=False)
                for _ in range(3):
                    assert (embedding(IDS, weight) == value + i).all()
                torch.utils.swap_tensors(
                    weight, Parameter(torch.full((6, 2), value - i), requires_grad=False)
                )
                assert torch.equal(embedding(IDS, weight), torch.full((2, 3, 2), value - i))
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=look_up, args=(1000.0 * n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
