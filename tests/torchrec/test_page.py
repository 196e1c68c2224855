"""The code of docs/torchrec.md."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from commands import ROOT, python_blocks

pytestmark = pytest.mark.full


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_code_of_the_page_runs(ranks: int, tmp_path: Path):
    code = "\n".join(python_blocks((ROOT / "docs/torchrec.md").read_text()))
    # Gloo on any machine.
    code = code.replace("torch.cuda.is_available()", "False")
    (tmp_path / "page.py").write_text(f"{code}\ndist.destroy_process_group()\n")
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
    assert done.stdout.splitlines() == ["0.05"] * ranks
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == ["checkpoint"]
