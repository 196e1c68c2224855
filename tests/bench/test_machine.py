"""What header.json says of a card that is not there: its driver's tools are stubs."""

import json
import sys
from types import SimpleNamespace

import pytest
import torch

import gpu_embed
from gpu_embed.bench import machine

CUDA = torch.device("cuda", 0)
ANSWER = "1755 MHz, 2619 MHz, 1980 MHz, 2619 MHz, P0, 412.10 W, 700.00 W, 61, 570.86.15\n"
STATE = {
    "clocks.sm": "1755 MHz",
    "clocks.mem": "2619 MHz",
    "clocks.max.sm": "1980 MHz",
    "clocks.max.mem": "2619 MHz",
    "pstate": "P0",
    "power.draw": "412.10 W",
    "power.limit": "700.00 W",
    "temperature.gpu": "61",
}
NVML = {
    "nvmlInit": lambda: None,
    "nvmlShutdown": lambda: None,
    "nvmlDeviceGetHandleByUUID": lambda uuid: uuid,
    "nvmlDeviceGetClockInfo": lambda gpu, kind: {1: 1755, 2: 2619}[kind],
    "nvmlDeviceGetMaxClockInfo": lambda gpu, kind: {1: 1980, 2: 2619}[kind],
    "nvmlDeviceGetPerformanceState": lambda gpu: 0,
    "nvmlDeviceGetPowerUsage": lambda gpu: 412100,
    "nvmlDeviceGetEnforcedPowerLimit": lambda gpu: 700000,
    "nvmlDeviceGetTemperature": lambda gpu, sensor: 61,
    "nvmlSystemGetDriverVersion": lambda: "570.86.15",
    "NVML_CLOCK_SM": 1,
    "NVML_CLOCK_MEM": 2,
    "NVML_TEMPERATURE_GPU": 0,
}


@pytest.fixture
def card(tmp_path, monkeypatch):
    """A card in torch's eyes; returns what makes its nvidia-smi, which keeps its arguments."""
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="1234-ab")
    )
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "stub of a card")
    monkeypatch.setattr(gpu_embed.backends, "explain", lambda device: "stub")
    monkeypatch.setitem(sys.modules, "pynvml", None)
    monkeypatch.setenv("PATH", str(tmp_path))

    def make(answer, code=0):
        script = f'#!/bin/sh\necho "$@" >"{tmp_path}/asked"\nprintf "%s" "{answer}"\nexit {code}\n'
        (tmp_path / "nvidia-smi").write_text(script)
        (tmp_path / "nvidia-smi").chmod(0o755)
        return tmp_path / "asked"

    return make


def header():
    """As it is read again."""
    return json.loads(json.dumps(machine.header(CUDA, 1000.0, 0, ["command"])))


def test_nvidia_smi_tells_clocks_power_and_state(card):
    asked = card(ANSWER)
    found = header()
    assert found["clocks"] == STATE
    assert found["no_clocks"] == ""
    assert found["driver"] == "570.86.15"
    # The card that torch means, of all that the driver sees.
    assert asked.read_text().split()[-2:] == ["-i", "GPU-1234-ab"]
    assert asked.read_text().split()[0] == f"--query-gpu={','.join(STATE)},driver_version"


def test_the_drivers_library_is_asked_first(card, monkeypatch):
    asked = card(ANSWER)
    monkeypatch.setitem(sys.modules, "pynvml", SimpleNamespace(**NVML))
    found = header()
    assert (found["clocks"], found["driver"]) == (STATE, "570.86.15")
    assert not asked.exists()


@pytest.mark.parametrize("name", ["nvmlInit", "nvmlDeviceGetPowerUsage"])
def test_where_the_library_fails_nvidia_smi_is_asked(card, monkeypatch, name):
    def fails(*arguments):
        raise RuntimeError("no such function in this driver")

    card(ANSWER)
    monkeypatch.setitem(sys.modules, "pynvml", SimpleNamespace(**{**NVML, name: fails}))
    assert header()["clocks"] == STATE


@pytest.mark.parametrize("how", ["missing", "fails", "another answer"])
def test_what_nobody_tells_is_null_with_the_reason(card, how):
    if how == "fails":
        card("Failed to initialize NVML", 9)
    elif how == "another answer":
        card("1755 MHz, 2619 MHz")
    found = header()
    assert found["clocks"] is None
    assert found["driver"] == ""
    assert "pynvml: " in found["no_clocks"]
    assert found["no_clocks"].endswith("nvidia-smi answers nothing that can be read")


def test_a_cpu_has_no_clocks():
    found = machine.header(torch.device("cpu"), 10.0, 0, ["command"])
    assert (found["clocks"], found["no_clocks"], found["driver"]) == (None, "not a GPU", "")


def test_without_a_checkout_the_caller_names_the_commit(monkeypatch):
    monkeypatch.setattr(machine, "_output", lambda *command: "")
    assert machine.commit() == (f"version {gpu_embed.__version__}", False)
    monkeypatch.setenv("GPU_EMBED_COMMIT", "0123456789ab")
    assert machine.commit() == ("0123456789ab", False)
