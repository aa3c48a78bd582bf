"""A prompt as programs read it: its flag, its tokens, their texts, and its answer."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tokenizers

import continuous_lm as clm
from continuous_lm.experiments.apples import prompts
from continuous_lm.experiments.common import answer_curves, pretrained, program

# The paper's, with four apples (Marro et al., arXiv:2504.03933, section 4.1).
DEFAULT_PROMPT = prompts.counting_prompt(
    "fruit", "apple", [" "] * 3, wording="times"
).text


@dataclasses.dataclass(frozen=True, kw_only=True)
class PromptConfig(pretrained.PretrainedConfig):
    """Flags of the prompt."""

    prompt: str = program.flag(DEFAULT_PROMPT, help="Text that the model reads.")


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

    def as_json(self) -> dict[str, Any]:
        """Return the prompt's entries in result files."""
        return {
            "prompt": self.text,
            "pieces": list(self.token_texts),
            "answer": self.answer,
        }


def encode_prompt(
    lm: clm.LanguageModel,
    tokenizer: tokenizers.Tokenizer,
    text: str,
    answer: str | None,
) -> AnsweredPrompt:
    """Encode a prompt, and find the tokens of an answer: the most probable one if it is None.

    Raises:
        InputError: if the prompt is empty, or no single token spells the answer.
    """
    if not text.strip():
        raise clm.InputError(f"the prompt {text!r} is empty; write a question")
    encoding = clm.tokenization.encode(tokenizer, text)
    tokens = jnp.array(encoding.ids)
    token_texts, separators = split_text(text, encoding)
    if answer is None:
        answer, answer_tokens = most_probable_answer(lm, tokenizer, tokens)
    else:
        tokens_by_answer = answer_curves.find_answer_tokens(
            tokenizer, [answer], "exact"
        )
        answer_tokens = tokens_by_answer[answer]
    return AnsweredPrompt(
        text,
        tokens,
        tuple(token_texts),
        tuple(separators),
        answer,
        tuple(answer_tokens),
    )


def split_text(text: str, encoding: tokenizers.Encoding) -> tuple[list[str], list[str]]:
    """The text of each token, a special token's name; and what stands before each of them."""
    token_texts: list[str] = []
    separators: list[str] = []
    previous_end = 0
    for token_name, (begin, end) in zip(encoding.tokens, encoding.offsets, strict=True):
        with_space = text[begin:end]
        token_texts.append(with_space.strip() or token_name)
        text_begin = begin + len(with_space) - len(with_space.lstrip())
        separators.append(text[previous_end:text_begin] if end > begin else "")
        previous_end = max(previous_end, end)
    return token_texts, separators


def most_probable_answer(
    lm: clm.LanguageModel, tokenizer: tokenizers.Tokenizer, tokens: jax.Array
) -> tuple[str, list[int]]:
    """The text of the most probable next token, and the tokens that spell it."""
    best_token = int(np.asarray(lm(tokens, position=-1)).argmax())
    answer = tokenizer.decode([best_token], skip_special_tokens=False).strip()
    spellings = clm.tokenization.tokens_spelling(tokenizer, (answer,))[answer]
    return answer, spellings if best_token in spellings else [best_token]
