"""The model card of a published repo: a text of our own about every resharded folder in it."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from math import prod
from typing import Any
from urllib.parse import quote

from ...checkpoint.kinds import is_licence
from ...files.dtypes import torch_name
from ...resharded.as_source import source_headers
from ...resharded.manifest import Manifest
from ...showing.engines import serve_command
from ...showing.loads import KINDS, RankLoad, rank_loads
from ...showing.tables import gigabytes
from ...text import printable
from .licence import Terms

__all__ = ["is_ours", "picture_name", "render"]

_MARK = "<!-- Written by reshard publish, anew each time. Take this line away to keep what you change. -->"
_TASKS = {"ForCausalLM": "text-generation", "ForMaskedLM": "fill-mask"}
_TEXT = """\
---
{front_matter}
---

{mark}

# {title}, a file for each tensor-parallel rank

{opening}

{summary}
{pictures}
If the last column says yes, `from_pretrained` of a transformers that reads rank files (5.23 does) opens the folder too.

## Use it

With `reshard` installed, on one machine with as many GPUs (or CPU processes) as ranks:

{generate}

Every rank fetches its own file and the small ones, all at one commit, and checks each digest. In Python, under
`torchrun`:

{python}

To fetch files ahead of time, or only those of some ranks:

{pull}
{custom}
## Get the checkpoint back

{merge}

## What it was made from

{origin}

{licence}

## Formats

{formats}

## Files
{files}
`reshard.json` of each folder holds the digest of every tensor; `reshard verify` checks them all.
"""


_ENGINE_READS = "Only that engine reads these files."
_ENGINE_MERGES = "An engine's rank files are not merged: take the source."


def is_ours(text: str) -> bool:
    """Whether `reshard publish` wrote a card, so that it can be replaced."""
    return _MARK in text


def picture_name(path: str) -> str:
    """Return the file beside the card that has the picture of a folder of the repo ("" for its root)."""
    return f"reshard-{path.replace('/', '--')}.svg" if path else "reshard.svg"


def render(
    repo_id: str,
    manifests: Mapping[str, Manifest],
    terms: Terms,
    *,
    revision: str | None = None,
    pictures: Collection[str] = (),
) -> str:
    """Return the card's text. `manifests` are the manifests by folder of the repo ("" for its root), on `revision`.
    `pictures` are the folders that have a picture beside the card, of the name `picture_name`.

    The same folders give the same card: it holds no date.
    """
    from huggingface_hub import ModelCard, ModelCardData

    places = {path: f"{repo_id}/{path}" if path else repo_id for path in manifests}
    first = next(iter(manifests))
    branch = f" --revision {_plain(revision)}" if revision else ""
    sources = sorted({_plain(m.repo_id) for m in manifests.values() if m.repo_id})
    partial = bool(manifests[first].dropped) or _is_cast(manifests[first])
    text = _TEXT.format(
        front_matter=ModelCardData(**_front_matter(manifests, terms), ignore_metadata_errors=True).to_yaml(),
        mark=_MARK,
        title=", ".join(sources) or _plain(manifests[first].architecture),
        opening=_opening(
            sources,
            cast=any(map(_is_cast, manifests.values())),
            formats={bundle.quantized.format for manifest in manifests.values() for bundle in manifest.bundles},
        ),
        summary=_table(
            ("folder", "ranks", "largest file", "all files", "dtype", "opens in plain transformers"),
            [_summary(path, manifest) for path, manifest in manifests.items()],
        ),
        pictures="".join(_picture(path, manifest) for path, manifest in manifests.items() if path in pictures),
        generate=_shell(_start(places[path], branch, manifest) for path, manifest in manifests.items()),
        python=_python(places[first], revision) if manifests[first].engine is None else _ENGINE_READS,
        pull=_shell(
            f"reshard pull {places[path]}{branch} --ranks 0-{m.world_size - 1}" for path, m in manifests.items()
        ),
        custom=_custom(manifests),
        merge=_merge(places[first], branch, partial=partial) if manifests[first].engine is None else _ENGINE_MERGES,
        origin=_table(
            ("folder", "source", "commit", "with"),
            [_origin(path, manifest) for path, manifest in manifests.items()],
        ),
        licence=_licence(terms, manifests),
        formats=_table(
            ("folder", "stored as", "parameters", "elements", "bytes"),
            [line for path, manifest in manifests.items() for line in _formats(path, manifest)],
        ),
        files="".join(_files(path, manifest) for path, manifest in manifests.items()),
    )
    return str(ModelCard(text))


def _start(place: str, branch: str, manifest: Manifest) -> str:
    if manifest.engine is None:
        return f'reshard run {place}{branch} --prompt "Hello"'
    return " ".join(map(_plain, serve_command(place, manifest.engine))) + branch


def _merge(place: str, branch: str, *, partial: bool) -> str:
    merged = "what there is of it" if partial else "the source's files, byte for byte as they were"
    command = _shell([f"reshard merge {place}{branch} DEST{' --layout hf' if partial else ''}"])
    return f"{command}\n\nThis needs no other copy, and writes {merged}."


def _front_matter(manifests: Mapping[str, Manifest], terms: Terms) -> dict[str, Any]:
    sources = sorted({_plain("/".join(m.repo_id.split("/")[:2])) for m in manifests.values() if m.repo_id})
    sizes = sorted({manifest.topology.tp for manifest in manifests.values()})
    found: dict[str, Any] = {
        "library_name": "transformers",
        "tags": ["reshard", "tensor-parallel", *(f"tp{size}" for size in sizes)],
        **terms.metadata,
    }
    if terms.licence:
        found["license"] = terms.licence
    tasks = {task for m in manifests.values() for ending, task in _TASKS.items() if m.architecture.endswith(ending)}
    if len(tasks) == 1:
        found.setdefault("pipeline_tag", tasks.pop())
    if sources:  # the nearest relation that the Hub knows: the same model in another form
        found.update(base_model=sources[0] if len(sources) == 1 else sources, base_model_relation="quantized")
    return found


def _opening(sources: Sequence[str], *, cast: bool, formats: Collection[str]) -> str:
    of = ", ".join(f"[{name}](https://huggingface.co/{name})" for name in sources) or "a model"
    lines = [
        f"The weights of {of}, cut ahead of time for tensor-parallel inference: a rank reads its own file, no other.",
        "If the dtype differs from the source's, elements were cast to it."
        if cast
        else "Every element equals the source's, bit for bit.",
    ]
    if formats:
        listed = ", ".join(map(_plain, sorted(formats)))
        lines.append(
            f"Weights stay quantized as the source has them ({listed}); a rank computes with"
            " them by their library if it is installed and can, else it dequantises its part as it loads."
        )
    elif sources:
        lines.append("Nothing is quantized: the Hub has no nearer name for how the two models belong together.")
    return "\n".join(lines)


def _is_cast(manifest: Manifest) -> bool:
    stored = {
        info.name: torch_name(info.dtype, tensor=info.name)
        for header in source_headers(manifest).values()
        for info in header.tensors
    }
    taken_for = manifest.engine["taken_for"] if manifest.engine else {}
    return any(
        taken_for.get(region.source, stored[region.source]) != parameter.dtype
        for parameter in manifest.parameters
        for region in parameter.regions
        if region.source in stored  # an engine's rank files have constants too
    )


def _summary(path: str, manifest: Manifest) -> tuple[str, ...]:
    sizes = [record.size for record in manifest.rank_files]
    mesh = manifest.topology
    ranks = f"{mesh.world_size} (tp {mesh.tp}, ep {mesh.ep})" if mesh.ep > 1 else str(mesh.world_size)
    opens = "; ".join(_plain(reason) for reason in manifest.runtime_only)
    plain = f"no: {opens}" if opens else "yes"
    return _tick(_folder(path)), ranks, gigabytes(max(sizes)), gigabytes(sum(sizes)), manifest.dtype, plain


def _picture(path: str, manifest: Manifest) -> str:
    """Return the link to a folder's picture, with a line before and after."""
    words = f"What each of the {manifest.world_size} ranks of {_plain(_folder(path))} holds"
    return f"\n![{words}]({quote(picture_name(path))})\n"


def _formats(path: str, manifest: Manifest) -> Iterator[tuple[str, ...]]:
    """Yield what the weights are stored as: dtypes, or formats of quantized parameters, the largest first.

    Bytes are those of one copy, with what a format stores beside its values.
    """
    found: dict[str, tuple[int, int, int]] = {}
    for row in manifest.to_dict()["parameters"]:
        stored = row["quantized"]["format"] if "quantized" in row else row["dtype"]
        count, elements, size = found.get(stored, (0, 0, 0))
        added = row["count"] * prod(row["shape"]), row["count"] * row["bytes"]
        found[stored] = (count + row["count"], elements + added[0], size + added[1])
    for stored, (count, elements, size) in sorted(found.items(), key=lambda item: (-item[1][2], item[0])):
        yield _tick(_folder(path)), _plain(stored), f"{count:,}", f"{elements:,}", f"{size:,}"


def _origin(path: str, manifest: Manifest) -> tuple[str, ...]:
    tools = ", ".join(f"{_plain(name)} {_plain(version)}" for name, version in manifest.tool.items())
    source = _tick(manifest.repo_id) if manifest.repo_id else "a local folder"
    return _tick(_folder(path)), source, _tick(manifest.commit) if manifest.commit else "–", tools


def _custom(manifests: Mapping[str, Manifest]) -> str:
    styles = sorted({name for manifest in manifests.values() for name in manifest.custom})
    if not styles:
        return ""
    return (
        f"\nIt was cut with styles of its own, {', '.join(map(_tick, styles))}: `--strategies FILE` names their code.\n"
    )


def _files(path: str, manifest: Manifest) -> str:
    loads = rank_loads(manifest.to_dict())
    lines = [
        (str(rank), _tick(record.name), f"{record.size:,}", _holds(load), _tick(record.digest))
        for rank, (record, load) in enumerate(zip(manifest.rank_files, loads))
    ]
    head = ("rank", "file", "bytes", "of which", "digest (xxh3-128)")
    return f"\n### {_folder(path)}\n\n{_table(head, lines)}\n"


def _holds(load: RankLoad) -> str:
    return ", ".join(f"{KINDS[kind]} {gigabytes(size)}" for kind, size in load.kinds.items() if size) or "nothing"


def _licence(terms: Terms, manifests: Mapping[str, Manifest]) -> str:
    name = f"`{terms.licence}`" if terms.licence else "not known"
    names = {extra.name for manifest in manifests.values() for extra in manifest.extras}
    legal = sorted(filter(is_licence, names))
    along = f" The source's {', '.join(map(_tick, legal))} came along unchanged." if legal else ""
    return f"Licence: {name}.{along}"


def _python(place: str, revision: str | None) -> str:
    pinned = f', revision="{_plain(revision)}"' if revision else ""
    return f'```python\nimport runtime\n\nmodel = runtime.load("{place}"{pinned})\n```'


def _shell(lines: Iterable[str]) -> str:
    return "\n".join(["```sh", *lines, "```"])


def _table(head: tuple[str, ...], lines: Sequence[tuple[str, ...]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, ("---",) * len(head), *lines))


def _folder(path: str) -> str:
    return f"{path}/" if path else "/"


def _plain(text: object) -> str:
    """Replace what Markdown or HTML would interpret: nobody vouches for a manifest's text."""
    return "".join("·" if c in "`|<>[]()*\\\"'$" else c for c in printable(text))


def _tick(text: object) -> str:
    return f"`{_plain(text)}`"
