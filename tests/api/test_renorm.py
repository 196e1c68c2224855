"""max_norm: rows are scaled in place, once, as torch scales them."""

import pytest
import torch
from cases import GRADIENT_DTYPES, INT16_KEYS, ids_around_the_middle, table

import gpu_embed
from gpu_embed.functional import embedding

NORM_TYPES = [2.0, 1.0, 0.0, float("inf"), float("-inf"), 0.5, 3.0, -1.0, -2.5, 2, float("nan")]


def tolerance(dtype, embedding_dim):
    """Relative: sums and powers of D terms in fp32, then one rounding to the table's dtype."""
    return torch.finfo(dtype).eps + 8 * embedding_dim * torch.finfo(torch.float32).eps


@pytest.mark.parametrize("norm_type", NORM_TYPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_every_norm_type_agrees_with_torch(target, norm_type, dtype):
    """As torch: norm_type is any number."""
    weight = table(6, 5, dtype, target.device)
    weight[0, 2] = 0
    theirs = weight.cpu().clone()
    indices = torch.tensor([[0, 3], [3, 5]], device=target.device)
    output = embedding(indices, weight, max_norm=1.5, norm_type=norm_type)
    torch.nn.functional.embedding(indices.cpu(), theirs, max_norm=1.5, norm_type=norm_type)
    assert torch.allclose(weight.cpu(), theirs, rtol=tolerance(dtype, 5), atol=0)
    assert torch.equal(output, weight[indices])


@pytest.mark.parametrize("dtype", GRADIENT_DTYPES, ids=str)
@pytest.mark.parametrize("embedding_dim", [1, 7, 130])
def test_every_dtype_and_width(target, dtype, embedding_dim):
    """As torch: rows end up at max_norm; rows not looked up, or short enough, keep their bits."""
    weight = table(5, embedding_dim, dtype, target.device)
    weight[1] = 0.001
    before = weight.clone()
    embedding(torch.tensor([0, 4, 0, 1], device=target.device), weight, max_norm=1.0)
    assert torch.equal(weight[1:4], before[1:4])
    exact = before.double() * (1 / (before.double().norm(dim=1, keepdim=True) + 1e-7))
    for row in (0, 4):
        if before[row].double().norm() > 1:
            bound = tolerance(dtype, embedding_dim)
            assert torch.allclose(weight[row].double(), exact[row], rtol=bound, atol=0)
        else:
            assert torch.equal(weight[row], before[row])


def test_a_row_looked_up_often_is_scaled_once(target):
    weight = torch.full((2, 4), 8.0, device=target.device)
    embedding(torch.zeros(3073, dtype=torch.int64, device=target.device), weight, max_norm=4.0)
    assert torch.allclose(weight[0].norm().cpu(), torch.tensor(4.0), rtol=1e-6)
    assert weight[1].eq(8).all()


@INT16_KEYS
@pytest.mark.parametrize("bad", [False, True])
def test_rows_that_int16_holds_as_negative_keys(target, num_embeddings, bad):
    """Of the narrow keys too one that is none comes last, and stops the call."""
    weight = torch.full((num_embeddings, 1), 8.0, device=target.device)
    indices = ids_around_the_middle(num_embeddings, target.device)
    indices[3] = num_embeddings if bad else 0
    with gpu_embed.set_bounds_check("off"):
        embedding(indices, weight, max_norm=4.0)
    changed = weight.lt(5).flatten().nonzero().flatten()
    assert torch.equal(changed, indices.new_empty(0) if bad else indices.unique())


@pytest.mark.parametrize("view", [lambda w: w.t(), lambda w: w[::2], lambda w: w[:, 1::2]])
def test_strided_tables_are_scaled_in_place(target, view):
    whole = table(8, 8, torch.float32, target.device)
    theirs = whole.cpu().clone()
    indices = torch.tensor([1, 3, 1], device=target.device)
    embedding(indices, view(whole), max_norm=2.0)
    torch.nn.functional.embedding(indices.cpu(), view(theirs), max_norm=2.0)
    assert torch.allclose(whole.cpu(), theirs, rtol=tolerance(torch.float32, 8), atol=0)


def test_complex_tables(target):
    weight = table(4, 3, torch.complex64, target.device)
    theirs = weight.cpu().clone()
    indices = torch.tensor([1, 3, 1], device=target.device)
    embedding(indices, weight, max_norm=2.0)
    torch.nn.functional.embedding(indices.cpu(), theirs, max_norm=2.0)
    assert torch.allclose(weight.cpu(), theirs, rtol=tolerance(torch.float32, 3), atol=0)


def test_the_version_counter_moves(target):
    """As torch: autograd sees that the table was changed in place."""
    weight = table(4, 3, torch.float32, target.device).requires_grad_()
    version = weight._version
    output = embedding(torch.tensor([1], device=target.device), weight, max_norm=0.5)
    assert weight._version > version
    output.sum().backward()
    assert weight.grad[1].eq(1).all()


def test_a_stale_use_of_the_table_is_noticed(target):
    """torch's rule: what was saved for backward must not be renormed in between."""
    weight = table(4, 3, torch.float32, target.device).requires_grad_()
    stale = (weight * weight).sum()
    embedding(torch.tensor([1], device=target.device), weight, max_norm=0.5)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        stale.backward()


def test_an_id_out_of_range_leaves_the_table_untouched(target):
    """Bounds: no row is scaled by a call that fails."""
    weight = table(4, 3, torch.float32, target.device)
    before = weight.clone()
    indices = torch.tensor([0, 4, 1], device=target.device)
    if target.device == "cpu":
        with pytest.raises(IndexError, match="id 4 at flat position 1"):
            embedding(indices, weight, max_norm=0.5)
    else:
        embedding(indices, weight, max_norm=0.5)
        with pytest.raises(IndexError, match="id 4"):
            gpu_embed.check_bounds()
    assert torch.equal(weight, before)


@pytest.mark.parametrize("norm_type", [float("inf"), float("-inf"), 1.0, 2.0, 0.5])
def test_a_row_with_a_nan_has_no_norm_and_stays(target, norm_type):
    """As torch: as in torch, NaN exceeds nothing."""
    weight = torch.tensor([[float("nan"), 100.0, 1.0]] * 2, device=target.device)
    before = weight.clone()
    indices = torch.tensor([0], device=target.device)
    embedding(indices, weight, max_norm=1.0, norm_type=norm_type)
    assert torch.equal(weight.view(torch.int32), before.view(torch.int32))


def test_columns_that_share_memory_are_refused(target):
    """As torch: torch's error, since one number cannot be scaled once a column."""
    weight = torch.ones(4, 1, device=target.device).expand(4, 3)
    with pytest.raises(RuntimeError, match="unsupported operation: more than one element"):
        embedding(torch.tensor([1], device=target.device), weight, max_norm=0.5)
    assert weight.eq(1).all()
