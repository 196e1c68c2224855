"""Which kernel computes the dense gradient: fp32 atomics, or sorted segments.

The table is read from the top; the first rule that fits decides. It looks at shapes and dtype alone, so
choosing never waits for the GPU. The limits below come from counting bytes and launches, not from
measurements: atomics need one launch and no sort, and lose where many ids meet on few rows.
"""

from dataclasses import dataclass

import torch

from ..settings import GRADIENT_METHOD, Restore

# One float atomic has to be exact to the accumulation dtype, so only these tables can take them.
ATOMIC_DTYPES = (torch.float32, torch.float64)


@dataclass(frozen=True)
class GradientRule:
    """The method for every call within all of the limits."""

    method: str
    dtypes: tuple[torch.dtype, ...] = ()  # empty: any
    max_indices_per_row: float = float("inf")  # num_indices / num_embeddings
    deterministic: bool = True  # whether the method may serve deterministic calls
    scale_grad_by_freq: bool = True  # whether the method can divide by the counts

    def can_serve(self, dtype: torch.dtype, deterministic: bool, scale_grad_by_freq: bool) -> bool:
        """Whether the method gives the right answer for such a call, be it fast or not."""
        return (
            (not self.dtypes or dtype in self.dtypes)
            and (self.deterministic or not deterministic)
            and (self.scale_grad_by_freq or not scale_grad_by_freq)
        )


RULES = (
    GradientRule(
        "atomic",
        dtypes=ATOMIC_DTYPES,
        max_indices_per_row=8,
        deterministic=False,
        scale_grad_by_freq=False,
    ),
    GradientRule("sorted"),
)


def choose(
    num_indices: int,
    num_embeddings: int,
    embedding_dim: int,
    dtype: torch.dtype,
    deterministic: bool,
    scale_grad_by_freq: bool,
) -> str:
    """ "atomic" or "sorted" for one backward.

    Raises RuntimeError if `use_gradient_method` forces atomics on a call that they cannot serve.
    """
    forced = GRADIENT_METHOD.value
    for rule in RULES:
        if forced not in ("auto", rule.method):
            continue
        if not rule.can_serve(dtype, deterministic, scale_grad_by_freq):
            continue
        if forced == rule.method or num_indices <= rule.max_indices_per_row * max(
            num_embeddings, 1
        ):
            return rule.method
    raise RuntimeError(
        f"gpu_embed: the gradient method {forced!r} is forced, but it serves neither "
        f"16-bit tables (this one is {dtype}), nor deterministic algorithms "
        f"({deterministic}), nor scale_grad_by_freq ({scale_grad_by_freq}); use 'auto'"
    )


def use_gradient_method(name: str) -> Restore:
    """Force "atomic" or "sorted" for tests and benchmarks; "auto" gives the choice back to the table.

    A plain call or a context manager. Raises ValueError for another name.
    """
    return GRADIENT_METHOD.set(name, "use_gradient_method")
