"""Windows of a long sequence in random order, with Grain: infinite, deterministic, resumable.

An epoch cuts the sequence into windows from a random offset, in random order. The last target of a
window is the first input of the next. So every epoch cuts at other places, and within an epoch each
target occurs once.

Grain's own shuffle is not used. For up to 65,536 windows it walks a cycle of that length for each
index, which took 9 ms an index with 10 windows. It also gives seed s in epoch 1 the order of seed
s + 1 in epoch 0.
"""

import functools
from typing import NamedTuple

import numpy as np

from continuous_lm.errors import InputError
from continuous_lm.experiments.training.run_folder import BatchIterator


class _Epoch(NamedTuple):
    offset: int
    order: np.ndarray  # of the windows


class _WindowAtIndex:
    """Index -> window, over all epochs; Grain calls it."""

    def __init__(self, array: np.ndarray, length: int, seed: int):
        self.array = array
        self.length = length
        self.seed = seed
        # One window fewer than would fit leaves room for every offset from 0 to length - 1.
        self.num_windows = max(1, (len(array) - length) // length)
        self.max_offset = len(array) - 1 - self.num_windows * length
        # Of two epochs, since a batch may lie across them.
        self._cached_epoch = functools.lru_cache(maxsize=2)(self._draw_epoch)

    def _draw_epoch(self, epoch: int) -> _Epoch:
        rng = np.random.default_rng([self.seed, epoch])
        return _Epoch(
            int(rng.integers(self.max_offset + 1)), rng.permutation(self.num_windows)
        )

    def __call__(self, index: int) -> np.ndarray:
        epoch_number, place_in_epoch = divmod(int(index), self.num_windows)
        epoch = self._cached_epoch(epoch_number)
        start = epoch.offset + int(epoch.order[place_in_epoch]) * self.length
        return np.asarray(self.array[start : start + self.length + 1])


def check_length(array: np.ndarray, length: int, name: str = "the data") -> None:
    """Raise InputError for a sequence too short for one window of `length` inputs and targets."""
    unit = "tokens" if array.ndim == 1 else "frames"
    if len(array) <= length:
        raise InputError(
            f"{name} is too short for one sequence: it has {len(array)} {unit}, and a sequence"
            f" takes {length + 1} ({length} and the last one's target); give more, or make"
            " sequences shorter"
        )


def shuffled_windows(
    array: np.ndarray, *, length: int, batch_size: int, seed: int
) -> BatchIterator[np.ndarray]:
    """An endless iterator of batches of windows, a Grain `DatasetIterator`.

    `get_state()` returns a small dict for JSON, and `set_state` of another iterator with the same
    arguments continues from there. Reading uses this process and thread.

    Args:
      array: [T, ...], time first: tokens int [T] or vectors [T, W]. It may be memory-mapped.
      length: n, the number of inputs of a window.
      batch_size: B, windows in a batch.
      seed: seed of offsets and orders; not negative.

    Returns:
      Iterator over arrays [B, n + 1, ...] of the dtype of `array`: inputs are [:, :-1], targets
      [:, 1:].

    Raises:
      InputError: if a size is not positive, or the sequence is too short.
    """
    for name, value, minimum in (
        ("length", length, 1),
        ("batch_size", batch_size, 1),
        ("seed", seed, 0),
    ):
        if value < minimum:
            raise InputError(f"{name} must be at least {minimum}, not {value}")
    check_length(array, length)
    import grain  # late: it takes a second

    window_at_index = _WindowAtIndex(array, length, seed)
    # As good as endless; of `repeat` without a number, Grain cannot always tell the length.
    dataset = grain.MapDataset.range(2**48).map(window_at_index)
    read_options = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
    batches: BatchIterator[np.ndarray] = iter(
        dataset.batch(batch_size).to_iter_dataset(read_options)
    )
    return batches


def consecutive_windows(
    array: np.ndarray, *, length: int, max_windows: int | None = None
) -> np.ndarray:
    """The windows of a sequence from its beginning, for evaluation: [k, n + 1, ...].

    Each target comes once; a rest that is shorter than a window is left out.

    Args:
      array: [T, ...], as for `shuffled_windows`.
      length: n.
      max_windows: at most so many windows, spread evenly over the sequence.

    Raises:
      InputError: if the sequence is too short.
    """
    check_length(array, length, "the held-out data")
    num_windows = (len(array) - 1) // length
    window_indices = np.arange(num_windows)
    if max_windows is not None and max_windows < num_windows:
        window_indices = np.arange(max_windows) * num_windows // max_windows
    return np.asarray(array)[window_indices[:, None] * length + np.arange(length + 1)]
