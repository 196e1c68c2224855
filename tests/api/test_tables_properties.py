"""Hypothesis looks for tables, bags, dtypes and strides that break what batched tables promise."""

from dataclasses import dataclass

import pytest
import torch
from cases import GRADIENT_DTYPES, ID_DTYPES, same_bits
from table_cases import by_layer, by_torch, integer_layer, integers
from tiers import where

import gpu_embed
from gpu_embed import optim

hypothesis = pytest.importorskip("hypothesis", reason="hypothesis draws the cases")
st = hypothesis.strategies

MODES = ("sum", "mean", "max")
# So that a mean of integers is exact.
LENGTHS = (0, 0, 1, 2, 4)
STRIDES = {
    "adjacent": lambda tensor: tensor.contiguous(),
    "every other": lambda tensor: torch.stack([tensor, tensor + 1], -1)[..., 0],
    "behind another": lambda tensor: torch.cat([tensor.flatten()[:1], tensor.flatten()])[
        -tensor.numel() or 1 :
    ].view(tensor.shape),
}


@dataclass(frozen=True)
class Call:
    """One lookup, small enough to read in a failure."""

    sizes: tuple[tuple[int, int], ...]
    modes: tuple[str, ...]
    paddings: tuple[int | None, ...]
    lengths: tuple[int, ...]  # of the bags of all tables
    weighted: bool
    behind: int  # ids behind the last offset
    dtype: torch.dtype
    ids_dtype: torch.dtype
    offsets_dtype: torch.dtype
    stride: str
    sparse: bool
    seed: int

    @property
    def num_bags(self):
        return len(self.lengths) // len(self.sizes)

    def layer(self, device, dtype=None, sparse=None):
        return integer_layer(
            self.sizes,
            device,
            dtype or self.dtype,
            mode=self.modes,
            padding_idx=self.paddings,
            sparse=self.sparse if sparse is None else sparse,
        )

    def arguments(self, device, strays=False):
        """Ids, offsets, and weights if there are any."""
        ids = []
        for number, (rows, _) in enumerate(self.sizes):
            own = self.lengths[number * self.num_bags : (number + 1) * self.num_bags]
            ids.append(integers(sum(own), seed=self.seed + number, low=0, high=max(rows, 1)))
        ids.append(torch.full((self.behind,), 99))
        ids = torch.cat(ids)
        if strays:
            limits = torch.iinfo(self.ids_dtype)
            ids[:: 2 + self.seed] = limits.max
            ids[1 :: 3 + self.seed] = max(limits.min, -1)
        offsets = torch.tensor((0, *self.lengths)).cumsum(0)
        stride = STRIDES[self.stride]
        arguments = [stride(ids.to(self.ids_dtype)), stride(offsets.to(self.offsets_dtype))]
        if self.weighted:
            weights = integers(len(ids), seed=self.seed).to(self.dtype)
            arguments.append(stride(weights))
        return [argument.to(device) for argument in arguments]

    def grad_output(self, device):
        width = sum(dim for _, dim in self.sizes)
        values = 4 * integers(self.num_bags, width, seed=self.seed)
        return STRIDES[self.stride](values.to(self.dtype)).to(device)


@st.composite
def calls(draw):
    num_tables = draw(st.integers(1, 4))
    num_bags = draw(st.integers(0, 3))
    dims = st.sampled_from((1, 2, 3, 4, 8, 12))
    one_dim = draw(st.none() | dims)
    modes = tuple(draw(st.sampled_from((*MODES, "sum"))) for _ in range(num_tables))
    rows = [draw(st.sampled_from((0, 1, 2, 5))) for _ in range(num_tables)]
    lengths: list[int] = []
    for height in rows:
        # A table without rows has no id that is right.
        own = [draw(st.sampled_from(LENGTHS)) if height else 0 for _ in range(num_bags)]
        lengths += own
    return Call(
        sizes=tuple((height, draw(dims) if one_dim is None else one_dim) for height in rows),
        modes=modes,
        paddings=tuple(
            # Padding would leave a mean of three.
            draw(st.sampled_from((None, 0, -1))) if height and mode != "mean" else None
            for height, mode in zip(rows, modes, strict=True)
        ),
        lengths=tuple(lengths),
        weighted=draw(st.booleans()) and set(modes) == {"sum"},
        behind=draw(st.sampled_from((0, 0, 2))),
        dtype=draw(st.sampled_from(GRADIENT_DTYPES)),
        ids_dtype=draw(st.sampled_from(ID_DTYPES)),
        offsets_dtype=draw(st.sampled_from(ID_DTYPES)),
        stride=draw(st.sampled_from(tuple(STRIDES))),
        sparse=draw(st.booleans()),
        seed=draw(st.integers(0, 5)),
    )


def holds(target, max_examples, **strategies):
    """Decorator: runs the property at once, on examples that are the same in every run."""
    # Kernels take 10 ms a tile in the interpreter, and compile for each new width on a GPU.
    slow = target.device == "cuda" or target.backend == "triton"
    settings = hypothesis.settings(
        max_examples=max_examples // 3 if slow else max_examples,
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=[hypothesis.HealthCheck.too_slow],
    )
    return lambda prop: settings(hypothesis.given(**strategies)(prop))()


def assert_results_equal(actual, expected):
    assert torch.equal(actual.output.cpu(), expected.output)
    for one, other in zip(actual.tables, expected.tables, strict=True):
        assert torch.equal(one.cpu(), other)
    if expected.per_sample_weights is not None:
        assert torch.equal(actual.per_sample_weights.cpu(), expected.per_sample_weights)


def test_they_are_torchs_bags_one_by_one(target):
    """As torch: output and every gradient, exactly: a layer is a list of torch.nn.EmbeddingBag."""

    @holds(target, 60, call=calls(), deterministic=st.booleans())
    def same(call, deterministic):
        layer = call.layer(target.device)
        arguments, grad_output = call.arguments(target.device), call.grad_output(target.device)
        weights = arguments[2] if call.weighted else None
        torch.use_deterministic_algorithms(deterministic)
        try:
            actual = by_layer(layer, *arguments[:2], grad_output, weights)
        finally:
            torch.use_deterministic_algorithms(False)
        on_cpu = layer.cpu()
        expected = by_torch(on_cpu, *arguments[:2], grad_output, weights)
        assert_results_equal(actual, expected)


# The reference is the yardstick.
@where(lambda target: target.backend != "reference")
def test_they_are_the_reference(target):
    """Bounds: with ids out of range too: zeros, no gradient, and never a maximum."""

    @holds(target, 60, call=calls())
    def same(call):
        arguments = call.arguments(target.device, strays=True)
        grad_output = call.grad_output(target.device)
        weights = arguments[2] if call.weighted else None
        results = []
        for backend in (target.backend, "reference"):
            with gpu_embed.use_backend(backend), gpu_embed.set_bounds_check("off"):
                layer = call.layer(target.device)
                results.append(by_layer(layer, *arguments[:2], grad_output, weights))
        actual, expected = results
        assert torch.equal(actual.output, expected.output)
        for one, other in zip(actual.tables, expected.tables, strict=True):
            assert torch.equal(one, other)
        if weights is not None:
            assert torch.equal(actual.per_sample_weights, expected.per_sample_weights)


OPTIMIZERS = (optim.SGD, optim.Adagrad, optim.RowWiseAdagrad, optim.Adam, optim.AdamW)


def test_their_steps_are_those_of_tables_one_by_one(target):
    """Whole or by table, over two steps, bit for bit: what the reference makes of each table's dense gradient."""

    @holds(
        target,
        30,
        call=calls(),
        optimizer_class=st.sampled_from(OPTIMIZERS),
        by_table=st.booleans(),
        maximize=st.booleans(),
    )
    def same(call, optimizer_class, by_table, maximize):
        layer = call.layer(target.device, sparse=True)
        arguments, grad_output = call.arguments(target.device), call.grad_output(target.device)
        used = [used_rows(call, layer, arguments, number) for number in range(len(layer))]
        # A sparse gradient of one D that has no entry gives row 0 a zero, as the README says.
        hypothesis.assume(not layer.layout.is_uniform or any(len(rows) for rows in used))
        tables = [torch.nn.Parameter(rows.detach().clone()) for _, rows in layer.items()]
        params = layer.parameters_of(*layer) if by_table else layer.parameters()
        kind = {"lr": 0.5, "maximize": maximize}
        optimizer, twin = optimizer_class(params, **kind), optimizer_class(tables, **kind)
        for _ in range(2):
            optimizer.zero_grad()
            layer(*arguments).backward(grad_output)
            dense = layer.weight.grad.to_dense()
            optimizer.step()
            for number, table in enumerate(tables):
                values = layer.layout.view(dense, number)[used[number]]
                table.grad = torch.sparse_coo_tensor(
                    used[number][None], values, table.shape, check_invariants=False
                )
            with gpu_embed.use_backend("reference"):
                twin.step()
        for (_, rows), table in zip(layer.items(), tables, strict=True):
            assert same_bits(rows.detach(), table.detach())


def used_rows(call, layer, arguments, number):
    """The rows of a table that a batch has a gradient for, also where it is zero."""
    ids, offsets = (argument.long() for argument in arguments[:2])
    bags = call.num_bags
    own = ids[offsets[number * bags] : offsets[(number + 1) * bags]].unique()
    return own[own != layer.layout.padding_idx[number]]
