#!/usr/bin/env bash
# Triton 3.7.1 (for sm_90, and its interpreter; no GPU needed): a kernel's literal -0.0 becomes +0.0.
#
# Expected: tl.full([32], -0.0, tl.float32) is 32 negative zeros: x + -0.0 is x for every x, while -0.0 + 0.0 is 0.0, so
# it is the one neutral element of a sum.
# Seen: the compiled kernel's constant is 0.000000e+00, and the interpreter stores positive zeros too. A sum that begins
# with it loses the sign of a zero, and no test in the interpreter shows a difference.
#
# Exits 0 while that is so, 1 once it has changed. Needs python3 with venv and its headers, a C compiler, and a package
# index.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/python" -m pip install --quiet torch==2.13.0 numpy==2.4.6 triton==3.7.1
cd "$folder"
export TRITON_CACHE_DIR=$folder/cache
cat >kernel.py <<'PYTHON'
import sys

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource


@triton.jit
def store(out_ptr):
    tl.store(out_ptr + tl.arange(0, 32), tl.full([32], -0.0, tl.float32))


if sys.argv[1] == "interpret":
    out = torch.ones(32)
    store[(1,)](out)
    print("negative" if torch.signbit(out).all() else "positive")
else:
    binary = triton.compile(ASTSource(store, {"out_ptr": "*fp32"}), target=GPUTarget("cuda", 90, 32))
    constants = [line for line in binary.asm["ttir"].splitlines() if "xf32>" in line and "arith.constant" in line]
    print("negative" if any("-0." in line for line in constants) else "positive")
PYTHON
interpreted=$(TRITON_INTERPRET=1 "$folder/env/bin/python" kernel.py interpret)
compiled=$("$folder/env/bin/python" kernel.py compile)
echo "interpreted: $interpreted, compiled: $compiled"
[ "$interpreted" = positive ] && [ "$compiled" = positive ]
