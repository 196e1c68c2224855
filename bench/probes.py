"""Questions that only a card answers, each a process of its own: python -m gpu_embed.bench.probes NAME.

`on_card.sh` asks them first. The exit code is 1 where the answer is wrong; what was seen is printed.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import threading
from collections.abc import Callable, Sequence

import torch

import gpu_embed

DEVICE = "cuda"


class WrongAnswerError(Exception):
    """What the card did in place of what it should do."""


def self_check() -> None:
    """Triton and torch compute as the reference does; CuPy too, where it is installed."""
    from gpu_embed._self_check import check_device

    checks = check_device(torch.device(DEVICE))
    for check in checks:
        print(f"{check.backend}: {check.status} in {check.milliseconds:,} ms. {check.detail}")
    status = {check.backend: check.status for check in checks}
    wrong = [name for name, found in status.items() if found in ("wrong", "failed")]
    wrong += [name for name in ("triton", "torch") if status[name] == "not usable"]
    if wrong:
        raise WrongAnswerError(f"not as the reference: {', '.join(dict.fromkeys(wrong))}")


def first_lookup_in_a_graph() -> None:
    """The first lookup of a process may be one of `torch.compile(mode="reduce-overhead")`."""
    layer = gpu_embed.Embedding(100, 16, device=DEVICE)
    run = torch.compile(lambda ids: layer(ids).sum(), mode="reduce-overhead")
    ids = torch.arange(8, device=DEVICE)
    for _ in range(4):
        layer.weight.grad = None
        run(ids).backward()
    expected = torch.zeros_like(layer.weight)
    expected[:8] = 1
    expect(layer.weight.grad is not None and torch.equal(layer.weight.grad, expected), True)


def no_compiler() -> None:
    """Without a C compiler Triton cannot launch: another backend serves, and the log says why."""
    with tempfile.TemporaryDirectory() as empty:
        os.environ |= {"CC": "/nonexistent", "PATH": empty, "TRITON_CACHE_DIR": empty}
        layer = gpu_embed.Embedding(10, 4, device=DEVICE)
        found = layer(torch.tensor([3], device=DEVICE))
        print(gpu_embed.backends.explain(torch.device(DEVICE)))
        expect(torch.equal(found[0], layer.weight[3]), True)


def bad_ids() -> None:
    """A bad id is an IndexError in whichever thread asks, and the card computes on."""
    layer = gpu_embed.Embedding(10, 4, device=DEVICE)
    errors: dict[str, str] = {}

    def look_up() -> None:
        try:
            layer(torch.tensor([1, 10], device=DEVICE))
            gpu_embed.check_bounds()
        except IndexError as error:
            errors[threading.current_thread().name] = str(error)

    look_up()
    other = threading.Thread(target=look_up, name="other")
    other.start()
    other.join()
    print(errors)
    expect(sorted(errors), sorted(["other", threading.main_thread().name]))
    good = layer(torch.tensor([1], device=DEVICE))
    expect(torch.equal(good[0], layer.weight[1]), True)


def launches() -> None:
    """Every kernel of a bf16 backward of a language model, with the GPU's time of each."""
    from torch.profiler import ProfilerActivity, profile

    layer = gpu_embed.Embedding(128_256, 4096, device=DEVICE, dtype=torch.bfloat16)
    ids = torch.randint(128_256, (8192,), device=DEVICE)
    for _ in range(3):
        layer(ids).sum().backward()
        layer.weight.grad = None
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        layer(ids).sum().backward()
        torch.cuda.synchronize()
    print(seen.key_averages().table(sort_by="cuda_time_total", row_limit=30))


def kernels() -> None:
    """One launch of each kernel that a profiler is asked about."""
    rows = torch.randn(100_000, 50, device=DEVICE, requires_grad=True)
    ids = torch.randint(100_000, (65_536,), device=DEVICE)
    bag = torch.arange(0, 65_536, 16, device=DEVICE)
    with gpu_embed.use_gradient_method("sorted"):
        gpu_embed.functional.embedding(ids, rows).sum().backward()
        gpu_embed.functional.embedding_bag(ids, rows, bag, mode="sum").sum().backward()


def expect(found: object, right: object) -> None:
    if found != right:
        raise WrongAnswerError(f"expected {right}, found {found}")


PROBES: dict[str, Callable[[], None]] = {
    probe.__name__.replace("_", "-"): probe
    for probe in (self_check, first_lookup_in_a_graph, no_compiler, bad_ids, launches, kernels)
}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m gpu_embed.bench.probes", description=__doc__)
    said = "; ".join(f"{name}: {probe.__doc__}" for name, probe in PROBES.items())
    parser.add_argument("probe", choices=PROBES, help=said)
    probe = PROBES[parser.parse_args(argv).probe]
    if not torch.cuda.is_available():
        print("no CUDA device", file=sys.stderr)
        return 1
    try:
        probe()
        torch.cuda.synchronize()
    except WrongAnswerError as wrong:
        print(f"WRONG: {wrong}", file=sys.stderr)
        return 1
    print("as it should be")
    return 0


if __name__ == "__main__":
    sys.exit(main())
