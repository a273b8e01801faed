"""The parameter that each tensor of a checkpoint is for: transformers' own renamings, and prefixes left by training."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Collection, Iterable
from typing import Any

from ..text import printable

__all__ = ["Naming", "prefix_mapping", "renamed_modules", "shared_prefix"]

_MOST_WORDS = 8  # of a prefix


class Naming:
    """transformers' renamings and conversions for a model on the meta device.

    All of `names` begin with `prefix`, and no name of the model does. It is taken off before anything else.
    """

    def __init__(self, model: Any, names: Collection[str]) -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming

        mapping = get_model_conversion_mapping(model)
        self._wanted = model.state_dict()
        self._base = model.base_model_prefix
        self._renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
        self._converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
        self.converters = {pattern: entry for entry in self._converters for pattern in entry.source_patterns}
        self.prefix = shared_prefix(names, self._is_known)

    def target(self, name: str) -> tuple[str | None, str | None]:
        """Return the parameter that a source tensor goes into, None if the model has none for it; and the pattern of
        the conversion that it takes part in."""
        return self._target(name.removeprefix(self.prefix))

    def _target(self, name: str) -> tuple[str | None, str | None]:
        from transformers.core_model_loading import rename_source_key

        target, pattern = rename_source_key(name, self._renamings, self._converters, self._base, self._wanted)
        if target not in self._wanted and name in self._wanted:
            target, pattern = rename_source_key(name, [], [], self._base, self._wanted)
        return (target, pattern) if target in self._wanted else (None, None)

    def _is_known(self, name: str) -> bool:
        return self._target(name)[0] is not None

    def notes(self, unused: Collection[str]) -> list[str]:
        """Return remarks on a prefix: it was taken off, or all `unused` names begin with it and the others do not."""
        if self.prefix:
            prefix = printable(self.prefix)
            return [f"all names of the checkpoint begin with {prefix}: taken off to find the model's parameters"]
        prefix = shared_prefix(unused, self._is_known)
        if not prefix:
            return []
        return [f"{len(unused)} names begin with {printable(prefix)}, which is taken off only where all do"]


def renamed_modules(model: Any, names: Iterable[str]) -> list[str]:
    """Return what transformers calls the modules that a checkpoint names: its renamings are written for weights."""
    from transformers.conversion_mapping import get_model_conversion_mapping

    found = []
    for name in names:
        renamed = f"{name}."
        for entry in get_model_conversion_mapping(model):
            renamed, _ = entry.rename_source_key(renamed)
        found.append(renamed.removesuffix("."))
    return found


def shared_prefix(names: Collection[str], is_known: Callable[[str], bool]) -> str:
    """Return the prefix that training left on all of `names`: `module.` (DataParallel), `_orig_mod.` (torch.compile),
    `base_model.model.` (PEFT), or several of them; "" if a name is known as it is, or no prefix makes one known.

    The prefix takes as many of the words that all names begin with as make the most names known.
    """
    if any(map(is_known, names)):
        return ""
    at_each_place = zip(*(name.split(".")[:-1][:_MOST_WORDS] for name in names))
    words = [found[0] for found in itertools.takewhile(lambda found: len(set(found)) == 1, at_each_place)]
    prefixes = ["".join(f"{word}." for word in words[:count]) for count in range(1, len(words) + 1)]
    known = {prefix: sum(is_known(name.removeprefix(prefix)) for name in names) for prefix in prefixes}
    best = max(known, key=lambda prefix: known[prefix], default="")
    return best if best and known[best] else ""


def prefix_mapping(prefix: str) -> dict[str, str] | None:
    """Return the `key_mapping` with which `from_pretrained` takes a prefix off, None for an empty prefix."""
    return {f"^{re.escape(prefix)}": ""} if prefix else None
