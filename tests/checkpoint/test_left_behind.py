"""Files that go along with a checkpoint through every command, and what is said of the rest."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import old_reader
import pytest
import torch
from cli_tools import Cli, Refused, convert, flip, reseal
from fake_hub import FakeHub
from object_store import ObjectStore

import reshard
from reshard.errors import IntegrityError, NetworkError, PolicyError
from reshard.execution import destination
from reshard.storage.hub.files import HubFiles
from reshard.storage.locate import locate
from runtime.distributed.agreement import Deadline
from runtime.loading.locate import locate_together

TEMPLATE = "additional_chat_templates/rag.jinja"
ALONG = {
    TEMPLATE: b"RAG {{ messages[0].content }}",
    "additional_chat_templates/tool_use.jinja": b"TOOLS",
    "source.spm": b"\n\x0e\n\x05<unk>",
    "bpe.codes": b"a b\n",
    "COPYING": b"As you like.\n",
    "licenses/LICENSE.txt": b"As they like.\n",
    "tokenizer_config.json": b'{"auto_map": {"AutoTokenizer": ["tokenization_x.XTokenizer", null]}}',
    "modules.json": b'[{"path": "", "type": "own.First"}, {"path": "2_Dense", "type": "models.Dense"}]',
}
BEHIND = {
    "tokenization_x.py": b"raise SystemExit('code was run')\n",
    "own.py": b"raise SystemExit('code was run')\n",
    "wandb/run-1/files/config.json": b"{}",
    "trainer_state.json": b"{}",
    ".env": b"TOKEN=hf_secret",
    "server.key": b"secret",
    "odd.model": b"\x80\x04.",
    "tokenizer.model": b"version https://git-lfs.github.com/spec/v1\n",
    "2_Dense/config.json": b"{}",
    "2_Dense/model.safetensors": b"junk",
    "tp4/config.json": b"{}",
    "tp4/reshard.json": b"{}",
    "assets/a.wav": b"RIFF",
    "assets/b.wav": b"RIFF",
}
LEFT = {
    "tokenization_x.py": "code",
    "own.py": "code",
    "wandb/": "a record of training",
    "trainer_state.json": "a record of training",
    ".env": "hidden",
    "server.key": "may be a key or a password",
    "odd.model": "pickled",
    "tokenizer.model": "only a pointer of git-lfs: git lfs pull fetches it",
    "2_Dense/": "another part of a model, or another model",
    "tp4/": "another part of a model, or another model",
    "assets/a.wav": "of no known kind: --include PATTERN takes it along",
    "assets/b.wav": "of no known kind: --include PATTERN takes it along",
}
NAMED = {
    "tokenization_x.py": ["tokenizer_config.json"],
    "own.py": ["modules.json"],
    "2_Dense/": ["modules.json"],
}


def put(folder: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    """Return every file by its path."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def companions(folder: Path) -> dict[str, bytes]:
    """Return the files that are not the model itself."""
    own = (".safetensors", "reshard.json", "index.json", "config.json")
    return {name: data for name, data in contents(folder).items() if not name.endswith(own)}


EXPECTED = {name: data for name, data in ALONG.items() if not name.endswith("config.json")}


@pytest.fixture(scope="module")
def full(checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A llama with every kind of companion file. Read only."""
    source = shutil.copytree(checkpoint("llama"), tmp_path_factory.mktemp("full") / "source")
    return put(source, {**ALONG, **BEHIND})


@pytest.fixture(scope="module")
def made(full: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The full checkpoint on two ranks. Read only."""
    out = tmp_path_factory.mktemp("full") / "out"
    reshard.convert(full, out, tp_size=2)
    return out


@pytest.mark.fault(37)
def test_convert_copies_what_is_known_and_says_what_is_not(full: Path, made: Path, cli: Cli, out: Path) -> None:
    result = cli(*convert(full, out, "--format", "json"), seconds=60, aloud=True)
    assert result.code == 0
    assert contents(out) == contents(made)
    assert companions(out) == EXPECTED
    assert (out / "tokenizer_config.json").read_bytes() == ALONG["tokenizer_config.json"]
    found = json.loads(result.out)["left_behind"]
    assert {entry["path"]: entry["why"] for entry in found} == LEFT
    assert {entry["path"]: entry["named_by"] for entry in found if entry["named_by"]} == NAMED
    (line,) = (line for line in result.err.splitlines() if line.startswith("left behind: "))
    for name in ("own.py, tokenization_x.py (code)", "assets/ (of no known kind: --include", "tp4/"):
        assert name in line
    assert "; tokenizer_config.json names tokenization_x.py, which OUT lacks" in line
    assert "; modules.json names 2_Dense/, own.py, which OUT lacks" in line


@pytest.mark.fault(37)
def test_the_plan_says_it_too(full: Path, cli: Cli, out: Path) -> None:
    for command in (["plan", full, "--tp-size", 2], convert(full, out, "--dry-run")):
        assert "left behind: " in cli(*command, seconds=60).out
        report = json.loads(cli(*command, "--format", "json", seconds=60).out)
        assert {entry["path"]: entry["why"] for entry in report["left_behind"]} == LEFT
        assert any(note.startswith("left behind: ") for note in report["notes"])


def test_nothing_is_said_where_all_goes_along(source: Path, out: Path, cli: Cli) -> None:
    put(source, {**EXPECTED, ".gitattributes": b"*.model filter=lfs\n", ".cache/huggingface/x": b""})
    result = cli(*convert(source, out), seconds=60, aloud=True)
    assert result.code == 0
    assert "left behind" not in result.err


@pytest.mark.fault(37)
def test_for_other_ranks_and_back(full: Path, made: Path, tmp_path: Path) -> None:
    """N→M gives the bytes of a conversion from the source; merge restores all files that went along."""
    reshard.convert(made, tmp_path / "from-out", tp_size=4)
    reshard.convert(full, tmp_path / "from-source", tp_size=4)
    assert contents(tmp_path / "from-out") == contents(tmp_path / "from-source")
    reshard.merge(made, tmp_path / "merged")
    expected = {name: data for name, data in contents(full).items() if name not in BEHIND}
    merged = contents(tmp_path / "merged")
    assert merged.keys() == expected.keys()
    assert {name for name in merged if merged[name] != expected[name]} <= {"model.safetensors.index.json"}


@pytest.mark.fault(37)
def test_include(full: Path, out: Path, cli: Cli, tmp_path: Path) -> None:
    """Code, keys and pickles are never included, whatever the pattern says."""
    result = cli(
        *convert(full, out, "--include", "assets/", "--include", "*.py", "--include", "*.key"), seconds=60, aloud=True
    )
    assert result.code == 0
    assert companions(out) == EXPECTED | {name: BEHIND[name] for name in ("assets/a.wav", "assets/b.wav")}
    assert "own.py, tokenization_x.py (code)" in result.err
    assert "server.key (may be a key" in result.err
    reshard.verify(out)
    reshard.convert(out, tmp_path / "again", tp_size=1, include=["assets/*"])
    assert companions(tmp_path / "again") == companions(out)


def test_a_pattern_in_vain(full: Path, made: Path, refused: Refused, tmp_path: Path) -> None:
    refused(2, convert(full, tmp_path / "out", "--include", "*.mp3"), "--include *.mp3: matches no file")
    refused(2, ["plan", made, "--tp-size", 2, "--include", "*.py"], "--include *.py: matches no file")


@pytest.mark.fault(37)
def test_verify_looks_into_folders(made: Path, cli: Cli, out: Path) -> None:
    def check(spoil: Callable[[Path], Any], words: str) -> None:
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(made, out)
        spoil(out)
        with pytest.raises(IntegrityError, match=words):
            reshard.verify(out)

    shutil.copytree(made, out)
    assert reshard.verify(out).files == len(contents(made)) - 1
    check(lambda out: flip(out / TEMPLATE, 3), rf"{TEMPLATE}: its content was altered")
    check(lambda out: (out / TEMPLATE).unlink(), rf"{TEMPLATE}: is missing")
    check(lambda out: put(out, {"licenses/more": b""}), "licenses/more: does not belong")
    check(lambda out: put(out, {"more/LICENSE": b""}), "more: does not belong")
    check(lambda out: ((out / "licenses").rename(out.parent / "l"), (out / "licenses").symlink_to("../l")), "licenses")


@pytest.mark.fault(23)
def test_a_reader_that_knows_no_folders_in_it_refuses(made: Path, resharded: Path, out: Path) -> None:
    """An old reader refuses the version, not a damaged folder; without subfolders the version stays 2.0."""
    content = json.loads((made / "reshard.json").read_text())
    assert (content["format_version"], content["requires"]) == ("3.0", ["subfolders"])
    code, line = old_reader.read("2.0", made)
    assert (code, "3.0" in line) == (8, True), line
    assert json.loads((resharded / "reshard.json").read_text())["format_version"] == "2.0"


def test_folders_reach_the_disk(full: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[str] = []
    monkeypatch.setattr(destination, "sync_folder", lambda folder: synced.append(Path(folder).name))
    reshard.convert(full, out, tp_size=2)
    assert {"additional_chat_templates", "licenses"} <= set(synced)
    last = synced.index("licenses")
    assert any(name.startswith("out.part-") for name in synced[last:])  # their parent folder comes later


@pytest.mark.fault(12)
@pytest.mark.parametrize("name", ["../x", "a/../../x", "/x", "a//x", "a/./x", ".git/config", "a/.git/x", "a\\..\\x/y"])
def test_a_manifest_leads_nowhere(name: str, made: Path, out: Path, tmp_path: Path) -> None:
    shutil.copytree(made, out)
    (out / ".git").mkdir()
    (out / ".git" / "config").write_bytes(ALONG[TEMPLATE])

    def rename(content: dict[str, Any]) -> None:
        next(entry for entry in content["extras"] if entry["file"] == TEMPLATE)["file"] = name

    reseal(out, rename)
    for command in (
        lambda: reshard.verify(out),
        lambda: reshard.merge(out, tmp_path / "merged"),
        lambda: reshard.convert(out, tmp_path / "again", tp_size=4),
    ):
        with pytest.raises((PolicyError, IntegrityError)):
            command()
    assert sorted(path.name for path in tmp_path.iterdir() if not path.name.endswith(".lock")) == ["out"]


@pytest.mark.fault(37)
def test_from_the_hub(here: FakeHub, full: Path, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The files that a local conversion takes are fetched, and no others; offline it goes by the cache."""
    here.create("org/model", contents(full))
    manifest = reshard.convert("org/model", tmp_path / "out", tp_size=2, keep_cache=True)
    assert contents(tmp_path / "out").keys() == contents(made).keys()
    assert companions(tmp_path / "out") == EXPECTED
    assert {entry.path: entry.why for entry in manifest.left} == LEFT
    looked_into = {"odd.model", "tokenizer.model"}
    assert here.asked("org/model") == contents(full).keys() - (BEHIND.keys() - looked_into)
    here.requests.clear()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    reshard.convert("org/model", tmp_path / "again", tp_size=2)
    assert contents(tmp_path / "again") == contents(tmp_path / "out")
    assert here.requests == []


def test_without_a_list_of_the_repo(
    here: FakeHub, home: Path, full: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Offline, only the cache is known; online, a missing list is an error, so that no file is left behind silently."""
    here.create("org/model", contents(full))
    reshard.convert("org/model", tmp_path / "out", tp_size=2, keep_cache=True)
    for lists in home.rglob("trees"):
        shutil.rmtree(lists)

    def fail(self: Any) -> None:
        raise NetworkError("the Hub gives no list")

    monkeypatch.setattr(HubFiles, "items", fail)
    with pytest.raises(NetworkError, match="no list"):
        reshard.plan("org/model", tp_size=2)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    reshard.convert("org/model", tmp_path / "again", tp_size=2)
    assert contents(tmp_path / "again") == contents(tmp_path / "out")


def test_a_snapshot_in_the_hub_s_cache(here: FakeHub, full: Path, tmp_path: Path) -> None:
    """A snapshot is like a local folder whose files are links into the cache's own blobs."""
    here.create("org/model", contents(full))
    root = reshard.plan("org/model", tp_size=2).source.root
    assert (root / TEMPLATE).is_symlink()
    reshard.convert("org/model", tmp_path / "out", tp_size=2, keep_cache=True)
    reshard.convert(root, tmp_path / "again", tp_size=2)
    assert companions(tmp_path / "again") == EXPECTED


@pytest.mark.fault(37)
def test_a_load_fetches_and_checks_them(here: FakeHub, made: Path) -> None:
    here.create("org/model", contents(made))

    def locate_all() -> Path:
        store, end = torch.distributed.HashStore(), Deadline.after(60)
        return locate_together(
            "org/model", revision=None, first=True, rank=0, world_size=2, digests=True, store=store, deadline=end
        ).folder

    folder = locate_all()
    assert companions(folder) == EXPECTED
    assert not (folder / "shard-00002-model-00001-of-00001.safetensors").exists()
    blob = (folder / TEMPLATE).resolve()
    flip(blob, 2)
    with pytest.raises(IntegrityError, match=TEMPLATE):
        locate_all()
    assert (locate_all() / TEMPLATE).read_bytes() == ALONG[TEMPLATE]  # it was dropped and fetched again


def test_from_the_hub_with_more(here: FakeHub, full: Path, tmp_path: Path) -> None:
    here.create("org/model", {f"deep/inside/{name}": data for name, data in contents(full).items()})
    planned = reshard.plan("org/model/deep/inside", tp_size=2, include=["*.wav"])
    assert {"assets/a.wav", TEMPLATE} <= set(planned.source.extras)
    assert not [name for name in here.asked("org/model") if name.endswith((".py", ".key", "trainer_state.json"))]


@pytest.mark.fault(37)
def test_published_and_pulled(here: FakeHub, made: Path, resharded: Path, tmp_path: Path) -> None:
    """A template that is gone is removed from the repo; files of others stay and are not replaced."""
    reshard.publish(made, "org/model/tp2", private=True)
    there = here.repos["org/model"].files
    assert {name: there[f"tp2/{name}"] for name in contents(made)} == contents(made)
    folder = reshard.pull("org/model/tp2", ranks=[1], to=tmp_path / "to")
    assert contents(folder).keys() == contents(made).keys() - {"shard-00001-model-00001-of-00001.safetensors"}
    assert (folder / TEMPLATE).read_bytes() == ALONG[TEMPLATE]
    reshard.merge("org/model/tp2", tmp_path / "merged")
    assert companions(tmp_path / "merged") == EXPECTED
    done = reshard.publish(resharded, "org/model/tp2", private=True)
    assert f"tp2/{TEMPLATE}" in done.deleted
    assert f"tp2/{TEMPLATE}" not in here.repos["org/model"].files


def test_another_s_file_in_a_folder_is_not_replaced(here: FakeHub, made: Path) -> None:
    here.create("org/model", {f"tp2/{TEMPLATE}": b"another"})
    with pytest.raises(reshard.ReshardError, match="other files of these names"):
        reshard.publish(made, "org/model/tp2", licence="mit")


@pytest.mark.fault(37)
def test_stores(store: ObjectStore, full: Path, made: Path, tmp_path: Path) -> None:
    """A store works as a source, as OUT, and OUT as a source again."""
    source = store.put("llama", contents(full))
    manifest = reshard.convert(source, "s3://bucket/out", tp_size=2)
    assert store.objects("out") == contents(made)
    assert {entry.path: entry.why for entry in manifest.left} == LEFT
    asked = {call.path for call in store.calls("GET", "") if call.path.startswith("bucket/llama/")}
    unread = BEHIND.keys() - {"odd.model", "tokenizer.model"}
    assert not asked & {f"bucket/llama/{name}" for name in unread}
    reshard.convert("s3://bucket/out", tmp_path / "again", tp_size=2)
    assert companions(tmp_path / "again") == EXPECTED
    assert (reshard.pull("s3://bucket/out", ranks=[0]) / TEMPLATE).read_bytes() == ALONG[TEMPLATE]


def test_a_change_in_a_folder_is_another_version_of_the_source(store: ObjectStore, full: Path) -> None:
    source = store.put("llama", contents(full))
    _, _, before = locate(source)
    store.put("llama", {TEMPLATE: b"changed"})
    _, _, after = locate(source)
    assert before != after
    assert reshard.plan(source, tp_size=2).source.root.joinpath(TEMPLATE).read_bytes() == b"changed"


def test_a_conversion_into_the_source_s_own_folder(source: Path, out: Path) -> None:
    """Unfinished work beside it, or left by a failed run, does not count as a file of the source."""
    put(source, {"tp4.part-0123456789abcdef-01234567/config.json": b"{}", "tp4.lock": b""})
    manifest = reshard.convert(source, source / "tp4", tp_size=4)
    assert manifest.left == ()
    again = reshard.convert(source, out, tp_size=2)
    assert [entry.path for entry in again.left] == ["tp4/"]


def test_a_key_in_what_cannot_be_left_behind(source: Path, out: Path, cli: Cli, refused: Refused) -> None:
    """Nothing is published by accident; commands that copy nothing go on."""
    convert_it = convert(source, out)
    assert cli(*convert_it).code == 0
    config = source / "config.json"
    config.write_text(config.read_text().replace("{", '{"use_auth_token": "hf_' + "aB" * 17 + '",', 1))
    for line in (["plan", source, "-tp", 2], convert(source, out.with_name("other"))):
        refused(11, line, "config.json: may be a key or a password")
    assert cli("verify", out, "--against", source).code == 0


def test_what_is_not_of_a_folder_is_not_replaced_with_it(source: Path, out: Path, cli: Cli, refused: Refused) -> None:
    again = [*convert(source, out), "--overwrite"]
    assert cli(*convert(source, out)).code == 0
    refused(2, ["merge", out, out / "mine"], "is inside a resharded folder", hint="choose a folder outside")
    refused(2, convert(source, out / "mine" / "tp2"), "is inside a resharded folder")
    for name in ("more.safetensors", "mine/notes.txt"):
        (out / name).parent.mkdir(exist_ok=True)
        (out / name).write_text("mine")
        refused(7, again, "holds what is not part of it", hint="move that elsewhere")
        (out / name).unlink()
    (out / "mine").rmdir()
    assert cli(*again).code == 0
