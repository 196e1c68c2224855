"""The code of docs/torchrec.md."""

from pathlib import Path

import pytest
from commands import ROOT, python_blocks
from torchrun import run_page

pytestmark = pytest.mark.full


# On 3 ranks one has no table.
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_the_code_of_the_page_runs(ranks: int, tmp_path: Path):
    code = "\n".join(python_blocks((ROOT / "docs/torchrec.md").read_text()))
    # Gloo on any machine.
    code = code.replace("torch.cuda.is_available()", "False")
    printed = run_page(code, ranks, tmp_path)
    assert printed.count("[0.05]") == min(ranks, 2)
    assert printed.count("[]") == max(ranks - 2, 0)
    assert printed.count("['guess.weight', 'guess.bias']") == ranks
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == ["checkpoint"]
