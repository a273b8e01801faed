"""The stand-in's server: its repos, the requests so far, and the faults to come."""

from __future__ import annotations

import os
import re
import sys
import threading
import time
from collections.abc import Mapping
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from .repo import Repo
from .server import Handler

if TYPE_CHECKING:
    from .faults import Fault


class Request(NamedTuple):
    """A request as it came. `headers` are keyed by their names in lower case."""

    method: str
    path: str
    headers: dict[str, str]

    def __str__(self) -> str:
        return f"{self.method} {self.path}"


class FakeHub(ThreadingHTTPServer):
    """A server that runs while the context is open. `requests` holds every request so far.

    `cdn`: large files come by a redirect to another origin. `part_size`: larger files are uploaded in parts. `cas`: a
    folder that keeps large files through hf_xet. `readers`: tokens that may not write. `rate`: bytes a second of all
    connections together.
    """

    daemon_threads = True

    def __init__(self, *, cas: Path | None = None) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.repos: dict[str, Repo] = {}
        self.objects: dict[str, bytes] = {}  # uploaded through LFS or xet, by SHA-256
        self.parts: dict[tuple[str, str], bytes] = {}  # uploaded in parts, by SHA-256 and number
        self.xet_hashes: dict[str, str] = {}  # of the files uploaded through xet, by SHA-256
        self.requests: list[Request] = []
        self.cdn = False
        self.part_size: int | None = None
        self.cas = cas
        self.readers: set[str] = set()
        self.rate: float | None = None
        self._free = 0.0  # when the line will have sent all that it has taken
        self.closing = threading.Event()
        self.lock = threading.Lock()  # for the repos and the faults
        self._faults: list[tuple[str, Fault]] = []
        self._thread = threading.Thread(target=self.serve_forever, args=(0.05,))

    def __enter__(self) -> FakeHub:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.closing.set()
        self.shutdown()
        self._thread.join()
        self.server_close()

    def create(
        self,
        repo_id: str,
        files: Mapping[str, bytes] | None = None,
        *,
        token: str | None = None,
        gated: bool = False,
    ) -> Repo:
        """Create a repo whose first commit holds `files` (default: the file that the Hub puts there)."""
        repo = self.repos[repo_id] = Repo(token, gated)
        repo.commit({".gitattributes": b"*.safetensors filter=lfs\n"} if files is None else files)
        return repo

    def handle_error(self, request: object, client_address: object) -> None:
        """Show an error of the stand-in; ignore a client that has gone."""
        if not isinstance(sys.exc_info()[1], OSError):
            super().handle_error(request, client_address)

    def fail(self, request: str, fault: Fault, *, times: int = 1) -> None:
        """Make the next requests fail whose "METHOD path" matches the pattern. Faults come in the order given."""
        self._faults += [(request, fault)] * times

    def turn(self, size: int) -> float:
        """Return the seconds until that many bytes are sent, after all that the line has taken before."""
        assert self.rate is not None
        with self.lock:
            now = time.monotonic()
            self._free = max(self._free, now) + size / self.rate
            return self._free - now

    def next_fault(self, request: Request) -> Fault | None:
        with self.lock:
            for i, (pattern, fault) in enumerate(self._faults):
                if re.search(pattern, str(request)):
                    del self._faults[i]
                    return fault
        return None

    @property
    def faults_left(self) -> int:
        return len(self._faults)

    def recover(self) -> None:
        """Drop the faults that are left."""
        with self.lock:
            self._faults.clear()

    def asked(self, repo_id: str) -> set[str]:
        """Return the files of a repo that were asked for, by HEAD or GET, at any revision."""
        pattern = re.compile(rf"/{re.escape(repo_id)}/resolve/[^/]+/(.+)")
        return {match[1] for request in self.requests if (match := pattern.fullmatch(request.path))}

    def count(self, pattern: str) -> int:
        """Count the requests whose "METHOD path" matches the pattern."""
        return sum(re.search(pattern, str(request)) is not None for request in self.requests)

    def environment(self, home: Path, *, token: str = "hf_test") -> dict[str, str]:
        """Return the environment of a subprocess that uses this Hub, with its cache below `home`."""
        return {
            **os.environ,
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HF_TOKEN": token,
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_XET": "0" if self.cas else "1",
            "NO_PROXY": "127.0.0.1,localhost",
        }
