"""A pico model of every causal family of the installed transformers, without a table of families: numbers that make a
model big are made small wherever a configuration has them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

MODEL_TYPES = tuple(sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))
LARGEST = 3_000_000  # parameters of a model still called pico

_SMALL: dict[str, int] = {
    **{"vocab_size": 130, "hidden_size": 32, "intermediate_size": 48, "max_position_embeddings": 64},
    **{"num_hidden_layers": 2, "num_layers": 2, "n_layers": 2, "sliding_window": 16},
    **{"num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 8, "global_head_dim": 8},
    **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
    # experts
    **{"n_routed_experts": 4, "num_experts": 4, "num_local_experts": 4, "moe_num_experts": 4, "zero_expert_num": 2},
    **{"num_experts_per_tok": 2, "moe_k": 2, "moe_topk": 2, "n_group": 1, "topk_group": 1, "n_shared_experts": 1},
    **{"moe_intermediate_size": 24, "shared_expert_intermediate_size": 24, "expert_ffn_hidden_size": 24},
    **{"ffn_hidden_size": 48, "intermediate_size_mlp": 48, "first_k_dense_replace": 1},
    # compressed attention
    **{"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8},
    **{"index_n_heads": 2, "index_head_dim": 16, "index_topk": 8},
    # linear attention and state space
    **{"linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8},
    **{"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_d_state": 8, "mamba_chunk_size": 8},
    # embeddings of each layer's own
    **{"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 130, "num_kv_shared_layers": 0},
}
_KINDS = ("layer_types", "mlp_layer_types", "block_types", "layers_block_type")


def build(model_type: str) -> Any:
    """A random model of the family in fp32, or None where the family has no tp_plan.

    Raises whatever its configuration or class raises: not every family can be made small this way.
    """
    config = _config(model_type)
    names = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type]
    model_class = getattr(transformers, names if isinstance(names, str) else names[0])
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in model_class._from_config(config).parameters())
    if size > LARGEST:
        raise ValueError(f"{size} parameters")
    torch.manual_seed(0)
    model = model_class._from_config(config).eval()
    if not model.tp_plan:
        return None
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(noise * 0.2 if parameter.ndim > 1 else 1 + noise * 0.1)
        for module in model.modules():  # some families zero the pad row of whatever they load
            if isinstance(module, torch.nn.Embedding) and module.padding_idx is not None:
                module.weight[module.padding_idx] = 0
    return model


def _config(model_type: str) -> Any:
    config_class = transformers.CONFIG_MAPPING[model_type]
    config = config_class()
    text = config.get_text_config()
    has = text.to_dict()
    small = {name: value for name, value in _SMALL.items() if has.get(name) is not None or name.endswith("_token_id")}
    small = {name: value for name, value in small.items() if name in has}
    if "qk_rope_head_dim" in small:  # the head's size follows from its parts, and every head has its own key
        small.pop("head_dim", None)
        small["num_key_value_heads"] = small["num_attention_heads"]
    if text is config:
        config = text = config_class(**small)
    else:
        for name, value in small.items():
            setattr(text, name, value)
    _shorten(text)
    return config


def _shorten(config: Any) -> None:
    """As few layers as show every kind there is."""
    kinds = list(dict.fromkeys(getattr(config, "layer_types", None) or []))
    if kinds:
        config.num_hidden_layers = max(2, len(kinds))
    for name in _KINDS:
        kinds = list(dict.fromkeys(getattr(config, name, None) or []))
        if kinds:
            setattr(config, name, (kinds * config.num_hidden_layers)[: config.num_hidden_layers])


def save(model: Any, folder: Path) -> Path:
    """Write the model as a checkpoint of several files."""
    transformers.utils.logging.disable_progress_bar()
    model.save_pretrained(folder, max_shard_size="40KB")
    return folder
