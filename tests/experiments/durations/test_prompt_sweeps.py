"""Sweeps of a prompt: their ends, middles and refusals, which closed forms give exactly."""

from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

import continuous_lm as clm
from continuous_lm.experiments.durations import alignment, prompt_sweeps
from tests.fixtures import tiny

TEMPLATE = "we saw the [] near here"
WORDS = f"{TEMPLATE} one two three four five six"
PAIRS = [  # of one token and two, two and three, four and two
    pytest.param(("one", "two three"), marks=pytest.mark.slow),
    ("one two", "three four five"),
    pytest.param(("one two three four", "five six"), marks=pytest.mark.slow),
]
ENDS = np.array([0.0, 1.0])
counts = st.integers(1, 12)


@pytest.fixture(scope="module")
def lm(tmp_path_factory):
    # With a window shorter than the prompt, so that a time that is wrong hides something.
    words = tiny.word_tokenizer(WORDS)
    folder = tmp_path_factory.mktemp("model")
    return clm.load(tiny.save(folder, "mistral", tokenizer=words, sliding_window=5))


def interpolating(lm, phrases, points=ENDS, template=TEMPLATE, how="linear"):
    return prompt_sweeps.interpolate_phrases(
        lm, lm.tokenizer, template, phrases, points, how
    )


def embedded(lm, text):
    ids = clm.tokenization.encode(lm.tokenizer, text).ids
    return np.asarray(lm.params["embedding"], np.float32)[ids]


# --- Interpolation: inputs of the model -----------------------------------------------------


@pytest.mark.parametrize("phrases", PAIRS)
def test_the_ends_of_an_interpolation_are_the_ordinary_prompts(lm, phrases):
    prompt_sweep = interpolating(lm, phrases)
    actual = jax.nn.softmax(
        lm(position=-1, **prompt_sweep.sweep.make_inputs()._asdict())
    )
    for row, phrase in zip(actual, phrases, strict=True):
        ids = clm.tokenization.encode(lm.tokenizer, TEMPLATE.replace("[]", phrase)).ids
        plain = jax.nn.softmax(lm(jnp.array(ids), position=-1))
        np.testing.assert_allclose(row, plain, atol=1e-6, rtol=0)
    assert np.abs(actual[0] - actual[1]).max() > 1e-2


def test_phrases_of_one_length_mix_token_by_token(lm):
    prompt_sweep = interpolating(
        lm, ("one two", "three four"), np.array([0.0, 0.5, 1.0])
    )
    inputs = prompt_sweep.sweep.make_inputs()._asdict()
    ends = [embedded(lm, TEMPLATE.replace("[]", p)) for p in ("one two", "three four")]
    np.testing.assert_array_equal(inputs["embeddings"][[0, 2]], ends)
    np.testing.assert_allclose(
        inputs["embeddings"][1], np.mean(ends, axis=0), atol=1e-7
    )
    n = prompt_sweep.sweep.num_tokens
    np.testing.assert_array_equal(inputs["durations"], np.ones((3, n)))
    np.testing.assert_array_equal(inputs["times"], np.tile(np.arange(1, n + 1), (3, 1)))
    assert prompt_sweep.token_names[slice(*prompt_sweep.token_span)] == [
        "one|three",
        "two|four",
    ]
    assert prompt_sweep.token_names[prompt_sweep.token_span[0] - 1] == "the"
    assert prompt_sweep.token_names[prompt_sweep.token_span[1] :] == ["near", "here"]


def test_a_phrase_turns_into_itself_without_a_change(lm):
    inputs = interpolating(
        lm, ("one two", "one two"), np.linspace(0, 1, 5), how="spherical"
    )
    rows = inputs.sweep.make_inputs().embeddings
    np.testing.assert_allclose(rows, np.broadcast_to(rows[0], rows.shape), atol=1e-6)


@pytest.mark.parametrize("template", ["[]", "[] here", "we saw []"])
def test_slots_may_stand_at_either_end(lm, template):
    inputs = (
        interpolating(lm, ("one two", "three four five"), template=template)
        .sweep.make_inputs()
        ._asdict()
    )
    for i, phrase in enumerate(("one two", "three four five")):
        remaining = inputs["durations"][i] > 0
        rows = embedded(lm, template.replace("[]", phrase))
        np.testing.assert_array_equal(inputs["embeddings"][i][remaining], rows)
        np.testing.assert_allclose(
            inputs["times"][i][remaining], np.arange(1, len(rows) + 1), rtol=1e-6
        )


# --- Alignment --------------------------------------------------------------------------------


def test_single_tokens_are_aligned_with_each_other():
    actual = alignment.align_phrases(1, 1)
    np.testing.assert_array_equal(actual.end_shares, [1])
    np.testing.assert_array_equal(actual.token_indices, [[0], [0]])
    np.testing.assert_array_equal(actual.sample_durations, [[1], [1]])


def test_two_tokens_with_three():
    actual = alignment.align_phrases(2, 3)
    np.testing.assert_allclose(actual.end_shares, [1 / 3, 1 / 2, 2 / 3, 1], rtol=1e-15)
    np.testing.assert_array_equal(actual.token_indices, [[0, 0, 1, 1], [0, 1, 1, 2]])
    np.testing.assert_array_equal(actual.sample_durations, [[0, 1, 0, 1], [1, 0, 1, 1]])


def test_two_tokens_with_four():
    actual = alignment.align_phrases(2, 4)
    np.testing.assert_array_equal(actual.end_shares, [0.25, 0.5, 0.75, 1])
    np.testing.assert_array_equal(actual.token_indices, [[0, 0, 1, 1], [0, 1, 2, 3]])
    np.testing.assert_array_equal(actual.sample_durations, [[0, 1, 0, 1], [1, 1, 1, 1]])


@given(counts, counts)
def test_samples_are_where_tokens_end_and_of_the_tokens_there(first, second):
    actual = alignment.align_phrases(first, second)
    exact = sorted({Fraction(k, n) for n in (first, second) for k in range(1, n + 1)})
    np.testing.assert_allclose(actual.end_shares, [float(e) for e in exact], rtol=1e-15)
    for n, tokens, weights in zip(
        (first, second), actual.token_indices, actual.sample_durations, strict=True
    ):
        for end, token, weight in zip(exact, tokens, weights, strict=True):
            assert Fraction(int(token), n) < end <= Fraction(int(token) + 1, n)
            assert weight == (end * n == token + 1)
        assert weights.sum() == n


@given(counts, counts)
def test_an_alignment_the_other_way_round_is_the_same(first, second):
    one, other = (
        alignment.align_phrases(first, second),
        alignment.align_phrases(second, first),
    )
    np.testing.assert_array_equal(one.end_shares, other.end_shares)
    np.testing.assert_array_equal(one.token_indices, other.token_indices[::-1])
    np.testing.assert_array_equal(one.sample_durations, other.sample_durations[::-1])


@given(counts, counts, st.integers(0, 5), st.integers(0, 5), st.floats(0, 1))
def test_durations_and_times_go_from_one_prompt_to_the_other(
    first, second, before, after, share
):
    actual = alignment.align_phrases(first, second)
    points = np.array([0.0, share, 1.0])
    durations, times = actual.durations_and_times(points, before, after)
    lengths = before + after + (1 - points) * first + points * second
    np.testing.assert_allclose(durations.sum(axis=1), lengths, rtol=1e-6)
    if after:
        np.testing.assert_allclose(times[:, -1], lengths, rtol=1e-6)
    assert (np.diff(times, axis=1) > 0).all()
    for row in (0, 2):  # where only the ordinary tokens of one prompt are left
        remaining = durations[row] > 0
        np.testing.assert_array_equal(durations[row][remaining], 1)
        np.testing.assert_allclose(
            times[row][remaining], np.arange(1, lengths[row] + 1), rtol=1e-6
        )


# --- Mixing -----------------------------------------------------------------------------------


def unit_vectors(seed, angle):
    """Two unit vectors [1, 8] at an angle, in a random plane."""
    plane, _ = np.linalg.qr(np.random.default_rng(seed).standard_normal((8, 2)))
    return plane[:, 0][None], (
        np.cos(angle) * plane[:, 0] + np.sin(angle) * plane[:, 1]
    )[None]


seeds, angles = st.integers(0, 2**32 - 1), st.floats(0.05, 3.0)


@given(seeds, angles)
def test_an_arc_keeps_the_norm_and_its_angular_speed(seed, angle):
    points = np.linspace(0, 1, 9)
    first, second = unit_vectors(seed, angle)
    arc = alignment.interpolate_vectors(first, second, points, "spherical")[:, 0]
    np.testing.assert_allclose(np.linalg.norm(arc, axis=1), 1, atol=2e-5)
    # Components in the plane give the angle of the arc.
    aside = (second[0] - np.cos(angle) * first[0]) / np.sin(angle)
    turned = np.arctan2(arc @ aside, arc @ first[0])
    np.testing.assert_allclose(turned, points * angle, atol=2e-5)


@given(seeds, st.floats(0, 1))
def test_a_line_goes_straight(seed, share):
    first, second = (
        np.random.default_rng(seed).standard_normal((2, 3, 8)).astype(np.float32)
    )
    ends = alignment.interpolate_vectors(first, second, ENDS, "linear")
    np.testing.assert_array_equal(ends, [first, second])
    (middle,) = alignment.interpolate_vectors(first, second, [0.5], "linear")
    np.testing.assert_array_equal(middle, (first + second) / 2)
    (point,) = alignment.interpolate_vectors(first, second, [share], "linear")
    np.testing.assert_allclose(point, first + share * (second - first), atol=1e-5)


@given(seeds)
def test_both_ways_begin_and_end_alike(seed):
    first, second = (
        np.random.default_rng(seed).standard_normal((2, 3, 8)).astype(np.float32)
    )
    arcs = alignment.interpolate_vectors(first, second, ENDS, "spherical")
    np.testing.assert_allclose(arcs, [first, second], atol=1e-6)


@pytest.mark.parametrize("factor", [1.0, 2.5, -1.0])
def test_an_arc_of_parallel_vectors_is_a_line(factor):
    first = np.ones((1, 8), np.float32)
    points = np.linspace(0, 1, 5)
    arc = alignment.interpolate_vectors(first, factor * first, points, "spherical")
    line = alignment.interpolate_vectors(first, factor * first, points, "linear")
    np.testing.assert_allclose(arc, line, atol=1e-6)


# --- Other sweeps -----------------------------------------------------------------------------


@given(st.lists(st.floats(0.01, 3), min_size=1, max_size=5))
def test_shrinking_touches_the_words_that_the_characters_touch(factors):
    words = tiny.word_tokenizer(WORDS)
    prompt = "we saw one two near here"
    begin = prompt.index("ne two n")  # inside of "one" to inside of "near"
    characters, factors = (begin, begin + len("ne two n")), np.array(factors)
    prompt_sweep = prompt_sweeps.shrink_span(words, prompt, characters, factors)
    assert prompt_sweep.token_names[slice(*prompt_sweep.token_span)] == [
        "one",
        "two",
        "near",
    ]
    expected = np.ones((len(factors), 7))
    expected[:, 3:6] = factors[:, None]
    np.testing.assert_allclose(
        prompt_sweep.sweep.make_inputs().durations, expected, rtol=1e-6
    )


def test_moving_and_stretching_take_the_whole_prompt():
    words, points = tiny.word_tokenizer(WORDS), np.array([0.5, 2.0])
    moved = prompt_sweeps.shift_prompt(words, "we saw one", points)
    np.testing.assert_array_equal(moved.sweep.make_inputs().start, points)
    slow = prompt_sweeps.stretch_prompt(words, "we saw one", points)
    np.testing.assert_array_equal(
        slow.sweep.make_inputs().durations, [[0.5] * 4, [2.0] * 4]
    )
    for prompt_sweep in (moved, slow):
        assert prompt_sweep.token_names == ["<bos>", "we", "saw", "one"]
        assert prompt_sweep.as_json() == {
            "prompt": "we saw one",
            "tokens": prompt_sweep.token_names,
            "span": [0, 4],
        }


# --- Refused input ----------------------------------------------------------------------------


def refused(lm, *culprits, **changes):
    inputs = {"phrases": ("one", "two"), "template": TEMPLATE} | changes
    with pytest.raises(clm.InputError) as caught:
        interpolating(lm, **inputs).sweep.make_inputs()
    for culprit in culprits:
        assert culprit in str(caught.value)


@pytest.mark.parametrize("template", ["we saw the", "the [] saw the []"])
def test_templates_have_one_slot(lm, template):
    refused(lm, repr(template), "[] once", template=template)


@pytest.mark.parametrize("phrases", [("one", "seventy"), ("seventy", "one")])
def test_words_outside_of_the_vocabulary_are_named(lm, phrases):
    refused(lm, "cannot spell 'seventy'", phrases=phrases)


def test_empty_phrases_are_refused(lm):
    refused(lm, "'one' and ''", "empty", phrases=("one", ""))


def test_there_are_two_ways_between_vectors(lm):
    refused(lm, "'cubic'", "'linear' or 'spherical'", how="cubic")


def merging_tokenizer():
    """A BPE that merges "y" after the slot with "a", but not with "b"."""
    letters = {letter: i for i, letter in enumerate("xabyz")}
    merged = [("a", "y"), ("y", "z")]
    vocab = letters | {"".join(pair): len(letters) + i for i, pair in enumerate(merged)}
    return tokenizers.Tokenizer(tokenizers.models.BPE(vocab, merged))


def test_phrases_that_merge_with_what_is_around_them_cannot_be_aligned(lm):
    bpe = merging_tokenizer()
    assert bpe.encode("xayz").tokens == ["x", "ay", "z"]
    assert bpe.encode("xbyz").tokens == ["x", "b", "yz"]
    with pytest.raises(clm.InputError, match="'a' and 'b' cannot be aligned"):
        prompt_sweeps.interpolate_phrases(lm, bpe, "x[]yz", ("a", "b"), ENDS)
    prompt_sweep = prompt_sweeps.interpolate_phrases(
        lm, bpe, "x[]yz", ("b", "bb"), ENDS
    )
    assert prompt_sweep.token_names == ["x", "b|b", "b|b", "yz"]
