"""The record of a part that is done: what it wrote and read, as JSON with a seal. The last that a part writes.

All parts have the same draft, the manifest less what only the writing tells. Nobody vouches for a record that is read.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
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

__all__ = ["DRAFT_NAME", "RECORD_NAME", "PartRecord", "agreed", "check_beside", "is_of", "read_record"]

RECORD_NAME, DRAFT_NAME = ".reshard-part.json", ".reshard-draft.json"
_FORMAT, _VERSION = "reshard part", 1


@dataclass(frozen=True, slots=True)
class PartRecord:
    """What a part did. `work` is the digest of all that decides the bytes: source, plan and versions.

    `draft` is the digest of the draft. `files` are the rank files and the file of unused tensors, `extras` the small
    files, which are part 1's. `source` are the digests of the source files that were read whole. Of the `unchecked`
    ones only some bytes came from elsewhere, which could not be checked by themselves.
    """

    part: Part
    work: str
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
            text(content["work"]),
            text(content["draft"]),
            tuple(map(file_from_json, content["files"])),
            tuple(map(file_from_json, content["extras"])),
            texts(content["source"]),
            tuple(map(text, content["unchecked"])),
        )
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise IntegrityError(f"{where}: is no record of a part ({printable(error)})") from None
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


def is_of(manifest: Manifest, draft: Manifest) -> bool:
    """Whether a manifest is what a draft was to become."""
    return blank(manifest).to_bytes() == blank(draft).to_bytes()


def check_beside(
    part: Part,
    work: str,
    draft: Manifest,
    records: Mapping[Part, PartRecord],
    draft_of: Callable[[Part], Manifest],
    *,
    where: str,
) -> None:
    """Check that a part which is to be made goes with those that are done. Raises what `agreed` does."""
    for other, record in sorted(records.items()):
        if other.of != part.of:
            raise _of_other_numbers([part, other], where)
        if record.work != work:
            raise _unlike(part, draft, other, draft_of(other), where)


def agreed(records: Mapping[Part, PartRecord], drafts: Mapping[Part, Manifest], *, where: str) -> list[PartRecord]:
    """Return the records of all parts, in order, if they make one folder together.

    Raises:
        IntegrityError: a part is not done, or is of another source or plan. The error names it.
        VersionError: a part was made by other versions.
    """
    numbers = sorted({part.of for part in records})
    if len(numbers) > 1:
        raise _of_other_numbers(sorted(records), where)
    missing = [number for number in range(1, numbers[0] + 1) if Part(number, numbers[0]) not in records]
    if missing:
        named = f"part {missing[0]}" if len(missing) == 1 else f"parts {', '.join(map(str, missing))}"
        raise IntegrityError(
            f"{where}: {named} of {numbers[0]} {'is' if len(missing) == 1 else 'are'} not done",
            hint=f"run the same convert with --part {missing[0]}/{numbers[0]}, then finish again",
        )
    ordered = [records[part] for part in sorted(records)]
    first = ordered[0]
    for record in ordered[1:]:
        if record.work != first.work:
            raise _unlike(record.part, drafts[record.part], first.part, drafts[first.part], where)
    _check_cover(ordered, drafts[first.part], where)
    return ordered


def _of_other_numbers(parts: Sequence[Part], where: str) -> IntegrityError:
    return IntegrityError(
        f"{where}: parts of different numbers of parts: {listed([str(part) for part in parts])}",
        hint="give all the same number, and remove those that are not wanted",
    )


def _unlike(part: Part, draft: Manifest, first: Part, other: Manifest, where: str) -> ReshardError:
    hint = f"run all parts alike; remove what is there of one that is wrong: {listed(sorted({part.name, first.name}))}"
    if draft.tool != other.tool:
        made, by = (", ".join(f"{name} {version}" for name, version in of.tool.items()) for of in (draft, other))
        return VersionError(f"{where}: {part} was made by {made}, and part {first.number} by {by}", hint=hint)
    if (draft.repo_id, draft.commit) != (other.repo_id, other.commit):
        what = "another source"
    elif [(f["file"], f["size"], f["header"]) for f in draft.source_files] != [
        (f["file"], f["size"], f["header"]) for f in other.source_files
    ]:
        what = "other source files"
    elif is_of(draft, other):
        what = "source files of another time"
    else:
        what = "another plan"
    return IntegrityError(f"{where}: {part} is of {what} than part {first.number}", hint=hint)


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
