"""Sources and local tensors for the tests of the executor."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from reshard.checkpoint.source import Source, open_source
from reshard.files.dtypes import NAMES
from reshard.resharded.targets import LocalTensor
from reshard.sharding.regions import whole


def make_source(folder: Path, *files: dict[str, torch.Tensor]) -> Source:
    """Make a checkpoint of one file, or of several files and their index."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text("{}")
    names = ["model.safetensors"] if len(files) == 1 else [f"model-{i}.safetensors" for i in range(len(files))]
    for name, tensors in zip(names, files):
        save_file(tensors, folder / name)
    if len(files) > 1:
        weight_map = {tensor: name for name, tensors in zip(names, files) for tensor in tensors}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return open_source(folder)


def taken_whole(source: Source, dtype: str | None = None) -> list[LocalTensor]:
    """Return a local tensor for each source tensor, uncut, and cast if `dtype` is given."""
    return [
        LocalTensor(name, info.shape, dtype or NAMES[info.dtype], (0,) * len(info.shape), whole(name, info.shape))
        for name, info in source.tensors.items()
    ]


def load(path: Path) -> dict[str, torch.Tensor]:
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def simple_job(tmp_path: Path, *, count: int = 20, files: int = 1) -> tuple[Source, list[LocalTensor]]:
    groups = [{f"{f}.{i}": torch.randn(9, 7) for i in range(count)} for f in range(files)]
    source = make_source(tmp_path / "source", *groups)
    return source, taken_whole(source)
