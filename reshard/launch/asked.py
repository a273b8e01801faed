"""Checks before a rank starts: options that contradict each other, folders and files."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..checkpoint.source import open_source
from ..errors import UsageError
from ..resharded.manifest import Manifest, reference_record, refuse_engine
from ..resharded.rank_file import written_file
from ..storage.locate import find_resharded, locate
from ..text import printable
from .prompts import STDIN, prompt_lines

__all__ = [
    "check_attention_takes",
    "check_generation",
    "check_model_options",
    "check_per_layer",
    "look_at_folder",
    "look_at_prompts",
    "look_at_reference",
]


def check_generation(options: Mapping[str, Any]) -> None:
    """Raise UsageError if options of `generate` (its parameters, by name) contradict each other."""
    if not (options["chat"] or options["prompts"] or options["file"]):
        raise UsageError("there is nothing to continue", hint="give --prompt TEXT, --prompts FILE, or --chat")
    sampling = {"--top-p": options["top_p"], "--top-k": options["top_k"], "--seed": options["seed"]}
    said = [name for name, value in sampling.items() if value is not None]
    if said and not options["temperature"]:
        raise UsageError(f"{said[0]} is for sampling", hint="give --temperature too")
    if options["compiled"] and options["cache"] == "dynamic":
        raise UsageError("--compile needs a static cache, whose steps are all alike", hint="leave out --cache")
    if "" in options["stops"]:
        raise UsageError("--stop: an empty text is in every text")
    if options["chat"] and not (options["prompts"] or options["file"]) and options["dp_size"] > 1:
        raise UsageError("a chat is one replica's", hint="leave out --dp")
    check_model_options(options)


def check_model_options(options: Mapping[str, Any]) -> None:
    """Raise UsageError if options that every command with a model has contradict each other."""
    if options["kernel"] is not None and options["attn"] is not None:
        check_attention_takes(options["kernel"], options["attn"])


def check_attention_takes(kernel: str, attention: str) -> None:
    """Raise UsageError if an attention implementation does not use the kernels of `sdpa`."""
    if attention != "sdpa":
        raise UsageError(
            f"--sdpa {kernel} goes with attention sdpa, and this model uses {printable(attention)}",
            hint="use --attn sdpa",
        )


def check_per_layer(reference: str | None, *, per_layer: bool) -> None:
    """Raise UsageError if layers are to be compared with stored logits, which have no layers."""
    if per_layer and reference is None:
        raise UsageError(
            "layers are compared with those of the single-process model", hint="give its source: --reference SOURCE"
        )


def look_at_folder(out: str, revision: str | None = None) -> Manifest:
    """Return the manifest of a resharded folder. If it is on this machine, its rank files must be there.

    Raises:
        IntegrityError: a rank file is missing, or has another size.
        ReshardError: the folder cannot be found.
    """
    found = find_resharded(out, revision=revision)
    refuse_engine(Path(out), found.manifest)
    if found.version is None:
        for record in found.manifest.rank_files:
            written_file(found.folder, record)
    return found.manifest


def look_at_prompts(file: str | None) -> None:
    """Raise BadInputError if a file holds no prompts. A file that can be read only once is left to rank 0."""
    once = file is None or file == STDIN or (os.path.exists(file) and not os.path.isfile(file))
    if file is not None and (not once or os.path.isdir(file)):
        prompt_lines(file)


def look_at_reference(out: str, manifest: Manifest, reference: str | None) -> None:
    """Check that a folder can be compared: with the source `reference`, or else with its stored logits.

    Raises:
        UsageError: none were stored.
        ReshardError: the source cannot be found, or is no checkpoint.
    """
    if reference is None:
        reference_record(Path(out), manifest)
        return
    root, elsewhere, _ = locate(reference, patterns=["config.json"], ignored=())
    if elsewhere is None:
        open_source(root)
