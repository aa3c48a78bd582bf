"""The config.json of published checkpoints, field by field, with the number of their parameters.

Written down as they were published: with the fields that say nothing about the mathematics, and
without those that the publisher left to defaults. Each was compared with copies in public source
code (tests of Megatron-Bridge, TensorRT-LLM, Olive and others, logs of programs that printed the
file). Not seen in a copy, so from the model's documentation alone: the file of Llama 3 70B (its
sizes are those of copies of Llama 3.1 70B), fields of Mistral v0.3 other than its vocabulary and
window (as in v0.1) and its rotary base, and Phi-3-medium-128k's file, whose 64 + 64 factors
could not be found: those here have their number, not their values. The parameter counts are the
publishers', as seen in public tables.
"""

from typing import Any

_LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "model_type": "llama",
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "tie_word_embeddings": False,
    "use_cache": True,
}
_LLAMA3 = _LLAMA | {
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 128000,
    "eos_token_id": 128001,
    "max_position_embeddings": 8192,
    "num_key_value_heads": 8,
    "rope_theta": 500000.0,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.40.0.dev0",
    "vocab_size": 128256,
}


def _llama31(factor: float) -> dict[str, Any]:
    scaling = {
        "factor": factor,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    }
    return {"max_position_embeddings": 131072, "mlp_bias": False, "rope_scaling": scaling}


_MISTRAL: dict[str, Any] = {
    "architectures": ["MistralForCausalLM"],
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 14336,
    "max_position_embeddings": 32768,
    "model_type": "mistral",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_cache": True,
}
_GEMMA: dict[str, Any] = {  # none of the files says that the head is tied
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 2,
    "eos_token_id": 1,
    "head_dim": 256,
    "initializer_range": 0.02,
    "max_position_embeddings": 8192,
    "pad_token_id": 0,
    "rms_norm_eps": 1e-06,
    "use_cache": True,
    "vocab_size": 256000,
}
_GEMMA2 = _GEMMA | {
    "architectures": ["Gemma2ForCausalLM"],
    "attn_logit_softcapping": 50.0,
    "cache_implementation": "hybrid",
    "final_logit_softcapping": 30.0,
    "hidden_act": "gelu_pytorch_tanh",
    "hidden_activation": "gelu_pytorch_tanh",
    "model_type": "gemma2",
    "rope_theta": 10000.0,
    "sliding_window": 4096,
    "sliding_window_size": 4096,
    "torch_dtype": "float32",
    "transformers_version": "4.42.0.dev0",
}
_PHI3: dict[str, Any] = {
    "architectures": ["Phi3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "auto_map": {
        "AutoConfig": "configuration_phi3.Phi3Config",
        "AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM",
    },
    "bos_token_id": 1,
    "embd_pdrop": 0.0,
    "eos_token_id": 32000,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "model_type": "phi3",
    "original_max_position_embeddings": 4096,
    "pad_token_id": 32000,
    "resid_pdrop": 0.0,
    "rms_norm_eps": 1e-05,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "vocab_size": 32064,
}
_PHI3_MEDIUM = _PHI3 | {
    "hidden_size": 5120,
    "intermediate_size": 17920,
    "num_attention_heads": 40,
    "num_hidden_layers": 40,
    "num_key_value_heads": 10,
    "transformers_version": "4.39.3",
}
# fmt: off
_PHI35_LONG = [
    1.0800000429153442, 1.1100000143051147, 1.1399999856948853, 1.340000033378601,
    1.5899999141693115, 1.600000023841858, 1.6200000047683716, 2.620000123977661,
    3.2300000190734863, 3.2300000190734863, 4.789999961853027, 7.400000095367432,
    7.700000286102295, 9.09000015258789, 12.199999809265137, 17.670000076293945,
    24.46000099182129, 28.57000160217285, 30.420001983642578, 30.840002059936523,
    32.590003967285156, 32.93000411987305, 42.320003509521484, 44.96000289916992,
    50.340003967285156, 50.45000457763672, 57.55000305175781, 57.93000411987305,
    58.21000289916992, 60.1400032043457, 62.61000442504883, 62.62000274658203,
    62.71000289916992, 63.1400032043457, 63.1400032043457, 63.77000427246094,
    63.93000411987305, 63.96000289916992, 63.970001220703125, 64.02999877929688,
    64.06999969482422, 64.08000183105469, 64.12000274658203, 64.41000366210938,
    64.4800033569336, 64.51000213623047, 64.52999877929688, 64.83999633789062,
]
_PHI35_SHORT = [
    1.0, 1.0199999809265137, 1.0299999713897705, 1.0299999713897705,
    *[1.0499999523162842] * 5, 1.0699999332427979, 1.0999999046325684,
    1.1099998950958252, 1.1599998474121094, 1.1599998474121094, 1.1699998378753662,
    1.2899998426437378, 1.339999794960022, 1.679999828338623, 1.7899998426437378,
    1.8199998140335083, 1.8499997854232788, 1.8799997568130493, 1.9099997282028198,
    1.9399996995925903, 1.9899996519088745, *[2.0199997425079346] * 6,
    *[2.0299997329711914] * 9, 2.0799996852874756, 2.0899996757507324,
    2.189999580383301, 2.2199995517730713, 2.5899994373321533, 2.729999542236328,
    2.749999523162842, 2.8399994373321533,
]
# fmt: on
_NEOX: dict[str, Any] = {
    "architectures": ["GPTNeoXForCausalLM"],
    "bos_token_id": 0,
    "initializer_range": 0.02,
    "layer_norm_eps": 1e-05,
    "max_position_embeddings": 2048,
    "model_type": "gpt_neox",
    "rotary_emb_base": 10000,
    "rotary_pct": 0.25,
    "tie_word_embeddings": False,
    "use_cache": True,
}
_GPT2: dict[str, Any] = {
    "activation_function": "gelu_new",
    "architectures": ["GPT2LMHeadModel"],
    "attn_pdrop": 0.1,
    "bos_token_id": 50256,
    "embd_pdrop": 0.1,
    "eos_token_id": 50256,
    "initializer_range": 0.02,
    "layer_norm_epsilon": 1e-05,
    "model_type": "gpt2",
    "n_ctx": 1024,
    "n_positions": 1024,
    "resid_pdrop": 0.1,
    "summary_activation": None,
    "summary_first_dropout": 0.1,
    "summary_proj_to_labels": True,
    "summary_type": "cls_index",
    "summary_use_proj": True,
    "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}},
    "vocab_size": 50257,
}
_QWEN: dict[str, Any] = {
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-06,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "use_sliding_window": False,
}

# Name -> the fields of config.json, and the number of parameters (tied tables once).
CHECKPOINTS: dict[str, tuple[dict[str, Any], int]] = {
    "Llama-2-13B": (
        _LLAMA
        | {
            "_name_or_path": "meta-llama/Llama-2-13b-hf",
            "bos_token_id": 1,
            "eos_token_id": 2,
            "hidden_size": 5120,
            "intermediate_size": 13824,
            "max_length": 4096,  # of its first revisions
            "max_position_embeddings": 4096,
            "num_attention_heads": 40,
            "num_hidden_layers": 40,
            "num_key_value_heads": 40,
            "pad_token_id": 0,
            "torch_dtype": "float16",
            "transformers_version": "4.31.0.dev0",
            "vocab_size": 32000,
        },
        13_015_864_320,
    ),
    "Llama-3-8B": (
        _LLAMA3
        | {
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_attention_heads": 32,
            "num_hidden_layers": 32,
        },
        8_030_261_248,
    ),
    "Llama-3-70B": (
        _LLAMA3
        | {
            "hidden_size": 8192,
            "intermediate_size": 28672,
            "num_attention_heads": 64,
            "num_hidden_layers": 80,
        },
        70_553_706_496,
    ),
    "Llama-3.1-8B": (
        _LLAMA3
        | _llama31(8.0)
        | {
            "eos_token_id": [128001, 128008, 128009],
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_attention_heads": 32,
            "num_hidden_layers": 32,
            "transformers_version": "4.43.0.dev0",
        },
        8_030_261_248,
    ),
    "Llama-3.2-1B": (
        _LLAMA3
        | _llama31(32.0)
        | {
            "head_dim": 64,
            "hidden_size": 2048,
            "intermediate_size": 8192,
            "num_attention_heads": 32,
            "num_hidden_layers": 16,
            "tie_word_embeddings": True,
            "transformers_version": "4.45.0.dev0",
        },
        1_235_814_400,
    ),
    "Mistral-7B-v0.1": (
        _MISTRAL
        | {
            "rope_theta": 10000.0,
            "sliding_window": 4096,
            "transformers_version": "4.34.0.dev0",
            "vocab_size": 32000,
        },
        7_241_732_096,
    ),
    "Mistral-7B-v0.3": (
        _MISTRAL
        | {
            "attention_dropout": 0.0,
            "rope_theta": 1000000.0,
            "sliding_window": None,
            "transformers_version": "4.42.0.dev0",
            "vocab_size": 32768,
        },
        7_248_023_552,
    ),
    "Gemma-7B": (
        _GEMMA
        | {
            "architectures": ["GemmaForCausalLM"],
            "hidden_act": "gelu",
            "hidden_size": 3072,
            "intermediate_size": 24576,
            "model_type": "gemma",
            "num_attention_heads": 16,
            "num_hidden_layers": 28,
            "num_key_value_heads": 16,
            "rope_scaling": None,
            "rope_theta": 10000.0,
            "torch_dtype": "bfloat16",
            "transformers_version": "4.38.0.dev0",
        },
        8_537_680_896,
    ),
    "Gemma-2-9B": (
        _GEMMA2
        | {
            "hidden_size": 3584,
            "intermediate_size": 14336,
            "num_attention_heads": 16,
            "num_hidden_layers": 42,
            "num_key_value_heads": 8,
            "query_pre_attn_scalar": 256,
        },
        9_241_705_984,
    ),
    "Gemma-2-27B": (
        _GEMMA2
        | {
            "_attn_implementation": "eager",
            "head_dim": 128,
            "hidden_size": 4608,
            "intermediate_size": 36864,
            "num_attention_heads": 32,
            "num_hidden_layers": 46,
            "num_key_value_heads": 16,
            "query_pre_attn_scalar": 144,
        },
        27_227_128_320,
    ),
    "Gemma-3-1B": (
        _GEMMA
        | {
            "architectures": ["Gemma3ForCausalLM"],
            "attn_logit_softcapping": None,
            "cache_implementation": "hybrid",
            "eos_token_id": [1, 106],
            "final_logit_softcapping": None,
            "hidden_activation": "gelu_pytorch_tanh",
            "hidden_size": 1152,
            "intermediate_size": 6912,
            "max_position_embeddings": 32768,
            "model_type": "gemma3_text",
            "num_attention_heads": 4,
            "num_hidden_layers": 26,
            "num_key_value_heads": 1,
            "query_pre_attn_scalar": 256,
            "rope_local_base_freq": 10000,
            "rope_scaling": None,
            "rope_theta": 1000000,
            "sliding_window": 512,
            "sliding_window_pattern": 6,
            "torch_dtype": "bfloat16",
            "transformers_version": "4.50.0.dev0",
            "vocab_size": 262144,
        },
        999_885_952,
    ),
    "Phi-3-medium-4k": (
        _PHI3_MEDIUM
        | {
            "_name_or_path": "Phi-3-medium-4k-instruct",
            "max_position_embeddings": 4096,
            "rope_scaling": None,
            "sliding_window": 2047,
        },
        13_960_238_080,
    ),
    "Phi-3-medium-128k": (
        _PHI3_MEDIUM
        | {
            "_name_or_path": "Phi-3-medium-128k-instruct",
            "max_position_embeddings": 131072,
            "rope_scaling": {
                "long_factor": [1.0 + i for i in range(64)],
                "short_factor": [1.0 + i / 32 for i in range(64)],
                "type": "su",
            },
            "sliding_window": 131072,
        },
        13_960_238_080,
    ),
    "Phi-3.5-mini": (
        _PHI3
        | {
            "_name_or_path": "Phi-3.5-mini-instruct",
            "hidden_size": 3072,
            "intermediate_size": 8192,
            "max_position_embeddings": 131072,
            "num_attention_heads": 32,
            "num_hidden_layers": 32,
            "num_key_value_heads": 32,
            "rope_scaling": {
                "long_factor": _PHI35_LONG,
                "short_factor": _PHI35_SHORT,
                "type": "longrope",
            },
            "sliding_window": 262144,
            "transformers_version": "4.43.3",
        },
        3_821_079_552,
    ),
    "Qwen2.5-7B-Instruct": (
        _QWEN
        | {
            "architectures": ["Qwen2ForCausalLM"],
            "eos_token_id": 151645,
            "hidden_size": 3584,
            "intermediate_size": 18944,
            "max_position_embeddings": 32768,
            "max_window_layers": 28,
            "model_type": "qwen2",
            "num_attention_heads": 28,
            "num_hidden_layers": 28,
            "num_key_value_heads": 4,
            "rope_theta": 1000000.0,
            "sliding_window": 131072,
            "transformers_version": "4.43.1",
            "vocab_size": 152064,
        },
        7_615_616_512,
    ),
    "Qwen3-8B": (
        _QWEN
        | {
            "architectures": ["Qwen3ForCausalLM"],
            "attention_bias": False,
            "eos_token_id": 151645,
            "head_dim": 128,
            "hidden_size": 4096,
            "intermediate_size": 12288,
            "max_position_embeddings": 40960,
            "max_window_layers": 36,
            "model_type": "qwen3",
            "num_attention_heads": 32,
            "num_hidden_layers": 36,
            "num_key_value_heads": 8,
            "rope_scaling": None,
            "rope_theta": 1000000,
            "sliding_window": None,
            "transformers_version": "4.51.0",
            "vocab_size": 151936,
        },
        8_190_735_360,
    ),
    "GPT-NeoX-20B": (
        _NEOX
        | {
            "attention_probs_dropout_prob": 0,
            "eos_token_id": 0,
            "hidden_act": "gelu_fast",
            "hidden_dropout_prob": 0,
            "hidden_size": 6144,
            "intermediate_size": 24576,
            "num_attention_heads": 64,
            "num_hidden_layers": 44,
            "torch_dtype": "float16",
            "transformers_version": "4.19.0.dev0",
            "vocab_size": 50432,
        },
        20_554_567_680,
    ),
    "Pythia-6.9B": (
        _NEOX
        | {
            "eos_token_id": 0,
            "hidden_act": "gelu",
            "hidden_size": 4096,
            "intermediate_size": 16384,
            "num_attention_heads": 32,
            "num_hidden_layers": 32,
            "torch_dtype": "float16",
            "transformers_version": "4.24.0",
            "use_parallel_residual": True,
            "vocab_size": 50432,
        },
        6_857_302_016,
    ),
    "GPT-2": (_GPT2 | {"n_embd": 768, "n_head": 12, "n_layer": 12}, 124_439_808),
    "GPT-2-XL": (
        _GPT2 | {"n_embd": 1600, "n_head": 25, "n_layer": 48, "output_past": True},
        1_557_611_200,
    ),
}
