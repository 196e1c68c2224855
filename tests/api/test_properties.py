"""Hypothesis looks for shapes, dtypes, strides, ids and arguments that break a property."""

from dataclasses import dataclass, replace

import pytest
import torch
from cases import (
    FORWARD_DTYPES,
    GRADIENT_DTYPES,
    ID_DTYPES,
    ids,
    integer_gradient,
    same_bits,
    table,
)

import gpu_embed
from gpu_embed.functional import embedding, embedding_bag
from gpu_embed.ops import lookup as ops

hypothesis = pytest.importorskip("hypothesis", reason="hypothesis draws the cases")
st = hypothesis.strategies

# The interpreter takes the logarithm of zero as a GPU does, but says so.
pytestmark = pytest.mark.filterwarnings("ignore:divide by zero encountered in log2")

LAYOUTS = ("contiguous", "transposed", "every other", "padded rows", "offset")
KINDS = ("uniform", "equal", "sorted", "zipf", "alternating")
# Few distinct widths: each is another kernel to compile on a GPU.
ROWS = (1, 2, 7, 40, 120)
COLUMNS = (0, 1, 2, 3, 8, 33, 50)


@dataclass(frozen=True)
class Lookup:
    """The arguments of one call, small enough to read in a failure."""

    num_embeddings: int
    embedding_dim: int
    dtype: torch.dtype
    weight_layout: str
    shape: tuple[int, ...]
    kind: str
    strays: bool
    ids_dtype: torch.dtype
    ids_layout: str

    def indices(self, device):
        """The ids, some of them out of range where `strays` says so."""
        count = torch.Size(self.shape).numel()
        indices = ids(self.kind, count, self.num_embeddings)
        if self.strays:
            limit = torch.iinfo(self.ids_dtype)
            outside = torch.tensor([self.num_embeddings, limit.min, limit.max])
            indices[::3] = outside[torch.arange(len(indices[::3])) % 3]
        indices = indices.to(self.ids_dtype).view(self.shape)
        return laid_out(indices.to(device), self.ids_layout)

    def in_table(self, indices):
        return (indices.long() >= 0) & (indices.long() < self.num_embeddings)

    def integers(self, device):
        """A table of small integers."""
        weight = table(self.num_embeddings, self.embedding_dim, torch.float32, device)
        return laid_out(weight.round().to(self.dtype), self.weight_layout)


def lookups(dtypes, columns=COLUMNS):
    return st.builds(
        Lookup,
        num_embeddings=st.sampled_from(ROWS),
        embedding_dim=st.sampled_from(columns),
        dtype=st.sampled_from(dtypes),
        weight_layout=st.sampled_from(LAYOUTS),
        shape=st.lists(st.integers(0, 5), max_size=3).map(tuple),
        kind=st.sampled_from(KINDS),
        strays=st.booleans(),
        ids_dtype=st.sampled_from(ID_DTYPES),
        ids_layout=st.sampled_from(LAYOUTS),
    )


def laid_out(tensor, layout):
    """The same values in other strides; what lies between them is zero."""
    shape = tensor.shape
    if layout == "contiguous" or not shape:
        return tensor.contiguous()
    if layout == "transposed":
        place = tensor.new_zeros(shape[::-1]).permute(*reversed(range(len(shape))))
    elif layout == "every other":
        place = tensor.new_zeros(*shape[:-1], 2 * shape[-1])[..., ::2]
    elif layout == "padded rows":
        place = tensor.new_zeros(*shape[:-1], shape[-1] + 3)[..., 1 : 1 + shape[-1]]
    else:
        place = tensor.new_zeros(tensor.numel() + 1)[1:].view(shape)
    return place.copy_(tensor)


def holds(target, **strategies):
    """Decorator: runs the property at once, on examples that are the same in every run."""
    # Kernels take 10 ms a tile in the interpreter, and compile for each new width on a GPU.
    slow = target.device == "cuda" or target.backend == "triton"
    settings = hypothesis.settings(
        max_examples=25 if slow else 75,
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=[hypothesis.HealthCheck.too_slow],
    )
    return lambda prop: settings(hypothesis.given(**strategies)(prop))()


@pytest.fixture(autouse=True)
def _strays_read_as_zeros():
    with gpu_embed.set_bounds_check("off"):
        yield


def test_forward_copies_bits(target):
    """Exact copy: rows bit for bit, contiguous, whatever the rest; bounds: strays read as zeros."""

    @holds(
        target,
        lookup=lookups(FORWARD_DTYPES),
        padding_idx=st.sampled_from([None, 0, -1]),
        scale_grad_by_freq=st.booleans(),
        sparse=st.booleans(),
    )
    def forward(lookup, padding_idx, scale_grad_by_freq, sparse):
        generator = torch.Generator().manual_seed(lookup.num_embeddings)
        row_bytes = lookup.embedding_dim * lookup.dtype.itemsize
        # Every byte is drawn, NaN patterns and all; a bool has no more than two values.
        limit = 2 if lookup.dtype == torch.bool else 256
        raw = torch.randint(limit, (lookup.num_embeddings * row_bytes,), generator=generator)
        raw = raw.to(torch.uint8).to(target.device)
        weight = raw.view(lookup.dtype).view(lookup.num_embeddings, lookup.embedding_dim)
        weight = laid_out(weight, lookup.weight_layout)
        indices = lookup.indices(target.device)
        before = indices.clone()
        output = embedding(
            indices,
            weight,
            padding_idx,
            scale_grad_by_freq=scale_grad_by_freq,
            sparse=sparse,
        )
        read = lookup.in_table(indices)
        expected = raw.view(-1, row_bytes) if row_bytes else raw.new_empty(len(weight), 0)
        expected = expected[torch.where(read, indices.long(), 0)] * read[..., None]
        assert output.shape == (*lookup.shape, lookup.embedding_dim)
        assert output.dtype == lookup.dtype
        assert output.is_contiguous()
        assert same_bits(output.flatten(), expected.flatten().view(lookup.dtype))
        assert torch.equal(indices, before)


GRADIENT_LAYOUTS = {layout: lambda g, layout=layout: laid_out(g, layout) for layout in LAYOUTS} | {
    "one number": lambda g: g.new_full((), 2.0).expand(g.shape),
    "one row": lambda g: g.new_ones(g.shape[-1]).expand(g.shape),
    "one column": lambda g: g.new_ones(*g.shape[:-1], 1).expand(g.shape),
}


def test_gradient_equals_the_reference(target):
    """Accumulation: integer sums are exact; as torch: with padding_idx and scale_grad_by_freq."""

    @holds(
        target,
        lookup=lookups(GRADIENT_DTYPES),
        layout=st.sampled_from(sorted(GRADIENT_LAYOUTS)),
        padding_idx=st.sampled_from([None, 0, -1]),
        scale_grad_by_freq=st.booleans(),
        method=st.sampled_from(["auto", "sorted"]),
    )
    def gradient(lookup, layout, padding_idx, scale_grad_by_freq, method):
        indices = lookup.indices(target.device)
        shape = (*lookup.shape, lookup.embedding_dim)
        grad_output = integer_gradient(shape, lookup.dtype, target.device)
        grad_output = GRADIENT_LAYOUTS[layout](grad_output)

        def grad_weight(grad_output):
            weight = lookup.integers(target.device).to(grad_output.dtype).requires_grad_()
            embedding(indices, weight, padding_idx, scale_grad_by_freq=scale_grad_by_freq).backward(
                grad_output
            )
            return weight.grad

        with gpu_embed.use_gradient_method(method):
            actual = grad_weight(grad_output)
        with gpu_embed.use_backend("reference"):
            expected = grad_weight(grad_output)
            magnitude = grad_weight(grad_output.abs())
        assert actual.dtype == lookup.dtype
        if target.backend == "torch" and scale_grad_by_freq:
            # It multiplies each term by 1 / count: two roundings a term and one a sum.
            error = 3 * indices.numel() * torch.finfo(lookup.dtype).eps * magnitude
            assert ((actual - expected).abs() <= error).all()
        else:
            assert torch.equal(actual, expected)


def test_sparse_gradient_equals_the_dense_one(target):
    """As torch: the entries of the COO gradient sum to the dense gradient; strays have none."""

    @holds(
        target,
        lookup=lookups(GRADIENT_DTYPES),
        layout=st.sampled_from(sorted(GRADIENT_LAYOUTS)),
        padding_idx=st.sampled_from([None, 0, -1]),
    )
    def sparse(lookup, layout, padding_idx):
        indices = lookup.indices(target.device)
        shape = (*lookup.shape, lookup.embedding_dim)
        grad_output = integer_gradient(shape, lookup.dtype, target.device)
        grad_output = GRADIENT_LAYOUTS[layout](grad_output)
        grads = []
        for is_sparse in (True, False):
            weight = lookup.integers(target.device).requires_grad_()
            output = embedding(indices, weight, padding_idx, sparse=is_sparse)
            output.backward(grad_output)
            assert weight.grad.is_sparse == is_sparse
            grads.append(weight.grad.to_dense())
        assert torch.equal(*grads)


def test_double_backward_is_the_adjoint(target):
    """As torch: <backward(g), v> = <g, double_backward(v)>, exact in integers."""

    @holds(target, lookup=lookups([torch.float64]), padding=st.booleans())
    def adjoint(lookup, padding):
        indices = lookup.indices(target.device)
        padding_idx = lookup.num_embeddings - 1 if padding else -1
        shape = (*lookup.shape, lookup.embedding_dim)
        grad_output = integer_gradient(shape, torch.float64, target.device)
        vector = lookup.integers(target.device)
        forth = ops.embedding_dense_backward(
            grad_output, indices, lookup.num_embeddings, padding_idx, False
        )
        back = ops.embedding_dense_double_backward(vector, indices, padding_idx, False)
        assert forth.is_contiguous()
        assert back.is_contiguous()
        assert (forth * vector).sum() == (back * grad_output).sum()


NORM_TYPES = (2.0, 1.0, float("inf"), float("-inf"), 0.0, 3.0, 0.5, -1.0)


def norm_error(norm_type, embedding_dim, dtype):
    """How far a norm taken in the accumulation dtype may lie from the exact one, relatively.

    Counts, maxima and minima are exact. Otherwise, with entries between 1/4 and 16 in magnitude, so
    |log2| <= 4: an entry's power is exp2(p log2 x), wrong by 4 |p| eps for log2, 8 |p| eps for the product
    and 4 eps for exp2; sums add D eps; the root divides what log2 makes of all that, plus
    (2 + 4 |p| + 8) eps of its own, by |p|, and its exp2 adds 4 eps.
    """
    if norm_type in (0.0, float("inf"), float("-inf")):
        return 0.0
    eps = torch.finfo(torch.promote_types(dtype, torch.float32)).eps
    power = abs(norm_type)
    return eps * ((16 * power + 14 + embedding_dim) / power + 4)


def test_renorm_stays_near_the_exact_rows(target):
    """As torch: every norm_type; rows not looked up, or short enough, and gaps keep their bits."""

    @holds(
        target,
        lookup=lookups(GRADIENT_DTYPES, COLUMNS[1:]),
        norm_type=st.sampled_from(NORM_TYPES),
        # Few distinct limits: each is another kernel to compile on a GPU.
        max_norm=st.sampled_from([0.5, 6.0]),
    )
    def renorm(lookup, norm_type, max_norm):
        quarters = table(lookup.num_embeddings, lookup.embedding_dim, torch.float64, target.device)
        quarters = (quarters * 4).round().clamp(-64, 64) / 4
        weight = laid_out(quarters.to(lookup.dtype), lookup.weight_layout)
        before = weight.clone()
        indices = lookup.indices(target.device)
        output = embedding(indices, weight, max_norm=max_norm, norm_type=norm_type)
        if not lookup.in_table(indices).all():
            assert torch.equal(weight, before)
            return
        assert torch.equal(output, weight[indices.long()])

        rows = before.double()
        norm = torch.linalg.vector_norm(rows, norm_type, dim=1, keepdim=True)
        looked_up = torch.zeros_like(norm, dtype=torch.bool)
        looked_up[indices.long().reshape(-1)] = True
        scale = torch.where(looked_up & (norm > max_norm), max_norm / (norm + 1e-7), 1.0)
        exact = rows * scale
        error = norm_error(norm_type, lookup.embedding_dim, lookup.dtype)
        kept = ~looked_up | (norm < max_norm * (1 - error)) | (norm == 0)
        assert torch.equal(weight[kept[:, 0]], before[kept[:, 0]])

        accumulated = torch.finfo(torch.promote_types(lookup.dtype, torch.float32))
        stored = torch.finfo(lookup.dtype)
        # The norm's error, quotient, product, the store; and a norm that close to the limit may fall on
        # either side of it.
        relative = error + 3 * accumulated.eps + stored.eps
        on_the_limit = (norm / max_norm - 1).abs() <= error
        relative = relative + on_the_limit * (error + 1e-7 / max_norm)
        bound = exact.abs() * relative + stored.tiny * stored.eps
        assert ((weight.double() - exact).abs() <= bound).all()

        if weight._base is not None:
            weight.zero_()
            assert not weight._base.any()


@dataclass(frozen=True)
class BagLookup:
    """A lookup whose ids are cut into bags of these sizes."""

    lookup: Lookup
    sizes: tuple[int, ...]
    behind: int | None  # ids behind the last offset; None: no last offset
    offsets_dtype: torch.dtype
    mode: str
    padding_idx: int | None
    weighted: bool
    scale_grad_by_freq: bool

    def arguments(self, device):
        """The ids, and all but the table."""
        indices = self.lookup.indices(device)
        ends = torch.tensor([0, *self.sizes]).cumsum(0)
        if self.behind is None:
            ends = ends[:-1]
        arguments = {
            "offsets": laid_out(ends.to(self.offsets_dtype).to(device), self.lookup.ids_layout),
            "mode": self.mode,
            "padding_idx": self.padding_idx,
            "include_last_offset": self.behind is not None,
            "scale_grad_by_freq": self.scale_grad_by_freq and self.mode != "max",
        }
        if self.weighted and self.mode == "sum":
            weights = integer_gradient(tuple(indices.shape), self.lookup.dtype, device)
            arguments["per_sample_weights"] = weights.requires_grad_()
        return indices, arguments


@st.composite
def bag_lookups(draw):
    sizes = tuple(draw(st.lists(st.integers(0, 6), max_size=5)))
    # Without bags every id is in none.
    behind = draw(st.sampled_from([0, 3] if sizes else [3])) if draw(st.booleans()) else None
    lookup = draw(lookups(GRADIENT_DTYPES))
    lookup = replace(lookup, shape=(sum(sizes) + (behind or 0),))
    return BagLookup(
        lookup,
        sizes,
        behind,
        offsets_dtype=draw(st.sampled_from(ID_DTYPES)),
        mode=draw(st.sampled_from(["sum", "mean", "max"])),
        padding_idx=draw(st.sampled_from([None, 0, -1])),
        weighted=draw(st.booleans()),
        scale_grad_by_freq=draw(st.booleans()),
    )


def test_bags_equal_the_reference(target):
    """Accumulation and as torch: integer sums and maxima are exact; means and counts within what a quotient loses."""

    @holds(target, bag=bag_lookups(), method=st.sampled_from(["auto", "sorted"]))
    def bags(bag, method):
        indices, arguments = bag.arguments(target.device)
        found = []
        for backend in (target.backend, "reference"):
            weight = bag.lookup.integers(target.device).requires_grad_()
            leaves = [weight, arguments.get("per_sample_weights")]
            with gpu_embed.use_backend(backend), gpu_embed.use_gradient_method(method):
                output = embedding_bag(indices, weight, **arguments)
                grad_output = integer_gradient(tuple(output.shape), output.dtype, target.device)
                grads = torch.autograd.grad(
                    output, [leaf for leaf in leaves if leaf is not None], grad_output
                )
            found.append((output, *grads))
        quotients = bag.mode == "mean" or arguments["scale_grad_by_freq"]
        # Some 30 terms, each of them divided twice at most, of sums that may cancel.
        wide = torch.promote_types(bag.lookup.dtype, torch.float32)
        close = {
            "rtol": torch.finfo(bag.lookup.dtype).eps if quotients else 0,
            "atol": 30 * 2 * 3 * 2 * torch.finfo(wide).eps if quotients else 0,
        }
        for actual, expected in zip(*found, strict=True):
            assert actual.dtype == expected.dtype == bag.lookup.dtype
            assert actual.is_contiguous()
            assert torch.allclose(actual, expected, **close)
