"""A stand-in for the Hugging Face Hub on loopback, for the real client: models are created, uploaded and downloaded.

HF_ENDPOINT is read when huggingface_hub is imported, so use it from subprocesses, with `FakeHub.environment`.
"""

from __future__ import annotations

import base64
import json
import os
import re
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from hashlib import sha1, sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit


@dataclass
class Repo:
    """Whole trees by commit, and the branches and tags that name commits. A private repo shows itself to one token."""

    token: str | None = None
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    revisions: dict[str, str] = field(default_factory=dict)

    def commit(self, files: Mapping[str, bytes], *, branch: str = "main") -> str:
        """Add or replace files on a branch. Returns the commit."""
        parent = self.revisions.get(branch, "")
        tree = {**self.commits.get(parent, {}), **files}
        content = [(path, etag(path, data)) for path, data in sorted(tree.items())]
        sha = sha1(repr((parent, len(self.commits), content)).encode()).hexdigest()
        self.commits[sha] = tree
        self.revisions[branch] = sha
        return sha

    @property
    def files(self) -> dict[str, bytes]:
        """What `main` holds."""
        return self.commits[self.revisions["main"]]


def is_lfs(path: str) -> bool:
    return path.endswith((".safetensors", ".bin", ".pth"))


def etag(path: str, data: bytes) -> str:
    """The oid of a file: git's of a blob, SHA-256 of what goes through LFS."""
    return sha256(data).hexdigest() if is_lfs(path) else sha1(b"blob %d\0%b" % (len(data), data)).hexdigest()


@dataclass
class Reply:
    """An answer. `body` goes out as it is if it is bytes, as JSON otherwise."""

    body: Any = b""
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)


class Refusal(Exception):
    """A request that cannot be served: the status, and the Hub's name for the reason."""

    def __init__(self, status: int, code: str) -> None:
        super().__init__(status, code)
        self.reply = Reply({"error": code}, status, {"X-Error-Code": code})


class FakeHub(ThreadingHTTPServer):
    """Serves while the context is open. `requests` holds the method and path of every request so far."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.repos: dict[str, Repo] = {}
        self.objects: dict[str, bytes] = {}  # uploaded through LFS, by SHA-256
        self.requests: list[tuple[str, str]] = []
        self._thread = threading.Thread(target=self.serve_forever, args=(0.05,))

    def __enter__(self) -> FakeHub:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self._thread.join()
        self.server_close()

    def create(self, repo_id: str, files: Mapping[str, bytes] | None = None, *, token: str | None = None) -> Repo:
        """A new repo, its first commit holding `files` (default: what the Hub puts there)."""
        repo = self.repos[repo_id] = Repo(token)
        repo.commit({".gitattributes": b"*.safetensors filter=lfs\n"} if files is None else files)
        return repo

    def asked(self, repo_id: str) -> set[str]:
        """The files of a repo that were asked for, by HEAD or GET, at any revision."""
        pattern = re.compile(rf"/{re.escape(repo_id)}/resolve/[^/]+/(.+)")
        return {match[1] for _, path in self.requests if (match := pattern.fullmatch(path))}

    def environment(self, home: Path, *, token: str = "hf_test") -> dict[str, str]:
        """What a subprocess needs to use this Hub, its cache and nothing else below `home`."""
        return {
            **os.environ,
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HF_TOKEN": token,
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_XET": "1",
            "NO_PROXY": "127.0.0.1,localhost",
        }


class _Handler(BaseHTTPRequestHandler):
    server: FakeHub
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def _handle(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.server.requests.append((self.command, path))
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        try:
            reply = self._answer(f"{self.command} {urlsplit(self.path).path}", body)
        except Refusal as refusal:
            reply = refusal.reply
        self._send(reply)

    do_GET = do_HEAD = do_POST = do_PUT = _handle

    def _answer(self, request: str, body: bytes) -> Reply:
        for pattern, answer in _ROUTES.items():
            if match := re.fullmatch(pattern, request):
                return answer(self, body, *(part and unquote(part) for part in match.groups()))
        raise Refusal(404, "NoSuchRoute")

    def _send(self, reply: Reply) -> None:
        body = reply.body if isinstance(reply.body, bytes) else json.dumps(reply.body).encode()
        self.send_response(reply.status)
        for name, value in {"Content-Length": str(len(body)), **reply.headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass

    def _repo(self, repo_id: str) -> Repo:
        repo = self.server.repos.get(repo_id)
        if repo is None or (repo.token and self.headers.get("Authorization") != f"Bearer {repo.token}"):
            raise Refusal(404, "RepoNotFound")
        return repo

    def _tree(self, repo_id: str, revision: str | None) -> tuple[str, dict[str, bytes]]:
        repo, revision = self._repo(repo_id), revision or "main"
        sha = repo.revisions.get(revision, revision)
        if sha not in repo.commits:
            raise Refusal(404, "RevisionNotFound")
        return sha, repo.commits[sha]

    def whoami(self, _: bytes) -> Reply:
        return Reply({"type": "user", "name": "user", "orgs": [{"name": "org"}], "auth": {"type": "access_token"}})

    def check_card(self, _: bytes) -> Reply:
        return Reply({"errors": [], "warnings": []})

    def create(self, body: bytes) -> Reply:
        asked = json.loads(body)
        repo_id = f"{asked.get('organization') or 'user'}/{asked['name']}"
        new = repo_id not in self.server.repos
        if new:
            self.server.create(repo_id)
        return Reply({"url": f"{self.server.url}/{repo_id}"}, 200 if new else 409)

    def info(self, _: bytes, repo_id: str, revision: str | None) -> Reply:
        sha, tree = self._tree(repo_id, revision)
        siblings = [{"rfilename": path} for path in tree]
        private = self._repo(repo_id).token is not None
        return Reply({"id": repo_id, "sha": sha, "private": private, "siblings": siblings})

    def tree(self, _: bytes, repo_id: str, revision: str) -> Reply:
        entries = []
        for path, data in self._tree(repo_id, revision)[1].items():
            lfs = {"lfs": {"oid": etag(path, data), "size": len(data), "pointerSize": 130}} if is_lfs(path) else {}
            entries.append({"type": "file", "oid": etag(path, data)[:40], "size": len(data), "path": path, **lfs})
        return Reply(entries)

    def file(self, _: bytes, repo_id: str, revision: str, path: str) -> Reply:
        sha, tree = self._tree(repo_id, revision)
        if path not in tree:
            raise Refusal(404, "EntryNotFound")
        data = tree[path]
        headers = {"X-Repo-Commit": sha, "ETag": f'"{etag(path, data)}"', "Accept-Ranges": "bytes"}
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if asked is None:
            return Reply(data, headers=headers)
        first, last = int(asked[1]), min(int(asked[2] or len(data) - 1), len(data) - 1)
        headers["Content-Range"] = f"bytes {first}-{last}/{len(data)}"
        return Reply(data[first : last + 1], 206, headers)

    def preupload(self, body: bytes, repo_id: str, revision: str) -> Reply:
        tree, found = self._tree(repo_id, revision)[1], []
        for path in (item["path"] for item in json.loads(body)["files"]):
            oid = etag(path, tree[path]) if path in tree else None
            mode = "lfs" if is_lfs(path) else "regular"
            found.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        return Reply({"files": found})

    def lfs_batch(self, body: bytes, repo_id: str) -> Reply:
        self._repo(repo_id)
        objects = []
        for item in json.loads(body)["objects"]:
            upload = {"actions": {"upload": {"href": f"{self.server.url}/lfs/{item['oid']}"}}}
            objects.append(item if item["oid"] in self.server.objects else {**item, **upload})
        return Reply({"transfer": "basic", "objects": objects})

    def lfs_put(self, body: bytes, oid: str) -> Reply:
        if sha256(body).hexdigest() != oid:
            raise Refusal(400, "BadDigest")
        self.server.objects[oid] = body
        return Reply()

    def commit(self, body: bytes, repo_id: str, branch: str) -> Reply:
        files = {}
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.server.objects[value["oid"]]
        sha = self._repo(repo_id).commit(files, branch=branch)
        return Reply({"commitUrl": f"{self.server.url}/{repo_id}/commit/{sha}", "commitOid": sha})


_MODEL = "/api/models/([^/]+/[^/]+)"
_ROUTES = {
    "GET /api/whoami-v2": _Handler.whoami,
    "POST /api/validate-yaml": _Handler.check_card,
    "POST /api/repos/create": _Handler.create,
    f"GET {_MODEL}(?:/revision/([^/]+))?": _Handler.info,
    f"GET {_MODEL}/tree/([^/]+)": _Handler.tree,
    f"POST {_MODEL}/preupload/([^/]+)": _Handler.preupload,
    f"POST {_MODEL}/commit/([^/]+)": _Handler.commit,
    r"POST /([^/]+/[^/]+)\.git/info/lfs/objects/batch": _Handler.lfs_batch,
    "PUT /lfs/([0-9a-f]+)": _Handler.lfs_put,
    "(?:GET|HEAD) /([^/]+/[^/]+)/resolve/([^/]+)/(.+)": _Handler.file,
}
