"""A folder on a plain web server: read as any other store, and never written to."""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from cli_tools import Checkpoint, Cli, assert_one_error, convert
from object_store import contents

import reshard
from reshard.errors import UsageError
from reshard.storage import stores


class Server(SimpleHTTPRequestHandler):
    """Python's own server, which ignores ranges."""

    def log_message(self, *_: Any) -> None:
        pass


class Silent(Server):
    """A server that does not say when a file was changed."""

    def send_header(self, keyword: str, value: str) -> None:
        if keyword != "Last-Modified":
            super().send_header(keyword, value)


@contextmanager
def serving(folder: Path, server_class: type[Server] = Server) -> Iterator[str]:
    """Serve a folder; gives its URL."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(server_class, directory=str(folder.parent)))
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/{folder.name}"
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def site(checkpoint: Checkpoint) -> Iterator[str]:
    """The URL of a llama in three files."""
    with serving(checkpoint("llama")) as url:
        yield url


@pytest.mark.fault(18)
def test_a_server_that_ignores_ranges(site: str, out: Path, resharded: Path) -> None:
    """A header is cut out of the whole small file."""
    reshard.convert(site, out, tp_size=2)
    assert contents(out) == contents(resharded)


@pytest.mark.fault(18)
def test_large_files_need_ranges(site: str, out: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole file would come with every range."""
    monkeypatch.setattr(stores, "_RANGE", 30_000)
    words = ("model-0", "the server gives no part of it, only the whole")
    assert_one_error(cli(*convert(site, out)), 2, *words, hint="the path of their folder")
    assert not out.exists()


def test_nothing_is_written_there(site: str, source: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error comes before any work."""
    monkeypatch.setattr(reshard.operations.convert.work, "open_origin", None)
    assert_one_error(cli(*convert(source, f"{site}/new")), 2, f"{site}/new: a store of this kind cannot be written to")


def test_what_was_fetched_of_a_changed_file_is_not_used_again(
    checkpoint: Checkpoint, resharded: Path, tmp_path: Path
) -> None:
    """The new file has the same name and size; only its time of change differs, which a page of links does not show."""
    folder = Path(shutil.copytree(checkpoint("llama"), tmp_path / "llama"))
    with serving(folder) as url:
        reshard.convert(url, tmp_path / "first", tp_size=2, keep_cache=True)
        assert contents(tmp_path / "first") == contents(resharded)
        path = next(folder.glob("model-00001-*"))
        path.write_bytes(path.read_bytes()[:-4] + b"\0\0\x80?")
        os.utime(path, (0, 0))
        reshard.convert(url, tmp_path / "second", tp_size=2, keep_cache=True)
    reshard.verify(tmp_path / "second", against=folder)


def test_a_server_that_tells_nothing_of_a_change_is_refused(checkpoint: Checkpoint, out: Path) -> None:
    with serving(checkpoint("llama"), Silent) as url, pytest.raises(UsageError, match="neither"):
        reshard.convert(url, out, tp_size=2)
