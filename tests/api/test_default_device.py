"""Another default device than the tables': every entry point computes as without it, and no factory forgets it."""

import ast
import inspect
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import integer_gradient, table
from tiers import where
from torch import Tensor, nn
from torch.utils._device import _device_constructors
from torch.utils._pytree import tree_flatten

import gpu_embed
import gpu_embed.text
from gpu_embed import _self_check, env_report, functional, reference
from gpu_embed.bounds import BoundsRecord
from gpu_embed.demo import next_word, phrases

ROOT = Path(__file__).resolve().parents[2]
# Ids that repeat, with padding (3), of a table of seven rows.
IDS = [[5, 1, 3], [6, 3, 5], [0, 0, 2]]
OFFSETS = [0, 0, 2, 5]

Call = Callable[[], Any]


@contextmanager
def default_device(how: str, device: str = "meta") -> Iterator[None]:
    """Both ways to choose one; nothing on "meta" can be computed with."""
    if how == "with":
        with torch.device(device):
            yield
        return
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_device(None)


in_both_ways = pytest.mark.parametrize("how", ["with", "set_default_device"])


def assert_same(actual: Any, expected: Any) -> None:
    """Equal in structure, devices, layouts, and values."""
    found, structure = tree_flatten(actual)
    wanted, wanted_structure = tree_flatten(expected)
    assert structure == wanted_structure
    for one, other in zip(found, wanted, strict=True):
        if not isinstance(one, Tensor):
            assert one == other
            continue
        assert (one.device, one.layout, one.dtype) == (other.device, other.layout, other.dtype)
        assert torch.equal(one.to_dense(), other.to_dense())


def check(make: Callable[[str], Call], device: str, how: str) -> None:
    """The call without and under another default device; `make` makes it, and its tensors."""
    torch.manual_seed(0)
    expected = make(device)()
    call = make(device)
    torch.manual_seed(0)
    with default_device(how):
        actual = call()
    assert_same(actual, expected)


def ids_on(device: str, values: Any = IDS, dtype: torch.dtype = torch.int64) -> Tensor:
    return torch.tensor(values, dtype=dtype, device=device)


def parameter(device: str, dtype: torch.dtype = torch.float32) -> nn.Parameter:
    return nn.Parameter(table(7, 4, dtype, device))


def trained(run: Callable[[], Tensor], *leaves: Tensor) -> tuple[Any, ...]:
    """What a call returns, its gradients, and what it made of the leaves."""
    output = run()
    # Not the method, in which torch.device() is not in force.
    torch.autograd.backward(output, torch.ones_like(output))
    return output.detach(), [leaf.grad for leaf in leaves], [leaf.detach() for leaf in leaves]


LOOKUPS: dict[str, dict[str, Any]] = {
    "plain": {},
    "padding": {"padding_idx": 3},
    "frequency": {"scale_grad_by_freq": True},
    "sparse": {"sparse": True, "padding_idx": 3},
    "max_norm": {"max_norm": 1.0},
}
LAYOUTS = ("rows", "offsets", "last offset", "weights")


@in_both_ways
@pytest.mark.parametrize("form", ["function", "layer"])
@pytest.mark.parametrize("kind", LOOKUPS)
def test_embedding(target, how, kind, form):
    # Of a dtype that torch does not take, where it can be.
    id_dtype = torch.uint8 if form == "function" else torch.int64

    def make(device: str) -> Call:
        ids, arguments = ids_on(device, dtype=id_dtype), LOOKUPS[kind]
        layer = gpu_embed.Embedding.from_pretrained(table(7, 4, torch.float32, device), False)
        vars(layer).update(arguments)
        if form == "layer":
            return lambda: [trained(lambda: layer(ids), layer.weight) for _ in range(2)]
        weight = layer.weight
        return lambda: trained(lambda: functional.embedding(ids, weight, **arguments), weight)

    check(make, target.device, how)


def a_bag_has(layout: str, mode: str, kind: str) -> bool:
    """Weights are for sums; counts and sparse gradients not for maxima; a renorm reads no offsets."""
    return (
        (layout != "weights" or mode == "sum")
        and (mode != "max" or kind not in ("frequency", "sparse"))
        and (layout == "rows" or kind != "max_norm")
    )


@in_both_ways
@where(a_bag_has)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", LOOKUPS)
@pytest.mark.parametrize(
    ("mode", "dtype"),
    [
        ("sum", torch.float32),
        ("mean", torch.float32),
        ("mean", torch.bfloat16),
        ("max", torch.float32),
    ],
)
def test_embedding_bag(target, how, mode, dtype, kind, layout):
    arguments = {**LOOKUPS[kind], "mode": mode}

    def make(device: str) -> Call:
        ids, weight = ids_on(device), parameter(device, dtype)
        given = dict(arguments)
        leaves = [weight]
        if layout == "weights":
            leaves.append(given.setdefault("per_sample_weights", nn.Parameter(ids.to(dtype))))
        elif layout != "rows":
            ids = ids.view(-1)
            given["offsets"] = ids_on(device, OFFSETS)
            given["include_last_offset"] = layout == "last offset"
        return lambda: trained(lambda: functional.embedding_bag(ids, weight, **given), *leaves)

    check(make, target.device, how)


@in_both_ways
@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
def test_embedding_bag_layer(target, how, mode):
    def make(device: str) -> Call:
        layer = gpu_embed.EmbeddingBag(7, 4, mode=mode, device=device)
        layer.weight.data.copy_(table(7, 4, torch.float32, device))
        ids = ids_on(device)
        return lambda: trained(lambda: layer(ids), layer.weight)

    check(make, target.device, how)


SIZES = {"user": (7, 4), "item": (5, 8)}


def filled(layer: nn.Module) -> nn.Module:
    """Values that depend on no generator."""
    with torch.no_grad():
        for number, rows in enumerate(layer.parameters()):
            steps = torch.arange(rows.numel(), device=rows.device) % (5 + number) - 2.0
            rows.copy_(steps.view(rows.shape))
    return layer


@in_both_ways
@pytest.mark.parametrize("constructed", ["outside", "inside", "on the default device"])
@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
def test_batched_bags(target, how, mode, sparse, constructed):
    bag_ids = {"user": ([5, 1, 3, 1], [0, 3]), "item": ([4, 0], [0, 0])}

    def make(device: str) -> Call:
        def layer(device: str | None = device) -> nn.Module:
            return gpu_embed.TableBatchedEmbeddingBag(
                SIZES, mode=mode, padding_idx={"user": 3}, sparse=sparse, device=device
            )

        outside = layer()
        bags = {
            name: tuple(ids_on(device, part) for part in parts) for name, parts in bag_ids.items()
        }

        def call() -> Any:
            tables = outside
            if constructed == "inside":
                tables = layer()
            elif constructed == "on the default device":
                tables = layer(None).to_empty(device=device)
            filled(tables)
            batch = gpu_embed.batch_bags(bags)
            output = tables(batch.input, batch.offsets)
            torch.autograd.backward(output, torch.ones_like(output))
            grad = tables.weight.grad
            if isinstance(grad, gpu_embed.TableGradient):
                grad = grad.to_dense()
            return tuple(batch), output.detach(), grad

        return call

    check(make, target.device, how)


@in_both_ways
def test_batched_rows_of_padded_ids(target, how):
    def make(device: str) -> Call:
        layer = filled(gpu_embed.TableBatchedEmbedding({"a": (7, 4), "b": (5, 4)}, device=device))
        ids = [ids_on(device, [[4, 6, 0], [1, 0, 0]]), ids_on(device, [[4, 0], [2, 3]])]
        lengths = [ids_on(device, [2, 1]), ids_on(device, [1, 2])]

        def call() -> Any:
            by_value = gpu_embed.batch_padded(ids, padding_value=0)
            batch = gpu_embed.batch_padded(ids, lengths)
            return tuple(by_value), trained(lambda: layer(batch.input, batch.offsets), layer.weight)

        return call

    check(make, target.device, how)


OPTIMIZERS = [
    getattr(gpu_embed.optim, name) for name in ("SGD", "Adagrad", "RowWiseAdagrad", "Adam", "AdamW")
]


@in_both_ways
@pytest.mark.parametrize(
    ("rounding", "rows", "lr"),
    [
        (False, None, "number"),
        (False, None, "tensor"),
        (False, [5, 1], "number"),
        (True, None, "number"),
    ],
    ids=["plain", "lr on the device", "some rows", "stochastic rounding"],
)
@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=lambda one: one.__name__)
def test_optimizer_step(target, how, optimizer, rounding, rows, lr):
    """The seed of stochastic rounding is drawn where none is given."""

    def make(device: str) -> Call:
        dtype = torch.bfloat16 if rounding else torch.float32
        weight, ids = parameter(device, dtype), ids_on(device)
        rate = 0.5 if lr == "number" else torch.tensor(0.5, dtype=torch.float64, device=device)

        def call() -> Any:
            arguments = {"stochastic_rounding": rounding, "rows": rows}
            stepper = optimizer([weight], lr=rate, **arguments)
            for _ in range(2):
                stepper.zero_grad()
                torch.autograd.backward(functional.embedding(ids, weight, sparse=True).sum())
                stepper.step()
            copy = optimizer([weight], lr=rate, **arguments)
            copy.load_state_dict(stepper.state_dict())
            # The seed is among them.
            return weight.detach(), copy.state_dict()["state"]

        return call

    check(make, target.device, how)


@in_both_ways
@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=lambda one: one.__name__)
def test_updates_of_batched_tables_in_the_backward(target, how, optimizer):
    def make(device: str) -> Call:
        layer = filled(gpu_embed.TableBatchedEmbeddingBag(SIZES, sparse=True, device=device))
        ids, offsets = ids_on(device, [5, 1, 4, 4]), ids_on(device, [0, 2, 2, 3, 4])

        def call() -> Any:
            updates = gpu_embed.optim.apply_in_backward(layer, optimizer, lr=0.5)
            torch.autograd.backward(layer(ids, offsets).sum())
            updates.remove()
            return layer.weight.detach()

        return call

    check(make, target.device, how)


@in_both_ways
@pytest.mark.parametrize("norm_type", [1.0, 2.0, torch.inf])
def test_clipped_gradients(target, how, norm_type):
    def make(device: str) -> Call:
        weight = parameter(device)
        tables = filled(gpu_embed.TableBatchedEmbeddingBag(SIZES, sparse=True, device=device))
        ids, offsets = ids_on(device, [5, 1, 4, 4]), ids_on(device, [0, 2, 2, 3, 4])

        def call() -> Any:
            torch.autograd.backward(functional.embedding(ids, weight, sparse=True).sum())
            torch.autograd.backward(tables(ids, offsets).sum())
            both = [weight, tables.weight]
            norm = gpu_embed.optim.clip_grad_norm_(both, 0.5, norm_type)
            return norm, weight.grad, tables.weight.grad.to_dense()

        return call

    check(make, target.device, how)


class Model(nn.Module):
    """A lookup and bags."""

    def __init__(self, device: str) -> None:
        super().__init__()
        self.words = nn.Embedding(7, 4, padding_idx=3, device=device)
        self.bags = nn.EmbeddingBag(7, 4, mode="mean", device=device)
        filled(self)

    def forward(self, ids: Tensor) -> Tensor:
        return self.words(ids).sum(1) + self.bags(ids)


@in_both_ways
def test_a_replaced_model(target, how):
    def make(device: str) -> Call:
        model, ids = Model(device), ids_on(device)

        def call() -> Any:
            report = gpu_embed.replace_embeddings(model)
            verification = report.verify(ids)
            replaced = trained(lambda: model(ids), *model.parameters())
            return str(report), str(verification), replaced, gpu_embed.restore_embeddings(model)

        return call

    check(make, target.device, how)


@in_both_ways
def test_torchs_own_lookup(target, how):
    def make(device: str) -> Call:
        weight, ids = parameter(device), ids_on(device)

        def call() -> Any:
            with gpu_embed.override_aten():
                return trained(lambda: nn.functional.embedding(ids, weight), weight)

        return call

    check(make, target.device, how)


@in_both_ways
@pytest.mark.parametrize("mode", ["raise", "sync", "off"])
@pytest.mark.parametrize("bags", [False, True], ids=["rows", "bags"])
def test_ids_out_of_range(target, how, bags, mode):
    def make(device: str) -> Call:
        weight, ids = parameter(device), ids_on(device, [[5, 1], [0, 7]])
        look_up = functional.embedding_bag if bags else functional.embedding

        def call() -> Any:
            expected = nullcontext() if mode == "off" else pytest.raises(IndexError)
            with gpu_embed.set_bounds_check(mode), expected as error:
                look_up(ids, weight)
                gpu_embed.check_bounds()
            return error and str(error.value), look_up(ids[:1], weight).detach()

        return call

    check(make, target.device, how)


@in_both_ways
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int64, torch.complex64], ids=str)
def test_errors_name_the_tensors_type(how, dtype):
    def make(device: str) -> Call:
        weight, ids = torch.zeros(7, 4, device=device).to(dtype), ids_on(device)

        def call() -> str:
            with pytest.raises(RuntimeError, match="scalar types") as error:
                functional.embedding_bag(ids, weight)
            return str(error.value)

        return call

    check(make, "cpu", how)


@in_both_ways
def test_the_first_lookup_of_a_thread(target, how):
    """What it leaves to later ones, the record of ids out of range and the known table, is of use to them."""
    weight, ids = parameter(target.device), ids_on(target.device)
    expected = functional.embedding(ids, weight.detach())
    bags = functional.embedding_bag(ids, weight.detach())
    fresh = parameter(target.device)
    results: list[Any] = []

    def look_up() -> None:
        with default_device(how):
            record = BoundsRecord(torch.device(target.device))
            results.append((record.words, record.flag))
            results.append(functional.embedding(ids, fresh).detach())
        results.append(functional.embedding(ids, fresh).detach())
        with gpu_embed.set_bounds_check("sync"), pytest.raises(IndexError, match="id 11 at"):
            functional.embedding(ids + 6, fresh)
        results.append(functional.embedding_bag(ids, fresh).detach())

    with gpu_embed.use_backend(target.backend):
        thread = threading.Thread(target=look_up)
        thread.start()
        thread.join()
    (words, flag), *lookups = results
    assert words.device.type == target.device
    assert flag.device.type == "cpu"
    assert_same(lookups, [expected, expected, bags])
    assert_same(functional.embedding(ids, fresh).detach(), expected)


@pytest.mark.full
@in_both_ways
def test_self_check(target, how):
    with default_device(how):
        found = _self_check.check_backend(target.backend, torch.device(target.device))
    assert (found.status, found.detail) == ("right", "")


@pytest.mark.full
@in_both_ways
def test_the_environment_report(how, capsys):
    with default_device(how):
        assert env_report.main([]) == 0
    report = capsys.readouterr().out
    assert re.search(r"^  cpu +torch +right", report, re.M)
    assert re.search(r"^  cpu +reference +right", report, re.M)


@in_both_ways
def test_keras_layer(target, how, monkeypatch):
    if find_spec("keras") is None:
        pytest.skip("keras is not installed")
    monkeypatch.setenv("KERAS_BACKEND", "torch")
    import keras

    import gpu_embed.keras

    def make(device: str) -> Call:
        with keras.device(device):
            layer = gpu_embed.keras.Embedding(7, 4)
            layer.build(())
            layer.set_weights([table(7, 4, torch.float32, "cpu").numpy()])
        ids = ids_on(device, [[5, -1], [0, 3]])

        def call() -> Any:
            with keras.device(device):
                weight = layer.trainable_variables[0].value
                weight.grad = None
                return trained(lambda: layer(ids), weight)

        return call

    check(make, target.device, how)


def text_call(device: str) -> Call:
    pytest.importorskip("tokenizers")
    texts = ["hope to see you soon", "nice to see you again"]
    tokenizer = gpu_embed.text.vocabulary(texts)

    def call() -> Any:
        errors = []
        for ids in ([[1, 9], [2]], torch.arange(3, device="cpu"), []):
            try:
                gpu_embed.text.check_table_size(ids, 2)
            except ValueError as error:
                errors.append(str(error))
        return gpu_embed.text.encode(tokenizer, texts, device), errors

    return call


def picture_call(device: str) -> Call:
    plot = pytest.importorskip("gpu_embed.plot", exc_type=ImportError)
    weight, ids = table(7, 4, torch.float32, device), ids_on(device, [2, 6])

    def call() -> Any:
        pictures = [
            plot.table(weight, ids=chosen, before=before)
            for chosen in (None, [2, 6], ids, ids.cpu().numpy())
            for before in (None, weight * 2)
        ]
        return [
            [line.get_xydata().tolist() for line in picture.axes[0].lines] for picture in pictures
        ]

    return call


def reference_call(device: str) -> Call:
    weight, ids = table(7, 4, torch.float32, "cpu").numpy(), ids_on("cpu").numpy()
    grad_output = integer_gradient((*ids.shape, 4), torch.float32, "cpu").numpy()
    return lambda: [
        rows.tolist()
        for rows in (
            reference.embedding(weight, ids),
            reference.embedding_dense_backward(grad_output, ids, 7, 3, True),
        )
    ]


def demo_call(device: str) -> Call:
    tokens = ["hope", "to", "see", "you", "soon", "nice", "to", "see", "you", "again"] * 9
    size = next_word.Size(vocabulary=6, context=2, embedding_dim=4, batch=4, steps=2)

    def call() -> Any:
        corpus = next_word.encode_text(tokens, size.vocabulary)
        run = next_word.new_run("ours", gpu_embed.Embedding, size, torch.device(device), seed=1)
        for context, following in next_word.random_batches(corpus.ids.to(device), size, seed=2):
            run.step(context, following)
        pairs = [(0, 1), (1, 0), (0, 2)]
        levels = next_word.frequency_loss(corpus), phrases.lowest_loss(pairs)
        return run.losses, *levels, corpus.counts

    return call


def bench_call(device: str) -> Call:
    ids = pytest.importorskip("gpu_embed.bench.ids")
    kinds = ("uniform", "zipf:1.1", "equal", "sorted", "hot:0.5", "spread:3", "text")
    return lambda: [ids.draw(kind, 20, 50, 1, padding=0.2, padding_idx=3) for kind in kinds]


@pytest.mark.full
@in_both_ways
@pytest.mark.parametrize("make", [text_call, picture_call, reference_call, demo_call, bench_call])
def test_what_has_no_backend_of_its_own(how, make):
    check(make, "cpu", how)


# The source.

SOURCES = [
    path for folder in ("gpu_embed", "bench", "examples") for path in (ROOT / folder).rglob("*.py")
]
FACTORIES = {one.__name__ for one in _device_constructors()} | {"Generator"}


def forgotten_devices(source: str) -> list[str]:
    """Calls of torch's factories that take the default device."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        module, _, called = name.rpartition(".")
        is_factory = module == "torch" and called in FACTORIES
        # A generator's only argument is its device.
        is_told = given.get("device", "None") != "None" or (called == "Generator" and node.args)
        if is_factory and not is_told:
            found.append(f"{node.lineno}: {name}")
    return found


def optional_devices(source: str) -> list[str]:
    """Factories whose `device=` is an argument of the function around them that may be None."""
    found = []
    for function in ast.walk(ast.parse(source)):
        if not isinstance(function, ast.FunctionDef):
            continue
        arguments = [*function.args.args, *function.args.kwonlyargs]
        optional = {
            one.arg for one in arguments if one.annotation and "None" in ast.unparse(one.annotation)
        }
        for node in ast.walk(function):
            if isinstance(node, ast.Call) and ast.unparse(node.func).startswith("torch."):
                for keyword in node.keywords:
                    if keyword.arg == "device" and ast.unparse(keyword.value) in optional:
                        found.append(f"{function.name}: {ast.unparse(node.func)}")
    return found


# Here None means the default device, as in torch's own layers and factories.
MEANT = {
    ("gpu_embed/nn/quantized.py", "__init__: torch.zeros"),
    ("gpu_embed/nn/tables.py", "__init__: torch.zeros"),
    ("gpu_embed/text.py", "encode: torch.tensor"),
}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_factory_is_told_its_device(path):
    source = path.read_text(encoding="utf-8")
    assert forgotten_devices(source) == []
    name = path.relative_to(ROOT).as_posix()
    assert {(name, one) for one in optional_devices(source)} <= MEANT


@pytest.mark.parametrize(
    ("source", "count"),
    [
        ("torch.arange(3)", 1),
        ("torch.arange(3, device=None)", 1),
        ("torch.zeros(3, device=x.device)", 0),
        ("x = y + torch.Generator().manual_seed(0)", 1),
        ("torch.Generator(device).manual_seed(0)", 0),
        ("torch.as_tensor(x).cpu()", 1),
        ("torch.zeros_like(x), x.new_zeros(3), torch.cat([x])", 0),
    ],
)
def test_forgotten_devices_are_found(source, count):
    assert len(forgotten_devices(source)) == count


def test_optional_devices_are_found():
    source = inspect.cleandoc(
        """
        def f(x, device: torch.device | None = None):
            return torch.zeros(3, device=device), torch.ones(3, device=x.device)
        def g(device: torch.device):
            return torch.zeros(3, device=device)
        """
    )
    assert optional_devices(source) == ["f: torch.zeros"]
