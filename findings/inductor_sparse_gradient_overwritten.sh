#!/usr/bin/env bash
# torch 2.13.0 (CPU): torch.compile writes other numbers over the gradient of a torch.nn.Embedding with sparse=True.
#
# Two such tables in one compiled function, the second one's rows added behind two matrix products of the first one's.
# Expected: the gradients of eager mode, and of backend="aot_eager".
# Seen: Inductor takes the values of a sparse gradient for free memory as soon as the sparse tensor is made of them, and a
# later result of the backward is written there. The second table gets the first one's gradient, 57024 in place of 1232.
# No error, no warning.
#
# Exits 0 while that is so, 1 once it has changed. Needs python3 with venv, g++, and a package index.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/python" -m pip install --quiet torch==2.13.0 numpy==2.4.6
cd "$folder"
TORCHINDUCTOR_CACHE_DIR="$folder/inductor" "$folder/env/bin/python" - <<'PYTHON'
import torch

swapped = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
ids = torch.tensor([0, 1])


def gradients(backend):
    """Each table's gradient in its first two rows, which are equal."""
    first, second = (torch.nn.Embedding(2, 2, sparse=True) for _ in range(2))
    for table in (first, second):
        torch.nn.init.ones_(table.weight)

    def loss(ids):
        hidden = ((first(ids) * 3) @ swapped).square()
        hidden = (hidden @ swapped).square() @ swapped
        return ((hidden + 7 * second(ids)) @ swapped).square().sum()

    torch.compile(loss, backend=backend)(ids).backward()
    return [table.weight.grad.to_dense().tolist() for table in (first, second)]


seen = {backend: gradients(backend) for backend in ("eager", "aot_eager", "inductor")}
for backend, both in seen.items():
    print(f"{backend}: {both}")
right = [[[57024.0] * 2] * 2, [[1232.0] * 2] * 2]
wrong = [[[57024.0] * 2] * 2] * 2
raise SystemExit(list(seen.values()) != [right, right, wrong])
PYTHON
