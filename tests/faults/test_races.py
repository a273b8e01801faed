"""Two processes write to one destination: one wins and the other says so, with locks and without."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pico
import pytest
from disk_calls import folder_in_memory
from kill_tools import interrupt_after
from power_loss import Tree, put, taken
from race_tools import LOCKS, Work, racers

import reshard
import reshard.execution.destination
from reshard.errors import BusyError, DestinationExistsError
from reshard.execution.destination import destination
from reshard.resharded.manifest import Manifest, read_manifest

RACES = 10  # races of each kind in CI; the slow test runs 50
PAIRS = ["same work", "other work", "merge and convert"]


@dataclass(frozen=True)
class Track:
    room: Path
    race: Any
    works: dict[str, tuple[Work, Work]]
    results: dict[Work, Tree]
    left: Tree  # the files of an interrupted conversion


@pytest.fixture(scope="module")
def track() -> Iterator[Track]:
    with folder_in_memory() as room, racers() as race:
        source = pico.save("llama", room / "source")
        reshard.convert(source, room / "2", tp_size=2)
        reshard.convert(source, room / "4", tp_size=4)
        reshard.merge(room / "4", room / "merged")
        two, four, merge = Work(source, 2), Work(source, 4), Work(room / "4", None)
        (room / "left").mkdir()
        with pytest.MonkeyPatch.context() as patch:
            interrupt_after(patch, 9)
            with pytest.raises(KeyboardInterrupt):
                reshard.convert(source, room / "left" / "out", tp_size=2)
        yield Track(
            room,
            race,
            {"same work": (two, two), "other work": (two, four), "merge and convert": (merge, two)},
            {two: taken(room / "2"), four: taken(room / "4"), merge: taken(room / "merged")},
            taken(room / "left"),
        )


def run(track: Track, pair: str, locks: str, races: int) -> None:
    for seed in range(races):
        root = Path(tempfile.mkdtemp(dir=track.room)) / "race"
        put(track.left if seed % 3 == 0 else {}, root)
        works = track.works[pair]
        ends = track.race(works, root / "out", locks, seed)
        codes = [code for code, _ in ends]
        assert sorted(codes) in ([0, BusyError.exit_code], [0, DestinationExistsError.exit_code]), (seed, ends)
        assert taken(root) == {"out": track.results[works[codes.index(0)]]}, (seed, ends, os.listdir(root))
        shutil.rmtree(root)


@pytest.mark.fault(22)
@pytest.mark.parametrize("locks", LOCKS[:-1])  # without renameat2, folders are not exchanged in one step
def test_what_is_replaced_is_one_or_the_other(locks: str, track: Track) -> None:
    """With --overwrite both may win, one after the other."""
    two, four = (replace(work, overwrite=True) for work in track.works["other work"])
    results = [track.results[work] for work in track.works["other work"]]
    for seed in range(RACES):
        root = Path(tempfile.mkdtemp(dir=track.room)) / "race"
        put({"out": results[seed % 2]}, root)
        ends = track.race((two, four), root / "out", locks, seed)
        codes = [code for code, _ in ends]
        assert sorted(codes) in ([0, 0], [0, BusyError.exit_code]), (seed, ends)
        assert taken(root) in [{"out": result} for code, result in zip(codes, results) if code == 0], (seed, ends)
        shutil.rmtree(root)


@pytest.mark.fault(22)
def test_a_folder_that_another_run_replaces_while_it_is_looked_at(
    track: Track, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The manifest of the one folder is not held against the files of the other."""
    two, four = (track.results[work] for work in track.works["other work"])
    room = tmp_path / "room"
    put({"out": two, "other": four}, room)
    seen = []

    def read_and_replaced(folder: Path) -> Manifest:
        seen.append(manifest := read_manifest(folder))
        if len(seen) == 1:
            (room / "out").rename(room / "old")
            (room / "other").rename(room / "out")
        return manifest

    monkeypatch.setattr(reshard.execution.destination, "read_manifest", read_and_replaced)
    destination(room / "out", overwrite=True).check()
    assert [len(manifest.rank_files) for manifest in seen] == [2, 4]


@pytest.mark.fault(22)
@pytest.mark.parametrize("locks", LOCKS)
@pytest.mark.parametrize("pair", PAIRS)
def test_one_wins(pair: str, locks: str, track: Track) -> None:
    run(track, pair, locks, RACES)


@pytest.mark.fault(22)
@pytest.mark.slow
@pytest.mark.parametrize("locks", LOCKS)
@pytest.mark.parametrize("pair", PAIRS)
def test_one_wins_of_many_races(pair: str, locks: str, track: Track) -> None:
    run(track, pair, locks, 50)
