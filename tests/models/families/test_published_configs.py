"""The published checkpoints map completely, at full size and without their weights.

Everything is abstract: names and shapes come from transformers' models on torch's meta device, and
ours are traced and never run.
"""

import contextlib
import dataclasses
import math
import pathlib
import re

import jax
import jax.numpy as jnp
import pytest

from continuous_lm.models import Transformer
from continuous_lm.models.checkpoints import trunk
from continuous_lm.models.families.registry import FAMILIES
from continuous_lm.models.parameters import unflatten
from continuous_lm.models.transformer import parameter_table
from continuous_lm.rotary import LongRope
from tests.fixtures.published_layouts import CHECKPOINTS

NAMES = list(CHECKPOINTS)
MOST = 200e6  # bytes: less than the weights of GPT-2 in 16 bits


def config_of(name):
    return trunk.read_config(CHECKPOINTS[name][0])


class Listed:
    """Tensors of which there is a list alone: `safetensors_files.Tensors` that are never read."""

    def __init__(self, shapes):
        self._shapes = shapes

    @property
    def names(self):
        return set(self._shapes)

    def shape(self, name):
        return self._shapes[name]

    def path(self, name):
        return pathlib.Path("model.safetensors")

    def __getitem__(self, name):
        pytest.fail(f"{name} was read")


def buffers(name, fields):
    """Return the buffers of the published files: name -> shape."""
    long = fields.get("n_positions") or fields["max_position_embeddings"]
    layers = range(fields.get("n_layer") or fields["num_hidden_layers"])
    mask = (1, 1, long, long)
    match name:
        case "Llama-2-13B":
            return {
                f"model.layers.{i}.self_attn.rotary_emb.inv_freq": (64,) for i in layers
            }
        case "GPT-2" | "GPT-2-XL":
            return {f"h.{i}.attn.bias": mask for i in layers}
        case "GPT-NeoX-20B" | "Pythia-6.9B":
            kinds = {"bias": mask, "masked_bias": (), "rotary_emb.inv_freq": (12,)}
            return {
                f"gpt_neox.layers.{i}.attention.{kind}": shape
                for i in layers
                for kind, shape in kinds.items()
            }
    return {}


def published(name):
    """The parameters in the published files, and the buffers beside them: name -> shape."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    fields = CHECKPOINTS[name][0]
    # No shape depends on the scaling, and this way of making a Phi3Config refuses the old style.
    config_fields = {k: v for k, v in fields.items() if k != "rope_scaling"}
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(
            transformers.AutoConfig.for_model(**config_fields)
        )
    shapes = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        del shapes["lm_head.weight"]
    # GPT-2 was saved without its head, and so without the prefix; transformers 5 renamed a head.
    old, new = RENAMED.get(fields["model_type"], ("", ""))
    shapes = {re.sub(f"^{old}", new, key): shape for key, shape in shapes.items()}
    return shapes, buffers(name, fields)


RENAMED = {"gpt2": (r"transformer\.", ""), "gpt_neox": (r"lm_head\.", "embed_out.")}


def count(shapes):
    return sum(map(math.prod, shapes))


@pytest.mark.parametrize("name", NAMES)
def test_every_tensor_has_a_place_and_every_place_a_tensor(name):
    config, (tensors, beside) = config_of(name), published(name)
    declarations = parameter_table(config)
    layout = trunk.parameter_layout(config)
    checkpoint_names = layout.checkpoint_names(Listed(tensors | beside))
    assert len(checkpoint_names) == len(set(checkpoint_names.values()))
    assert set(checkpoint_names.values()) == set(tensors)
    # Equal numbers: no part of a fused tensor is left out or taken twice.
    assert count(tensors.values()) == count(
        declaration.shape for declaration in declarations.values()
    )


@contextlib.contextmanager
def little_memory():
    """Fails where the body allocates more than `MOST`, by numpy, by JAX or by anything else."""
    statm = pathlib.Path("/proc/self/statm")
    if not statm.exists():  # other systems have no limit that holds for one process
        yield
        return
    import resource

    used = int(statm.read_text().split()[0]) * resource.getpagesize()
    old = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + int(MOST), old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, old)


@pytest.mark.parametrize("name", NAMES)
def test_logits_and_the_number_of_parameters(name):
    jnp.zeros(1).block_until_ready()  # the backend has started before memory is limited
    with little_memory():
        config = config_of(name)
        declarations = parameter_table(config)
        params = unflatten(
            {
                path: jax.ShapeDtypeStruct(declaration.shape, jnp.float32)
                for path, declaration in declarations.items()
            }
        )
        tokens = jax.ShapeDtypeStruct((8,), jnp.int32)
        logits = jax.eval_shape(Transformer(config).apply, {"params": params}, tokens)
    assert (
        count(declaration.shape for declaration in declarations.values())
        == CHECKPOINTS[name][1]
    )
    assert logits.shape == (8, config.vocab_size)
    assert logits.dtype == jnp.float32


@pytest.mark.parametrize("name", NAMES)
def test_config_round_trips(name):
    config = config_of(name)
    written = FAMILIES[config.family].write_config(config) | {
        "model_type": config.family
    }
    again = trunk.read_config(written)
    assert again == dataclasses.replace(config, window_pattern=again.window_pattern)
    assert again.windowed_layers == config.windowed_layers


FIVE_OF_SIX = tuple((layer + 1) % 6 != 0 for layer in range(26))


@pytest.mark.parametrize(
    ("name", "holds"),
    [
        ("Llama-3.1-8B", lambda c: c.rope.scaling.factor == 8 and c.rope.theta == 5e5),
        ("Llama-3.2-1B", lambda c: c.rope.scaling.factor == 32 and c.tie_embeddings),
        (
            "Mistral-7B-v0.1",
            lambda c: c.windowed_layers == (True,) * 32 and c.window == 4096,
        ),
        (
            "Mistral-7B-v0.3",
            lambda c: c.windowed_layers == (False,) * 32 and c.rope.theta == 1e6,
        ),
        ("Gemma-7B", lambda c: c.activation == "gelu_tanh" and c.scale_embeddings),
        (
            "Gemma-2-9B",
            lambda c: c.windowed_layers == (True, False) * 21 and c.query_width == 256,
        ),
        ("Gemma-2-27B", lambda c: c.query_width == 144 and c.head_dim == 128),
        (
            "Gemma-3-1B",
            lambda c: c.windowed_layers == FIVE_OF_SIX and c.local_rope.theta == 1e4,
        ),
        ("Phi-3-medium-4k", lambda c: c.window == 2047 and c.rope.scaling is None),
        ("Phi-3-medium-128k", lambda c: isinstance(c.rope.scaling, LongRope)),
        (
            "Phi-3.5-mini",
            lambda c: round(c.rope.attention_factor, 5) == 1.19024,
        ),  # sqrt(1 + 5 / 12)
        (
            "Qwen2.5-7B-Instruct",
            lambda c: c.window is None and c.qkv_bias and not c.output_bias,
        ),
        ("Qwen3-8B", lambda c: c.qk_norm and not c.qkv_bias),
        (
            "GPT-NeoX-20B",
            lambda c: c.activation == "gelu_tanh" and c.rope.fraction == 0.25,
        ),
        ("Pythia-6.9B", lambda c: c.activation == "gelu" and c.parallel),
        ("GPT-2-XL", lambda c: c.max_positions == 1024 and c.mlp_size == 6400),
    ],
)
def test_attributes_of_published_configs(name, holds):
    assert holds(config_of(name))
