"""The environment report: complete, true, and of exit code 1 when a backend computes wrong."""

import json
import subprocess
import sys
from typing import Any

import pytest
import torch
from conftest import Target

import gpu_embed
from gpu_embed import backends, env_report
from gpu_embed.backends._torch import TorchBackend

CPU = torch.device("cpu")


def test_every_usable_backend_is_right(target: Target) -> None:
    checks = env_report.check_device(torch.device(target.device))
    (check,) = [check for check in checks if check.backend == target.backend]
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
        "settings: backend auto, bounds_check raise, gather_method auto, gradient_method auto",
        "sorted: everything",
    ):
        assert fact in said
    for reason in backends.available_backends(CPU).values():
        assert reason in said


def test_report_for_programs(capsys: pytest.CaptureFixture[str]) -> None:
    assert env_report.main(["--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["packages"]["torch"]
    serves = report["serves"]["cpu"]
    assert set(serves["operations"]) == set(env_report.OPERATIONS)
    assert set(serves["backends"]) == set(backends.BACKENDS)
    assert {check["backend"] for check in report["checks"]} == set(backends.BACKENDS)


@pytest.mark.parametrize("operation", env_report.OPERATIONS)
def test_a_wrong_backend_is_named(
    operation: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = getattr(TorchBackend, operation)

    def wrong(self: TorchBackend, first: Any, *args: Any) -> Any:
        result = right(self, first, *args)
        changed = next(x for x in (result, first, *args) if isinstance(x, torch.Tensor))
        changed.view(-1)[-1] += 1
        return result

    monkeypatch.setattr(TorchBackend, operation, wrong)
    assert env_report.main([]) == 1
    said = capsys.readouterr()
    assert f"torch on cpu wrong: differs from the reference in {operation}" in said.err
    assert f"differs from the reference in {operation}" in said.out


def test_a_backend_that_fails_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(self: TorchBackend, *args: Any) -> None:
        raise OSError("no such library")

    monkeypatch.setattr(TorchBackend, "embedding", fail)
    assert env_report.main([]) == 1
    assert "torch on cpu failed: OSError: no such library" in capsys.readouterr().err


def test_a_forced_backend_that_cannot_run_is_explained(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with gpu_embed.use_backend("cupy"):
        assert env_report.main([]) == 0
    assert "cupy is forced but cannot serve cpu" in capsys.readouterr().out


def test_an_unknown_setting_is_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu_embed.settings.GRADIENT_METHOD, "_value", None)
    monkeypatch.setenv("GPU_EMBED_GRADIENT_METHOD", "guess")
    env_report.main([])
    assert "got 'guess'" in capsys.readouterr().out


def test_command_without_triton_and_cupy(tmp_path) -> None:
    for name in ("triton", "cupy"):
        (tmp_path / f"{name}.py").write_text("raise ImportError('not here')")
    done = subprocess.run(
        [sys.executable, "-m", "gpu_embed.env_report"],
        env={"PYTHONPATH": str(tmp_path), "PATH": ""},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert "triton does not work here: not here" in done.stdout
