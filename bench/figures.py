"""The figures of the README's picture: which cells, modes and providers, in turns, within twenty minutes on a CPU."""

from __future__ import annotations

import torch

from .run import Choice, Job, plan
from .shapes import STEPS

# Of each time, at the least.
TURNS = 7
CHOICES = (
    Choice(["L"], ("gpu_embed-in-place", "gpu_embed", "torch")),
    Choice(
        ["J"],
        ("gpu_embed-in-backward", "torch-sparse"),
        tuple(STEPS),
        {"distribution": ["spread:8192"]},
    ),
    Choice(["M"], ("gpu_embed", "torch-together")),
)


def figures_jobs(device: torch.device) -> list[Job]:
    return [job for choice in CHOICES for job in plan(choice, device)]
