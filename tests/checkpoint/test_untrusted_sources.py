"""Sources that nobody vouches for: cut anywhere, leading elsewhere, at odds with themselves. Nothing else is opened."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pico
import pytest
from cli_tools import (
    FIRST,
    INDEX,
    Checkpoint,
    Cli,
    Refused,
    assert_no_controls,
    convert,
    fifo,
    first_file,
    link,
    rewrite,
    single_file,
    weight_map,
)
from executor_tools import load
from pico import TINY

from reshard.checkpoint.source import open_source
from reshard.errors import BadInputError
from reshard.files.header import read_header

# --- cut short ---


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of one file with a few kilobytes."""
    folder = tmp_path_factory.mktemp("cut") / "tiny"
    return single_file(pico.save("llama", folder, **TINY))


@pytest.mark.fault(8)
def test_every_length(tiny: Path) -> None:
    path = tiny / "model.safetensors"
    data = path.read_bytes()
    try:
        for length in range(len(data)):
            path.write_bytes(data[:length])
            with pytest.raises(BadInputError, match=r"model\.safetensors"):
                open_source(tiny)
    finally:
        path.write_bytes(data)
    assert open_source(tiny).files[0].size == len(data)


@pytest.mark.fault(8)
def test_convert_at_every_boundary(tiny: Path, tmp_path: Path, refused: Refused) -> None:
    """The file is cut at the end of the length, the header and each tensor, and one byte before and after."""
    source = Path(shutil.copytree(tiny, tmp_path / "source"))
    path = source / "model.safetensors"
    data, header = path.read_bytes(), read_header(path, file="")
    for boundary in (0, 8, header.data_start, *(info.end for info in header.tensors)):
        for length in {max(boundary - 1, 0), boundary, boundary + 1} - {len(data), len(data) + 1}:
            path.write_bytes(data[:length])
            refused(3, convert(source, tmp_path / "out"), "model.safetensors")


# --- leading elsewhere: the real command line, and what it opens ---


PLANTED = "planted"  # part of the name of every file that must not be opened


def _plant(source: Path) -> Path:
    """Put another checkpoint's file outside the source."""
    target = source.parent / f"{PLANTED}.safetensors"
    shutil.copy(first_file(source), target)
    return target


def _link_through_folder(source: Path) -> None:
    outside = source.parent / f"{PLANTED}-folder"
    outside.mkdir()
    first_file(source).rename(outside / FIRST)
    (source / "inner").symlink_to(outside)
    first_file(source).symlink_to("inner/" + FIRST)


def _chain(source: Path) -> None:
    link(first_file(source), _plant(source))
    first_file(source).rename(source / "hop")
    first_file(source).symlink_to("hop")


def _loop(source: Path) -> None:
    first_file(source).unlink()
    first_file(source).symlink_to(FIRST)


def _socket(source: Path) -> None:
    first_file(source).unlink()
    here = os.getcwd()
    os.chdir(source)  # the address of a socket must be short
    try:
        socket.socket(socket.AF_UNIX).bind(FIRST)
    finally:
        os.chdir(here)


def _device(source: Path) -> None:
    first_file(source).unlink()
    try:
        os.mknod(first_file(source), 0o600 | 0o020000, os.makedev(1, 5))  # /dev/zero
    except PermissionError:
        pytest.skip("making a device takes root")


def _index_to(source: Path, name: str) -> None:
    _plant(source)
    weight_map(source, lambda found: found.update({"lm_head.weight": name}))


def _index_through_folder(source: Path) -> None:
    _link_through_folder(source)
    first_file(source).unlink()
    weight_map(source, lambda found: found.update({name: f"inner/{FIRST}" for name in found if found[name] == FIRST}))


def _extra(source: Path, make: Callable[[Path], object]) -> None:
    (source / "LICENSE").write_text("")
    make(source / "LICENSE")


def _extra_through_folder(source: Path) -> None:
    outside = source.parent / f"{PLANTED}-folder"
    outside.mkdir()
    (outside / "LICENSE").write_text("")
    (source / "LICENSE").symlink_to(outside)


ELSEWHERE: dict[str, tuple[Callable[[Path], object], int]] = {
    "index with ..": (lambda s: _index_to(s, f"../{PLANTED}.safetensors"), 11),
    "index with an absolute path": (lambda s: _index_to(s, str(s.parent / f"{PLANTED}.safetensors")), 11),
    "index with ./..": (lambda s: _index_to(s, f"./../{PLANTED}.safetensors"), 11),
    "index with a folder": (lambda s: _index_to(s, f"inner/{PLANTED}.safetensors"), 3),
    "index with a folder that is a link out": (_index_through_folder, 11),
    "index with .. in a folder": (lambda s: _index_to(s, f"inner/../../{PLANTED}.safetensors"), 11),
    "index with a backslash": (lambda s: _index_to(s, f"..\\{PLANTED}.safetensors"), 11),
    "index with a NUL": (lambda s: _index_to(s, f"{FIRST}\0{PLANTED}.safetensors"), 11),
    "index with a lone surrogate": (lambda s: _index_to(s, f"\ud800{PLANTED}.safetensors"), 11),
    "index with bytes that are no text": (lambda s: _index_to(s, f"\udcff{PLANTED}.safetensors"), 3),
    "index with a name too long": (lambda s: _index_to(s, f"{'a' * 300}{PLANTED}.safetensors"), 3),
    "index with an empty name": (lambda s: _index_to(s, ""), 3),
    "index with ..safetensors": (lambda s: _index_to(s, "..safetensors"), 3),
    "link out": (lambda s: link(first_file(s), _plant(s)), 11),
    "link out through a folder": (_link_through_folder, 11),
    "chain of links out": (_chain, 11),
    "link to nothing": (lambda s: (first_file(s).unlink(), first_file(s).symlink_to(f"../{PLANTED}")), 3),
    "link to itself": (_loop, 3),
    "link to a device": (lambda s: (first_file(s).unlink(), first_file(s).symlink_to("/dev/zero")), 11),
    "config links out": (lambda s: link(s / "config.json", s.parent / f"{PLANTED}.json"), 11),
    "index links out": (lambda s: link(s / INDEX, s.parent / f"{PLANTED}.json"), 11),
    "extra links out": (lambda s: _extra(s, lambda path: link(path, s.parent / PLANTED)), 0),
    "extra links to a device": (lambda s: _extra(s, lambda path: (path.unlink(), path.symlink_to("/dev/zero"))), 0),
    "extra links to nothing": (lambda s: _extra(s, lambda path: (path.unlink(), path.symlink_to("gone"))), 0),
    "extra is a fifo": (lambda s: _extra(s, fifo), 0),
    "extra in a folder that links out": (_extra_through_folder, 0),
    "fifo": (lambda s: fifo(first_file(s)), 3),
    "fifo as index": (lambda s: fifo(s / INDEX), 3),
    "fifo as config": (lambda s: fifo(s / "config.json"), 3),
    "socket": (_socket, 3),
    "device": (_device, 3),
    "folder": (lambda s: (first_file(s).unlink(), first_file(s).mkdir()), 3),
}


@pytest.mark.fault(12)
@pytest.mark.parametrize("case", [case for case, (_, code) in ELSEWHERE.items() if code])
def test_leading_elsewhere(case: str, source: Path, out: Path, refused: Refused) -> None:
    spoil, code = ELSEWHERE[case]
    spoil(source)
    refused(code, convert(source, out), "")


@pytest.mark.fault(12)
@pytest.mark.parametrize("case", [case for case, (_, code) in ELSEWHERE.items() if not code])
def test_what_nobody_needs_and_leads_elsewhere_is_left_behind(case: str, source: Path, out: Path, cli: Cli) -> None:
    ELSEWHERE[case][0](source)
    result = cli(*convert(source, out), aloud=True)
    assert result.code == 0
    assert "left behind: LICENSE (" in result.err
    assert not os.path.lexists(out / "LICENSE")


def _convert_all(folder: str) -> None:
    """Convert every case in one process, the traced one. Prints the exit codes."""
    import reshard.cli.main

    codes = {}
    for number, case in enumerate(["sound", *ELSEWHERE]):
        source = f"{folder}/{number}/source"
        if os.path.isdir(source):
            try:
                reshard.cli.main.main(["convert", source, f"{folder}/{number}/out", "--tp-size", "2"])
                codes[case] = 0
            except SystemExit as ended:
                codes[case] = ended.code or 0
    sys.stdout.write("\n" + json.dumps(codes) + "\n")


@pytest.mark.fault(12)
@pytest.mark.skipif(shutil.which("strace") is None, reason="needs strace")
def test_nothing_elsewhere_is_opened(checkpoint: Checkpoint, tmp_path: Path) -> None:
    """strace shows every path that reaches open(2) in the conversions above."""
    wanted = {"sound": 0}
    for number, case in enumerate(["sound", *ELSEWHERE]):
        source = Path(shutil.copytree(checkpoint("llama"), tmp_path / str(number) / "source"))
        if case in ELSEWHERE:
            spoil, wanted[case] = ELSEWHERE[case]
            spoil(source)
    log = tmp_path / "log"
    code = f"import test_untrusted_sources as here; here._convert_all({str(tmp_path)!r})"
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    trace = ["strace", "-fqqy", "--seccomp-bpf", "-s", "4096", "-e", "trace=open,openat,openat2"]
    done = subprocess.run(
        [*trace, "-o", log, sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    if "ptrace" in done.stderr and not done.stdout:
        pytest.skip("strace is not allowed here")
    assert json.loads(done.stdout.splitlines()[-1]) == wanted
    lines = log.read_text().splitlines()
    opened = [match for line in lines for match in re.findall(r'open\w*\([^"]*"([^"]*)"', line)]
    ours = [name for name in opened if name.startswith(str(tmp_path))]
    assert f"{tmp_path}/0/source/{FIRST}" in ours  # the trace does show opened files
    assert [name for name in opened if PLANTED in name] == []
    followed = [match for line in lines for match in re.findall(r"= \d+<([^>]*)>", line)]
    assert [name for name in followed if PLANTED in name or name.startswith("/dev/zero")] == []
    special = {f"{tmp_path}/{number}/" for number, case in enumerate(["sound", *ELSEWHERE]) if "device" in case}
    assert not [name for name in ours if name.startswith(tuple(special)) and "LICENSE" in name]


@pytest.mark.fault(28)
def test_names_that_are_no_text_are_kept(source: Path, tmp_path: Path, cli: Cli) -> None:
    """Such names are never shown raw."""
    name = os.fsdecode(b"\xff\n.safetensors")
    first_file(source).rename(source / name)
    weight_map(source, lambda found: found.update({tensor: name for tensor in found if found[tensor] == FIRST}))
    (source / os.fsdecode(b"\xff.txt")).write_text("mine")
    for arguments in (
        convert(source, tmp_path / "out"),
        ["verify", tmp_path / "out", "--against", source],
        ["inspect", tmp_path / "out"],
        ["merge", tmp_path / "out", tmp_path / "again", "--format", "json"],
    ):
        result = cli(*arguments)
        assert result.code == 0, result
        assert_no_controls(result)
    assert (tmp_path / "again" / name).read_bytes() == (source / name).read_bytes()
    assert (tmp_path / "again" / os.fsdecode(b"\xff.txt")).read_text() == "mine"


# --- at odds with themselves ---


@pytest.mark.fault(13)
def test_all_tensors_that_occur_twice_are_listed(source: Path, out: Path, refused: Refused) -> None:
    extra = {name: tensor + 1 for name, tensor in load(first_file(source)).items()}
    rewrite(source / "model-00003-of-00003.safetensors", lambda tensors: tensors.update(extra))
    names = sorted(extra)
    said = f"and {len(names) - 5} more" if len(names) > 5 else ""
    refused(3, convert(source, out), "in two files, with other bytes", *(names if len(names) <= 5 else []), said)
