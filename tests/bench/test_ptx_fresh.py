"""Memory that an operation allocates: what was not written may neither be read nor returned."""

import ctypes
import threading

import pytest
import torch

from gpu_embed.bench.ptx.fresh import watched, written
from gpu_embed.bench.ptx.memory import GARBAGE
from gpu_embed.bench.ptx.parse import PtxError

NUMBERS = torch.arange(6.0).view(2, 3)


def in_parts():
    fresh = NUMBERS.new_empty(2, 3)
    fresh.view(6)[:2] = 1
    fresh.t()[2] = 2
    fresh[1, :2].copy_(torch.tensor([3.0, 4.0]))
    return fresh


def by_out():
    return torch.add(NUMBERS, 1, out=torch.empty_like(NUMBERS))


def never_read():
    fresh = torch.empty(4, dtype=torch.int16, device="cpu")
    return fresh.new_zeros(3), torch.zeros_like(fresh), fresh.new_empty(0), None


@pytest.mark.parametrize("body", [in_parts, by_out, never_read])
def test_what_is_written_may_be_read_and_returned(body):
    watched(body)()


def a_sum():
    return torch.empty(4, device="cpu").sum()


def a_column():
    fresh = torch.empty(2, 3, device="cpu")
    fresh[:, :2] = 1
    return fresh.t()[1:].clone()


def an_index():
    return NUMBERS[torch.empty(2, dtype=torch.int64, device="cpu")]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (a_sum, r"torch.sum gets a tensor \[4\] of which 4 elements .* the first at \[0\]"),
        (a_column, r"torch.clone gets a tensor \[2, 2\] of which 2 .* the first at \[1, 0\]"),
        (an_index, r"torch.index gets a tensor \[2\]"),
    ],
)
def test_torch_may_not_read_what_is_not_written(body, message):
    with pytest.raises(PtxError, match=message):
        watched(body)()


def test_what_is_not_written_may_not_be_returned():
    def body():
        fresh = torch.empty(3, 4, dtype=torch.bfloat16, device="cpu")
        fresh[:2] = 1
        return NUMBERS, fresh

    message = r"the caller of body gets a tensor \[3, 4\] of which 4 .* the first at \[2, 0\]"
    with pytest.raises(PtxError, match=message):
        watched(body)()


def test_it_is_garbage_and_known_while_the_operation_lasts():
    def body():
        fresh = torch.empty(4, dtype=torch.int32, device="cpu")
        assert ctypes.string_at(fresh.data_ptr(), fresh.nbytes) == bytes([GARBAGE]) * 16
        fresh[1] = 5
        assert written(fresh[1:]).tolist() == [True] * 4 + [False] * 8
        assert written(NUMBERS) is None
        other = []
        thread = threading.Thread(target=lambda: other.append(written(fresh)))
        thread.start()
        thread.join()
        assert other == [None]
        return fresh[1]

    assert watched(body)() == 5


def test_an_operation_within_another_leaves_the_check_to_it():
    def inner():
        return torch.empty(2, device="cpu")

    def outer():
        return watched(inner)().fill_(1)

    assert watched(outer)().tolist() == [1, 1]
    with pytest.raises(PtxError, match="the caller of inner"):
        watched(inner)()
    # The error ends the watch.
    assert written(NUMBERS) is None
