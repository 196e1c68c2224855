"""The cards of this machine; a test puts others in their place."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterable, Iterator
from typing import Any

import torch

from .. import backends
from ..backends._plan import tuned
from ..backends._plan.tuned import Card
from .clock import Clock, CudaClock
from .offline import Job, Usage, compile_all

KERNEL_BACKENDS = ("triton", "cupy")


class Machine:
    """What the tuner asks of a machine."""

    def devices(self) -> list[torch.device]:
        return [torch.device("cuda", index) for index in range(torch.cuda.device_count())]

    def card(self, device: torch.device) -> Card:
        found = tuned.card_of(device)
        assert found is not None
        return found

    def clock(self, device: torch.device) -> Clock:
        return CudaClock(device)

    def backends(self, device: torch.device) -> list[Any]:
        """The backends with kernels that can serve the device."""
        found = map(backends.load, KERNEL_BACKENDS)
        return [one for one in found if one.unusable_reason(device) is None]

    def others(self, device: torch.device) -> list[str]:
        """Other processes on the card, as far as nvidia-smi tells."""
        uuid = str(torch.cuda.get_device_properties(device).uuid)
        command = ("nvidia-smi", "--query-compute-apps=gpu_uuid,pid,name", "--format=csv,noheader")
        try:
            said = subprocess.run(command, capture_output=True, text=True, timeout=10).stdout
        except (OSError, subprocess.SubprocessError):
            return []
        found = [line.split(", ") for line in said.splitlines() if line.count(", ") >= 2]
        return [
            f"{name} (pid {pid})"
            for gpu, pid, name, *_ in found
            if uuid in gpu and pid != str(os.getpid())
        ]

    def compile(
        self, jobs: Iterable[Job], architecture: int, processes: int
    ) -> Iterator[tuple[Job, Usage]]:
        return compile_all(jobs, architecture, processes)
