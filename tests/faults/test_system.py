"""An error of the operating system is a storage error (5) with a way out, and never says that bytes are wrong."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_tools import Cli, assert_one_error
from executor_tools import make_source

import reshard
from reshard.checkpoint.architecture import model_class
from reshard.checkpoint.source import open_source
from reshard.errors import BadInputError, IntegrityError, NetworkError, ReshardError, StorageError
from reshard.files import mapped as mapping
from reshard.files.digest import digest_file
from reshard.files.header import read_header
from reshard.files.mapped import MappedFile, check_unchanged
from reshard.files.system import by_errno, explained, walked
from reshard.files.untrusted import read_json, vetted_path
from reshard.planning.model.rules import read_rules
from reshard.resharded.manifest import read_manifest
from reshard.storage import disk, filesystems
from reshard.storage.hub.errors import explain
from reshard.strategies import load_strategies
from runtime.distributed.agreement import words_of

SYSTEM = [errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EIO, errno.EACCES, errno.EPERM, errno.ESTALE, errno.ENOLCK]
PATH = [errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG]

# Functions that read a file, and the error of each for a missing one.
READERS: dict[str, tuple[Callable[[Path], object], type[ReshardError]]] = {
    "vetted_path": (lambda path: vetted_path(path.parent, path.name, what="file"), BadInputError),
    "read_json": (read_json, BadInputError),
    "read_header": (lambda path: read_header(path, file=path.name), BadInputError),
    "read_rules": (lambda path: read_rules(path.with_suffix(".toml")), BadInputError),
    "load_strategies": (load_strategies, BadInputError),
    "digest_file": (digest_file, IntegrityError),
    "check_unchanged": (lambda path: check_unchanged(path, size=1, mtime_ns=1), IntegrityError),
    "MappedFile": (lambda path: MappedFile(path, size=1), IntegrityError),
}


def failing(code: int) -> Callable[..., Any]:
    def fail(path: Any, *_: Any, **__: Any) -> Any:
        raise OSError(code, os.strerror(code), str(path))

    return fail


@pytest.fixture
def no_files(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """`no_files(code)`: from now on, every open or stat of a file fails."""

    def start(code: int) -> None:
        import builtins
        import io

        for module, name in ((os, "open"), (os, "stat"), (os.path, "realpath"), (builtins, "open"), (io, "open_code")):
            monkeypatch.setattr(module, name, failing(code))
        monkeypatch.setattr(io, "open", failing(code))

    return start


@pytest.mark.fault(30)
@pytest.mark.parametrize("code", SYSTEM + PATH, ids=errno.errorcode.get)
@pytest.mark.parametrize("reader", READERS)
def test_by_its_number(
    reader: str, code: int, tmp_path: Path, no_files: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    read, otherwise = READERS[reader]
    no_files(code)
    try:
        read(tmp_path / "file")
    except ReshardError as error:
        failure = error
    monkeypatch.undo()
    assert type(failure) is (StorageError if code in SYSTEM else otherwise)
    assert os.strerror(code) in failure.message
    assert "file" in failure.message
    assert not failure.lost or otherwise is IntegrityError


@pytest.mark.parametrize(
    ("code", "hint"), [(errno.EMFILE, "ulimit -n"), (errno.ENOMEM, "max_map_count"), (errno.EACCES, "permissions")]
)
def test_what_can_be_done(code: int, hint: str) -> None:
    error = by_errno(OSError(code, "no", "file"), "file: no", IntegrityError, hint="convert it again")
    assert isinstance(error, StorageError)
    assert hint in (error.hint or "")
    kept = by_errno(FileNotFoundError(errno.ENOENT, "no", "file"), "file: no", IntegrityError, hint="convert it again")
    assert (type(kept), kept.hint) == (IntegrityError, "convert it again")


def test_what_another_library_makes_of_it(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers says that the configuration is bad if it could not open it."""
    import transformers

    def fail(*_: Any, **__: Any) -> Any:
        try:
            failing(errno.EMFILE)(source / "config.json")
        except OSError:
            raise ValueError("not a valid configuration") from None

    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", fail)
    with pytest.raises(StorageError):
        model_class(source)


def test_a_socket_that_is_refused_is_the_networks() -> None:
    refused = ConnectionRefusedError(errno.ECONNREFUSED, "Connection refused")
    assert isinstance(by_errno(refused, "x", NetworkError), NetworkError)
    assert explained(refused) is refused
    none_left = OSError(errno.EMFILE, "Too many open files")
    for error in (explain(none_left, "org/model"), filesystems._explained(none_left, "read", "s3://b")):
        assert isinstance(error, StorageError)


def test_one_that_nobody_expected(cli: Cli, source: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(os, "listdir", failing(errno.EACCES))
    result = cli("convert", source, tmp_path / "out", "--tp-size", 2)
    monkeypatch.undo()
    assert_one_error(result, 5, "Permission denied", hint="permissions")
    assert words_of(PermissionError(errno.EACCES, "no", "file"))[0] == "StorageError"
    assert words_of(FileNotFoundError(errno.ENOENT, "no", "file"))[0] == "ReshardError"  # a bug of ours


@pytest.mark.fault(30)
def test_really_too_many_open_files(resharded: Path) -> None:
    """Every reading command runs out of descriptors once it is under way."""
    code = """
import os, resource, sys
from pathlib import Path
import reshard
from reshard.operations import merge
from reshard.operations.convert import work
from reshard.operations.verify import compare, verify
from reshard.errors import ReshardError
from reshard.resharded.manifest import read_manifest
folder = Path(sys.argv[1])
kept = read_manifest(folder)
from reshard.operations.verify.verify import check_file
from reshard.resharded.rank_file import read_rank_header
limit = max(map(int, os.listdir("/proc/self/fd")))
resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
held = []
try:
    while True:
        held.append(os.dup(0))
except OSError:
    pass
calls = [lambda: read_manifest(folder), lambda: read_rank_header(folder / kept.rank_files[0].name, kept.rank_files[0])]
calls += [lambda record=record: check_file(folder, record) for record in kept.files()]
for call in calls:
    try:
        call()
    except ReshardError as error:
        print(error.exit_code, error.hint)
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(resharded)], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 2 + len(reshard.inspect(resharded).files())
    assert all(line.startswith("5 raise the limit on open files") for line in lines)


@pytest.mark.fault(15)
def test_a_disk_that_fails_under_a_mapping(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The signal is the same as for a file cut short; a system call then tells them apart."""
    path = tmp_path / "file"
    path.write_bytes(b"x" * 9999)
    status = path.stat()
    mapped = MappedFile(path, size=9999)
    os.truncate(path, 0)
    assert bytes(mapped.data)[:4096] == bytes(4096)
    path.write_bytes(b"x" * 9999)
    os.utime(path, ns=(status.st_mtime_ns, status.st_mtime_ns))

    def fail(*_: Any) -> Any:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patch:
        patch.setattr(mapping.os, "pread", fail)
        with pytest.raises(StorageError, match="Input/output error"):
            mapped.check()
    with pytest.raises(IntegrityError, match="was cut short"):
        mapped.check()


def test_no_room_for_a_mapping(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """mmap(2) refuses to map beyond its limits."""
    (tmp_path / "file").write_bytes(b"x")
    real = mapping.mapped
    monkeypatch.setattr(mapping, "mapped", lambda fd, _: real(fd, 1 << 47))
    with pytest.raises(StorageError, match="Cannot allocate memory") as caught:
        MappedFile(tmp_path / "file", size=1)
    assert "max_map_count" in (caught.value.hint or "")


@pytest.mark.parametrize("code", [errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOSPC, errno.EIO])
def test_what_is_written_is_lost_with_a_disk_alone(code: int, tmp_path: Path) -> None:
    failure = disk.write_error(tmp_path, OSError(code, os.strerror(code)))
    assert isinstance(failure, StorageError)
    assert failure.lost == (code == errno.EIO)


def test_a_file_that_may_not_be_read_is_kept(resharded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pull removes a damaged file to fetch it again, but an unreadable file is not damaged."""
    from reshard.resharded.rank_file import check_file

    record = reshard.inspect(resharded).rank_files[0]
    monkeypatch.setattr(mapping.os, "open", failing(errno.EMFILE))
    with pytest.raises(StorageError):
        check_file(resharded, record)


def test_reading_what_is_there(tmp_path: Path) -> None:
    """The readers work, so the refusals above mean something."""
    source = make_source(tmp_path / "source", {"w": torch.ones(4)})
    assert open_source(source.root).tensors.keys() == {"w"}
    assert read_header(source.files[0].path, file="x").tensors
    with pytest.raises(BadInputError):
        read_manifest(source.root)


def test_a_folder_that_cannot_be_listed_is_not_taken_for_empty(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    assert [inside for inside, _, _ in walked(tmp_path)] == [str(tmp_path), str(tmp_path / "there")]
    with pytest.raises(FileNotFoundError):
        list(walked(tmp_path / "gone"))
