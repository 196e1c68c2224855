#!/usr/bin/env bash
# torch 2.13.0 (x86-64 CPU): sums of bags in bf16 round a tie upwards, unlike the rest of torch.
#
# Expected: the sum is taken in fp32 and rounded to the nearest bf16, ties to even, as .to(torch.bfloat16) rounds it.
# Seen: embedding_bag gives 258 for 257 ones, 362 for 361: each is halfway between two numbers in bf16, of which the even
# one is 256 and 360. In fp16, and by a sum of the rows in fp32 that is then rounded, ties go to even.
#
# Exits 0 while that is so, 1 once it has changed. Needs an x86-64 machine, python3 with venv, and a package index.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/python" -m pip install --quiet torch==2.13.0 numpy==2.4.6
cd "$folder"
"$folder/env/bin/python" - <<'PYTHON'
import torch


def sums(number, dtype):
    """The sum of a bag of so many ones, and the same in fp32, rounded."""
    table = torch.ones(1, 2, dtype=dtype)
    ids = torch.zeros(1, number, dtype=torch.int64)
    bag = torch.nn.functional.embedding_bag(ids, table, mode="sum")[0, 0].item()
    return bag, table[ids].float().sum(1).to(dtype)[0, 0].item()


seen = {
    "257 in bf16": sums(257, torch.bfloat16),
    "361 in bf16": sums(361, torch.bfloat16),
    "2049 in fp16": sums(2049, torch.float16),
}
for name, (bag, rounded) in seen.items():
    print(f"{name}: embedding_bag {bag:.0f}, rows in fp32 {rounded:.0f}")
raise SystemExit(list(seen.values()) != [(258.0, 256.0), (362.0, 360.0), (2048.0, 2048.0)])
PYTHON
