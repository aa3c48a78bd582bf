"""Tiny checkpoint folders with random weights, made in milliseconds and without downloads, a tiny
next-vector model, and programs in processes of their own.

Weights are far from zero, norms and biases too, so that logits are of order one and a mistake
anywhere shows in them. `save_reference` makes the folder with transformers, `save` by hand.
"""

import contextlib
import dataclasses
import functools
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_dtypes  # noqa: F401 (registers bfloat16 with numpy)
import numpy as np

from continuous_lm.models.autoencoder import AutoencoderConfig
from continuous_lm.models.calm import NextVectorLM, NextVectorModel
from continuous_lm.models.config import TransformerConfig
from continuous_lm.models.implicit import EnergyHead, ImplicitHead

STD = 0.15

# Text that has every token of the counting prompts of the paper.
COUNTING_TEXT = (
    'Question: In the sentence "apple", how many times is a fruit mentioned?'
    " Reply with a single-digit number Answer: cat animal an rose flower 0 1 2 3 4 5 6 7 8 9"
)


def llama_config(**overrides: Any) -> dict[str, Any]:
    """Fields of a config.json, which are keywords of transformers' LlamaConfig as well."""
    return {
        "vocab_size": 64,
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 12,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "attention_bias": False,
        "mlp_bias": False,
        "initializer_range": STD,
    } | overrides


def mistral_config(**overrides: Any) -> dict[str, Any]:
    """The same for MistralConfig."""
    fields = llama_config()
    del fields["attention_bias"], fields["mlp_bias"]
    return fields | {"sliding_window": None} | overrides


def gemma_config(**overrides: Any) -> dict[str, Any]:
    """The same for GemmaConfig; the biases of Llama are no fields of the families below."""
    return mistral_config(hidden_act="gelu_pytorch_tanh", tie_word_embeddings=True) | overrides


def gemma2_config(**overrides: Any) -> dict[str, Any]:
    """The same for Gemma2Config and Gemma3TextConfig; caps so low that they change everything."""
    return (
        gemma_config()
        | {
            "hidden_activation": "gelu_pytorch_tanh",
            "query_pre_attn_scalar": 20,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 3.0,
            "sliding_window": 3,
        }
        | overrides
    )


def gemma3_config(**overrides: Any) -> dict[str, Any]:
    """The same for Gemma3TextConfig, with windows in two of three layers."""
    caps = {"attn_logit_softcapping": None, "final_logit_softcapping": None}
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    return gemma2_config(**caps, layer_types=kinds) | overrides


def phi3_config(**overrides: Any) -> dict[str, Any]:
    """The same for Phi3Config; its heads are as wide as they must be."""
    return mistral_config(pad_token_id=0) | overrides


def qwen_config(**overrides: Any) -> dict[str, Any]:
    """The same for Qwen2Config and Qwen3Config."""
    return mistral_config() | overrides


def gpt_neox_config(**overrides: Any) -> dict[str, Any]:
    """The same for GPTNeoXConfig."""
    kept = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
    fields = {name: llama_config()[name] for name in kept}
    wide = {"hidden_size": 64, "num_attention_heads": 4}  # a quarter of 16 channels turns
    return fields | wide | {"hidden_act": "gelu"} | overrides


def gpt2_config(**overrides: Any) -> dict[str, Any]:
    """The same for GPT2Config, with a table of positions that long sentences leave."""
    return {
        "vocab_size": 64, "n_embd": 48, "n_layer": 3, "n_head": 4, "n_positions": 50,
        "bos_token_id": 0, "eos_token_id": 0,
    } | overrides  # fmt: skip


def longrope(**overrides: Any) -> dict[str, Any]:
    """Phi-3's rope scaling for heads of 12, with a switch at 32 tokens."""
    return {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0, 1.1, 1.3, 1.5, 2.0, 2.5],
        "long_factor": [1.5, 2.0, 3.0, 4.0, 6.0, 8.0],
    } | overrides


CONFIGS = {
    "llama": llama_config,
    "mistral": mistral_config,
    "gemma": gemma_config,
    "gemma2": gemma2_config,
    "gemma3_text": gemma3_config,
    "phi3": phi3_config,
    "qwen2": qwen_config,
    "qwen3": qwen_config,
    "gpt_neox": gpt_neox_config,
    "gpt2": gpt2_config,
}


def llama3_scaling(**overrides: Any) -> dict[str, Any]:
    """The "llama3" rope scaling, with an original context so short that it changes everything."""
    return {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    } | overrides


def save_reference(
    folder: pathlib.Path, model_type: str = "llama", seed: int = 0, dtype: str = "float32", **config
):
    """A random transformers model, saved to `folder` and returned in eval mode.

    Args:
      folder: made if it is not there.
      model_type: a key of `CONFIGS`.
      seed: of the weights.
      dtype: of the weights.
      **config: fields that differ from those of `CONFIGS`.
    """
    import torch
    import transformers

    kind = transformers.AutoConfig.for_model(model_type, **CONFIGS[model_type](**config))
    model = transformers.AutoModelForCausalLM.from_config(kind, attn_implementation="eager")
    rng = torch.Generator().manual_seed(seed)
    norm_weight = re.compile(r"(norm|ln_[12f])\.weight$")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            plain = norm_weight.search(name) and not model_type.startswith("gemma")
            middle = 1.0 if plain else 0.0
            drawn = middle + STD * torch.randn(parameter.shape, generator=rng)
            parameter.data = drawn.to(getattr(torch, dtype))  # model.to would round inv_freq too
    model.config.dtype = getattr(torch, dtype)
    model.tie_weights()
    model.save_pretrained(folder)
    return model.eval()


def tensors(config: Mapping[str, Any], seed: int = 0, dtype: str = "float32"):
    """Random tensors by name for the fields of a Llama's or Mistral's config.json."""
    rng = np.random.default_rng(seed)

    def draw(*shape, middle=0.0):
        return (middle + STD * rng.standard_normal(shape)).astype(np.dtype(dtype))

    d, f, h = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    n, k = config["num_attention_heads"], config["num_key_value_heads"]
    shapes = {
        "self_attn.q_proj": (n * h, d),
        "self_attn.k_proj": (k * h, d),
        "self_attn.v_proj": (k * h, d),
        "self_attn.o_proj": (d, n * h),
        "mlp.gate_proj": (f, d),
        "mlp.up_proj": (f, d),
        "mlp.down_proj": (d, f),
    }
    found = {
        "model.embed_tokens.weight": draw(config["vocab_size"], d),
        "model.norm.weight": draw(d, middle=1.0),
    }
    for i in range(config["num_hidden_layers"]):
        for name, shape in shapes.items():
            found[f"model.layers.{i}.{name}.weight"] = draw(*shape)
            biased = "attention_bias" if name.startswith("self_attn") else "mlp_bias"
            if config.get(biased):
                found[f"model.layers.{i}.{name}.bias"] = draw(shape[0])
        for name in ("input_layernorm", "post_attention_layernorm"):
            found[f"model.layers.{i}.{name}.weight"] = draw(d, middle=1.0)
    if not config["tie_word_embeddings"]:
        found["lm_head.weight"] = draw(config["vocab_size"], d)
    return found


def save(
    folder: pathlib.Path,
    model_type: str = "llama",
    seed: int = 0,
    dtype: str = "float32",
    tokenizer=None,
    **config,
) -> pathlib.Path:
    """A random checkpoint folder, written without transformers; returns `folder`.

    With a tokenizer, vocab_size is the tokenizer's unless it is given.
    """
    if tokenizer is not None:
        config = {"vocab_size": tokenizer.get_vocab_size()} | config
    fields = CONFIGS[model_type](**config)
    write(
        folder,
        {"model_type": model_type, "torch_dtype": dtype} | fields,
        tensors(fields, seed, dtype),
    )
    if tokenizer is not None:
        tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def write(
    folder: pathlib.Path, fields: Mapping[str, Any], weights: Mapping[str, np.ndarray]
) -> None:
    """Writes config.json and model.safetensors, whatever they say."""
    import safetensors.numpy

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(fields))
    safetensors.numpy.save_file(dict(weights), folder / "model.safetensors", {"format": "pt"})


def shard(folder: pathlib.Path, weights: Mapping[str, np.ndarray], number: int = 3) -> None:
    """Replaces model.safetensors by `number` shards and their index."""
    import safetensors.numpy

    (folder / "model.safetensors").unlink(missing_ok=True)
    names, where = sorted(weights), {}
    for i in range(number):
        file = f"model-{i + 1:05}-of-{number:05}.safetensors"
        part = {name: weights[name] for name in names[i::number]}
        safetensors.numpy.save_file(part, folder / file, {"format": "pt"})
        where |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": 0}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def word_tokenizer(words: Iterable[str] | str):
    """A word-level tokenizer: <unk>, <bos>, then `words`; <bos> goes in front of every text.

    Args:
      words: the vocabulary; the words and signs of a text if it is a string.
    """
    import tokenizers as lib

    if isinstance(words, str):
        words = re.findall(r"\w+|[^\w\s]", words)
    ids = {word: i for i, word in enumerate(dict.fromkeys(["<unk>", "<bos>", *words]))}
    made = lib.Tokenizer(lib.models.WordLevel(ids, unk_token="<unk>"))
    split = lib.pre_tokenizers
    made.pre_tokenizer = split.Sequence([split.WhitespaceSplit(), split.Punctuation("isolated")])
    made.post_processor = lib.processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", ids["<bos>"])]
    )
    made.add_special_tokens(["<unk>", "<bos>"])
    return made


# --- A next-vector model ---------------------------------------------------------------------

TRUNK = TransformerConfig(
    vocab_size=11, hidden_size=8, mlp_size=8, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=4
)
CODEC = AutoencoderConfig(
    vocab_size=11,
    hidden_size=8,
    mlp_size=8,
    encoder_layers=2,
    decoder_layers=2,
    latent_size=4,
    chunk_size=3,
)
ENERGY = EnergyHead(width=4, hidden_size=8, depth=1, noise_size=5, num_samples=2)


@functools.cache
def next_vector(head: ImplicitHead = ENERGY, chunk_size: int = CODEC.chunk_size) -> NextVectorLM:
    """A random next-vector model far from where it starts: a new head draws the same for all noise.

    Many chunks are decoded, and hidden states and durations decide among them.
    """
    coded, rng = dataclasses.replace(CODEC, chunk_size=chunk_size), np.random.default_rng(0)
    model = NextVectorModel(TRUNK, coded, head, num_targets=3)

    def drawn(path, leaf):
        name = path[-1].key
        middle = float(name.endswith(("norm", "scale")) and name != "log_scale")
        return jnp.asarray(middle + 0.5 * rng.normal(size=leaf.shape), jnp.float32)

    first = np.zeros((1, chunk_size), np.int32)
    boxed = jax.eval_shape(model.init, jax.random.key(0), first)["params"]
    params = jax.tree_util.tree_map_with_path(drawn, nn.unbox(boxed))
    codec, attention = params["autoencoder"], params["trunk"]["layers"]["attention"]
    for part, names, factor in (
        (codec, ("embedding", "latent", "expand"), 3.0),
        (codec, ("latent_bias", "expand_bias"), 0.0),
        (params["head"], ("last",), 3.0),
        (attention, tuple(attention), 2.0),
    ):
        part |= {name: factor * part[name] for name in names}
    return NextVectorLM(model, params)


# --- Programs --------------------------------------------------------------------------------

ROOT = pathlib.Path(__file__).parents[1]
ENVIRONMENT = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}


def run(cwd: pathlib.Path, program: str, *arguments: str) -> tuple[int, str, str]:
    """Runs `python -m program arguments` in the folder `cwd`: exit status, stdout, stderr."""
    ended = subprocess.run(
        [sys.executable, "-m", program, *arguments],
        cwd=cwd,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
    )
    return ended.returncode, ended.stdout, ended.stderr


@contextlib.contextmanager
def forked(program: str):
    """Gives a function (cwd, *arguments) like `run`, without the seconds that its imports take."""
    with forking(ENVIRONMENT) as call:
        yield lambda cwd, *arguments: call(cwd, program, *arguments)


@contextlib.contextmanager
def forking(environment: Mapping[str, str]):
    """Gives a function (cwd, program, *arguments) like `run`, for any program.

    One process imports what programs import. For each call it forks, and the fork, in which JAX
    has not started yet, runs the program as `__main__`.
    """
    server = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", _SERVER],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )

    def call(cwd, program, *arguments):
        with tempfile.TemporaryDirectory() as logs:
            out, err = (pathlib.Path(logs, name) for name in ("out", "err"))
            job = [program, str(cwd), str(out), str(err), *map(str, arguments)]
            server.stdin.write(json.dumps(job) + "\n")
            server.stdin.flush()
            status = int(server.stdout.readline())
            return status, out.read_text(), err.read_text()

    with server:
        yield call
        server.stdin.close()


_SERVER = """
import json, os, runpy, sys, traceback
if sys.platform == "linux":
    import resource
import continuous_lm.experiments.curves
import continuous_lm.experiments.plots
import continuous_lm.experiments.program

for line in sys.stdin:
    program, cwd, out, err, *arguments = json.loads(line)
    child = os.fork()
    if child == 0:
        if sys.platform == "linux":  # what asks for far too much must not take the machine along
            resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))
        for fd, path in ((1, out), (2, err)):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), fd)
        os.chdir(cwd)
        sys.argv = [program, *arguments]
        status = 1
        try:
            runpy.run_module(program, run_name="__main__", alter_sys=True)
            status = 0
        except SystemExit as stop:  # as the interpreter ends on it
            status = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
            if isinstance(stop.code, str):
                print(stop.code, file=sys.stderr)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""
