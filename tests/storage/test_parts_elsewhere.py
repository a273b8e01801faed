"""Parts from the Hub fetch only the bytes that they need; parts into a store leave what one run would."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
from cli_tools import Checkpoint, tree
from fake_hub import FakeHub, faults
from object_store import ObjectStore, contents, kept

import reshard
from reshard.errors import DestinationExistsError, IntegrityError, NetworkError, UsageError, VersionError
from reshard.execution.parts import share as shares
from reshard.execution.parts.gathering import gathering
from reshard.operations.convert import work
from reshard.process import silent

WEIGHTS = re.compile(r"GET /org/model/resolve/[^/]+/model-.*\.safetensors")


@pytest.fixture
def published(here: FakeHub, checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    """The Hub of this process, with a llama in three files of which spans are small."""
    monkeypatch.setattr(shares, "_GAP", 0)
    here.create("org/model", contents(checkpoint("llama")))
    return here


def asked(hub: FakeHub) -> int:
    """Return the bytes of weights that were asked for since the last time, those of headers not counted."""
    found = 0
    for request in hub.requests:
        span = re.fullmatch(r"bytes=(\d+)-(\d+)", request.headers.get("range", ""))
        if WEIGHTS.fullmatch(str(request)) and span and (int(span[1]), int(span[2])) != (0, 16383):
            found += int(span[2]) + 1 - int(span[1])
    hub.requests.clear()
    return found


def bytes_of(names: frozenset[str], folder: Path) -> int:
    return sum((folder / name).stat().st_size for name in names)


def test_a_part_fetches_what_it_needs(published: FakeHub, checkpoint: Checkpoint, home: Path, tmp_path: Path) -> None:
    """The digest of each source file is made by one part, which fetches the whole of it."""
    out, sizes = tmp_path / "out", bytes_of(frozenset(contents(checkpoint("llama"))), checkpoint("llama"))
    planned = reshard.plan("org/model", tp_size=4)
    by_spans = []
    for number in (3, 1, 4, 2):
        published.requests.clear()
        share = shares.share_of(shares.Part(number, 4), reshard.planning.plan.plan_layouts(planned), 4, planned.source)
        report = reshard.convert_part("org/model", out, part=f"{number}/4", tp_size=4)
        assert report.fetched == share.read < sizes
        in_part = [spans for name, spans in share.spans.items() if len(spans) > 1]
        by_spans.append(bool(in_part))
        assert asked(published) == sum(end - start for spans in in_part for start, end in spans)
    assert all(by_spans)
    reshard.finish(out)
    assert not list(home.rglob("*.safetensors"))
    reshard.convert("org/model", tmp_path / "one", tp_size=4)
    assert tree(out) == tree(tmp_path / "one")
    assert not list(tmp_path.glob("out.*"))


def test_one_machine_has_the_files_in_its_cache(published: FakeHub, tmp_path: Path) -> None:
    """The commit says that the files are the same, not the times of copies."""
    reshard.convert_part("org/model", tmp_path / "out", part="1/2", tp_size=2)
    reshard.convert("org/model", tmp_path / "one", tp_size=2, keep_cache=True)
    published.requests.clear()
    report = reshard.convert_part("org/model", tmp_path / "out", part="2/2", tp_size=2)
    assert report.fetched == 0
    assert asked(published) == 0
    reshard.finish(tmp_path / "out")
    assert tree(tmp_path / "out") == tree(tmp_path / "one")


@pytest.mark.parametrize("options", [{"dtype": "bfloat16"}, {"drop_unused": True}, {"quantize": "int8"}], ids=str)
def test_what_cannot_be_given_back_is_fetched_whole(
    options: dict[str, object], published: FakeHub, source: Path, tmp_path: Path
) -> None:
    for number in (1, 2):
        reshard.convert_part("org/model", tmp_path / "out", part=f"{number}/2", tp_size=2, **options)  # type: ignore[arg-type]
        if "drop_unused" not in options:  # it drops nothing here, so all is given back
            assert asked(published) == 0
    reshard.finish(tmp_path / "out")
    reshard.convert("org/model", tmp_path / "one", tp_size=2, **options)  # type: ignore[arg-type]
    assert tree(tmp_path / "out") == tree(tmp_path / "one")


@pytest.mark.fault(16, 33)
def test_wrong_bytes_in_a_span(published: FakeHub, tmp_path: Path) -> None:
    """No digest tells while they come. What the rank files give back tells when all parts are there."""
    published.fail("GET /org/model/resolve.*model-00003", faults.corrupt(), times=40)
    reshard.convert_part("org/model", tmp_path / "out", part="1/4", tp_size=4)
    assert published.faults_left < 40
    published.recover()
    for number in (2, 3, 4):
        reshard.convert_part("org/model", tmp_path / "out", part=f"{number}/4", tp_size=4)
    with pytest.raises(IntegrityError, match=r"bytes of model-00003.* did not arrive intact") as refused:
        reshard.finish(tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert f"remove {tmp_path / 'out.parts'}" in str(refused.value.hint)
    shutil.rmtree(tmp_path / "out.parts")
    for number in (2, 3, 4, 1):
        reshard.convert_part("org/model", tmp_path / "out", part=f"{number}/4", tp_size=4)
    assert reshard.finish(tmp_path / "out").repo_id == "org/model"


@pytest.mark.fault(18)
def test_a_hub_that_fails_in_a_span(published: FakeHub, tmp_path: Path) -> None:
    published.fail("GET /org/model/resolve.*model-00003", faults.status(503), times=1000)
    with pytest.raises(NetworkError):
        reshard.convert_part("org/model", tmp_path / "out", part="1/4", tp_size=4)
    published.recover()
    for number in (1, 2, 3, 4):
        reshard.convert_part("org/model", tmp_path / "out", part=f"{number}/4", tp_size=4)
    reshard.finish(tmp_path / "out")
    assert not list(tmp_path.glob("out.*"))


def test_parts_of_two_commits(published: FakeHub, tmp_path: Path, checkpoint: Checkpoint) -> None:
    reshard.convert_part("org/model", tmp_path / "out", part="1/2", tp_size=2)
    published.repos["org/model"].commit({"note.txt": b"new"})
    with pytest.raises(IntegrityError, match="part 2 of 2 is of another source than part 1"):
        reshard.convert_part("org/model", tmp_path / "out", part="2/2", tp_size=2)


# --- into a store ---


OUT = "s3://bucket/out"


def test_into_a_store(store: ObjectStore, stored_source: str, checkpoint: Checkpoint, tmp_path: Path) -> None:
    """`reshard.json` comes last, and nothing of the parts stays."""
    for number in (2, 3, 1):
        report = reshard.convert_part(stored_source, OUT, part=f"{number}/3", tp_size=4)
        assert not report.done
        assert "reshard.json" not in store.objects("out")
    assert reshard.convert_part(stored_source, OUT, part="2/3", tp_size=4).done
    store.log.clear()
    reshard.finish(OUT)
    read = sum(call.bytes[1] - call.bytes[0] for call in store.calls("GET", ".safetensors") if call.bytes)
    reshard.convert(stored_source, tmp_path / "one", tp_size=4)
    assert store.objects("out") == contents(tmp_path / "one")
    size = sum(path.stat().st_size for path in tmp_path.glob("one/shard-*"))
    assert size <= read <= size + 4 * 8  # each byte once
    assert not kept(tmp_path)
    assert reshard.finish(OUT) == reshard.inspect(OUT)
    assert reshard.convert_part(checkpoint("llama"), OUT, part="1/3", tp_size=4).done
    with pytest.raises(DestinationExistsError, match="is not known to be of this source"):
        reshard.convert_part(stored_source, OUT, part="1/3", tp_size=4)  # a store tells no digest of what it has
    assert store.objects("out") == contents(tmp_path / "one")


@pytest.mark.fault(33)
@pytest.mark.parametrize("lost", ["shard-00002-model-00001-of-00001.safetensors", "config.json"])
def test_a_file_in_a_store_that_was_damaged(lost: str, store: ObjectStore, stored_source: str, tmp_path: Path) -> None:
    for number in (1, 2):
        reshard.convert_part(stored_source, OUT, part=f"{number}/2", tp_size=4)
    data = store.objects("out")[lost]
    store.put("out", {lost: data[:-1] + bytes([data[-1] ^ 1])})
    with pytest.raises(IntegrityError, match=f"{lost}: .*altered") as refused:
        reshard.finish(OUT)
    assert refused.value.hint == "remove that file, and run part 1 again"
    store.client.delete_object(Bucket="bucket", Key=f"out/{lost}")
    with pytest.raises(IntegrityError, match=f"part 1 of 2 lacks {lost}"):
        reshard.finish(OUT)
    assert not reshard.convert_part(stored_source, OUT, part="1/2", tp_size=4).done
    reshard.finish(OUT)
    reshard.convert(stored_source, tmp_path / "one", tp_size=4)
    assert store.objects("out") == contents(tmp_path / "one")


@pytest.mark.fault(33)
def test_what_is_in_the_way_in_a_store(
    store: ObjectStore, stored_source: str, checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(DestinationExistsError, match="holds files of something else"):
        reshard.convert_part(checkpoint("llama"), stored_source, part="1/2", tp_size=2)
    with pytest.raises(UsageError, match="a store cannot be read again"):
        reshard.convert_part(stored_source, OUT, part="1/2", tp_size=2, quantize="int8")
    reshard.convert_part(stored_source, OUT, part="1/2", tp_size=2)
    with monkeypatch.context() as patch:
        patch.setattr(work, "__version__", "9.9")
        with pytest.raises(VersionError, match=r"part 2 of 2 is made by reshard 9\.9"):
            reshard.convert_part(stored_source, OUT, part="2/2", tp_size=2)
    store.put("out", {"shard-00002-model-00001-of-00001.safetensors": b"mine"})
    with pytest.raises(DestinationExistsError, match="holds another shard-00002"):
        reshard.convert_part(stored_source, OUT, part="2/2", tp_size=2)
    store.client.delete_object(Bucket="bucket", Key="out/shard-00002-model-00001-of-00001.safetensors")
    store.put("out", {"mine.txt": b"mine"})
    reshard.convert_part(stored_source, OUT, part="2/2", tp_size=2)
    with pytest.raises(IntegrityError, match=r"holds what is of no part: mine\.txt"):
        reshard.finish(OUT)
    store.client.delete_object(Bucket="bucket", Key="out/mine.txt")
    reshard.finish(OUT)
    with pytest.raises(DestinationExistsError, match="already exists"):
        reshard.convert_part(stored_source, OUT, part="1/3", tp_size=4)


@pytest.mark.fault(33)
def test_a_record_too_many_after_the_end(store: ObjectStore, stored_source: str, tmp_path: Path) -> None:
    """A part that runs twice can end after the folder is finished: finishing again removes what it left."""
    for number in (1, 2):
        reshard.convert_part(stored_source, OUT, part=f"{number}/2", tp_size=2)
    late = {name: data for name, data in store.objects("out").items() if name.startswith(".reshard-")}
    assert len(late) == 3
    reshard.finish(OUT)
    whole = store.objects("out")
    store.put("out", late)
    assert gathering(OUT, progress=silent).records()
    reshard.finish(OUT)
    assert store.objects("out") == whole
