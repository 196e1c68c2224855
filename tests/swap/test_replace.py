"""replace_embeddings, its report and proof, and restore_embeddings, on models made of torch alone."""

import contextlib
import copy
import io
import itertools
import re
import subprocess
import sys
from functools import partial, partialmethod
from pathlib import Path

import pytest
import torch
from cases import table
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.utils import parametrizations, parametrize, spectral_norm, weight_norm

import gpu_embed
from gpu_embed import replace_embeddings, restore_embeddings
from gpu_embed.backends._torch.backend import TorchBackend

SUPPORT = Path(__file__).resolve().parents[1] / "support"
IDS = torch.tensor([[5, 1, 0], [6, 3, 2]])


class Scaled(nn.Embedding):
    """As models have them: more than a lookup."""

    def forward(self, input):
        return super().forward(input) * 2


OVERRIDE = "gpu_embed.override_aten() reaches its lookup if it calls torch's"
SCALED_REASON = f"a subclass, which may do more: {Scaled.__module__}.Scaled; {OVERRIDE}"


class Model(nn.Module):
    """A lookup, bags, a subclass and one of our own layers."""

    def __init__(self, device="cpu"):
        super().__init__()
        self.words = nn.Embedding(7, 4, padding_idx=0)
        self.bags = nn.EmbeddingBag(7, 4, mode="sum")
        self.scaled = Scaled(7, 4)
        self.ours = gpu_embed.Embedding(7, 4)
        for number, layer in enumerate((self.words, self.bags, self.scaled, self.ours)):
            layer.weight = nn.Parameter(table(7, 4, torch.float32, device).round() + number)

    def forward(self, ids):
        return (self.words(ids) + self.scaled(ids) + self.ours(ids)).sum(1) + self.bags(ids)


def train(model, ids, steps=3, parameters=None):
    """The losses of some steps; integers and halves, so that every sum is exact in any order."""
    optimizer = torch.optim.SGD(parameters or model.parameters(), lr=0.5)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model(ids).sum()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def names(found):
    return [one.name for one in found]


def reasons(report):
    return {one.name: one.reason for one in report.skipped}


def test_only_the_class_changes():
    model = Model()
    parameters, keys = list(model.parameters()), list(model.state_dict())
    seen = []
    model.words.register_forward_hook(lambda module, args, output: seen.append(output.shape))
    report = replace_embeddings(model)
    assert names(report.replaced) == ["words", "bags"]
    assert type(model.words) is gpu_embed.Embedding
    assert type(model.bags) is gpu_embed.EmbeddingBag
    assert all(map(lambda a, b: a is b, model.parameters(), parameters))
    assert list(model.state_dict()) == keys
    assert model.words.padding_idx == 0
    assert repr(model.words) == "Embedding(7, 4, padding_idx=0)"
    model(IDS)
    assert seen == [(2, 3, 4)]


def test_what_is_left_alone_has_its_reason():
    model = Model()
    report = replace_embeddings(model)
    assert reasons(report) == {
        "scaled": SCALED_REASON,
        "ours": "already gpu_embed.Embedding",
    }
    assert type(model.scaled) is Scaled
    again = replace_embeddings(model)
    assert again.replaced == ()
    assert reasons(again)["words"] == "already gpu_embed.Embedding"


def test_the_reason_names_the_way_round_that_there_is():
    """None for bags and for layers that are ours; a table that should be quantized stays as it is."""

    class Bags(nn.EmbeddingBag):
        pass

    class OurScaled(gpu_embed.Embedding):
        pass

    for bags in (Bags(7, 4), nn.EmbeddingBag(7, 4)):
        bags.forward = bags.forward if type(bags) is Bags else lambda ids: None
        for quantize in (None, "int8"):
            (reason,) = reasons(replace_embeddings(bags, quantize=quantize)).values()
            assert reason.endswith("; gpu_embed.override_aten() does not reach bags")
    for layer in (OurScaled(7, 4), gpu_embed.Embedding(7, 4)):
        layer.forward = lambda ids: None
        assert "override_aten" not in reasons(replace_embeddings(layer))[""]
    (reason,) = reasons(replace_embeddings(OurScaled(7, 4))).values()
    assert reason.startswith("a subclass of gpu_embed.Embedding, which may do more: ")
    (reason,) = reasons(replace_embeddings(Scaled(7, 4), quantize="int8")).values()
    assert reason == f"{SCALED_REASON}, and leaves its table in floats"


def test_it_trains_as_before(target):
    """As torch: the same losses and tables on every backend, the optimizer made before the swap."""
    ids = IDS.to(target.device)
    before, after = Model(target.device), Model(target.device)
    parameters = list(after.parameters())
    replace_embeddings(after)
    assert train(after, ids, parameters=parameters) == train(before, ids)
    for old, new in zip(before.parameters(), parameters, strict=True):
        assert torch.equal(old, new)
    assert not torch.equal(parameters[0], Model(target.device).words.weight)


def test_restore_undoes_what_was_replaced_and_no_more():
    model = Model()
    report = replace_embeddings(model, "words")
    assert restore_embeddings(model) == ["words"]
    assert type(model.words) is nn.Embedding
    assert type(model.ours) is gpu_embed.Embedding
    assert vars(model.words).keys() == vars(nn.Embedding(7, 4)).keys()
    assert restore_embeddings(model) == []
    assert names(report.replaced) == ["words"]


def test_a_copy_can_be_restored():
    model = Model()
    replace_embeddings(model)
    buffer = io.BytesIO()
    torch.save(model.words, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    for clone in (copy.deepcopy(model.words), loaded):
        assert torch.equal(clone(IDS), model.words(IDS))
        assert restore_embeddings(clone) == [""]
        assert type(clone) is nn.Embedding
    assert type(model.words) is gpu_embed.Embedding


def test_a_module_of_two_names_and_tied_weights():
    model = nn.Module()
    model.first = nn.Embedding(7, 4)
    model.inner = nn.ModuleDict({"same": model.first, "tied": nn.Embedding(7, 4)})
    model.inner["tied"].weight = model.first.weight
    model.inner.holder = nn.ModuleList([model.inner["tied"]])
    report = replace_embeddings(model)
    assert [(one.name, one.aliases) for one in report.replaced] == [
        ("first", ("inner.same",)),
        ("inner.tied", ("inner.holder.0",)),
    ]
    assert "first = inner.same" in str(report)
    assert model.inner["tied"].weight is model.first.weight
    assert restore_embeddings(model) == ["first", "inner.tied"]


def test_a_model_that_holds_itself():
    model = nn.Module()
    model.words = nn.Embedding(7, 4)
    model.child = nn.Module()
    model.child.parent = model
    assert names(replace_embeddings(model).replaced) == ["words"]


def test_the_model_itself():
    model = nn.Embedding(7, 4)
    report = replace_embeddings(model)
    assert type(model) is gpu_embed.Embedding
    assert re.search(r"^  \(the model itself\)  7 x 4", str(report), re.M)
    assert str(report.verify(IDS)).startswith("(the model itself)  1 of 1 calls")


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("words", ["words", "encoder.words"]),
        ("encoder.*", ["encoder.words", "encoder.positions"]),
        ("encoder.words", ["encoder.words"]),
        (re.compile("s$"), ["words", "encoder.words", "encoder.positions"]),
        (re.compile("^words|pos"), ["words", "encoder.positions"]),
    ],
    ids=str,
)
def test_a_pattern_chooses_by_name(pattern, expected):
    model = nn.ModuleDict({"words": nn.Embedding(7, 4)})
    model["encoder"] = nn.ModuleDict({n: nn.Embedding(7, 4) for n in ("words", "positions")})
    report = replace_embeddings(model, pattern)
    assert names(report.replaced) == expected
    assert all("does not match" in reason for reason in reasons(report).values())


def test_a_pattern_that_matches_nothing_says_so():
    model = Model()
    with pytest.warns(UserWarning, match="no embedding's name matches 'wrods'; they are 'words'"):
        report = replace_embeddings(model, "wrods")
    assert str(report).startswith("replaced 0 of 4 embeddings\nleft alone\n  words ")
    assert type(model.words) is nn.Embedding


def test_of_many_names_some_are_listed():
    model = nn.ModuleList([nn.Embedding(7, 4) for _ in range(10)])
    with pytest.warns(UserWarning, match=r"they are '0', .*, '7' and 2 more$") as warned:
        replace_embeddings(model, "words")
    # It points to the line above.
    assert warned[0].filename == __file__
    with pytest.warns(UserWarning, match=r", '7'$"):
        replace_embeddings(model[:8], "words")


def test_small_tables_can_be_left_alone():
    model = nn.Sequential(nn.Embedding(7, 4), nn.Embedding(8, 4))
    report = replace_embeddings(model, min_rows=8)
    assert names(report.replaced) == ["1"]
    assert reasons(report) == {"0": "7 rows are fewer than min_rows=8"}


def test_a_model_without_tables():
    report = replace_embeddings(nn.Linear(2, 2))
    expected = "Linear holds no torch.nn.Embedding or EmbeddingBag: nothing to replace"
    assert str(report) == expected
    verification = report.verify(torch.zeros(2))
    assert not verification
    assert str(verification) == "no module was replaced, so there is nothing to verify"


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (("words",), TypeError, "'model' must be torch.nn.Module, not str"),
        ((nn.Embedding(7, 4).weight,), TypeError, "'model' must be torch.nn.Module, not Parameter"),
        ((Model(), 3), TypeError, "pattern must be str, re.Pattern or None, not int"),
        ((Model(), None, 2.0), TypeError, "min_rows must be int, not float"),
        ((Model(), None, True), TypeError, "min_rows must be int, not bool"),
        ((Model(), None, -1), ValueError, "min_rows must not be negative, got -1"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_wrong_arguments(arguments, error, message):
    with pytest.raises(error, match=rf"^replace_embeddings\(\): .*{message}"):
        replace_embeddings(*arguments)


def test_restore_of_no_model():
    with pytest.raises(TypeError, match=r"'model' must be torch\.nn\.Module, not NoneType"):
        restore_embeddings(None)


def test_the_report_in_print():
    model = Model()
    with gpu_embed.use_backend("reference"):
        text = str(replace_embeddings(model))
    assert text.splitlines()[:5] == [
        "replaced 2 of 4 embeddings",
        "  name   rows x dim  dtype    device  served by",
        "  words  7 x 4       float32  cpu     reference",
        "  bags   7 x 4       float32  cpu     reference",
        "reference serves cpu: forced by use_backend() or GPU_EMBED_BACKEND",
    ]
    assert text.splitlines()[5:] == [
        "left alone",
        f"  scaled  {SCALED_REASON}",
        "  ours    already gpu_embed.Embedding",
    ]


# Modules that others have changed.


def test_a_forward_set_on_the_module_is_left_alone():
    model = Model()
    model.words.forward = lambda ids, old=model.words.forward: old(ids) + 1
    report = replace_embeddings(model)
    assert reasons(report)["words"] == (
        f"its forward was set on the module itself, and may call torch's; {OVERRIDE}"
    )
    assert type(model.words) is nn.Embedding


def test_a_table_without_weight_is_left_alone():
    """Removed by whoever looks up elsewhere; the others are replaced nevertheless."""
    model = nn.Sequential(nn.Embedding(7, 4), nn.Embedding(7, 4), nn.Embedding(7, 4))
    model[0].weight = None
    del model[2].weight
    report = replace_embeddings(model)
    assert names(report.replaced) == ["1"]
    assert reasons(report) == {"0": "it holds no weight", "2": "it holds no weight"}


def test_a_kept_forward_goes_along():
    """What accelerate leaves once its hook is removed, and what it calls from within one."""
    model = Model()
    model.words.forward = model.words.forward
    old = model.bags._old_forward = model.bags.forward
    model.bags.forward = partial(lambda module, *args: module._old_forward(*args), model.bags)
    model.bags._hf_hook = object()
    report = replace_embeddings(model)
    assert names(report.replaced) == ["words", "bags"]
    assert report.verify(IDS)
    restore_embeddings(model)
    assert model.words.forward.__func__ is nn.Embedding.forward
    assert model.bags._old_forward == old


def test_a_parametrized_table():
    model = Model()
    parametrizations.orthogonal(model.words)
    report = replace_embeddings(model)
    assert reasons(report)["words"] == (
        "parametrized: replace before the parametrization is registered"
    )

    after = Model()
    report = replace_embeddings(after)
    parametrizations.orthogonal(after.words)
    assert report.verify(IDS)
    with pytest.raises(RuntimeError, match="'words' has become ParametrizedEmbedding"):
        restore_embeddings(after)
    assert type(after.bags) is gpu_embed.EmbeddingBag
    parametrize.remove_parametrizations(after.words, "weight")
    assert restore_embeddings(after) == ["words", "bags"]


@pytest.mark.parametrize("norm", [weight_norm, spectral_norm], ids=lambda norm: norm.__name__)
@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated")
def test_a_weight_that_a_hook_computes(norm):
    layers = []
    for _ in range(2):
        torch.manual_seed(0)
        layers.append(norm(nn.Embedding(7, 4)))
    layer, expected = layers
    report = replace_embeddings(layer)
    state = copy.deepcopy(layer.state_dict())
    assert report.verify(IDS)
    assert all(map(torch.equal, layer.state_dict().values(), state.values()))
    for each in layers:
        each(IDS).sum().backward()
    assert torch.equal(layer(IDS), expected(IDS))
    for old, new in zip(expected.parameters(), layer.parameters(), strict=True):
        assert torch.equal(old.grad, new.grad)


@pytest.mark.parametrize(
    "compiled", [torch.jit.script, partial(torch.jit.trace, example_inputs=IDS)], ids=["s", "t"]
)
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_torchscript_is_left_alone(compiled):
    report = replace_embeddings(compiled(nn.Sequential(nn.Embedding(7, 4))))
    assert reasons(report) == {"0": "compiled by TorchScript: replace before torch.jit"}


def test_a_weight_of_another_tensor_type():
    """Drop-in: torch's own lookup, and the report and the proof say so."""

    class Wrapped(torch.Tensor):
        """As torchao's: brings its own embedding."""

        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            if func is nn.functional.embedding:
                ids, weight = args[:2]
                return nn.functional.embedding(ids, weight.as_subclass(torch.Tensor)) * 3
            return super().__torch_function__(func, types, args, kwargs)

    model = nn.Sequential(nn.Embedding(7, 4))
    plain = model[0].weight.detach().clone()
    model[0].weight = nn.Parameter(plain.as_subclass(Wrapped), requires_grad=False)
    report = replace_embeddings(model)
    assert report.replaced[0].served_by == "torch where its weight is a Wrapped"
    assert torch.equal(model(IDS), plain[IDS] * 3)
    verification = report.verify(IDS)
    assert not verification
    assert "0 of 1 calls looked up with gpu_embed; the others ran torch's" in str(verification)


# torch.compile.


@pytest.mark.full
def test_compiled_before_and_after():
    """Drop-in: the graph is compiled anew for the new class, and for the old one again."""
    counter = CompileCounterWithBackend("aot_eager")
    expected = train(Model(), IDS)
    model = Model()
    graph = torch.compile(model, backend=counter)
    before = graph(IDS)
    report = replace_embeddings(graph)
    assert names(report.replaced) == ["_orig_mod.words", "_orig_mod.bags"]
    assert counter.frame_count == 1
    assert torch.equal(graph(IDS), before)
    targets = [str(node.target) for node in counter.graphs[1].graph.nodes]
    assert targets.count("gpu_embed.embedding.default") == 2
    assert train(graph, IDS) == expected
    assert report.verify(IDS)
    restore_embeddings(graph)
    graph(IDS)
    targets = [str(node.target) for node in counter.graphs[-1].graph.nodes]
    assert targets.count("gpu_embed.embedding.default") in (1, 2)
    assert type(model.words) is nn.Embedding


# The proof.


def test_verify_says_what_each_module_did():
    model = Model()
    model.unused = nn.Embedding(7, 4)
    model.twice = nn.Embedding(7, 4)
    report = replace_embeddings(model)
    for _ in range(2):
        model.register_forward_hook(lambda module, args, output: module.twice(IDS).sum() + output)
    model.bags.forward = partial(nn.EmbeddingBag.forward, model.bags)
    verification = report.verify(ids=IDS)
    said = {one.name: (one.calls, one.lookups, one.differing) for one in verification.modules}
    assert said == {"words": (1, 1, 0), "bags": (1, 0, 0), "unused": (0, 0, 0), "twice": (2, 2, 0)}
    assert str(verification).splitlines() == [
        "words   1 of 1 calls looked up with gpu_embed (torch), bit-equal to torch's",
        "bags    0 of 1 calls looked up with gpu_embed; the others ran torch's lookup or another "
        "forward",
        "unused  not reached by this input",
        "twice   2 of 2 calls looked up with gpu_embed (torch), bit-equal to torch's",
    ]
    assert not verification
    del model.bags.forward
    assert report.verify(IDS)


def test_verify_counts_the_calls_that_went_elsewhere():
    """One of two calls in our forward is not enough."""
    model = Model()
    report = replace_embeddings(model, "words")
    forwards = itertools.cycle([gpu_embed.Embedding.forward, nn.Embedding.forward])
    model.words.forward = lambda ids: next(forwards)(model.words, ids)
    model.register_forward_hook(lambda module, args, output: output + module.words(IDS).sum())
    verification = report.verify(IDS)
    assert "1 of 2 calls looked up with gpu_embed (torch); the others ran" in str(verification)
    assert not verification


def test_verify_does_not_count_what_a_hook_looks_up():
    model = Model()
    hook = model.ours.forward
    model.words.register_forward_hook(lambda module, args, output: output + hook(*args))
    report = replace_embeddings(model, "words")
    assert str(report.verify(IDS)).startswith("words  1 of 1 calls")
    model.words.forward = partial(nn.Embedding.forward, model.words)
    assert not report.verify(IDS)


def test_verify_of_modules_that_have_gone():
    model = Model()
    report = replace_embeddings(model)
    model.words = nn.Embedding(7, 4)
    restore_embeddings(model.bags)
    verification = report.verify(IDS)
    assert not verification
    assert str(verification).count("no longer in the model, or no longer ours") == 2


def test_verify_runs_on_every_backend(target):
    model = Model(target.device)
    report = replace_embeddings(model)
    verification = report.verify(IDS.to(target.device))
    assert verification
    assert f"looked up with gpu_embed ({target.backend}), bit-equal to" in str(verification)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
def test_verify_of_bags(target, mode, dtype):
    """Of every length, 0 too, with padding, weights and max_norm; the order of a sum is the backend's."""
    weight = table(50, 7, dtype, target.device)
    bags = nn.EmbeddingBag.from_pretrained(weight, True, 4.0, mode=mode, padding_idx=3)
    report = replace_embeddings(bags)
    ids = torch.arange(90, device=target.device) * 7 % 50
    offsets = torch.tensor([0, 0, 40, 41], device=target.device)
    weights = table(90, 1, dtype, target.device)[:, 0] if mode == "sum" else None
    before = weight.clone()
    assert report.verify(ids, offsets, weights), report.verify(ids, offsets, weights)
    assert torch.equal(weight, before)
    bags(ids, offsets)
    assert not torch.equal(weight, before)


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
def test_verify_sees_a_wrong_lookup(mode, monkeypatch):
    """One bit in a row, and the smallest error in a bag that rounding cannot make."""

    class Wrong(TorchBackend):
        def embedding(self, weight, *rest):
            output = super().embedding(weight, *rest)
            output.view(torch.int32)[0, 0, 0] ^= 1
            return output

        def embedding_bag(self, weight, *rest):
            return super().embedding_bag(weight, *rest) * (1 + 1e-5)

        def embedding_bag_max(self, weight, *rest):
            output, max_elements = super().embedding_bag_max(weight, *rest)
            return output * (1 + 2**-23), max_elements

    model = nn.Sequential(nn.Embedding(7, 4), nn.Flatten(1), nn.Linear(12, 1))
    bags = nn.EmbeddingBag(7, 4, mode=mode)
    reports = [replace_embeddings(model), replace_embeddings(bags)]
    assert all(report.verify(IDS) for report in reports)
    load = gpu_embed.backends.load
    monkeypatch.setattr(gpu_embed.backends, "select", lambda device: Wrong())
    monkeypatch.setattr(gpu_embed.backends, "load", lambda name: load(name))
    for report in reports:
        verification = report.verify(IDS)
        assert not verification
        assert str(verification).endswith("; 1 DIFFER from torch's lookup")


# Calls of bags of a table of nine rows; the last bag of each is made wrong.
BAG_CALLS = {
    "rows": ([[5, 1, 0], [6, 3, 2]], None),
    "offsets": ([5, 1, 0, 6, 3, 2, 3], [0, 0, 4, 4]),
    "an id a bag": ([5, 1, 3], [0, 1, 2]),
    "last offset": ([5, 1, 0, 6, 3, 2, 8], [0, 2, 2, 5]),
}


def bag_call(layout, mode, weighted, padding_idx, dtype, id_dtype, device):
    """A replaced layer's report, and what to call it with."""
    ids, offsets = BAG_CALLS[layout]
    ids = torch.tensor(ids, dtype=id_dtype, device=device)
    bags = nn.EmbeddingBag.from_pretrained(
        table(9, 4, dtype, device),
        mode=mode,
        padding_idx=padding_idx,
        include_last_offset=layout == "last offset",
    )
    arguments = {"input": ids}
    if offsets is not None:
        arguments["offsets"] = torch.tensor(offsets, dtype=id_dtype, device=device)
    if weighted:
        weights = table(ids.numel(), 1, dtype, device)
        arguments["per_sample_weights"] = weights.view(ids.shape)
    return replace_embeddings(bags), arguments


@pytest.mark.parametrize("id_dtype", [torch.int64, torch.int32, torch.int16, torch.uint8], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("padding_idx", [None, 3])
@pytest.mark.parametrize(
    ("mode", "weighted"), [("sum", False), ("sum", True), ("mean", False), ("max", False)]
)
@pytest.mark.parametrize("layout", BAG_CALLS)
def test_verify_compares_bags_with_torchs_own(
    layout, mode, weighted, padding_idx, dtype, id_dtype, monkeypatch
):
    """Also where it is the torch backend that is wrong, which is no measure for itself."""
    report, arguments = bag_call(layout, mode, weighted, padding_idx, dtype, id_dtype, "cpu")
    right = report.verify(**arguments)
    assert right
    assert right.modules[0].lookups == 1

    def wrong(backend, *rest, right=TorchBackend.embedding_bag):
        output = right(backend, *rest)
        output[-1, 1] += 0.25
        return output

    def wrong_max(backend, *rest, right=TorchBackend.embedding_bag_max):
        output, max_elements = right(backend, *rest)
        output[-1, 1] += 0.25
        return output, max_elements

    monkeypatch.setattr(TorchBackend, "embedding_bag", wrong)
    monkeypatch.setattr(TorchBackend, "embedding_bag_max", wrong_max)
    verification = report.verify(**arguments)
    assert not verification
    assert str(verification).endswith("; 1 DIFFER from torch's lookup")


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
def test_verify_of_bags_without_ids(target, mode, monkeypatch):
    """They are made without a backend, and compared too."""
    bags = nn.EmbeddingBag(7, 4, mode=mode, device=target.device)
    report = replace_embeddings(bags)
    none = torch.zeros(0, dtype=torch.int64, device=target.device)
    arguments = (none, none.new_zeros(2))
    assert report.verify(*arguments)
    monkeypatch.setattr(torch.Tensor, "zero_", lambda empty: empty.fill_(1))
    assert not report.verify(*arguments)


@pytest.mark.parametrize("within", [contextlib.nullcontext, gpu_embed.override_aten])
@pytest.mark.parametrize("id_dtype", [torch.int64, torch.int32, torch.int16, torch.uint8], ids=str)
def test_verify_compares_lookups_with_torchs_own(target, id_dtype, within, monkeypatch):
    """Also where the torch backend is as wrong, and where ours stands in torch's place."""
    model = nn.Embedding.from_pretrained(table(7, 4, torch.float32, target.device))
    report = replace_embeddings(model)
    ids = IDS.to(target.device, id_dtype)
    with within():
        assert report.verify(ids)
        for name in {"torch", target.backend}:
            backend = gpu_embed.backends.load(name)

            def wrong(*arguments, right=backend.embedding):
                output = right(*arguments)
                output.view(torch.int32)[1, 2, 3] ^= 1
                return output

            monkeypatch.setattr(backend, "embedding", wrong)
        verification = report.verify(ids)
    assert str(verification).endswith("; 1 DIFFER from torch's lookup")


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
def test_verify_leaves_out_what_torch_has_no_answer_to(target, mode, monkeypatch):
    """Ids out of range, where nobody checks them: the other bags are compared."""
    weight = table(7, 4, torch.float32, target.device)
    bags = nn.EmbeddingBag.from_pretrained(weight, mode=mode)
    rows = nn.Embedding.from_pretrained(weight)
    reports = [replace_embeddings(bags), replace_embeddings(rows)]
    ids = torch.tensor([[5, 7, 0], [6, 3, 2], [-1, 1, 1]], device=target.device)
    with gpu_embed.set_bounds_check("off"):
        assert all(report.verify(ids) for report in reports)

        def wrong(right, weight, *arguments):
            changed = weight.clone()
            changed[6] += 9
            return right(changed, *arguments)

        backend = gpu_embed.backends.load(target.backend)
        for name in ("embedding", "embedding_bag", "embedding_bag_max"):
            monkeypatch.setattr(backend, name, partial(wrong, getattr(backend, name)))
        assert not any(report.verify(ids) for report in reports)


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
def test_verify_compares_what_is_not_finite(mode, value, monkeypatch):
    bags = nn.EmbeddingBag(7, 4, mode=mode)
    bags.weight.data[:, 1] = value
    report = replace_embeddings(bags)
    assert report.verify(IDS)

    def finite(*arguments, right):
        return torch.utils._pytree.tree_map(torch.nan_to_num, right(*arguments))

    for name in ("embedding_bag", "embedding_bag_max"):
        right = getattr(TorchBackend, name)
        monkeypatch.setattr(TorchBackend, name, partialmethod(finite, right=right))
    assert not report.verify(IDS)


def test_verify_lets_sums_be_rounded_otherwise(monkeypatch):
    class Reordered(TorchBackend):
        def embedding_bag(self, weight, per_sample_weights, bags, *rest):
            flipped = bags._replace(indices=bags.indices.view(2, -1).flip(1).reshape(-1))
            return super().embedding_bag(weight, per_sample_weights, flipped, *rest)

    torch.manual_seed(0)
    bags = nn.EmbeddingBag(100, 16, mode="sum")
    report = replace_embeddings(bags)
    monkeypatch.setattr(gpu_embed.backends, "select", lambda device: Reordered())
    verification = report.verify(torch.randint(100, (2, 50)))
    assert verification
    assert "within the rounding error of torch's" in str(verification)


class Restless(nn.Module):
    """What a run changes in a model, all at once."""

    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(7, 4, max_norm=0.5)
        self.norm = nn.BatchNorm1d(3)
        self.dropout = nn.Dropout()
        self.dropout.eval()
        self.register_buffer("count", torch.zeros(()))
        self.register_buffer("replaced", torch.zeros(2))

    def forward(self, ids):
        self.count += 1
        self.replaced = torch.rand(2)
        self.seen = (self.training, torch.is_grad_enabled())
        return self.dropout(self.norm(self.words(ids)))


def test_verify_leaves_the_model_as_it_was():
    model = Restless()
    model(IDS).sum().backward()
    model.words.weight.data.mul_(3)
    report = replace_embeddings(model)
    state = copy.deepcopy(model.state_dict())
    grads = [parameter.grad.clone() for parameter in model.parameters()]
    buffers = list(model.buffers())
    random = torch.get_rng_state()
    assert report.verify(IDS)
    assert model.seen == (False, False)
    assert [m.training for m in model.modules()] == [True, True, True, False]
    assert all(map(torch.equal, model.state_dict().values(), state.values()))
    assert all(map(lambda a, b: a is b, model.buffers(), buffers))
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), grads, strict=True))
    assert torch.equal(torch.get_rng_state(), random)
    assert not model.words._forward_hooks
    assert not model.words._forward_pre_hooks


def test_verify_between_forward_and_backward():
    """A buffer that autograd has saved is not written to."""
    model = nn.Sequential(nn.Embedding(7, 3), nn.BatchNorm1d(3).eval())
    report = replace_embeddings(model)
    output = model(IDS)
    assert report.verify(IDS)
    output.sum().backward()
    assert model[0].weight.grad is not None


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_verify_leaves_no_trace_of_a_failed_run(device):
    """On a GPU, where a bad id is found late, it still is this call that raises."""
    model, ids = Model(device), IDS.to(device)
    report = replace_embeddings(model, "words")
    model.scaled, model.ours, model.bags = (nn.Embedding(9, 4, device=device) for _ in range(3))
    model.bags.forward = lambda ids: torch.zeros(4, device=device)
    with pytest.raises(IndexError, match="id 7 at"):
        report.verify(ids + 2)
    assert model.training
    assert not model.words._forward_hooks
    assert torch.utils._python_dispatch._get_current_dispatch_mode() is None
    assert report.verify(ids)


# Several processes.


@pytest.mark.full
@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")
def test_ddp_and_fsdp_train_as_before(tmp_path):
    """Drop-in: two processes on gloo; each checks DDP and FSDP2 before and after the swap."""
    workers = [
        subprocess.Popen(
            [sys.executable, SUPPORT / "swapped_training.py", str(rank), str(tmp_path / "store")],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        printed = [worker.communicate(timeout=240)[0] for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    for rank, (worker, text) in enumerate(itertools.zip_longest(workers, printed)):
        assert worker.returncode == 0, text
        assert text.splitlines()[-1] == f"rank {rank}: 5 checks passed"
