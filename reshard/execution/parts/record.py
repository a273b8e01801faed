"""The record of a part that is done: what it wrote and read, as JSON with a seal. The last that a part writes.

All parts have the same draft, the manifest less what only the writing tells. Nobody vouches for a record that is read.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ...errors import IntegrityError, ReshardError, VersionError
from ...files.untrusted import check_plain_path, count, text, texts
from ...resharded.as_source import UNKNOWN
from ...resharded.manifest import Manifest, is_sealed, sealed_text
from ...resharded.manifest_json import file_from_json, file_to_json
from ...resharded.rank_file import FileRecord
from ...text import listed, printable
from .share import Part

__all__ = [
    "DRAFT_NAME",
    "RECORD_NAME",
    "VERSIONS",
    "PartRecord",
    "agreed",
    "check_beside",
    "is_made_of",
    "is_planned_as",
    "read_record",
]

RECORD_NAME, DRAFT_NAME = ".reshard-part.json", ".reshard-draft.json"
_FORMAT, _VERSION = "reshard part", 1


@dataclass(frozen=True, slots=True)
class PartRecord:
    """What a part did. `work` has what decides the bytes, each by its name: versions, and digests of the rest.

    `draft` is the digest of the draft. `files` are the rank files and the file of unused tensors, `extras` the small
    files, which are part 1's. `source` are the digests of the source files that were read whole. Of the `unchecked`
    ones only some bytes came from elsewhere, which could not be checked by themselves.
    """

    part: Part
    work: dict[str, str]
    draft: str
    files: tuple[FileRecord, ...]
    extras: tuple[FileRecord, ...]
    source: dict[str, str]
    unchecked: tuple[str, ...]

    @property
    def records(self) -> tuple[FileRecord, ...]:
        """The record of every file of the part."""
        return (*self.files, *self.extras)

    def to_bytes(self) -> bytes:
        """Return the text of the record: the same for the same content."""
        content = {
            "format": _FORMAT,
            "format_version": _VERSION,
            "part": [self.part.number, self.part.of],
            "work": self.work,
            "draft": self.draft,
            "files": [file_to_json(record) for record in self.files],
            "extras": [file_to_json(record) for record in self.extras],
            "source": self.source,
            "unchecked": list(self.unchecked),
        }
        return sealed_text(content)


def read_record(raw: bytes, *, where: str) -> PartRecord:
    """Return the record that is in a file's bytes. Raises IntegrityError; VersionError for one of a newer release."""
    try:
        content = json.loads(raw)
        if content["format"] != _FORMAT:
            raise ValueError("another format")
        if content["format_version"] != _VERSION:
            raise VersionError(
                f"{where}: is a record of version {printable(content['format_version'])}", hint="upgrade reshard"
            )
        if not is_sealed(raw):
            raise ValueError("does not match its seal")
        number, of = map(count, content["part"])
        record = PartRecord(
            Part.parse(f"{number}/{of}"),
            texts(content["work"]),
            text(content["draft"]),
            tuple(map(file_from_json, content["files"])),
            tuple(map(file_from_json, content["extras"])),
            texts(content["source"]),
            tuple(map(text, content["unchecked"])),
        )
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise IntegrityError(
            f"{where}: is no record of a part ({printable(error)})", hint="remove that part, and make it again"
        ) from None
    for file in record.records:
        check_plain_path(file.name, what=where)
    return record


def blank(manifest: Manifest) -> Manifest:
    """Return a manifest less all that only writing and reading tell."""

    def unread(files: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        return [{**file, "digest": UNKNOWN} for file in files]

    def unwritten(record: FileRecord) -> FileRecord:
        return FileRecord(record.name, record.size, UNKNOWN, {})

    derived, unused = manifest.derived, manifest.unused_file
    return replace(
        manifest,
        source_files=tuple(unread(manifest.source_files)),
        derived=derived and {**derived, "files": unread(derived["files"])},
        rank_files=tuple(map(unwritten, manifest.rank_files)),
        unused_file=unused and unwritten(unused),
        extras=(),
    )


def is_planned_as(manifest: Manifest, draft: Manifest) -> bool:
    """Whether a manifest is what a draft was to become, but for the values of the weights and the small files."""
    return blank(manifest).to_bytes() == blank(draft).to_bytes()


def is_made_of(manifest: Manifest, records: Iterable[PartRecord]) -> bool:
    """Whether a manifest has the files of these parts, by their digests."""
    there = set(map(_identity, manifest.files()))
    return all(_identity(file) in there for record in records for file in record.records)


def _identity(record: FileRecord) -> tuple[str, int, str]:
    return record.name, record.size, record.digest


def check_beside(
    part: Part, work: Mapping[str, str], records: Mapping[Part, PartRecord], at: Callable[[Part], str], *, where: str
) -> None:
    """Check that a part which is to be made goes with those that are done. `at` tells where each of these is.

    Raises what `agreed` does.
    """
    for other, record in sorted(records.items()):
        if other.of != part.of:
            raise _of_other_numbers(part, other, at, where)
        if record.work != work:
            raise _unlike(part, work, record, at, where)


def agreed(
    records: Mapping[Part, PartRecord], draft: Callable[[Part], Manifest], at: Callable[[Part], str], *, where: str
) -> list[PartRecord]:
    """Return the records of all parts, in order, if they make one folder together. `draft` gives that of a part, and
    `at` tells where it is.

    Raises:
        IntegrityError: a part is not done, or is of another source or plan. The error names it.
        VersionError: a part was made by other versions.
    """
    ordered = [records[part] for part in sorted(records)]
    first = ordered[0]
    for record in ordered[1:]:
        if record.part.of != first.part.of:
            raise _of_other_numbers(record.part, first.part, at, where)
    of = first.part.of
    missing = [number for number in range(1, of + 1) if Part(number, of) not in records]
    if missing:
        named = f"part {missing[0]}" if len(missing) == 1 else f"parts {', '.join(map(str, missing))}"
        raise IntegrityError(
            f"{where}: {named} of {of} {'is' if len(missing) == 1 else 'are'} not done",
            hint=f"run the same convert with --part {missing[0]}/{of}, then finish again",
        )
    for record in ordered[1:]:
        if record.work != first.work:
            raise _unlike(record.part, record.work, first, at, where)
    _check_cover(ordered, draft(first.part), where)
    return ordered


def _of_other_numbers(part: Part, other: Part, at: Callable[[Part], str], where: str) -> IntegrityError:
    return IntegrityError(
        f"{where}: {part} does not go with {other}: the numbers of parts differ",
        hint=f"make all of one number, and remove those of the other, such as {at(other)}",
    )


VERSIONS = "versions"  # of a part's work: the one that is not a digest


def _unlike(
    part: Part, work: Mapping[str, str], other: PartRecord, at: Callable[[Part], str], where: str
) -> ReshardError:
    same = part == other.part
    hint = f"make all parts alike; if that one is wrong, remove {at(other.part)}"
    if work.get(VERSIONS) != other.work.get(VERSIONS):
        made, before = printable(work.get(VERSIONS)), printable(other.work.get(VERSIONS))
        there = "it is there already, made" if same else f"part {other.part.number} was made"
        return VersionError(f"{where}: {part} is made by {made}, and {there} by {before}", hint=hint)
    what = next((name for name in work if work[name] != other.work.get(name)), "work")
    than = "that is there already" if same else f"part {other.part.number}"
    return IntegrityError(f"{where}: {part} is of another {printable(what)} than {than}", hint=hint)


def _check_cover(records: Sequence[PartRecord], draft: Manifest, where: str) -> None:
    """Check that the parts have every file once, and the digest of every source file."""
    planned = {record.name: record.size for record in draft.files()}
    files = [file for record in records for file in record.files]
    wrong = {file.name for file in files if planned.get(file.name) != file.size}
    wrong |= planned.keys() ^ {file.name for file in files}
    unread = {file["file"] for file in (draft.derived or {}).get("files", draft.source_files) if not file["digest"]}
    wrong |= unread - {name for record in records for name in record.source}
    if wrong or len(files) != len(planned):
        raise IntegrityError(f"{where}: its parts do not make a whole: {listed(sorted(wrong))}")
    for record in records[1:]:
        if record.extras:
            raise IntegrityError(f"{where}: {record.part} has small files, which are part 1's")
