"""The stand-in's routes: one table of requests, and a function that answers each."""

from __future__ import annotations

import base64
import json
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from hashlib import md5, sha256
from http.server import BaseHTTPRequestHandler
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, quote, unquote, urlsplit

from . import xet
from .repo import Repo, card_data, etag, file_entry, is_lfs

if TYPE_CHECKING:
    from .hub import FakeHub

_PIECE = 1 << 20  # bytes that are sent at once, if the Hub has a rate


@dataclass
class Reply:
    """An answer. `body` is sent as it is if it is bytes, otherwise as JSON."""

    body: Any = b""
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)


class Refusal(Exception):
    """A request that cannot be served: its status, and the Hub's name of the reason."""

    def __init__(self, status: int, code: str) -> None:
        super().__init__(status, code)
        self.reply = Reply({"error": code}, status, {"X-Error-Code": code})


class Handler(BaseHTTPRequestHandler):
    server: FakeHub
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def _handle(self) -> None:
        from .hub import Request

        parts = urlsplit(self.path)
        self.query = parse_qs(parts.query)
        request = Request(self.command, unquote(parts.path), {k.lower(): v for k, v in self.headers.items()})
        self.server.requests.append(request)
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        fault = self.server.next_fault(request)

        def answer() -> Reply:
            try:
                return self._answer(f"{self.command} {parts.path}", body)
            except Refusal as refusal:
                return refusal.reply

        reply = fault(self, answer) if fault else answer()
        if reply is not None:
            self.send(reply)

    do_GET = do_HEAD = do_POST = do_PUT = _handle

    def _answer(self, request: str, body: bytes) -> Reply:
        for pattern, answer in _ROUTES.items():
            if match := re.fullmatch(pattern, request):
                return answer(self, body, *(part and unquote(part) for part in match.groups()))
        raise Refusal(404, "NoSuchRoute")

    def send(self, reply: Reply, *, most: int | None = None) -> None:
        """Send an answer, with at most `most` bytes of its body."""
        body = reply.body if isinstance(reply.body, bytes) else json.dumps(reply.body).encode()
        try:
            self.send_response(reply.status)
            for name, value in {"Content-Length": str(len(body)), **reply.headers}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self._write(body[:most])
        except OSError:  # the client has gone
            self.close_connection = True

    def _write(self, body: bytes) -> None:
        """Send bytes, at the rate of this Hub if it has one."""
        if self.server.rate is None:
            self.wfile.write(body)
            return
        for at in range(0, len(body), _PIECE):
            piece = memoryview(body)[at : at + _PIECE]
            self.wfile.write(piece)
            time.sleep(self.server.turn(len(piece)))

    def log_message(self, *_: object) -> None:
        pass

    def _token(self) -> str | None:
        return self.headers.get("Authorization", "").removeprefix("Bearer ") or None

    def _writer(self) -> str:
        token = self._token()
        if token is None:
            raise Refusal(401, "Unauthorized")
        if token in self.server.readers:
            raise Refusal(403, "Forbidden")
        return token

    def _repo(self, repo_id: str) -> Repo:
        repo = self.server.repos.get(repo_id)
        if repo is None or (repo.private and self._token() != repo.token):
            raise Refusal(404, "RepoNotFound")
        return repo

    def _tree(self, repo_id: str, revision: str | None) -> tuple[str, dict[str, bytes]]:
        repo, revision = self._repo(repo_id), revision or "main"
        sha = repo.revisions.get(revision, revision)
        if sha not in repo.commits:
            raise Refusal(404, "RevisionNotFound")
        return sha, repo.commits[sha]

    def _entry(self, path: str, data: bytes) -> dict[str, object]:
        known = self.server.xet_hashes.get(etag(path, data))
        return {**file_entry(path, data), **({"xetHash": known} if known else {})}

    def whoami(self, _: bytes) -> Reply:
        return Reply({"type": "user", "name": "user", "orgs": [{"name": "org"}], "auth": {"type": "access_token"}})

    def check_card(self, body: bytes) -> Reply:
        licence = card_data({"README.md": json.loads(body)["content"].encode()}).get("license", "other")
        errors = [] if licence in _LICENCES else [{"message": '"license" must be one of those that there are'}]
        return Reply({"errors": errors, "warnings": []}, 400 if errors else 200)

    def create(self, body: bytes) -> Reply:
        asked, token = json.loads(body), self._writer()
        repo_id = f"{asked.get('organization') or 'user'}/{asked['name']}"
        new = repo_id not in self.server.repos
        if new:
            private = asked.get("private") or asked.get("visibility") == "private"
            self.server.create(repo_id, token=token if private else None)
        return Reply({"url": f"{self.server.url}/{repo_id}"}, 200 if new else 409)

    def info(self, _: bytes, repo_id: str, revision: str | None) -> Reply:
        sha, tree = self._tree(repo_id, revision)
        siblings: list[Any] = [{"rfilename": path} for path in tree]
        if "blobs" in self.query:
            for sibling, (path, data) in zip(siblings, tree.items()):
                entry = self._entry(path, data)
                lfs = {"lfs": {**entry["lfs"], "sha256": entry["lfs"]["oid"]}} if "lfs" in entry else {}  # type: ignore[dict-item,index]
                sibling.update(size=entry["size"], blobId=entry["oid"], **lfs)
        repo, card = self._repo(repo_id), card_data(tree)
        known = {"private": repo.private, "gated": "manual" if repo.gated else False, "cardData": card}
        tag = {"pipeline_tag": card["pipeline_tag"]} if "pipeline_tag" in card else {}
        return Reply({"id": repo_id, "sha": sha, **known, **tag, "siblings": siblings})

    def tree(self, _: bytes, repo_id: str, revision: str, folder: str | None) -> Reply:
        start = f"{folder}/" if folder else ""
        tree = {path: data for path, data in self._tree(repo_id, revision)[1].items() if path.startswith(start)}
        if folder and not tree:
            raise Refusal(404, "EntryNotFound")
        return Reply([self._entry(path, data) for path, data in tree.items()])

    def paths_info(self, body: bytes, repo_id: str, revision: str) -> Reply:
        tree = self._tree(repo_id, revision)[1]
        asked = parse_qs(body.decode()).get("paths", [])
        return Reply([self._entry(path, tree[path]) for path in asked if path in tree])

    def refs(self, _: bytes, repo_id: str) -> Reply:
        found: dict[str, list[dict[str, str]]] = {"branches": [], "tags": [], "converts": [], "pullRequests": []}
        repo = self._repo(repo_id)
        for name, sha in repo.revisions.items():
            kind = "tags" if name in repo.tags else "pullRequests" if name.startswith("refs/pr/") else "branches"
            ref = f"refs/tags/{name}" if kind == "tags" else name if kind != "branches" else f"refs/heads/{name}"
            found[kind].append({"name": name, "ref": ref, "targetCommit": sha})
        return Reply(found)

    def branch(self, body: bytes, repo_id: str, name: str) -> Reply:
        self._writer()
        repo = self._repo(repo_id)
        if name in repo.revisions:
            raise Refusal(409, "AlreadyExists")
        repo.revisions[name] = self._tree(repo_id, json.loads(body or b"{}").get("startingPoint"))[0]
        return Reply()

    def file(self, _: bytes, repo_id: str, revision: str, path: str) -> Reply:
        sha, tree = self._tree(repo_id, revision)
        repo = self._repo(repo_id)
        if repo.gated and self._token() != repo.token:
            raise Refusal(403, "GatedRepo")
        if path not in tree:
            raise Refusal(404, "EntryNotFound")
        data, oid = tree[path], etag(path, tree[path])
        headers = {"X-Repo-Commit": sha, "ETag": f'"{oid}"', "Accept-Ranges": "bytes"}
        if is_lfs(path):
            headers |= {"X-Linked-Size": str(len(data)), "X-Linked-ETag": f'"{oid}"'}
        if oid in self.server.xet_hashes:
            route = f"{self.server.url}/api/models/{repo_id}/xet-read-token/{sha}"
            headers |= {"X-Xet-Hash": self.server.xet_hashes[oid], "X-Xet-Refresh-Route": route}
        if self.server.cdn and is_lfs(path):
            elsewhere = self.server.url.replace("127.0.0.1", "localhost")
            return Reply(b"", 302, {**headers, "Location": f"{elsewhere}/cdn/{repo_id}/{sha}/{quote(path)}"})
        return self._part(data, headers)

    def cdn(self, _: bytes, repo_id: str, sha: str, path: str) -> Reply:
        """Serve a signed address. It needs no token: a client that sent one there would leak it."""
        return self._part(self.server.repos[repo_id].commits[sha][path], {"Accept-Ranges": "bytes"})

    def _part(self, data: bytes, headers: Mapping[str, str]) -> Reply:
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if asked is None:
            return Reply(data, headers=dict(headers))
        first, last = int(asked[1]), min(int(asked[2] or len(data) - 1), len(data) - 1)
        where = {"Content-Range": f"bytes {first}-{last}/{len(data)}"}
        return Reply(data[first : last + 1], 206, {**headers, **where})

    def preupload(self, body: bytes, repo_id: str, revision: str) -> Reply:
        self._writer()
        tree, found = self._tree(repo_id, revision)[1], []
        for path in (item["path"] for item in json.loads(body)["files"]):
            oid = etag(path, tree[path]) if path in tree else None
            mode = "lfs" if is_lfs(path) else "regular"
            found.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        return Reply({"files": found})

    def lfs_batch(self, body: bytes, repo_id: str) -> Reply:
        self._writer()
        self._repo(repo_id)
        objects = []
        for item in json.loads(body)["objects"]:
            if item["oid"] in self.server.objects:
                objects.append(item)
                continue
            href, step = f"{self.server.url}/lfs/{item['oid']}", self.server.part_size
            upload: dict[str, Any] = {"href": href}
            if step is not None and item["size"] > step:
                numbers = [f"{number:05}" for number in range(1, -(-item["size"] // step) + 1)]
                upload["header"] = {"chunk_size": str(step), **{n: f"{href}/part/{n}" for n in numbers}}
            verify = {"href": f"{self.server.url}/lfs/verify"}
            objects.append({**item, "actions": {"upload": upload, "verify": verify}})
        return Reply({"transfer": "basic", "objects": objects})

    def lfs_put(self, body: bytes, oid: str) -> Reply:
        if sha256(body).hexdigest() != oid:
            raise Refusal(400, "BadDigest")
        self.server.objects[oid] = body
        return Reply()

    def lfs_part(self, body: bytes, oid: str, number: str) -> Reply:
        self.server.parts[oid, number] = body
        return Reply(headers={"ETag": f'"{md5(body).hexdigest()}"'})

    def lfs_join(self, body: bytes, oid: str) -> Reply:
        found = [self.server.parts[oid, f"{part['partNumber']:05}"] for part in json.loads(body)["parts"]]
        return self.lfs_put(b"".join(found), oid)

    def lfs_verify(self, body: bytes) -> Reply:
        self._writer()
        asked = json.loads(body)
        found = self.server.objects.get(asked["oid"])
        return Reply({}) if found is not None and len(found) == asked["size"] else Reply({}, 404)

    def xet_token(self, _: bytes, repo_id: str, kind: str, revision: str) -> Reply:
        if kind == "write":
            self._writer()
        self._tree(repo_id, revision)
        token, expiry, url = "xet_token", 4102444800, f"local://{self.server.cas}"
        names = ("X-Xet-Access-Token", "X-Xet-Token-Expiration", "X-Xet-Cas-Url")
        headers = dict(zip(names, (token, str(expiry), url)))
        return Reply({"accessToken": token, "exp": expiry, "casUrl": url}, headers=headers)

    def _object(self, oid: str) -> bytes:
        """Return an object that was uploaded before the commit, through LFS or xet."""
        if self.server.cas and oid not in self.server.objects:
            found = xet.stored(self.server.cas)
            if oid in found:
                self.server.objects[oid] = xet.read(self.server.cas, *found[oid])
                self.server.xet_hashes[oid] = found[oid][0]
        if oid not in self.server.objects:
            raise Refusal(400, "LfsObjectMissing")
        return self.server.objects[oid]

    def commit(self, body: bytes, repo_id: str, branch: str) -> Reply:
        self._writer()
        parent, files, deleted = None, {}, set()
        head, tree = self._tree(repo_id, branch)
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "header":
                parent = value.get("parentCommit")
            elif line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self._object(value["oid"])
            elif line["key"] == "deletedFile":
                deleted.add(value["path"])
            elif line["key"] == "deletedFolder":
                deleted |= {path for path in tree if path.startswith(value["path"].rstrip("/") + "/")}
        repo, asked = self._repo(repo_id), "create_pr" in self.query
        with self.server.lock:
            if parent not in (None, head) and not asked:
                return Reply({"error": "A commit has happened since. Please refresh and try again."}, 412)
            if asked:
                number = sum(name.startswith("refs/pr/") for name in repo.revisions) + 1
                branch = f"refs/pr/{number}"
                repo.revisions[branch] = parent or head
            sha = repo.commit(files, branch=branch, deleted=deleted)
        pull = {"pullRequestUrl": f"{self.server.url}/{repo_id}/discussions/{number}"} if asked else {}
        return Reply({"commitUrl": f"{self.server.url}/{repo_id}/commit/{sha}", "commitOid": sha, **pull})


_LICENCES = {"apache-2.0", "mit", "llama3.1", "other"}
_MODEL = "/api/models/([^/]+/[^/]+)"
_ROUTES = {
    "GET /api/whoami-v2": Handler.whoami,
    "POST /api/validate-yaml": Handler.check_card,
    "POST /api/repos/create": Handler.create,
    f"GET {_MODEL}(?:/revision/([^/]+))?": Handler.info,
    f"GET {_MODEL}/tree/([^/]+)(?:/(.+))?": Handler.tree,
    f"POST {_MODEL}/paths-info/([^/]+)": Handler.paths_info,
    f"GET {_MODEL}/refs": Handler.refs,
    f"POST {_MODEL}/branch/([^/]+)": Handler.branch,
    f"POST {_MODEL}/preupload/([^/]+)": Handler.preupload,
    f"POST {_MODEL}/commit/([^/]+)": Handler.commit,
    f"GET {_MODEL}/xet-(read|write)-token/([^/]+)": Handler.xet_token,
    r"POST /([^/]+/[^/]+)\.git/info/lfs/objects/batch": Handler.lfs_batch,
    "PUT /lfs/([0-9a-f]{64})": Handler.lfs_put,
    "PUT /lfs/([0-9a-f]{64})/part/([0-9]+)": Handler.lfs_part,
    "POST /lfs/([0-9a-f]{64})": Handler.lfs_join,
    "POST /lfs/verify": Handler.lfs_verify,
    "(?:GET|HEAD) /([^/]+/[^/]+)/resolve/([^/]+)/(.+)": Handler.file,
    "(?:GET|HEAD) /cdn/([^/]+/[^/]+)/([^/]+)/(.+)": Handler.cdn,
}
