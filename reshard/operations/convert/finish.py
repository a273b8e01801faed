"""The end of a conversion that was made in parts: all agree, every byte is read again, and the folder is whole."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from threading import Event

from ...errors import BadInputError, DestinationExistsError, IntegrityError, ReshardError
from ...execution.jobs import Job, run_jobs
from ...execution.parts.gathering import Gathering, gathering
from ...execution.parts.record import PartRecord, agreed, is_made_of, is_planned_as
from ...execution.parts.share import Part
from ...process import Advance, Progress, patient_collector, silent, worker_count
from ...resharded.manifest import Manifest
from ...resharded.rank_file import FileRecord
from ...text import listed
from ..arguments import checked
from ..values.change import given_back
from .work import completed

__all__ = ["finish", "finished"]


@checked
@patient_collector()
def finish(
    out: str | Path,
    *,
    workers: int | None = None,
    sync: bool = True,
    progress: Progress = silent,
    say: Callable[[str], object] = lambda _: None,
) -> Manifest:
    """Make a resharded folder (or URL) of the parts that `convert_part` made for it, and return its manifest.

    All parts must be done, of one source, plan and version. Every byte of every file is read again and compared with
    the digests of the parts before the folder appears, in one step: its bytes are those of one `convert`. If it is
    interrupted, or runs twice, it goes on: a folder that is whole already is left as it is.

    Raises:
        BadInputError: there are no parts.
        IntegrityError: a part is not done, is of another source or plan, or a file was altered. The error names it.
        VersionError: parts were made by different versions.
        DestinationExistsError: something else is there.
    """
    found = finished(gathering(out, sync=sync, progress=progress), workers=workers, progress=progress, say=say)
    assert found is not None
    return found


def finished(
    parts: Gathering,
    *,
    if_all: bool = False,
    workers: int | None,
    progress: Progress,
    say: Callable[[str], object] = lambda _: None,
) -> Manifest | None:
    """Do what `finish` does; with `if_all` do nothing, and return None, unless all parts are done."""
    for last in (False, False, True):
        try:
            return _finished(parts, if_all, workers, progress, say)
        except ReshardError:
            # If another run has finished it meanwhile, files that were to be read are elsewhere: look again.
            if last or parts.whole() is None:
                raise
    raise AssertionError("unreachable")


def _finished(
    parts: Gathering, if_all: bool, workers: int | None, progress: Progress, say: Callable[[str], object]
) -> Manifest | None:
    records = parts.records()
    whole = parts.whole()
    if whole is not None:
        _check_whole(parts, whole, records, workers, progress)
        say(f"{parts.place}: is whole already")
        return whole
    if not records:
        raise BadInputError(
            f"{parts.place}: no part of it is done", hint="make each with: reshard convert SOURCE OUT --part 1/8 …"
        )
    if if_all and {part.number for part in records} != set(range(1, max(part.of for part in records) + 1)):
        return None
    ordered = agreed(records, parts.draft, parts.at, where=parts.name)
    say(f"finishing {parts.place}: {len(ordered)} parts, {sum(r.size for of in ordered for r in of.records):,} bytes")
    for record in ordered:
        if lacking := parts.lacks(record):
            raise IntegrityError(
                f"{parts.name}: {record.part} lacks {listed(lacking)}", hint=f"run part {record.part.number} again"
            )
    folder = parts.together(ordered)
    draft = parts.draft(ordered[0].part)
    _read_again(parts, ordered, workers, progress)
    digests = {name: digest for record in ordered for name, digest in record.source.items()}
    order = {record.name: number for number, record in enumerate(draft.files())}
    files = sorted((file for record in ordered for file in record.files), key=lambda file: order[file.name])
    manifest = completed(folder or Path(), draft, files, ordered[0].extras, digests, workers=workers, progress=progress)
    unchecked = {name for record in ordered for name in record.unchecked}
    if unchecked and folder is not None:
        found = given_back(folder, manifest, unchecked, workers=workers, progress=progress)
        wrong = sorted(name for name in unchecked if found[name] != digests[name])
        if wrong:
            raise IntegrityError(
                f"{parts.name}: bytes of {listed(wrong)} did not arrive intact",
                hint=f"remove {parts.name}, and make the parts again",
            )
    parts.complete(manifest)
    parts.clear()
    return manifest


def _check_whole(
    parts: Gathering, whole: Manifest, records: Mapping[Part, PartRecord], workers: int | None, progress: Progress
) -> None:
    """Remove the parts of a folder that is there, if they are in it, byte for byte. Raises a ReshardError if not."""
    if not records:
        parts.clear_on()
        return
    first = min(records)
    if not (is_planned_as(whole, parts.draft(first)) and is_made_of(whole, records.values())):
        raise DestinationExistsError(
            f"{parts.place}: already exists, and is not what the parts make",
            hint=f"move it away, then finish again; or remove {parts.name}",
        )
    total = sum(record.size for record in whole.files())
    with progress(total, "checking") as report:
        jobs = [Job((), 0.0, partial(parts.check, file, report, whole=True), False) for file in whole.files()]
        run_jobs(jobs, workers or worker_count(), Event())
    parts.clear()


def _read_again(parts: Gathering, records: Sequence[PartRecord], workers: int | None, progress: Progress) -> None:
    """Read every byte of every file. Raises IntegrityError, with the part that must be made again."""

    def check(record: PartRecord, file: FileRecord, report: Advance) -> None:
        try:
            parts.check(file, report)
        except IntegrityError as error:
            raise IntegrityError(
                error.message, hint=f"remove that file, and run part {record.part.number} again"
            ) from None

    total = sum(file.size for record in records for file in record.records)
    with progress(total, "checking") as report:
        jobs = [Job((), 0.0, partial(check, of, file, report), False) for of in records for file in of.records]
        run_jobs(jobs, workers or worker_count(), Event())
