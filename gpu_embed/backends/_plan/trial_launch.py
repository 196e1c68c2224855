"""Whether a kernel runs on a CUDA device at all."""

import logging
from typing import Any

import torch

from ...own_thread import on_own_thread

logger = logging.getLogger("gpu_embed")


class TrialLaunch:
    """A backend's smallest lookup, tried once a device."""

    def __init__(self, backend: Any) -> None:
        self._backend = backend
        self._failures: dict[int, str | None] = {}  # by the device's index

    def failure(self, device: torch.device) -> str | None:
        """Why no kernel runs on this device, though all that it needs is there; None: one has run.

        A C compiler, the driver's library or a folder for the cache may be missing, or the compiler too old for
        the card: only a launch tells.
        """
        index = torch.cuda.current_device() if device.index is None else device.index
        if index not in self._failures:
            if torch.cuda.is_current_stream_capturing():
                return None  # A graph would capture it; ask again later.
            try:
                on_own_thread(self.run, torch.device("cuda", index))
                reason = None
            except torch.OutOfMemoryError:
                return None  # The card is full for now; the lookup itself will say so.
            except Exception as error:
                reason = f"{self._backend.name} cannot launch a kernel here: {_first_line(error)}"
                logger.warning("gpu_embed: %s", reason)
            self._failures[index] = reason
        return self._failures[index]

    def run(self, device: torch.device) -> None:
        with torch.cuda.device(device):
            weight = torch.ones(1, 4, device=device)
            ids = torch.zeros(1, dtype=torch.int64, device=device)
            if not torch.equal(self._backend.embedding(weight, ids, -1, None), weight):
                raise RuntimeError("the kernel ran and returned wrong values")


def no_cuda_device() -> str:
    """Why torch finds no CUDA device, as far as it says."""
    if torch.version.cuda is None:
        return "this torch is built without CUDA"
    try:
        torch.cuda.init()
    except Exception as error:
        return f"torch finds no CUDA device: {_first_line(error)}"
    return "torch finds no CUDA device"


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
