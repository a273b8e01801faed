"""A folder that a plain web server gives: read as any other store, and not written to."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from cli_tools import Checkpoint, Cli, assert_one_error, convert
from object_store import contents

import reshard
from reshard import stores


class Server(SimpleHTTPRequestHandler):
    """Python's own, which ignores ranges."""

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def site(checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The URL of a llama in three files."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Server, directory=str(checkpoint("llama").parent)))
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/{checkpoint('llama').name}"
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.fault(18)
def test_a_server_that_ignores_ranges(site: str, out: Path, resharded: Path) -> None:
    """A header is cut out of the whole file, which is small."""
    reshard.convert(site, out, tp_size=2)
    assert contents(out) == contents(resharded)


@pytest.mark.fault(18)
def test_large_files_need_ranges(site: str, out: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole of them would come with every range."""
    monkeypatch.setattr(stores, "_RANGE", 30_000)
    words = ("model-0", "the server gives no part of it, only the whole")
    assert_one_error(cli(*convert(site, out)), 2, *words, hint="the path of their folder")
    assert not out.exists()


def test_nothing_is_written_there(site: str, source: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    """Said before any work."""
    monkeypatch.setattr(reshard.conversion, "open_origin", None)
    assert_one_error(cli(*convert(source, f"{site}/new")), 2, f"{site}/new: a store of this kind cannot be written to")
