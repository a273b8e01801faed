"""The plan: the content of every rank file, and the regions it comes from. Frozen data, made from headers alone."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from ..checkpoint.companions import left_report
from ..checkpoint.source import Source
from ..errors import BadInputError, TopologyError
from ..files.dtypes import is_floating, widest
from ..process import BLOCK_BYTES, worker_count
from ..resharded.layout import FileLayout, file_layouts
from ..resharded.report import replicated_bytes, rows
from ..resharded.targets import Bundle, Target, partly_used
from ..sharding.placement import Placement, Replicate
from ..sharding.regions import Region
from ..sharding.topology import Topology
from ..strategies.registry import ALL_PARALLEL_STYLES, ParallelInterface
from ..text import listed, numbers_in_runs, printable
from ..transforms.bundle import member_placement
from .cuts import does_cut, groups_on, placement_of
from .loads import WEIGHTS_AND_CACHE, Serving, even_share, loads_of, repeated
from .model.model import Model, Parameter
from .remarks import dtypes_of, mixed_note, partly_note, quantized_note, replicated_note, runtime_only, why_whole
from .sizes import legal_sizes, refusal_of

__all__ = ["ReshardPlan", "build_plan", "plan_layouts"]


@dataclass(frozen=True, slots=True, repr=False)
class ReshardPlan:
    """Everything `convert` will do. `runtime_only` says why plain transformers cannot open the folder, if it cannot.

    `tied` parameters share the tensor of their owner. `duplicates` are source tensors equal to another that is stored.
    `unused` source tensors are kept apart, so that all can be given back: those that no parameter takes, and those that
    parameters take only a part of. `custom` maps the names of custom styles to their classes. `groups` are those of the
    manifest. `serving` is what the ranks keep beside their weights. `notes` are remarks for the user, one line each:
    `plan` and `convert` show them.
    """

    source: Source
    model: Model
    topology: Topology
    targets: tuple[Target, ...]
    tied: dict[str, str]
    duplicates: dict[str, str]
    unused: tuple[str, ...]
    dropped: tuple[str, ...]
    runtime_only: tuple[str, ...]
    custom: dict[str, str]
    groups: dict[str, tuple[int, ...]]
    strategies: ParallelInterface = field(compare=False)
    bundles: tuple[Bundle, ...] = ()
    serving: Serving = WEIGHTS_AND_CACHE
    notes: tuple[str, ...] = ()

    @property
    def world_size(self) -> int:
        return self.topology.world_size

    def to_dict(self) -> dict[str, Any]:
        """Return what `reshard plan --format json` prints: names, numbers, lists and dicts of them."""
        layouts, sizes = plan_layouts(self, filled=()), legal_sizes(self.model, strategies=self.strategies)
        loads = loads_of(self.model, self.strategies, self.topology, self.serving)
        heads = {parameter.name: parameter.heads.count for parameter in self.model.parameters if parameter.heads}
        return {
            "architecture": self.model.architecture,
            "dtype": self.model.dtype,
            "world_size": self.world_size,
            "mesh": self.topology.to_json(),
            "parameters": rows(self.targets, self.bundles, self.world_size, heads),
            "rank_bytes": [layout.size for layout in layouts[: self.world_size]],
            "ranks": [load.to_dict() for load in loads],
            "even_shares": round(max(load.weights for load in loads) / (even_share(self.model, len(loads)) or 1), 4),
            "serving": asdict(self.serving.of(self.model)),
            "replicated_bytes": replicated_bytes(self.targets),
            "disk_bytes": sum(layout.size for layout in layouts),
            "memory_bytes": worker_count() * BLOCK_BYTES,
            "tied": self.tied,
            "unused": list(self.unused),
            "dropped": list(self.dropped),
            "unused_rules": list(self.model.unused_rules),
            "corrected_rules": list(self.model.corrected_rules),
            "custom_strategies": self.custom,
            "runtime_only": list(self.runtime_only),
            "notes": [*self.notes, *repeated(loads, self.model), *quantized_note(self.bundles, loads)],
            "left_behind": left_report(self.source.left),
            "ep_sizes": list(range(2, min(self.model.experts, max(sizes)) + 1)),
            "tp_sizes": {str(size): why for size, why in sizes.items()},
        }

    def __repr__(self) -> str:
        of = f"{self.model.architecture} ({self.model.dtype})"
        return f"<ReshardPlan of {printable(of)} for {self.topology}: {len(self.targets)} parameters>"


def build_plan(
    source: Source,
    model: Model,
    topology: Topology,
    *,
    cast: bool = False,
    drop_unused: bool = False,
    strategies: ParallelInterface = ALL_PARALLEL_STYLES,
    equal: Callable[[str, str], bool] | None = None,
    serving: Serving = WEIGHTS_AND_CACHE,
) -> ReshardPlan:
    """Plan a checkpoint for the ranks of `topology`. Integers only; no tensor data is read, except by `equal`.

    `cast` stores every floating tensor in the dtype the model wants (`--dtype`). `equal` compares two source tensors
    that the model ties, if the checkpoint holds both; without it they are taken to be equal.

    Raises:
        TopologyError: the model does not allow this many ranks.
        BadInputError: an unknown style, a rule that cuts nothing, or parameters that the checkpoint lacks.
    """
    if model.missing:
        raise BadInputError(
            f"the checkpoint lacks {len(model.missing)} parameters of {model.architecture}: {listed(model.missing)}",
            hint="; ".join(model.notes) or None,
        )
    _check_styles(model, strategies)
    reason = refusal_of(model, strategies, topology)
    if reason:
        sizes = [size for size, why in legal_sizes(model, strategies=strategies).items() if why is None]
        raise TopologyError(
            f"{topology} do not fit {model.architecture}: {reason}",
            hint=f"legal sizes: {numbers_in_runs(sizes)}; with --plan general, any",
        )
    placements = {parameter.name: placement_of(parameter, strategies, topology) for parameter in model.parameters}
    regions, tied, duplicates, apart = _tie(model, placements, equal)
    targets: list[Target] = []
    bundles: list[Bundle] = []
    for parameter in model.parameters:
        placement = placements[parameter.name]
        if parameter.name in model.bundles and parameter.name in regions:
            bundle = _bundle(parameter, placement, model, topology)
            bundles.append(bundle)
            targets += _members(bundle, model, topology)
        elif parameter.name in regions:
            targets.append(_target(parameter, placement, regions[parameter.name], source, topology, cast))
    stored = [
        *(model.regions[name] for name in model.regions.keys() - model.bundles),
        *(h.regions for h in model.held.values()),
    ]
    partly = partly_used(source, (region for found in stored for region in found))
    return ReshardPlan(
        source,
        model,
        topology,
        tuple(targets),
        tied,
        duplicates,
        unused=(*(() if drop_unused else model.unused), *partly),
        dropped=model.unused if drop_unused else (),
        runtime_only=(*runtime_only(targets, tied, bundles, topology.world_size), *apart),
        custom=strategies.custom({*model.hooks.values(), *(p.style for p in model.parameters if p.style)}),
        groups=groups_on(model.parameters, placements, topology),
        strategies=strategies,
        bundles=tuple(bundles),
        serving=serving,
        notes=(
            *model.notes,
            *mixed_note(targets, source),
            *partly_note(partly),
            *replicated_note(targets, model, topology),
            *source.notes,
        ),
    )


def _check_styles(model: Model, strategies: ParallelInterface) -> None:
    """Raise BadInputError for an unknown style, or a user's rule that would cut a module without own parameters."""
    holders = {parameter.name.rpartition(".")[0] for parameter in model.parameters}
    for module, style in model.hooks.items():
        strategy = strategies.find(style)
        if module in model.manual and module not in holders and does_cut(strategy):
            raise BadInputError(
                f"the rule {printable(module)} → {printable(style)} cuts nothing: it has no parameters of its own",
                hint="name the modules inside it",
            )


def _target(
    parameter: Parameter,
    placement: Placement,
    regions: tuple[Region, ...],
    source: Source,
    topology: Topology,
    cast: bool,
) -> Target:
    dtypes = dtypes_of(regions, source)
    stored = widest(dtypes) if dtypes else parameter.dtype
    if stored is None:
        raise BadInputError(
            f"{printable(parameter.name)}: made of tensors of different dtypes ({', '.join(sorted(dtypes))})"
        )
    compute_dtype = None
    if is_floating(stored) and stored != parameter.dtype:
        stored, compute_dtype = (parameter.dtype, None) if cast else (stored, parameter.dtype)
    style = parameter.expert_style or parameter.style
    reason = why_whole(parameter.style, topology) if isinstance(placement, Replicate) else None
    return Target(parameter.name, parameter.shape, stored, placement, regions, style, compute_dtype, reason)


def _bundle(parameter: Parameter, placement: Placement, model: Model, topology: Topology) -> Bundle:
    style = parameter.expert_style or parameter.style
    reason = why_whole(parameter.style, topology) if isinstance(placement, Replicate) else None
    regions = model.regions[parameter.name]
    target = Target(parameter.name, parameter.shape, parameter.dtype, placement, regions, style, None, reason)
    return Bundle(target, model.bundles[parameter.name])


def _members(bundle: Bundle, model: Model, topology: Topology) -> Iterator[Target]:
    """Yield the tensors of a quantized parameter: each is cut as far as it follows the cut."""
    of, quantized = bundle.target, bundle.quantized
    for name, member in quantized.members.items():
        held = model.held[name]
        placement = member_placement(member, quantized.blocks, of.placement, of.shape, topology.world_size)
        reason = (of.reason or "all ranks need it") if isinstance(placement, Replicate) else None
        yield Target(name, held.shape, held.dtype, placement, held.regions, of.style, None, reason)


def _tie(
    model: Model, placements: Mapping[str, Placement], equal: Callable[[str, str], bool] | None
) -> tuple[dict[str, tuple[Region, ...]], dict[str, str], dict[str, str], tuple[str, ...]]:
    """Store a tied tensor once, under its owner. It stays apart if the checkpoint or the ranks hold it differently.

    transformers ties whichever way the checkpoint allows: if the owner is not there, all get the data of the first
    parameter there that is tied to it.
    """
    regions, tied, duplicates, apart = dict(model.regions), {}, {}, []
    for name, owner in model.tied.items():
        if not model.bundles.keys().isdisjoint((name, owner)):
            if name in regions or placements[name] != placements[owner]:
                raise BadInputError(f"{printable(name)}: is tied to {printable(owner)}, and quantized by itself")
            tied[name] = owner
            continue
        if owner not in regions:
            regions[owner] = next(regions[one] for one in model.tied if one in regions and model.tied[one] == owner)
        if name in regions and regions[name] != regions[owner]:
            one, other = regions[name], regions[owner]
            if len(one) != 1 or len(other) != 1 or (equal and not equal(one[0].source, other[0].source)):
                apart.append(f"{name} is tied to {owner}, but the checkpoint holds different values")
                continue
            duplicates[one[0].source] = other[0].source
        if placements[name] == placements[owner]:
            regions.pop(name, None)
            tied[name] = owner
        else:
            regions[name] = regions[owner]
    return regions, tied, duplicates, tuple(apart)


def plan_layouts(plan: ReshardPlan, *, filled: Container[int] | None = None) -> list[FileLayout]:
    """Lay out every file the plan writes: one for each rank, and one for the unused tensors if there are any.
    `filled` is as for `file_layouts`."""
    return file_layouts(plan.targets, plan.world_size, plan.source, plan.unused, filled=filled)
