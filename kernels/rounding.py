"""Arithmetic that is rounded once: Triton's own fp32 `/` and sqrt are approximate."""

import triton
import triton.language as tl


@triton.jit
def divide(a, b):
    """a / b, rounded once, for fp32 or fp64 tensors of one dtype."""
    return tl.div_rn(a, b) if a.dtype == tl.float32 else a / b


@triton.jit
def square_root(x):
    """sqrt(x), rounded once, for an fp32 or fp64 tensor."""
    return tl.sqrt_rn(x) if x.dtype == tl.float32 else tl.sqrt(x)
