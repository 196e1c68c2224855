"""Choosing a backend: forced, automatic, and what is said about it."""

import os
import subprocess
import sys
import threading

import pytest
import torch

import gpu_embed
from gpu_embed import backends
from gpu_embed.functional import embedding

IDS, WEIGHT = torch.tensor([1, 0]), torch.arange(4.0).view(2, 2)


def run_python(code, **environment):
    """A fresh interpreter: what the environment chooses at start cannot be seen from inside."""
    names = ("GPU_EMBED_BACKEND", "GPU_EMBED_BOUNDS_CHECK", "TRITON_INTERPRET")
    inherited = {key: value for key, value in os.environ.items() if key not in names}
    return subprocess.run(
        [sys.executable, "-c", code],
        env=inherited | environment,
        capture_output=True,
        text=True,
        check=False,
    )


LOOK_UP = (
    "import torch, gpu_embed; "
    "print(gpu_embed.functional.embedding(torch.tensor([1]), torch.eye(2)).tolist())"
)


def test_every_backend_fits_the_protocol():
    for name in backends.BACKENDS:
        backend = backends.load(name)
        assert backend.name == name
        for method in vars(backends.Backend):
            if not method.startswith("_") and method != "name":
                assert callable(getattr(backend, method)), f"{name}.{method}"


def test_every_backend_is_a_choice():
    assert set(backends.BACKENDS) | {"auto"} == set(gpu_embed.settings.BACKEND.choices)


def test_auto_takes_torch_for_cpu_tensors():
    with gpu_embed.use_backend("auto"):
        assert backends.select(torch.device("cpu")).name == "torch"
        assert backends.explain("cpu") == "torch serves cpu: the kernels are for CUDA devices"


def test_use_backend_as_plain_call_and_as_context():
    before = gpu_embed.settings.BACKEND.value
    with gpu_embed.use_backend("reference"):
        assert backends.select(torch.device("cpu")).name == "reference"
        with gpu_embed.use_backend("torch"):
            assert backends.select(torch.device("cpu")).name == "torch"
        assert backends.select(torch.device("cpu")).name == "reference"
    assert gpu_embed.settings.BACKEND.value == before
    undo = gpu_embed.use_backend("reference")
    assert backends.select(torch.device("cpu")).name == "reference"
    with undo:
        pass
    assert gpu_embed.settings.BACKEND.value == before


def test_the_choice_reaches_other_threads():
    """Forced choice: a plain global, since autograd runs backwards on threads of its own."""
    seen = []
    with gpu_embed.use_backend("reference"):
        thread = threading.Thread(
            target=lambda: seen.append(backends.select(torch.device("cpu")).name)
        )
        thread.start()
        thread.join()
    assert seen == ["reference"]


def test_an_unknown_backend_is_refused():
    with pytest.raises(ValueError, match=r"use_backend: expected one of .*'cupy'.*got 'cuda'"):
        gpu_embed.use_backend("cuda")


def test_a_forced_backend_that_cannot_run_raises():
    """Forced choice: only auto may choose."""
    if backends.load("cupy").unusable_reason(torch.device("cpu")) is None:
        pytest.fail("cupy claims to serve CPU tensors")
    with (
        gpu_embed.use_backend("cupy"),
        pytest.raises(RuntimeError, match="'cupy' is forced but cannot serve cpu: "),
    ):
        embedding(IDS, WEIGHT)


@pytest.mark.full
@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"GPU_EMBED_BACKEND": "triton"}, "'triton' is forced but cannot serve cpu: "),
        ({"GPU_EMBED_BACKEND": "fast"}, "GPU_EMBED_BACKEND: expected one of"),
        ({"GPU_EMBED_BOUNDS_CHECK": "maybe"}, "GPU_EMBED_BOUNDS_CHECK: expected one of"),
    ],
    ids=["unusable", "unknown backend", "unknown mode"],
)
def test_the_environment_is_held_to_the_same_rules(environment, message):
    """Forced choice: forced by a variable is forced too."""
    result = run_python(LOOK_UP, **environment)
    assert result.returncode == 1
    assert message in result.stderr.splitlines()[-1]


@pytest.mark.full
@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"GPU_EMBED_BACKEND": "reference"},
        {"GPU_EMBED_BACKEND": ""},
        {"GPU_EMBED_BACKEND": "triton", "TRITON_INTERPRET": "1"},
    ],
    ids=["default", "reference", "empty", "interpreted triton"],
)
def test_the_environment_chooses(environment):
    result = run_python(LOOK_UP, **environment)
    assert result.stdout.strip() == "[[0.0, 1.0]]", result.stderr


def test_available_backends_gives_reasons():
    """A user reads why, not just that."""
    available = gpu_embed.available_backends("cpu")
    assert list(available) == list(backends.BACKENDS)
    assert available["torch"] == available["reference"] == "usable"
    assert "CUDA device" in available["cupy"]


def test_auto_says_once_why_it_fell_back(monkeypatch, caplog):
    """The last resort on CUDA is logged, with the reason, once."""

    class Missing:
        def unusable_reason(self, device):
            return "not here today"

    load = backends.load
    monkeypatch.setattr(
        backends, "load", lambda name: Missing() if name in ("triton", "cupy") else load(name)
    )
    with gpu_embed.use_backend("auto"), caplog.at_level("WARNING", logger="gpu_embed"):
        for _ in range(3):
            assert backends.select(torch.device("cuda", 7)).name == "torch"
    assert [record.message for record in caplog.records] == [
        "gpu_embed: torch serves cuda:7 as the last resort; "
        "triton: not here today; cupy: not here today"
    ]


@pytest.mark.parametrize(
    ("usable", "expected"),
    [(("triton", "cupy"), "triton"), (("cupy",), "cupy"), ((), "torch")],
    ids=["all", "no triton", "neither"],
)
def test_auto_prefers_triton_then_cupy(monkeypatch, usable, expected):
    class Candidate:
        def __init__(self, name):
            self.name = name

        def unusable_reason(self, device):
            return None if self.name in usable else "no"

    monkeypatch.setattr(backends, "load", Candidate)
    with gpu_embed.use_backend("auto"):
        assert backends.select(torch.device("cuda")).name == expected


def test_a_choice_made_during_anothers_selection_holds(monkeypatch):
    """Forced choice: the thread that was slow to select does not overrule the later choice."""
    load = backends.load

    def slow_load(name):
        if name == "reference":
            gpu_embed.use_backend("torch")
        return load(name)

    with gpu_embed.use_backend("reference"):
        monkeypatch.setattr(backends, "load", slow_load)
        assert backends.select(torch.device("cpu")).name == "reference"
        assert backends.select(torch.device("cpu")).name == "torch"


def test_a_broken_triton_is_a_reason(monkeypatch):
    """A user reads what is wrong with an install; auto goes on to the next backend."""
    from gpu_embed.backends._triton import TritonBackend

    def broken(self):
        raise ImportError("libcuda is on holiday")

    monkeypatch.setattr(TritonBackend, "_interpreted", property(broken))
    reason = TritonBackend().unusable_reason(torch.device("cuda"))
    assert reason == "triton does not work here: libcuda is on holiday"


def test_explain_says_when_a_forced_backend_cannot_run():
    with gpu_embed.use_backend("cupy"):
        assert backends.explain("cpu").startswith("cupy is forced but cannot serve cpu: ")


def test_nested_ids_go_to_torch():
    nested = torch.nested.nested_tensor([torch.tensor([1, 0]), torch.tensor([1])])
    rows = embedding(nested, WEIGHT)
    assert [row.tolist() for row in rows.unbind()] == [[[2, 3], [0, 1]], [[2, 3]]]
