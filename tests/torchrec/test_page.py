"""The code of docs/torchrec.md."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from commands import END_OF_RANK, ROOT, python_blocks

pytestmark = pytest.mark.full


# On 3 ranks one has no table.
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_the_code_of_the_page_runs(ranks: int, tmp_path: Path):
    code = "\n".join(python_blocks((ROOT / "docs/torchrec.md").read_text()))
    # Gloo on any machine.
    code = code.replace("torch.cuda.is_available()", "False")
    (tmp_path / "page.py").write_text(f"{code}\n{END_OF_RANK}\n")
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    done = subprocess.run(
        [sys.executable, *launch, "page.py"],
        cwd=tmp_path,
        env={"OMP_NUM_THREADS": "1", **os.environ},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    # The ranks write into one pipe, and may do so into one line.
    assert done.stdout.count("[0.05]") == min(ranks, 2)
    assert done.stdout.count("[]") == max(ranks - 2, 0)
    assert done.stdout.count("['guess.weight', 'guess.bias']") == ranks
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == ["checkpoint"]
