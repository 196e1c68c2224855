"""What is no tensor, or no integers, in place of ids: an error that says what to do, in every way in."""

import numpy as np
import pytest
import torch

import gpu_embed
from gpu_embed import functional

WEIGHT = torch.arange(15.0).view(5, 3)
IDS, OFFSETS = torch.tensor([1, 2]), torch.tensor([0, 2])
ONE_TABLE = [(5, 3)]

# Each puts a value in one place of a call, by the name that the place has.
PLACES = {
    "embedding": lambda value: functional.embedding(value, WEIGHT),
    "Embedding": lambda value: gpu_embed.Embedding(5, 3)(value),
    "embedding_bag": lambda value: functional.embedding_bag(value, WEIGHT, OFFSETS[:1]),
    "EmbeddingBag": lambda value: gpu_embed.EmbeddingBag(5, 3)(value, OFFSETS[:1]),
    "offsets of embedding_bag": lambda value: functional.embedding_bag(IDS, WEIGHT, value),
    "offsets of EmbeddingBag": lambda value: gpu_embed.EmbeddingBag(5, 3)(IDS, value),
    "TableBatchedEmbedding": lambda value: gpu_embed.TableBatchedEmbedding(ONE_TABLE)(
        value, OFFSETS
    ),
    "offsets of TableBatchedEmbedding": lambda value: gpu_embed.TableBatchedEmbedding(ONE_TABLE)(
        IDS, value
    ),
    "TableBatchedEmbeddingBag": lambda value: gpu_embed.TableBatchedEmbeddingBag(ONE_TABLE)(
        value, OFFSETS
    ),
    "offsets of TableBatchedEmbeddingBag": lambda value: gpu_embed.TableBatchedEmbeddingBag(
        ONE_TABLE
    )(IDS, value),
}
WEIGHTS = {
    "embedding_bag": lambda value: functional.embedding_bag(
        IDS, WEIGHT, OFFSETS[:1], mode="sum", per_sample_weights=value
    ),
    "TableBatchedEmbeddingBag": lambda value: gpu_embed.TableBatchedEmbeddingBag(ONE_TABLE)(
        IDS, OFFSETS, value
    ),
}
NO_TENSORS = {
    "list": [1, 2],
    "tuple": (1, 2),
    "NumPy": np.array([1, 2]),
    "NumPy of one": np.int64(1),
    "number": 1,
}


@pytest.mark.parametrize("value", NO_TENSORS.values(), ids=NO_TENSORS)
@pytest.mark.parametrize("place", PLACES)
def test_what_is_no_tensor_is_named_with_the_way_to_one(place, value):
    with pytest.raises((TypeError, AttributeError)) as raised:
        PLACES[place](value)
    message = str(raised.value)
    assert f"must be Tensor, not {type(value).__name__}" in message
    assert "; make it one with torch.as_tensor(" in message
    assert message.endswith(", device=weight.device)")
    assert ("offsets" in message) == ("offsets" in place)


@pytest.mark.parametrize("value", [[1.0, 2.0], np.ones(2)], ids=["list", "NumPy"])
@pytest.mark.parametrize("place", WEIGHTS)
def test_weights_of_the_ids_are_named_too(place, value):
    with pytest.raises(
        (TypeError, AttributeError), match=r"argument 'per_sample_weights'.*torch.as_tensor"
    ):
        WEIGHTS[place](value)


@pytest.mark.parametrize("value", [[[1.0]], np.ones((2, 2))], ids=["list", "NumPy"])
@pytest.mark.parametrize(
    "function", [functional.embedding, functional.embedding_bag], ids=["embedding", "bag"]
)
def test_a_table_that_is_no_tensor(function, value):
    with pytest.raises(
        (TypeError, AttributeError),
        match=r"argument 'weight'.*make it one with torch.as_tensor\(weight\)",
    ):
        function(IDS[None], value)


@pytest.mark.parametrize("place", [place for place in PLACES if "offsets" not in place])
def test_nothing_makes_a_tensor_of_none(place):
    with pytest.raises((TypeError, AttributeError), match=r"must be Tensor, not NoneType$"):
        PLACES[place](None)


FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


@pytest.mark.parametrize("dtype", [*FLOATS, torch.uint16], ids=str)
@pytest.mark.parametrize("place", PLACES)
def test_ids_that_are_no_integers_are_told_of_long(place, dtype):
    name = "offsets" if "offsets" in place else "input"
    with pytest.raises(RuntimeError, match=rf": convert it with {name}\.long\(\)$"):
        PLACES[place]((OFFSETS if name == "offsets" else IDS).to(dtype))


@pytest.mark.parametrize("dtype", [*FLOATS, torch.int8, torch.bool], ids=str)
def test_torchs_own_words_about_float_ids_come_first(dtype):
    ids = IDS.to(dtype)
    with pytest.raises(RuntimeError) as theirs:
        torch.nn.Embedding(5, 3)(ids)
    with pytest.raises(RuntimeError, match=r"input\.long\(\)$") as ours:
        gpu_embed.Embedding(5, 3)(ids)
    assert str(ours.value).startswith(str(theirs.value).partition("; but got")[0])
    assert torch.equal(functional.embedding(ids.long(), WEIGHT), WEIGHT[ids.long()])
