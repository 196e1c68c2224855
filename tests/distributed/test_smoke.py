"""Sharded lookups and their gradients on two processes, in the default tier."""

import pytest
from sharded_cases import lookup_equals_whole, table_equals_whole


def test_a_table_by_rows_on_two_ranks(two):
    two.run(lookup_equals_whole, (2,), (11, 6), "0", "0", {"padding_idx": -1})


@pytest.mark.parametrize("rows", ["blocks", "round_robin"])
def test_a_table_with_an_all_to_all(two, rows):
    two.run(table_equals_whole, rows, True, {"padding_idx": 3}, (5, 3))
