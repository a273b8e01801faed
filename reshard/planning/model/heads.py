"""Attention heads along the cut dims of parameters: what must stay whole, and what is cut together."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ...sharding.dealing import HeadDeal, deal_heads
from ...strategies.registry import heads_in

__all__ = [
    "BIAS_TOO",
    "CUT_DIM",
    "FUSED",
    "KEYS",
    "VALUES",
    "Heads",
    "attentions",
    "heads_of",
    "is_query",
    "number_of",
    "query_of",
]

# Projections by name: of the query heads, perhaps fused with the others, and of the KV heads.
FUSED = ("query_key_value", "qkv_proj")
_QUERY = ("q_proj", "query", "q", "q_b_proj", "q_gate_proj", *FUSED)
KEYS, VALUES = ("k_proj", "key", "k"), ("v_proj", "value", "v")
# Names of the size of a head, and of the number of heads, in attention modules.
_HEAD_SIZES = ("head_dim", "attention_head_size", "key_value_proj_dim")
_COUNTS = ("mp_num", "num_heads", "num_attention_heads", "n_heads")  # codegen's heads stand in mp_num blocks

# Styles that leave each rank its own heads, and the dim of a weight that they cut.
CUT_DIM = {
    **dict.fromkeys(("colwise", "local_colwise", "conv1d_rowwise"), -2),
    **dict.fromkeys(("rowwise", "local_rowwise", "conv1d_colwise", "embedding_local_colwise"), -1),
}
BIAS_TOO = ("colwise", "local_colwise", "conv1d_colwise")  # the others keep a bias whole


@dataclass(frozen=True, slots=True)
class Heads:
    """The heads that a parameter's cut dim holds, of the module `attention`, which has `query` and `key_value` heads.

    `is_query` says of which kind the parameter's heads are. `shareable` says whether the attention can have fewer query
    heads for a KV head than the model's, so that ranks may share a KV head. `together` is the number of KV heads that
    stay together, if they can: those whose quantized elements share entries.
    """

    attention: str
    query: int
    key_value: int
    is_query: bool
    shareable: bool
    together: int = 1

    def dealt(self, ranks: int) -> HeadDeal:
        """Deal the heads to `ranks` ranks. Raises ValueError if there are fewer query heads than ranks."""
        return deal_heads(self.query, self.key_value, ranks, self.together)

    @property
    def count(self) -> int:
        return self.query if self.is_query else self.key_value


def heads_of(
    model: Any,
    styles: Mapping[str, str],
    shapes: Mapping[str, tuple[int, ...]],
    modules: Mapping[str, str] | None = None,
) -> dict[str, Heads]:
    """Find the heads of every parameter that an attention shares among its heads, by name. `modules` are the styles of
    modules: `heads[…]` tells the numbers of those in one.

    Any other attention is a module with a query projection whose style leaves each rank its own heads. All parameters
    in it that are cut so hold its heads: the KV projections the KV heads, any other (the output projection, gates,
    sinks) the query heads, if their number divides its size.
    """
    from ...checkpoint.architecture import KV_GROUPS

    found = {}
    for attention, projections in attentions(styles, shapes).items():
        sizes = {name: _cut_size(styles[name], shapes[name]) for name in projections}
        counts = _counts(model, attention, projections, sizes)
        if counts is None:
            continue
        shareable = hasattr(model.get_submodule(attention), KV_GROUPS)
        for name, projection in projections.items():
            heads = Heads(attention, *counts, is_query(projection), shareable)
            if sizes[name] % heads.count == 0:
                found[name] = heads
    return found | dict(_told(model, styles, modules))


def _told(model: Any, styles: Mapping[str, str], modules: Mapping[str, str] | None) -> Iterator[tuple[str, Heads]]:
    from ...checkpoint.architecture import KV_GROUPS

    for attention, style in (modules or {}).items():
        counted = heads_in(style)
        if counted is None:
            continue
        query, key_value, _ = counted
        shareable = hasattr(model.get_submodule(attention), KV_GROUPS)
        for name, own in styles.items():
            if name.startswith(f"{attention}.") and (own in CUT_DIM or "packed" in own):
                yield name, Heads(attention, query, key_value, is_query(_place(name)[1]), shareable)


def attentions(styles: Mapping[str, str], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, dict[str, str]]:
    """Return the modules that may be attentions: by name, the parameters in each that are cut so that each rank has its
    own heads, and the projection that each belongs to."""
    members: dict[str, dict[str, str]] = {}
    for name, style in styles.items():
        if style in CUT_DIM and len(shapes[name]) > (style not in BIAS_TOO):
            attention, projection = _place(name)
            members.setdefault(attention, {})[name] = projection
    return members


def query_of(projections: Iterable[str]) -> str | None:
    """Return the query projection among those of a module; None if there is none, so that it is no attention."""
    found = set(projections)
    return next((name for name in _QUERY if name in found), None)


def is_query(projection: str) -> bool:
    """Whether the heads of a projection are the query heads."""
    return projection not in (*KEYS, *VALUES)


def _cut_size(style: str, shape: tuple[int, ...]) -> int:
    return shape[CUT_DIM[style]] if len(shape) > 1 else shape[0]


def _place(name: str) -> tuple[str, str]:
    """Return the module that a parameter serves, and the parameter's name there: that of its projection, or its own."""
    module, _, own = name.rpartition(".")
    if own in ("weight", "bias"):
        # gemma4's vision projections wrap a linear layer.
        module, _, own = module.removesuffix(".linear").rpartition(".")
    return module, own


def _counts(
    model: Any, attention: str, projections: Mapping[str, str], sizes: Mapping[str, int]
) -> tuple[int, int] | None:
    """Return the number of query heads and of KV heads; None if there is no query projection, or no number fits."""
    from ...checkpoint.architecture import KV_GROUPS

    query = query_of(projections.values())
    if query is None:
        return None
    module, config = model.get_submodule(attention), model.config.get_text_config()
    rows = {projection: sizes[name] for name, projection in projections.items()}
    head_dim = next(filter(None, (number_of(module, name) for name in _HEAD_SIZES)), None)

    def viewed(projection: str | None) -> int | None:
        size = rows[projection] if projection else 0
        return size // head_dim if head_dim and size % head_dim == 0 else None

    key = next((name for name in (*KEYS, *VALUES) if name in rows), None)
    key_value = key and (viewed(key) or number_of(config, "num_key_value_heads"))
    groups = number_of(module, KV_GROUPS)
    candidates = (
        key_value and groups and key_value * groups,
        *(number_of(module, name) for name in _COUNTS),
        viewed(query) if query not in FUSED else None,
        number_of(config, "num_attention_heads"),
    )
    count = next((count for count in candidates if count and rows[query] % count == 0), None)
    if count is None or count % (key_value or count):
        return None
    return count, key_value or count


def number_of(module: Any, name: str) -> int | None:
    """Return a positive number that a module or a configuration has by that name; None if it has none."""
    found = getattr(module, name, None)
    return found if isinstance(found, int) and not isinstance(found, bool) and found > 0 else None
