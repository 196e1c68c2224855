"""One sharded lookup and its gradient on two processes, in the default tier."""

from sharded_cases import lookup_equals_whole


def test_a_table_by_rows_on_two_ranks(two):
    two.run(lookup_equals_whole, (2,), (11, 6), "0", "0", {"padding_idx": -1})
