"""A published next-vector model in plain PyTorch, and tiny random checkpoints of it.

The modules bear the names of the published tensors and know nothing of ours. Sizes differ from one
another wherever they may, norms are not 1, biases not 0, and the epsilons of the root-mean-square
norms are large, so that a tensor in the wrong place, turned, or a number that is passed over, shows
in the outputs, all of which are of order one.
"""

import contextlib
import json
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import flax.linen
import jax
import pytest
import torch
import transformers
from torch import nn
from torch.nn import functional

from tests import tiny


def autoencoder_fields(**overrides: Any) -> dict[str, Any]:
    """config.json of an autoencoder, as it is published."""
    return {
        "ae_dropout": 0.15,
        "architectures": ["Autoencoder"],
        "bos_token_id": 1,
        "eos_token_id": 2,
        "hidden_act": "silu",
        "hidden_size": 24,
        "initializer_range": 0.02,
        "intermediate_size": 44,
        "kl_clamp": 0.5,
        "kl_weight": 1e-3,
        "latent_size": 10,
        "mlp_bias": False,
        "model_type": "",
        "num_decoder_layers": 4,
        "num_encoder_layers": 2,
        "pad_token_id": 3,
        "patch_size": 4,
        "rms_norm_eps": 0.02,
        "tie_word_embeddings": True,
        "torch_dtype": "float32",
        "transformers_version": "4.43.0",
        "vocab_size": 40,
    } | overrides


def energy_fields(**overrides: Any) -> dict[str, Any]:
    """config.json of an energy model, as it is published."""
    return {
        "ae_path": "somewhere/else",
        "architectures": ["EnergyTransformer"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "beta": 1.0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "hidden_act": "silu",
        "hidden_size": 32,
        "initializer_range": 0.02,
        "intermediate_size": 56,
        "latent_size": 10,
        "max_position_embeddings": 128,
        "mlp_bias": False,
        "model_type": "",
        "noise_size": 6,
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
        "num_key_value_heads": 2,
        "num_mlp_layers": 3,
        "num_samples": 8,
        "pad_token_id": 3,
        "patch_size": 4,
        "pretraining_tp": 1,
        "rms_norm_eps": 0.01,
        "rope_scaling": None,
        "rope_theta": 500.0,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        "transformers_version": "4.43.0",
        "use_cache": True,
        "vocab_size": 40,
    } | overrides


# --- The autoencoder -------------------------------------------------------------------------


class RmsNorm(nn.Module):
    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x):
        return self.weight * (x / torch.sqrt((x * x).mean(-1, keepdim=True) + self.eps))


class GatedMlp(nn.Module):
    def __init__(self, width: int, inner: int):
        super().__init__()
        self.gate_proj = nn.Linear(width, inner, bias=False)
        self.up_proj = nn.Linear(width, inner, bias=False)
        self.down_proj = nn.Linear(inner, width, bias=False)

    def forward(self, x):
        return self.down_proj(functional.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    def __init__(self, fields: Mapping[str, Any]):
        super().__init__()
        width = fields["hidden_size"]
        self.layernorm = RmsNorm(width, fields["rms_norm_eps"])
        self.mlp = GatedMlp(width, fields["intermediate_size"])

    def forward(self, x):
        return x + self.mlp(self.layernorm(x))


class Encoder(nn.Module):
    """int [..., K] to mean and log standard deviation, each [..., W]."""

    def __init__(self, fields: Mapping[str, Any]):
        super().__init__()
        width, latent = fields["hidden_size"], fields["latent_size"]
        self.embed_tokens = nn.Embedding(fields["vocab_size"], width)
        layers = [Layer(fields) for _ in range(fields["num_encoder_layers"])]
        self.encoder_layers = nn.ModuleList(layers)
        self.squeeze_layer = nn.Linear(fields["patch_size"] * width, width)
        self.norm = RmsNorm(width, fields["rms_norm_eps"])
        self.hidden_to_latent = nn.Linear(width, 2 * latent)

    def forward(self, tokens):
        half = len(self.encoder_layers) // 2
        x = self.embed_tokens(tokens)
        for layer in self.encoder_layers[:half]:
            x = layer(x)
        x = self.squeeze_layer(x.flatten(-2))
        for layer in self.encoder_layers[half:]:
            x = layer(x)
        out = self.hidden_to_latent(self.norm(x))
        latent = out.shape[-1] // 2
        return out[..., :latent], out[..., latent:]


class Decoder(nn.Module):
    """[..., W] to hidden states [..., K, D]."""

    def __init__(self, fields: Mapping[str, Any]):
        super().__init__()
        width = fields["hidden_size"]
        self.patch = fields["patch_size"]
        self.latent_to_hidden = nn.Linear(fields["latent_size"], width)
        layers = [Layer(fields) for _ in range(fields["num_decoder_layers"])]
        self.decoder_layers = nn.ModuleList(layers)
        self.expand_layer = nn.Linear(width, self.patch * width)
        self.norm = RmsNorm(width, fields["rms_norm_eps"])

    def forward(self, latents):
        half = len(self.decoder_layers) // 2
        x = self.latent_to_hidden(latents)
        for layer in self.decoder_layers[:half]:
            x = layer(x)
        x = self.expand_layer(x)
        x = x.reshape(*x.shape[:-1], self.patch, -1)
        for layer in self.decoder_layers[half:]:
            x = layer(x)
        return self.norm(x)


class Autoencoder(nn.Module):
    def __init__(self, fields: Mapping[str, Any]):
        super().__init__()
        self.encoder = Encoder(fields)
        self.decoder = Decoder(fields)

    def latents(self, chunks):
        """Int [..., K] to mean and log standard deviation, each [..., W]."""
        return self.encoder(chunks)

    def logits(self, latents):
        """[..., W] to [..., K, V]."""
        return self.decoder(latents) @ self.encoder.embed_tokens.weight.T


# --- The energy model ------------------------------------------------------------------------


class Block(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.in_ln = nn.LayerNorm(width, eps=1e-6)
        self.linears = nn.Sequential(
            nn.Linear(2 * width, width),
            nn.SiLU(),
            nn.Linear(width, width),
            nn.SiLU(),
            nn.Linear(width, 2 * width),
        )
        self.down_proj = nn.Linear(width, width)

    def forward(self, x, y):
        h = self.linears(torch.cat([self.in_ln(x), y], dim=-1))
        width = x.shape[-1]
        gate, up = h[..., :width], h[..., width:]
        return x + self.down_proj(functional.silu(gate) * up)


class FinalLayer(nn.Module):
    def __init__(self, width: int, out: int):
        super().__init__()
        self.in_ln = nn.LayerNorm(width, eps=1e-6)
        self.linears = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, out))

    def forward(self, x):
        return self.linears(self.in_ln(x))


class Generator(nn.Module):
    """Noise [..., U] and hidden states [..., D] to vectors [..., W]."""

    def __init__(self, fields: Mapping[str, Any]):
        super().__init__()
        width = fields["hidden_size"]
        self.noise_embd = nn.Linear(fields["noise_size"], width)
        self.hidden_embd = nn.Linear(width, width)
        self.norm_noise = nn.LayerNorm(width, eps=1e-6)
        self.norm_hidden = nn.LayerNorm(width, eps=1e-6)
        blocks = [Block(width) for _ in range(fields["num_mlp_layers"])]
        self.mlp_blocks = nn.ModuleList(blocks)
        self.final_layer = FinalLayer(width, fields["latent_size"])

    def forward(self, noise, hidden):
        x = self.norm_noise(self.noise_embd(noise))
        y = self.norm_hidden(self.hidden_embd(hidden))
        y = y.expand(*x.shape[:-1], y.shape[-1])
        for block in self.mlp_blocks:
            x = block(x, y)
        return self.final_layer(x)


LLAMA_FIELDS = """
    attention_bias hidden_act hidden_size intermediate_size max_position_embeddings mlp_bias
    num_attention_heads num_hidden_layers num_key_value_heads rms_norm_eps vocab_size
""".split()


class EnergyTransformer(nn.Module):
    """Attributes: transformer, transformers' own Llama; embed_proj; mlp_generator; patch, K."""

    def __init__(self, fields: Mapping[str, Any]):
        super().__init__()
        width, self.patch = fields["hidden_size"], fields["patch_size"]
        config = transformers.LlamaConfig(
            **{name: fields[name] for name in LLAMA_FIELDS},
            rope_parameters={"rope_type": "default", "rope_theta": fields["rope_theta"]},
            attn_implementation="eager",
        )
        self.transformer = transformers.LlamaModel(config)
        self.embed_proj = nn.Sequential(
            nn.Linear(self.patch * width, 2 * width),
            nn.SiLU(),
            nn.Linear(2 * width, width),
            nn.LayerNorm(width, eps=1e-6),
        )
        self.mlp_generator = Generator(fields)

    def inputs(self, tokens):
        """Int [B, T * K] to the trunk's inputs [B, T, D]."""
        embedded = self.transformer.embed_tokens(tokens)
        return self.embed_proj(embedded.reshape(len(tokens), -1, self.patch * embedded.shape[-1]))

    def hidden(self, tokens, durations=None):
        """Int [B, T * K] to hidden states [B, T, D].

        Durations [T] of the chunks are what transformers can be told of them: log d on the
        attention's logits, and the ends of the chunks as positions.
        """
        inputs = self.inputs(tokens)
        if durations is None:
            return self.transformer(inputs_embeds=inputs).last_hidden_state
        d = torch.as_tensor(durations, dtype=torch.float64)
        future = torch.ones(len(d), len(d)).triu(1).bool()
        mask = d.log().expand(len(d), -1).masked_fill(future, torch.finfo(torch.float32).min)
        return self.transformer(
            inputs_embeds=inputs,
            position_ids=d.cumsum(0).float()[None],
            attention_mask=mask.float()[None, None],
        ).last_hidden_state

    def sample(self, noise, hidden):
        """Noise [..., U] and hidden states [..., D] to vectors [..., W]."""
        return self.mlp_generator(noise, hidden)


def energy_score(samples, targets, beta: float):
    """2 E|x - y|^beta - E|x - x'|^beta over pairs: [Z, ..., W], [Y, ..., W] to float64 [...]."""
    x, y = samples.double(), targets.double()
    near = torch.zeros(x.shape[1:-1], dtype=torch.float64)
    apart = torch.zeros(x.shape[1:-1], dtype=torch.float64)
    for i in range(len(x)):
        for j in range(len(y)):
            near += (x[i] - y[j]).pow(2).sum(-1).sqrt().pow(beta)
        for j in range(len(x)):
            if j != i:
                apart += (x[i] - x[j]).pow(2).sum(-1).sqrt().pow(beta)
    return 2 * near / (len(x) * len(y)) - apart / (len(x) * (len(x) - 1))


# --- Checkpoints -----------------------------------------------------------------------------


def randomised(module: nn.Module, seed: int) -> nn.Module:
    """The module with random weights of such scales that its outputs are of order one."""
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            drawn = torch.randn(parameter.shape, generator=rng)
            if name.endswith("bias"):
                parameter.copy_(0.3 * drawn)
            elif parameter.ndim == 1:  # a norm
                parameter.copy_(1 + 0.3 * drawn)
            elif "embed_tokens" in name:
                parameter.copy_(0.5 * drawn)
            else:
                parameter.copy_(drawn * parameter.shape[-1] ** -0.5)
    return module.eval().requires_grad_(False)


def autoencoder(seed: int = 0, **overrides: Any) -> Autoencoder:
    return randomised(Autoencoder(autoencoder_fields(**overrides)), seed)


def energy_model(seed: int = 1, **overrides: Any) -> EnergyTransformer:
    return randomised(EnergyTransformer(energy_fields(**overrides)), seed)


def tensors(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def write(
    folder: pathlib.Path,
    fields: Mapping[str, Any],
    weights: Mapping[str, torch.Tensor],
    *,
    shards: int = 0,
) -> pathlib.Path:
    """Writes config.json and the weights, whatever they say; in shards with an index if asked."""
    import safetensors.torch

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(fields))
    if shards:
        tiny.shard(folder, {name: value.numpy() for name, value in weights.items()}, shards)
    else:
        path = folder / "model.safetensors"
        safetensors.torch.save_file(dict(weights), path, {"format": "pt"})
    return folder


@contextlib.contextmanager
def traced_once() -> Iterator[None]:
    """Inside, the shapes of a Flax module's parameters are traced once, for the sake of time."""
    trace, held = jax.eval_shape, dict[Any, Any]()

    def shapes(function, *arguments):
        module = getattr(function, "__self__", None)
        if not isinstance(module, flax.linen.Module) or function.__name__ != "init":
            return trace(function, *arguments)
        key = (type(module), module, str(jax.tree.map(jax.typeof, arguments)))
        if key not in held:
            held[key] = trace(function, *arguments)
        return held[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "eval_shape", shapes)
        yield
