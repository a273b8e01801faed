"""The choice of what computes with each quantized parameter: its library's own module, or a plain one."""

from __future__ import annotations

import contextlib
import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from reshard.checkpoint.quantization import COMPUTE
from reshard.errors import IntegrityError, UsageError, VersionError
from reshard.resharded.manifest import Manifest
from reshard.resharded.targets import Bundle, Target
from reshard.sharding.placement import local_shape
from reshard.strategies.base import note_outputs
from reshard.text import printable
from reshard.transforms.bundle import divides_entries, matrices

from .interface import Held, Place
from .libraries import BY_FORMAT, replace_modules
from .plain import plain_part

__all__ = ["AUTO", "DEQUANTISED", "OTHER_LIBRARIES", "Computation", "choose"]

AUTO, NATIVE, DEQUANTISED = COMPUTE

# Why no library's module is taken for a format, if it is one that transformers runs.
_DECOMPRESSED = "transformers decompresses it before it computes"
_FETCHED = "its kernels are code that transformers fetches from the Hub"
_NO_LIBRARY = {
    **dict.fromkeys(("compressed", "compressed_packed", "compressed_fp4"), _DECOMPRESSED),
    **dict.fromkeys(("fp8", "fbgemm_fp8", "mxfp4"), _FETCHED),
}
# Of a rank, if another one computes natively with other weights.
OTHER_LIBRARIES = VersionError(
    "computes with other quantized weights by their library",
    hint="install the same packages for all ranks, or give them all --compute dequantised",
)
_NAMES = "tensor_names"  # of a file, in torchao's metadata


@dataclass(slots=True)
class Computation:
    """The quantized parameters of a model: which of them their libraries compute with, and why not the others.

    `native` are their places by name; `reasons` say of each other one why it is dequantised. `tensors` are this rank's,
    of all bundles, by name: if any is native, they are kept, so that the model can be saved as it was.
    """

    manifest: Manifest
    rank: int
    device: torch.device
    native: dict[str, Place] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    _metadata: dict[str, str] = field(default_factory=dict)

    def seal(self) -> str:
        """Return what must be equal on all ranks: the names of what is native."""
        return " ".join(sorted(self.native))

    def replace(self, model: Any, told: Mapping[str, Any]) -> None:
        """Put the libraries' modules in their places. The model is on the meta device; `told` is the
        quantization_config of config.json."""
        replace_modules(model, {_module(name): place for name, place in self.native.items()}, told, self.device)

    def place_tensors(self, model: Any, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Fill the libraries' modules. Return the tensors of plain parameters by name, dequantised ones among them.

        Raises IntegrityError if a quantized tensor holds what makes no sense."""
        held = dict(tensors)
        bundles = self.manifest.bundles
        inside = {name for bundle in bundles for name in bundle.quantized.members}
        if self.native:
            self.tensors = {name: held[name].to(self.device) for name in inside}
        elif bundles and self.device.type != "cpu":
            # All are views of one allocation: what stays is copied out of it, so that the quantized bytes are freed.
            held = {name: tensor if name in inside else tensor.clone() for name, tensor in held.items()}
        for bundle in bundles:
            name = bundle.target.name
            members = {member: held.pop(member) for member in bundle.quantized.members}
            if name in self.native:
                self._fill(model, bundle)
            else:
                held[name] = plain_part(bundle, members, self.device, self.rank, self.manifest.world_size)
        return held

    def _fill(self, model: Any, bundle: Bundle) -> None:
        name = bundle.target.name
        module = model.get_submodule(_module(name))
        roles = {member.role: self.tensors[one] for one, member in bundle.quantized.members.items()}
        try:
            BY_FORMAT[bundle.quantized.format].fill(module, Held(self.native[name], roles))
            note_outputs(module, self.native[name].local[0])
        except (ValueError, TypeError, KeyError, IndexError, RuntimeError) as error:
            raise IntegrityError(f"{printable(name)}: cannot be computed with: {printable(error)}") from None

    def begin(self, model: Any, mesh: DeviceMesh) -> None:
        """Ready the libraries' modules for the first forward. `mesh` is over the ranks that the model is cut over."""
        for name, place in self.native.items():
            library, module = BY_FORMAT[place.quantized.format], model.get_submodule(_module(name))
            if mesh.size() > 1 and place.local[1] < place.size[1]:
                library.reduce(module, mesh)
            library.begin(module, model.dtype)

    def metadata(self) -> dict[str, str]:
        """Return the metadata of the source's files."""
        if not self._metadata:
            names: list[Any] = []
            for file in self.manifest.source_files:
                told = json.loads(file["header"]).get("__metadata__") or {}
                with contextlib.suppress(ValueError, TypeError):
                    names += json.loads(told.get(_NAMES, "[]"))
                self._metadata |= told
            self._metadata |= {_NAMES: json.dumps(names)} if names else {}
        return self._metadata

    def part(self, name: str) -> torch.Tensor:
        """Return this rank's part of a native parameter, dequantised."""
        bundle = next(one for one in self.manifest.bundles if one.target.name == name)
        return plain_part(bundle, self.tensors, self.device, self.rank, self.manifest.world_size)

    @property
    def stored(self) -> dict[str, Target]:
        """The tensors of the rank files that are kept, by name."""
        return {target.name: target for target in self.manifest.parameters if target.name in self.tensors}

    def report(self, model: Any) -> list[str]:
        """Say what computes with the quantized parameters, and what their weights take on this rank."""
        lines, counts, sizes = [], Counter[str](), Counter[str]()
        for name, place in self.native.items():
            library = BY_FORMAT[place.quantized.format]
            counts[library.name] += 1
            sizes[library.name] += sum(one.nbytes for one in library.tensors(model.get_submodule(_module(name))))
        for library_name, count in counts.items():
            words = f"{count} quantized parameters by {library_name}: {sizes[library_name] / 1e6:,.1f} MB on this rank"
            lines.append(f"compute: native, {words}")
        targets = {bundle.target.name: bundle.target for bundle in self.manifest.bundles}
        for name, reason in self.reasons.items():
            counts[reason] += 1
            sizes[reason] += _bytes(targets[name], self.rank, self.manifest)
        for reason in dict.fromkeys(self.reasons.values()):
            words = f"{counts[reason]} quantized parameters are plain ones in memory: {sizes[reason] / 1e6:,.1f} MB"
            lines.append(f"compute: dequantised, {words} on this rank; {reason}")
        return lines


def _module(name: str) -> str:
    return name.rpartition(".")[0]


def _bytes(target: Target, rank: int, manifest: Manifest) -> int:
    shape = local_shape(target.placement, target.shape, rank=rank, world_size=manifest.world_size)
    return torch.Size(shape).numel() * getattr(torch, target.dtype).itemsize


def choose(manifest: Manifest, model: nn.Module, device: torch.device, rank: int, asked: str) -> Computation:
    """Choose what computes with each quantized parameter of a folder. `model` is on the meta device, with plain
    modules. `asked` is `auto`, `native` or `dequantised`.

    The choice looks at the parts of all ranks, so it is the same on all that have the same libraries and devices.

    Raises UsageError if `native` is asked for, and is not possible for all of them.
    """
    found = Computation(manifest, rank, device)
    modules = dict(model.named_modules())
    missing: dict[int, str | None] = {}
    for bundle in manifest.bundles:
        target, quantized = bundle.target, bundle.quantized
        library = BY_FORMAT.get(quantized.format)
        reason: str | None = None
        if asked == DEQUANTISED:
            reason = "as asked for"
        elif library is None:
            reason = _NO_LIBRARY[quantized.format]
        else:
            reason = missing.setdefault(id(library), library.missing())
        if reason is None and library is not None:
            place = Place(target, target.regions[0].source, quantized, rank, manifest.world_size, found.metadata)
            reason = _unfit(place, modules.get(_module(target.name))) or library.refusal(place, device)
        if reason is None:
            found.native[target.name] = place
        else:
            found.reasons[target.name] = reason
    if asked == NATIVE and found.reasons:
        reason = next(iter(found.reasons.values()))
        names = [name for name, why in found.reasons.items() if why == reason]
        others = f" and {len(names) - 1} more" if len(names) > 1 else ""
        raise UsageError(
            f"{printable(names[0])}{others}: cannot be computed with natively: {reason}",
            hint="with --compute auto, such parameters are dequantised",
        )
    return found


def _unfit(place: Place, module: Any) -> str | None:
    """Say why no library's module can hold the parts of a parameter; None if it can."""
    if type(module) is not nn.Linear or not place.target.name.endswith(".weight"):
        return "it is not the weight of a linear layer"
    if place.target.shape != tuple(module.weight.shape):
        return "it has another shape"  # which is an error, where the model is filled
    if matrices(place.quantized.blocks) != 1:
        return "it is made of several quantized matrices"
    target, ranks = place.target, place.world_size
    if divides_entries(place.quantized, target.placement, ranks):
        return "its cut goes through scales or words"
    if any(0 in local_shape(target.placement, target.shape, rank=rank, world_size=ranks) for rank in range(ranks)):
        return "a rank has no part of it"
    return None
