"""Launch settings and limits of methods by device."""

from typing import Generic, TypeVar

import torch

T = TypeVar("T")


class InForce(dict[torch.device, T], Generic[T]):
    """What is in force on each device, found when the device is first asked for.

    From then on a launch pays for one look-up in a dict: no call, no lock.
    """

    def __init__(self, defaults: T) -> None:
        self.defaults = defaults

    def __missing__(self, device: torch.device) -> T:
        self[device] = self.defaults
        return self.defaults
