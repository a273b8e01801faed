"""A model with few layers: two of each kind. What a trace of it shows holds for the others too."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from torch import nn

__all__ = ["Shortened", "shortened"]

_KEPT = 2  # layers of a kind


class Shortened:
    """Where the layers that are kept stand in the whole model, and which others are like them, by the layer's name."""

    def __init__(self) -> None:
        self._whole: dict[str, str] = {}
        self._alike: dict[str, list[str]] = {}

    def add(self, kept: str, whole: str, alike: list[str]) -> None:
        """Note a layer: its name among the kept ones, in the whole model, and those of the layers like it there."""
        self._whole[kept], self._alike[kept] = whole, alike

    def whole(self, name: str) -> str:
        """Return the name in the whole model of a module of the short one."""
        return self._moved(name, self._whole.get)

    def everywhere(self, styles: Mapping[str, str], shared: Collection[str]) -> dict[str, str]:
        """Return styles by name in the short model as styles of the whole model, with those of all layers alike. A
        layer gets all of them, or none if one is for a module that is among the `shared`."""
        by_layer: dict[str, dict[str, str]] = {}
        for name, style in styles.items():
            layer = self._layer(name)
            by_layer.setdefault(layer, {})[name[len(layer) :]] = style
        found: dict[str, str] = {}
        for layer, inside in by_layer.items():
            for other in self._alike[layer] if layer else [""]:
                names = {other + inner: style for inner, style in inside.items()}
                if not any(name in shared for name in names):
                    found |= names
        return found

    def _layer(self, name: str) -> str:
        parts = name.split(".")
        names = (".".join(parts[:end]) for end in range(1, len(parts) + 1))
        return next((one for one in names if one in self._whole), "")

    def _moved(self, name: str, find: Any) -> str:
        layer = self._layer(name)
        return find(layer) + name[len(layer) :] if layer else name


@contextlib.contextmanager
def shortened(model: nn.Module) -> Iterator[Shortened]:
    """Leave only two layers of each kind in the lists of a model, for the time being. Layers are of one kind if they
    are made of the same classes, with the same sizes and settings, whatever their number is."""
    found, kept = Shortened(), []
    try:
        for name, layers in list(_lists(model, "")):
            groups: dict[Any, list[str]] = {}
            for own, layer in layers.named_children():
                groups.setdefault(_kind(layer), []).append(own)
            stay = sorted((own for group in groups.values() for own in group[:_KEPT]), key=int)
            if len(stay) == len(layers):
                continue
            kept.append((layers, dict(layers._modules)))
            modules = [layers._modules[own] for own in stay]
            for number, own in enumerate(stay):
                group = next(group for group in groups.values() if own in group)
                alike = group[_KEPT - 1 :] if own in group[_KEPT - 1 :] else [own]
                found.add(f"{name}.{number}", f"{name}.{own}", [f"{name}.{other}" for other in alike])
            layers._modules.clear()
            layers._modules.update({str(number): module for number, module in enumerate(modules)})
        yield found
    finally:
        for layers, before in kept:
            layers._modules.clear()
            layers._modules.update(before)


def _lists(module: nn.Module, name: str) -> Iterator[tuple[str, nn.ModuleList]]:
    """Yield the lists of modules that are in no other."""
    for own, child in module.named_children():
        inner = f"{name}.{own}" if name else own
        if isinstance(child, nn.ModuleList):
            yield inner, child
        else:
            yield from _lists(child, inner)


def _kind(layer: nn.Module) -> Any:
    """Return what two layers of one kind have in common."""
    return tuple(
        (
            name,
            type(module),
            tuple((own, tuple(p.shape)) for own, p in module._parameters.items() if p is not None),
            tuple(
                (key, value)
                for key, value in sorted(vars(module).items())
                if type(value) in (bool, int, str, float) and "idx" not in key and "layer_id" not in key
            ),
        )
        for name, module in layer.named_modules()
    )
