"""GPTQ: inputs packed into words, zero points packed along the outputs, and perhaps groups in an order of activity.

If `desc_act` is set, `g_idx` gives the group of each input, and a rank needs the scales of all groups. The first
version of the format stores a zero point less one. Source: the packing of AutoGPTQ and gptqmodel.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ..bundle import ONE, Follows, Role
from ..dequantise import Format, Metadata, Options, Part

METHODS = ("gptq",)


def _options(config: Mapping[str, Any], metadata: Metadata) -> Sequence[Options]:
    version = config.get("checkpoint_format") or config.get("format") or "gptq"
    if version not in ("gptq", "gptq_v2"):
        return []
    rules = config.get("dynamic") or {}
    changed = [rule for rule in rules.values() if isinstance(rule, dict)] if isinstance(rules, dict) else []
    found = []
    for one in ({}, *changed):
        told = {**config, **one}
        options = {
            "bits": told.get("bits", 4),
            "group": told.get("group_size", 128),
            "by_activity": bool(told.get("desc_act")),
            "zeros_less_one": version == "gptq",
        }
        if options not in found and options["bits"] in (2, 3, 4, 8):
            found.append(options)
    return found


def _roles(options: Options, size: tuple[int, int] | None) -> Sequence[Role]:
    bits, group = options["bits"], options["group"]
    grouped = Follows(1, group if group > 0 else ONE)
    if options["by_activity"] and group > 0 and size:
        grouped = Follows(1, ONE, width=-(-size[1] // group))
    unit, width = (32, 3) if bits == 3 else (32 // bits, 1)
    return (
        Role(".qweight", ("int32",), (Follows(1, unit, width), Follows(0))),
        Role(".qzeros", ("int32",), (grouped, Follows(0, unit, width))),
        Role(".scales", ("float16", "bfloat16", "float32"), (grouped, Follows(0))),
        Role(".g_idx", ("int32",), (Follows(1), Follows(0, ONE)), needed=options["by_activity"]),
    )


def _values(options: Options, parts: Mapping[str, Part]) -> torch.Tensor:
    bits, groups = options["bits"], parts.get(".g_idx")
    numbers = parts[".qweight"].unpacked(bits, 1)
    zeros, scales = parts[".qzeros"].unpacked(bits, 0), parts[".scales"].each()
    if options["by_activity"] and groups is not None and options["group"] > 0:
        chosen = groups.each().reshape(-1).long()
        if chosen.numel() and not 0 <= int(chosen.min()) <= int(chosen.max()) < scales.shape[1]:
            raise ValueError(f"g_idx names a group beyond the {scales.shape[1]} there are")
        zeros, scales = zeros[:, chosen], scales[:, chosen]
    elif groups is not None:
        _check_in_order(options["group"], groups)
    return (numbers - zeros - int(options["zeros_less_one"])).to(scales.dtype) * scales


def _check_in_order(group: int, groups: Part) -> None:
    found = groups.each().reshape(-1)
    elements = torch.arange(groups.start[1], groups.start[1] + groups.extent[1], device=found.device)
    if not torch.equal(found.long(), elements // group if group > 0 else elements * 0):
        raise ValueError("g_idx has groups in another order, and config.json says that they are in order")


FORMATS = (Format("gptq", ".weight", _options, _roles, _values),)
