"""Tensors of a checkpoint: their names, their axes, and views of their parts."""

import dataclasses
import math
import re
from collections.abc import Mapping

import numpy as np

from continuous_lm import axes as axes_lib


@dataclasses.dataclass(frozen=True)
class Stored:
    """How a parameter lies in a checkpoint.

    Attributes:
      name: the tensor's name, with {layer} for the layer's number.
      axes: the tensor's axes in letters; "(N H) D" is two axes, the first of size N H. A number is
        an axis that the parameter does not have: "(N 3 H) D" holds three parameters.
      pick: which of those this is.
      rows: if the first axis is several groups one after the other, the axes of each group; `axes`
        then describes this one, the `pick`-th.
    """

    name: str
    axes: str
    pick: int = 0
    rows: tuple[str, ...] = ()

    def shape(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """The tensor's shape."""
        groups = re.findall(r"\(([^)]*)\)|(\S+)", self.axes)
        shape = [_size(many or one, sizes) for many, one in groups]
        if self.rows:
            shape[0] = sum(_size(group, sizes) for group in self.rows)
        return tuple(shape)

    def view(
        self, tensor: np.ndarray, axes: tuple[str, ...], sizes: Mapping[str, int]
    ) -> np.ndarray:
        """The part of the stored tensor that is the parameter with `axes`: to read or to write."""
        if self.rows:
            before = sum(_size(group, sizes) for group in self.rows[: self.pick])
            tensor = tensor[before : before + _size(self.rows[self.pick], sizes)]
        letters = axes_lib.split(self.axes.replace("(", "").replace(")", ""))
        tensor = tensor.reshape([_size(a, sizes) for a in letters])
        tensor = tensor[tuple(self.pick if a.isdigit() else slice(None) for a in letters)]
        left = [a for a in letters if not a.isdigit()]
        order = []
        for a in axes:  # a letter that stands twice keeps its order
            order.append(left.index(a))
            left[order[-1]] = ""
        return tensor.transpose(order)


def _size(axes: str, sizes: Mapping[str, int]) -> int:
    return math.prod(int(a) if a.isdigit() else sizes[a] for a in axes_lib.split(axes))
