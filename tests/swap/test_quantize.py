"""replace_embeddings with quantize=: what is quantized, what the report says, what is left alone, and the way back."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn

import gpu_embed
from gpu_embed import (
    QuantizedEmbedding,
    QuantizedEmbeddingBag,
    replace_embeddings,
    restore_embeddings,
)

IDS = torch.tensor([[1, 2, 6]])
BITS = {"int8": 8, "int4": 4}
in_both = pytest.mark.parametrize("quantize", BITS)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.words = nn.Embedding(100, 256, padding_idx=0)
        self.bags = nn.EmbeddingBag(50, 100, mode="mean", padding_idx=0)
        self.ours = gpu_embed.Embedding(7, 64)
        self.again = self.words
        self.tokens = nn.Embedding(30, 16)
        self.head = nn.Linear(16, 30, bias=False)

    def forward(self, ids):
        rows = self.words(ids).sum() + self.again(ids).sum() + self.ours(ids).sum()
        return rows + self.bags(ids).sum() + self.head(self.tokens(ids)).sum()


@in_both
def test_tables_become_small(quantize):
    model = Model()
    expected = {
        name: type_of.from_float(getattr(model, name), BITS[quantize])
        for name, type_of in (
            ("words", QuantizedEmbedding),
            ("bags", QuantizedEmbeddingBag),
            ("ours", QuantizedEmbedding),
            ("tokens", QuantizedEmbedding),
        )
    }
    modules = {name: getattr(model, name) for name in expected}
    weights = {name: module.weight.detach().clone() for name, module in modules.items()}
    calls = []
    model.words.register_forward_hook(lambda *_: calls.append(1))
    report = replace_embeddings(model, quantize=quantize)
    assert [one.name for one in report.replaced] == list(expected)
    assert report.skipped == ()
    for one in report.replaced:
        module, small, weight = modules[one.name], expected[one.name], weights[one.name]
        # The same object, so that whoever holds it sees it; its hooks stay.
        assert getattr(model, one.name) is module is one.module
        assert type(module) is type(small)
        assert repr(module) == repr(small)
        assert module.padding_idx == small.padding_idx
        assert torch.equal(module.weight, small.weight)
        errors = (small.to_float().weight.detach().double() - weight.double()).abs().amax(1)
        quantized = one.quantized
        assert (quantized.bits, quantized.bytes_before) == (BITS[quantize], weight.nbytes)
        assert quantized.bytes_after == small.weight.nbytes
        assert quantized.largest_error == errors.max().item()
        assert quantized.worst_row == errors.argmax().item()
        assert quantized.mean_error == pytest.approx(errors.mean().item())
    assert sum(parameter.numel() for parameter in model.parameters()) == model.head.weight.numel()
    model(IDS)
    assert len(calls) == 2
    text = repr(report)
    assert f"quantized to {BITS[quantize]} bits: 126,112 bytes -> " in text
    assert "words = again" in text
    assert f"(row {report.replaced[0].quantized.worst_row})" in text
    verification = report.verify(IDS)
    assert verification, verification
    assert [one.calls for one in verification.modules] == [2, 1, 1, 1]
    assert (
        repr(replace_embeddings(model, quantize=quantize)).count("already gpu_embed.Quantized") == 4
    )


@in_both
@pytest.mark.parametrize("kind", ["itself", "deepcopy", "pickle", "torch.save"])
def test_floats_come_back(quantize, kind):
    model = Model()
    model.words.weight.requires_grad_(False)
    replace_embeddings(model, "bags")
    replace_embeddings(model, quantize=quantize)
    expected = model(IDS)
    meant = model.words.to_float().weight
    if kind == "deepcopy":
        model = copy.deepcopy(model)
    elif kind == "pickle":
        model = pickle.loads(pickle.dumps(model))
    elif kind == "torch.save":
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        model = torch.load(file, weights_only=False)
    assert torch.equal(model(IDS), expected)
    assert restore_embeddings(model) == ["words", "bags", "ours", "tokens"]
    # What had been replaced before is torch's again, too; what was made as ours stays.
    kinds = (nn.Embedding, nn.EmbeddingBag, gpu_embed.Embedding, nn.Embedding)
    modules = (model.words, model.bags, model.ours, model.tokens)
    assert tuple(map(type, modules)) == kinds
    assert model.again is model.words
    assert torch.equal(model.words.weight, meant)
    assert [module.weight.requires_grad for module in modules] == [False, True, True, True]
    assert all("weight" in module._parameters and not module._buffers for module in modules)
    assert torch.allclose(model(IDS), expected, rtol=1e-6)
    assert repr(model) == repr(Model())
    model(IDS).backward()
    assert model.tokens.weight.grad.any()
    assert restore_embeddings(model) == []


def test_tied_tables_are_left_alone():
    """In a parameter, in a view of its memory, in another embedding: the report names where."""
    model = Model()
    model.head.weight = model.tokens.weight
    model.other = nn.Embedding(50, 100, _weight=model.bags.weight.detach())
    model.register_buffer("rows", model.ours.weight.detach()[2:4])
    report = replace_embeddings(model, quantize="int4")
    assert [one.name for one in report.replaced] == ["words"]
    assert {one.name: one.reason for one in report.skipped} == {
        "tokens": "tied: head.weight is the same table, and would keep it in floats; untie them first",
        "bags": "tied: other.weight is the same table, and would keep it in floats; untie them first",
        "other": "tied: bags.weight is the same table, and would keep it in floats; untie them first",
        "ours": "tied: rows is the same table, and would keep it in floats; untie them first",
    }
    assert model.head.weight is model.tokens.weight
    model.head.weight = nn.Parameter(model.tokens.weight.detach().clone())
    assert [one.name for one in replace_embeddings(model, quantize="int4").replaced] == ["tokens"]


def test_what_cannot_be_quantized_is_left_alone():
    class Scaled(nn.Embedding):
        pass

    model = nn.ModuleDict(
        {
            "nan": nn.Embedding(9, 8),
            "normed": nn.Embedding(9, 8, max_norm=1),
            "scaled": Scaled(9, 8),
            "complex": nn.Embedding(9, 8, dtype=torch.complex64),
            "meta": nn.Embedding(9, 8, device="meta"),
            "narrow": nn.Embedding(9, 8),
            "few": nn.Embedding(3, 8),
        }
    )
    with torch.no_grad():
        model["nan"].weight[4, 1] = torch.nan
    report = replace_embeddings(model, quantize="int8", min_rows=4)
    reasons = {one.name: one.reason for one in report.skipped}
    assert [one.name for one in report.replaced] == ["narrow"]
    assert reasons["nan"] == "row 4 holds nan at column 1; quantize finite numbers"
    assert reasons["normed"].startswith("max_norm rescales rows")
    assert reasons["scaled"].startswith("a subclass")
    assert "torch.complex64" in reasons["complex"]
    assert "meta device" in reasons["meta"]
    assert reasons["few"] == "3 rows are fewer than min_rows=4"
    assert restore_embeddings(model) == ["narrow"]


def test_an_empty_table_and_another_word():
    model = nn.Sequential(nn.Embedding(0, 8))
    report = replace_embeddings(model, quantize="int8")
    assert report.replaced[0].quantized.worst_row == -1
    assert "of before" in repr(report)
    before = repr(model)
    with pytest.raises(ValueError, match='quantize must be "int8", "int4" or None, got \'int2\''):
        replace_embeddings(model, quantize="int2")
    assert repr(model) == before


def test_verify_notices_a_wrong_lookup(monkeypatch):
    model = Model()
    report = replace_embeddings(model, quantize="int8")
    right = gpu_embed.backends.load("torch").dequantize_rows

    def wrong(*arguments):
        rows = right(*arguments)
        rows[..., 0] += 1
        return rows

    monkeypatch.setattr(gpu_embed.backends.load("torch"), "dequantize_rows", wrong)
    verification = report.verify(IDS)
    assert not verification
    assert "DIFFER" in repr(verification)
