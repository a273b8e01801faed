"""Compare a resharded model with the single-process model it was made from."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from reshard.errors import IntegrityError, ReshardError, UsageError, printable
from reshard.manifest import read_manifest
from reshard.places import resolve_source
from reshard.reference import (
    EXACT,
    HALF,
    NEW_TOKENS,
    Reference,
    fixed_ids,
    inputs_of,
    read_reference,
    reference_of,
    single_model,
    values_of,
)

from .agreement import spoken, words_of
from .differences import Difference, Layers, first_difference
from .generate import greedy
from .traces import record

__all__ = ["Parity", "check"]


@dataclass(frozen=True, slots=True)
class Parity:
    """What the sharded model computes against the single-process one. Relative errors are to its largest value.

    The values are logits, or the last hidden state of a model without a head. `tolerance` is what rounding explains:
    in half precision, a few times the reference's own distance from fp32. `equal_tokens` is None where the model
    generates none. `difference` is the first module that computes something else, where that was asked for.
    """

    max_abs: float
    max_rel: float
    tolerance: float
    equal_tokens: bool | None
    difference: Difference | None = None

    @property
    def ok(self) -> bool:
        """Whether rounding explains the difference. Tokens must be equal too, where the dtype is exact enough."""
        return self.max_rel <= self.tolerance and (self.equal_tokens is not False or self.tolerance > EXACT)

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "ok": self.ok}


def check(model: Any, reference: str | None = None, *, revision: str | None = None, per_layer: bool = False) -> Parity:
    """Forward, and greedy decoding where the model can, on fixed token ids, against the single-process model.

    That is `from_pretrained(reference)`, in rank 0's memory; without `reference`, what was stored of it when the folder
    was made. `per_layer` also looks for the first module whose output differs, which takes a `reference`, and on rank 0
    the outputs of all modules. Call it on every rank; all get the same result.

    Raises:
        UsageError: there is nothing to compare with.
        ReshardError: what stopped rank 0, on every rank.
    """
    single: _Single | None = None
    told: list[Any] = [None]
    if dist.get_rank() == 0:
        try:
            single = _single(model, reference, revision, per_layer=per_layer)
            told = [single.reference.ids]
        except ReshardError as error:
            told = [words_of(error)]
    dist.broadcast_object_list(told, src=0, device=model.device)
    if not isinstance(told[0], torch.Tensor):
        raise spoken(told[0])
    ids = told[0].to(model.device)
    values = values_of(model, ids)
    tokens = greedy(model, ids, NEW_TOKENS) if model.can_generate() else None
    difference = None
    if per_layer:
        ours = record(model, inputs_of(model, ids))
        difference = first_difference(model, ours, single.layers if single else None)
    result: list[Any] = [None]
    if single is not None:
        result = [_compare(single.reference, values.cpu(), tokens, difference)]
    dist.broadcast_object_list(result, src=0, device=model.device)
    return result[0]


@dataclass(frozen=True, slots=True)
class _Single:
    """What rank 0 knows of the single-process model."""

    reference: Reference
    layers: Layers | None


def _single(model: Any, place: str | None, revision: str | None, *, per_layer: bool) -> _Single:
    if place is None:
        if per_layer:
            raise UsageError(
                "layers are compared with those of the single-process model", hint="give its source: --reference SOURCE"
            )
        folder = Path(model.name_or_path)
        reference = read_reference(folder, read_manifest(folder))
        _check_ids(model, folder, reference.ids)
        return _Single(reference, None)
    root = resolve_source(place, revision=revision).root
    single = single_model(root, model.dtype, model.device)
    _check_same(model, single, place)
    ids = fixed_ids(model)
    traced = record(single, inputs_of(single, ids)) if per_layer else {}
    reference = reference_of(single, ids)
    if not per_layer:
        return _Single(reference, None)
    exact = record(single, inputs_of(single, ids)) if model.dtype in HALF else None
    return _Single(reference, Layers(single, traced, exact))


def _check_same(model: Any, single: Any, place: str) -> None:
    theirs = single.state_dict()
    for name, target in model._reshard_targets.items():
        if type(single) is not type(model) or name not in theirs or theirs[name].shape != target.shape:
            raise IntegrityError(f"{printable(place)}: is of another shape or architecture, at {printable(name)}")


def _check_ids(model: Any, folder: Path, ids: torch.Tensor) -> None:
    size = model.config.get_text_config().vocab_size
    if int(ids.min()) < 0 or int(ids.max()) >= size:
        raise IntegrityError(f"{printable(folder)}: its reference logits are of tokens that the model does not have")


def _compare(
    reference: Reference, values: torch.Tensor, tokens: torch.Tensor | None, difference: Difference | None
) -> Parity:
    expected = reference.values
    if values.ndim == 3:  # of stored ones there are only the last positions
        values = values[:, -expected.shape[1] :]
    if values.shape != expected.shape:
        raise IntegrityError(f"outputs of shape {tuple(values.shape)}, where the reference has {tuple(expected.shape)}")
    error, scale = (values - expected).abs().max().item(), expected.abs().max().item() or 1.0
    wanted = reference.tokens
    equal = None if tokens is None or wanted is None else torch.equal(tokens.cpu(), wanted)
    return Parity(error, error / scale, reference.tolerance, equal, difference)
