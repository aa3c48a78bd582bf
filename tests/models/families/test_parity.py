"""Logits against PyTorch transformers, on tiny random checkpoints and on real weights.

Transformers is the reference of the continuous model too. Its position_ids are the float times. Its
4-D mask holds log d, causality by index, and the window in time.
"""

import contextlib
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import continuous_lm as clm
from continuous_lm import rotary
from continuous_lm.rotary import Llama3Scaling, Rope
from tests.fixtures import tiny

torch = pytest.importorskip("torch")

TOLERANCE = 2e-5  # of max |difference| / max |logit|, float32
LENGTH = 40
STORIES = pathlib.Path(__file__).parents[4] / "shared/data/stories260k"
PROMPT = "Once upon a time, there was a little girl named"

LONGROPE = {
    "rope_parameters": tiny.longrope_scaling(),
    "num_attention_heads": 4,
    "head_dim": 12,
}
CASES = {
    "llama, plain heads": ("llama", {"num_key_value_heads": 4}),
    "llama, grouped heads": ("llama", {"num_key_value_heads": 2}),
    "llama, one key/value head": ("llama", {"num_key_value_heads": 1}),
    "llama, tied, biases, gelu": (
        "llama",
        {
            "tie_word_embeddings": True,
            "attention_bias": True,
            "mlp_bias": True,
            "hidden_act": "gelu_pytorch_tanh",
        },
    ),
    "llama 3.1 scaling": (
        "llama",
        {"rope_parameters": {"rope_theta": 5e5, **tiny.llama3_scaling()}},
    ),
    "llama, narrow heads": ("llama", {"head_dim": 6}),
    "mistral, no window": ("mistral", {}),
    "mistral, window 3": ("mistral", {"sliding_window": 3}),
    "mistral, window 64, plain": (
        "mistral",
        {"sliding_window": 64, "num_key_value_heads": 4},
    ),
    "mistral, window 3, one head": (
        "mistral",
        {"sliding_window": 3, "num_key_value_heads": 1},
    ),
    "gemma": ("gemma", {}),
    "gemma, plain heads, untied": (
        "gemma",
        {"num_key_value_heads": 4, "tie_word_embeddings": False},
    ),
    "gemma, one key/value head": ("gemma", {"num_key_value_heads": 1}),
    "gemma2, window 3": ("gemma2", {}),
    "gemma2, window 64, plain": (
        "gemma2",
        {"sliding_window": 64, "num_key_value_heads": 4},
    ),
    "gemma2, one key/value head": ("gemma2", {"num_key_value_heads": 1}),
    "gemma3, window 3": ("gemma3_text", {}),
    "gemma3, linear scaling": (
        "gemma3_text",
        {
            "rope_parameters": {
                "full_attention": {
                    "rope_type": "linear",
                    "factor": 8.0,
                    "rope_theta": 1e6,
                },
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            }
        },
    ),
    "phi3": ("phi3", {}),
    "phi3, window 3, one head": (
        "phi3",
        {"sliding_window": 3, "num_key_value_heads": 1},
    ),
    "phi3, longrope, long": (
        "phi3",
        LONGROPE | {"original_max_position_embeddings": 20},
    ),
    "phi3, longrope, short": (
        "phi3",
        LONGROPE | {"original_max_position_embeddings": 200},
    ),
    "qwen2": ("qwen2", {}),
    "qwen2, window 3 from layer 1": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 1},
    ),
    "qwen3": ("qwen3", {}),
    "qwen3, biases, plain heads": (
        "qwen3",
        {"attention_bias": True, "num_key_value_heads": 4},
    ),
    "gpt_neox": ("gpt_neox", {}),
    "gpt_neox, serial, no bias": (
        "gpt_neox",
        {"use_parallel_residual": False, "attention_bias": False},
    ),
    "gpt2": ("gpt2", {}),
    "gpt2, untied": ("gpt2", {"tie_word_embeddings": False, "n_inner": 40}),
}


# One case for each family in the quick run.
QUICK = (
    "llama, grouped heads",
    "mistral, window 3",
    "gemma",
    "gemma2, window 3",
    "gemma3, window 3",
    "phi3",
    "qwen2, window 3 from layer 1",
    "qwen3",
    "gpt_neox",
    "gpt2",
)
PARAMETERS = [
    pytest.param(
        case,
        id=case.replace(", ", "-"),
        marks=() if case in QUICK else pytest.mark.slow,
    )
    for case in CASES
]


def error(ours, theirs) -> float:
    return float(np.abs(np.asarray(ours) - theirs).max() / np.abs(theirs).max())


def continuous_reference(reference, tokens, d, times, steps=None) -> np.ndarray:
    """transformers' logits [T, V] of tokens [T] with durations d and times [T]."""
    config = reference.config
    steps = np.asarray(d if steps is None else steps, np.float64)
    ends, d = np.cumsum(steps), np.asarray(d, np.float64)

    def mask(window):
        visible = np.tril(np.ones((len(d), len(d)), bool))
        if window is not None:
            visible &= ends[:, None] - ends < window * (1 - 1e-6)
        values = np.where(visible, np.log(d), np.finfo(np.float32).min)
        return torch.tensor(values.astype(np.float32))[None, None]

    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    masks = mask(window if kinds is None else None)
    if kinds is not None and set(kinds) != {"full_attention"}:
        masks = {"full_attention": mask(None), "sliding_attention": mask(window)}
    positions = torch.tensor(np.array(times, np.float32))[None]
    with torch.no_grad():
        if config.model_type == "gpt2":
            with interpolated_rows(reference):
                out = reference(
                    torch.tensor(np.array(tokens))[None],
                    position_ids=positions - 1,
                    attention_mask=masks,
                )
        else:
            out = reference(
                torch.tensor(np.array(tokens))[None],
                position_ids=positions,
                attention_mask=masks,
            )
    return out.logits[0].numpy()


@contextlib.contextmanager
def interpolated_rows(reference):
    """GPT-2 whose table of positions is read between its rows."""

    class Rows(torch.nn.Module):
        def forward(self, positions):
            p = positions.clamp(0, len(table) - 1)
            low = p.floor().long().clamp(max=len(table) - 2)
            return torch.lerp(table[low], table[low + 1], (p - low)[..., None])

    plain = reference.transformer.wpe
    table = plain.weight
    reference.transformer.wpe = Rows()
    yield
    reference.transformer.wpe = plain


@pytest.fixture(scope="module", params=PARAMETERS)
def pair(request, tmp_path_factory):
    """A random checkpoint in both implementations."""
    family, config = CASES[request.param]
    folder = tmp_path_factory.mktemp("checkpoint")
    reference = tiny.save_reference(folder, family, **config)
    lm = clm.load(folder)
    return reference, lm


def draw(vocab_size, n=LENGTH, seed=0):
    """Random tokens [T] and durations [T]."""
    rng = np.random.default_rng(seed)
    return rng.integers(0, vocab_size, n), rng.uniform(0.05, 3.0, n).astype(np.float32)


def test_ordinary_tokens(pair):
    reference, lm = pair
    tokens, _ = draw(lm.config.vocab_size)
    with torch.no_grad():
        theirs = reference(torch.tensor(np.array(tokens))[None]).logits[0].numpy()
    assert error(lm(tokens), theirs) <= TOLERANCE
    assert error(lm(tokens, durations=np.ones(LENGTH)), theirs) <= TOLERANCE


def test_random_durations(pair):
    reference, lm = pair
    tokens, d = draw(lm.config.vocab_size)
    theirs = continuous_reference(reference, tokens, d, clm.durations.end_times(d))
    assert error(lm(tokens, durations=d), theirs) <= TOLERANCE
    assert error(lm(tokens), theirs) > 100 * TOLERANCE  # durations matter


@pytest.mark.slow
def test_embeddings_and_explicit_times(pair):
    reference, lm = pair
    tokens, d = draw(lm.config.vocab_size, seed=1)
    times = clm.durations.end_times(d, 5.0)
    theirs = continuous_reference(reference, tokens, d, times)
    rows = lm.params["embedding"][tokens]
    assert error(lm(embeddings=rows, durations=d, times=times), theirs) <= TOLERANCE
    assert error(lm(tokens, durations=d, start=5.0), theirs) <= TOLERANCE


@pytest.mark.slow
def test_saved_checkpoints_give_transformers_the_same_logits(pair, tmp_path):
    import transformers

    _, lm = pair
    clm.save(tmp_path / "saved", lm)
    again = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "saved", attn_implementation="eager"
    )
    tokens, _ = draw(lm.config.vocab_size)
    with torch.no_grad():
        theirs = again(torch.tensor(np.array(tokens))[None]).logits[0].numpy()
    assert error(lm(tokens), theirs) <= TOLERANCE
    assert clm.load(tmp_path / "saved").config == lm.config


def test_llama3_frequencies_equal_transformers():
    import transformers
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    fields = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    config = transformers.LlamaConfig(
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 5e5,
            "original_max_position_embeddings": 8192,
            **fields,
        }
    )
    theirs, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    ours = rotary.frequencies(
        Rope(theta=5e5, scaling=Llama3Scaling(original_length=8192, **fields)), 128
    )
    plain = rotary.frequencies(Rope(theta=5e5), 128)
    np.testing.assert_allclose(ours, theirs.numpy(), rtol=1e-6)
    assert (ours < plain * 0.99).any()
    assert (ours == plain).any()


@pytest.mark.slow
def test_windows_of_64_at_length_100(tmp_path):
    reference = tiny.save_reference(tmp_path, "mistral", sliding_window=64)
    lm = clm.load(tmp_path)
    tokens, d = draw(lm.config.vocab_size, 100)
    times = clm.durations.end_times(d)
    theirs = continuous_reference(reference, tokens, d, times)
    assert error(lm(tokens, durations=d), theirs) <= TOLERANCE
    unwindowed = continuous_reference(reference, tokens, d, times, steps=0 * d)
    assert error(lm(tokens, durations=d), unwindowed) > 1e-3
    with torch.no_grad():
        plain = reference(torch.tensor(np.array(tokens))[None]).logits[0].numpy()
    assert error(lm(tokens), plain) <= TOLERANCE


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


@pytest.mark.slow
def test_real_weights_continue_the_story_with_the_same_100_tokens(stories):
    reference, lm = stories
    prompt = clm.tokenization.encode(lm.tokenizer, PROMPT).ids
    with torch.no_grad():
        theirs = reference.generate(
            torch.tensor([prompt]),
            max_new_tokens=100,
            min_new_tokens=100,
            do_sample=False,
        )[0].tolist()
    length = len(prompt) + 100

    @jax.jit
    def greedy(params, tokens):
        def step(n, tokens):
            logits = lm.model.apply({"params": params}, tokens, position=n - 1)
            # min_new_tokens forbids the end of the text
            logits = logits.at[reference.generation_config.eos_token_id].set(-jnp.inf)
            return tokens.at[n].set(jnp.argmax(logits))

        return jax.lax.fori_loop(len(prompt), length, step, tokens)

    ours = greedy(lm.params, np.array([*prompt, *[0] * 100], np.int32))
    assert ours.tolist() == theirs
    text = lm.tokenizer.decode(ours.tolist())
    assert text.startswith(PROMPT)
    assert len(set(theirs)) > 40  # a story, not a loop


def test_real_weights_at_random_durations(stories):
    reference, lm = stories
    tokens = np.array(clm.tokenization.encode(lm.tokenizer, PROMPT).ids)
    _, d = draw(1, len(tokens))
    theirs = continuous_reference(reference, tokens, d, clm.durations.end_times(d))
    assert error(lm(tokens, durations=d), theirs) <= TOLERANCE


@pytest.mark.slow
def test_every_point_of_a_sweep_of_real_weights(stories):
    reference, lm = stories
    encoding = clm.tokenization.encode(lm.tokenizer, PROMPT)
    span = clm.tokenization.span(encoding, PROMPT, "little girl")
    factors = np.linspace(0.1, 1.0, 7)
    d = clm.durations.scale(jnp.ones(len(encoding.ids)), factors, span)
    groups = [[i] for i in range(lm.config.vocab_size)]
    swept = clm.sweep.probabilities(
        lm, groups, tokens=encoding.ids, durations=d, batch_size=3
    )
    for point, row in zip(swept, d, strict=True):
        theirs = continuous_reference(reference, encoding.ids, row, np.cumsum(row))[-1]
        theirs = torch.softmax(torch.tensor(theirs), -1).numpy()
        np.testing.assert_allclose(point, theirs, atol=1e-5)
    assert np.abs(swept[0] - swept[-1]).max() > 1e-3
