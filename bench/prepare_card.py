"""Compiles kernels into Triton's cache for a machine whose Python is another: `prepare_card.sh` calls it.

The key of a binary in the cache has neither a path nor a machine in it, but a sum over Triton's own files, and those
of another Python differ. So that sum is taken over the other Python's Triton, unpacked in a folder.
"""

from __future__ import annotations

import runpy
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from gpu_embed._self_check import SAMPLES

from .codegen.cases import CASES, Case
from .codegen.compile import CompilingBackend, record_launches
from .shapes import DTYPES, SETS

# Those whose cells `on_card.sh` measures.
MEASURED = ("A", "E", "F")


def use_key_of(folder: Path) -> None:
    """Binaries get the names that the Triton of this folder, an unpacked wheel, gives them."""
    from triton.runtime import cache

    path = folder / "triton/runtime/cache.py"
    # The sum is taken over the files around the one that the function stands in.
    others = runpy.run_path(str(path), run_name="triton.runtime.of_another_python")
    key = others["triton_key"]()
    cache.triton_key = lambda: key


def compile_launches(architecture: int) -> tuple[int, dict[str, str]]:
    """Compile what the self-check, the cases of `codegen` and the measured shapes launch.

    Returns how many launches there were, and which cases raised, with what.
    """
    backend = CompilingBackend(architecture)
    for sample in SAMPLES.values():
        sample(backend, torch.device("cpu"))
    launches, failures = record_launches((*CASES, *measured_cases()))
    for launch in launches:
        if launch.architecture <= architecture:
            try:
                launch.kernel.warmup(*launch.args, grid=launch.grid, **launch.settings)
            except Exception as error:  # whatever it is, the other cases go on
                failures[launch.case] = f"{type(error).__name__}: {error}"
    return backend.launches + len(launches), failures


def measured_cases() -> Iterator[Case]:
    """Lookups and gradients of the measured shapes, each once."""
    cells = {
        (cell.dim, cell.dtype, cell.num_ids, cell.vocab)
        for name in MEASURED
        for cell in SETS[name].cells
    }
    for dim, name, num_ids, vocab in sorted(cells):
        dtype = DTYPES[name]
        yield Case("embedding", dim, dtype, num_ids, vocab, record=True)
        for method in ("atomic", "sorted") if dtype.itemsize >= 4 else ("sorted",):
            yield Case(method, dim, dtype, num_ids, vocab)


def main(argv: Sequence[str]) -> int:
    if len(argv) not in (1, 2):
        print("usage: python -m gpu_embed.bench.prepare_card UNPACKED_TRITON [SM]", file=sys.stderr)
        return 2
    use_key_of(Path(argv[0]))
    launches, failures = compile_launches(int(argv[1]) if len(argv) > 1 else 90)
    for case, problem in failures.items():
        print(f"{case} does not compile: {problem}", file=sys.stderr)
    print(f"{launches} launches compiled")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
