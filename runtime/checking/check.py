"""The comparison of a resharded model with the single-process model of its source."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from reshard.checkpoint.source import Source, model_config
from reshard.errors import IntegrityError, UsageError
from reshard.launch.asked import check_per_layer
from reshard.operations.reference import (
    ELSEWHERE,
    EXACT,
    HALF,
    NEW_TOKENS,
    STORED_ON,
    Reference,
    distance,
    fixed_ids,
    in_memory,
    inputs_of,
    largest,
    made_again,
    quality,
    read_reference,
    reference_of,
    unquantized_values,
    values_of,
)
from reshard.resharded.manifest import read_manifest
from reshard.storage.locate import resolve_source
from reshard.text import printable

from ..distributed.agreement import Deadline, from_first, spoken, words_of
from ..distributed.mesh import connect
from ..distributed.ranks import this_rank
from ..generation.generate import greedy
from ..model.quantized.single import computes_otherwise, quantizes_inputs
from .differences import Altered, Difference, Layers, altered_in, first_difference
from .single import Process
from .traces import record

__all__ = ["Parity", "Quality", "check"]


@dataclass(frozen=True, slots=True)
class Quality:
    """How far the quantized single process is from the unquantized one on the fixed tokens: the Kullback-Leibler
    divergence of the next token's probabilities in nats, mean and largest of all positions, and the part of positions
    at which the most probable token is the same."""

    divergence: float
    largest_divergence: float
    same_token: float


@dataclass(frozen=True, slots=True)
class Parity:
    """Errors of the sharded model against the single-process model, relative to the latter's largest value.

    The values are logits, or the last hidden state of a model without a head. `tolerance` is what rounding explains:
    in half precision, a few times the reference's own distance from fp32, also if a library computes so; if it
    quantizes activations, a few times what a little noise in them changes. `equal_tokens` is None if the model
    generates none; `tied_tokens` tells whether rounding explains that they differ. If layers were compared,
    `difference` is the first module that computes something else. If no module does, `unreached` are the parameters
    that differ from the source nevertheless. `quality` says what quantizing changed, if the folder was quantized when
    it was made.
    """

    max_abs: float
    max_rel: float
    tolerance: float
    equal_tokens: bool | None
    tied_tokens: bool = False
    difference: Difference | None = None
    unreached: tuple[Altered, ...] = ()
    quality: Quality | None = None

    @property
    def ok(self) -> bool:
        """Whether rounding explains the difference, of values and of tokens, and no parameter is known to be wrong."""
        explained = self.max_rel <= self.tolerance and (self.equal_tokens is not False or self.tied_tokens)
        return explained and not self.unreached

    def to_json(self) -> dict[str, Any]:
        """Return the fields for JSON, which cannot hold NaN and infinities: they become null."""
        return {**_numbers(asdict(self)), "ok": self.ok}


def _numbers(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _numbers(one) for key, one in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def check(model: Any, reference: str | None = None, *, revision: str | None = None, per_layer: bool = False) -> Parity:
    """Compare a forward on fixed token ids, and greedy decoding if the model can, with the single-process model.

    The single-process model is `from_pretrained(reference)`, in rank 0's memory. Without `reference`, its outputs are
    those stored when the folder was made. `per_layer` also looks for the first module whose output differs: this needs
    a `reference`, and memory on rank 0 for the outputs of all modules. Call it on every rank; all get the same result.

    Raises:
        UsageError: there is nothing to compare with; or the stored outputs are of dequantised weights, and a library
            that quantizes activations too computes with the quantized ones.
        ReshardError: rank 0 failed; raised on every rank.
    """
    single: _Single | None = None

    def prepare() -> dict[str, Any]:
        nonlocal single
        with in_memory(reference or model.name_or_path):
            single = _single(model, reference, revision, per_layer=per_layer)
        of = single.reference
        tokens = None if of.tokens is None else of.tokens.tolist()
        return {"ids": of.ids.tolist(), "tokens": tokens, "tolerance": of.tolerance}

    info = this_rank()
    # Not by a collective, which has a time limit: one process may need longer for a big model.
    told = from_first(connect(info, Deadline.after(0)), info, prepare)
    ids = torch.tensor(told["ids"], device=model.device)
    values = values_of(model, ids)
    equal, tied = _tokens(model, ids, told["tokens"], told["tolerance"])
    layers = single.layers if single else None
    difference = first_difference(model, record(model, inputs_of(model, ids)), layers) if per_layer else None
    unreached = altered_in(model, layers) if per_layer and difference is None else ()
    result: list[Any] = [None]
    if single is not None:
        try:
            apart = _apart(single.reference, values.cpu())
            cost = _quality(single.reference)
            result = [Parity(*apart, single.reference.tolerance, equal, tied, difference, unreached, cost)]
        except IntegrityError as error:
            result = [words_of(error)]
    dist.broadcast_object_list(result, src=0, device=model.device)
    if not isinstance(result[0], Parity):
        raise spoken(result[0])
    return result[0]


@dataclass(frozen=True, slots=True)
class _Single:
    """The single-process model's outputs, on rank 0."""

    reference: Reference
    layers: Layers | None


def _single(model: Any, place: str | None, revision: str | None, *, per_layer: bool) -> _Single:
    if place is None:
        check_per_layer(place, per_layer=per_layer)
        folder = Path(model.name_or_path)
        if computes_otherwise(model):
            how = "quantizes activations too" if quantizes_inputs(model) else "computes in half precision"
            raise UsageError(
                f"{printable(folder)}: its stored logits are of dequantised weights, and the library of its quantized"
                f" ones {how}",
                hint="give --reference SOURCE, or --compute dequantised",
            )
        reference = read_reference(folder, read_manifest(folder))
        _check_ids(model, folder, reference.ids)
        if model.device.type != STORED_ON:
            reference = replace(reference, tolerance=max(reference.tolerance, ELSEWHERE))
        return _Single(reference, None)
    source = resolve_source(place, revision=revision)
    derived = _derived(model, source)
    quantized = derived and derived.told["quantized"]
    unquantized = unquantized_values(source.root, model.dtype, model.device) if quantized else None
    process = Process(model, source.root, derived)
    single = process.model
    _check_same(model, single, place)
    ids = fixed_ids(model)
    inputs = inputs_of(single, ids)
    traced = record(single, inputs) if per_layer else {}
    again = partial(process.again, partial(values_of, ids=ids)) if process.rounds else None
    reference = replace(reference_of(single, ids, again), unquantized=unquantized)
    if not per_layer:
        return _Single(reference, None)
    exact = process.again(lambda one: record(one, inputs)) if process.rounds else None
    return _Single(reference, Layers(single, process.weights, traced, exact))


def _derived(model: Any, source: Source) -> Any:
    """Return the checkpoint that the folder's model was made of, if it was quantized or dequantised then."""
    manifest = model._reshard_manifest
    if not manifest.derived:
        return None
    return made_again(manifest, model_config(Path(model.name_or_path)), source).derived


def _quality(reference: Reference) -> Quality | None:
    if reference.unquantized is None or reference.unquantized.ndim != 3:
        return None
    return Quality(*quality(reference.unquantized, reference.values))


def _check_same(model: Any, single: Any, place: str) -> None:
    theirs = single.state_dict()
    for name, target in model._reshard_targets.items():
        same = name in model._reshard_quantized.native or (name in theirs and theirs[name].shape == target.shape)
        if type(single) is not type(model) or not same:
            raise IntegrityError(f"{printable(place)}: is of another shape or architecture, at {printable(name)}")


def _check_ids(model: Any, folder: Path, ids: torch.Tensor) -> None:
    size = model.config.get_text_config().vocab_size
    if int(ids.min()) < 0 or int(ids.max()) >= size:
        raise IntegrityError(f"{printable(folder)}: its reference logits are of tokens that the model does not have")


def _tokens(
    model: Any, ids: torch.Tensor, wanted: list[list[int]] | None, tolerance: float
) -> tuple[bool | None, bool]:
    """Whether the model's greedy tokens are the `wanted` ones, None if there are none to compare; and whether rounding
    explains a difference. A collective.

    Rounding explains one only if the tolerance is looser than EXACT. In half precision, it then explains any; in other
    dtypes, one where each row's first different token has a logit within twice the tolerance of the expected token's,
    since either logit may be off by the tolerance.
    """
    found = greedy(model, ids, NEW_TOKENS) if model.can_generate() else None
    if found is None or wanted is None:
        return None, False
    expected = torch.tensor(wanted, device=found.device)
    if torch.equal(found, expected):
        return True, False
    if tolerance <= EXACT or model.dtype in HALF:
        return False, tolerance > EXACT
    inputs = inputs_of(model, expected[:, :-1])
    if model.config.is_encoder_decoder:
        inputs["input_ids"] = ids
    with torch.inference_mode():
        logits = model(**inputs)[0].float()
    allowed = 2 * tolerance * largest(logits)
    length = min(found.shape[1], expected.shape[1])
    for row, other in enumerate(found[:, :length] != expected[:, :length]):
        for at in other.nonzero().flatten().tolist()[:1]:
            here = logits[row, at - 1]
            if not distance(here[found[row, at]], here[expected[row, at]])[0] <= allowed:
                return False, False
    return False, True


def _apart(reference: Reference, values: torch.Tensor) -> tuple[float, float]:
    """Return the largest absolute and relative errors. Raises IntegrityError if the outputs have other shapes."""
    expected = reference.values
    if values.ndim == 3:  # stored references have only the last positions
        values = values[:, -expected.shape[1] :]
    if values.shape != expected.shape:
        raise IntegrityError(f"outputs of shape {tuple(values.shape)}, where the reference has {tuple(expected.shape)}")
    return distance(values, expected)
