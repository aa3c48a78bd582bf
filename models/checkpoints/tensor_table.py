"""Tensors of a checkpoint: their names, their axes, and views of their parts."""

import dataclasses
import math
import re
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from continuous_lm import axes as axes_lib

__all__ = [
    "StoredTensor",
    "parse_stored_axes",
]


def parse_stored_axes(axes: str) -> list[tuple[str, ...]]:
    """The axes of a stored tensor, each with the letters and numbers that it merges.

    >>> parse_stored_axes("(N 3 H) D")
    [('N', '3', 'H'), ('D',)]
    """
    merged_or_single = re.findall(r"\(([^)]*)\)|(\S+)", axes)
    return [axes_lib.split(merged or single) for merged, single in merged_or_single]


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """Location of a parameter in a checkpoint.

    Attributes:
      name: the tensor's name, with {layer} for the layer's number.
      axes: the tensor's axes in letters; "(N H) D" is two axes, the first of size N H. A number is
        an axis that the parameter does not have: "(N 3 H) D" holds three parameters. None: the
        tensor is the parameter itself, or one layer of it.
      part_index: index of this parameter on the numbered axis.
      group_axes: axes of each group, if the first axis concatenates several groups; `axes` then
        describes group `part_index`.
    """

    name: str
    axes: str | None
    part_index: int = 0
    group_axes: tuple[str, ...] = ()

    def shape(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """The tensor's shape, of a tensor with axes."""
        first_size, *other_sizes = [
            _merged_size(merged_axes, sizes) for merged_axes in self._stored_axes()
        ]
        if self.group_axes:
            first_size = sum(self._group_sizes(sizes))
        return first_size, *other_sizes

    def view(
        self, tensor: np.ndarray, axes: tuple[str, ...], sizes: Mapping[str, int]
    ) -> np.ndarray:
        """The part of the stored tensor that is the parameter with `axes`: to read or to write."""
        if self.group_axes:
            group_sizes = self._group_sizes(sizes)
            first_row = sum(group_sizes[: self.part_index])
            tensor = tensor[first_row : first_row + group_sizes[self.part_index]]
        split_axes = [axis for merged in self._stored_axes() for axis in merged]
        tensor = tensor.reshape([_axis_size(axis, sizes) for axis in split_axes])
        part = [self.part_index if a.isdigit() else slice(None) for a in split_axes]
        stored_order = _number_repeats(a for a in split_axes if not a.isdigit())
        parameter_order = _number_repeats(axes)
        return tensor[tuple(part)].transpose(
            [stored_order.index(axis) for axis in parameter_order]
        )

    def _stored_axes(self) -> list[tuple[str, ...]]:
        if self.axes is None:
            raise ValueError(f"{self.name} has no axes: it is the parameter as it is")
        return parse_stored_axes(self.axes)

    def _group_sizes(self, sizes: Mapping[str, int]) -> list[int]:
        return [_merged_size(axes_lib.split(group), sizes) for group in self.group_axes]


def _number_repeats(axes: Iterable[str]) -> list[tuple[str, int]]:
    """Number the repetitions of each axis: "C D D" gives C 0, D 0, D 1."""
    axes = list(axes)
    return [(axis, axes[:place].count(axis)) for place, axis in enumerate(axes)]


def _axis_size(axis: str, sizes: Mapping[str, int]) -> int:
    return int(axis) if axis.isdigit() else sizes[axis]


def _merged_size(merged_axes: Sequence[str], sizes: Mapping[str, int]) -> int:
    return math.prod(_axis_size(axis, sizes) for axis in merged_axes)
