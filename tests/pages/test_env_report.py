"""The environment report: complete, true, and of exit code 1 when a backend computes wrong."""

import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from targets import Target

import gpu_embed
from gpu_embed import _self_check, backends, env_report
from gpu_embed.backends._plan import gradient_method
from gpu_embed.backends._plan.gradient_method import Limit
from gpu_embed.backends._torch.backend import TorchBackend

CPU = torch.device("cpu")


@pytest.fixture
def torch_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only torch is checked: Triton's interpreter would take a second for each report."""
    monkeypatch.setattr(
        env_report, "check_device", lambda device: [_self_check.check_backend("torch", device)]
    )


def test_every_usable_backend_is_right(target: Target) -> None:
    check = _self_check.check_backend(target.backend, torch.device(target.device))
    assert check.status in ("right", "not usable"), check.detail
    # The CUDA C++ kernels run on the CPU in these tests alone.
    assert check.status == "right" or target.backend == "cupy"


def test_report_for_people(capsys: pytest.CaptureFixture[str]) -> None:
    assert env_report.main([]) == 0
    said = capsys.readouterr().out
    for fact in (
        f"gpu_embed {gpu_embed.__version__}",
        f"torch {torch.__version__}",
        backends.explain(CPU),
        "settings: backend auto, bounds_check raise, gather_method auto, gradient_method auto, tuned auto",
        "sorted: everything",
        env_report._rule(gradient_method.RULES["atomic"], gradient_method.LIMITS["atomic"]),
    ):
        assert fact in said
    assert re.search(r"^  cpu +torch +right +[\d.]+ ms$", said, re.M)
    for name, reason in backends.available_backends(CPU).items():
        if reason != "usable":
            assert f"{name:<10} {reason}" in said
    assert "reference  usable, but only where it is forced" in said
    for operation in env_report.OPERATIONS:
        assert re.search(rf"^  {operation} +torch", said, re.M)


@pytest.mark.full
def test_report_for_programs(capsys: pytest.CaptureFixture[str]) -> None:
    assert env_report.main(["--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["packages"]["torch"]
    serves = report["serves"]["cpu"]
    assert set(serves["operations"]) == set(env_report.OPERATIONS)
    assert {taken["backend"] for taken in serves["operations"].values()} == {"torch"}
    assert {"torch", *serves["others"]} == set(backends.BACKENDS)
    assert serves["launches"] == {}
    assert {check["backend"] for check in report["checks"]} == set(backends.BACKENDS)


@pytest.mark.full
def test_the_choice_in_force_of_a_kernel_backend(capsys: pytest.CaptureFixture[str]) -> None:
    with gpu_embed.use_backend("triton"):
        serves = env_report.collect()["serves"]["cpu"]
        env_report.main([])
    said = capsys.readouterr().out
    kernels = {name: taken["kernels"] for name, taken in serves["operations"].items()}
    assert kernels["lookup"] == "rows or flat, by a row's width"
    assert kernels["gradient"] == "float32 atomic or sorted, bfloat16 sorted"
    assert kernels["deterministic gradient"] == "float32 sorted, bfloat16 sorted"
    assert serves["others"]["torch"] == "usable, but triton is forced"
    assert serves["launches"]["gather_rows[512]"] == "BLOCK_N=1 BLOCK_D=512 num_warps=1"
    for name, numbers in serves["launches"].items():
        assert re.search(rf"^    {re.escape(name)} +{numbers}$", said, re.M)
    assert env_report._in_force("cupy", CPU)["bag_sum"] == "threads=128 UNROLL=4"


@pytest.mark.usefixtures("torch_alone")
def test_forced_methods_are_said() -> None:
    with (
        gpu_embed.use_backend("triton"),
        gpu_embed.use_gather_method("flat"),
        gpu_embed.use_gradient_method("atomic"),
    ):
        operations = env_report.collect()["serves"]["cpu"]["operations"]
    assert operations["lookup"]["kernels"] == "flat, forced"
    refusal = "'atomic' is forced but cannot serve a gradient of torch.bfloat16"
    assert refusal in operations["gradient"]["kernels"]


def test_a_rule_in_words() -> None:
    rules = gradient_method.RULES
    rest = "not deterministic, without scale_grad_by_freq"
    for limits, said in (
        ((Limit(0, 2.5), Limit(0, 2.5)), "float32 or float64, up to 2.5 ids a row"),
        ((Limit(64), Limit(0, 8)), "float32 up to 64 ids, float64 up to 8 ids a row"),
        ((Limit(64, 0.5), Limit()), "float32 up to 0.5 ids a row or up to 64 ids"),
        ((Limit(), Limit()), "only where forced, float32 or float64"),
    ):
        by_dtype = dict(zip(gradient_method.ATOMIC_DTYPES, limits, strict=True))
        assert env_report._rule(rules["atomic"], by_dtype) == f"atomic: {said}, {rest}"
    assert env_report._rule(rules["sorted"], None) == "sorted: everything"


def test_versions_of_whatever_cupy_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    for wheel in ("cupy-cuda12x", "cupy-cuda13x", "cupy"):
        monkeypatch.setattr(env_report, "_version", {wheel: "14.2", "torch": "2.8"}.get)
        expected = {"torch": "2.8", "numpy": None, "triton": None, "cupy": "14.2"}
        assert env_report.packages() == expected


def test_driver_and_toolkit_are_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands = {
        "nvidia-smi": "echo 570.86.15\necho 570.86.15",
        "nvcc": "echo 'Cuda compilation tools, release 12.8, V12.8.93'",
    }
    for name, says in commands.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{says}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    found = env_report.cuda_versions()
    assert found["driver"] == "570.86.15"
    assert found["toolkit (nvcc)"] == "12.8"
    (tmp_path / "nvcc").unlink()
    # A driver that does not run has this command too.
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\nexit 9\n")
    assert set(list(env_report.cuda_versions().values())[1:]) == {None}


@pytest.mark.usefixtures("torch_alone")
def test_a_gpu_in_the_report(monkeypatch: pytest.MonkeyPatch) -> None:
    properties = SimpleNamespace(name="NVIDIA H100", major=9, minor=0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (60 * 2**30, 80 * 2**30))
    report = env_report.collect()
    report["gpus"] = [env_report._gpu(torch.device("cuda", 1))]
    line = "cuda:1: NVIDIA H100, compute capability 9.0, 80.0 GiB (60.0 free)"
    assert line in env_report.text(report).splitlines()


# Each method of a backend, and the operations whose check calls it.
METHODS = {
    "embedding": "lookup",
    "embedding_dense_backward": "gradient, deterministic gradient",
    "embedding_renorm_": "max_norm",
    "embedding_counts": "scale_grad_by_freq",
    "embedding_bag": "bags",
    "embedding_bag_max": "bags",
    "embedding_bag_dense_backward": "gradient of bags",
    "embedding_bag_sample_weights_backward": "gradient of bags",
    "table_batched_embedding": "batched tables",
    "table_batched_embedding_max": "batched tables",
    "table_batched_embedding_dense_backward": "gradient of batched tables",
    "table_batched_embedding_sample_weights_backward": "gradient of batched tables",
    "row_update_": "optimizer updates",
    "table_row_update_": "batched optimizer updates",
    "take_rows": "Keras lookup",
    "dequantize_rows": "Keras quantized lookup, quantized lookup",
}


@pytest.mark.usefixtures("torch_alone")
@pytest.mark.parametrize("method", METHODS)
def test_a_wrong_backend_is_named(
    method: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = getattr(TorchBackend, method)

    def wrong(self: TorchBackend, first: Any, *args: Any) -> Any:
        result = right(self, first, *args)
        outputs = result if isinstance(result, tuple) else (result, first, *args)
        changed = next(x for x in outputs if isinstance(x, torch.Tensor))
        changed.view(-1)[-1] += 1
        return result

    monkeypatch.setattr(TorchBackend, method, wrong)
    assert env_report.main([]) == 1
    said = capsys.readouterr()
    for stream in said:
        (named,) = re.findall(r"torch .*wrong.* differs from the reference in (.*)", stream)
        # torch's bags call its lookup and its gradient.
        assert METHODS[method] in named


def test_every_method_of_a_backend_is_checked() -> None:
    # This is `embedding`, decided once.
    unchecked = {"unusable_reason", "prepare_embedding"}
    methods = {name for name in vars(backends.Backend) if not name.startswith("_")}
    assert methods - unchecked == set(METHODS)


@pytest.mark.usefixtures("torch_alone")
def test_a_backend_that_fails_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(self: TorchBackend, *args: Any) -> None:
        raise OSError("no such library")

    monkeypatch.setattr(TorchBackend, "embedding", fail)
    assert env_report.main([]) == 1
    assert "torch on cpu failed: lookup: OSError: no such library" in capsys.readouterr().err


@pytest.mark.usefixtures("torch_alone")
def test_a_forced_backend_that_cannot_run_is_explained(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with gpu_embed.use_backend("cupy"):
        assert env_report.main([]) == 0
    said = capsys.readouterr().out
    assert "cupy is forced but cannot serve cpu" in said
    assert re.search(r"^  lookup +none$", said, re.M)


@pytest.mark.parametrize("name", ["BACKEND", "GATHER_METHOD", "GRADIENT_METHOD", "BOUNDS_CHECK"])
@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.usefixtures("torch_alone")
def test_an_unknown_setting_is_said(
    name: str, backend: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with gpu_embed.use_backend(backend):
        setting = getattr(gpu_embed.settings, name)
        monkeypatch.delitem(vars(setting), "value", raising=False)
        monkeypatch.setenv(setting.variable, "guess")
        assert env_report.main([]) == 0
        monkeypatch.undo()
    assert f"{setting.variable}: expected one of " in capsys.readouterr().out


@pytest.mark.full
def test_a_forced_method_does_not_fail_the_check() -> None:
    with gpu_embed.use_gather_method("rows"), gpu_embed.use_gradient_method("atomic"):
        assert _self_check.check_backend("triton", CPU).status == "right"


def test_the_check_is_deterministic_only_while_it_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def look(backend: backends.Backend, device: torch.device) -> tuple[()]:
        seen.append(torch.get_deterministic_debug_mode())
        return ()

    monkeypatch.setattr(_self_check, "_gradient", look)
    for former in range(3):
        torch.set_deterministic_debug_mode(former)
        try:
            _self_check._deterministic_gradient(TorchBackend(), CPU)
            assert torch.get_deterministic_debug_mode() == former
        finally:
            torch.set_deterministic_debug_mode(0)
    assert seen == [2, 2, 2]


@pytest.mark.full
def test_command_without_triton_and_cupy(tmp_path) -> None:
    for name in ("triton", "cupy"):
        (tmp_path / f"{name}.py").write_text("raise ImportError('not here')")
    # Nor the compiler, which alone would take seconds to import.
    block = "import sys; sys.modules['torch._inductor'] = None"
    (tmp_path / "sitecustomize.py").write_text(block)
    done = subprocess.run(
        [sys.executable, "-m", "gpu_embed.env_report"],
        env={"PYTHONPATH": str(tmp_path), "PATH": ""},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert "triton does not work here: not here" in done.stdout
