"""Launch settings and rules of method by device."""

from typing import Generic, TypeVar

import torch

from ... import settings
from . import tuned

T = TypeVar("T")


class InForce(dict[torch.device, T], Generic[T]):
    """One part of a backend's settings as it is in force on each device, found when the device is first asked for.

    From then on a launch pays for one look-up in a dict, in every thread: no call, no lock.
    """

    def __init__(self, backend: str, part: str, defaults: T) -> None:
        self.backend = backend
        self.part = part
        self.defaults = defaults
        tuned.on_forget.append(self.clear)

    def __missing__(self, device: torch.device) -> T:
        before = settings.generation
        found: T = tuned.settings_for(device, self.backend, self.part, self.defaults)
        # Not what another thread has changed meanwhile, or is changing.
        with settings.assigning:
            if settings.generation == before:
                self[device] = found
        return found
