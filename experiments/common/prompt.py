"""A prompt as programs read it: its tokens, the pieces of text that they are, and its answer."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import tokenizers

import continuous_lm as clm
from continuous_lm.experiments.apples import prompts
from continuous_lm.experiments.common import answer_curves

# The paper's, with four apples (Marro et al., arXiv:2504.03933, section 4.1).
PROMPT = prompts.counting("fruit", "apple", [" "] * 3, wording="times").text


@dataclasses.dataclass(frozen=True)
class Reading:
    """A prompt and an answer to it.

    Attributes:
        text: The prompt.
        tokens: Its token ids, int [T].
        pieces: The text of each token, T of them; a special token's name.
        gaps: What stands before each of them: white space, mostly.
        answer: The answer's text.
        group: The tokens that count for it.
    """

    text: str
    tokens: jax.Array
    pieces: tuple[str, ...]
    gaps: tuple[str, ...]
    answer: str
    group: tuple[int, ...]


def read(
    lm: clm.LanguageModel, tokenizer: tokenizers.Tokenizer, text: str, answer: str | None
) -> Reading:
    """Encodes a prompt, and finds the tokens of an answer: the most probable one if it is None.

    Raises:
        InputError: if the prompt is empty, or no single token spells the answer.
    """
    if not text.strip():
        raise clm.InputError(f"the prompt {text!r} is empty; write a question")
    encoding = clm.tokenization.encode(tokenizer, text)
    tokens = jnp.array(encoding.ids)
    pieces, gaps, end = [], [], 0
    for token, (a, b) in zip(encoding.tokens, encoding.offsets, strict=True):
        pieces.append(text[a:b].strip() or token)
        begin = a + len(text[a:b]) - len(text[a:b].lstrip())
        gaps.append(text[end:begin] if b > a else "")
        end = max(end, b)
    if answer is None:
        best = int(np.asarray(lm(tokens, at=-1)).argmax())
        answer = tokenizer.decode([best], skip_special_tokens=False).strip()
        group = clm.tokenization.spellings(tokenizer, (answer,))[answer]
        group = group if best in group else [best]
    else:
        group = answer_curves.tracked(tokenizer, [answer], "exact")[answer]
    return Reading(text, tokens, tuple(pieces), tuple(gaps), answer, tuple(group))
