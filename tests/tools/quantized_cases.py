"""The quantized checkpoints that tests and the table run: each format on dense models and on experts."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pico
from quantizing import KINDS, TORCHAO, quantize_by_torchao, quantize_folder

_HEADS = {"num_attention_heads": 6, "num_key_value_heads": 3}
_EXPERTS = {**_HEADS, "num_experts": 4, "moe_intermediate_size": 48, "intermediate_size": 96}
# name → family and options. Even: rows are whole blocks of every format. Ragged: 4 1/2 blocks of fp8, 1 1/8 of nf4.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "even": ("qwen2", {**_HEADS, "hidden_size": 192, "intermediate_size": 320}),
    "ragged": ("llama", {**_HEADS, "hidden_size": 72, "head_dim": 16, "intermediate_size": 104}),
    "experts": ("qwen3_moe", {**_EXPERTS, "hidden_size": 64, "head_dim": 16}),
}
_IN_BLOCKS = ("ct_nvfp4", "mxfp8", "modelopt_nvfp4")  # the library quantizes whole blocks only


def is_run(kind: str) -> bool:
    """Whether transformers has code for a kind, so that the model can be run: modelopt's is for other engines."""
    return not kind.startswith("modelopt")


EVERY = [(name, kind) for name in MODELS for kind in KINDS if not (name == "ragged" and kind in _IN_BLOCKS)]

# What the table has beside EVERY: a row that is not quantized for each model, torchao's kinds, and gpt-oss.
PLAIN, _BY_TORCHAO = "none", "torchao_"
_OF_TABLE: dict[str, tuple[str, dict[str, Any]]] = {
    **MODELS,
    "gpt_oss": ("gpt_oss", {"hidden_size": 64, "intermediate_size": 96, "head_dim": 8, "num_local_experts": 4}),
}
OF_TABLE = [
    *((name, PLAIN) for name in _OF_TABLE),
    *EVERY,
    *((name, _BY_TORCHAO + kind) for name in MODELS for kind in TORCHAO if (name, kind) != ("ragged", "intx")),
    ("gpt_oss", "mxfp4"),
]


def plain(name: str, folder: Path) -> Path:
    """Write the checkpoint of a model of the table, before it is quantized: with 2 KV heads, because transformers' own
    tensor parallelism deals them evenly."""
    family, options = _OF_TABLE[name]
    return pico.save(family, folder, **{**options, "num_attention_heads": 6, "num_key_value_heads": 2})


def quantized(plain: Path, folder: Path, kind: str) -> Path:
    """Write the checkpoint in `plain` into `folder`, quantized as a kind of the table."""
    if kind == PLAIN:
        return shutil.copytree(plain, folder)
    if kind.startswith(_BY_TORCHAO):
        return quantize_by_torchao(plain, folder, kind.removeprefix(_BY_TORCHAO))
    return quantize_folder(plain, folder, kind)
