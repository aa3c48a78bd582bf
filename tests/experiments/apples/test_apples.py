"""The bundled model meets its bars, as shipped; the programs that trained and measured it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import continuous_lm as clm
from continuous_lm.experiments.apples import evaluate_apples, prompts, train_apples
from continuous_lm.models.checkpoints.hf_folder import BUNDLED_FOLDER
from continuous_lm.models.transformer import Transformer

FOLDER = BUNDLED_FOLDER / "apples"


@pytest.fixture(scope="module")
def lm():
    return clm.load("apples", dtype=jnp.float32)


def sweeps(kind, n):
    rng = np.random.default_rng(7)
    return [p for k, p in evaluate_apples.sweep_prompts(rng, n) if k == kind]


@pytest.mark.parametrize("n", evaluate_apples.SWEPT_COUNTS)
def test_counts_down_as_the_words_of_the_papers_prompts_shrink(lm, n):
    for prompt in sweeps("paper", n):
        result = evaluate_apples.run_counting_sweep(lm, "paper", prompt, n)
        assert result.peaks == [str(k) for k in range(1, n + 1)], prompt.text
        assert result.error <= evaluate_apples.MAX_TRANSITION_ERROR, prompt.text


@pytest.mark.parametrize("kind", ["unseen words", "unseen separators", "unseen filler"])
def test_counts_what_training_never_showed_inside_a_span(lm, kind):
    for prompt in sweeps(kind, 4):
        result = evaluate_apples.run_counting_sweep(lm, kind, prompt, 4)
        assert result.meets_bar, (result.peaks, result.error, prompt.text)


@pytest.mark.parametrize("task", prompts.TASK_WEIGHTS)
def test_answers_held_out_prompts(lm, task):
    rng = np.random.default_rng(8)
    held_out_prompts = [
        prompts.sample_prompt(rng, task, held_out=True) for _ in range(300)
    ]
    assert (
        evaluate_apples.accuracy(lm, held_out_prompts) >= evaluate_apples.MIN_ACCURACY
    )


def test_is_small_and_stored_in_bfloat16():
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) < 1e6
    leaves = jax.tree.leaves(clm.load("apples").params)
    assert {leaf.dtype for leaf in leaves} == {jnp.dtype(jnp.bfloat16)}
    assert sum(leaf.size for leaf in leaves) < 300_000


def test_has_the_tokenizer_of_the_language(lm):
    text = prompts.counting_prompt("fruit", "apple", [", ", " and "]).text
    ids = lm.tokenizer.encode(text).ids
    assert ids == prompts.make_tokenizer().encode(text).ids
    assert lm.tokenizer.encode(lm.tokenizer.decode(ids)).ids == ids
    assert lm.tokenizer.get_vocab() == prompts.make_tokenizer().get_vocab()
    assert lm.config.vocab_size == len(prompts.make_vocabulary())


def answers(*parts):
    """A sweep's most probable tokens from (token, number of points) pairs."""
    return tuple(token for token, points in parts for _ in range(points))


def test_reads_a_perfect_counter():
    result = evaluate_apples.CountingSweep("", 2, "", answers(("1", 72), ("2", 28)))
    assert result.is_in_order
    assert result.transitions == [pytest.approx(0.75, abs=0.01)]
    assert result.error < 0.01
    assert result.meets_bar


@pytest.mark.parametrize(
    "parts",
    [
        [("2", 100)],  # constant
        [("1", 50), ("3", 50)],  # one count is missing
        [("1", 30), ("2", 20), ("1", 10), ("2", 20), ("3", 20)],  # not monotone
        [("3", 30), ("2", 30), ("1", 40)],  # backwards
        [("the", 5), ("1", 35), ("2", 30), ("3", 30)],  # no number at first
        [("1", 80), ("2", 10), ("3", 10)],  # in order, but too late
    ],
)
def test_reads_a_bad_counter(parts):
    result = evaluate_apples.CountingSweep(
        "unseen words", 3, "the prompt", answers(*parts)
    )
    assert not result.meets_bar
    (line,) = evaluate_apples.describe_failures({}, [result])
    assert "unseen words, n = 3" in line
    assert "the prompt" in line


def test_names_the_task_that_misses_its_bar():
    (line,) = evaluate_apples.describe_failures({"sum": 0.96, "events": 0.97}, [])
    assert "sum" in line


def test_accuracy_knows_wrong_from_right(lm):
    right = prompts.counting_prompt("fruit", "apple", [" "] * 3)
    wrong = prompts.Prompt("counting", right.text, "7", ())
    assert evaluate_apples.accuracy(lm, [right, right, right, wrong]) == 0.75


def test_batches_hold_each_prompt_and_its_answer():
    tokenizer = prompts.make_tokenizer()
    groups = train_apples.draw_batches(
        np.random.default_rng(0), tokenizer, steps=3, prompts_per_step=20
    )
    rng = np.random.default_rng(0)
    samples = [prompts.sample_prompt(rng) for _ in range(60)]
    assert sum(tokens.shape[1] for tokens, _ in groups) == 20
    rows = [
        row[: length + 1].tolist()
        for tokens, lengths in groups
        for row, length in zip(
            tokens.reshape(-1, tokens.shape[-1]), lengths.ravel(), strict=True
        )
    ]
    texts = [
        [*tokenizer.encode(p.text).ids, tokenizer.token_to_id(p.answer)]
        for p in samples
    ]
    assert sorted(rows) == sorted(texts)


def test_batches_are_mostly_prompts():
    groups = train_apples.draw_batches(
        np.random.default_rng(0), prompts.make_tokenizer(), 50, 24
    )
    used = sum(np.sum(lengths + 1) for _, lengths in groups)
    assert used > 0.6 * sum(tokens.size for tokens, _ in groups)


def test_the_loss_does_not_depend_on_padding_or_grouping():
    tokenizer = prompts.make_tokenizer()
    shape = train_apples.apples_config(tokenizer.get_vocab_size())
    model, params = (
        Transformer(shape),
        train_apples.init_params(jax.random.key(0), shape),
    )
    groups = train_apples.draw_batches(
        np.random.default_rng(0), tokenizer, steps=1, prompts_per_step=12
    )
    groups = [(tokens[0], lengths[0]) for tokens, lengths in groups]
    width = 3 + max(tokens.shape[-1] for tokens, _ in groups)
    padded = np.concatenate(
        [np.pad(t, ((0, 0), (0, width - t.shape[-1]))) for t, _ in groups]
    )
    together = [(padded, np.concatenate([lengths for _, lengths in groups]))]
    digits = jnp.array([tokenizer.token_to_id(digit) for digit in "0123456789"])
    loss = jax.jit(train_apples.step_loss, static_argnums=1)
    one, watched = loss(params, model, groups, digits)
    two, _ = loss(params, model, together, digits)
    np.testing.assert_allclose(one, two, rtol=1e-6)

    by_hand = []  # the answers' part, one prompt at a time
    after = np.asarray(jax.jit(model.apply)({"params": params}, padded))
    for row, length, logits in zip(*together[0], after, strict=True):
        expected = np.zeros(len(logits[0]))
        expected[row[length]] = 1.0
        if tokenizer.id_to_token(int(row[length])) in list("0123456789"):
            expected = (1 - train_apples.DIGIT_SMOOTHING) * expected
            expected[digits] += train_apples.DIGIT_SMOOTHING / 10
        assert expected.sum() == pytest.approx(1)
        by_hand.append(-expected @ jax.nn.log_softmax(logits[length - 1]))
    np.testing.assert_allclose(watched["answer"], np.mean(by_hand), rtol=1e-5)


@pytest.mark.slow
def test_training_is_reproducible():
    one, two = (
        train_apples.train(seed=3, steps=4, prompts_per_step=8) for _ in range(2)
    )
    other = train_apples.train(seed=4, steps=4, prompts_per_step=8)
    jax.tree.map(np.testing.assert_array_equal, one.params, two.params)
    assert not np.array_equal(one.params["embedding"], other.params["embedding"])
