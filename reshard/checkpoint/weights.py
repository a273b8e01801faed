"""The files of a checkpoint folder that hold its weights: found as transformers finds them, or as the user says."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import BadInputError, PolicyError, UsageError
from ..files.untrusted import check_plain_path, read_json, refuse_error_text, vetted_path
from ..text import listed, printable

__all__ = [
    "AS_FOUND",
    "INDEX_NAME",
    "INDEX_SUFFIX",
    "LINKED",
    "SINGLE_NAME",
    "Choice",
    "Weights",
    "adapter_in",
    "arguments_for",
    "chosen",
    "find_weights",
    "no_weights",
    "weights_named_by",
]

SINGLE_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
INDEX_SUFFIX = ".safetensors.index.json"
LINKED = "if that is meant, have such links followed: --links-into"

_SUFFIX = ".safetensors"
_INDEX_LIMIT = 32 << 20  # bytes, enough for 300,000 tensors
_PICKLES = re.compile(r".*\.(bin|pth|pt|ckpt)")
_VARIANT = re.compile(r"model\.(?:([\w-]+)\.safetensors|safetensors\.index\.([\w-]+)\.json)")
_PART = re.compile(r".*-\d+-of-\d+\.safetensors")
_OTHERS = re.compile(r"adapter_|consolidated")  # weights in files of these names are not in transformers' form
_ADAPTER = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")


@dataclass(frozen=True, slots=True)
class Choice:
    """The user's choice of weights: the subfolder, variant or file that is `named` (`--weights`), and the folders that
    links may lead `into` (`--links-into`)."""

    named: str | None = None
    into: tuple[Path, ...] = ()


AS_FOUND = Choice()


def chosen(named: str | None, into: Sequence[str | Path]) -> Choice:
    """Return the choice that options make. Raises UsageError for an empty name or a folder that does not exist,
    PolicyError for a path that leads out."""
    if named is not None:
        named = named.removeprefix("./").rstrip("/")
        if not named:
            raise UsageError("--weights: is empty", hint="give a subfolder, a variant such as fp16, or a file")
        check_plain_path(named, what="--weights")
    for folder in into:
        if not os.path.isdir(folder):
            raise UsageError(f"--links-into {printable(folder)}: no such folder")
    return Choice(named, tuple(map(Path, into)))


@dataclass(frozen=True, slots=True)
class Weights:
    """The files that hold a checkpoint's weights, by path in its folder. `places` is the file of each tensor as the
    `index` has it, empty without an index. `notes` are remarks for the user."""

    files: tuple[str, ...]
    index: str | None = None
    places: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class _Spot:
    """Paths at which weights can be: a `single` file, or the `index` of several, with paths relative to `folder`."""

    single: str | None
    index: str | None
    folder: str = ""


def weights_named_by(config: Mapping[str, Any]) -> str | None:
    """Return the file of weights, or the index, that `config.json` itself names. Raises BadInputError, PolicyError."""
    named = config.get("transformers_weights")
    if named is None:
        return None
    if not isinstance(named, str) or not named.endswith((_SUFFIX, INDEX_SUFFIX)):
        raise BadInputError(f"config.json: transformers_weights: {printable(named)} is not a safetensors file or index")
    check_plain_path(named, what="config.json: transformers_weights")
    return named


def _spots(choice: Choice, config: Mapping[str, Any]) -> tuple[_Spot, ...]:
    """List the spots to look at, in the order of preference."""
    named = weights_named_by(config) if choice.named is None else choice.named
    if named is None:
        return (_Spot(SINGLE_NAME, INDEX_NAME),)
    if named.endswith(INDEX_SUFFIX):
        return (_Spot(None, named),)
    if named.endswith(_SUFFIX):
        return (_Spot(named, None),)
    folder = _Spot(f"{named}/{SINGLE_NAME}", f"{named}/{INDEX_NAME}", f"{named}/")
    return folder, _Spot(f"model.{named}.safetensors", f"model.safetensors.index.{named}.json")


def find_weights(
    root: Path,
    config: Mapping[str, Any],
    there: Callable[[str], bool],
    *,
    choice: Choice = AS_FOUND,
    fetch: Callable[[str], object] = lambda _: None,
) -> Weights | None:
    """Find the files that transformers would load from the folder `root`: those that the user or `config.json` names,
    else `model.safetensors`, else those of the index. None if there is no file of these names.

    `there` tells whether the folder has a file of a path. `fetch` is called with the path of an index before it is
    read, and brings it into `root`.

    Raises:
        BadInputError: an index, or what is named, makes no sense.
        PolicyError: a path or a link leads out of the folder.
    """
    for spot in _spots(choice, config):
        single = spot.single if spot.single and there(spot.single) else None
        if spot.index and there(spot.index):
            fetch(spot.index)
            try:
                places = _read_index(root, spot.index, spot.folder, choice)
            except (BadInputError, PolicyError):
                if not single:
                    raise
                places = {}
            if not single or single in places.values():
                return Weights(tuple(sorted(set(places.values()))), spot.index, places)
            return Weights((single,), notes=(f"{single} is taken, as transformers does, and {spot.index} is not",))
        if single:
            return Weights((single,))
    return None


def arguments_for(root: Path, choice: Choice) -> dict[str, str]:
    """Return the arguments with which transformers' `from_pretrained` of the folder `root` loads the chosen weights:
    `subfolder` or `variant`, or the configuration's `transformers_weights`."""
    if choice.named is None:
        return {}
    if choice.named.endswith((_SUFFIX, INDEX_SUFFIX)):
        return {"transformers_weights": choice.named}
    return {"subfolder" if (root / choice.named).is_dir() else "variant": choice.named}


def _read_index(root: Path, name: str, folder: str, choice: Choice) -> dict[str, str]:
    """Read an index: the path of the file of each tensor."""
    path = vetted_path(root, name, what="index", into=choice.into, way_out=LINKED)
    index, shown = read_json(path, limit=_INDEX_LIMIT), printable(name)
    refuse_error_text(index, shown)
    places = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(places, dict) or not places:
        raise BadInputError(f"{shown}: has no weight_map")
    for tensor, file in places.items():
        if not isinstance(file, str):
            raise BadInputError(f"{shown}: file of {printable(tensor)} is not a name")
    for file in sorted(set(places.values())):
        if _PICKLES.fullmatch(file) or not file.endswith(_SUFFIX):
            raise BadInputError(f"{shown}: {printable(file)} is not a safetensors file")
        check_plain_path(file, what=shown)
    return {tensor: folder + file for tensor, file in places.items()}


def adapter_in(names: Collection[str]) -> str | None:
    """Return the file of these names that shows an adapter (LoRA and the like); None if there is none."""
    return next((name for name in _ADAPTER if name in names), None)


def no_weights(
    root: object, names: Collection[str], *, choice: Choice = AS_FOUND, base: object = None
) -> BadInputError:
    """Return the error for a folder with files of these paths and no weights: what it has, and what can be done.
    `base` is the model that an adapter in it is for."""
    what = f"no {SINGLE_NAME} and no {INDEX_NAME}"
    if choice.named is not None:
        what = f"no weights by the name of {printable(choice.named)}"
    for found, hint in _instead(sorted(names), base):
        return BadInputError(f"{printable(root)}: {what}, but {found}", hint=hint)
    return BadInputError(f"{printable(root)}: {what}")


def _instead(names: list[str], base: object) -> Iterator[tuple[str, str]]:
    """Yield what there is in place of weights, and what can be done; the likeliest first."""
    top = [name for name in names if "/" not in name]
    files = [name for name in top if name.endswith(_SUFFIX) and not _OTHERS.match(name)]
    parts = [name for name in files if _PART.fullmatch(name)]
    for name in top:
        if (variant := _VARIANT.fullmatch(name)) and name not in parts:
            yield printable(name), f"take that: --weights {printable(variant[1] or variant[2])}"
    if adapter := adapter_in(top):
        of = f" {printable(base)}" if base else ""
        yield (
            f"an adapter ({adapter}), which is no model by itself",
            f"merge it into its base model{of} and save that: PeftModel.merge_and_unload(), then save_pretrained",
        )
    if parts:
        yield f"{listed(parts)}: their index is missing", f"fetch {INDEX_NAME} too"
    if files:
        yield listed(files), f"take that: --weights {printable(files[0])}"
    for name in names:
        folder, _, last = name.rpartition("/")
        if folder and last in (SINGLE_NAME, INDEX_NAME):
            yield (
                printable(name),
                f"take that: --weights {printable(folder)}; or give that folder, if it has a config.json",
            )
    for name in top:
        if _PICKLES.fullmatch(name):
            yield (
                f"weights that are pickled ({printable(name)}), which are never opened",
                "load and save it once with transformers to get safetensors files",
            )
        if name.endswith(".gguf"):
            yield printable(name), "give the checkpoint that it was made from, in safetensors files"
