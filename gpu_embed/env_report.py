"""What is installed, which backend serves each device and why, and whether it computes right.

`python -m gpu_embed.env_report` prints it, `--json` for programs. Needs neither GPU nor Triton nor CuPy. The
exit code is 1 if a usable backend fails its check against the reference.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import json
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch

import gpu_embed

from . import backends, settings
from ._self_check import SAMPLES, check_device
from .backends._plan import tuned
from .backends._plan.gradient_method import LIMITS, RULES, GradientRule, Limit, choose

PACKAGES = ("torch", "numpy", "triton")
CUPY_WHEELS = ("cupy-cuda12x", "cupy-cuda13x", "cupy")
KERNEL_BACKENDS = ("triton", "cupy")
SPARSE_GRADIENT = "sparse gradient"
OPERATIONS = (*SAMPLES, SPARSE_GRADIENT)


def collect() -> dict[str, Any]:
    """The whole report, as what JSON can hold."""
    devices = [torch.device("cpu")]
    devices += [torch.device("cuda", i) for i in range(torch.cuda.device_count())]
    return {
        "gpu_embed": gpu_embed.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": packages(),
        "cuda": cuda_versions(),
        "gpus": [_gpu(device) for device in devices if device.type == "cuda"],
        "serves": {str(device): _serves(device) for device in devices},
        "settings": _settings(),
        "known_launch": _known_launch(),
        "gradient_methods": [_rule(rule, LIMITS.get(rule.method)) for rule in RULES.values()],
        "checks": [asdict(check) for device in devices for check in check_device(device)],
    }


def packages() -> dict[str, str | None]:
    found = {name: _version(name) for name in PACKAGES}
    found["cupy"] = next((v for v in map(_version, CUPY_WHEELS) if v is not None), None)
    return found


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def cuda_versions() -> dict[str, str | None]:
    return {
        "torch was built for": torch.version.cuda,
        "driver": _first_line(
            r"(\S+)", "nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"
        ),
        "toolkit (nvcc)": _first_line(r"release ([\d.]+)", "nvcc", "--version"),
    }


def _first_line(pattern: str, *command: str) -> str | None:
    """What the pattern finds in a command's output; None where there is no such command or no match."""
    if shutil.which(command[0]) is None:
        return None
    try:
        said = subprocess.run(command, capture_output=True, text=True, timeout=10).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    found = re.search(pattern, said)
    return found[1] if found else None


def _gpu(device: torch.device) -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(device)
    free, total = torch.cuda.mem_get_info(device)
    return {
        "device": str(device),
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "memory_gib": round(total / 2**30, 1),
        "free_gib": round(free / 2**30, 1),
    }


def _serves(device: torch.device) -> dict[str, Any]:
    """What every operation takes, why, why not the others, and the launch settings of the kernels."""
    try:
        chosen: str | None = backends.select(device).name
    except (RuntimeError, ValueError):  # a forced backend that cannot run, or an unknown name
        chosen = None
    try:
        because = backends.explain(device)
    except ValueError as error:
        because = str(error)
    return {
        "operations": {name: _operation(name, chosen, device) for name in OPERATIONS},
        "because": because,
        "others": {
            name: reason if reason != "usable" else _why_unchosen(name, device, chosen)
            for name, reason in backends.available_backends(device).items()
            if name != chosen
        },
        "launches": _in_force(chosen, device),
        "tuned": _tuned(chosen, device),
    }


def _operation(name: str, chosen: str | None, device: torch.device) -> dict[str, str | None]:
    """Who computes it, and by which kernels where there is a choice."""
    if name == SPARSE_GRADIENT:
        return {"backend": "torch", "kernels": "its entries are the output's gradient as it came"}
    kernels = None
    if chosen in KERNEL_BACKENDS:
        if name == "lookup":
            kernels = _lookup_kernels()
        elif name == "max_norm":
            kernels = "sorted; complex tables by torch"
        elif "gradient" in name:
            kernels = _gradient_kernels(chosen, device, name == "deterministic gradient")
    return {"backend": chosen, "kernels": kernels}


def _lookup_kernels() -> str:
    try:
        method = settings.GATHER_METHOD.value
    except ValueError as error:
        return str(error)
    return "rows or flat, by a row's width" if method == "auto" else f"{method}, forced"


def _gradient_kernels(name: str, device: torch.device, deterministic: bool) -> str:
    """What the rules choose for 1000 rows that few ids name, and many."""
    backend: Any = backends.load(name)
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        try:
            methods = [
                choose(n, 1000, dtype, deterministic, False, backend._methods[device].gradient)
                for n in (1000, 10**6)
            ]
        except (RuntimeError, ValueError) as error:  # a forced method, or an unknown name or file
            return str(error)
        found.append(f"{_name(dtype)} {' or '.join(dict.fromkeys(methods))}")
    return ", ".join(found)


def _why_unchosen(name: str, device: torch.device, chosen: str | None) -> str:
    """Why a backend that could serve the device does not."""
    if chosen is None:
        return "usable"
    if settings.BACKEND.value != "auto":
        return f"usable, but {settings.BACKEND.value} is forced"
    if name == "reference" or device.type != "cuda":
        return "usable, but only where it is forced"
    return f"usable, but {chosen} comes first"


def _in_force(name: str | None, device: torch.device) -> dict[str, str]:
    """The launch settings and the rules of method of a backend's kernels on a device."""
    if name not in KERNEL_BACKENDS:
        return {}
    backend: Any = backends.load(name)
    try:
        parts = backend._launches[device], backend._methods[device]
    except ValueError:  # GPU_EMBED_TUNED, of which `_tuned` tells
        return {}
    return {
        path: " ".join(f"{k}={v}" for k, v in asdict(leaf).items())
        for part in parts
        for path, leaf in tuned.leaves(part).items()
    }


def _tuned(name: str | None, device: torch.device) -> str | None:
    """Which tuned file a backend's kernels follow on a device, and why."""
    if name not in KERNEL_BACKENDS:
        return None
    try:
        path, reason, content = tuned.choose_file(device)
    except ValueError as error:  # no such file, or none that can be read
        return str(error)
    if path is None:
        return f"defaults: {reason}"
    if name not in content:
        return f"defaults: {path} ({reason}) has nothing on {name}"
    changed = "" if tuned.is_current(content, name) else "; its launches are of other kernels"
    return f"{path}: {reason}{changed}"


def _known_launch() -> str:
    """Whether compiled Triton kernels are launched past Triton's own launch path, or why not."""
    if _version("triton") is None:
        return "no triton"
    from .backends._triton import known_launch

    try:
        return known_launch.unused_reason() or "yes"
    except ValueError as error:  # an unknown choice
        return str(error)
    except Exception as error:  # a broken install
        return f"triton does not work here: {error}"


def _settings() -> dict[str, str]:
    found = {}
    for setting in (
        settings.BACKEND,
        settings.BOUNDS_CHECK,
        settings.GATHER_METHOD,
        settings.GRADIENT_METHOD,
        settings.TUNED,
    ):
        name = setting.variable.removeprefix("GPU_EMBED_").lower()
        try:
            found[name] = setting.value
        except ValueError as error:
            found[name] = str(error)
    return found


def _rule(rule: GradientRule, limits: Mapping[torch.dtype, Limit] | None) -> str:
    """What a method of the gradient is chosen for; without limits, everything."""
    said = {dtype: _limit(limit) for dtype, limit in (limits or {}).items()}
    admitted = {dtype: words for dtype, words in said.items() if words}
    same = len(admitted) == len(rule.dtypes) and len(set(admitted.values())) == 1
    words = [
        "only where forced" if limits is not None and not admitted else "",
        " or ".join(map(_name, rule.dtypes)) if same or not admitted else "",
        *(admitted.values() if same else [f"{_name(d)} {text}" for d, text in admitted.items()]),
        "" if rule.deterministic else "not deterministic",
        "" if rule.scale_grad_by_freq else "without scale_grad_by_freq",
    ]
    return f"{rule.method}: {', '.join(dict.fromkeys(filter(None, words))) or 'everything'}"


def _limit(limit: Limit) -> str:
    """Up to where a method is chosen; empty: it is not."""
    words = [
        f"up to {limit.max_indices_per_row:g} ids a row" if limit.max_indices_per_row else "",
        f"up to {limit.max_indices} ids" if limit.max_indices else "",
    ]
    return " or ".join(filter(None, words))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def text(report: dict[str, Any]) -> str:
    """The report for people."""
    lines = [
        f"gpu_embed {report['gpu_embed']}, Python {report['python']}, {report['platform']}",
        "",
        "packages: "
        + ", ".join(f"{name} {found or 'none'}" for name, found in report["packages"].items()),
        "cuda: " + ", ".join(f"{name} {found or 'none'}" for name, found in report["cuda"].items()),
    ]
    lines += [
        f"{gpu['device']}: {gpu['name']}, compute capability {gpu['capability']}, "
        f"{gpu['memory_gib']} GiB ({gpu['free_gib']} free)"
        for gpu in report["gpus"]
    ] or ["no CUDA device that torch can use"]
    lines += ["", "settings: " + ", ".join(f"{k} {v}" for k, v in report["settings"].items())]
    lines += [f"fast launches of triton kernels: {report['known_launch']}"]
    lines += ["", "gradient of a table by default, from the top; the first that fits is taken"]
    lines += [f"  {rule}" for rule in report["gradient_methods"]]
    for device, serves in report["serves"].items():
        lines += ["", f"{device}: {serves['because']}"]
        lines += [
            f"  {name:<27} {taken['backend'] or 'none'}"
            f"{': ' + taken['kernels'] if taken['kernels'] else ''}"
            for name, taken in serves["operations"].items()
        ]
        lines += ["  why not the others"]
        lines += [f"    {name:<10} {reason}" for name, reason in serves["others"].items()]
        if serves["launches"]:
            lines += [
                f"  tuned file: {serves['tuned']}",
                "  launch settings, and limits of methods",
            ]
            lines += [f"    {name:<27} {numbers}" for name, numbers in serves["launches"].items()]
    lines += ["", "checked against the reference"]
    lines += [
        f"  {check['device']:<7} {check['backend']:<10} {check['status']:<6} "
        f"{check['milliseconds']:>8.1f} ms  {check['detail']}".rstrip()
        for check in report["checks"]
        if check["status"] != "not usable"
    ]
    return "\n".join(lines)


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m gpu_embed.env_report",
        description="What is installed, which backend serves each device and why, and whether it "
        "computes right.",
        epilog="Exit code: 1 if a backend fails its check.",
    )
    parser.add_argument("--json", action="store_true", help="for programs")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    report = collect()
    print(json.dumps(report, indent=2) if args.json else text(report))
    bad = [check for check in report["checks"] if check["status"] in ("wrong", "failed")]
    for check in bad:
        print(
            f"{check['backend']} on {check['device']} {check['status']}: {check['detail']}",
            file=sys.stderr,
        )
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
