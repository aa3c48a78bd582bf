"""Tensors of a checkpoint: their names, their axes, and views of their parts."""

import dataclasses
import math
import re
from collections.abc import Mapping

import numpy as np

from continuous_lm import axes as axes_lib


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """How a parameter lies in a checkpoint.

    Attributes:
      name: the tensor's name, with {layer} for the layer's number.
      axes: the tensor's axes in letters; "(N H) D" is two axes, the first of size N H. A number is
        an axis that the parameter does not have: "(N 3 H) D" holds three parameters.
      part_index: which of those this is.
      group_axes: if the first axis is several groups one after the other, the axes of each group;
        `axes` then describes this one, the `part_index`-th.
    """

    name: str
    axes: str
    part_index: int = 0
    group_axes: tuple[str, ...] = ()

    def shape(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """The tensor's shape."""
        groups = re.findall(r"\(([^)]*)\)|(\S+)", self.axes)
        shape = [_axes_size(grouped or single, sizes) for grouped, single in groups]
        if self.group_axes:
            shape[0] = sum(_axes_size(group, sizes) for group in self.group_axes)
        return tuple(shape)

    def view(
        self, tensor: np.ndarray, axes: tuple[str, ...], sizes: Mapping[str, int]
    ) -> np.ndarray:
        """The part of the stored tensor that is the parameter with `axes`: to read or to write."""
        if self.group_axes:
            first_row = sum(
                _axes_size(group, sizes) for group in self.group_axes[: self.part_index]
            )
            tensor = tensor[
                first_row : first_row
                + _axes_size(self.group_axes[self.part_index], sizes)
            ]
        letters = axes_lib.split(self.axes.replace("(", "").replace(")", ""))
        tensor = tensor.reshape([_axes_size(a, sizes) for a in letters])
        tensor = tensor[
            tuple(self.part_index if a.isdigit() else slice(None) for a in letters)
        ]
        remaining = [a for a in letters if not a.isdigit()]
        order = []
        for a in axes:  # a letter that stands twice keeps its order
            order.append(remaining.index(a))
            remaining[order[-1]] = ""
        return tensor.transpose(order)


def _axes_size(axes: str, sizes: Mapping[str, int]) -> int:
    return math.prod(int(a) if a.isdigit() else sizes[a] for a in axes_lib.split(axes))
