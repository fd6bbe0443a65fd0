"""Tiny models of many architectures, made from transformers' own configs, with weights by which they differ."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

from steerlab.models import load_tokenizer

WIDTHS = dict.fromkeys(("hidden_size", "d_model", "n_embd", "lru_width", "word_embed_proj_dim", "embedding_size"), 32)
LAYERS = dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "decoder_layers"), 2)
HEADS = dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "decoder_attention_heads"), 4)
INNER = dict.fromkeys(("intermediate_size", "ffn_dim", "ffn_hidden_size", "n_inner", "decoder_ffn_dim"), 48)
POSITIONS = dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len"), 128)
EXPERTS = {
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 16),
    "num_experts_per_tok": 2,
}
LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8}
SIZES: dict[str, Any] = {
    **WIDTHS, **LAYERS, **HEADS, **INNER, **POSITIONS, **EXPERTS, **LATENT,
    "num_key_value_heads": 2, "head_dim": 8, "rotary_dim": 4, "state_size": 4, "attention_hidden_size": 32,
}  # fmt: skip
"""Fields of the configs, as far as a config has them."""
_MAMBA2 = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_d_state": 4, "mamba_chunk_size": 8}
_DELTA = {
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "full_attention"],
}  # fmt: skip
OWN: dict[str, dict[str, Any]] = {
    "bamba": {**_MAMBA2, "attn_layer_indices": [1]},
    "deepseek_v2": {"head_dim": 4, "num_key_value_heads": 4, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1},
    "deepseek_v3": {"head_dim": 4, "num_key_value_heads": 4, "first_k_dense_replace": 1, "n_group": 2, "topk_group": 1},
    "falcon": {"head_dim": None},
    "falcon/40b": {"head_dim": None, "new_decoder_architecture": True, "num_kv_heads": 2},
    "falcon/rw": {"head_dim": None, "multi_query": False, "alibi": True, "parallel_attn": False, "bias": True},
    "falcon_h1": {**_MAMBA2, "mamba_d_ssm": 32, "mamba_n_heads": 4},
    "gemma2": {"attn_logit_softcapping": 5.0, "sliding_window": 4},
    "gemma3_text": {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]},
    "gemma3n_text": {
        "num_hidden_layers": 4, "num_kv_shared_layers": 2, "sliding_window": 4, "intermediate_size": [48] * 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2, "laurel_rank": 4, "hidden_size_per_layer_input": 8,
        "activation_sparsity_pattern": [0.0] * 4, "vocab_size_per_layer_input": 256,
    },
    "glm4_moe_lite": {"head_dim": 4, "num_key_value_heads": 4},
    "gpt_bigcode/heads": {"multi_query": False},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 4},
    "gpt_oss": {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]},
    "granitemoehybrid": {**_MAMBA2, "layer_types": ["mamba", "attention"]},
    "jamba": {
        "mamba_dt_rank": 4, "mamba_d_state": 4, "attn_layer_offset": 1, "attn_layer_period": 2, "expert_layer_offset": 1,
        "expert_layer_period": 2,
    },
    "lfm2": {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "mamba2": {"num_heads": 8, "head_dim": 8, "n_groups": 1, "chunk_size": 8},
    "minimax": {"layer_types": ["linear_attention", "full_attention"], "block_size": 4},
    "minicpm3": {"head_dim": 4, "num_key_value_heads": 4},
    "nemotron_h": {"ssm_state_size": 4, "mamba_num_heads": 8, "mamba_head_dim": 8, "n_groups": 1, "chunk_size": 8},
    "persimmon": {"qk_layernorm": False},
    "phi3/longrope": {
        "original_max_position_embeddings": 10,
        "rope_parameters": {
            "rope_type": "longrope", "rope_theta": 100.0, "short_factor": [1.0] * 4, "long_factor": [9.0, 5.0, 3.0, 2.0],
            "original_max_position_embeddings": 10, "factor": 12.8,
        },
    },
    "qwen3_5": _DELTA,
    "qwen3_5_moe": _DELTA,
    "qwen3_5_moe_text": _DELTA,
    "qwen3_5_text": _DELTA,
    "qwen3_next": _DELTA,
    "qwen2_vl": {"rope_parameters": {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 10000.0}},
    "recurrent_gemma": {
        "num_hidden_layers": 3, "attention_window_size": 8, "block_types": ["recurrent", "recurrent", "attention"],
    },
    "xlnet": {"max_position_embeddings": None},
    "youtu": {"head_dim": 4, "num_key_value_heads": 4},
    "zaya": {"num_experts_per_tok": 1},
}  # fmt: skip
"""What an architecture needs besides; what follows a slash is a variant of it."""
VISION = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 28,
    "patch_size": 14, "embed_dim": 32, "depth": 2, "num_heads": 4, "out_hidden_size": 32,
}  # fmt: skip


def config(name: str, **fields: Any) -> Any:
    """Return a tiny config of an architecture, of as many tokens as the tiny world has unless `fields` say so."""
    kind = name.partition("/")[0]
    default = AutoConfig.for_model(kind)
    own = OWN.get(name, {}) | fields
    if "text_config" in default.sub_configs:
        return AutoConfig.for_model(kind, text_config=_sizes(default.text_config, {}) | own, **_others(default))
    return AutoConfig.for_model(kind, **_sizes(default, own))


def _sizes(default: Any, own: dict[str, Any]) -> dict[str, Any]:
    known = default.to_dict()
    sizes = {field: value for field, value in SIZES.items() if field in known or hasattr(default, field)}
    return {field: value for field, value in (sizes | own).items() if value is not None}


def _others(default: Any) -> dict[str, Any]:
    """Return small configs of what looks at images."""
    if "vision_config" not in default.sub_configs:
        return {}
    known = default.vision_config.to_dict()
    return {"vision_config": {field: value for field, value in VISION.items() if field in known}}


def model(made: Any, seed: int = 0) -> Any:
    """Return a model with weights so large that every part of it matters."""
    auto = AutoModelForCausalLM if type(made) in AutoModelForCausalLM._model_mapping else AutoModelForImageTextToText
    torch.manual_seed(seed)
    found = auto.from_config(made).eval()
    for name, parameter in found.named_parameters():
        if parameter.dim() > 1:
            size = 1.0 if "embed" in name else 1.5 / parameter.shape[-1] ** 0.5
            parameter.data = size * torch.randn_like(parameter)
        elif "bias" in name:
            parameter.data = 0.3 * torch.randn_like(parameter)
    return found


def write(name: str, directory: Path, tokens: Path, **fields: Any) -> Any:
    """Save a tiny model beside the tokenizer of the model directory `tokens`, and return it."""
    tokenizer: Any = load_tokenizer(tokens)
    special = {f"{kind}_token_id": getattr(tokenizer, f"{kind}_token_id") for kind in ("bos", "eos", "pad")}
    made = model(config(name, **{"vocab_size": len(tokenizer), **special, **fields}))
    made.generation_config.eos_token_id = special["eos_token_id"]
    made.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return made
