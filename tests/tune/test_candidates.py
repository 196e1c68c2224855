"""Every candidate of the tuner is right on compiled code, is legal in a file, and differs from the default."""

from dataclasses import asdict

import pytest
import targets
import torch
from targets import Target

from gpu_embed.backends import load
from gpu_embed.backends._plan import tuned
from gpu_embed.tune.search import Gate, paths
from gpu_embed.tune.subject import Subject
from gpu_embed.tune.trials import TRIALS, gate_inputs, timed_inputs

CPU = torch.device("cpu")
TRIED = {name: paths(Subject(load(name), CPU)) for name in ("triton", "cupy")}
ALL = [(name, path) for name, tried in TRIED.items() for path in tried]
# A few of them are in the default tier: a copy, an atomic, and a walk.
SLICE = ("gather_rows[256]", "scatter_add", "bag_sum")


@pytest.mark.parametrize(("backend", "path"), ALL)
def test_candidates_are_legal_in_a_file(backend, path):
    subject, tried = Subject(load(backend), CPU), TRIED[backend][path]
    texts = {str(asdict(settings)) for settings in (subject.leaves()[path], *tried)}
    assert len(texts) == len(tried) + 1 > 2
    for settings in tried:
        entry = {
            path: {
                "set": {
                    k: list(v) if isinstance(v, tuple) else v for k, v in asdict(settings).items()
                }
            }
        }
        changes, ignored = tuned._decoded(subject.launches, entry)
        assert not ignored
        assert asdict(changes[path]) == asdict(settings)


def test_each_kernel_has_a_trial():
    names = {path.partition("[")[0] for _, path in ALL}
    assert names == set(TRIALS)


@pytest.mark.parametrize(("backend", "path"), ALL)
def test_timed_inputs_have_three_sizes(backend, path):
    inputs = timed_inputs(backend, path)
    assert len({given.num_indices for given in inputs}) == 3
    for small in (False, True):
        inputs = gate_inputs(backend, path, small)
        assert any(given.strided for given in inputs)
        assert any(given.bad for given in inputs)
        assert any(not given.exact for given in inputs) != TRIALS[path.partition("[")[0]].atomic


def refusals(backend, path, tried):
    """Why settings are wrong in compiled code, by their text."""
    target = Target(backend, "cpu", ptx=True)
    if reason := targets.unusable_reason(target):
        pytest.skip(reason)
    gate = Gate(Subject(targets.ptx_backend(backend), CPU), path)
    return {str(settings): reason for settings in tried if (reason := gate.refusal(settings))}


@pytest.mark.parametrize("path", SLICE)
def test_the_farthest_candidate_is_right_in_compiled_code(path):
    assert refusals("triton", path, TRIED["triton"][path][-1:]) == {}


@pytest.mark.full
@pytest.mark.parametrize(("backend", "path"), ALL)
def test_every_candidate_is_right_in_compiled_code(backend, path):
    assert refusals(backend, path, TRIED[backend][path]) == {}


def test_the_gate_refuses_another_order_of_additions(monkeypatch):
    """A sum of fractions tells one order from another, where integers do not."""
    pytest.importorskip("triton")
    subject = Subject(load("triton"), CPU)
    gate = Gate(subject, "bag_sum")
    default = subject.leaves()["bag_sum"]
    assert gate.refusal(default) is None
    operation = type(subject.backend).embedding_bag

    def backwards(self, weight, per_sample_weights, bags, *rest):
        flipped = bags.indices.clone()
        for begin, end in zip(*bags.ends(), strict=True):
            flipped[begin:end] = bags.indices[begin:end].flip(0)
        return operation(self, weight, per_sample_weights, bags._replace(indices=flipped), *rest)

    monkeypatch.setattr(type(subject.backend), "embedding_bag", backwards)
    assert "wrong bits" in gate.refusal(default)
    assert "exact=False" in gate.refusal(default)
