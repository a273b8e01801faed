"""A Llama-shaped checkpoint of any size in a moment: headers and sparse files, no data written."""

from __future__ import annotations

import json
from pathlib import Path

import torch
import transformers


def sparse_llama(folder: Path, *, layers: int, files: int = 4) -> int:
    """A bf16 checkpoint with Llama-3.2-1B's layers (untied) in `files` files. Returns its bytes."""
    config = transformers.LlamaConfig(
        vocab_size=128256,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=64,
        dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
    )
    folder.mkdir(parents=True)
    config.save_pretrained(folder)
    with torch.device("meta"):
        shapes = {n: list(t.shape) for n, t in transformers.LlamaForCausalLM(config).state_dict().items()}
    names, weight_map, total = list(shapes), {}, 0
    for number in range(files):
        file = f"model-{number + 1:05d}-of-{files:05d}.safetensors"
        entries, at = {}, 0
        for name in names[number * len(names) // files : (number + 1) * len(names) // files]:
            size = 2 * torch.Size(shapes[name]).numel()
            entries[name] = {"dtype": "BF16", "shape": shapes[name], "data_offsets": [at, at + size]}
            weight_map[name], at = file, at + size
        header = json.dumps(entries).encode()
        with open(folder / file, "wb") as out:
            out.write(len(header).to_bytes(8, "little") + header)
            out.truncate(8 + len(header) + at)
        total += at
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return total
