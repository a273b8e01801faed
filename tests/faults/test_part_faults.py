"""Parts that are killed, run twice or at once, and a finish that is: never a bad folder, and the bytes of one run."""

from __future__ import annotations

import itertools
import os
import random
import shutil
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pico
import pytest
from cli_tools import tree
from disk_calls import already_planned, folder_in_memory
from kill_tools import KILLED, Job, server, until
from object_store import ObjectStore, contents
from power_loss import put, record, states, taken
from race_tools import LOCKS, Work, racers

import reshard
from reshard.errors import BusyError, IntegrityError

STEP = 15  # step of the sweeps in CI; the slow ones take every call
RACES = 6  # of each kind; the slow test runs 40
OFTEN = 40  # states of a power loss in CI; the slow test takes every one


@pytest.fixture(scope="module")
def origin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pico.save("llama", tmp_path_factory.mktemp("parts") / "source")


@pytest.fixture(scope="module")
def whole(origin: Path) -> dict[str, Any]:
    """The folder that one run makes."""
    reshard.convert(origin, origin.with_name("whole"), tp_size=4)
    return tree(origin.with_name("whole"))


@pytest.fixture(scope="module")
def all_parts(origin: Path) -> Path:
    """`out.parts` with two parts of four ranks, both done. Read only."""
    for part in ("1/2", "2/2"):
        reshard.convert_part(origin, origin.with_name("done"), part=part, tp_size=4)
    return origin.with_name("done.parts")


def left(out: Path) -> list[str]:
    return sorted(path.name for path in out.parent.glob(f"{out.name}.*"))


def sweep_part(origin: Path, all_parts: Path, root: Path, whole: dict[str, Any], step: int) -> int:
    """Kill the second part before and after every `step`-th call, run it again, and finish. Returns the kills."""
    context, kills = server(), 0
    job = Job(str(origin), str(root / "first" / "out"), {"tp_size": 4, "part": "2/2"})
    code, calls, everything = until(context, job)
    assert code == 0
    for call, after in itertools.product(range(1, calls + 1, step), (False, True)):
        out = root / f"{call}-{after}" / "out"
        out.parent.mkdir()
        shutil.copytree(all_parts / "part-00001-of-00002", out.with_name("out.parts") / "part-00001-of-00002")
        job = Job(str(origin), str(out), {"tp_size": 4, "part": "2/2"})
        code, made, _ = until(context, job, call=call, after=after)
        assert code == KILLED or (code == 0 and made < call), (call, after, code, made)
        kills += code == KILLED
        if not (out.with_name("out.parts") / "part-00002-of-00002").exists():
            with pytest.raises(IntegrityError, match="part 2 of 2 is not done"):
                reshard.finish(out)
            assert not out.exists()
            code, _, written = until(context, job)
            assert code == 0, (call, after)
            assert written <= everything
        reshard.finish(out)
        assert tree(out) == whole, (call, after)
        assert left(out) == []
    return kills


def sweep_finish(all_parts: Path, root: Path, whole: dict[str, Any], step: int) -> int:
    """Kill `finish` before and after every `step`-th call, and run it again. Returns the kills."""
    context, kills = server(), 0

    def laid(name: str) -> Path:
        shutil.copytree(all_parts, root / name / "out.parts")
        return root / name / "out"

    code, calls, _ = until(context, Job(None, str(laid("first"))))
    assert code == 0
    for call, after in itertools.product(range(1, calls + 1, step), (False, True)):
        out = laid(f"{call}-{after}")
        code, _, _ = until(context, Job(None, str(out)), call=call, after=after)
        assert code == KILLED, (call, after, code)
        kills += 1
        assert not out.exists() or tree(out) == whole, (call, after)
        reshard.finish(out)
        assert tree(out) == whole, (call, after)
        assert left(out) == []
    return kills


@pytest.mark.fault(1, 33)
def test_a_part_that_is_killed(origin: Path, all_parts: Path, tmp_path: Path, whole: dict[str, Any]) -> None:
    assert sweep_part(origin, all_parts, tmp_path, whole, STEP) > 8


@pytest.mark.fault(1, 33)
def test_a_finish_that_is_killed(all_parts: Path, tmp_path: Path, whole: dict[str, Any]) -> None:
    assert sweep_finish(all_parts, tmp_path, whole, STEP // 4) > 8


@pytest.mark.fault(1, 33)
@pytest.mark.slow
def test_killed_at_every_call(origin: Path, all_parts: Path, tmp_path: Path, whole: dict[str, Any]) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    print(sweep_part(origin, all_parts, tmp_path / "a", whole, 1), sweep_finish(all_parts, tmp_path / "b", whole, 1))


# --- eight processes, in any order, killed at random ---


def eight(origin: str, out: str, environment: dict[str, str], seed: int, kill: Callable[[random.Random], Any]) -> int:
    """Make eight parts, two at a time, each of which may be killed several times, while others try to finish. Returns
    the number of kills."""
    context, kills = server(), []

    def make(number: int) -> None:
        chance = random.Random(100 * seed + number)
        job = Job(origin, out, {"tp_size": 8, "part": f"{number}/8"}, environment)
        for attempt in range(20):
            code, _, _ = until(context, job, **(kill(chance) if attempt < 2 and chance.random() < 0.7 else {}))
            if code == 0:
                return
            assert code in (KILLED, BusyError.exit_code), (number, code)
            kills.append(number)
            if chance.random() < 0.2:
                assert until(context, Job(None, out, {}, environment))[0] in (0, 3, 4)  # 0: killed when it was done

    numbers = [*range(1, 9), 3, 6]  # these run twice, perhaps at once with themselves
    random.Random(seed).shuffle(numbers)
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(make, numbers))
    for _ in range(2):
        until(context, Job(None, out, {}, environment), **kill(random.Random(seed)))
    assert until(context, Job(None, out, {}, environment))[0] == 0
    return len(kills)


def of_eight(origin: Path) -> Path:
    one = origin.with_name("eight")
    if not one.exists():
        reshard.convert(origin, one, tp_size=8)
    return one


@pytest.mark.fault(1, 33)
@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 12))])
def test_eight_processes_and_kills(seed: int, origin: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    kills = eight(str(origin), str(out), {}, seed, lambda chance: {"call": chance.randrange(1, 120)})
    assert kills > 3
    assert tree(out) == tree(of_eight(origin))
    assert left(out) == []


@pytest.mark.fault(1, 33)
@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 6))])
def test_eight_processes_and_kills_into_a_store(seed: int, origin: Path, store: ObjectStore, tmp_path: Path) -> None:
    kills = eight(
        str(origin),
        "s3://bucket/out",
        store.environment(tmp_path),
        seed,
        lambda chance: {"seconds": chance.random() * 0.7},
    )
    assert kills > 0
    assert store.objects("out") == contents(of_eight(origin))
    assert store.unfinished() == 0 or kills


@pytest.mark.fault(22, 33)
def test_at_once_in_a_store(origin: Path, store: ObjectStore, tmp_path: Path) -> None:
    """The same part twice, then two that finish: neither replaces what the other sent, and both are told it is done."""
    context = server()

    def twice(job: Callable[[str], Job]) -> list[int]:
        """Do a job on two machines: each has a cache of its own."""
        with ThreadPoolExecutor(2) as pool:
            return [code for code, *_ in pool.map(lambda name: until(context, job(name)), ("a", "b"))]

    def machine(name: str) -> dict[str, str]:
        return store.environment(tmp_path / name)

    options = {"tp_size": 8}
    for part in ("1/2", "2/2"):
        made = twice(lambda name: Job(str(origin), "s3://bucket/out", {**options, "part": part}, machine(name)))  # noqa: B023
        assert made == [0, 0]
    puts = [call.path for call in store.log if call.method == "PUT" and call.path.endswith(".safetensors")]
    assert len(set(puts)) == 8
    assert twice(lambda name: Job(None, "s3://bucket/out", {}, machine(name))) == [0, 0]
    assert store.objects("out") == contents(of_eight(origin))


# --- at once ---


@pytest.fixture(scope="module")
def race() -> Iterator[tuple[Path, Any]]:
    with folder_in_memory() as room, racers() as race:
        yield room, race


KINDS = ["the same part", "two finish", "a part and finish", "two parts"]


def run(kind: str, locks: str, races: int, race: tuple[Path, Any], origin: Path, done: Path, whole: Any) -> None:
    room, start = race
    first, second = (Work(origin, 4, part=part) for part in ("1/2", "2/2"))
    finish = Work(origin, 0)
    works = {
        "the same part": (first, first),
        "two finish": (finish, finish),
        "a part and finish": (first, finish),
        "two parts": (first, second),
    }[kind]
    for seed in range(races):
        root = Path(tempfile.mkdtemp(dir=room)) / "race"
        root.mkdir()
        kept = {"the same part": [], "two parts": []}.get(kind, ["part-00001-of-00002", "part-00002-of-00002"])
        for name in kept:
            shutil.copytree(done / name, root / "out.parts" / name)
        ends = start(works, root / "out", locks, seed)
        codes = sorted(code for code, _ in ends)
        assert codes in ([0, 0], *([[0, BusyError.exit_code]] if kind == "the same part" else [])), (seed, ends)
        for part in ("1/2", "2/2"):
            reshard.convert_part(origin, root / "out", part=part, tp_size=4)
        reshard.finish(root / "out")
        assert tree(root) == {"out": tree(root)["out"], **{f"out/{name}": data for name, data in whole.items()}}, seed
        shutil.rmtree(root)


@pytest.mark.fault(22, 33)
@pytest.mark.parametrize("locks", LOCKS)
@pytest.mark.parametrize("kind", KINDS)
def test_at_once(
    kind: str, locks: str, race: tuple[Path, Any], origin: Path, all_parts: Path, whole: dict[str, Any]
) -> None:
    run(kind, locks, RACES, race, origin, all_parts, whole)


@pytest.mark.fault(22, 33)
@pytest.mark.slow
@pytest.mark.parametrize("locks", LOCKS)
@pytest.mark.parametrize("kind", KINDS)
def test_at_once_many_times(
    kind: str, locks: str, race: tuple[Path, Any], origin: Path, all_parts: Path, whole: dict[str, Any]
) -> None:
    run(kind, locks, 40, race, origin, all_parts, whole)


# --- power loss ---


def lost_power(origin: Path, all_parts: Path, room: Path, whole: dict[str, Any], often: int) -> int:
    """Check every state that a power loss during `finish` can leave. Returns their number."""
    root = room / "recorded"
    put({"out.parts": taken(all_parts)}, root)
    start, steps = record(root, lambda: reshard.finish(root / "out", workers=1))
    assert tree(root / "out") == whole
    expected = taken(root / "out")
    shutil.rmtree(root)
    seen = 0
    with already_planned(reshard.plan(origin, tp_size=4)):
        for state in states(start, steps, often=often):
            seen += 1
            assert state.get("out") in (None, expected), sorted(state["out"])
            put(state, room / "state")
            for part in ("1/2", "2/2"):
                reshard.convert_part(origin, room / "state" / "out", part=part, tp_size=4)
            reshard.finish(room / "state" / "out")
            assert taken(room / "state") == {"out": expected}
            shutil.rmtree(room / "state")
    done = list(states(start, steps, first=len(steps)))
    assert done
    assert all(state["out"] == expected for state in done)
    return seen


@pytest.mark.fault(2, 33)
def test_power_loss(origin: Path, all_parts: Path, room: Path, whole: dict[str, Any]) -> None:
    assert lost_power(origin, all_parts, room, whole, OFTEN) > 50


@pytest.mark.fault(2, 33)
@pytest.mark.slow
def test_power_loss_in_every_state(origin: Path, all_parts: Path, room: Path, whole: dict[str, Any]) -> None:
    print(lost_power(origin, all_parts, room, whole, 1), "states")


@pytest.mark.fault(2, 33)
def test_parts_that_did_not_wait_for_the_disk(origin: Path, room: Path) -> None:
    """`finish` waits for all: when it is done, so is the folder."""
    root = room / "hurried"
    root.mkdir()

    def hurry() -> None:
        for part in ("1/2", "2/2"):
            reshard.convert_part(origin, root / "out", part=part, tp_size=4, workers=1, sync=False)
        reshard.finish(root / "out", workers=1)

    with already_planned(reshard.plan(origin, tp_size=4)):
        start, steps = record(root, hurry)
    expected = taken(root / "out")
    after = list(states(start, steps, first=len(steps)))
    assert after
    assert all(state["out"] == expected for state in after)
    shutil.rmtree(root)


@pytest.mark.fault(2, 33)
def test_a_part_that_is_done_is_on_disk(origin: Path, room: Path) -> None:
    root = room / "part"
    root.mkdir()
    with already_planned(reshard.plan(origin, tp_size=4)):
        start, steps = record(
            root, lambda: reshard.convert_part(origin, root / "out", part="1/2", tp_size=4, workers=1)
        )
    name = "part-00001-of-00002"
    expected = taken(root / "out.parts" / name)
    after = list(states(start, steps, first=len(steps)))
    assert after
    assert all(state["out.parts"][name] == expected for state in after)
    shutil.rmtree(root)
    assert os.listdir(room) == []
