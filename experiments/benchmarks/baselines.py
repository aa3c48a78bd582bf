"""What ours is measured against: PyTorch, transformers, faiss, at their best settings.

They come with the extra `peers`, and are imported when a case asks for them.
"""

import importlib
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from continuous_lm.errors import InputError
from continuous_lm.experiments.benchmarks import timing

# Intel's OpenMP would spin for 200 ms after each operation, into the next turn; see `measuring`.
os.environ.setdefault("KMP_BLOCKTIME", "20")


def load(name: str) -> Any:
    """The module, with as many threads as there are cores.

    Raises:
      InputError: if it is not installed.
    """
    try:
        module = importlib.import_module(name)
    except ImportError:
        raise InputError(f"{name} is not installed: pip install -e '.[peers]'") from None
    if name == "torch":
        module.set_num_threads(timing.cores())
    elif name == "faiss":
        module.omp_set_num_threads(timing.cores())
    return module


def missing(*names: str) -> str:
    """Why not all of these can be imported; "" if they can."""
    try:
        for name in names:
            load(name)
    except InputError as error:
        return str(error)
    return ""


def without_cuda() -> str:
    """Why no PyTorch runs on a GPU here; "" if one does."""
    if absent := missing("torch"):
        return absent
    return "" if load("torch").cuda.is_available() else "this PyTorch has no CUDA"


# --- A sweep, as the paper's code does it -------------------------------------------------------


def causal_lm(folder: str | os.PathLike, attention: str = "eager") -> Any:
    """The checkpoint in transformers, float32."""
    torch, transformers = load("torch"), load("transformers")
    transformers.utils.logging.disable_progress_bar()
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation=attention, dtype=torch.float32
    )
    return model.eval()


def paper_mask(times: Any) -> Any:
    """The mask [1, 1, T, T] that is added to the scores, pair by pair of tokens.

    As the published code makes it (Marro et al., arXiv:2504.03933): a key's duration is sought anew
    for each query that sees it, in the time between its end and the latest one before.
    """
    torch = load("torch")
    durations = torch.zeros(1, 1, len(times), len(times))
    for query in range(len(times)):
        for key in range(len(times)):
            if times[key] <= times[query]:
                before = times[times < times[key]]
                begin = before.max() if len(before) else 0.0
                durations[0, 0, query, key] = times[key] - begin
    return torch.log(durations)


def paper_masks(durations: np.ndarray) -> list[Any]:
    """`paper_mask` of every point of durations [P, T]."""
    torch = load("torch")
    return [paper_mask(times) for times in torch.cumsum(torch.tensor(durations), 1)]


def paper_sweep(model: Any, tokens: np.ndarray, durations: np.ndarray, masks: Any = None) -> Any:
    """Probabilities [P, V] of the next token, point by point, by eager attention.

    All positions' logits and their softmax are made, as there.

    Args:
      model: as of `causal_lm`.
      tokens: [T].
      durations: [P, T], all > 0.
      masks: `paper_mask` of every point; made here if left out.
    """
    torch = load("torch")
    found = []
    with torch.inference_mode():
        for point, d in enumerate(torch.tensor(durations)):
            times = torch.cumsum(d, 0)
            mask = paper_mask(times) if masks is None else masks[point]
            out = model(
                inputs_embeds=model.get_input_embeddings()(torch.tensor(tokens)[None]),
                attention_mask=mask,
                position_ids=times[None],
                use_cache=False,
            )
            found.append(torch.softmax(out.logits, -1)[0, -1].numpy())
    return np.stack(found)


# --- A sweep, as fast as PyTorch can be made to do it -------------------------------------------


class _Layer(NamedTuple):
    norm: Any
    qkv: Any
    out: Any
    mlp_norm: Any
    gate_up: Any
    down: Any


class BatchedLlama:
    """A Llama that takes many points of a sweep at once.

    With `scaled_dot_product_attention`, fused projections, the last position's logits alone and, if
    it is asked to, keys and values of what stands before the changed tokens computed once.
    """

    def __init__(self, model: Any, dtype: str = "float32"):
        """Of a model of transformers, in the dtype of that name."""
        torch = load("torch")
        config = model.config
        self.eps, self.heads = config.rms_norm_eps, config.num_attention_heads
        self.kv_heads, self.width = config.num_key_value_heads, config.head_dim
        self.theta = config.rope_parameters["rope_theta"]
        self.dtype = getattr(torch, dtype)

        def joined(*modules: Any) -> Any:
            return torch.cat([module.weight.detach() for module in modules]).to(self.dtype)

        self.layers = []
        for layer in model.model.layers:
            attention, mlp = layer.self_attn, layer.mlp
            self.layers.append(
                _Layer(
                    joined(layer.input_layernorm),
                    joined(attention.q_proj, attention.k_proj, attention.v_proj),
                    joined(attention.o_proj),
                    joined(layer.post_attention_layernorm),
                    joined(mlp.gate_proj, mlp.up_proj),
                    joined(mlp.down_proj),
                )
            )
        self.embedding = joined(model.get_input_embeddings())
        self.norm, self.head = joined(model.model.norm), joined(model.lm_head)

    def sweep(
        self, tokens: np.ndarray, durations: np.ndarray, *, batch_size: int, prefix: int = 0
    ) -> np.ndarray:
        """Probabilities [P, V] of the next token.

        Args:
          tokens: [T].
          durations: [P, T], all > 0.
          batch_size: points at once.
          prefix: tokens that last the same at all points, computed once.
        """
        torch = load("torch")
        tokens, d = torch.tensor(tokens), torch.tensor(durations)
        times = torch.cumsum(d, 1)
        with torch.inference_mode():
            past = None
            if prefix:
                first = slice(0, prefix)
                _, past = self._trunk(tokens[first], d[:1, first], times[:1, first], None)
            rest = slice(prefix, None)
            found = []
            for batch in torch.arange(len(d)).split(batch_size):
                x, _ = self._trunk(tokens[rest], d[batch], times[batch, rest], past)
                x = torch.nn.functional.rms_norm(x[:, -1], x.shape[-1:], self.norm, self.eps)
                found.append(torch.softmax((x @ self.head.T).float(), -1))
            return torch.cat(found).numpy()

    def _trunk(self, tokens: Any, d: Any, times: Any, past: Any) -> tuple[Any, list]:
        """Outputs [B, T, D] of the last layer, and the keys and values of all."""
        torch = load("torch")
        functional = torch.nn.functional
        points, length = times.shape
        x = self.embedding[tokens].expand(points, -1, -1)
        rates = self.theta ** (-torch.arange(0, self.width, 2).float() / self.width)
        angles = (times[..., None] * rates)[:, None]
        turns = angles.cos().to(self.dtype), angles.sin().to(self.dtype)
        # Scores are weighted by adding log d; later keys are hidden.
        hidden = torch.full((length, d.shape[1]), -torch.inf).triu(1 + d.shape[1] - length)
        mask = (d.log()[:, None, None, :] + hidden).to(self.dtype)
        sizes = [n * self.width for n in (self.heads, self.kv_heads, self.kv_heads)]
        kept = []
        for i, layer in enumerate(self.layers):
            y = functional.rms_norm(x, x.shape[-1:], layer.norm, self.eps)
            q, k, v = (
                part.unflatten(-1, (-1, self.width)).transpose(1, 2)
                for part in functional.linear(y, layer.qkv).split(sizes, -1)
            )
            q, k = self._turned(q, *turns), self._turned(k, *turns)
            if past is not None:
                k, v = (
                    torch.cat([old.expand(points, -1, -1, -1), new], 2)
                    for old, new in zip(past[i], (k, v), strict=True)
                )
            kept.append((k, v))
            grouped = self.heads != self.kv_heads
            y = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=grouped)
            x = x + functional.linear(y.transpose(1, 2).flatten(2), layer.out)
            y = functional.rms_norm(x, x.shape[-1:], layer.mlp_norm, self.eps)
            gate, up = functional.linear(y, layer.gate_up).chunk(2, -1)
            x = x + functional.linear(functional.silu(gate) * up, layer.down)
        return x, kept

    def _turned(self, x: Any, cosine: Any, sine: Any) -> Any:
        torch = load("torch")
        first, second = x.chunk(2, -1)
        return torch.cat([first * cosine - second * sine, second * cosine + first * sine], -1)


# --- Attention on a GPU -------------------------------------------------------------------------


def flex_attention(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    durations: np.ndarray,
    *,
    gradients: bool,
    calls: int,
    device: str = "cuda",
) -> Callable[[], Any]:
    """Causal attention with log d added to the scores, compiled, in bfloat16.

    Args:
      q: queries [1, T, N, H].
      k: keys, and
      v: values, of the same shape.
      durations: [1, T], all > 0.
      gradients: whether those for q, k, v and log d are made.
      calls: how often the function that is returned does it.
      device: of PyTorch.
    """
    torch, flex = load("torch"), load("torch.nn.attention.flex_attention")
    length = q.shape[1]
    queries, keys, values = (
        torch.tensor(x.swapaxes(1, 2), dtype=torch.bfloat16, device=device, requires_grad=gradients)
        for x in (q, k, v)
    )
    logs = torch.tensor(np.log(durations[0]), device=device, requires_grad=gradients)

    def weighted(score, batch, head, query, key):
        return score + logs[key]

    def causal(batch, head, query, key):
        return query >= key

    mask = flex.create_block_mask(causal, None, None, length, length, device=device)
    attend = torch.compile(flex.flex_attention)

    def run() -> None:
        for _ in range(calls):
            y = attend(queries, keys, values, score_mod=weighted, block_mask=mask)
            if gradients:
                torch.autograd.grad(y.float().sum(), (queries, keys, values, logs))
        if device == "cuda":
            torch.cuda.synchronize()

    return run
