"""Sharded tables on the Triton kernels, in Triton's interpreter on each rank."""

import importlib.util

import pytest
import torch
from sharded_cases import bag_equals_whole, lookup_equals_whole, renorm_equals_whole

import gpu_embed

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed"
)
ROWS, COLUMNS = "0", "1"
# Each occurs 1, 2 or 4 times: the kernels multiply by one over the count.
IDS = torch.tensor([[10, 0, 5, 0], [7, 10, 0, 0]])
CASES = {
    "lookup by rows": (
        lookup_equals_whole,
        *((11, 6), ROWS, "0", {"padding_idx": -1, "scale_grad_by_freq": True}, IDS),
    ),
    "lookup by columns in bf16": (
        lookup_equals_whole,
        *((11, 6), COLUMNS, "r", {"padding_idx": 2}, None, torch.bfloat16),
    ),
    "weighted sums": (
        bag_equals_whole,
        *((11, 6), ROWS, "r", "last offset", "sum", {"padding_idx": 1}, True),
    ),
    "means": (bag_equals_whole, (11, 6), ROWS, "0", "rows", "mean", {"padding_idx": -1}),
    "maxima": (bag_equals_whole, (3, 6), ROWS, "r", "offsets", "max", {"padding_idx": 1}),
    "max_norm": (renorm_equals_whole, ROWS, "0", None),
}


def on_triton(case, *arguments):
    with gpu_embed.use_backend("triton"):
        case((2,), *arguments)


@pytest.mark.parametrize("case", CASES)
def test_on_two_ranks(two, case):
    two.run(on_triton, *CASES[case])
