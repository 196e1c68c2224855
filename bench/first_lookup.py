"""The first lookup of a process, timed: what `cold_start` runs by this file's path, so that nothing is imported yet.

Arguments: whose lookup (torch, gpu_embed, triton), and a device. Prints the seconds of each phase as JSON.
"""

import json
import sys
import time
from typing import Any


def first_lookup(who: str, device: str) -> list[float]:
    """Seconds of `cold_start.PHASES`."""
    clock = Clock()
    import torch

    clock.lap()
    lookup: Any
    if who == "torch":
        from torch.nn.functional import embedding as lookup
    else:
        import gpu_embed

        lookup = gpu_embed.functional.embedding
    clock.lap()
    if who == "triton":
        from gpu_embed.bench.cold_start import force_triton

        force_triton(torch.device(device))
    clock.begin = time.perf_counter()
    weight = torch.randn(1000, 128, device=device, requires_grad=True)
    ids = torch.randint(1000, (64,), device=device)
    wait = torch.cuda.synchronize if weight.is_cuda else lambda: None
    wait()
    clock.lap()
    output = lookup(ids, weight)
    wait()
    clock.lap()
    output.backward(torch.ones_like(output))
    wait()
    clock.lap()
    return clock.laps


class Clock:
    def __init__(self) -> None:
        self.begin = time.perf_counter()
        self.laps: list[float] = []

    def lap(self) -> None:
        end = time.perf_counter()
        self.laps.append(end - self.begin)
        self.begin = end


if __name__ == "__main__":
    print(json.dumps(first_lookup(*sys.argv[1:])))
