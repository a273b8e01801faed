"""A repo of the Hub or a folder of one, what of it is fetched, and its cache."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from ..errors import BadInputError, UsageError, printable
from .errors import explain

__all__ = ["Place", "client", "discard", "folders", "is_hub_url", "snapshot"]

_NAME = r"[A-Za-z0-9][\w.-]*"
_PLACE = re.compile(rf"({_NAME}(?:/{_NAME})?)((?:/{_NAME})*)")
_SCHEME = "hf://"
_NO_MODELS = ("datasets", "spaces", "buckets")  # where the path of a URL begins so
_PATIENCE = 6  # times the client's own timeout of a download


@dataclass(frozen=True, slots=True)
class Place:
    """A Hub repo, or a folder of one: `org/name`, or `org/name/path`."""

    repo_id: str
    path: str = ""

    @classmethod
    def parse(cls, text: str) -> Place:
        """Also of the address of its page, or of `hf://org/name`.

        Raises:
            BadInputError: it is not one.
            UsageError: the address is that of a revision, or of a file.
        """
        match = _PLACE.fullmatch(_address(text) if is_hub_url(text) else text.rstrip("/"))
        if match is None or (is_hub_url(text) and match[1].split("/")[0] in _NO_MODELS):
            raise BadInputError(f"{printable(text)}: no such folder, and not a Hub id such as org/name")
        return cls(match[1], match[2].lstrip("/"))

    def inside(self, name: str) -> str:
        """A file's path in the repo."""
        return f"{self.path}/{name}" if self.path else name

    def __str__(self) -> str:
        return f"{self.repo_id}/{self.path}" if self.path else self.repo_id


def is_hub_url(text: str) -> bool:
    """Whether a text is a URL of the Hub, and so says the same as a Hub id."""
    return text.startswith(_SCHEME) or (text.startswith("http") and text.startswith(_endpoints()))


def _endpoints() -> tuple[str, ...]:
    from huggingface_hub import constants

    return f"{constants.ENDPOINT.rstrip('/')}/", "https://huggingface.co/", "https://hf.co/"


def _address(url: str) -> str:
    """The id in a URL of the Hub. Raises UsageError where it says more than a place."""
    start = next(start for start in (_SCHEME, *_endpoints()) if url.startswith(start))
    path = re.sub(r"[?#].*", "", url.removeprefix(start), flags=re.DOTALL).strip("/")
    path = re.sub(rf"^({_NAME}/{_NAME})/tree/main(?=/|$)", r"\1", path)
    further = re.match(rf"({_NAME}/{_NAME})(?:@|/(?:tree|blob|resolve|commit)/)", path)
    if further:
        raise UsageError(
            f"{printable(url)}: names a revision, or a file", hint=f"give {further[1]}, and a branch with --revision"
        )
    return path


def client() -> None:
    """Have the client never wait for ever, which it does by default, and show bars only on a terminal."""
    from huggingface_hub.utils import disable_progress_bars, get_session

    if not sys.stderr.isatty():
        disable_progress_bars()
    hooks = get_session().event_hooks["request"]
    if _be_patient not in hooks:
        hooks.append(_be_patient)


def _be_patient(request: Any) -> None:
    """Before a request is sent: some calls of the client's ask for no timeout at all."""
    from huggingface_hub import constants

    timeout = request.extensions.get("timeout", {})
    longest = _PATIENCE * constants.HF_HUB_DOWNLOAD_TIMEOUT
    bounded = {of: timeout.get(of) or longest for of in ("connect", "read", "write", "pool")}
    request.extensions = {**request.extensions, "timeout": bounded}


def snapshot(
    where: Place, *, revision: str | None, patterns: Sequence[str], ignored: Sequence[str], to: Path | None
) -> tuple[Path, str | None]:
    """The files at a place that match `patterns`, at one commit, fetched into `to` or the cache: (folder, commit).

    Raises:
        NetworkError: the Hub cannot be reached, or does not give it.
    """
    from huggingface_hub import snapshot_download

    client()
    try:
        root = snapshot_download(
            where.repo_id,
            revision=revision,
            allow_patterns=[where.inside(pattern) for pattern in patterns],
            ignore_patterns=[where.inside(pattern) for pattern in ignored],
            local_dir=to,
        )
    except Exception as error:  # the client lets through whatever its transport and its parsers raise
        raise explain(error, str(where), revision=revision) from None
    return Path(root, where.path), revision if to else Path(root).name


def folders(where: Place, commit: str | None, name: str) -> list[str]:
    """The folders below a place that hold a file `name`, by the cache's listing: `snapshot` has left it there."""
    from huggingface_hub import get_cached_repo_tree

    tree = (PurePosixPath(entry.path) for entry in get_cached_repo_tree(where.repo_id, revision=commit))
    found = (path for path in tree if path.name == name and path.is_relative_to(where.path))
    return [str(path.parent.relative_to(where.path)) for path in found]


def discard(path: Path) -> None:
    """Remove a file of the cache and what it links to, so that it is fetched again."""
    while True:
        target = path.parent / path.readlink() if path.is_symlink() else None
        path.unlink(missing_ok=True)
        if target is None:
            return
        path = target
