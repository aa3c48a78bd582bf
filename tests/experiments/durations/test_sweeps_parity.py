"""Sweeps against transformers, point by point, on tiny random checkpoints and on real weights.

The reference does not use sweeps. A loop over the points computes end times, weights and
embeddings. PyTorch gets them as position_ids, a 4-D mask of log d, and inputs_embeds, and gives the
distribution of the next token.
"""

import contextlib
from fractions import Fraction

import numpy as np
import pytest

import continuous_lm as clm
from continuous_lm.experiments.durations import prompt_sweeps
from tests.fixtures import tiny
from tests.models.families.test_parity import STORIES, interpolated_rows

torch = pytest.importorskip("torch")

TOLERANCE = 1e-5  # of a probability
FACTORS = np.linspace(0.13, 1.0, 5)
SHARES = np.linspace(0.0, 1.0, 5)
SHIFTS = np.linspace(0.0, 7.3, 5)
FAMILIES = ("llama", "gemma2", "gpt2")
# Template and the phrases for its slot: two prompts of different lengths for each kind of pair.
EQUAL = (
    ("we saw the [] near the old house", ("little girl", "big dog")),
    ("the [] saw the house", ("dog", "girl")),
)
UNEQUAL = (
    ("we saw the [] near the old house", ("little girl", "very big dog")),
    ("the [] saw the house", ("girl", "very big dog")),
)
WORDS = " ".join(
    f"{template} {' '.join(phrases)}" for template, phrases in (*EQUAL, *UNEQUAL)
)


# --- The reference ----------------------------------------------------------------------------


def masks(reference, times, d):
    """The causal mask with log d added; for models with windows, one for each kind of layer."""

    def mask(window):
        visible = np.tril(np.ones((len(d), len(d)), bool)) & (d > 0)
        if window is not None:
            visible &= times[:, None] - times < window * (1 - 1e-6)
        logs = np.log(np.where(d > 0, d, 1.0))
        values = np.where(visible, logs, np.finfo(np.float32).min)
        return torch.tensor(values, dtype=torch.float32)[None, None]

    config = reference.config
    if "sliding_attention" not in (getattr(config, "layer_types", None) or ()):
        return mask(None)
    return {
        "full_attention": mask(None),
        "sliding_attention": mask(config.sliding_window),
    }


def next_token(reference, rows, d, times):
    """The distribution [V] after embeddings [T, D] that last d [T] and end at times [T]."""
    learned = reference.config.model_type == "gpt2"
    positions = torch.tensor(times - learned, dtype=torch.float32)[None]
    patched = interpolated_rows(reference) if learned else contextlib.nullcontext()
    with torch.no_grad(), patched:
        logits = reference(
            inputs_embeds=rows[None],
            position_ids=positions,
            attention_mask=masks(reference, times, d),
        ).logits
    return torch.softmax(logits[0, -1].double(), -1).numpy()


def embed(reference, ids):
    """The embeddings [T, D] of tokens; Gemma's come scaled, as its inputs_embeds have to be."""
    with torch.no_grad():
        return reference.get_input_embeddings()(torch.tensor(ids))


def between(first, second, share, how):
    """A row between two rows [D]: on the line, or on the arc."""
    if how == "linear":
        return (1 - share) * first + share * second
    cosine = torch.dot(first, second).double() / (
        first.double().norm() * second.double().norm()
    )
    angle = torch.arccos(cosine)
    if torch.sin(angle) < 1e-4:
        return between(first, second, share, "linear")
    parts = torch.sin((1 - share) * angle), torch.sin(share * angle)
    return ((parts[0] * first + parts[1] * second) / torch.sin(angle)).float()


# --- Kinds of sweeps: a prompt's sweep, and its points (rows, d, times) by hand -------------------


def ids_of(tokenizer, text):
    return clm.tokenization.encode(tokenizer, text).ids


def shrinking(change):
    def models(reference, lm, template, phrases):
        words, slot = lm.tokenizer, template.index("[]")
        text = template.replace("[]", phrases[1])
        span = (slot, slot + len(phrases[1]))
        prompt_sweep = prompt_sweeps.shrink_span(words, text, span, FACTORS, change)
        rows = embed(reference, ids_of(words, text))
        first, end = prompt_sweep.token_span
        points = []
        for factor in FACTORS:
            short = np.ones(len(rows))
            short[first:end] = factor
            ordinary = np.ones(len(rows))
            d = ordinary if change == "times" else short
            points.append((rows, d, np.cumsum(ordinary if change == "mass" else short)))
        return prompt_sweep, points

    return models


def moving(reference, lm, template, phrases):
    text = template.replace("[]", phrases[0])
    rows = embed(reference, ids_of(lm.tokenizer, text))
    d = np.ones(len(rows))
    points = [(rows, d, shift + np.cumsum(d)) for shift in SHIFTS]
    return prompt_sweeps.shift_prompt(lm.tokenizer, text, SHIFTS), points


def stretching(reference, lm, template, phrases):
    text = template.replace("[]", phrases[0])
    rows = embed(reference, ids_of(lm.tokenizer, text))
    factors = 1.5 * FACTORS
    points = [
        (rows, *(f(np.full(len(rows), x)) for f in (np.array, np.cumsum)))
        for x in factors
    ]
    return prompt_sweeps.stretch_prompt(lm.tokenizer, text, factors), points


def interpolating(how):
    def models(reference, lm, template, phrases):
        prompt_sweep = prompt_sweeps.interpolate_phrases(
            lm, lm.tokenizer, template, phrases, SHARES, how
        )
        points = [
            by_hand(reference, lm.tokenizer, template, phrases, s, how) for s in SHARES
        ]
        return prompt_sweep, points

    return models


def by_hand(reference, tokenizer, template, phrases, share, how):
    """One point between two phrases that fill the same span, sampled where a token ends."""
    encoded = [ids_of(tokenizer, template.replace("[]", phrase)) for phrase in phrases]
    begin = next(i for i, (a, b) in enumerate(zip(*encoded, strict=False)) if a != b)
    after = next(
        i
        for i, (a, b) in enumerate(zip(*(e[::-1] for e in encoded), strict=False))
        if a != b
    )
    inner = [e[begin : len(e) - after] for e in encoded]
    lengths = [len(ids) for ids in inner]
    first, second = (embed(reference, ids) for ids in inner)
    length = (1 - share) * lengths[0] + share * lengths[1]
    rows, d, times = list(embed(reference, encoded[0][:begin])), [1.0] * begin, []
    times += range(1, begin + 1)
    for end in sorted({Fraction(k, n) for n in lengths for k in range(1, n + 1)}):
        a, b = (
            -(-end * n // 1) - 1 for n in lengths
        )  # the tokens that last until then, or longer
        rows.append(between(first[a], second[b], share, how))
        weights = [float((end * n).denominator == 1) for n in lengths]
        d.append((1 - share) * weights[0] + share * weights[1])
        times.append(begin + length * float(end))
    rows += list(embed(reference, encoded[0][len(encoded[0]) - after :]))
    d += [1.0] * after
    times += [begin + length + k for k in range(1, after + 1)]
    return torch.stack(rows), np.array(d), np.array(times, np.float64)


KINDS = {
    "shrinking": (shrinking("both"), EQUAL),
    "shrinking mass": (shrinking("mass"), EQUAL),
    "shrinking times": (shrinking("times"), EQUAL),
    "moving": (moving, EQUAL),
    "stretching": (stretching, EQUAL),
    "line, equal": (interpolating("linear"), EQUAL),
    "line, unequal": (interpolating("linear"), UNEQUAL),
    "arc, equal": (interpolating("spherical"), EQUAL),
    "arc, unequal": (interpolating("spherical"), UNEQUAL),
}


# --- Tests ------------------------------------------------------------------------------------


def assert_equal_point_by_point(reference, lm, kind):
    """One prompt alone, and it with a shorter one in the same batches, against the loop."""
    models, prompts = KINDS[kind]
    both = [models(reference, lm, *prompt) for prompt in prompts]
    expected = [
        np.array([next_token(reference, *p) for p in points]) for _, points in both
    ]
    groups = [[i] for i in range(lm.config.vocab_size)]
    sweeps = [prompt_sweep.sweep for prompt_sweep, _ in both]
    alone = clm.sweep.probabilities(
        lm, groups, batch_size=3, **sweeps[0].make_inputs()._asdict()
    )
    np.testing.assert_allclose(alone, expected[0], atol=TOLERANCE, rtol=0)
    assert sweeps[0].num_tokens > sweeps[1].num_tokens
    for actual, theirs in zip(
        clm.sweep.run_group(lm, groups, sweeps, 4), expected, strict=True
    ):
        np.testing.assert_allclose(actual, theirs, atol=TOLERANCE, rtol=0)
    still = (
        kind == "moving" and lm.config.max_positions is None
    )  # rotary models do not mind
    assert (np.ptp(expected[0], axis=0).max() > 1e-3) != still


@pytest.fixture(scope="module")
def load(tmp_path_factory):
    """Family -> a random checkpoint in both implementations, made when it is first asked for."""
    models = {}

    def get(family):
        if family not in models:
            folder = tmp_path_factory.mktemp(family)
            reference = tiny.save_reference(folder, family)
            tiny.word_tokenizer(WORDS).save(str(folder / "tokenizer.json"))
            models[family] = reference, clm.load(folder)
        return models[family]

    return get


FAST = {("gemma2", "arc, unequal")}


def cases(fast):
    return [(f, k) for f in FAMILIES for k in KINDS if ((f, k) in FAST) == fast]


@pytest.mark.parametrize(("family", "kind"), cases(fast=True))
def test_sweeps_equal_transformers(load, family, kind):
    assert_equal_point_by_point(*load(family), kind)


@pytest.mark.slow
@pytest.mark.parametrize(("family", "kind"), cases(fast=False))
def test_every_sweep_of_every_family_equals_transformers(load, family, kind):
    assert_equal_point_by_point(*load(family), kind)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_sweeps_of_real_weights_equal_transformers(stories, kind):
    assert_equal_point_by_point(*stories, kind)


@pytest.fixture(scope="module")
def stories():
    if not STORIES.exists():
        pytest.skip(
            f"the TinyStories weights are not at {STORIES.relative_to(STORIES.parents[3])}"
        )
    import transformers

    reference = transformers.AutoModelForCausalLM.from_pretrained(
        STORIES, attn_implementation="eager"
    )
    return reference.eval(), clm.load(STORIES)
