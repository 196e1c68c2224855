"""Tables of numbers that others made: `from_pretrained`."""

import numpy as np
import pytest
import torch

from gpu_embed import Embedding, EmbeddingBag

LAYERS = [Embedding, EmbeddingBag]
ROWS = np.arange(6.0, dtype=np.float32).reshape(3, 2)


@pytest.mark.parametrize("layer", LAYERS)
def test_a_tensor_is_shared_as_in_torch(layer):
    rows = torch.from_numpy(ROWS.copy())
    made = layer.from_pretrained(rows)
    assert type(made) is layer
    assert made.weight.data_ptr() == rows.data_ptr()
    assert not made.weight.requires_grad


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("dtype", ["f2", "f4", "f8", ">f4"])
def test_an_array_is_copied(layer, dtype: str, tmp_path):
    rows = ROWS.astype(dtype)
    np.save(tmp_path / "rows.npy", rows)
    for given in (rows, rows[::-1][::-1], np.load(tmp_path / "rows.npy", mmap_mode="r")):
        made = layer.from_pretrained(given, freeze=False, padding_idx=1)
        assert made.weight.tolist() == ROWS.tolist()
        assert made.weight.requires_grad
        assert made.padding_idx == 1
        with torch.no_grad():
            made.weight.zero_()
    assert np.array_equal(rows, ROWS)


@pytest.mark.parametrize("layer", LAYERS)
def test_what_is_no_matrix_is_refused_as_in_torch(layer):
    with pytest.raises(AssertionError, match="2-dimensional"):
        layer.from_pretrained(ROWS[0])
