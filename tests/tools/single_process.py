"""Outputs of one process on a checkpoint, and checkpoints with changed tensors."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pico
import torch
from safetensors.torch import load_file, save_file

from reshard.files.header import read_header

NEW_TOKENS = 6
IDS = torch.randint(3, 130, (2, 9), generator=torch.Generator().manual_seed(3))


def rewrite(folder: Path, change: Any) -> Path:
    """Change the tensors of a single-file checkpoint by `change(tensors)`, and return its folder."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def in_file(rank: int, name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Path], object]:
    """Change a tensor of one rank file in place, as a bad disk or a bad tool would."""

    def damage(folder: Path) -> None:
        path = folder / f"shard-{rank + 1:05d}-model-00001-of-00001.safetensors"
        info = next(info for info in read_header(path, file=path.name).tensors if info.name == name)
        tensor = load_file(path)[name]
        altered = change(tensor).contiguous()
        assert altered.shape == tensor.shape
        assert not torch.equal(altered, tensor)
        with open(path, "r+b") as file:
            file.seek(info.start)
            file.write(altered.view(torch.uint8).numpy().tobytes())

    return damage


def single(family: str, folder: Path, **options: Any) -> Path:
    return pico.save(family, folder, shard_bytes="1GB", **options)


def logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        return model(IDS).logits
