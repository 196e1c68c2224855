"""Correctly rounded division and square root: Triton's own fp32 `/` and sqrt are approximate."""

import triton
import triton.language as tl


@triton.jit
def divide(a, b):
    """a / b, correctly rounded; fp32 or fp64, both of one dtype."""
    return tl.div_rn(a, b) if a.dtype == tl.float32 else a / b


@triton.jit
def square_root(x):
    """sqrt(x), correctly rounded; fp32 or fp64."""
    return tl.sqrt_rn(x) if x.dtype == tl.float32 else tl.sqrt(x)
