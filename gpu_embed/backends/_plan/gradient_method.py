"""Which kernel computes the dense gradient.

"atomic" adds every row of grad_output to the gradient's. "sorted" sorts the ids and sums each run
of equal ones; "sorted_atomic" does so in one launch: atomics add the carry-ins and carry-outs of its chunks.

The limits are read from the top; the first that admits the call decides. They look at shapes and dtype alone, so
choosing never waits for the GPU. They come from counting bytes and launches, not from measurements: atomics need
one launch and no sort, but those of one row run one after another, and no shape shows how many ids name it.
"sorted_atomic" is not chosen until it is measured.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

import torch

from ...settings import GRADIENT_METHOD, Restore
from . import sort

# Those whose gradient has the accumulation dtype: an atomic rounds at every addition.
ATOMIC_DTYPES = (torch.float32, torch.float64)


@dataclass(frozen=True)
class Limit:
    """A method is chosen up to so many ids, or up to so many ids a row of the table."""

    max_indices: int = 0
    max_indices_per_row: float = 0.0


# What no limit admits is sorted.
LIMITS: Mapping[str, Mapping[torch.dtype, Limit]] = {
    # 1024 additions to one row should end before a sort would. Up to half an id a row the gradient's zeros should take
    # most of the time.
    "atomic": dict.fromkeys(ATOMIC_DTYPES, Limit(max_indices=1024, max_indices_per_row=0.5)),
    "sorted_atomic": dict.fromkeys(ATOMIC_DTYPES, Limit()),
}


@dataclass(frozen=True)
class Methods:
    """Rules of method, as data; each backend adds that of its gather."""

    gradient: Mapping[str, Mapping[torch.dtype, Limit]] = field(default_factory=lambda: LIMITS)


@dataclass(frozen=True)
class GradientRule:
    """What a method can serve."""

    method: str
    dtypes: tuple[torch.dtype, ...] = ()  # empty: any
    deterministic: bool = True  # whether the method may serve deterministic calls
    scale_grad_by_freq: bool = True  # whether the method can divide by the counts

    def refusal(
        self, dtype: torch.dtype, deterministic: bool, scale_grad_by_freq: bool
    ) -> str | None:
        """Why the method cannot serve the call; None: it can."""
        if self.dtypes and dtype not in self.dtypes:
            return f"a gradient of {dtype}"
        if deterministic and not self.deterministic:
            return "torch.use_deterministic_algorithms(True)"
        if scale_grad_by_freq and not self.scale_grad_by_freq:
            return "scale_grad_by_freq=True"
        return None


RULES = {
    rule.method: rule
    for rule in (
        GradientRule("atomic", dtypes=ATOMIC_DTYPES, deterministic=False, scale_grad_by_freq=False),
        GradientRule(
            "sorted_atomic", dtypes=ATOMIC_DTYPES, deterministic=False, scale_grad_by_freq=False
        ),
        GradientRule("sorted"),
    )
}


def choose(
    num_indices: int,
    num_embeddings: int,
    dtype: torch.dtype,
    deterministic: bool,
    scale_grad_by_freq: bool,
    limits: Mapping[str, Mapping[torch.dtype, Limit]] = LIMITS,
    served: Collection[str] = tuple(RULES),
) -> str:
    """The name of the method for one backward.

    Args:
        limits: those in force on the device, by method and dtype.
        served: the methods that the operation has.

    Raises:
        RuntimeError: `use_gradient_method` forces a method that cannot serve the call.
        NotImplementedError: there are more ids than can be sorted, and atomics cannot serve the call.
    """
    call = (dtype, deterministic, scale_grad_by_freq)
    forced = GRADIENT_METHOD.value
    if forced != "auto":
        reason = RULES[forced].refusal(*call) or (None if forced in served else "several tables")
        if reason is not None:
            raise GRADIENT_METHOD.cannot_serve("gradient method", reason)
        return forced
    if num_indices > sort.MAX_SORTED_IDS and RULES["atomic"].refusal(*call) is None:
        return "atomic"
    sort.check_sortable(num_indices)
    for method in limits:
        limit = limits[method].get(dtype)
        if (
            limit is not None
            and method in served
            and (
                num_indices <= limit.max_indices
                or num_indices <= limit.max_indices_per_row * max(num_embeddings, 1)
            )
            and RULES[method].refusal(*call) is None
        ):
            return method
    return "sorted"


def use_gradient_method(name: str) -> Restore:
    """Force a gradient kernel for tests and benchmarks; "auto" gives the choice back to the rules.

    "atomic" and "sorted_atomic" serve gradients of fp32 and fp64, but neither deterministic algorithms nor
    scale_grad_by_freq. "sorted" serves everything up to 2**31 - 1 ids. The backends triton and cupy have them all;
    the others have no choice and ignore it.

    A plain call or a context manager. Raises ValueError for another name. A backward that the method cannot
    serve raises RuntimeError.
    """
    return GRADIENT_METHOD.set(name, "use_gradient_method")
