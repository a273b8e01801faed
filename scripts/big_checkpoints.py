"""Checkpoints as big as real ones for benchmarks and the memory test: sparse files, or filled with random bytes."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

__all__ = [
    "DEEPSEEK_V3",
    "DEEPSEEK_V3_FP8",
    "KIMI_K2_INT4",
    "LLAMA_1B",
    "LLAMA_70B",
    "LLAMA_405B",
    "QWEN3_MOE",
    "QWEN3_MOE_FP8",
    "QWEN3_MOE_INT4",
    "stored",
    "tensors",
    "write",
]

Config = dict[str, Any]
Tensors = Iterator[tuple[str, list[int]]]  # name and shape

_LLAMA: Config = {
    **{"architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "bfloat16", "vocab_size": 128256},
    "tie_word_embeddings": False,
}
LLAMA_1B: Config = {
    **_LLAMA,
    **{"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32},
    **{"num_key_value_heads": 8, "head_dim": 64},
}
LLAMA_70B: Config = {
    **_LLAMA,
    **{"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64},
    **{"num_key_value_heads": 8, "head_dim": 128},
}
LLAMA_405B: Config = {
    **LLAMA_70B,
    **{"hidden_size": 16384, "intermediate_size": 53248, "num_hidden_layers": 126, "num_attention_heads": 128},
}
QWEN3_MOE: Config = {
    **{"architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "dtype": "bfloat16", "vocab_size": 151936},
    **{"hidden_size": 1024, "intermediate_size": 3072, "moe_intermediate_size": 512, "num_hidden_layers": 12},
    **{"num_attention_heads": 16, "num_key_value_heads": 4, "head_dim": 64, "num_experts": 64},
    **{"num_experts_per_tok": 4, "decoder_sparse_step": 1, "mlp_only_layers": [], "tie_word_embeddings": False},
}
DEEPSEEK_V3: Config = {
    **{"architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3", "dtype": "bfloat16"},
    **{"vocab_size": 129280, "hidden_size": 7168, "intermediate_size": 18432, "moe_intermediate_size": 2048},
    **{"num_hidden_layers": 61, "num_attention_heads": 128, "num_key_value_heads": 128, "n_routed_experts": 256},
    **{"n_shared_experts": 1, "num_experts_per_tok": 8, "first_k_dense_replace": 3, "n_group": 8, "topk_group": 4},
    "topk_method": "noaux_tc",
    **{"q_lora_rank": 1536, "kv_lora_rank": 512, "qk_rope_head_dim": 64, "qk_nope_head_dim": 128, "v_head_dim": 128},
    "tie_word_embeddings": False,
}
_INT4 = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32, "symmetric": True}
# Every matrix of a layer in blocks of 128, but for the router; and the experts in int4.
_IN_FP8: Config = {
    "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}
}
_IN_INT4: Config = {
    "quantization_config": {
        **{"quant_method": "compressed-tensors", "format": "pack-quantized"},
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": _INT4}},
    }
}
DEEPSEEK_V3_FP8: Config = {**DEEPSEEK_V3, **_IN_FP8}  # as it is published
# The shape of Kimi K2: a trillion parameters.
KIMI_K2_INT4: Config = {
    **DEEPSEEK_V3,
    **{"vocab_size": 163840, "num_attention_heads": 64, "num_key_value_heads": 64, "n_routed_experts": 384},
    **{"first_k_dense_replace": 1, "n_group": 1, "topk_group": 1},
    **_IN_INT4,
}
QWEN3_MOE_FP8: Config = {**QWEN3_MOE, "num_hidden_layers": 24, **_IN_FP8}
QWEN3_MOE_INT4: Config = {**QWEN3_MOE, "num_hidden_layers": 44, **_IN_INT4}


def tensors(config: Config) -> Tensors:
    """Yield every tensor of a published checkpoint of this configuration, in order: experts one by one."""
    hidden, vocabulary = config["hidden_size"], config["vocab_size"]
    attention = _mla if "kv_lora_rank" in config else _attention
    experts = config.get("num_experts") or config.get("n_routed_experts") or 0
    yield "model.embed_tokens.weight", [vocabulary, hidden]
    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}"
        yield from attention(f"{at}.self_attn", config)
        yield f"{at}.input_layernorm.weight", [hidden]
        yield f"{at}.post_attention_layernorm.weight", [hidden]
        if layer < config.get("first_k_dense_replace", 0) or not experts:
            yield from _mlp(f"{at}.mlp", hidden, config["intermediate_size"])
            continue
        small = config["moe_intermediate_size"]
        yield f"{at}.mlp.gate.weight", [experts, hidden]
        if "n_group" in config:
            yield f"{at}.mlp.gate.e_score_correction_bias", [experts]
            yield from _mlp(f"{at}.mlp.shared_experts", hidden, small * config["n_shared_experts"])
        for expert in range(experts):
            yield from _mlp(f"{at}.mlp.experts.{expert}", hidden, small)
    yield "model.norm.weight", [hidden]
    yield "lm_head.weight", [vocabulary, hidden]


def stored(config: Config) -> Iterator[tuple[str, str, list[int]]]:
    """Yield name, dtype and shape of every tensor as it is stored: quantized if the configuration says so."""
    method = config.get("quantization_config", {}).get("quant_method")
    for name, shape in tensors(config):
        matrix = len(shape) == 2 and ".layers." in name and not name.endswith("mlp.gate.weight")
        if name.endswith("e_score_correction_bias"):
            yield name, "F32", shape
        elif method == "fp8" and matrix:
            yield name, "F8_E4M3", shape
            yield f"{name}_scale_inv", "F32", [-(-size // 128) for size in shape]
        elif method == "compressed-tensors" and matrix and ".experts." in name:
            yield f"{name}_packed", "I32", [shape[0], shape[1] // 8]
            yield f"{name}_scale", "BF16", [shape[0], shape[1] // 32]
            yield f"{name}_shape", "I64", [2]
        else:
            yield name, "BF16", shape


_BYTES = {"F8_E4M3": 1, "BF16": 2, "F32": 4, "I32": 4, "I64": 8}


def _mlp(at: str, hidden: int, inner: int) -> Tensors:
    yield f"{at}.gate_proj.weight", [inner, hidden]
    yield f"{at}.up_proj.weight", [inner, hidden]
    yield f"{at}.down_proj.weight", [hidden, inner]


def _attention(at: str, config: Config) -> Tensors:
    hidden, size = config["hidden_size"], config["head_dim"]
    heads, shared = config["num_attention_heads"] * size, config["num_key_value_heads"] * size
    yield f"{at}.q_proj.weight", [heads, hidden]
    yield f"{at}.k_proj.weight", [shared, hidden]
    yield f"{at}.v_proj.weight", [shared, hidden]
    yield f"{at}.o_proj.weight", [hidden, heads]
    if config["model_type"] == "qwen3_moe":
        yield f"{at}.q_norm.weight", [size]
        yield f"{at}.k_norm.weight", [size]


def _mla(at: str, config: Config) -> Tensors:
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    q_rank, kv_rank, rope = config["q_lora_rank"], config["kv_lora_rank"], config["qk_rope_head_dim"]
    nope, value = config["qk_nope_head_dim"], config["v_head_dim"]
    yield f"{at}.q_a_proj.weight", [q_rank, hidden]
    yield f"{at}.q_a_layernorm.weight", [q_rank]
    yield f"{at}.q_b_proj.weight", [heads * (nope + rope), q_rank]
    yield f"{at}.kv_a_proj_with_mqa.weight", [kv_rank + rope, hidden]
    yield f"{at}.kv_a_layernorm.weight", [kv_rank]
    yield f"{at}.kv_b_proj.weight", [heads * (nope + value), kv_rank]
    yield f"{at}.o_proj.weight", [hidden, heads * value]


def write(folder: Path, config: Config, *, files: int = 4, filled: bool = False) -> tuple[int, int]:
    """Write a checkpoint of `files` files and an index, sparse unless `filled`. Returns its tensor count and bytes."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    listed = list(stored(config))
    share = -(-len(listed) // files)
    weight_map, total = {}, 0
    for number in range(files):
        name = f"model-{number + 1:05d}-of-{files:05d}.safetensors"
        entries, at = {}, 0
        for tensor, dtype, shape in listed[number * share : (number + 1) * share]:
            size = _BYTES[dtype] * math.prod(shape)
            entries[tensor] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + size]}
            weight_map[tensor], at = name, at + size
        header = json.dumps(entries).encode()
        with open(folder / name, "wb") as file:
            file.write(len(header).to_bytes(8, "little") + header)
            if filled:
                _fill(file, at)
            file.truncate(8 + len(header) + at)
        total += at
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return len(listed), total


def _fill(file: Any, size: int) -> None:
    """Write random bf16 numbers of either sign around 0.01: no model overflows on them."""
    block = bytearray(os.urandom(16 << 20))
    block[1::2] = block[1::2].translate(bytes(0x3C | sign & 0x80 for sign in range(256)))
    while size:
        size -= file.write(block[: min(size, len(block))])
