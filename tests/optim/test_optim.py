"""gpu_embed.optim: torch's optimizers as the yardstick, and torch's Optimizer as the interface."""

import copy
import functools
import gc
import io
import math
import pickle
import warnings
import weakref

import pytest
import torch
from cases import ids, integer_gradient, same_bits, table

import gpu_embed
from gpu_embed import Embedding, optim

# Torch's own, and Triton's interpreter's, which computes what is masked too.
pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{message}")
    for message in (
        "Sparse invariant checks are implicitly disabled",
        "Using backward.. with create_graph=True",
        "divide by zero encountered in divide",
        "invalid value encountered in (divide|multiply)",
    )
]

CLASSES = {
    "SGD": optim.SGD,
    "SGD, momentum": functools.partial(
        optim.SGD, momentum=0.9, dampening=0.3, decay_touched_rows=0.1
    ),
    "SGD, nesterov": functools.partial(optim.SGD, momentum=0.9, nesterov=True),
    "Adagrad": optim.Adagrad,
    "RowWiseAdagrad": optim.RowWiseAdagrad,
    "RowWiseAdagrad, decay": functools.partial(optim.RowWiseAdagrad, decay_touched_rows=0.1),
    "Adam": optim.Adam,
    "AdamW": optim.AdamW,
}
every_class = pytest.mark.parametrize("optimizer_class", CLASSES.values(), ids=CLASSES)


def sparse_table(num_embeddings=6, embedding_dim=4, dtype=torch.float32, device="cpu"):
    """A table as a parameter, seeded."""
    return torch.nn.Parameter(table(num_embeddings, embedding_dim, dtype, device))


def give_gradient(param, indices, values):
    """What sparse=True would have left in .grad: uncoalesced, ids in input order."""
    indices = torch.as_tensor(indices, device=param.device)[None]
    param.grad = torch.sparse_coo_tensor(indices, values.to(param), param.shape)


def steps_of(num_steps, param):
    """Ids and integer gradients of each step; a few rows in some of them, rows repeated."""
    num_embeddings, embedding_dim = param.shape
    for step in range(num_steps):
        indices = ids("zipf", 9 + step, num_embeddings, param.device)
        values = integer_gradient((9 + step, embedding_dim), param.dtype, param.device)
        yield indices, 2 * values + 1  # odd, so that no row's squares sum to 0


def train(param, optimizer, num_steps=3):
    for indices, values in steps_of(num_steps, param):
        give_gradient(param, indices, values)
        optimizer.step()
    return param


# Against torch's optimizers.


def many_steps(target):
    """The kernels' bits are the reference's, and Triton's interpreter is slow."""
    return 2 if target.backend == "triton" and target.device == "cpu" else 20


@pytest.mark.parametrize("maximize", [False, True])
def test_sgd_is_torchs_bit_for_bit(target, maximize):
    """Weights and gradients are integers and lr a power of two, so every step is exact."""
    ours = torch.nn.Parameter(integer_gradient((6, 4), torch.float32, target.device))
    theirs = copy.deepcopy(ours)
    train(ours, optim.SGD([ours], lr=0.5, maximize=maximize), 2)
    train(theirs, torch.optim.SGD([theirs], lr=0.5, maximize=maximize), 2)
    assert torch.equal(ours, theirs)


# Ours, torch's, and what both take.
TORCH_TWINS = {
    "Adagrad": (optim.Adagrad, torch.optim.Adagrad, {"lr": 0.1}),
    "Adagrad, every argument": (
        optim.Adagrad,
        torch.optim.Adagrad,
        {"lr": 0.1, "lr_decay": 0.3, "initial_accumulator_value": 0.7, "eps": 0.01, "maximize": True},
    ),
    "Adam": (optim.Adam, torch.optim.SparseAdam, {}),
    "Adam, every argument": (
        optim.Adam,
        torch.optim.SparseAdam,
        {"lr": 0.1, "betas": (0.8, 0.95), "eps": 0.01, "maximize": True},
    ),
}  # fmt: skip


@pytest.mark.parametrize(("ours", "theirs", "arguments"), TORCH_TWINS.values(), ids=TORCH_TWINS)
def test_many_steps_end_where_torchs_end(target, ours, theirs, arguments):
    """In fp64, over 20 steps of lr <= 0.1.

    A step rounds its state up to 4 times, each relative to its size, and the quotient and w 3 times more, in
    either implementation: 2**4 roundings of 2**-53. A summed gradient is odd or even up to 28 * 5 < 2**8, so a
    step moves w by less than 2**8 * lr < 2**5, which bounds what is rounded.
    """
    tables = []
    for optimizer_class in (ours, theirs):
        param = sparse_table(7, 5, torch.float64, target.device)
        train(param, optimizer_class([param], **arguments), many_steps(target))
        tables.append(param.detach())
    assert (tables[0] - tables[1]).abs().max() <= 20 * 2**4 * 2.0**-53 * 2**5
    assert not torch.equal(tables[0], table(7, 5, torch.float64, target.device))


def test_adam_keeps_the_moments_of_rows_without_a_gradient(target):
    """SparseAdam's rule, by hand: the second step corrects by its own number, and touches row 1 alone."""
    param = torch.nn.Parameter(torch.zeros(3, 1, device=target.device))
    optimizer = optim.Adam([param], lr=0.25, betas=(0.5, 0.75), eps=0)
    give_gradient(param, [0, 1], torch.tensor([[2.0], [4.0]]))
    optimizer.step()
    # avg = g / 2, root = |g| / 2, lr * sqrt(1 / 4) / (1 / 2) = lr: a step of lr, exactly.
    assert param[:, 0].tolist() == [-0.25, -0.25, 0]
    give_gradient(param, [1], torch.tensor([[0.0]]))
    optimizer.step()
    state = optimizer.state[param]
    assert state["exp_avg"][:, 0].tolist() == [1, 1, 0]
    assert state["exp_avg_sq"][:, 0].tolist() == [1, 3, 0]
    assert param[0].item() == -0.25
    move = 0.25 * math.sqrt(1 - 0.75**2) / (1 - 0.5**2) / math.sqrt(3)
    assert abs(param[1].item() + 0.25 + move) <= 2**-23


# What ours takes in place of torch's weight_decay.
DECAY = {"weight_decay": "decay_touched_rows"}


def step_both(ours, theirs, grad):
    """One step each on the only table, by a gradient of every row: sparse for ours, dense for torch's."""
    for optimizer in (ours, theirs):
        (param,) = optimizer.param_groups[0]["params"]
        if optimizer is ours:
            give_gradient(param, torch.arange(len(grad)), grad)
        else:
            param.grad = grad.clone()
        optimizer.step()


def both(ours, theirs, param, **arguments):
    """An optimizer of ours and one of torch's, each on a copy of the table."""
    tables = [torch.nn.Parameter(param.detach().clone()) for _ in range(2)]
    ours = ours([tables[0]], **{DECAY.get(name, name): x for name, x in arguments.items()})
    return (ours, theirs([tables[1]], **arguments)), tables


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize(
    "arguments",
    [
        {"weight_decay": 0.5},
        {"momentum": 0.5},
        {"momentum": 0.5, "nesterov": True},
        {"momentum": 0.5, "dampening": 0.25},
        {"momentum": 0.5, "dampening": 0.5, "weight_decay": 0.5},
        {"momentum": 0.5, "nesterov": True, "weight_decay": 0.5},
    ],
    ids=str,
)
def test_sgd_is_torchs_dense_one_where_every_row_has_a_gradient(target, arguments, maximize, dtype):
    """Bit for bit: small integers and powers of two, so that in three steps nothing is rounded."""
    param = integer_gradient((6, 4), dtype, target.device)
    optimizers, tables = both(
        optim.SGD, torch.optim.SGD, param, lr=0.5, maximize=maximize, **arguments
    )
    for step in range(3):
        step_both(*optimizers, integer_gradient((6, 4), dtype, target.device).roll(step, 0))
        assert torch.equal(*tables)
    assert not torch.equal(tables[0], param)


@pytest.mark.parametrize("name", ["momentum", "nesterov", "Adagrad"])
def test_decay_and_momentum_of_any_size_are_torchs(target, name):
    """In fp64, over 20 steps of lr <= 0.1.

    Gradients of at most 5 and decay of at most 2**3 make a buffer below 2**4 / (1 - 0.9) < 2**8, and a weight below
    20 * 0.1 * 2 * 2**8 = 2**10. A step rounds at most 2**4 times, and a buffer hands an error on for 10 < 2**4 steps.
    """
    ours, theirs, arguments = {
        "momentum": (optim.SGD, torch.optim.SGD, {"momentum": 0.9, "dampening": 0.3}),
        "nesterov": (optim.SGD, torch.optim.SGD, {"momentum": 0.9, "nesterov": True}),
        "Adagrad": (optim.Adagrad, torch.optim.Adagrad, {"lr_decay": 0.1}),
    }[name]
    param = table(6, 4, torch.float64, target.device)
    optimizers, tables = both(ours, theirs, param, lr=0.1, weight_decay=0.2, **arguments)
    for step in range(many_steps(target)):
        grad = 2 * integer_gradient((6, 4), torch.float64, target.device).roll(step, 0) + 1
        step_both(*optimizers, grad)
    assert (tables[0] - tables[1]).abs().max() <= 20 * 2**4 * 2**4 * 2.0**-53 * 2**10


def test_rows_without_a_gradient_keep_their_momentum_and_do_not_move(target):
    """By hand: momentum 0.5, a dampening of 0.25 from the second step on, and a decay of 1/2."""
    param = torch.nn.Parameter(torch.full((3, 1), 8.0, device=target.device))
    optimizer = optim.SGD([param], lr=1.0, momentum=0.5, dampening=0.25, decay_touched_rows=0.5)
    give_gradient(param, [0, 1, 1], torch.tensor([[4.0], [1.0], [3.0]]))
    optimizer.step()
    # g = 4 + 8 / 2, all of which is the first momentum_buffer.
    assert optimizer.state[param]["momentum_buffer"][:, 0].tolist() == [8, 8, 0]
    assert param[:, 0].tolist() == [0, 0, 8]
    give_gradient(param, [1, 2], torch.tensor([[4.0], [0.0]]))
    optimizer.step()
    # Row 1: 8 / 2 + 3/4 * 4. Row 2: 3/4 * (0 + 8 / 2), dampened, though its first gradient.
    assert optimizer.state[param]["momentum_buffer"][:, 0].tolist() == [8, 7, 3]
    assert param[:, 0].tolist() == [0, -7, 5]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"momentum": 0.9, "dampening": 0.3}, True),
        ({"momentum": 0.9}, False),
        ({"dampening": 0.3}, False),
    ],
)
def test_steps_with_dampening_are_not_captured(arguments, expected):
    """A CUDA graph must not replay the first one, which is not dampened."""
    optimizer = optim.SGD([sparse_table()], **arguments)
    assert optimizer._depends_on_step(optimizer.param_groups[0]) is expected


def test_groups_with_and_without_momentum():
    """Each table has the state of its own group's formula, and so it is saved and loaded."""
    params = [sparse_table() for _ in range(3)]
    groups = [
        {"params": params[:1]},
        {"params": params[1:2], "momentum": 0.5},
        {"params": params[2:], "momentum": 0.5, "nesterov": True},
    ]
    optimizer = optim.SGD(groups, lr=0.5)
    for param in params:
        train(param, optimizer, 1)
        param.grad = None
    keys = [set(optimizer.state[param]) for param in params]
    assert keys == [{"step"}, {"step", "momentum_buffer"}, {"step", "momentum_buffer"}]
    twins = copy.deepcopy(params)
    fresh = optim.SGD([{"params": [twin]} for twin in twins])
    fresh.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert [set(fresh.state[twin]) for twin in twins] == keys
    for param, twin in zip(params, twins, strict=True):
        train(param, optimizer, 2)
        train(twin, fresh, 2)
        assert torch.equal(param, twin)
        param.grad = twin.grad = None
    assert not torch.equal(params[0], params[1])
    assert not torch.equal(params[1], params[2])


def test_momentum_in_backward():
    layer = Embedding.from_pretrained(torch.zeros(3, 1), freeze=False, sparse=True)
    updates = optim.apply_in_backward(layer, optim.SGD, lr=1.0, momentum=0.5)
    for _ in range(2):
        layer(torch.tensor([1, 1])).sum().backward()
    assert layer.weight[:, 0].tolist() == [0, -5, 0]
    assert updates.optimizer.state[layer.weight]["momentum_buffer"][:, 0].tolist() == [0, 3, 0]


def test_adamw_is_torchs_where_every_row_has_a_gradient(target):
    """The bound is that of `test_many_steps_end_where_torchs_end`."""
    arguments = {"lr": 0.1, "betas": (0.8, 0.95), "eps": 0.01, "weight_decay": 0.3}
    ours = sparse_table(6, 4, torch.float64, target.device)
    theirs = copy.deepcopy(ours)
    mine, reference = optim.AdamW([ours], **arguments), torch.optim.AdamW([theirs], **arguments)
    for step in range(many_steps(target)):
        grad = 2 * integer_gradient((6, 4), torch.float64, target.device).roll(step, 0) + 1
        give_gradient(ours, torch.arange(6), grad)
        theirs.grad = grad
        mine.step()
        reference.step()
    assert (ours - theirs).abs().max() <= 20 * 2**4 * 2.0**-53 * 2**5


def test_adamw_decays_the_rows_with_a_gradient_alone(target):
    param = torch.nn.Parameter(torch.full((4, 2), 8.0, device=target.device))
    optimizer = optim.AdamW([param], lr=0.5, weight_decay=0.25)
    give_gradient(param, [2], torch.zeros(1, 2))
    optimizer.step()
    assert param[:, 1].tolist() == [8, 8, 7, 8]


def test_rowwise_adagrad_divides_by_the_rows_root_mean_square(target):
    """FBGEMM's formula by hand: entries 3 and 3, 3 and -3 have the mean square 9, then 9 + 16 = 25."""
    param = torch.nn.Parameter(torch.zeros(3, 2, device=target.device))
    optimizer = optim.RowWiseAdagrad([param], lr=15.0, eps=0.0)
    give_gradient(param, [1, 1], torch.tensor([[1.0, -5.0], [2.0, 2.0]]))
    optimizer.step()
    assert param.tolist() == [[0, 0], [-15, 15], [0, 0]]
    give_gradient(param, [1, 0], torch.tensor([[4.0, 4.0], [8.0, 0.0]]))
    optimizer.step()
    assert optimizer.state[param]["sum"].tolist() == [32, 25, 0]
    assert param[1].tolist() == [-27, 3]


@every_class
def test_bf16_tables_are_rounded_once(target, optimizer_class):
    """One step from the same numbers: fp32 arithmetic, and one rounding to nearest."""
    narrow = sparse_table(6, 4, torch.bfloat16, target.device)
    wide = torch.nn.Parameter(narrow.detach().float())
    train(narrow, optimizer_class([narrow], lr=0.1), 1)
    train(wide, optimizer_class([wide], lr=0.1), 1)
    assert same_bits(narrow.detach(), wide.detach().bfloat16())


# Where gradients come from.


@every_class
def test_a_layer_trains(target, optimizer_class):
    """sparse=True, padding, two lookups under one backward: what the sum of the gradients gives."""
    layer = Embedding.from_pretrained(
        table(8, 3, torch.float32, target.device), freeze=False, padding_idx=2, sparse=True
    )
    twin = torch.nn.Parameter(layer.weight.detach().clone())
    optimizer, expected = optimizer_class(layer.parameters()), optimizer_class([twin])
    first, second = (torch.tensor(x, device=target.device) for x in ([[5, 2], [5, 0]], [0, 7]))
    (layer(first).sum() + 2 * layer(second).sum()).backward()
    assert not layer.weight.grad.is_coalesced()
    optimizer.step()
    give_gradient(twin, [5, 0, 7], torch.tensor([[2.0], [3.0], [2.0]]).expand(3, 3))
    expected.step()
    assert torch.equal(layer.weight, twin)
    optimizer.zero_grad()
    assert layer.weight.grad is None


@every_class
def test_coalesced_and_accumulated_gradients_are_the_same(optimizer_class):
    tables = []
    for coalesced in (False, True):
        layer = Embedding.from_pretrained(
            table(8, 3, torch.float32, "cpu"), freeze=False, sparse=True
        )
        optimizer = optimizer_class(layer.parameters())
        for indices in ([1, 1, 3], [3, 5]):
            layer(torch.tensor(indices)).sum().backward()
        assert layer.weight.grad._nnz() > 3
        if coalesced:
            layer.weight.grad = layer.weight.grad.coalesce()
        optimizer.step()
        tables.append(layer.weight.detach())
    assert torch.equal(*tables)


@every_class
def test_an_empty_gradient_counts_as_a_step_and_changes_nothing(optimizer_class):
    param = sparse_table()
    before = param.detach().clone()
    optimizer = optimizer_class([param])
    give_gradient(param, torch.empty(0, dtype=torch.int64), torch.empty(0, 4))
    optimizer.step()
    assert torch.equal(param, before)
    assert optimizer.state[param]["step"] == 1


@every_class
@pytest.mark.parametrize("shape", [(0, 3), (3, 0)])
def test_tables_without_elements(optimizer_class, shape):
    param = torch.nn.Parameter(torch.empty(shape))
    optimizer = optimizer_class([param])
    indices = torch.zeros(1, min(shape[0], 1), dtype=torch.int64)
    param.grad = torch.sparse_coo_tensor(indices, torch.empty(indices.shape[1], shape[1]), shape)
    optimizer.step()


@every_class
def test_dense_gradients_are_refused(optimizer_class):
    param = sparse_table()
    param.grad = torch.ones_like(param)
    with pytest.raises(RuntimeError, match=r"does not support dense gradients.*sparse=True"):
        optimizer_class([param]).step()


def test_gradients_sparse_in_both_dimensions_are_refused():
    param = sparse_table()
    param.grad = torch.ones_like(param).to_sparse()
    with pytest.raises(RuntimeError, match="2 sparse dimensions"):
        optim.SGD([param]).step()


def test_parameters_without_a_gradient_are_left_alone():
    params = [sparse_table(), sparse_table()]
    optimizer = optim.Adam(params)
    train(params[0], optimizer, 1)
    assert torch.equal(params[1], sparse_table())
    assert params[1] not in optimizer.state


# torch's Optimizer.

WRONG = {
    "lr": (optim.SGD, {"lr": -1.0}, "Invalid learning rate: -1.0"),
    "lr NaN": (optim.Adam, {"lr": math.nan}, "Invalid learning rate: nan"),
    "lr of two": (optim.Adam, {"lr": torch.ones(2)}, "Tensor lr must be 1-element"),
    "lr_decay": (optim.Adagrad, {"lr_decay": -1.0}, "Invalid lr_decay value: -1.0"),
    "initial": (
        optim.RowWiseAdagrad,
        {"initial_accumulator_value": -1.0},
        "Invalid initial_accumulator_value value: -1.0",
    ),
    "eps": (optim.Adagrad, {"eps": -1.0}, "Invalid epsilon value: -1.0"),
    "Adam's eps": (optim.Adam, {"eps": -1.0}, "Invalid epsilon value: -1.0"),
    "beta1": (optim.Adam, {"betas": (1.0, 0.9)}, "Invalid beta parameter at index 0: 1.0"),
    "beta2": (optim.AdamW, {"betas": (0.9, -0.1)}, "Invalid beta parameter at index 1: -0.1"),
    "weight_decay": (optim.AdamW, {"weight_decay": -1.0}, "Invalid weight_decay value: -1.0"),
    "momentum": (optim.SGD, {"momentum": -0.5}, "Invalid momentum value: -0.5"),
    "nesterov alone": (
        optim.SGD,
        {"nesterov": True},
        "Nesterov momentum requires a momentum and zero dampening",
    ),
    "nesterov dampened": (
        optim.SGD,
        {"nesterov": True, "momentum": 0.9, "dampening": 0.1},
        "Nesterov momentum requires a momentum and zero dampening",
    ),
}


@pytest.mark.parametrize(("ours", "arguments", "message"), WRONG.values(), ids=WRONG)
def test_numbers_out_of_range_are_refused_in_torchs_words(ours, arguments, message):
    """torch's errors. Where torch has the class too, it says the same."""
    with pytest.raises(ValueError) as raised:
        ours([sparse_table()], **arguments)
    assert str(raised.value) == message
    theirs = getattr(torch.optim, ours.__name__, None)
    if theirs is not None:
        with pytest.raises(ValueError) as torchs:
            theirs([sparse_table()], **arguments)
        assert str(torchs.value) == message


@pytest.mark.parametrize("optimizer_class", [optim.SGD, optim.Adagrad, optim.RowWiseAdagrad])
@pytest.mark.parametrize("decay", [-0.1, math.nan])
def test_a_decay_out_of_range_is_refused(optimizer_class, decay):
    with pytest.raises(ValueError, match=f"Invalid decay_touched_rows value: {decay}"):
        optimizer_class([sparse_table()], decay_touched_rows=decay)


@every_class
@pytest.mark.parametrize("name", ["foreach", "fused", "capturable", "differentiable", "amsgrad"])
def test_unknown_arguments_are_refused(optimizer_class, name):
    with pytest.raises(TypeError, match=f"unexpected keyword argument '{name}'"):
        optimizer_class([sparse_table()], **{name: True})


@pytest.mark.parametrize(
    "param",
    [
        torch.zeros(3),
        torch.zeros(3, 2, 2),
        torch.zeros(3, 2, dtype=torch.complex64),
        torch.zeros(3, 2, dtype=torch.float8_e4m3fn),
        torch.zeros(3, 2).to_sparse(),
    ],
    ids=["1-D", "3-D", "complex", "8 bit", "sparse"],
)
def test_only_tables_are_taken(param):
    with pytest.raises(ValueError, match="SGD updates dense tables"):
        optim.SGD([param.requires_grad_()])
    optimizer = optim.SGD([sparse_table()])
    with pytest.raises(ValueError, match="SGD updates dense tables"):
        optimizer.add_param_group({"params": [param]})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize("seed", [-1, 2**62])
def test_a_seed_out_of_range_is_refused(seed):
    with pytest.raises(ValueError, match=f"Invalid seed: {seed}"):
        optim.SGD([sparse_table()], seed=seed)


def test_param_groups_have_numbers_of_their_own():
    fast, slow, added = (torch.nn.Parameter(torch.zeros(2, 1)) for _ in range(3))
    optimizer = optim.SGD([{"params": [fast], "lr": 1.0}, {"params": slow}], lr=0.5)
    optimizer.add_param_group({"params": [added], "maximize": True})
    for param in (fast, slow, added):
        give_gradient(param, [1], torch.ones(1, 1))
    optimizer.step()
    assert [param[1].item() for param in (fast, slow, added)] == [-1, -0.5, 0.5]


def test_named_parameters_are_taken():
    layer = Embedding(3, 2, sparse=True)
    optimizer = optim.SGD(layer.named_parameters())
    assert optimizer.param_groups[0]["param_names"] == ["weight"]
    assert optimizer.param_groups[0]["params"] == [layer.weight]


def test_a_closure_is_called_with_gradients_enabled():
    layer = Embedding.from_pretrained(torch.ones(3, 2), freeze=False, sparse=True)
    optimizer = optim.SGD(layer.parameters(), lr=0.5)

    def closure():
        optimizer.zero_grad()
        loss = layer(torch.tensor([1])).sum()
        loss.backward()
        return loss

    with torch.no_grad():
        assert optimizer.step(closure).item() == 2
    assert layer.weight[1].tolist() == [0.5, 0.5]


def test_zero_grad_to_zeros():
    param = sparse_table()
    optimizer = optim.Adam([param])
    train(param, optimizer, 1)
    before = param.detach().clone()
    optimizer.zero_grad(set_to_none=False)
    assert param.grad._nnz() == 0
    optimizer.step()
    assert torch.equal(param, before)


def test_hooks_run_around_a_step():
    param = sparse_table()
    optimizer = optim.SGD([param])
    seen = []
    optimizer.register_step_pre_hook(lambda *_: seen.append("pre"))
    optimizer.register_step_post_hook(lambda *_: seen.append("post"))
    train(param, optimizer, 1)
    assert seen == ["pre", "post"]


def test_a_step_is_a_change_in_place_that_autograd_notices(target):
    """torch's optimizers make a stale graph's backward an error, and so must kernels."""
    param = sparse_table(device=target.device)
    loss = (param**2).sum()
    train(param, optim.SGD([param]), 1)
    param.grad = None
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


SCHEDULERS = {
    "StepLR": lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5),
    "OneCycleLR": lambda optimizer: torch.optim.lr_scheduler.OneCycleLR(
        optimizer, 1.0, total_steps=4, cycle_momentum=False
    ),
    "OneCycleLR, momentum": lambda optimizer: torch.optim.lr_scheduler.OneCycleLR(
        optimizer, 1.0, total_steps=4, base_momentum=0.0, max_momentum=0.0
    ),
    "LambdaLR": lambda optimizer: torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: n / 4),
}


@pytest.mark.parametrize("scheduler", SCHEDULERS.values(), ids=SCHEDULERS)
@pytest.mark.parametrize("lr", [1.0, torch.tensor(1.0)], ids=["float", "tensor"])
def test_learning_rate_schedules(scheduler, lr):
    """The step of the n-th round is the lr of that round."""
    param = torch.nn.Parameter(torch.zeros(2, 1, dtype=torch.float64))
    optimizer = optim.SGD([param], lr=lr if isinstance(lr, float) else lr.clone())
    schedule = scheduler(optimizer)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            before, used = param[1].item(), float(optimizer.param_groups[0]["lr"])
            give_gradient(param, [1], torch.ones(1, 1))
            optimizer.step()
            assert param[1].item() == before - used
            schedule.step()


@every_class
def test_a_tensor_lr_is_the_number_it_holds(target, optimizer_class):
    """No host sync: a tensor on the table's device is read by the kernel, so nothing waits for it."""
    tables = []
    for lr in (0.125, torch.tensor(0.125, device=target.device), torch.tensor([0.125])):
        param = sparse_table(device=target.device)
        tables.append(train(param, optimizer_class([param], lr=lr), 1).detach())
    assert same_bits(tables[0], tables[1])
    assert same_bits(tables[0], tables[2])


# state_dict.


def state_of(optimizer):
    """The state of the only table."""
    ((_, state),) = optimizer.state.items()
    return state


@every_class
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_a_saved_optimizer_goes_on_in_a_fresh_one(optimizer_class, dtype):
    """Bit for bit, through torch.save: torch's own loading would round the state to bf16."""
    param = sparse_table(dtype=dtype)
    optimizer = optimizer_class([param], lr=0.3, stochastic_rounding=True, seed=3)
    train(param, optimizer, 2)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    twin = torch.nn.Parameter(param.detach().clone())
    fresh = optimizer_class([twin], lr=77.0)
    fresh.load_state_dict(torch.load(file, weights_only=True))
    assert state_of(fresh).keys() == state_of(optimizer).keys()
    for name, value in state_of(optimizer).items():
        loaded = state_of(fresh)[name]
        if isinstance(value, torch.Tensor):
            assert loaded.dtype == torch.promote_types(dtype, torch.float32)
            assert same_bits(loaded, value)
        else:
            assert loaded == value
    assert fresh.param_groups[0]["lr"] == 0.3
    assert same_bits(train(twin, fresh, 2).detach(), train(param, optimizer, 2).detach())


@pytest.mark.parametrize(("ours", "theirs", "arguments"), TORCH_TWINS.values(), ids=TORCH_TWINS)
def test_torchs_saved_optimizers_go_on_in_ours(ours, theirs, arguments):
    """The bound is that of `test_many_steps_end_where_torchs_end`."""
    param = sparse_table(dtype=torch.float64)
    optimizer = theirs([param], **arguments)
    train(param, optimizer, 2)
    twin = torch.nn.Parameter(param.detach().clone())
    fresh = ours([twin])
    fresh.load_state_dict(optimizer.state_dict())
    assert state_of(fresh)["step"] == 2
    # A copy, since torch's loading lets both optimizers share tensors.
    fresh.load_state_dict(copy.deepcopy(fresh.state_dict()))
    difference = train(twin, fresh, 3).detach() - train(param, optimizer, 3).detach()
    assert difference.abs().max() <= 3 * 2**4 * 2.0**-53 * 2**5


TORCH_LOADS = {
    "SGD": (optim.SGD, torch.optim.SGD),
    "Adagrad": (optim.Adagrad, torch.optim.Adagrad),
    "Adam": (optim.Adam, torch.optim.SparseAdam),
}


@pytest.mark.parametrize(("ours", "theirs"), TORCH_LOADS.values(), ids=TORCH_LOADS)
def test_our_saved_optimizers_go_on_in_torchs_and_back(ours, theirs):
    """The bound is that of `test_many_steps_end_where_torchs_end`."""
    param = sparse_table(dtype=torch.float64)
    optimizer = ours([param], lr=0.1)
    train(param, optimizer, 2)
    twin = torch.nn.Parameter(param.detach().clone())
    away, back = theirs([twin]), ours([twin])
    away.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(twin, away, 2)
    back.load_state_dict(copy.deepcopy(away.state_dict()))
    train(twin, back, 2)
    for _ in range(2):
        train(param, optimizer, 2)
    assert (twin - param).abs().max() <= 4 * 2**4 * 2.0**-53 * 2**5


@pytest.mark.parametrize(
    "arguments",
    [{"dampening": 0.25}, {"nesterov": True}, {"maximize": True}],
    ids=["dampening", "nesterov", "maximize"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_momentum_goes_from_torchs_sgd_to_ours_and_back(arguments, dtype):
    """Bit for bit, as in `test_sgd_is_torchs_dense_one_where_every_row_has_a_gradient`; a step each."""
    start = integer_gradient((6, 4), dtype, "cpu")
    grads = [start.roll(step + 1, 0) for step in range(3)]
    (_, whole), (_, expected) = both(
        optim.SGD, torch.optim.SGD, start, lr=0.5, momentum=0.5, **arguments
    )
    moving = torch.nn.Parameter(start.clone())
    optimizer = torch.optim.SGD([moving], lr=0.5, momentum=0.5, **arguments)
    for step, grad in enumerate(grads):
        expected.grad = grad.clone()
        whole.step()
        if step == 1:
            give_gradient(moving, torch.arange(6), grad)
        else:
            moving.grad = grad.clone()
        optimizer.step()
        assert torch.equal(moving, expected)
        other = optim.SGD([moving]) if step == 0 else torch.optim.SGD([moving])
        other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        optimizer = other


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_torchs_sparse_momentum_is_taken_over_as_a_dense_one(dtype):
    """Its entries of a row are summed; in fp32 of a bf16 table."""
    param = sparse_table(dtype=dtype)
    optimizer = torch.optim.SGD([param], momentum=0.5)
    give_gradient(param, [1, 4, 1], torch.tensor([[1.0], [2.0], [2.0**-9]]).expand(3, 4))
    optimizer.step()
    saved = optimizer.state_dict()
    assert saved["state"][0]["momentum_buffer"].is_sparse
    fresh = optim.SGD([param])
    fresh.load_state_dict(saved)
    buffer = state_of(fresh)["momentum_buffer"]
    assert buffer.dtype == torch.promote_types(dtype, torch.float32)
    assert buffer[:, 3].tolist() == [0, 1 + 2.0**-9, 0, 0, 2, 0]


def test_torchs_sgd_without_momentum_leaves_no_buffer():
    optimizer = optim.SGD([sparse_table()], momentum=0.5)
    optimizer.load_state_dict(trained(torch.optim.SGD).state_dict())
    assert optimizer.param_groups[0]["momentum"] == 0
    train(optimizer.param_groups[0]["params"][0], optimizer, 1)
    assert state_of(optimizer).keys() == {"step"}


def test_momentum_in_distributed_checkpoints():
    """`set_state_dict` makes the state by a step of zeros, and fills it."""
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    layers, optimizers = [], []
    for _ in range(2):
        layers.append(
            Embedding.from_pretrained(table(6, 4, torch.float32, "cpu"), freeze=False, sparse=True)
        )
        optimizers.append(optim.SGD(layers[-1].parameters(), lr=0.1, momentum=0.9, dampening=0.5))
    train(layers[0].weight, optimizers[0], 2)
    layers[0].weight.grad = None
    model, state = copy.deepcopy(get_state_dict(layers[0], optimizers[0]))
    set_state_dict(layers[1], optimizers[1], model_state_dict=model, optim_state_dict=state)
    for layer, optimizer in zip(layers, optimizers, strict=True):
        train(layer.weight, optimizer, 1)
    assert torch.equal(layers[0].weight, layers[1].weight)


@pytest.mark.full
def test_stochastic_rounding_goes_on_from_a_full_state():
    from torch.distributed.checkpoint.state_dict import (
        StateDictOptions,
        get_state_dict,
        set_state_dict,
    )

    options = StateDictOptions(full_state_dict=True)
    layers = [
        Embedding.from_pretrained(table(6, 4, torch.bfloat16, "cpu"), freeze=False, sparse=True)
        for _ in range(2)
    ]
    optimizers = [
        optim.Adagrad(layer.parameters(), lr=0.01, stochastic_rounding=True) for layer in layers
    ]
    train(layers[0].weight, optimizers[0], 2)
    layers[0].weight.grad = None
    model, state = copy.deepcopy(get_state_dict(layers[0], optimizers[0], options=options))
    set_state_dict(
        layers[1], optimizers[1], model_state_dict=model, optim_state_dict=state, options=options
    )
    for layer, optimizer in zip(layers, optimizers, strict=True):
        train(layer.weight, optimizer, 3)
    assert torch.equal(layers[0].weight, layers[1].weight)


def test_our_adamw_goes_on_in_torchs():
    param = sparse_table(dtype=torch.float64)
    optimizer = optim.AdamW([param], lr=0.1)
    train(param, optimizer, 2)
    twin = torch.nn.Parameter(param.detach().clone())
    away = torch.optim.AdamW([twin])
    away.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    grad = integer_gradient((6, 4), torch.float64, "cpu")
    give_gradient(param, torch.arange(6), grad)
    twin.grad = grad
    optimizer.step()
    away.step()
    assert (twin - param).abs().max() <= 2**4 * 2.0**-53 * 2**5


def trained(optimizer_class, *, num_embeddings=6, **arguments):
    param = sparse_table(num_embeddings)
    optimizer = optimizer_class([param], **arguments)
    give_gradient(param, *next(steps_of(1, param)))
    if optimizer_class in (torch.optim.Adam, torch.optim.AdamW):
        param.grad = param.grad.to_dense()
    optimizer.step()
    return optimizer


# What is loaded into what, and what of it does not fit.
UNFIT = {
    "another height": (
        lambda: trained(optim.Adam, num_embeddings=8), optim.Adam,
        r"Adam needs a state exp_avg of shape \[6, 4\], but the state to be loaded has \[8, 4\]",
    ),
    "elements for rows": (
        lambda: trained(optim.Adagrad), optim.RowWiseAdagrad,
        r"RowWiseAdagrad needs a state sum of shape \[6\], but the state to be loaded has \[6, 4\]",
    ),
    "another formula": (
        lambda: trained(optim.SGD), optim.AdamW,
        r"AdamW needs a state exp_avg of shape \[6, 4\], but the state to be loaded has none",
    ),
    "another formula's state": (
        lambda: trained(optim.Adam), optim.SGD,
        "SGD has no state exp_avg, but the state to be loaded has it",
    ),
    "torch's decay": (
        lambda: torch.optim.SGD([sparse_table()], weight_decay=0.1), optim.SGD,
        r"SGD has no weight_decay, but the state to be loaded was made with weight_decay=0.1",
    ),
    "momentum of another height": (
        lambda: trained(optim.SGD, num_embeddings=8, momentum=0.9), optim.SGD,
        r"SGD needs a state momentum_buffer of shape \[6, 4\], but the state to be loaded has \[8, 4\]",
    ),
    "momentum for sums": (
        lambda: trained(optim.SGD, momentum=0.9), optim.Adagrad,
        "Adagrad has no state momentum_buffer, but the state to be loaded has it",
    ),
    "decay": (
        lambda: trained(torch.optim.Adam, weight_decay=0.1), optim.Adam, "Adam has no weight_decay",
    ),
    "amsgrad": (lambda: trained(torch.optim.AdamW, amsgrad=True), optim.AdamW, "no amsgrad"),
    "other rows": (lambda: optim.SGD([sparse_table(8)], rows=[7]), optim.SGD, "rows: the mask"),
    "two tables": (
        lambda: optim.SGD([sparse_table(), sparse_table()]), optim.SGD, "doesn't match the size",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("saved", "loads", "message"), UNFIT.values(), ids=UNFIT)
def test_what_does_not_fit_is_refused_and_changes_nothing(saved, loads, message):
    """A kernel would read and write past the end of a shorter state."""
    optimizer = trained(loads, lr=0.3)
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(saved().state_dict())
    after = optimizer.state_dict()
    assert after["param_groups"] == before["param_groups"]
    for name, value in before["state"][0].items():
        assert torch.equal(torch.as_tensor(after["state"][0][name]), torch.as_tensor(value))
    assert not optimizer._optimizer_load_state_dict_pre_hooks


def test_the_state_of_an_sgd_that_counted_no_steps_is_taken():
    """torch 2.2's, and what came before it."""
    param = sparse_table()
    saved = torch.optim.SGD([param], lr=0.5).state_dict()
    saved["state"] = {0: {"momentum_buffer": None}}
    optimizer = optim.SGD([param])
    optimizer.load_state_dict(saved)
    before = param.detach().clone()
    give_gradient(param, torch.tensor([2]), torch.ones(1, 4))
    optimizer.step()
    assert torch.equal(param, before - 0.5 * param.grad.to_dense())
    assert state_of(optimizer)["step"] == 1


@pytest.mark.parametrize("optimizer_class", [optim.Adagrad, optim.Adam])
def test_loaded_state_lies_anywhere_in_memory(target, optimizer_class):
    """As what is cut out of a larger checkpoint does: behind an address that no vector is read from."""
    param = sparse_table(device=target.device)
    optimizer = optimizer_class([param], lr=0.1)
    train(param, optimizer, 1)
    twin = torch.nn.Parameter(param.detach().clone())
    saved = copy.deepcopy(optimizer.state_dict())
    for name, value in saved["state"][0].items():
        if isinstance(value, torch.Tensor):
            saved["state"][0][name] = torch.cat([value.new_zeros(1), value.view(-1)])[1:].view_as(
                value
            )
    shifted = optimizer_class([twin])
    shifted.load_state_dict(saved)
    assert same_bits(train(twin, shifted, 2).detach(), train(param, optimizer, 2).detach())


@every_class
def test_state_follows_a_table_of_another_dtype(target, optimizer_class):
    """Module.to(torch.float64) changes a parameter in place; the kernels read fp64 state beside it."""
    param = sparse_table(device=target.device)
    optimizer = optimizer_class([param])
    train(param, optimizer, 1)
    twin = torch.nn.Parameter(param.detach().double())
    expected = optimizer_class([twin])
    expected.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    param.data = param.data.double()
    param.grad = None
    for table_, stepped in ((param, optimizer), (twin, expected)):
        train(table_, stepped, 1)
    assert param.dtype == torch.float64
    assert torch.equal(param, twin)


def test_a_table_of_another_height_is_refused_at_the_step():
    param = sparse_table()
    optimizer = optim.Adam([param])
    train(param, optimizer, 1)
    param.data = table(9, 4, torch.float32, "cpu")
    param.grad = None
    with pytest.raises(RuntimeError, match=r"shape \[9, 4\] now, but its state exp_avg was made"):
        train(param, optimizer, 1)


def test_hooks_on_loading_see_and_change_what_is_loaded():
    param = sparse_table(dtype=torch.bfloat16)
    optimizer = optim.Adam([param])
    train(param, optimizer, 1)
    saved = copy.deepcopy(optimizer.state_dict())
    fresh = optim.Adam([param])
    seen = []

    def double(_, state_dict):
        state_dict["state"][0]["exp_avg"] = state_dict["state"][0]["exp_avg"] * 2
        return state_dict

    fresh.register_load_state_dict_pre_hook(double)
    fresh.register_load_state_dict_post_hook(
        lambda loaded: seen.append(loaded.state[param]["exp_avg"])
    )
    fresh.load_state_dict(copy.deepcopy(saved))
    assert same_bits(seen[0], 2 * saved["state"][0]["exp_avg"])
    # Its own hooks are gone again.
    assert len(fresh._optimizer_load_state_dict_pre_hooks) == 1
    assert len(fresh._optimizer_load_state_dict_post_hooks) == 1


@every_class
def test_optimizers_are_pickled_and_copied(optimizer_class):
    param = sparse_table()
    optimizer = optimizer_class([param], rows=[0, 1, 2])
    train(param, optimizer, 1)
    for twin in (pickle.loads(pickle.dumps(optimizer)), copy.deepcopy(optimizer)):
        (group,) = twin.param_groups
        train(group["params"][0], twin, 1)
    train(param, optimizer, 1)
    assert torch.equal(group["params"][0], param)


# Clipping and scaling.


@pytest.mark.parametrize("norm_type", [2.0, 1.0, math.inf])
def test_gradients_are_clipped_by_the_norm_of_their_sums(target, norm_type):
    """torch's function, which refuses sparse gradients, on the same gradients made dense."""
    sparse, dense = (sparse_table(9, 4, torch.float32, target.device) for _ in range(2))
    weights = [torch.nn.Parameter(torch.ones(3, device=target.device)) for _ in range(2)]
    give_gradient(
        sparse,
        ids("zipf", 40, 9, target.device),
        integer_gradient((40, 4), torch.float32, target.device),
    )
    dense.grad = sparse.grad.to_dense()
    for weight in weights:
        weight.grad = torch.full_like(weight, 3.0)
    ours = optim.clip_grad_norm_([sparse, weights[0]], 2.5, norm_type)
    theirs = torch.nn.utils.clip_grad_norm_([dense, weights[1]], 2.5, norm_type)
    # Norms of exact sums, added up in another order: fp32, fewer than 64 numbers.
    assert abs(ours - theirs) <= 64 * 2.0**-23 * theirs
    # 40 entries of at most 2, each scaled by that and rounded, and then added up.
    difference = sparse.grad.to_dense() - dense.grad
    assert difference.abs().max() <= 40 * 2 * (64 + 40) * 2.0**-23
    assert (weights[0].grad - weights[1].grad).abs().max() <= 3 * 65 * 2.0**-23


def test_small_gradients_are_not_clipped():
    param = sparse_table()
    give_gradient(param, [1, 1], torch.ones(2, 4))
    assert optim.clip_grad_norm_(param, 100.0).item() == 4
    assert param.grad._values().eq(1).all()
    give_gradient(param, [1], torch.full((1, 4), math.inf))
    with pytest.raises(RuntimeError, match="non-finite"):
        optim.clip_grad_norm_([param], 1.0, error_if_nonfinite=True)


@every_class
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_grad_scaler_unscales_and_skips(optimizer_class, dtype):
    """A scale of 2**4 leaves no trace; an infinite gradient leaves the table and the state alone."""
    tables = []
    for scaled in (False, True):
        layer = Embedding.from_pretrained(table(6, 2, dtype, "cpu"), freeze=False, sparse=True)
        optimizer = optimizer_class(layer.parameters(), lr=0.5)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**4, enabled=scaled)
        for factor in (1.0, math.inf if scaled else 0.0, 2.0):
            optimizer.zero_grad()
            scaler.scale(factor * layer(torch.tensor([1, 4, 4])).sum()).backward()
            if scaled or factor:
                scaler.unscale_(optimizer)
                scaler.step(optimizer)
            scaler.update()
        tables.append(layer.weight.detach())
    assert torch.equal(*tables)


# rows=.


@pytest.mark.parametrize(
    "rows",
    [
        [1, 3],
        (3, 1, 1),
        range(1, 5, 2),
        torch.tensor([[1], [3]], dtype=torch.int32),
        torch.tensor([False, True, False, True, False, False]),
        torch.tensor([0, 1, 0, 1, 0, 0]).bool()[:, None].expand(6, 2)[:, 0],
    ],
    ids=["list", "tuple", "range", "tensor", "mask", "strided mask"],
)
def test_rows_are_chosen_by_ids_or_a_mask(rows):
    (group,) = optim.SGD([sparse_table()], rows=rows).param_groups
    assert group["rows"].tolist() == [False, True, False, True, False, False]
    assert group["rows"].is_contiguous()


@every_class
def test_only_chosen_rows_train(target, optimizer_class):
    free, bound = (sparse_table(device=target.device) for _ in range(2))
    everywhere = optimizer_class([free])
    train(free, everywhere, 1)
    optimizer = optimizer_class([bound], rows=[1, 3])
    train(bound, optimizer, 1)
    start = sparse_table(device=target.device)
    chosen, rest = [1, 3], [0, 2, 4, 5]
    assert torch.equal(bound[chosen], free[chosen])
    assert torch.equal(bound[rest], start[rest])
    for name, value in optimizer.state[bound].items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value[chosen], everywhere.state[free][name][chosen])
            assert not value[rest].any()


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([6], "ids must be from 0 to 5"),
        ([-1], "ids must be from 0 to 5"),
        (torch.ones(5, dtype=torch.bool), r"mask must be of shape \[6\], got \[5\]"),
        ([0.5], "expected a bool mask or integer ids, got torch.float32"),
    ],
    ids=str,
)
def test_rows_that_do_not_fit_are_refused(rows, message):
    with pytest.raises(ValueError, match=message):
        optim.SGD([sparse_table()], rows=rows)


def test_rows_are_those_of_every_table_of_the_group():
    with pytest.raises(ValueError, match=r"have \[6, 5\] rows, which must be equal"):
        optim.SGD([sparse_table(6), sparse_table(5)], rows=[1])
    optimizer = optim.SGD(
        [{"params": [sparse_table(6)], "rows": []}, {"params": [sparse_table(5)]}]
    )
    assert not optimizer.param_groups[0]["rows"].any()
    assert optimizer.param_groups[1]["rows"] is None


def test_rows_are_saved_and_loaded():
    param = sparse_table()
    optimizer = optim.SGD([param], rows=[1])
    fresh = optim.SGD([param])
    fresh.load_state_dict(optimizer.state_dict())
    assert fresh.param_groups[0]["rows"].tolist() == [False, True, False, False, False, False]


# Stochastic rounding.


def test_the_seed_decides_the_rounding(target):
    def trained(**arguments):
        param = sparse_table(dtype=torch.bfloat16, device=target.device)
        return train(param, optim.SGD([param], lr=0.001, **arguments), 1).detach()

    first = trained(stochastic_rounding=True, seed=1)
    assert same_bits(first, trained(stochastic_rounding=True, seed=1))
    assert not same_bits(first, trained(stochastic_rounding=True, seed=2))
    assert not same_bits(first, trained(seed=1))
    torch.manual_seed(7)
    drawn = trained(stochastic_rounding=True)
    torch.manual_seed(7)
    assert same_bits(drawn, trained(stochastic_rounding=True))
    assert not same_bits(drawn, trained(stochastic_rounding=True))


def test_tables_with_one_seed_round_apart():
    params = [torch.nn.Parameter(torch.ones(4, 64, dtype=torch.bfloat16)) for _ in range(2)]
    optimizer = optim.SGD(params, lr=2.0**-9, stochastic_rounding=True, seed=0)
    for param in params:
        give_gradient(param, [0, 1, 2, 3], torch.ones(4, 64))
    optimizer.step()
    assert not torch.equal(*params)


def test_no_randomness_is_drawn_without_need():
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    param = sparse_table()
    train(param, optim.Adam([param]))
    assert torch.equal(torch.rand(1), expected)


# In backward.


@every_class
def test_updates_in_backward_are_those_of_steps(target, optimizer_class):
    """And no gradient is left."""
    layers = [
        Embedding.from_pretrained(
            table(6, 4, torch.float32, target.device), freeze=False, sparse=True
        )
        for _ in range(2)
    ]
    updates = optim.apply_in_backward(layers[0], optimizer_class, lr=0.3)
    optimizer = optimizer_class(layers[1].parameters(), lr=0.3)
    for indices in ([1, 4, 4], [[0, 4]]):
        for layer in layers:
            rows = layer(torch.tensor(indices, device=target.device))
            (rows.sum() + layer(torch.tensor(5, device=target.device)).sum()).backward()
        assert layers[0].weight.grad is None
        optimizer.step()
        optimizer.zero_grad()
    assert torch.equal(layers[0].weight, layers[1].weight)
    ours, theirs = state_of(updates.optimizer), state_of(optimizer)
    assert ours["step"] == theirs["step"] == 2
    assert all(torch.equal(torch.as_tensor(ours[n]), torch.as_tensor(theirs[n])) for n in theirs)


def test_only_sparse_tables_of_a_module_are_taken():
    model = torch.nn.ModuleDict(
        {
            "ours": Embedding(5, 2, sparse=True),
            "torchs": torch.nn.Embedding(5, 2, sparse=True),
            "bag": torch.nn.EmbeddingBag(5, 2, sparse=True, mode="sum"),
            "dense": Embedding(5, 2),
            "frozen": Embedding.from_pretrained(torch.ones(5, 2), sparse=True),
            "linear": torch.nn.Linear(2, 2),
        }
    )
    model["tied"] = Embedding(5, 2, sparse=True)
    model["tied"].weight = model["ours"].weight
    updates = optim.apply_in_backward(model, optim.SGD, lr=1.0)
    taken = [model[name].weight for name in ("ours", "torchs", "bag")]
    assert [id(p) for p in updates.optimizer.param_groups[0]["params"]] == [id(p) for p in taken]
    before = [param.detach().clone() for param in taken]
    indices = torch.tensor([[1]])
    outputs = [model[name](indices).sum() for name in ("ours", "torchs", "bag", "dense")]
    (sum(outputs) + model["linear"](torch.ones(2)).sum()).backward()
    for param, old in zip(taken, before, strict=True):
        assert param.grad is None
        assert torch.equal(param[1], old[1] - 1)
    assert model["dense"].weight.grad is not None
    assert model["linear"].weight.grad is not None


def test_parameters_are_taken_as_they_are():
    first, second = Embedding(5, 2, sparse=True), Embedding(4, 2, sparse=True)
    updates = optim.apply_in_backward([first.weight], optim.SGD)
    (first(torch.tensor([1])).sum() + second(torch.tensor([1])).sum()).backward()
    assert first.weight.grad is None
    assert second.weight.grad is not None
    assert len(updates.optimizer.param_groups[0]["params"]) == 1


@pytest.mark.parametrize(
    "module", [torch.nn.Linear(2, 2), Embedding(3, 2), Embedding.from_pretrained(torch.ones(3, 2))]
)
def test_a_module_without_sparse_tables_is_refused(module):
    with pytest.raises(ValueError, match="no Embedding or EmbeddingBag with sparse=True"):
        optim.apply_in_backward(module, optim.SGD)


def test_gradients_are_not_accumulated_in_backward():
    """Refused where it can be noticed: something lies in .grad, now or when the next gradient comes."""
    layer = Embedding.from_pretrained(torch.zeros(3, 2), freeze=False, sparse=True)
    layer(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match="already holds a gradient"):
        optim.apply_in_backward(layer, optim.SGD)
    held, layer.weight.grad = layer.weight.grad, None
    updates = optim.apply_in_backward(layer, optim.SGD, lr=1.0)
    layer.weight.grad = held
    with pytest.raises(RuntimeError, match="already holds a gradient"):
        layer(torch.tensor([1])).sum().backward()
    assert not layer.weight.any()
    layer.weight.grad = None
    layer(torch.tensor([1])).sum().backward()
    assert layer.weight[1].tolist() == [-1, -1]
    updates.remove()


def test_a_dense_gradient_in_backward_is_refused_and_freed():
    """A tied output layer, say, makes the table's gradient dense."""
    layer = Embedding.from_pretrained(torch.ones(3, 2), freeze=False, sparse=True)
    optim.apply_in_backward(layer, optim.SGD)
    with pytest.raises(RuntimeError, match="does not support dense gradients"):
        (layer(torch.tensor([1])).sum() + layer.weight.sum()).backward()
    assert layer.weight.grad is None


def test_removed_updates_leave_gradients_alone():
    layer = Embedding.from_pretrained(torch.zeros(3, 2), freeze=False, sparse=True)
    updates = optim.apply_in_backward(layer, optim.SGD, lr=1.0)
    updates.remove()
    for count in (1, 2):
        layer(torch.tensor([1])).sum().backward()
        assert layer.weight.grad.to_dense()[1].tolist() == [count, count]
    assert not layer.weight.any()


def test_updates_in_backward_are_set_up_once():
    """A second one would find no gradient; what it refuses, it leaves as it was."""
    first, second = (
        Embedding.from_pretrained(torch.zeros(3, 1), freeze=False, sparse=True) for _ in range(2)
    )
    updates = optim.apply_in_backward(first, optim.SGD, lr=1.0)
    with pytest.raises(RuntimeError, match="updated in backward already"):
        optim.apply_in_backward([second.weight, first.weight], optim.SGD, lr=1.0)
    (first(torch.tensor([1])) + second(torch.tensor([1]))).sum().backward()
    assert first.weight[1].item() == -1
    assert second.weight.grad is not None
    second.weight.grad = None
    updates.remove()
    optim.apply_in_backward([second.weight, first.weight], optim.SGD, lr=1.0)
    first(torch.tensor([1])).sum().backward()
    assert first.weight[1].item() == -2


def test_what_apply_in_backward_refuses_has_no_hooks():
    held, free = (Embedding(3, 2, sparse=True).weight for _ in range(2))
    give_gradient(held, [1], torch.ones(1, 2))
    frozen = torch.nn.Parameter(torch.ones(3, 2), requires_grad=False)
    for params, optimizer_class, error, message in (
        ([free, held], optim.SGD, RuntimeError, "already holds a gradient"),
        ([free, frozen], optim.SGD, ValueError, "does not require a gradient"),
        ([free], torch.optim.SGD, TypeError, "gpu_embed.optim.*not torch.optim.sgd.SGD"),
        (free, optim.SGD, TypeError, "should be an iterable of Tensors or dicts"),
        ([free], lambda params: optim.SGD(params, lr=-1), ValueError, "Invalid learning rate"),
    ):
        with pytest.raises(error, match=message):
            optim.apply_in_backward(params, optimizer_class)
        assert not free._backward_hooks
        assert not free._post_accumulate_grad_hooks


def test_tables_updated_in_backward_are_freed():
    """Nobody holds the result; torch hides from the garbage collector what the last of its hooks hold."""
    layer = Embedding(3, 2, sparse=True)
    optim.apply_in_backward(layer, optim.Adagrad, lr=1.0)
    before = layer.weight.detach().clone()
    layer(torch.tensor([1])).sum().backward()
    gc.collect()
    layer(torch.tensor([2])).sum().backward()
    assert not layer.weight[1:].eq(before[1:]).any()
    weight = weakref.ref(layer.weight)
    del layer
    gc.collect()
    assert weight() is None


def test_a_backward_that_fails_leaves_updates_in_order():
    layer = Embedding.from_pretrained(torch.zeros(3, 1), freeze=False, sparse=True)
    updates = optim.apply_in_backward(layer, optim.SGD, lr=1.0)

    def fail(_):
        raise ValueError("on purpose")

    rows = layer(torch.tensor([1]))
    rows.register_hook(fail)
    with pytest.raises(ValueError, match="on purpose"):
        rows.sum().backward()
    (group,) = updates.optimizer.param_groups
    group["lr"] = "fast"
    with pytest.raises(ValueError, match="could not convert"):
        layer(torch.tensor([1])).sum().backward()
    group["lr"] = 1.0
    assert layer.weight.grad is None
    assert not layer.weight.any()
    layer(torch.tensor([1])).sum().backward()
    assert layer.weight[:, 0].tolist() == [0, -1, 0]


def test_learning_rates_are_scheduled_in_backward():
    layer = Embedding.from_pretrained(torch.zeros(3, 1), freeze=False, sparse=True)
    updates = optim.apply_in_backward(layer, optim.SGD, lr=1.0)
    schedule = torch.optim.lr_scheduler.StepLR(updates.optimizer, 1, gamma=0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            layer(torch.tensor([1])).sum().backward()
            updates.optimizer.step()
            schedule.step()
    assert layer.weight[1].item() == -1.75


def test_gradients_of_gradients_are_applied_once():
    layer = Embedding.from_pretrained(torch.ones(3, 1), freeze=False, sparse=True)
    optim.apply_in_backward(layer, optim.SGD, lr=1.0)
    layer(torch.tensor([1])).sum().backward(create_graph=True)
    assert layer.weight[1].item() == 0
    assert not layer.weight.is_inference()
    assert layer.weight.requires_grad


def test_every_optimizer_is_public():
    classes = {name: made for name, made in CLASSES.items() if isinstance(made, type)}
    assert {name: getattr(gpu_embed.optim, name) for name in classes} == classes
