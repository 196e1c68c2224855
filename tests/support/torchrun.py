"""The code of a page, run as torchrun runs a script."""

import os
import subprocess
import sys
from pathlib import Path

# At once: a thread of gloo that holds a tensor while Python ends would abort the process.
END_OF_RANK = "import os, sys; sys.stdout.flush(); os._exit(0)"


def run_page(code: str, ranks: int, folder: Path) -> str:
    """What all ranks print, which write into one pipe, and may do so into one line."""
    (folder / "page.py").write_text(f"{code}\n{END_OF_RANK}\n")
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    done = subprocess.run(
        [sys.executable, *launch, "page.py"],
        cwd=folder,
        env={"OMP_NUM_THREADS": "1", **os.environ},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
