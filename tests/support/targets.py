"""Which backends run on which devices here, and so which cases are collected."""

import os
from dataclasses import dataclass
from functools import cache

import pytest
import torch

CUDA = torch.cuda.is_available()
REQUIRE_GPU = os.environ.get("GPU_EMBED_REQUIRE_GPU") == "1"
if not CUDA:
    # Read when triton is imported, which happens at the first use of its backend.
    os.environ.setdefault("TRITON_INTERPRET", "1")

import cuda_host_backend  # noqa: E402

from gpu_embed import backends  # noqa: E402
from gpu_embed.backends.protocol import Backend  # noqa: E402


@dataclass(frozen=True)
class Target:
    """One backend on one device."""

    backend: str
    device: str
    # Whether the kernels run as the PTX that is compiled for a card.
    ptx: bool = False

    def __str__(self) -> str:
        name = PTX_NAMES[self.backend] if self.ptx else self.backend
        return f"{name}-{self.device}"


# By who makes the PTX: Triton, or NVRTC.
PTX_NAMES = {"triton": "ptx", "cupy": "nvrtc"}


ALL = tuple(Target(name, device) for device in ("cpu", "cuda") for name in backends.BACKENDS)
PTX = tuple(Target(name, "cpu", ptx=True) for name in PTX_NAMES)
# Those on CUDA are collected where there is a card, and where one is required: there they fail without it.
COLLECTED = tuple(one for one in ALL if one.device == "cpu" or CUDA or REQUIRE_GPU)
# What a whole model runs on.
MODELS = tuple(one for one in COLLECTED if str(one) in ("torch-cpu", "triton-cpu", "triton-cuda"))
KERNELS = tuple(one for one in COLLECTED if one.backend in ("triton", "cupy"))


def params(*targets: Target) -> list[object]:
    """Targets as a fixture's parameters: those on CUDA carry the mark gpu, compiled PTX is of the full tier."""
    return [
        pytest.param(
            one,
            id=str(one),
            marks=[pytest.mark.gpu] * (one.device == "cuda") + [pytest.mark.full] * one.ptx,
        )
        for one in targets
    ]


def unusable_reason(target: Target) -> str | None:
    """Why the target cannot run here; None: it can."""
    if target.device == "cuda" and not CUDA:
        return "no CUDA device"
    if target == Target("cupy", "cpu"):
        return cuda_host_backend.unusable_reason()
    backend = stand_in(target) or backends.load(target.backend)
    return backend.unusable_reason(torch.device(target.device))


def stand_in(target: Target) -> Backend | None:
    """What takes the backend's place; None: nothing does."""
    if target == Target("cupy", "cpu"):
        return cuda_host_backend.build()
    return ptx_backend(target.backend) if target.ptx else None


@cache
def ptx_backend(name: str) -> Backend:
    if name == "triton":
        from ptx_backend import CheckedPtxBackend

        return CheckedPtxBackend()
    from gpu_embed.bench.ptx.launch_cupy import PtxCupyBackend

    return PtxCupyBackend()


def require(target: Target) -> None:
    """Skip where the target cannot run; fail where a card is required."""
    reason = unusable_reason(target)
    if reason is None:
        return
    if target.device == "cuda" and REQUIRE_GPU:
        pytest.fail(f"GPU_EMBED_REQUIRE_GPU=1 and {target}: {reason}")
    pytest.skip(reason)


def has_kernels(target: Target) -> bool:
    """Whether the backend launches kernels of ours."""
    return target.backend in ("triton", "cupy")


def takes_mapped_memory(target: Target) -> bool:
    """Mapped memory is the CPU's, and the reference makes copies."""
    return target.device == "cpu" and target.backend != "reference"


def has_method(target: Target, method: str) -> bool:
    """Whether there is a gather or gradient kernel of this name; one method stands for a backend without a choice."""
    return has_kernels(target) or method in ("auto", "sorted")
