"""torch's own samples of the function and the layer, replayed against ours.

They ship with torch: OpInfo for `nn.functional.embedding` and `nn.functional.embedding_bag`, ModuleInfo for
`nn.Embedding` (it has none for `nn.EmbeddingBag`).
"""

import functools

import pytest
import torch
import torch.nn.functional as F
from cases import integer_gradient
from torch.autograd import gradcheck, gradgradcheck

import gpu_embed

# torch.testing._internal compiles with it.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")

OP_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
MODULE_DTYPES = (torch.float64, torch.float32)


def dtype_name(value):
    return str(value).removeprefix("torch.")


def import_infos(module, name):
    """One of torch's lists of samples; imported late, as a machine may lack what it needs."""
    pytest.importorskip(
        "expecttest", reason="torch.testing._internal, where the samples live, needs expecttest"
    )
    return getattr(pytest.importorskip(f"torch.testing._internal.{module}"), name)


@pytest.fixture(scope="module")
def op_info():
    infos = import_infos("common_methods_invocations", "op_db")
    (info,) = (info for info in infos if info.name == "nn.functional.embedding")
    return info


@pytest.fixture(scope="module")
def module_info():
    infos = import_infos("common_modules", "module_db")
    (info,) = (info for info in infos if info.name == "nn.Embedding")
    return info


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def op_samples(info, device, dtype, requires_grad=False):
    """weight, ids and the other arguments of every sample."""
    for sample in info.sample_inputs(device, dtype, requires_grad):
        (ids,) = sample.args
        yield sample.input, ids, sample.kwargs


def renorm_bound(renormed, dtype):
    """How far a row scaled in the accumulation dtype and rounded once may lie from the exact one.

    D additions, D squares, the root, the division and the product each round once; then the result does.
    """
    accumulated = torch.finfo(torch.promote_types(dtype, torch.float32)).eps
    relative = (2 * renormed.shape[1] + 4) * accumulated + torch.finfo(dtype).eps
    return renormed.abs() * relative


def scaled_gradient_bound(ids, grad_output, expected):
    """How far a gradient divided by the counts may lie from the exact one: count products and sums."""
    dtype = grad_output.dtype
    accumulated = torch.finfo(torch.promote_types(dtype, torch.float32)).eps
    total = torch.ops.aten.embedding_dense_backward(
        grad_output.double().abs(), ids, len(expected), -1, True
    )
    return total * (2 * ids.numel() + 1) * accumulated + expected.abs() * torch.finfo(dtype).eps


def quick(target):
    """One random projection instead of every entry of the Jacobian where kernels run at 10 ms each."""
    return {"fast_mode": str(target) == "triton-cpu"}


def test_dtypes_are_those_of_the_samples(op_info, module_info):
    assert op_info.supported_dtypes("cpu") == set(OP_DTYPES)
    assert op_info.supported_dtypes("cuda") == set(OP_DTYPES)
    assert set(module_info.dtypes) == set(MODULE_DTYPES)


@pytest.mark.parametrize("dtype", OP_DTYPES, ids=dtype_name)
def test_forward(target, op_info, dtype):
    """Exact copy: bit-equal to torch's rows; as torch: no argument is ignored."""
    for weight, ids, kwargs in op_samples(op_info, target.device, dtype):
        ours, exact = weight.clone(), weight.to(torch.float64, copy=True)
        output = gpu_embed.functional.embedding(ids, ours, **kwargs)
        F.embedding(ids, exact, **kwargs)  # renormalises
        if "max_norm" in kwargs:
            assert not torch.equal(ours, weight)
            assert ((ours.double() - exact).abs() <= renorm_bound(exact, dtype)).all()
        else:
            assert torch.equal(ours, weight)
        kwargs.pop("max_norm", None)
        assert torch.equal(output, F.embedding(ids, ours, **kwargs))
        assert output.is_contiguous()


@pytest.mark.parametrize("dtype", OP_DTYPES, ids=dtype_name)
def test_gradient(target, op_info, dtype):
    """Accumulation: the fp64 gradient, rounded once."""
    for weight, ids, kwargs in op_samples(op_info, target.device, dtype):
        exact = weight.to(torch.float64, copy=True).requires_grad_()
        ours = weight.requires_grad_()
        output = gpu_embed.functional.embedding(ids, ours, **kwargs)
        expected_output = F.embedding(ids, exact, **kwargs)
        grad_output = integer_gradient(tuple(output.shape), output.dtype, target.device)
        if kwargs.get("sparse") and kwargs.get("scale_grad_by_freq"):
            with pytest.raises(RuntimeError) as theirs:
                expected_output.backward(grad_output.double())
            with pytest.raises(type(theirs.value)) as raised:
                output.backward(grad_output)
            assert str(raised.value) == str(theirs.value)
            continue
        output.backward(grad_output)
        expected_output.backward(grad_output.double())
        assert ours.grad.dtype == dtype
        if kwargs.get("sparse"):
            assert not ours.grad.is_coalesced()
            assert torch.equal(ours.grad._indices(), exact.grad._indices())
            assert torch.equal(ours.grad._values().double(), exact.grad._values())
        elif kwargs.get("scale_grad_by_freq"):
            bound = scaled_gradient_bound(ids, grad_output, exact.grad)
            assert ((ours.grad.double() - exact.grad).abs() <= bound).all()
        else:
            assert torch.equal(ours.grad.double(), exact.grad)


def test_gradcheck(target, op_info):
    """Reverse and forward mode, one gradient at a time and a batch of them."""
    for weight, ids, kwargs in op_samples(op_info, target.device, torch.float64, True):
        assert gradcheck(
            lambda w, ids=ids, kwargs=kwargs: gpu_embed.functional.embedding(ids, w, **kwargs),
            (weight,),
            check_forward_ad=True,
            check_batched_grad=True,
            check_batched_forward_grad=True,
            **quick(target),
        )


def test_gradgradcheck(target, op_info):
    """Reverse over reverse, batched too, and forward over reverse."""
    for weight, ids, kwargs in op_samples(op_info, target.device, torch.float64, True):
        assert gradgradcheck(
            lambda w, ids=ids, kwargs=kwargs: gpu_embed.functional.embedding(ids, w, **kwargs),
            (weight,),
            check_fwd_over_rev=True,
            check_batched_grad=True,
            # Every entry of this Jacobian would be some 10,000 runs of each kernel.
            fast_mode=True,
        )


def test_error_inputs(target, op_info):
    """As torch: torch's type and wording."""
    if op_info.error_inputs_func is None:
        pytest.skip("this torch has no error inputs for the function")
    errors = list(op_info.error_inputs(target.device))
    assert errors
    for error in errors:
        sample = error.sample_input
        with pytest.raises(error.error_type, match=error.error_regex):
            gpu_embed.functional.embedding(*sample.args, sample.input, **sample.kwargs)


def layers(info, device, dtype):
    """For every sample our layer, torch's with the same table, and the ids."""
    for sample in info.module_inputs_func(info, device, dtype, requires_grad=True, training=True):
        arguments = sample.constructor_input
        ours, theirs = (
            layer(*arguments.args, **arguments.kwargs, device=device, dtype=dtype)
            for layer in (gpu_embed.Embedding, torch.nn.Embedding)
        )
        ours.load_state_dict(theirs.state_dict())
        (ids,) = sample.forward_input.args
        yield ours, theirs, ids


@pytest.mark.parametrize("dtype", MODULE_DTYPES, ids=dtype_name)
def test_module_forward_and_gradient(target, module_info, dtype):
    for ours, theirs, ids in layers(module_info, target.device, dtype):
        output, expected = ours(ids), theirs(ids)
        assert torch.equal(output, expected)
        grad_output = integer_gradient(tuple(output.shape), output.dtype, target.device)
        output.backward(grad_output)
        expected.backward(grad_output)
        assert torch.equal(ours.weight.grad, theirs.weight.grad)


def test_module_gradcheck(target, module_info):
    for ours, _, ids in layers(module_info, target.device, torch.float64):

        def forward(weight, layer=ours, ids=ids[..., :8]):
            return torch.func.functional_call(layer, {"weight": weight}, (ids,))

        weight = ours.weight.detach().requires_grad_()
        assert gradcheck(forward, (weight,), check_forward_ad=True, **quick(target))
        assert gradgradcheck(forward, (weight,), fast_mode=True)


def test_module_error_inputs(target, module_info):
    """As torch: torch's type and wording, at construction and at the call."""
    if module_info.module_error_inputs_func is None:
        pytest.skip("this torch has no error inputs for the layer")
    errors = module_info.module_error_inputs_func(
        module_info, target.device, torch.float32, requires_grad=True, training=True
    )
    assert errors
    for error in errors:
        arguments = error.module_error_input.constructor_input
        build = functools.partial(gpu_embed.Embedding, *arguments.args, **arguments.kwargs)
        if error.error_on.name == "CONSTRUCTION_ERROR":
            with pytest.raises(error.error_type, match=error.error_regex):
                build(device=target.device)
        else:
            layer = build(device=target.device)
            with pytest.raises(error.error_type, match=error.error_regex):
                layer(*error.module_error_input.forward_input.args)


@pytest.fixture(scope="module")
def bag_samples():
    """A function that yields weight, ids and the other arguments of every sample."""
    infos = import_infos("common_methods_invocations", "op_db")
    (info,) = (info for info in infos if info.name == "nn.functional.embedding_bag")
    assert info.supported_dtypes("cpu") == set(OP_DTYPES)
    assert info.supported_dtypes("cuda") == set(OP_DTYPES)

    def samples(device, dtype, requires_grad=False):
        return op_samples(info, device, dtype, requires_grad)

    return samples


def bag_leaves(weight, kwargs, dtype):
    """The table, the weights of samples or None, and the arguments with them."""
    weight = weight.detach().to(dtype, copy=True).requires_grad_()
    weights = kwargs.get("per_sample_weights")
    if weights is not None:
        weights = weights.detach().to(dtype, copy=True).requires_grad_()
    return weight, weights, {**kwargs, "per_sample_weights": weights}


def bag_bound(ids, weight, *, grad_output, mode, **kwargs):
    """How far a result may lie from the exact one: the roundings of its terms, of magnitudes in a sum.

    At most 25 terms of three roundings each in the accumulation dtype, and one rounding of the result.

    Returns:
        Bounds for the output, the table's gradient, and that of the weights of samples, if there are any.
    """
    dtype = grad_output.dtype
    weight, weights, kwargs = bag_leaves(weight.abs(), kwargs, torch.float64)
    leaves = [weight]
    if weights is not None:
        leaves.append(weights.detach().abs().requires_grad_())
        kwargs["per_sample_weights"] = leaves[1]
    # Where one value is taken out of many, the sum of them all bounds it.
    output = F.embedding_bag(ids, weight, mode="sum" if mode == "max" else mode, **kwargs)
    output.backward(grad_output.double().abs())
    eps = 75 * torch.finfo(torch.promote_types(dtype, torch.float32)).eps + torch.finfo(dtype).eps
    return [eps * total for total in (output.detach(), *(leaf.grad for leaf in leaves))]


@pytest.mark.parametrize("dtype", OP_DTYPES, ids=dtype_name)
def test_bags_forward_and_gradient(target, bag_samples, dtype):
    """Accumulation: the fp64 results, rounded; as torch: no argument is ignored."""
    for sample, ids, kwargs in bag_samples(target.device, dtype):
        ours, our_weights, our_kwargs = bag_leaves(sample, kwargs, dtype)
        output = gpu_embed.functional.embedding_bag(ids, ours, **our_kwargs)
        # The table as max_norm has left it.
        exact, exact_weights, exact_kwargs = bag_leaves(ours, kwargs, torch.float64)
        if exact_kwargs.pop("max_norm", None) is not None:
            assert not torch.equal(ours, sample)
        # torch's CPU kernel divides by the count of another id.
        scaled = exact_kwargs.pop("scale_grad_by_freq", False)
        sparse = exact_kwargs.pop("sparse", False)
        expected = F.embedding_bag(ids, exact, **exact_kwargs)
        grad_output = integer_gradient(tuple(output.shape), dtype, target.device)
        if scaled and sparse:
            with pytest.raises(RuntimeError, match="scale_grad_by_freq not supported with sparse"):
                output.backward(grad_output)
            continue
        output.backward(grad_output)
        expected.backward(grad_output.double())
        if scaled:
            exact.grad /= ids.flatten().bincount(minlength=len(exact)).clamp(min=1)[:, None]
        assert ours.grad.is_sparse == sparse
        results = [(output, expected), (ours.grad.to_dense(), exact.grad)]
        if exact_weights is not None:
            results.append((our_weights.grad, exact_weights.grad))
        bounds = bag_bound(ids, ours, grad_output=grad_output, **exact_kwargs)
        for (found, right), bound in zip(results, bounds, strict=True):
            assert found.dtype == dtype
            assert ((found.double() - right).abs() <= bound).all()


def test_bags_gradcheck(target, bag_samples):
    """Reverse and forward mode, and of second order, which torch's bags do not have."""
    samples = list(bag_samples(target.device, torch.float64, True))
    # In Triton's interpreter 8 of 32: sums, weighted ones, means and maxima, with offsets and without.
    for sample, ids, kwargs in samples[:: 4 if str(target) == "triton-cpu" else 1]:
        weight, weights, kwargs = bag_leaves(sample, kwargs, torch.float64)
        leaves = (weight,) if weights is None else (weight, weights)

        def bags(weight, weights=None, ids=ids, kwargs=kwargs):
            arguments = {**kwargs, "per_sample_weights": weights}
            return gpu_embed.functional.embedding_bag(ids, weight, **arguments)

        assert gradcheck(bags, leaves, check_forward_ad=True, fast_mode=True)
        assert gradgradcheck(bags, leaves, fast_mode=True)
