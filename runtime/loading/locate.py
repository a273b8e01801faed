"""The folder that all ranks load: rank 0 finds it and tells the others, so that all load one commit of a repo."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist

from reshard.checkpoint.source import MANIFEST_NAME
from reshard.errors import IntegrityError, TopologyError
from reshard.resharded.manifest import Manifest, read_manifest, refuse_engine
from reshard.resharded.rank_file import check_file
from reshard.storage.disk import discard
from reshard.storage.locate import fetch_files, find_resharded, locate
from reshard.text import printable

from ..distributed.agreement import Deadline, UnansweredError, spoken, words_of

__all__ = ["Located", "locate_together"]

_calls = itertools.count()


@dataclass(frozen=True, slots=True)
class Located:
    """The folder of a rank, and its manifest. `fetched`: it is in the cache, where no damaged file is kept."""

    folder: Path
    manifest: Manifest
    fetched: bool

    def damaged(self, names: Sequence[str]) -> None:
        """Delete files from the cache, so that the next start fetches them again."""
        for name in names if self.fetched else ():
            discard(self.folder / name)


def locate_together(
    place: str,
    *,
    revision: str | None,
    first: bool,
    rank: int,
    world_size: int,
    digests: bool,
    store: dist.Store,
    deadline: Deadline,
) -> Located:
    """Find the resharded folder at `place`, or its folder `tpN` for that number of ranks, and this rank's file in it.

    `rank` and `world_size` count within one replica of the model; `first` is true on one rank of the job.

    If `place` is a repo, each rank fetches its own file and the small files, into a cache that the ranks of a machine
    share. Only the first rank resolves the commit. With `digests`, the configuration is checked, and every small file
    that is fetched.

    Raises:
        IntegrityError: a small file is missing, or its bytes are not those that were written.
        TopologyError: the folder was made for another number of ranks; the message names those it has.
        ReshardError: the first rank failed; raised on every rank.
    """
    key = f"reshard/place/{next(_calls)}"
    if first:
        try:
            found = find_resharded(place, revision=revision, world_size=world_size)
        except Exception as error:
            store.set(key, json.dumps({"error": words_of(error)}))
            raise
        store.set(key, json.dumps({"place": found.place, "commit": found.version}))
        return _fetch(found.place, found.version, rank, world_size, digests=digests)
    if os.path.exists(place):
        found = find_resharded(place, world_size=world_size)
        return _fetch(found.place, None, rank, world_size, digests=digests)
    try:
        store.wait([key], deadline.left())
    except RuntimeError:
        raise UnansweredError("rank 0 does not say which folder to load") from None
    told = json.loads(store.get(key))
    if "error" in told:
        raise spoken(told["error"])
    return _fetch(told["place"], told["commit"], rank, world_size, digests=digests)


def _fetch(place: str, commit: str | None, rank: int, world_size: int, *, digests: bool) -> Located:
    """Fetch the manifest first: if the number of ranks is wrong, nothing large is fetched."""
    folder, repo_id, _ = locate(place, revision=commit, patterns=[MANIFEST_NAME], ignored=())
    manifest = read_manifest(folder)
    refuse_engine(folder, manifest)
    if manifest.world_size != world_size:
        raise TopologyError(
            f"{printable(place)} was made for {manifest.world_size} ranks, not for {world_size}",
            hint=f"use torchrun --nproc-per-node {manifest.world_size}, or convert with --tp-size {world_size}",
        )
    located = Located(folder, manifest, repo_id is not None)
    if located.fetched:
        names = [manifest.rank_files[rank].name, *(record.name for record in manifest.extras)]
        fetch_files(place, names, version=commit)
    if digests:
        _check_small(located)
    return located


def _check_small(located: Located) -> None:
    """Check config.json, and all small files (some megabytes) if the folder was fetched. The other small files of a
    local folder are the user's to change, such as the chat template."""
    for record in located.manifest.extras:
        if not located.fetched and record.name != "config.json":
            continue
        try:
            check_file(located.folder, record)
        except IntegrityError as error:
            located.damaged([record.name])
            hint = None if located.fetched else "--no-digests (check_digests=False) loads what was altered on purpose"
            raise IntegrityError(error.message, hint=hint) from None
