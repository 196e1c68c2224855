"""Ids of many features put together: no id in another feature's bags, whatever the offsets or lengths say."""

import itertools

import pytest
import torch
from table_cases import integer_layer
from torch import nn

import gpu_embed
from gpu_embed import batch_bags, batch_padded, bounds
from gpu_embed.bounds import BATCH_LENGTH, BATCH_OFFSET, BoundsRecord, table_name_id
from gpu_embed.tables import inputs as table_inputs

ID_DTYPES = [torch.int64, torch.int32, torch.int16, torch.uint8]


def by_torch(ids, offsets, include_last_offset):
    """torch's sums, or its error."""
    weight = torch.arange(1.0, 13.0).view(6, 2)
    try:
        return nn.functional.embedding_bag(
            ids, weight, offsets, mode="sum", include_last_offset=include_last_offset
        )
    except RuntimeError as error:
        return error


@pytest.mark.parametrize("include_last_offset", [False, True])
@pytest.mark.parametrize("place", [0, 1], ids=["first table", "second table"])
def test_all_offsets_of_three_ids(include_last_offset, place):
    """What torch refuses is refused, what it takes gives its sums; nothing else is looked up."""
    ids, good = torch.tensor([0, 1, 2]), torch.tensor([0, 1, 3])
    layer = integer_layer([(6, 2), (6, 2)])
    with torch.no_grad():
        layer.weight.copy_(torch.arange(1.0, 13.0).view(6, 2).repeat(2, 1))
    refused = taken = 0
    for numbers in itertools.product(range(-1, 5), repeat=3):
        offsets = torch.tensor(numbers)
        tables = [(ids, good), (ids + 3, good)]
        tables[place] = (tables[place][0], offsets)
        expected = by_torch(tables[place][0], offsets, include_last_offset)
        # torch reads outside of the ids where offsets decrease in some of its versions and modes.
        if isinstance(expected, RuntimeError) or (offsets.diff() < 0).any():
            with pytest.raises(RuntimeError, match=rf"batch_bags: table {place}: offsets"):
                batch_bags(tables, include_last_offset)
            refused += 1
        else:
            sums = layer(*batch_bags(tables, include_last_offset))
            assert torch.equal(layer.split(sums)[place], expected)
            other = by_torch(tables[1 - place][0], good, include_last_offset)
            assert torch.equal(layer.split(sums)[1 - place], other)
            taken += 1
    assert (taken, refused) == (10, 206)


@pytest.mark.parametrize("include_last_offset", [False, True])
def test_wrong_offsets_are_kept_within_their_own_ids(include_last_offset, monkeypatch):
    """Where the host does not look at the data, as on CUDA: no id changes its table, and no offset leaves the ids."""
    monkeypatch.setattr(table_inputs, "_is_traced", lambda: True)
    first, second = torch.tensor([10, 11, 12]), torch.tensor([20, 21, 22])
    for numbers in itertools.product(range(-1, 5), repeat=4):
        offsets = torch.tensor(numbers)
        batch = batch_bags([(first, offsets[:2]), (second, offsets[2:])], include_last_offset)
        assert sorted(batch.input.tolist()) == [10, 11, 12, 20, 21, 22]
        ends = batch.offsets.tolist()
        assert ends == sorted(ends)
        assert ends[0] == 0
        assert ends[-1] <= 6
        num_bags = (len(ends) - 1) // 2
        of_first = batch.input[ends[0] : ends[num_bags]].tolist()
        of_second = batch.input[ends[num_bags] : ends[-1]].tolist()
        assert set(of_first) <= {10, 11, 12}
        assert set(of_second) <= {20, 21, 22}


def test_good_offsets_are_the_same_unseen(monkeypatch):
    bags = [
        (torch.tensor([1, 2, 3]), torch.tensor([0, 0, 2])),
        (torch.tensor([4]), torch.tensor([0, 1, 1])),
    ]
    for include_last_offset in (False, True):
        seen = batch_bags(bags, include_last_offset)
        monkeypatch.setattr(table_inputs, "_is_traced", lambda: True)
        unseen = batch_bags(bags, include_last_offset)
        monkeypatch.undo()
        for one, other in zip(seen[:2], unseen[:2], strict=True):
            assert torch.equal(one, other)


def test_what_was_changed_is_recorded():
    """As on CUDA, where the error comes later: the feature, the place, the number and its limit."""
    record = BoundsRecord(torch.device("cpu"))
    names = [table_name_id(name) for name in ("feature 'user'", "feature 'item'")]
    given = torch.tensor([[0, 1, 2], [0, 7, 2]])
    limits = torch.full_like(given, 3)
    record.write_numbers(BATCH_OFFSET, names, given, given.clamp(max=3), limits)
    with pytest.raises(
        IndexError, match=r"batch_bags: feature 'item': offsets\[1\] is 7; .*length 3\."
    ):
        record.raise_if_claimed()
    record.write_numbers(BATCH_LENGTH, names, -given, given * 0, limits)
    with pytest.raises(
        IndexError, match=r"batch_padded: feature 'user': lengths\[1\] is -1, .* 0 to 3\."
    ):
        record.raise_if_claimed()
    record.write_numbers(BATCH_LENGTH, names, given, given, limits)
    record.raise_if_claimed()


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=pytest.mark.gpu)])
def test_wrong_numbers_on_a_gpu(device):
    ids = torch.tensor([0, 1, 2], device=device)
    with gpu_embed.set_bounds_check("sync"):
        with pytest.raises(IndexError, match=r"feature 'b': offsets\[1\] is 5"):
            batch_bags(
                {
                    "a": (ids, torch.tensor([0, 1], device=device)),
                    "b": (ids, torch.tensor([0, 5], device=device)),
                }
            )
        with pytest.raises(IndexError, match=r"feature 'b': lengths\[0\] is 4"):
            batch_padded(
                {"a": ids[None], "b": ids[None]},
                lengths={
                    "b": torch.tensor([4], device=device),
                    "a": torch.tensor([1], device=device),
                },
            )
    batch_bags([(ids, torch.tensor([1, 5], device=device))])
    with pytest.raises(IndexError, match="table 0: offsets"):
        gpu_embed.check_bounds()


@pytest.mark.parametrize("dtype", ID_DTYPES, ids=str)
def test_wrong_lengths(dtype):
    ids = torch.tensor([[1, 2, 3], [4, 5, 6]])
    for wrong, name in ((4, "4"), (-1, "-1")):
        if dtype == torch.uint8 and wrong < 0:
            continue
        lengths = [torch.tensor([3, 0], dtype=dtype), torch.tensor([1, wrong], dtype=dtype)]
        with pytest.raises(
            ValueError, match=rf"table 1: lengths\[1\] is {name}, .* so lengths go from 0 to 3"
        ):
            batch_padded([ids, ids], lengths=lengths)
    batch = batch_padded([ids], lengths=[torch.tensor([3, 0], dtype=dtype)])
    assert batch.offsets.tolist() == [0, 3, 3]


IDS, BEGINS, ROWS = torch.tensor([0, 1]), torch.tensor([0, 1]), torch.tensor([[0, 1]])
WRONG = {
    "float offsets": (
        lambda: batch_bags([(IDS, BEGINS * 1.0)]),
        RuntimeError,
        "table 0: offsets must be int64",
    ),
    "bool offsets": (lambda: batch_bags([(IDS, BEGINS > 0)]), RuntimeError, "got torch.bool"),
    "float ids": (
        lambda: batch_bags([(IDS * 1.0, BEGINS)]),
        RuntimeError,
        "table 0: ids must be int64",
    ),
    "a list of offsets": (
        lambda: batch_bags([(IDS, [0, 1])]),
        TypeError,
        "table 0: offsets must be a tensor, got list",
    ),
    "a tensor as a table": (lambda: batch_bags([IDS]), TypeError, r"expected \(ids, offsets\)"),
    "one tensor": (lambda: batch_bags([(IDS,)]), ValueError, "got 1 tensors"),
    "no offsets at all": (
        lambda: batch_bags([(IDS, BEGINS[:0])], include_last_offset=True),
        RuntimeError,
        "number of offset should be at least 1",
    ),
    "weights' shape": (
        lambda: batch_bags([(IDS, BEGINS, torch.ones(3))]),
        ValueError,
        r"expected per_sample_weights \[2\], got \[3\]",
    ),
    "another device": (
        lambda: batch_bags([(IDS, BEGINS.to("meta"))]),
        RuntimeError,
        "offsets is on meta",
    ),
    "devices of tables": (
        lambda: batch_bags([(IDS, BEGINS), (IDS.to("meta"), BEGINS.to("meta"))]),
        RuntimeError,
        "table 1: ids on meta, but those of table 0 on cpu",
    ),
    "number as a name": (
        lambda: batch_bags({0: (IDS, BEGINS)}),
        TypeError,
        "a feature's name is a string, got 0",
    ),
    "a set": (lambda: batch_bags({1, 2}), TypeError, "must be a mapping by the features' names"),
    "empty mapping": (lambda: batch_bags({}), ValueError, "at least one table is needed"),
    "names in the message": (
        lambda: batch_bags({"user": (IDS, BEGINS + 1)}),
        RuntimeError,
        r"feature 'user': offsets\[0\] has to be 0",
    ),
    "padded: a list": (
        lambda: batch_padded([[0, 1]]),
        TypeError,
        "table 0: ids must be a tensor, got list",
    ),
    "padded: float ids": (
        lambda: batch_padded([ROWS * 1.0]),
        RuntimeError,
        "table 0: ids must be int64",
    ),
    "padded: float lengths": (
        lambda: batch_padded([ROWS], lengths=[torch.tensor([1.0])]),
        RuntimeError,
        "table 0: lengths must be int64",
    ),
    "padded: ints as lengths": (
        lambda: batch_padded([ROWS], lengths=[1]),
        TypeError,
        "table 0: lengths must be a tensor, got int; make one with torch.tensor",
    ),
    "padded: a list of ints": (
        lambda: batch_padded({"user": ROWS}, lengths={"user": [1]}),
        TypeError,
        "feature 'user': lengths must be a tensor, got list",
    ),
    "padded: a number": (
        lambda: batch_padded([ROWS], lengths=1),
        TypeError,
        "lengths must be a tensor",
    ),
    "padded: other names": (
        lambda: batch_padded({"user": ROWS}, lengths={"item": torch.tensor([1])}),
        ValueError,
        "lengths are given for 'item', the ids for 'user'",
    ),
    "padded: names beside a list": (
        lambda: batch_padded([ROWS], lengths={"item": torch.tensor([1])}),
        ValueError,
        "lengths are given for 'item', the ids for a sequence",
    ),
    "padded: too few lengths": (
        lambda: batch_padded([ROWS, ROWS], lengths=[torch.tensor([1])]),
        ValueError,
        "lengths are given for 1 features, the ids for 2",
    ),
    "padded: another number of lengths": (
        lambda: batch_padded([ROWS, ROWS], lengths=[torch.tensor([1]), torch.tensor([1, 2])]),
        ValueError,
        r"table 1: expected lengths of shape \[1\], got \[2\]",
    ),
    "padded: a padding for each": (
        lambda: batch_padded({"user": ROWS}, padding_value={"user": 0}),
        TypeError,
        "padding_value is one int for all features, got {'user': 0}",
    ),
    "padded: a float as padding": (
        lambda: batch_padded([ROWS], padding_value=0.5),
        TypeError,
        r"one int for all features, got 0\.5",
    ),
    "padded: True as padding": (
        lambda: batch_padded([ROWS], padding_value=True),
        TypeError,
        "one int for all features, got True",
    ),
    "weights of some": (
        lambda: batch_bags({"a": (IDS, BEGINS, IDS * 1.0), "b": (IDS, BEGINS)}),
        ValueError,
        "for all features or for none; they are given for feature 'a'",
    ),
    "padded: lengths elsewhere": (
        lambda: batch_padded([ROWS], lengths=[torch.tensor([1], device="meta")]),
        RuntimeError,
        "lengths is on meta",
    ),
    "padded: 0-d": (
        lambda: batch_padded(torch.tensor(3)),
        ValueError,
        "at least one table is needed",
    ),
}


@pytest.mark.parametrize(("make", "error", "message"), WRONG.values(), ids=WRONG)
def test_what_cannot_be_put_together(make, error, message):
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize("how", ["bags", "last offset", "padding", "lengths", "weights"])
def test_a_mapping_is_a_list_with_names(how):
    ids = {"b": torch.tensor([[1, 2], [3, 0]]), "a": torch.tensor([[4, 5], [6, 7]])}
    lengths = {"a": torch.tensor([1, 2]), "b": torch.tensor([2, 1])}
    if how in ("bags", "last offset"):
        bags = {name: (one.flatten(), torch.tensor([0, 2])) for name, one in ids.items()}
        made = batch_bags(bags, how == "last offset")
        listed = batch_bags(list(bags.values()), how == "last offset")
    elif how == "padding":
        made = batch_padded(ids, padding_value=0)
        listed = batch_padded(list(ids.values()), padding_value=0)
    elif how == "lengths":
        made = batch_padded(ids, lengths=lengths)
        listed = batch_padded(list(ids.values()), lengths=[lengths["b"], lengths["a"]])
    else:
        weights = {name: ids[name].float() for name in ("a", "b")}
        made = batch_padded(ids, per_sample_weights=weights)
        listed = batch_padded(list(ids.values()), per_sample_weights=[weights["b"], weights["a"]])
        assert torch.equal(made.per_sample_weights, listed.per_sample_weights)
    assert torch.equal(made.input, listed.input)
    assert torch.equal(made.offsets, listed.offsets)
    assert made.features == ("b", "a")
    assert listed.features == 2


@pytest.mark.parametrize(
    ("dtype", "padding_value"),
    [(torch.uint8, 256), (torch.uint8, -1), (torch.int16, 2**16), (torch.int32, 2**32)],
    ids=str,
)
def test_a_padding_that_no_id_can_be(dtype, padding_value):
    """It equals no id, and above all not the one that it would wrap around to."""
    ids = torch.tensor([[0, 1]], dtype=dtype)
    wrapped = torch.tensor(padding_value % 2**15).to(dtype)
    assert batch_padded([ids], padding_value=padding_value).offsets.tolist() == [0, 2]
    ids[0, 0] = wrapped
    assert batch_padded([ids], padding_value=padding_value).offsets.tolist() == [0, 2]


def test_empty_bags_and_no_bags():
    none = torch.zeros(0, dtype=torch.int64)
    assert batch_bags([(none, none), (none, none)]).offsets.tolist() == [0]
    assert batch_bags([(none, torch.tensor([0, 0]))]).offsets.tolist() == [0, 0, 0]
    assert batch_padded(torch.zeros(2, 0, 3, dtype=torch.int64)).offsets.tolist() == [0]
    layer = integer_layer([(3, 4), (2, 4)])
    assert layer(*batch_bags([(none, none), (none, none)])).shape == (0, 8)


def test_the_record_takes_no_part_on_the_cpu():
    """There an error is raised at once, and nothing is left for a later call to raise."""
    with pytest.raises(RuntimeError):
        batch_bags([(IDS, BEGINS + 1)])
    bounds.record_for(torch.device("cpu")).raise_if_claimed()
