"""Pico checkpoints of real architectures, made by transformers' own `save_pretrained` in the test."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers

_COMMON: dict[str, Any] = {
    "vocab_size": 130,  # not divisible by 4: the last rank holds less
    "hidden_size": 32,
    "intermediate_size": 52,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 24, "intermediate_size": 24, "head_dim": 8}

DENSE: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {},
    "qwen3": {"head_dim": 8},
    "mistral": {"head_dim": 8, "sliding_window": 16},
    "gemma2": {"head_dim": 8, "sliding_window": 16},
    "gemma3_text": {"head_dim": 8, "sliding_window": 16},
    "granite": {},
    "olmo2": {},
    "phi3": {},
    "glm4": {"head_dim": 8, "attention_bias": True},
    "starcoder2": {},
    "cohere2": {"sliding_window": 16},
    "gpt_neox": {},
}
MOE: dict[str, dict[str, Any]] = {
    "mixtral": {**_EXPERTS, "num_local_experts": 4},
    "qwen3_moe": {**_EXPERTS, "num_experts": 4, "decoder_sparse_step": 1, "mlp_only_layers": [1]},
    # a shared expert, a dense layer, and a router bias that stays in fp32
    "glm4_moe": {**_EXPERTS, "n_routed_experts": 4, "n_shared_experts": 1, "first_k_dense_replace": 1},
}
FAMILIES = {**DENSE, **MOE}


def build(family: str, *, dtype: torch.dtype = torch.float32, seed: int = 0, **overrides: Any) -> Any:
    """Build a model of `family`. All weights are random, biases and norms included, so that nothing cancels out."""
    config = transformers.AutoConfig.for_model(family, **{**_COMMON, **FAMILIES.get(family, {}), **overrides})
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(noise * 0.2 if parameter.ndim > 1 else 1 + noise * 0.1)
    model.config.dtype = dtype
    return model.to(dtype)


def save(family: str, folder: Path, *, shard_bytes: int | str = 40_000, **options: Any) -> Path:
    """Write a checkpoint as several source files and an index, as big checkpoints are."""
    transformers.utils.logging.disable_progress_bar()
    build(family, **options).save_pretrained(folder, max_shard_size=shard_bytes)
    return folder


TINY = {
    **{"vocab_size": 6, "hidden_size": 4, "intermediate_size": 4, "num_hidden_layers": 1, "num_attention_heads": 2},
    **{"num_key_value_heads": 2, "max_position_embeddings": 8},
}
