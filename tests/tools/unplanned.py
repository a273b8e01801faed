"""Models of families without a plan, and rules for them."""

from __future__ import annotations

from typing import Any

import torch
import transformers

_SIZES = {"vocab_size": 130, "num_hidden_layers": 2, "intermediate_size": 50, "hidden_size": 32}


_ATTENTION = ("encoder.block.*.layer.*.SelfAttention", "decoder.block.*.layer.*.SelfAttention")


_CROSS = "decoder.block.*.layer.*.EncDecAttention"


_T5_MLP = tuple(f"{stack}.block.*.layer.*.DenseReluDense" for stack in ("encoder", "decoder"))


# Families without a plan of their own: the class, the configuration, and a plan.
UNPLANNED: dict[str, tuple[str, dict[str, Any], dict[str, str]]] = {
    "bert": (
        "BertForMaskedLM",
        {**_SIZES, "num_attention_heads": 8, "max_position_embeddings": 64},
        {
            **dict.fromkeys((f"attention.self.{name}" for name in ("query", "key", "value")), "colwise"),
            **{"attention.output.dense": "rowwise", "intermediate.dense": "colwise"},
            **{"layer.*.output.dense": "rowwise", "word_embeddings": "rowwise"},
            "cls.predictions.decoder": "colwise_gather_output",
        },
    ),
    "gpt2": (
        "GPT2LMHeadModel",
        {"vocab_size": 130, "n_embd": 32, "n_layer": 2, "n_head": 8, "n_positions": 64, "eos_token_id": 2},
        {
            **{"attn.c_attn": "colwise_gather_output", "attn.c_proj": "rowwise_split_input"},
            **{"mlp.c_fc": "colwise", "mlp.c_proj": "rowwise", "wte": "rowwise", "wpe": "colwise"},
            "ln_f": "sequence_parallel",
        },
    ),
    "t5": (
        "T5ForConditionalGeneration",
        {
            **{"vocab_size": 130, "d_model": 32, "d_kv": 8, "d_ff": 50, "num_layers": 2, "num_decoder_layers": 2},
            **{"num_heads": 8, "decoder_start_token_id": 0},
        },
        {
            **{f"{attention}.{name}": "colwise" for attention in _ATTENTION for name in "qkv"},
            **{f"{attention}.o": "rowwise" for attention in _ATTENTION},
            **{f"{attention}.relative_attention_bias": "local_colwise" for attention in _ATTENTION},
            # This family counts its heads from the configuration, for a position bias of zeros.
            **{f"{_CROSS}.{name}": "colwise_gather_output" for name in "qkv"},
            f"{_CROSS}.o": "rowwise_split_input",
            **{f"{mlp}.wi": "colwise" for mlp in _T5_MLP},
            **{f"{mlp}.wo": "rowwise" for mlp in _T5_MLP},
            "shared": "rowwise",
        },
    ),
}


def unplanned(name: str) -> Any:
    """Build a random model of a family without a plan, with random biases and norms too."""
    kind, options, _ = UNPLANNED[name]
    model_class = getattr(transformers, kind)
    torch.manual_seed(0)
    model = model_class(model_class.config_class(**options)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape)
            parameter.copy_(noise * 0.2 if parameter.ndim > 1 else 1 + noise * 0.1)
    return model
