"""Stored tensors: axis strings, shapes, and views that read and write without a copy."""

import doctest

import numpy as np
import pytest

from continuous_lm.models.checkpoints import tensor_table
from continuous_lm.models.checkpoints.tensor_table import StoredTensor

SIZES = {"N": 4, "K": 2, "H": 3, "D": 5, "C": 2, "W": 6}


def test_examples():
    result = doctest.testmod(tensor_table)
    assert result.attempted
    assert not result.failed


@pytest.mark.parametrize(
    ("axes", "parsed", "shape"),
    [
        ("D", [("D",)], (5,)),
        ("(N H) D", [("N", "H"), ("D",)], (12, 5)),
        ("D (N H)", [("D",), ("N", "H")], (5, 12)),
        ("(N 3 H)", [("N", "3", "H")], (36,)),
        ("(2 W) D", [("2", "W"), ("D",)], (12, 5)),
        ("(C D) D", [("C", "D"), ("D",)], (10, 5)),
    ],
)
def test_axis_strings(axes, parsed, shape):
    assert tensor_table.parse_stored_axes(axes) == parsed
    assert StoredTensor("name", axes).shape(SIZES) == shape


def filled(stored: StoredTensor) -> np.ndarray:
    shape = stored.shape(SIZES)
    return np.arange(np.prod(shape), dtype=np.float32).reshape(shape)


def test_merged_axes_are_split_and_transposed():
    stored = StoredTensor("name", "(N H) D")
    tensor = filled(stored)
    view = stored.view(tensor, ("D", "N", "H"), SIZES)
    assert view.shape == (5, 4, 3)
    for n, h, d in np.ndindex(4, 3, 5):
        assert view[d, n, h] == tensor[3 * n + h, d]


@pytest.mark.parametrize("part", range(3))
def test_parts_of_interleaved_parameters(part):
    stored = StoredTensor("name", "(N 3 H) D", part)
    tensor = filled(stored)
    view = stored.view(tensor, ("N", "H", "D"), SIZES)
    for n, h, d in np.ndindex(4, 3, 5):
        assert view[n, h, d] == tensor[9 * n + 3 * part + h, d]


@pytest.mark.parametrize(("part", "first_row", "heads"), [(0, 0, 4), (1, 12, 2)])
def test_a_group_of_rows(part, first_row, heads):
    groups = ("N H", "K H", "K H")
    letter = "NK"[part]
    stored = StoredTensor("name", f"({letter} H) D", part, groups)
    assert stored.shape(SIZES) == (24, 5)
    tensor = filled(stored)
    view = stored.view(tensor, (letter, "H", "D"), SIZES)
    assert view.shape == (heads, 3, 5)
    np.testing.assert_array_equal(
        view.reshape(-1, 5), tensor[first_row : first_row + 3 * heads]
    )


def test_repeated_letters_keep_their_order():
    stored = StoredTensor("name", "(C D) D")
    tensor = filled(stored)
    view = stored.view(tensor, ("D", "C", "D"), SIZES)
    for c, first, second in np.ndindex(2, 5, 5):
        assert view[first, c, second] == tensor[5 * c + first, second]


@pytest.mark.parametrize(
    ("stored", "axes"),
    [
        (StoredTensor("name", "(N H) D"), ("D", "N", "H")),
        (StoredTensor("name", "(N 3 H) D", 1), ("N", "H", "D")),
        (StoredTensor("name", "(K H) D", 2, ("N H", "K H", "K H")), ("K", "H", "D")),
        (StoredTensor("name", "(C D) D"), ("D", "C", "D")),
    ],
)
def test_views_read_and_write_the_tensor_itself(stored, axes):
    tensor = filled(stored)
    view = stored.view(tensor, axes, SIZES)
    assert np.shares_memory(view, tensor)
    unchanged = tensor.sum() - view.sum()
    view[...] = -1.0
    assert (tensor == -1.0).sum() == view.size
    assert tensor.sum() == unchanged - view.size
