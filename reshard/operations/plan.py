"""The plan of a checkpoint: which rank holds what, from its headers alone."""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..checkpoint.left_behind import refuse_keys
from ..checkpoint.weights import chosen
from ..errors import UsageError
from ..execution.origin import Origin, open_origin
from ..planning.loads import WEIGHTS_AND_CACHE, Serving
from ..planning.model.model import Model, read_model
from ..planning.model.rules import AUTO, GENERAL, noted_styles, read_rules
from ..planning.plan import ReshardPlan, build_plan, plan_layouts
from ..planning.remarks import announced
from ..planning.sizes import Size, size_table, smallest_fit
from ..process import patient_collector
from ..resharded.layout import FileLayout
from ..resharded.manifest import Manifest
from ..sharding.topology import Topology
from ..storage.prefetch import Arrivals
from ..storage.stores import as_text
from ..strategies.registry import ALL_PARALLEL_STYLES, ParallelInterface, as_strategies
from .arguments import checked
from .values.change import change_of, derived_origin

if TYPE_CHECKING:
    import torch

__all__ = ["filled", "plan", "plan_of", "sizes"]


@checked
@patient_collector()
def plan(
    source: str | Path,
    *,
    tp_size: int | None = None,
    gpu_memory: int | None = None,
    max_model_len: int | None = None,
    batch_size: int = 1,
    kv_dtype: str | torch.dtype | None = None,
    utilization: float = 0.9,
    ep_size: int = 1,
    tp_plan: Mapping[str, str] | str | Path = AUTO,
    strategies: ParallelInterface | str | Path = ALL_PARALLEL_STYLES,
    revision: str | None = None,
    dtype: str | torch.dtype | None = None,
    quantize: str | None = None,
    quantize_config: Mapping[str, Any] | str | Path | None = None,
    quantize_experts: bool = False,
    dequantize: bool = False,
    drop_unused: bool = False,
    weights: str | None = None,
    links_into: Sequence[str | Path] = (),
    include: Sequence[str] = (),
    say: Callable[[str], object] = lambda _: None,
) -> ReshardPlan:
    """Plan a checkpoint (folder, Hub id or URL) for `tp_size` ranks, from its headers alone.

    A resharded folder is planned as the checkpoint that it was made from, with the styles that it was cut by, unless
    `tp_plan` gives others or there is an expert axis. If the source is remote, only its small files and the headers are
    fetched.

    If `gpu_memory` (bytes) is given instead of `tp_size`, the plan is for the fewest ranks on which everything fits:
    weights, and a KV cache of `batch_size` sequences of `max_model_len` tokens in `kv_dtype`, in the part
    `utilization` of each GPU's memory. The defaults are the model's own longest sequence and dtype. `kv_dtype` is as
    `dtype`, or "fp8".

    `ep_size` spreads whole experts over that many ranks; it divides `tp_size`, or `tp_size` divides it. `tp_plan` is
    "auto" for the model's own rules and ours for what they leave out, "general" for the general plan, else rules
    (pattern → style), or the file that holds them. Rules with `"extends": "auto"` are added to these. `strategies`
    says what the styles mean: a Python file of yours that registers them, which is run, or what `load_strategies`
    returned. `dtype` (`torch.bfloat16`, "bfloat16" or "bf16", and so on for float16 and float32) stores every
    floating parameter in that dtype, except those the model keeps in fp32. `include` holds shell patterns, such as
    `assets/*`, of files beside the weights to take along though their kind is unknown. `say` is called with one line
    when the work begins; the remarks are the plan's `notes`.

    `quantize` ("nf4", "fp4", "int8" or "fp8") plans the checkpoint that transformers would make by loading it quantized
    and saving it. `quantize_config` has the options of its configuration, or is a JSON file of them; `quantize_experts`
    takes the experts of a mixture too where transformers does not. `dequantize` plans the values of a quantized
    checkpoint. Matrices are quantized in `dtype`, or dequantised to it, else in the model's own.

    The weights are found as transformers finds them, unless `weights` names them: a subfolder of the source, a variant
    (`fp16` for `model.fp16.safetensors`), a file of weights, or its index. `links_into` are folders that links among
    the weights may lead into; any other link out of the source is refused.

    Raises a `ReshardError`: a UsageError if an argument makes no sense.
    """
    if (tp_size is None) == (gpu_memory is None):
        raise UsageError(
            "give either the number of ranks (--tp-size) or what each can hold (--gpu-memory)",
            hint="--tp-size 2, or --gpu-memory 24GB",
        )
    say(announced(as_text(source), Topology(tp_size, ep_size) if tp_size else "the fewest ranks"))
    change = change_of(quantize, quantize_config, experts=quantize_experts, dequantize=dequantize)
    origin = open_origin(as_text(source), revision=revision, choice=chosen(weights, links_into), include=include)
    origin = derived_origin(origin, change, dtype=dtype, drop_unused=drop_unused)
    planned = plan_of(
        origin,
        Topology(tp_size or ep_size, ep_size),
        tp_plan=tp_plan,
        strategies=strategies,
        dtype=dtype,
        drop_unused=drop_unused,
        gpu_memory=gpu_memory,
        serving=Serving(max_model_len, batch_size, kv_dtype, utilization),
    )
    if origin.made:  # it may lack what a rank needs
        filled(planned, origin)
    return planned


@checked
@patient_collector()
def sizes(
    source: str | Path,
    *,
    max_model_len: int | None = None,
    batch_size: int = 1,
    kv_dtype: str | torch.dtype | None = None,
    ep_size: int = 1,
    tp_plan: Mapping[str, str] | str | Path = AUTO,
    strategies: ParallelInterface | str | Path = ALL_PARALLEL_STYLES,
    revision: str | None = None,
    dtype: str | torch.dtype | None = None,
    quantize: str | None = None,
    quantize_config: Mapping[str, Any] | str | Path | None = None,
    quantize_experts: bool = False,
    dequantize: bool = False,
    weights: str | None = None,
    links_into: Sequence[str | Path] = (),
    say: Callable[[str], object] = lambda _: None,
) -> tuple[Size, ...]:
    """Look at every legal number of ranks of a checkpoint, up to 64, from its headers alone.

    Each `Size` has the weights, heads and KV cache of its fullest rank. The arguments are those of `plan`.

    Raises a `ReshardError`.
    """
    say(announced(as_text(source), "any number of ranks"))
    change = change_of(quantize, quantize_config, experts=quantize_experts, dequantize=dequantize)
    origin = open_origin(as_text(source), revision=revision, choice=chosen(weights, links_into))
    origin = derived_origin(origin, change, dtype=dtype)
    strategies, model = _model(origin, tp_plan, strategies, dtype, experts=ep_size > 1)
    return size_table(model, strategies, ep=ep_size, serving=Serving(max_model_len, batch_size, kv_dtype))


def filled(planned: ReshardPlan, origin: Origin, ranks: Container[int] | None = None) -> list[FileLayout]:
    """Return the layouts of the files to write, filled from the files that are read: those of all ranks, or of some.

    Raises BadInputError if a resharded folder lacks what a rank needs.
    """
    layouts, made = plan_layouts(planned, filled=ranks), origin.made
    computed = origin.derived.computed if origin.derived else {}
    return [made.relocated(layout, computed=computed) for layout in layouts] if made else layouts


def plan_of(
    origin: Origin,
    topology: Topology,
    *,
    tp_plan: Mapping[str, str] | str | Path,
    strategies: ParallelInterface | str | Path,
    dtype: str | None,
    drop_unused: bool,
    gpu_memory: int | None = None,
    serving: Serving = WEIGHTS_AND_CACHE,
    like: Manifest | None = None,
    arrivals: Arrivals | None = None,
) -> ReshardPlan:
    """Return the plan of an origin for the ranks of `topology`, or for the fewest that fit `gpu_memory`. It has the
    styles of a manifest that it is to be `like`."""
    strategies, model = _model(origin, tp_plan, strategies, dtype, experts=topology.ep > 1, like=like)
    if gpu_memory is not None:
        topology = smallest_fit(model, strategies, ep=topology.ep, memory=gpu_memory, serving=serving)
    planned = build_plan(
        origin.source,
        model,
        topology,
        cast=dtype is not None,
        drop_unused=drop_unused,
        strategies=strategies,
        equal=origin.equal(arrivals),
        serving=serving,
    )
    return replace(planned, notes=(*origin.derived.notes, *planned.notes)) if origin.derived else planned


def _model(
    origin: Origin,
    tp_plan: Mapping[str, str] | str | Path,
    strategies: ParallelInterface | str | Path,
    dtype: str | None,
    *,
    experts: bool,
    like: Manifest | None = None,
) -> tuple[ParallelInterface, Model]:
    refuse_keys(origin.source.root)
    found = as_strategies(strategies)
    rules = tp_plan if tp_plan in (AUTO, GENERAL) or isinstance(tp_plan, Mapping) else read_rules(tp_plan)
    before = like or (origin.made.manifest if origin.made else None)
    travels = before is not None and rules == AUTO and not experts and before.topology.ep == 1
    noted = noted_styles(before) if before and travels else None
    return found, read_model(origin.source, dtype=dtype, tp_plan=rules, experts=experts, noted=noted)
