"""Batches: every window is a piece of the sequence, every target comes once an epoch."""

import itertools
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import continuous_lm as clm
from continuous_lm.experiments.training import window_batches

TOKENS = np.arange(1000, dtype=np.int32)


def samples(array=TOKENS, count=40, **changes):
    iterator = window_batches.shuffled_windows(
        array, **(dict(length=8, batch_size=5, seed=0) | changes)
    )
    return np.stack(list(itertools.islice(iterator, count)))


@given(st.integers(2, 60), st.integers(1, 12), st.integers(1, 5), st.integers(0, 3))
def test_windows_are_pieces_and_an_epoch_has_each_target_once(
    size, length, batch_size, seed
):
    if size <= length:
        with pytest.raises(
            clm.InputError, match=f"has {size} tokens.*takes {length + 1}"
        ):
            samples(TOKENS[:size], length=length)
        return
    count = max(1, (size - length) // length)  # windows in an epoch
    some = samples(
        TOKENS[:size], 3 * count, length=length, batch_size=batch_size, seed=seed
    )
    assert some.shape == (3 * count, batch_size, length + 1)
    assert some.dtype == np.int32
    np.testing.assert_array_equal(np.diff(some), 1)
    assert some.min() >= 0
    assert some.max() < size
    for epoch in some.reshape(-1, length + 1)[: 3 * count].reshape(3, count, -1):
        targets = np.sort(epoch[:, 1:].ravel())
        np.testing.assert_array_equal(np.diff(targets), 1)


def test_every_epoch_cuts_elsewhere_in_another_order():
    count = (1000 - 8) // 8
    epochs = samples(count=count, batch_size=5).reshape(5, count, 9)
    offsets = {int(epoch.min()) for epoch in epochs}
    assert len(offsets) > 2
    orders = {tuple(epoch[:, 0] // 8) for epoch in epochs}
    assert len(orders) == 5
    assert not (np.diff(epochs[0][:, 0]) > 0).all()


def test_all_of_a_sequence_is_reached():
    some = samples(TOKENS[:30], count=300)
    assert set(some[..., 1:].ravel()) == set(range(1, 30))


def test_seeds_and_positions():
    full = samples()
    np.testing.assert_array_equal(samples(), full)
    assert (samples(seed=1) != full).any()
    # The order of the next seed does not come an epoch later.
    count = (1000 - 8) // 8
    first, second = (
        samples(count=2 * count, batch_size=1, seed=s)[:, 0, 0] // 8 for s in (0, 1)
    )
    assert (first[count:] != second[:count]).any()

    iterator = window_batches.shuffled_windows(TOKENS, length=8, batch_size=5, seed=0)
    for i in range(40):
        state = json.loads(json.dumps(iterator.get_state()))
        np.testing.assert_array_equal(next(iterator), full[i])
        other = window_batches.shuffled_windows(TOKENS, length=8, batch_size=5, seed=0)
        other.set_state(state)
        np.testing.assert_array_equal(next(other), full[i])
    iterator.set_state(state)
    np.testing.assert_array_equal(next(iterator), full[39])


def test_frames_and_mapped_files(tmp_path):
    frames = np.random.default_rng(0).normal(size=(100, 3)).astype(np.float32)
    some = samples(frames, count=4)
    assert some.shape == (4, 5, 9, 3)
    assert some.dtype == np.float32
    np.save(tmp_path / "frames.npy", frames)
    mapped = np.load(tmp_path / "frames.npy", mmap_mode="r")
    np.testing.assert_array_equal(samples(mapped, count=4), some)
    with pytest.raises(clm.InputError, match=r"100 frames.*takes 101"):
        samples(frames, length=100)


def test_consecutive_windows():
    windows = window_batches.consecutive_windows(TOKENS[:100], length=9)
    assert windows.shape == (11, 10)
    np.testing.assert_array_equal(windows[:, 1:].ravel(), np.arange(1, 100))
    some = window_batches.consecutive_windows(TOKENS[:100], length=9, max_windows=3)
    np.testing.assert_array_equal(some, windows[[0, 3, 7]])
    assert window_batches.consecutive_windows(np.zeros((20, 2)), length=4).shape == (
        4,
        5,
        2,
    )
    with pytest.raises(clm.InputError, match="held-out data is too short"):
        window_batches.consecutive_windows(TOKENS[:9], length=9)


@pytest.mark.parametrize(
    ("name", "value"), [("length", 0), ("batch_size", 0), ("seed", -1)]
)
def test_sizes(name, value):
    with pytest.raises(
        clm.InputError, match=f"{name} must be at least {value + 1}, not {value}"
    ):
        samples(**{name: value})
