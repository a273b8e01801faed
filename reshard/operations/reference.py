"""Reference logits: what the single-process model computes on a few fixed tokens, to compare a sharded model with.

If they are stored in a resharded folder, it is compared without its source.
"""

from __future__ import annotations

import contextlib
import errno
import inspect
from collections.abc import Callable, Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..checkpoint.architecture import decoding_as_told, model_class, on_meta, quiet_transformers
from ..checkpoint.naming import Naming, prefix_mapping
from ..checkpoint.quantization import quantization_of
from ..checkpoint.source import is_resharded, open_source
from ..checkpoint.weights import AS_FOUND, Choice, arguments_for
from ..errors import BadInputError, IntegrityError, TopologyError, UsageError
from ..files.digest import digest_file, digest_of
from ..files.system import by_errno
from ..resharded.derived import Derived
from ..resharded.manifest import REFERENCE_NAME, Manifest, reference_record
from ..resharded.rank_file import FileRecord, written_file
from ..storage.disk import write_file
from ..storage.locate import fetch
from ..text import printable
from .values.change import made_again
from .values.in_memory import dequantised_tensors

__all__ = [
    "ELSEWHERE",
    "EXACT",
    "HALF",
    "NEW_TOKENS",
    "STORED_ON",
    "Reference",
    "distance",
    "fetch_whole",
    "fixed_ids",
    "in_memory",
    "inputs_of",
    "largest",
    "made_again",
    "quality",
    "read_reference",
    "reference_of",
    "rounding",
    "single_model",
    "store_reference",
    "unquantized_values",
    "values_of",
]

EXACT = 1e-5  # largest relative error in fp32: sums are split over the ranks and added in another order
ELSEWHERE = 1e-4  # the same between kinds of devices, whose kernels add in different orders
STORED_ON = "cpu"  # kind of device that stored logits are made on
HALF = (torch.float16, torch.bfloat16)
_ROUNDING = 3  # times the error of one process that computes in half precision
NEW_TOKENS = 16
_ROWS, _LENGTH = 2, 16
_KEPT = 4  # positions stored, the last ones: they depend on all before them


@dataclass(frozen=True, slots=True)
class Reference:
    """Token ids `[rows, length]`, and what one process computes from them.

    `values` are fp32 logits `[rows, positions, vocabulary]`, of the last positions if they were stored, or the last
    hidden state of a model without a head. `tokens` are the ids continued greedily, None if the model generates none.
    `tolerance` is the relative error that rounding explains: in half precision, a few times the model's own distance
    from fp32. If the checkpoint was quantized here, `unquantized` are the values of what it was made of.
    """

    ids: torch.Tensor
    values: torch.Tensor
    tokens: torch.Tensor | None
    tolerance: float
    unquantized: torch.Tensor | None = None


def fetch_whole(place: str, *, revision: str | None = None, choice: Choice = AS_FOUND) -> tuple[Path, str | None]:
    """Return the folder of a checkpoint with all its files, and the revision to read it at.

    Remote files are fetched into the cache. Raises UsageError for a resharded folder, which one process cannot run.
    """
    root, _, commit = fetch(place, revision=revision, choice=choice)
    if is_resharded(root):
        raise UsageError(
            f"{printable(place)}: is resharded; reference logits are those of the checkpoint it was made from",
            hint="a resharded folder that has reference logits hands them on",
        )
    return root, commit or revision


@contextlib.contextmanager
def in_memory(place: object) -> Iterator[None]:
    """A context for work with the single-process model of `place`. Raises TopologyError if memory runs out in it."""
    try:
        yield
    except (MemoryError, OSError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
        raise TopologyError(
            f"{printable(place)}: the model and what it computes do not fit into the memory of one process:"
            f" {printable(str(error).partition(chr(10))[0] or type(error).__name__)}",
            hint="reshard verify OUT --against SOURCE compares all bytes without running the model",
        ) from None


def _is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out. The error of torch's CPU allocator has a message of its own, but no class."""
    return (
        isinstance(error, (MemoryError, torch.OutOfMemoryError))
        or getattr(error, "errno", None) == errno.ENOMEM
        or (isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error))
    )


def single_model(
    root: Path,
    dtype: torch.dtype,
    device: torch.device | str = STORED_ON,
    *,
    choice: Choice = AS_FOUND,
    derived: Derived | None = None,
) -> Any:
    """Load the checkpoint in `root` with transformers in one process: the whole model is in memory. A quantized one is
    dequantised by this package, as its ranks do. If one is `derived` from that in `root`, it is loaded instead.

    Raises BadInputError if it cannot be loaded. If memory runs out, the error is torch's own (see `in_memory`).
    """
    family, config = model_class(root)
    source = derived.source if derived else open_source(root, choice=choice)
    empty = on_meta(family, deepcopy(config), dtype="float32")
    prefix = Naming(empty, source.tensors).prefix
    where: dict[str, Any] = dict(arguments_for(root, choice))
    if "transformers_weights" in where:
        config.transformers_weights = where.pop("transformers_weights")
    options = {"config": config, "dtype": dtype, "use_safetensors": True, "key_mapping": prefix_mapping(prefix)}
    loader: Any = family
    place: Path | None = root
    if derived or quantization_of(source.config) is not None:
        place, where = None, {"state_dict": dequantised_tensors(source, empty, dtype, derived=derived)}
    try:
        with quiet_transformers():
            return loader.from_pretrained(place, **options, **where).to(device).eval()
    except (OSError, ValueError, RuntimeError) as error:
        if _is_out_of_memory(error):
            raise
        words = f"{printable(root)}: transformers cannot load it: {printable(error)}"
        raise by_errno(error, words, BadInputError) from None


def fixed_ids(model: Any) -> torch.Tensor:
    """Return token ids, the same for every model of this vocabulary size. Raises BadInputError if it takes none."""
    if "input_ids" not in inspect.signature(model.forward).parameters:
        raise BadInputError(f"{type(model).__name__} takes no token ids: there is nothing fixed to run it on")
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, model.config.get_text_config().vocab_size, (_ROWS, _LENGTH), generator=generator)


def inputs_of(model: Any, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return the keyword arguments of a forward on token ids. An encoder-decoder's decoder gets the same ids."""
    ids = ids.to(model.device)
    return {"input_ids": ids, "decoder_input_ids": ids} if model.config.is_encoder_decoder else {"input_ids": ids}


def values_of(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """Return the model's output in fp32: logits, or hidden states if it has no head."""
    with torch.inference_mode():
        return model(**inputs_of(model, ids))[0].float()


def reference_of(single: Any, ids: torch.Tensor, again: Callable[[], torch.Tensor] | None = None) -> Reference:
    """Run the single-process model. `again` returns its values from another run, which differs by rounding: by default,
    a model in half precision is then cast to fp32.

    Raises BadInputError if transformers cannot decode as the model's generation_config.json says.
    """
    values, tokens = values_of(single, ids), None
    if single.can_generate():
        options = {"max_new_tokens": NEW_TOKENS, "do_sample": False}
        inputs = ids.to(single.device)
        with torch.inference_mode(), decoding_as_told(single):
            tokens = single.generate(inputs, attention_mask=torch.ones_like(inputs), **options).cpu()
    tolerance = EXACT
    if again or single.dtype in HALF:
        tolerance = rounding(values, again() if again else values_of(single.float(), ids))
    return Reference(ids, values.cpu(), tokens, tolerance)


def distance(values: torch.Tensor, expected: torch.Tensor) -> tuple[float, float]:
    """Return the largest absolute difference of tensors of one shape, and its ratio to the largest number expected.

    A NaN is no difference if NaN is expected, nor an infinity if the same one is. Any other NaN makes both results NaN.
    """
    values, expected = values.float(), expected.float()
    same = (values == expected) | (values.isnan() & expected.isnan())
    apart = (values - expected).abs().masked_fill(same, 0).flatten()
    most = apart.max().item() if apart.numel() else 0.0
    return most, most / (largest(expected) or 1.0)


def largest(values: torch.Tensor) -> float:
    """Return the largest absolute value of the finite elements, or 0 if there are none."""
    numbers = values[values.isfinite()].abs()
    return numbers.max().item() if numbers.numel() else 0.0


def rounding(values: torch.Tensor, exact: torch.Tensor) -> float:
    """Return the relative error allowed to another run in half precision, from one such run and one in fp32.

    An overflow is no rounding error, so only elements that are finite in both runs are compared.
    """
    both = values.isfinite() & exact.isfinite()
    return max(EXACT, _ROUNDING * distance(exact[both], values[both])[1])


def unquantized_values(
    root: Path, dtype: torch.dtype, device: torch.device | str = STORED_ON, *, choice: Choice = AS_FOUND
) -> torch.Tensor:
    """Return what the checkpoint in `root` computes from the fixed tokens (as `values_of`), before another is derived
    from it. Its model is in memory until then."""
    plain = single_model(root, dtype, device, choice=choice)
    return values_of(plain, fixed_ids(plain)).cpu()


def quality(unquantized: torch.Tensor, quantized: torch.Tensor) -> tuple[float, float, float]:
    """Return how far quantized logits [rows, positions, vocabulary] are from those before: the Kullback-Leibler
    divergence of the next token's probabilities in nats, mean and largest of all positions, and the part of positions
    at which the most probable token is the same."""
    before, after = (values.double().log_softmax(-1) for values in (unquantized, quantized))
    apart = (before.exp() * (before - after)).sum(-1)
    same = before.argmax(-1) == after.argmax(-1)
    return apart.mean().item(), apart.max().item(), same.double().mean().item()


def store_reference(
    root: Path,
    folder: Path,
    dtype: str,
    *,
    choice: Choice = AS_FOUND,
    sync: bool = True,
    derived: Derived | None = None,
) -> FileRecord:
    """Run the checkpoint in `root` in one process, and write what it computes into `folder`. If one is `derived` from
    it, that is run, and the values of the checkpoint itself are written too.

    Memory is that of the model, in fp32 if `dtype` (a torch name) is half precision. The file holds the values of the
    last positions only: 4 MB for a vocabulary of 128,000 tokens.

    Raises:
        BadInputError: transformers cannot load it.
        TopologyError: it does not fit into memory.
    """
    from safetensors.torch import save

    with in_memory(root):
        quantized = derived and derived.told["quantized"]
        unquantized = unquantized_values(root, getattr(torch, dtype), choice=choice) if quantized else None
        single = single_model(root, getattr(torch, dtype), choice=choice, derived=derived)
        reference = reference_of(single, fixed_ids(single))
    values = _last(reference.values)
    tensors = {
        "ids": reference.ids,
        "values": values,
        "tolerance": torch.tensor(reference.tolerance, dtype=torch.float64),
    }
    if reference.tokens is not None:
        tensors["tokens"] = reference.tokens
    if unquantized is not None:
        tensors["unquantized"] = _last(unquantized)
    data = save(tensors, metadata={"format": "pt"})
    write_file(folder / REFERENCE_NAME, data, sync=sync)
    return FileRecord(REFERENCE_NAME, len(data), digest_of(data), {})


def _last(values: torch.Tensor) -> torch.Tensor:
    return values[:, -_KEPT:].contiguous() if values.ndim == 3 else values


def read_reference(folder: Path, manifest: Manifest) -> Reference:
    """Read the reference logits that were stored when the folder was made.

    Raises:
        UsageError: none were stored.
        IntegrityError: the file is not the one that was written.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    record = reference_record(folder, manifest)
    path = written_file(folder, record)
    if digest_file(path) != record.digest:
        raise IntegrityError(f"{printable(path)}: its content was altered")
    try:
        return _reference(load_file(path))
    except (SafetensorError, KeyError, ValueError, RuntimeError) as error:
        raise IntegrityError(f"{printable(path)}: not reference logits ({printable(error)})") from None


def _reference(tensors: Mapping[str, torch.Tensor]) -> Reference:
    ids, values, tokens = tensors["ids"], tensors["values"], tensors.get("tokens")
    if ids.ndim != 2 or ids.dtype != torch.int64 or values.dtype != torch.float32 or len(values) != len(ids):
        raise ValueError("ids and values do not fit together")
    unquantized = tensors.get("unquantized")
    if unquantized is not None and (unquantized.dtype != values.dtype or unquantized.shape != values.shape):
        raise ValueError("the values before and after quantizing do not fit together")
    return Reference(ids, values, tokens, float(tensors["tolerance"]), unquantized)
