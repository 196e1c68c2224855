"""The questions that a card is asked, put to the CPU: right answers pass, wrong ones do not."""

import pytest
import torch

import gpu_embed
from gpu_embed import backends
from gpu_embed.bench import probes


@pytest.fixture
def on_cpu(monkeypatch):
    """The CPU in place of a card."""
    monkeypatch.setattr(probes, "DEVICE", "cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    # What a probe changes of its process's environment.
    for name in ("CC", "PATH", "TRITON_CACHE_DIR"):
        monkeypatch.setenv(name, "")


@pytest.mark.parametrize("probe", ["no-compiler", "bad-ids", "kernels"])
def test_right_answers_pass(on_cpu, capsys, probe):
    assert probes.main([probe]) == 0
    assert capsys.readouterr().out.endswith("as it should be\n")


@pytest.mark.full
def test_the_self_check_asks_for_triton(on_cpu, capsys):
    """A backend that nobody needs may be absent, Triton's may not."""
    right = backends.load("triton").unusable_reason(torch.device("cpu")) is None
    assert probes.main(["self-check"]) == (0 if right else 1)
    said = capsys.readouterr()
    assert "torch: right in" in said.out
    assert "cupy: not usable" in said.out
    assert right or said.err == "WRONG: not as the reference: triton\n"


@pytest.mark.parametrize(
    ("probe", "lookup"),
    [
        ("no-compiler", lambda layer, ids: layer.weight.detach()[ids] + 1),
        ("bad-ids", lambda layer, ids: layer.weight.detach()[ids % 10]),
        pytest.param("self-check", None, marks=pytest.mark.full),
    ],
)
def test_wrong_answers_do_not_pass(on_cpu, capsys, monkeypatch, probe, lookup):
    if lookup is None:
        monkeypatch.setattr(backends.load("torch"), "embedding", lambda weight, *_: weight)
    else:
        monkeypatch.setattr(gpu_embed.Embedding, "forward", lookup)
    assert probes.main([probe]) == 1
    assert capsys.readouterr().err.startswith("WRONG: ")


@pytest.mark.full
def test_the_first_lookup_of_a_compiled_step_passes(monkeypatch):
    monkeypatch.setattr(probes, "DEVICE", "cpu")
    probes.first_lookup_in_a_graph()


@pytest.mark.parametrize("probe", probes.PROBES)
def test_without_a_card_there_is_no_answer(probe, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert probes.main([probe]) == 1
    assert capsys.readouterr().err == "no CUDA device\n"
