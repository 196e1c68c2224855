"""The columns of the per-table array that kernels read, written down in Python, Triton and CUDA C++."""

import re
from importlib.resources import files

from gpu_embed.tables.layout import MODES, TableColumn

KERNELS = files("gpu_embed.kernels")


def test_the_three_copies_of_the_columns_agree():
    triton = (KERNELS / "table_columns.py").read_text(encoding="utf-8")
    constants = dict(re.findall(r"^([A-Z_]+) = tl\.constexpr\((\d+)\)", triton, re.MULTILINE))
    assert {name: int(constants[name]) for name in TableColumn.__members__} == dict(
        TableColumn.__members__
    )
    assert int(constants["NUM_TABLE_COLUMNS"]) == len(TableColumn)
    cuda = (KERNELS / "tables_walk.cuh").read_text(encoding="utf-8")
    (struct,) = re.findall(r"struct Table \{(.*?)\};", cuda, re.DOTALL)
    members = re.findall(r"^ *int64 (\w+);", struct, re.MULTILINE)
    assert [name.upper() for name in members] == [column.name for column in TableColumn]
    for mode in ("mean", "max"):
        number = MODES.index(mode)
        assert int(constants[f"{mode.upper()}_MODE"]) == number
        assert f"{mode.upper()}_MODE = {number}" in cuda
