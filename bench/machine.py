"""Where a measurement was made: device, versions, commit, free memory."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import re
import subprocess
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

import gpu_embed

# Free memory that is left to the allocator's rounding and to everybody else.
MEMORY_SHARE = {"cuda": 0.92, "cpu": 0.5}


def device_name(device: torch.device) -> str:
    """The GPU's name, or the processor's with its cores."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    model = _in_proc("cpuinfo", r"^model name\s*:\s*(.*\S)")
    model = model or platform.processor() or platform.machine()
    threads = torch.get_num_threads()
    return f"{model}, {threads} thread{'s' * (threads > 1)}"


def version(package: str) -> str:
    """The installed version, or an empty text."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def commit() -> tuple[str, bool]:
    """The checkout's commit, and whether its files differ from it.

    Without a checkout, what GPU_EMBED_COMMIT says, else the version.
    """
    source = Path(gpu_embed.__file__).resolve()
    # An installed copy may lie inside another project's checkout: only a tracked file counts.
    git = partial(_output, "git", "-C", str(source.parent))
    if git("ls-files", "--error-unmatch", source.name):
        name = git("rev-parse", "--short=12", "HEAD")
        changes = git("status", "--porcelain")
        if name:
            return name, bool(changes)
    return os.environ.get("GPU_EMBED_COMMIT") or f"version {gpu_embed.__version__}", False


def tracked_files(folder: Path, pattern: str) -> list[str]:
    """What git has committed or staged of the folder, by names within it; empty where there is no checkout."""
    return _output("git", "-C", str(folder), "ls-files", "--", pattern).splitlines()


def power_state(device: torch.device) -> tuple[dict[str, str] | None, str]:
    """The GPU's clocks, power, state and heat at this moment, by nvidia-smi's names; or None and why not."""
    if device.type != "cuda":
        return None, "not a GPU"
    # The driver counts all GPUs, torch those it may see.
    properties = torch.cuda.get_device_properties(device)
    gpu = f"GPU-{getattr(properties, 'uuid', '')}".removesuffix("GPU-")
    try:
        return _power_state_by_library(gpu), ""
    # Whatever it is, nvidia-smi asks the same driver in another way.
    except Exception as error:
        reason = f"pynvml: {error or type(error).__name__}"
    fields = (*POWER_STATE, "driver_version")
    query = ("nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader")
    line = _output(*query, *(["-i", gpu] if gpu else []))
    values = [value.strip() for value in line.splitlines()[0].split(",")] if line else []
    if len(values) != len(fields):
        return None, f"{reason}; nvidia-smi answers nothing that can be read"
    return dict(zip(fields, values, strict=True)), ""


POWER_STATE = (
    *("clocks.sm", "clocks.mem", "clocks.max.sm", "clocks.max.mem"),
    *("pstate", "power.draw", "power.limit", "temperature.gpu"),
)


def _power_state_by_library(gpu: str) -> dict[str, str]:
    """The same by the driver's own library; raises whatever it raises."""
    import pynvml

    pynvml.nvmlInit()
    try:
        handle = pynvml.nvmlDeviceGetHandleByUUID(gpu)
        kinds = (pynvml.NVML_CLOCK_SM, pynvml.NVML_CLOCK_MEM)
        values = (
            *(f"{pynvml.nvmlDeviceGetClockInfo(handle, kind)} MHz" for kind in kinds),
            *(f"{pynvml.nvmlDeviceGetMaxClockInfo(handle, kind)} MHz" for kind in kinds),
            f"P{pynvml.nvmlDeviceGetPerformanceState(handle)}",
            # In milliwatts.
            f"{pynvml.nvmlDeviceGetPowerUsage(handle) / 1000:.2f} W",
            f"{pynvml.nvmlDeviceGetEnforcedPowerLimit(handle) / 1000:.2f} W",
            str(pynvml.nvmlDeviceGetTemperature(handle, pynvml.NVML_TEMPERATURE_GPU)),
            str(pynvml.nvmlSystemGetDriverVersion()),
        )
    finally:
        pynvml.nvmlShutdown()
    return dict(zip((*POWER_STATE, "driver_version"), values, strict=True))


def header(
    device: torch.device, copy_gbps: float, seed: int, command: Sequence[str]
) -> dict[str, Any]:
    """header.json's content."""
    seen, unseen = power_state(device)
    name, dirty = commit()
    cuda = device.type == "cuda"
    return {
        "device": device_name(device),
        "driver": seen.pop("driver_version") if seen else "",
        "capability": list(torch.cuda.get_device_capability(device)) if cuda else None,
        "copy_gbps": copy_gbps,
        # Of a card that has just copied, so that they are those of work.
        "clocks": seen,
        "no_clocks": unseen,
        # Whoever else works on the machine slows what is measured there.
        "load": load(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": version("triton"),
        "python": platform.python_version(),
        "gpu_embed": gpu_embed.__version__,
        "commit": name,
        "dirty": dirty,
        "backend": gpu_embed.backends.explain(device),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": " ".join(command),
        "seed": seed,
    }


def load() -> list[float] | None:
    """The processes that wanted to run, in the mean of the last minute and of five; None where unknown."""
    try:
        return [round(mean, 2) for mean in os.getloadavg()[:2]]
    except (AttributeError, OSError):  # Windows
        return None


def usable_memory(device: torch.device) -> int:
    """Bytes that a cell may take on the device, unless somebody knows better."""
    return int(MEMORY_SHARE[device.type] * free_memory(device))


def free_memory(device: torch.device) -> int:
    """Bytes that nobody uses."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        free: int = torch.cuda.mem_get_info(device)[0]
        return free
    return _free_host_memory()


def _free_host_memory() -> int:
    if available := _in_proc("meminfo", r"^MemAvailable:\s*(\d+)"):
        return min(int(available) * 1024, _container_limit())
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    except (AttributeError, ValueError, OSError):
        return 4 * 2**30


def _container_limit() -> int:
    """A container sees the machine's free memory, but is ended at its own limit."""
    group = Path("/sys/fs/cgroup")
    try:
        limit = (group / "memory.max").read_text().strip()
        used = int((group / "memory.current").read_text())
    except (OSError, ValueError):
        return 2**63 - 1
    return max(int(limit) - used, 0) if limit.isdigit() else 2**63 - 1


def readable_bytes(size: float) -> str:
    """12.3 GiB, and so on."""
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} GiB"


def _in_proc(name: str, pattern: str) -> str | None:
    """What a line of a file of /proc says; None where there is none."""
    try:
        found = re.search(pattern, Path("/proc", name).read_text(), re.MULTILINE)
    except OSError:
        return None
    return found[1] if found else None


def _output(*command: str) -> str:
    """A command's standard output; empty if it fails or is missing."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()
