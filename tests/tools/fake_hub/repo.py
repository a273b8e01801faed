"""The stand-in's repos: whole trees by commit, and the names of commits."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from hashlib import sha1, sha256


@dataclass
class Repo:
    """Whole trees by commit, and the branches and tags that name commits.

    If a repo has a `token`, only that token sees it, or, if the repo is `gated`, gets its files.
    """

    token: str | None = None
    gated: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    revisions: dict[str, str] = field(default_factory=dict)
    tags: set[str] = field(default_factory=set)

    @property
    def private(self) -> bool:
        return self.token is not None and not self.gated

    def commit(self, files: Mapping[str, bytes], *, branch: str = "main", deleted: Iterable[str] = ()) -> str:
        """Add, replace and delete files on a branch. Returns the commit."""
        parent = self.revisions.get(branch, "")
        tree = {path: data for path, data in self.commits.get(parent, {}).items() if path not in set(deleted)}
        tree.update(files)
        content = [(path, etag(path, data)) for path, data in sorted(tree.items())]
        sha = sha1(repr((parent, len(self.commits), content)).encode()).hexdigest()
        self.commits[sha] = tree
        self.revisions[branch] = sha
        return sha

    def tag(self, name: str) -> None:
        """Tag the commit that `main` names now."""
        self.tags.add(name)
        self.revisions[name] = self.revisions["main"]

    @property
    def files(self) -> dict[str, bytes]:
        """The files on `main`."""
        return self.commits[self.revisions["main"]]


def is_lfs(path: str) -> bool:
    return path.endswith((".safetensors", ".bin", ".pth"))


@functools.lru_cache(maxsize=256)
def etag(path: str, data: bytes) -> str:
    """Return the oid of a file: SHA-256 if it goes through LFS, otherwise git's blob hash."""
    return sha256(data).hexdigest() if is_lfs(path) else sha1(b"blob %d\0%b" % (len(data), data)).hexdigest()


def file_entry(path: str, data: bytes) -> dict[str, object]:
    """Return a file's entry in the answers of tree and paths-info."""
    lfs = {"lfs": {"oid": etag(path, data), "size": len(data), "pointerSize": 130}} if is_lfs(path) else {}
    return {"type": "file", "oid": etag(path, data)[:40], "size": len(data), "path": path, **lfs}


def card_data(tree: Mapping[str, bytes]) -> dict[str, str]:
    """Return the `key: value` pairs of a README's front matter, which are the model's metadata on the Hub."""
    front = re.match(rb"---\n(.*?\n)---\n", tree.get("README.md", b""), re.S)
    return dict(re.findall(r"^(\w+): *(\S.*)$", front[1].decode(), re.M)) if front else {}
