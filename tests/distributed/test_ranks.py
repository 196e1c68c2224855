"""The groups of processes that the tests of this folder run in."""

import os
import re
import time

import pytest
import torch
import torch.distributed as dist


def rank_sum():
    ranks = torch.tensor(dist.get_rank())
    dist.all_reduce(ranks)
    return ranks.item()


def one_raises():
    if dist.get_rank() == 1:
        raise ValueError("no such row")
    dist.barrier()


def one_ends():
    if dist.get_rank() == 1:
        os._exit(7)
    dist.barrier()


def one_hangs():
    if dist.get_rank() == 1:
        time.sleep(100)


@pytest.mark.parametrize(
    ("case", "limit", "said"),
    [
        (
            one_raises,
            30,
            ["rank 0 of 2: no answer .*in one_raises", "rank 1 .*ValueError: no such row"],
        ),
        (one_ends, 30, ["rank 1 of 2: ended with exit code 7"]),
        (one_hangs, 1, ["rank 0 of 2: passed", "rank 1 of 2: no answer .*in one_hangs"]),
    ],
)
def test_a_rank_that_fails_fails_the_case_and_not_the_next(two, case, limit, said):
    with pytest.raises(AssertionError) as error:
        two.run(case, limit=limit)
    for line in said:
        assert re.search(line, str(error.value), re.DOTALL), error.value
    assert two.run(rank_sum) == [1, 1]
