"""Faults put into the kernels one at a time: the default tier of tests must catch each.

    python tests/support/mutations.py [NAME...]

copies the tree to a temporary folder, puts one fault into the copy, runs the tests that are said to catch it, and
says which one did. Exits with 1 if a fault survives. No GPU is needed.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
NOT_COPIED = shutil.ignore_patterns(".*", "build", "*.egg-info", "__pycache__", "results", "ptx")
FAILED = re.compile(r"^(?:FAILED|ERROR) (tests/\S+?::.*?)(?: - .*)?$", re.MULTILINE)


class Mutation(NamedTuple):
    """One fault."""

    name: str
    file: str
    # Occurs once in the file.
    old: str
    new: str
    # Files of the default tier, of which the target that has the fault runs.
    tests: tuple[str, ...]
    target: str

    def apply(self, root: Path) -> None:
        path = root / self.file
        path.write_text(path.read_text().replace(self.old, self.new))


GATHER = ("tests/api/test_forward.py",)
GRADIENT = ("tests/api/test_gradient.py",)
IN_PLACE = ("tests/backends/test_in_place.py",)
BAG = ("tests/api/test_bag.py",)
SHARD = ("tests/backends/test_shard.py",)
OPTIM = ("tests/backends/test_row_update.py",)

MUTATIONS = (
    Mutation(
        "a column's stride ignored in Triton's gather",
        "kernels/gather.py",
        "+ d.to(tl.int64) * col_stride",
        "+ d.to(tl.int64)",
        GATHER,
        "triton-cpu",
    ),
    Mutation(
        "Triton's bound of the ids one too high",
        "kernels/gather.py",
        ".to(tl.uint64) < num_embeddings",
        ".to(tl.uint64) <= num_embeddings",
        ("tests/api/test_bounds.py",),
        "triton-cpu",
    ),
    Mutation(
        "ids of other shards counted as bad in Triton's gather",
        "kernels/gather.py",
        "in_table = index.to(tl.uint64) < table_rows",
        "pass",
        SHARD,
        "triton-cpu",
    ),
    Mutation(
        "a neighbour's row scaled by Triton's max_norm",
        "kernels/renorm.py",
        " & (key < num_embeddings)",
        "",
        ("tests/kernels/test_shards.py",),
        "triton-cpu",
    ),
    Mutation(
        "Triton's atomic gradient doubled",
        "kernels/scatter_add.py",
        "            grads[step],\n",
        "            grads[step] * 2,\n",
        GRADIENT,
        "triton-cpu",
    ),
    Mutation(
        "Triton's sums stored where they should be added",
        "kernels/segment_walk.py",
        "(row.to(total.dtype) + total).to(row.dtype)",
        "total.to(row.dtype)",
        IN_PLACE,
        "triton-cpu",
    ),
    Mutation(
        "the columns of a gradient in place side by side in Triton's atomics",
        "kernels/scatter_add.py",
        "d.to(tl.int64) * grad_weight_col_stride",
        "d.to(tl.int64)",
        IN_PLACE,
        "triton-cpu",
    ),
    Mutation(
        "the grid of Triton's atomic gradient one short",
        "gpu_embed/backends/_triton/gradient.py",
        "(cdiv(num_vectors, launch.BLOCK),)",
        "(max(cdiv(num_vectors, launch.BLOCK) - 1, 1),)",
        GRADIENT,
        "triton-cpu",
    ),
    Mutation(
        "Triton's sorted gradient summed in the dtype of the gradient",
        "kernels/segment_walk.py",
        "                total += row_of(sums, u)\n",
        "                total = (total + row_of(sums, u)).to(values_ptr.dtype.element_ty).to(acc_dtype)\n",
        GRADIENT,
        "triton-cpu",
    ),
    Mutation(
        "the last maximum in place of the first in Triton's bags",
        "kernels/bag.py",
        "(value > largest)",
        "(value >= largest)",
        BAG,
        "triton-cpu",
    ),
    Mutation(
        "a column's stride ignored in CUDA C++'s gather",
        "kernels/gather.cu",
        "+ d[u] * weight_col_stride]",
        "+ d[u]]",
        GATHER,
        "cupy-cpu",
    ),
    Mutation(
        "padding ignored in CUDA C++'s atomic gradient",
        "kernels/scatter_add.cu",
        "index == padding_idx ? -1 : local_row",
        "local_row",
        GRADIENT,
        "cupy-cpu",
    ),
    Mutation(
        "CUDA C++'s sorted gradient doubled",
        "kernels/segment_sum.cu",
        "total.lane[i] / (Acc)count : total.lane[i];",
        "total.lane[i] / (Acc)count : 2 * total.lane[i];",
        GRADIENT,
        "cupy-cpu",
    ),
    Mutation(
        "the carry-out lost at the end of CUDA C++'s chunks",
        "kernels/segment_walk.cuh",
        "  store_carry(carried ? 2 * chunk : 2 * chunk + 1, key, total, count);",
        "  set_zero(total);\n  store_carry(carried ? 2 * chunk : 2 * chunk + 1, key, total, count);",
        GRADIENT,
        "cupy-cpu",
    ),
    Mutation(
        "the mean of CUDA C++'s bags over one id too many",
        "kernels/bag.cu",
        "narrow(MEAN ? total.lane[i] / (Acc)(size > 0 ? size : 1)",
        "narrow(MEAN ? total.lane[i] / (Acc)(size > 0 ? size + 1 : 1)",
        BAG,
        "cupy-cpu",
    ),
    Mutation(
        "Adagrad without eps in CUDA C++",
        "kernels/update.cuh",
        "(g.lane[i] / ((Acc)sqrt(sum.lane[i]) + eps))",
        "(g.lane[i] / (Acc)sqrt(sum.lane[i]))",
        OPTIM,
        "cupy-cpu",
    ),
)


def killer(mutation: Mutation, folder: Path) -> str | None:
    """The test that fails on a copy of the tree with the fault; None: all pass.

    Raises:
        RuntimeError: the tests could not be run.
    """
    copy = folder / "tree"
    shutil.copytree(ROOT, copy, ignore=NOT_COPIED, symlinks=True)
    # An installed package would find these folders where it was installed from.
    for name in ("kernels", "bench"):
        if not (copy / "gpu_embed" / name).exists():
            (copy / "gpu_embed" / name).symlink_to(copy / name)
    mutation.apply(copy)
    # What is compiled goes with the folder.
    env = {**os.environ, "PYTHONPATH": str(copy), "TMPDIR": str(folder), "OMP_NUM_THREADS": "1"}
    pytest = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"]
    ran = subprocess.run(
        [*pytest, "-k", mutation.target, *mutation.tests],
        cwd=copy,
        env=env,
        capture_output=True,
        text=True,
    )
    if ran.returncode == 0:
        return None
    failed = FAILED.search(ran.stdout)
    if ran.returncode != 1 or failed is None:
        raise RuntimeError(f"{mutation.name}: {ran.stdout[-2000:]}{ran.stderr[-2000:]}")
    return failed[1]


def main(args: list[str] | None = None) -> int:
    names = [mutation.name for mutation in MUTATIONS]
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="one of: " + "; ".join(names))
    wanted = parser.parse_args(args).names
    if unknown := set(wanted) - set(names):
        parser.error(f"no such mutation: {sorted(unknown)}")
    survived = 0
    for number, mutation in enumerate(MUTATIONS, 1):
        if wanted and mutation.name not in wanted:
            continue
        begin = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            test = killer(mutation, Path(folder))
        survived += test is None
        outcome = "SURVIVED" if test is None else f"caught by {test}"
        seconds = time.monotonic() - begin
        print(f"{number}/{len(MUTATIONS)} {mutation.name}: {outcome} ({seconds:.0f} s)", flush=True)
    return survived > 0


if __name__ == "__main__":
    sys.exit(main())
