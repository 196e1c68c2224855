"""Who computes: four backends behind one protocol, and the choice between them.

To add one: a module here with a class that fits `protocol.Backend`, and its line in BACKENDS (and its name among the
choices of `gpu_embed.settings.BACKEND`).
"""

import importlib
import logging
from functools import cache

import torch

from ..settings import BACKEND, Restore
from .protocol import Backend as Backend

logger = logging.getLogger("gpu_embed")


# In the order of preference on a CUDA device.
BACKENDS = {
    "triton": "_triton.TritonBackend",
    "cupy": "_cupy.CupyBackend",
    "torch": "_torch.TorchBackend",
    "reference": "_reference.ReferenceBackend",
}


@cache
def load(name: str) -> Backend:
    """The backend of that name; its libraries are imported only once it is asked to work."""
    module, class_name = BACKENDS[name].split(".")
    backend: Backend = getattr(importlib.import_module(f".{module}", __name__), class_name)()
    return backend


def select(device: torch.device) -> Backend:
    """The backend that serves this device: the forced one, or the first usable.

    Raises RuntimeError if the forced one cannot run there.
    """
    # The name is part of the key: another thread may change the choice while this one is at it.
    choice = (BACKEND.value, device)
    backend = _selected.get(choice)
    if backend is None:
        backend = _select(*choice)
        # Nothing was tried if a graph is being captured, so the choice is made anew after it.
        if not (torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()):
            _selected[choice] = backend
    return backend


def _select(forced: str, device: torch.device) -> Backend:
    if forced != "auto":
        backend = load(forced)
        reason = backend.unusable_reason(device)
        if reason is not None:
            raise RuntimeError(
                f"gpu_embed: the backend {forced!r} is forced but cannot serve {device}: {reason}. "
                "Choose another with gpu_embed.use_backend() or GPU_EMBED_BACKEND; 'auto' picks one "
                "that can."
            )
        return backend
    if device.type == "cuda":
        for name in ("triton", "cupy"):
            if load(name).unusable_reason(device) is None:
                return load(name)
        logger.warning("gpu_embed: %s", explain(device))
    return load("torch")


def use_backend(name: str) -> Restore:
    """Force a backend: "triton", "cupy", "torch" or "reference"; "auto" gives the choice back.

    A plain call holds for the process (all threads); in a `with` statement it holds until the block ends.
    A forced backend that cannot run raises RuntimeError at the first lookup. Raises ValueError for an
    unknown name.
    """
    return BACKEND.set(name, "use_backend")


def available_backends(device: torch.device | str | None = None) -> dict[str, str]:
    """For each backend, "usable" or the reason why not.

    Args:
        device: where the table lies; None: the current CUDA device if there is one, else the CPU.
    """
    place = _device(device)
    return {name: load(name).unusable_reason(place) or "usable" for name in BACKENDS}


def explain(device: torch.device | str | None = None) -> str:
    """One sentence: which backend serves this device, and why not the ones before it."""
    place = _device(device)
    forced = BACKEND.value
    if forced != "auto":
        reason = load(forced).unusable_reason(place)
        if reason is not None:
            return f"{forced} is forced but cannot serve {place}: {reason}"
        return f"{forced} serves {place}: forced by use_backend() or GPU_EMBED_BACKEND"
    if place.type != "cuda":
        return f"torch serves {place}: the kernels are for CUDA devices"
    reasons: list[str] = []
    for name in ("triton", "cupy"):
        reason = load(name).unusable_reason(place)
        if reason is None:
            because = "; ".join(reasons) or "the first choice"
            return f"{name} serves {place}: {because}"
        reasons.append(f"{name}: {reason}")
    return f"torch serves {place} as the last resort; {'; '.join(reasons)}"


def _device(device: torch.device | str | None) -> torch.device:
    if device is not None:
        return torch.device(device)
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


_selected: dict[tuple[str, torch.device], Backend] = {}
BACKEND.on_change = _selected.clear
