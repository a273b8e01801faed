"""A conversion that is to be as an earlier one: new weights of the same model, cut in the same way."""

from __future__ import annotations

from pathlib import Path

from ...checkpoint.quantization import quantization_of
from ...checkpoint.source import model_config
from ...errors import BadInputError
from ...files.dtypes import torch_name
from ...resharded.as_source import source_headers
from ...resharded.manifest import Manifest, read_manifest, refuse_engine
from ...sharding.topology import Topology
from ...storage.locate import local_folder
from ...text import listed, printable
from ..values.change import AS_IT_IS, Change

__all__ = ["Pattern", "pattern_of"]


class Pattern:
    """How the folder of an earlier conversion was made: what `--tp-size` and the options beside it said then."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.folder, self.manifest = folder, manifest
        told = manifest.derived
        self.topology: Topology = manifest.topology
        self.drop_unused = bool(manifest.dropped)
        self.change: Change = AS_IT_IS
        self.dtype = manifest.dtype if _is_cast(manifest) else None
        if told:
            options = quantization_of(model_config(folder))
            self.change = Change(told["quantized"], options, told["experts"], told["dequantized"] is not None)
            self.dtype = told["dtype"]

    def check(self, draft: Manifest) -> None:
        """Raise BadInputError if a conversion is of another model than the earlier one."""
        before, now = (
            {target.name: (target.shape, target.dtype) for target in of.of_model} for of in (self.manifest, draft)
        )
        other = sorted(name for name in before.keys() | now.keys() if before.get(name) != now.get(name))
        if other or draft.architecture != self.manifest.architecture:
            words = f": {listed(other)}" if other else f": {printable(self.manifest.architecture)}"
            raise BadInputError(
                f"{printable(self.folder)}: is of another model, or was cast to another dtype{words}",
                hint="leave out --like, and give --tp-size",
            )


def _is_cast(manifest: Manifest) -> bool:
    """Whether a parameter has another dtype than the source tensors that it is made of."""
    stored = {info.name: info.dtype for header in source_headers(manifest).values() for info in header.tensors}
    return any(
        torch_name(stored[region.source], tensor=region.source) != target.dtype
        for target in manifest.parameters
        for region in target.regions
    )


def pattern_of(place: str | Path) -> Pattern:
    """Read the folder that a conversion is to be like. Raises a ReshardError if it is none of ours, or an engine's."""
    folder = local_folder(place)
    manifest = read_manifest(folder)
    refuse_engine(folder, manifest)
    return Pattern(folder, manifest)
