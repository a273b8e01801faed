"""Attention that counts its heads itself: it is told how many a rank has."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from .base import LocalLayer, noted_outputs
from .registry import KEY_VALUE

__all__ = ["HeadsParallel"]


class HeadsParallel(LocalLayer):
    """The module holds `query` query heads and `key_value` KV heads, dealt out to the ranks by the rules of the modules
    in it. Its attributes `told` (dotted names) count heads, or features of heads, and get this rank's numbers: those
    that begin with `kv:` by its KV heads, the others by its query heads.
    """

    def __init__(self, query: int = 1, key_value: int = 1, told: Sequence[str] = (), **layouts: Any) -> None:
        super().__init__(**layouts)
        self.query, self.key_value, self.told = query, key_value, tuple(told)

    def prepare_module_tp(self, module: nn.Module, device_mesh: DeviceMesh) -> Any:
        for told in self.told:
            of_keys = told.startswith("kv:")
            owner, _, name = told.removeprefix("kv:").rpartition(".")
            found = module.get_submodule(owner)
            mine, everyone = _share(module, of_keys)
            whole: int = getattr(found, name)
            assert whole * mine % everyone == 0, f"{told}: {whole} is no number of heads"
            setattr(found, name, whole * mine // everyone)
        return super().prepare_module_tp(module, device_mesh)


def _share(module: nn.Module, of_keys: bool) -> tuple[int, int]:
    """Return the output features that this rank has of a projection of query heads, or of KV heads, and all of them."""
    for name, projection in module.named_modules():
        everyone = getattr(projection, "out_features", None) or getattr(projection, "nf", None)
        weight: Any = projection.__dict__.get("weight")
        mine = noted_outputs(projection)
        if mine is None and weight is not None:
            mine = weight.shape[1 if hasattr(projection, "nf") else 0]
        if everyone is None or mine is None or (name.rpartition(".")[2] in KEY_VALUE) != of_keys:
            continue
        if mine != everyone:
            return mine, everyone
    return 1, 1
