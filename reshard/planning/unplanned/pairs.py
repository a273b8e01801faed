"""Pairs of modules that a trace proposes: some that are cut by output features, and those where these features end."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import nn

from .marks import Stream
from .names import wildcard
from .trace import Producer, Trace

__all__ = ["Pair", "module_of", "pairs_of"]


@dataclass(slots=True)
class Pair:
    """Producers and consumers of one stream. `owner` is the module that holds all of them near a consumer, by consumer.
    `level` says which attributes are told the rank's numbers: none, those that count heads, those that count features
    too."""

    stream: Stream
    producers: dict[str, Producer]
    consumers: list[str]
    level: int = 0
    scaled: dict[str, list[str]] = field(default_factory=dict)  # module → attributes

    @property
    def heads(self) -> set[int]:
        return {made.layout.heads for made in self.producers.values() if made.layout.heads} or (
            {self.items} if self.items != self.features else set()
        )

    @property
    def items(self) -> int:
        return self.stream.root().items

    @property
    def features(self) -> int:
        return min(min(made.layout.blocks() or (0,)) for made in self.producers.values())

    @property
    def local(self) -> int:
        return max(1, self.items // 2)

    def part(self, size: int) -> int:
        return size // self.items * self.local

    def signature(self) -> frozenset[str]:
        return frozenset(map(wildcard, (*self.producers, *self.consumers)))


def pairs_of(trace: Trace) -> list[Pair]:
    """Return the streams that end in modules which can be cut by input features, in the order of the forward."""
    found: dict[int, Pair] = {}
    for name, made in trace.producers.items():
        root = made.stream.root()
        if root.why is None:
            found.setdefault(id(root), Pair(root, {}, [])).producers[name] = made
    for call in trace.calls:
        pair = found.get(id(call.mark.stream.root())) if call.mark and call.fits else None
        if pair and call.module not in pair.consumers:
            pair.consumers.append(call.module)
    taken: set[str] = set()
    kept = []
    for pair in found.values():
        whole = any(
            call.module in pair.consumers and not (call.mark and call.mark.stream.root() is pair.stream)
            for call in trace.calls
        )
        blocks = [made.layout.blocks() for made in pair.producers.values()]
        regular = all(sizes and all(size % pair.items == 0 for size in sizes) for sizes in blocks)
        mine = {*pair.producers, *pair.consumers}
        if pair.consumers and not whole and regular and pair.items > 1 and not mine & taken:
            taken |= mine
            kept.append(pair)
    return kept


def module_of(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    """Return the module of a producer; and, if it is a bare parameter, the module that holds it and its name there."""
    try:
        return model.get_submodule(name), ""
    except AttributeError:
        return model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]
