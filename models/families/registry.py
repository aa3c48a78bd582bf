"""The families that can be loaded, by the `model_type` of config.json."""

from continuous_lm.models.families import (
    gemma,
    gemma2,
    gemma3,
    gpt2,
    gpt_neox,
    llama,
    mistral,
    phi3,
    qwen2,
    qwen3,
)
from continuous_lm.models.families.family import Family

FAMILIES: dict[str, Family] = {
    "llama": llama.FAMILY,
    "mistral": mistral.FAMILY,
    "gemma": gemma.FAMILY,
    "gemma2": gemma2.FAMILY,
    "gemma3_text": gemma3.FAMILY,
    "phi3": phi3.FAMILY,
    "qwen2": qwen2.FAMILY,
    "qwen3": qwen3.FAMILY,
    "gpt_neox": gpt_neox.FAMILY,
    "gpt2": gpt2.FAMILY,
}
