"""Outputs of one process on a checkpoint, and checkpoints with changed tensors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pico
import torch
from safetensors.torch import load_file, save_file

NEW_TOKENS = 6
IDS = torch.randint(3, 130, (2, 9), generator=torch.Generator().manual_seed(3))


def rewrite(folder: Path, change: Any) -> Path:
    """Change the tensors of a single-file checkpoint by `change(tensors)`, and return its folder."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def single(family: str, folder: Path, **options: Any) -> Path:
    return pico.save(family, folder, shard_bytes="1GB", **options)


def logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        return model(IDS).logits
