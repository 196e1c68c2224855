"""The division by a constant."""

import pytest
import torch

triton = pytest.importorskip("triton")
tl = triton.language
if not triton.knobs.runtime.interpret:
    pytest.skip("the interpreter is off", allow_module_level=True)

from gpu_embed.kernels.flat_chunk import quotient  # noqa: E402

BLOCK = 512


@triton.jit
def quotient_kernel(
    numbers_ptr, quotients_ptr, DIVISOR: tl.constexpr, MAX: tl.constexpr, BLOCK: tl.constexpr
):
    place = tl.arange(0, BLOCK)
    numbers = tl.load(numbers_ptr + place)
    tl.store(quotients_ptr + place, quotient(numbers, DIVISOR, MAX))


# Odd and even, next to a power of two, the largest that one multiplication serves, and the first that it does not.
@pytest.mark.parametrize(
    "divisor", [1, 2, 3, 7, 25, 33, 64, 641, 1023, 1025, 2895, 2896, 2897, 4100]
)
def test_a_quotient_is_exact(divisor):
    maximum = divisor * BLOCK
    steps = torch.linspace(1, BLOCK, BLOCK // 2).long() * divisor
    numbers = torch.stack([steps - 1, steps.clamp(max=maximum - 1)]).flatten().to(torch.int32)
    quotients = torch.empty_like(numbers)
    quotient_kernel[(1,)](numbers, quotients, divisor, maximum, BLOCK)
    assert torch.equal(quotients, numbers // divisor)
