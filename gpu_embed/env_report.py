"""What is installed, which backend serves each device and why, and whether it computes right.

`python -m gpu_embed.env_report` prints it, `--json` for programs. Needs neither GPU nor Triton nor CuPy. The
exit code is 1 if a usable backend fails its check against the reference.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from math import inf
from typing import Any

import torch
from torch import Tensor

import gpu_embed

from . import backends, settings
from .backends import Backend
from .backends.gradient_method import RULES, GradientRule
from .bags import Bags
from .row_update import RowUpdate

PACKAGES = ("torch", "numpy", "triton")
CUPY_WHEELS = ("cupy-cuda12x", "cupy-cuda13x", "cupy")
OPERATIONS = (
    "embedding",
    "embedding_dense_backward",
    "embedding_renorm_",
    "embedding_counts",
    "embedding_bag",
    "row_update_",
)


@dataclass(frozen=True)
class Check:
    """One backend on one device against the NumPy reference."""

    device: str
    backend: str
    status: str  # "right", "wrong", "failed" or "not usable"
    detail: str  # what is wrong, or why it is not usable
    milliseconds: float


def collect() -> dict[str, Any]:
    """The whole report, as what JSON can hold."""
    devices = [torch.device("cpu")]
    devices += [torch.device("cuda", i) for i in range(torch.cuda.device_count())]
    return {
        "gpu_embed": gpu_embed.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": _packages(),
        "cuda": _cuda(),
        "gpus": [_gpu(device) for device in devices if device.type == "cuda"],
        "serves": {str(device): _serves(device) for device in devices},
        "settings": _settings(),
        "gradient_methods": [_rule(rule) for rule in RULES.values()],
        "checks": [asdict(check) for device in devices for check in check_device(device)],
    }


def check_device(device: torch.device) -> list[Check]:
    """Every backend on this device; a second for all of them, first compilation aside."""
    return [_check(name, device) for name in backends.BACKENDS]


def _check(name: str, device: torch.device) -> Check:
    backend = backends.load(name)
    begin = time.perf_counter()

    def result(status: str, detail: str = "") -> Check:
        took = round(1e3 * (time.perf_counter() - begin), 1)
        return Check(str(device), name, status, detail, took)

    reason = backend.unusable_reason(device)
    if reason is not None:
        return result("not usable", reason)
    reference = backends.load("reference")
    try:
        wrong = [
            operation
            for operation in OPERATIONS
            if not torch.equal(
                SAMPLES[operation](backend, device).cpu(),
                SAMPLES[operation](reference, torch.device("cpu")),
            )
        ]
    # A self-check has to survive whatever a broken installation raises.
    except Exception as error:
        return result("failed", f"{type(error).__name__}: {error}")
    return (
        result("wrong", f"differs from the reference in {', '.join(wrong)}")
        if wrong
        else result("right")
    )


# Small integers, whose sums are exact in any order, and rows whose norm is a power of two.
ROWS, COLUMNS, NUM_IDS = 37, 20, 100


def _table(device: torch.device) -> Tensor:
    return (torch.arange(ROWS * COLUMNS) % 11 - 5.0).view(ROWS, COLUMNS).to(device)


def _ids(device: torch.device) -> Tensor:
    return (torch.arange(NUM_IDS) ** 2 % ROWS).view(4, -1).to(device)


def _gradient(device: torch.device) -> Tensor:
    return (torch.arange(NUM_IDS * COLUMNS) % 7 - 3.0).view(4, -1, COLUMNS).to(device)


def _renormed(backend: Backend, device: torch.device) -> Tensor:
    table = torch.full((ROWS, 16), 2.0, device=device)
    backend.embedding_renorm_(table, _ids(device), 4.0, 2.0)
    return table


def _bags(backend: Backend, device: torch.device) -> Tensor:
    offsets = torch.tensor([0, 0, 7, 60], device=device)
    bags = Bags(_ids(device).view(-1), offsets, len(offsets))
    return backend.embedding_bag(_table(device), None, bags, 3, "sum", None)


def _updated(backend: Backend, device: torch.device) -> Tensor:
    table = _table(device)
    values = _gradient(device).view(NUM_IDS, COLUMNS)
    backend.row_update_(
        RowUpdate("sgd", step_size=0.5), table, (), _ids(device).view(-1), values, None
    )
    return table


SAMPLES: dict[str, Callable[[Backend, torch.device], Tensor]] = {
    "embedding": lambda backend, device: backend.embedding(_table(device), _ids(device), 3, None),
    "embedding_dense_backward": lambda backend, device: backend.embedding_dense_backward(
        _gradient(device), _ids(device), ROWS, 3, False
    ),
    "embedding_renorm_": _renormed,
    "embedding_counts": lambda backend, device: backend.embedding_counts(_ids(device), ROWS),
    "embedding_bag": _bags,
    "row_update_": _updated,
}


def _packages() -> dict[str, str | None]:
    found = {name: _version(name) for name in PACKAGES}
    found["cupy"] = next((v for v in map(_version, CUPY_WHEELS) if v is not None), None)
    return found


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cuda() -> dict[str, str | None]:
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
    """The backend that every operation takes, why, and what the others say."""
    try:
        chosen: str | None = backends.select(device).name
    except (RuntimeError, ValueError):  # a forced backend that cannot run, or an unknown name
        chosen = None
    try:
        because = backends.explain(device)
    except ValueError as error:
        because = str(error)
    return {
        "operations": dict.fromkeys(OPERATIONS, chosen),
        "because": because,
        "backends": backends.available_backends(device),
    }


def _settings() -> dict[str, str]:
    found = {}
    for setting in (
        settings.BACKEND,
        settings.BOUNDS_CHECK,
        settings.GATHER_METHOD,
        settings.GRADIENT_METHOD,
    ):
        name = setting.variable.removeprefix("GPU_EMBED_").lower()
        try:
            found[name] = setting.value
        except ValueError as error:
            found[name] = str(error)
    return found


def _rule(rule: GradientRule) -> str:
    """One line of the table that chooses the gradient's kernel."""
    chosen = rule.max_indices_per_row
    limits = [
        "only where forced" if chosen is None else "",
        " or ".join(str(dtype).removeprefix("torch.") for dtype in rule.dtypes),
        f"up to {chosen:g} ids a row" if chosen is not None and chosen < inf else "",
        f"up to {rule.max_num_embeddings:g} rows" if rule.max_num_embeddings < inf else "",
        "" if rule.deterministic else "not deterministic",
        "" if rule.scale_grad_by_freq else "without scale_grad_by_freq",
    ]
    return f"{rule.method}: {', '.join(filter(None, limits)) or 'everything'}"


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
    lines += ["", "gradient of a table, from the top; the first that fits is taken"]
    lines += [f"  {rule}" for rule in report["gradient_methods"]]
    for device, serves in report["serves"].items():
        lines += ["", f"{device}: {serves['because']}"]
        lines += [f"  {name:<10} {reason}" for name, reason in serves["backends"].items()]
    lines += ["", "checked against the reference"]
    lines += [
        f"  {check['device']:<7} {check['backend']:<10} {check['status']:<6} "
        f"{check['milliseconds']:>8.1f} ms  {check['detail']}".rstrip()
        for check in report["checks"]
        if check["status"] != "not usable"
    ]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m gpu_embed.env_report",
        description="What is installed, which backend serves each device and why, and whether it "
        "computes right.",
        epilog="Exit code: 1 if a backend fails its check.",
    )
    parser.add_argument("--json", action="store_true", help="for programs")
    args = parser.parse_args(argv)
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
