"""Folders made with another transformers than the one that loads them: differences are adapted, reported or refused.

Styles and placements are the folder's own, so a changed tp_plan makes no difference. Names, shapes and compute dtypes
are those of the installed transformers, since its code runs.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from reshard.checkpoint.architecture import expected_dtypes
from reshard.errors import VersionError
from reshard.files.dtypes import FLOATING, holds, is_floating, torch_name
from reshard.files.header import parse_header
from reshard.resharded.manifest import Manifest
from reshard.resharded.targets import Target
from reshard.text import listed, printable

__all__ = ["adapted"]


def adapted(manifest: Manifest, model: Any) -> tuple[Manifest, str | None]:
    """Return the manifest with the compute dtypes that the installed transformers wants for `model`, and a warning.

    `model` is on the meta device, built by the installed transformers. The warning is a line about the difference, or
    None if it does not matter, as with the same transformers.

    Raises VersionError if the model has other parameters or modules than the folder.
    """
    import transformers

    made, here = printable(manifest.tool.get("transformers")), transformers.__version__
    if made == here:
        return manifest, None
    who = f"made with transformers {made}; the {type(model).__name__} of {here}"
    _check_names(manifest, model, who)
    wanted = expected_dtypes(model, manifest.dtype)
    parameters = tuple(_in(target, wanted.get(target.name)) for target in manifest.parameters)
    bundles = tuple(
        replace(bundle, target=replace(bundle.target, dtype=str(wanted[bundle.target.name]).removeprefix("torch.")))
        for bundle in manifest.bundles
    )
    notes = []
    if manifest.architecture != type(model).__name__:
        notes.append(f"is taken, and it was made for {printable(manifest.architecture)}")
    rounded = _rounded(manifest, parameters)
    if rounded:
        notes.append(
            f"computes with {len(rounded)} parameters in a wider dtype than they were cast to when it was made, which"
            f" brings no bits back ({listed(rounded)})"
        )
    return replace(manifest, parameters=parameters, bundles=bundles), f"{who} {', and '.join(notes)}" if notes else None


def _check_names(manifest: Manifest, model: Any, who: str) -> None:
    held = {target.name: target.shape for target in manifest.of_model}
    here = {name: tuple(tensor.shape) for name, tensor in (*model.state_dict().items(), *model.named_buffers())}
    wrong = [name for name, shape in held.items() if here.get(name) != shape]
    wrong += [name for name, _ in model.named_parameters() if name not in held and name not in manifest.tied]
    modules = {name for name, _ in model.named_modules(remove_duplicate=False)}
    wrong += [name for name in manifest.hooks if name not in modules]
    if wrong:
        raise VersionError(
            f"{who} has other parameters or modules: {listed(wrong)}",
            hint="cut it again with this transformers (reshard convert OUT NEW --tp-size N), or install the one that"
            " made it",
        )


def _in(target: Target, wanted: torch.dtype | None) -> Target:
    """Return the target with the wanted compute dtype; unchanged if its dtype or the wanted one is not floating."""
    dtype = str(wanted).removeprefix("torch.")
    if not is_floating(target.dtype) or dtype not in FLOATING:
        return target
    return replace(target, compute_dtype=None if dtype == target.dtype else dtype)


def _rounded(manifest: Manifest, parameters: tuple[Target, ...]) -> list[str]:
    """Names of parameters that now need a wider compute dtype, and whose source bits the folder no longer holds."""
    wider = [
        now
        for was, now in zip(manifest.parameters, parameters)
        if was != now and now.compute_dtype and holds(now.compute_dtype, now.dtype)
    ]
    if not wider:
        return []
    stored = {}
    for file in manifest.source_files:
        text = file["header"].encode(errors="surrogatepass")
        for info in parse_header(text, file=file["file"], file_size=file["size"]).tensors:
            stored[info.name] = torch_name(info.dtype, tensor=info.name)
    return [
        target.name
        for target in wider
        if not all(holds(target.dtype, stored[region.source]) for region in target.regions if region.source in stored)
    ]
