"""Which kernel computes the dense gradient.

"atomic" adds every row of grad_output to the table's with fp32 atomics, "descriptor" with one bulk instruction
a row. "sorted" sorts the ids and sums each run of equal ones; "sorted_atomic" does so in one launch, and leaves
to atomics what lies at the edges of its chunks. "one_hot" is a matrix product.

The table is read from the top; the first rule that fits decides. It looks at shapes and dtype alone, so
choosing never waits for the GPU. The limits below come from counting bytes and launches, not from
measurements: atomics need one launch and no sort, and lose where many ids meet on few rows. The other methods
are not chosen until they are measured.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from ...settings import GRADIENT_METHOD, Restore

# One float atomic has to be exact to the accumulation dtype, so only these tables can take them.
ATOMIC_DTYPES = (torch.float32, torch.float64)
SHORT_DTYPES = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class GradientRule:
    """What a method can serve, and the calls for which the table chooses it."""

    method: str
    dtypes: tuple[torch.dtype, ...] = ()  # empty: any
    max_num_embeddings: float = float("inf")
    deterministic: bool = True  # whether the method may serve deterministic calls
    scale_grad_by_freq: bool = True  # whether the method can divide by the counts
    # Chosen up to so many ids a row of the table, num_indices / num_embeddings; None: never, only forced.
    max_indices_per_row: float | None = None

    def refusal(
        self,
        num_embeddings: int,
        dtype: torch.dtype,
        deterministic: bool,
        scale_grad_by_freq: bool,
    ) -> str | None:
        """What of such a call the method cannot serve; None: it gives the right answer, be it fast or not."""
        if self.dtypes and dtype not in self.dtypes:
            return f"a table of {dtype}"
        if num_embeddings > self.max_num_embeddings:
            return f"a table of {num_embeddings} rows ({self.max_num_embeddings} at most)"
        if deterministic and not self.deterministic:
            return "torch.use_deterministic_algorithms(True)"
        if scale_grad_by_freq and not self.scale_grad_by_freq:
            return "scale_grad_by_freq=True"
        return None


RULES = {
    rule.method: rule
    for rule in (
        GradientRule(
            "atomic",
            dtypes=ATOMIC_DTYPES,
            deterministic=False,
            scale_grad_by_freq=False,
            max_indices_per_row=8,
        ),
        GradientRule(
            "descriptor", dtypes=(torch.float32,), deterministic=False, scale_grad_by_freq=False
        ),
        GradientRule(
            "sorted_atomic", dtypes=ATOMIC_DTYPES, deterministic=False, scale_grad_by_freq=False
        ),
        # Never to be chosen: a gradient that is not finite spreads to other rows.
        GradientRule(
            "one_hot", dtypes=SHORT_DTYPES, max_num_embeddings=256, scale_grad_by_freq=False
        ),
        GradientRule("sorted", max_indices_per_row=float("inf")),
    )
}


def choose(
    num_indices: int,
    num_embeddings: int,
    embedding_dim: int,
    dtype: torch.dtype,
    deterministic: bool,
    scale_grad_by_freq: bool,
    refusal: Callable[[str], str | None] = lambda method: None,
) -> str:
    """The name of the method for one backward.

    Args:
        refusal: what of the call the backend cannot serve with a method; None: nothing.

    Raises RuntimeError if `use_gradient_method` forces a method that cannot serve the call.
    """
    call = (num_embeddings, dtype, deterministic, scale_grad_by_freq)
    forced = GRADIENT_METHOD.value
    if forced != "auto":
        reason = RULES[forced].refusal(*call) or refusal(forced)
        if reason is not None:
            raise GRADIENT_METHOD.cannot_serve("gradient method", reason)
        return forced
    for rule in RULES.values():
        if (
            rule.max_indices_per_row is not None
            and num_indices <= rule.max_indices_per_row * max(num_embeddings, 1)
            and rule.refusal(*call) is None
            and refusal(rule.method) is None
        ):
            return rule.method
    raise AssertionError("the last rule serves every call")


def use_gradient_method(name: str) -> Restore:
    """Force a gradient kernel for tests and benchmarks; "auto" gives the choice back to the table.

    "atomic" and "sorted_atomic" serve fp32 and fp64; "descriptor" serves fp32 where rows are a multiple of 16
    bytes, from compute capability 9.0 on; none of the three serves deterministic algorithms or
    scale_grad_by_freq. "one_hot" serves bf16 and fp16 tables of at most 256 rows without scale_grad_by_freq;
    it multiplies gradients by zero, so one that is not finite makes NaNs of its column in other rows.
    "sorted" serves everything. The triton backend has all of them, cupy the atomic and the sorted ones; the
    others have no choice and ignore it.

    A plain call or a context manager. Raises ValueError for another name. A backward that the method cannot
    serve raises RuntimeError.
    """
    return GRADIENT_METHOD.set(name, "use_gradient_method")
