"""Baselines of the benchmark: PyTorch, transformers and faiss at their best settings.

The extra `peers` installs them. They are imported only by the cases that use them.
"""

import importlib
import os
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from continuous_lm.errors import InputError
from continuous_lm.experiments.benchmarks import timing

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    KeysValues = tuple[torch.Tensor, torch.Tensor]  # [P, K, S, H] each

# Intel's OpenMP would spin for 200 ms after each operation, into the next turn; see `timing`.
os.environ.setdefault("KMP_BLOCKTIME", "20")


def import_baseline(name: str) -> ModuleType:
    """The module, with as many threads as there are cores.

    Raises:
      InputError: if it is not installed.
    """
    try:
        module = importlib.import_module(name)
    except ImportError:
        raise InputError(
            f"{name} is not installed: pip install -e '.[peers]'"
        ) from None
    if name == "torch":
        module.set_num_threads(timing.num_cores())
    elif name == "faiss":
        module.omp_set_num_threads(timing.num_cores())
    return module


def why_missing(*names: str) -> str:
    """Why not all of these can be imported; "" if they can."""
    try:
        for name in names:
            import_baseline(name)
    except InputError as error:
        return str(error)
    return ""


def without_cuda() -> str:
    """Why no PyTorch runs on a GPU here; "" if one does."""
    if absent := why_missing("torch"):
        return absent
    return (
        ""
        if import_baseline("torch").cuda.is_available()
        else "this PyTorch has no CUDA"
    )


# --- A sweep, as the paper's code does it -------------------------------------------------------


def load_causal_lm(
    folder: str | os.PathLike[str], attention: str = "eager"
) -> "PreTrainedModel":
    """The checkpoint in transformers, float32."""
    torch = import_baseline("torch")
    transformers = import_baseline("transformers")
    transformers.utils.logging.disable_progress_bar()
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation=attention, dtype=torch.float32
    )
    return model.eval()


def paper_mask(times: "torch.Tensor") -> "torch.Tensor":
    """Return the mask [1, 1, T, S] that is added to the scores, computed pair by pair of tokens.

    This repeats the published code (Marro et al., arXiv:2504.03933). For each query, a key's
    duration is searched again: the time between its end and the latest earlier end.
    """
    torch = import_baseline("torch")
    durations = torch.zeros(1, 1, len(times), len(times))
    for query in range(len(times)):
        for key in range(len(times)):
            if times[key] <= times[query]:
                earlier_ends = times[times < times[key]]
                key_begin = earlier_ends.max() if len(earlier_ends) else 0.0
                durations[0, 0, query, key] = times[key] - key_begin
    return torch.log(durations)


def paper_masks(durations: np.ndarray) -> list["torch.Tensor"]:
    """`paper_mask` of every point of durations [P, T]."""
    torch = import_baseline("torch")
    return [paper_mask(times) for times in torch.cumsum(torch.tensor(durations), 1)]


def paper_sweep(
    model: "PreTrainedModel",
    tokens: np.ndarray,
    durations: np.ndarray,
    masks: Sequence["torch.Tensor"] | None = None,
) -> np.ndarray:
    """Probabilities [P, V] of the next token, point by point, by eager attention.

    All positions' logits and their softmax are made, as there.

    Args:
      model: as in `load_causal_lm`.
      tokens: [T].
      durations: [P, T], all > 0.
      masks: `paper_mask` of every point; made here if omitted.
    """
    torch = import_baseline("torch")
    embed = model.get_input_embeddings()
    probabilities = []
    with torch.inference_mode():
        for point, point_durations in enumerate(torch.tensor(durations)):
            times = torch.cumsum(point_durations, 0)
            mask = paper_mask(times) if masks is None else masks[point]
            output = model(
                inputs_embeds=embed(torch.tensor(tokens)[None]),
                attention_mask=mask,
                position_ids=times[None],
                use_cache=False,
            )
            probabilities.append(torch.softmax(output.logits, -1)[0, -1].numpy())
    return np.stack(probabilities)


# --- A sweep, as fast as PyTorch can be made to do it -------------------------------------------


class _LayerWeights(NamedTuple):
    attention_norm: "torch.Tensor"
    qkv: "torch.Tensor"
    attention_output: "torch.Tensor"
    mlp_norm: "torch.Tensor"
    gate_up: "torch.Tensor"
    down: "torch.Tensor"


class BatchedLlama:
    """A Llama that computes many points of a sweep in one batch.

    It uses `scaled_dot_product_attention`, fused projections and only the last position's logits.
    Optionally it computes the keys and values of the shared prefix once.
    """

    def __init__(self, model: Any, dtype: str = "float32"):
        """Copy a model of transformers, in the named dtype."""
        torch = import_baseline("torch")
        config = model.config
        self.eps = config.rms_norm_eps
        self.num_heads = config.num_attention_heads
        self.num_kv_heads = config.num_key_value_heads
        self.head_dim = config.head_dim
        self.theta = config.rope_parameters["rope_theta"]
        self.dtype = getattr(torch, dtype)

        self.layers = []
        for layer in model.model.layers:
            attention, mlp = layer.self_attn, layer.mlp
            self.layers.append(
                _LayerWeights(
                    self._concatenate_weights(layer.input_layernorm),
                    self._concatenate_weights(
                        attention.q_proj, attention.k_proj, attention.v_proj
                    ),
                    self._concatenate_weights(attention.o_proj),
                    self._concatenate_weights(layer.post_attention_layernorm),
                    self._concatenate_weights(mlp.gate_proj, mlp.up_proj),
                    self._concatenate_weights(mlp.down_proj),
                )
            )
        self.embedding = self._concatenate_weights(model.get_input_embeddings())
        self.norm = self._concatenate_weights(model.model.norm)
        self.output_layer = self._concatenate_weights(model.lm_head)

    def _concatenate_weights(self, *modules: Any) -> "torch.Tensor":
        """The weights of linear maps of the same input, as one matrix."""
        weights = import_baseline("torch").cat([m.weight.detach() for m in modules])
        return weights.to(self.dtype)

    def sweep(
        self,
        tokens: np.ndarray,
        durations: np.ndarray,
        *,
        batch_size: int,
        prefix: int = 0,
    ) -> np.ndarray:
        """Probabilities [P, V] of the next token.

        Args:
          tokens: [T].
          durations: [P, T], all > 0.
          batch_size: points at once.
          prefix: tokens that last the same at all points, computed once.
        """
        torch = import_baseline("torch")
        token_ids = torch.tensor(tokens)
        d = torch.tensor(durations)
        times = torch.cumsum(d, 1)
        with torch.inference_mode():
            prefix_cache = None
            if prefix:
                _, prefix_cache = self._run_layers(
                    token_ids[:prefix], d[:1, :prefix], times[:1, :prefix], None
                )
            probabilities = []
            for point_indices in torch.arange(len(d)).split(batch_size):
                x, _ = self._run_layers(
                    token_ids[prefix:],
                    d[point_indices],
                    times[point_indices, prefix:],
                    prefix_cache,
                )
                x = torch.nn.functional.rms_norm(
                    x[:, -1], x.shape[-1:], self.norm, self.eps
                )
                probabilities.append(
                    torch.softmax((x @ self.output_layer.T).float(), -1)
                )
            return torch.cat(probabilities).numpy()

    def _run_layers(
        self,
        tokens: "torch.Tensor",
        d: "torch.Tensor",
        times: "torch.Tensor",
        cache: Sequence["KeysValues"] | None,
    ) -> tuple["torch.Tensor", list["KeysValues"]]:
        """Outputs [P, T, D] of the last layer, and the keys and values of all."""
        torch = import_baseline("torch")
        functional = torch.nn.functional
        num_points, length = times.shape
        x = self.embedding[tokens].expand(num_points, -1, -1)
        frequencies = self.theta ** (
            -torch.arange(0, self.head_dim, 2).float() / self.head_dim
        )
        angles = (times[..., None] * frequencies)[:, None]
        cosine = angles.cos().to(self.dtype)
        sine = angles.sin().to(self.dtype)
        # Scores are weighted by adding log d; later keys are hidden.
        causal_mask = torch.full((length, d.shape[1]), -torch.inf).triu(
            1 + d.shape[1] - length
        )
        mask = (d.log()[:, None, None, :] + causal_mask).to(self.dtype)
        head_counts = (self.num_heads, self.num_kv_heads, self.num_kv_heads)
        widths = [num_heads * self.head_dim for num_heads in head_counts]
        keys_values = []
        for layer_index, layer in enumerate(self.layers):
            y = functional.rms_norm(x, x.shape[-1:], layer.attention_norm, self.eps)
            qkv = functional.linear(y, layer.qkv)
            q, k, v = map(self._split_heads, qkv.split(widths, -1))
            q = self._apply_rotary(q, cosine, sine)
            k = self._apply_rotary(k, cosine, sine)
            if cache is not None:
                cached_keys, cached_values = cache[layer_index]
                k = torch.cat([cached_keys.expand(num_points, -1, -1, -1), k], 2)
                v = torch.cat([cached_values.expand(num_points, -1, -1, -1), v], 2)
            keys_values.append((k, v))
            is_grouped = self.num_heads != self.num_kv_heads
            y = functional.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, enable_gqa=is_grouped
            )
            x = x + functional.linear(
                y.transpose(1, 2).flatten(2), layer.attention_output
            )
            y = functional.rms_norm(x, x.shape[-1:], layer.mlp_norm, self.eps)
            gate, up = functional.linear(y, layer.gate_up).chunk(2, -1)
            x = x + functional.linear(functional.silu(gate) * up, layer.down)
        return x, keys_values

    def _split_heads(self, x: "torch.Tensor") -> "torch.Tensor":
        """[P, T, N H] -> [P, N, T, H]."""
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

    def _apply_rotary(
        self, x: "torch.Tensor", cosine: "torch.Tensor", sine: "torch.Tensor"
    ) -> "torch.Tensor":
        torch = import_baseline("torch")
        first_half, second_half = x.chunk(2, -1)
        return torch.cat(
            [
                first_half * cosine - second_half * sine,
                second_half * cosine + first_half * sine,
            ],
            -1,
        )


# --- Attention on a GPU -------------------------------------------------------------------------


def flex_attention(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    durations: np.ndarray,
    *,
    with_gradients: bool,
    num_calls: int,
    device: str = "cuda",
) -> Callable[[], Any]:
    """Causal attention with log d added to the scores, compiled, in bfloat16.

    Args:
      q: queries [1, T, N, H].
      k: keys, and
      v: values, of the same shape.
      durations: [1, T], all > 0.
      with_gradients: whether those for q, k, v and log d are made.
      num_calls: how often the function that is returned does it.
      device: device of PyTorch.
    """
    torch = import_baseline("torch")
    flex = import_baseline("torch.nn.attention.flex_attention")
    length = q.shape[1]
    queries, keys, values = [
        torch.tensor(
            x.swapaxes(1, 2),
            dtype=torch.bfloat16,
            device=device,
            requires_grad=with_gradients,
        )
        for x in (q, k, v)
    ]
    log_durations = torch.tensor(
        np.log(durations[0]), device=device, requires_grad=with_gradients
    )

    def add_log_duration(score, batch, head, query, key):
        return score + log_durations[key]

    def is_visible(batch, head, query, key):
        return query >= key

    block_mask = flex.create_block_mask(
        is_visible, None, None, length, length, device=device
    )
    attend = torch.compile(flex.flex_attention)

    def run_attention() -> None:
        for _ in range(num_calls):
            y = attend(
                queries, keys, values, score_mod=add_log_duration, block_mask=block_mask
            )
            if with_gradients:
                torch.autograd.grad(
                    y.float().sum(), (queries, keys, values, log_durations)
                )
        if device == "cuda":
            torch.cuda.synchronize()

    return run_attention
