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
DEFAULT_PROMPT = prompts.counting_prompt(
    "fruit", "apple", [" "] * 3, wording="times"
).text


@dataclasses.dataclass(frozen=True)
class AnsweredPrompt:
    """A prompt and an answer to it.

    Attributes:
        text: The prompt.
        tokens: Its token ids, int [T].
        token_texts: The text of each token, T of them; a special token's name.
        separators: What stands before each of them: white space, mostly.
        answer: The answer's text.
        answer_tokens: The tokens that count for it.
    """

    text: str
    tokens: jax.Array
    token_texts: tuple[str, ...]
    separators: tuple[str, ...]
    answer: str
    answer_tokens: tuple[int, ...]


def encode_prompt(
    lm: clm.LanguageModel,
    tokenizer: tokenizers.Tokenizer,
    text: str,
    answer: str | None,
) -> AnsweredPrompt:
    """Encodes a prompt, and finds the tokens of an answer: the most probable one if it is None.

    Raises:
        InputError: if the prompt is empty, or no single token spells the answer.
    """
    if not text.strip():
        raise clm.InputError(f"the prompt {text!r} is empty; write a question")
    encoding = clm.tokenization.encode(tokenizer, text)
    tokens = jnp.array(encoding.ids)
    token_texts, separators, previous_end = [], [], 0
    for token, (token_begin, token_end) in zip(
        encoding.tokens, encoding.offsets, strict=True
    ):
        token_texts.append(text[token_begin:token_end].strip() or token)
        text_begin = (
            token_begin
            + len(text[token_begin:token_end])
            - len(text[token_begin:token_end].lstrip())
        )
        separators.append(
            text[previous_end:text_begin] if token_end > token_begin else ""
        )
        previous_end = max(previous_end, token_end)
    if answer is None:
        best_token = int(np.asarray(lm(tokens, position=-1)).argmax())
        answer = tokenizer.decode([best_token], skip_special_tokens=False).strip()
        answer_tokens = clm.tokenization.tokens_spelling(tokenizer, (answer,))[answer]
        answer_tokens = answer_tokens if best_token in answer_tokens else [best_token]
    else:
        answer_tokens = answer_curves.find_answer_tokens(tokenizer, [answer], "exact")[
            answer
        ]
    return AnsweredPrompt(
        text,
        tokens,
        tuple(token_texts),
        tuple(separators),
        answer,
        tuple(answer_tokens),
    )
