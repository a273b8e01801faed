"""Object stores, and whatever else fsspec opens, by URL: `s3://bucket/model`."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from ..checkpoint.companions import Item, walk
from ..checkpoint.source import MANIFEST_NAME
from ..errors import BadInputError, IntegrityError, NetworkError, RemoteMovedError, StorageError, UsageError
from ..files.digest import digest_of
from ..files.untrusted import check_plain_path
from ..process import Advance
from ..text import printable
from .disk import pwrite
from .filesystems import check_ranges, doing, identified, listed, name_in
from .hub.address import is_hub_url
from .remote import Entry, GivenUp, lacking, never

__all__ = ["PROBE_NAME", "Store", "as_text", "cache_folder", "is_url", "open_store", "snapshot"]

PROBE_NAME = ".reshard-probe"  # made by `Store.try_out`; a file of that name belongs to nobody

_RANGE = 8 << 20  # bytes of one request
_AT_ONCE = 8  # requests
_ATTEMPTS = 3
_PART = {"chunksize": 16 << 20, "max_concurrency": 4}  # S3's multipart uploads: what they hold in memory
_MOST_PARTS = 10_000  # S3's own limit


def is_url(place: object) -> bool:
    """Whether a place is the URL of a store: not a folder, and not a Hub id, which can have the form of a URL too."""
    return re.match(r"[A-Za-z][\w+.-]*(::|://)", str(place)) is not None and not is_hub_url(str(place))


def as_text(place: str | Path) -> str:
    """Return a place as text. A Path that was made from a URL has lost one of two slashes, which is put back."""
    text = str(place)
    scheme = re.match(r"([A-Za-z][\w+.-]+):/(?!/)", text) if isinstance(place, Path) else None
    return text if scheme is None or os.path.lexists(f"{scheme[1]}:") else text.replace(":/", "://", 1)


def cache_folder() -> Path:
    """Return the folder that keeps what was fetched from stores: `reshard` in the user's cache folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "reshard"


Listing = tuple[Mapping[str, tuple[int, str]], tuple[str, ...]]


@dataclass(frozen=True)
class Store:
    """A folder of a store, as it was listed: size in bytes and identity of each file, and the names of its subfolders.

    The identity changes if and only if the content does. Subfolders are listed when they are asked for.
    """

    url: str
    system: Any
    root: str
    files: Mapping[str, tuple[int, str]]
    folders: tuple[str, ...]
    _below: dict[str, Listing] = field(default_factory=dict, compare=False)

    @cached_property
    def version(self) -> str:
        """An identifier of this state of the folder, subfolders included: a manifest has digests of their files."""
        known = dict(self.files)
        if MANIFEST_NAME not in self.files:
            paths = (item.path for item in self.items() if "/" in item.path[:-1] and not item.odd)
            known |= {path: found for path in paths if (found := self.find(path))}
        return digest_of(repr(sorted(known.items())).encode())

    def find(self, name: str) -> tuple[int, str] | None:
        """Return size and identity of a file, also of one in a subfolder; None if there is none."""
        folder, _, last = name.rpartition("/")
        return self._look(folder)[0].get(last)

    def _look(self, folder: str) -> Listing:
        if not folder:
            return self.files, self.folders
        if folder not in self._below:
            self._below[folder] = _listed(self.system, self.path(folder), self.url)
        return self._below[folder]

    def items(self) -> list[Item]:
        """Return all its files; those of a subfolder only if some of them can go along with a checkpoint."""

        def look(folder: str) -> tuple[list[Item], Iterable[str]]:
            try:
                files, folders = self._look(folder.rstrip("/"))
            except UsageError as error:  # a change of its files would not be noticed
                return [Item(folder, odd=error.message)], ()
            return [Item(folder + name, size) for name, (size, _) in files.items()], folders

        return list(walk(look))

    def __str__(self) -> str:
        return printable(self.url)

    def path(self, name: str) -> str:
        """Return a file's path as the file system takes it."""
        return f"{self.root}/{name}"

    def cached(self) -> Path:
        """Return the folder of this machine that keeps the files of this version."""
        return cache_folder() / digest_of(self.url.encode()) / self.version

    def entries(self, names: Sequence[str]) -> list[Entry]:
        """Return the size of each file. Raises BadInputError if there is none of that name."""
        return [Entry(name, self._known(name)[0], None) for name in names]

    def _known(self, name: str) -> tuple[int, str]:
        found = self.find(name)
        if found is None:
            raise lacking(self, name)
        return found

    def read(self, name: str, start: int, end: int) -> bytes:
        """Return the bytes from `start` to `end` of a file. Raises NetworkError."""
        if start == end:
            return b""
        path, size = self.path(name), self._known(name)[0]
        for _ in range(_ATTEMPTS):
            with doing("read", self.url):
                if size > _RANGE and "http" in self.system.protocol:
                    check_ranges(self.system, path, size)
                found: bytes = self.system.cat_file(path, start=start, end=end)
            if len(found) == size:  # the whole file, from a server that ignores ranges
                found = found[start:end]
            if len(found) == end - start:
                return found
        raise NetworkError(f"{self}: {printable(name)}: the connection breaks", hint="try again")

    def get(self, name: str, folder: Path | None, given_up: GivenUp = never) -> Path:
        """Fetch a whole file, by ranges, into `folder` or else the cache. It appears there in one step.

        Raises:
            IntegrityError: the file was changed meanwhile.
            InterruptedError: the work was given up meanwhile.
        """
        check_plain_path(name, what=str(self))
        size, target = self.entries([name])[0].size, (folder or self.cached()) / name
        part = target.with_name(f".{target.name}.part-{secrets.token_hex(4)}")
        try:
            part.parent.mkdir(parents=True, exist_ok=True)
            fd = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
            try:
                self._fill(fd, name, size, given_up)
            finally:
                os.close(fd)
            if self._now(name) != self.find(name):
                raise IntegrityError(f"{self}: {printable(name)} was changed while it was fetched", hint="try again")
            os.replace(part, target)
        except InterruptedError:
            raise
        except OSError as error:
            raise StorageError(f"{printable(target)}: {error.strerror}") from None
        finally:
            with contextlib.suppress(OSError):  # a failure here must not hide what went wrong before
                part.unlink(missing_ok=True)
        return target

    def _now(self, name: str) -> tuple[int, str] | None:
        """Return size and identity of a file as it is listed now; None if it is gone."""
        folder, _, last = self.path(name).rpartition("/")
        with doing("list", self.url):
            found = [info for info in listed(self.system, folder) if name_in(info) == last]
            return identified(self.system, found[0]) if found else None

    def _fill(self, fd: int, name: str, size: int, given_up: GivenUp) -> None:
        def piece(start: int) -> None:
            if given_up():
                raise InterruptedError
            pwrite(fd, memoryview(self.read(name, start, min(start + _RANGE, size))), start)

        pool = ThreadPoolExecutor(_AT_ONCE)
        try:
            for done in [pool.submit(piece, start) for start in range(0, size, _RANGE)]:
                done.result()
        finally:
            pool.shutdown(cancel_futures=True)

    def holds(self, path: Path, name: str) -> bool:
        """Whether the store's file of that name holds the same bytes as the local one; both are read."""
        size = path.stat().st_size
        if self._known(name)[0] != size:
            return False
        with open(path, "rb") as here, ThreadPoolExecutor(_AT_ONCE) as pool:

            def same(start: int) -> bool:
                end = min(start + _RANGE, size)
                return os.pread(here.fileno(), end - start, start) == self.read(name, start, end)

            return all(pool.map(same, range(0, size, _RANGE)))

    def put(self, path: Path, name: str, progress: Callable[[int], object] = lambda _: None) -> None:
        """Send a file, in parts if the store takes parts; nobody sees it before it is complete.

        Raises:
            FileExistsError: there is one of that name.
        """
        from fsspec.callbacks import Callback

        class Told(Callback):
            def relative_update(self, inc: int = 1) -> None:
                progress(inc)

        options: dict[str, Any] = {}
        if "s3" in self.system.protocol:
            options = _PART | {"chunksize": max(_PART["chunksize"], path.stat().st_size // _MOST_PARTS + 1)}
        with doing("write", self.url):
            self.system.put_file(str(path), self.path(name), callback=Told(), mode="create", **options)

    def remove(self, name: str) -> None:
        """Remove a file; it may be gone already. Raises NetworkError."""
        with doing("remove from", self.url), contextlib.suppress(FileNotFoundError):
            self.system.rm_file(self.path(name))

    def try_out(self) -> None:
        """Put a small file there like any other, and remove it. If removing fails, or in a crash, it stays.

        Raises:
            UsageError: a store of this kind takes no files.
            NetworkError: the store refuses.
            StorageError: a small file cannot be made here, in the cache.
        """
        try:
            with tempfile.NamedTemporaryFile(dir=cache_folder()) as file:
                file.write(b"\n")  # not every store takes an empty file
                file.flush()
                self.put(Path(file.name), PROBE_NAME)
        except FileExistsError:  # one from an earlier run has stayed
            pass
        except OSError as error:
            raise StorageError(f"{printable(cache_folder())}: {error.strerror}") from None
        with contextlib.suppress(Exception):
            self.system.rm_file(self.path(PROBE_NAME))


def open_store(url: str, version: str | None = None) -> Store:
    """List the folder at a URL, as it is now. If there is no such folder, it has no files.

    Raises:
        RemoteMovedError: it is not at `version` any more.
        UsageError: the package for this kind of URL is missing, there is no such kind, or `version` is none of a store.
        NetworkError: the store cannot be reached, or refuses.
    """
    if version is not None and not re.fullmatch("[0-9a-f]{32}", version):  # the form of a `Store.version`
        raise UsageError(f"{printable(url)}: a URL has no revision {printable(version)}", hint="leave out --revision")
    if "::" in url:
        raise UsageError(f"{printable(url)}: chained URLs are not taken", hint="give the URL of the folder itself")
    with doing("list", url):
        import fsspec

        system, root = fsspec.core.url_to_fs(url)
        if "file" in system.protocol:
            raise UsageError(f"{printable(url)}: is on this machine", hint=f"give its path: {printable(root)}")
        root = root.rstrip("/")
    store = Store(url.rstrip("/"), system, root, *_listed(system, root, url))
    if version is not None and store.version != version:
        raise RemoteMovedError(f"{store}: has changed meanwhile", hint="run it again")
    return store


def _listed(system: Any, root: str, url: str) -> Listing:
    """Return the files in a folder, and the names of its subfolders, as they are now."""
    with doing("list", url):
        found = listed(system, root)
        folders = sorted(name_in(info) for info in found if info["type"] == "directory")
        infos = [info for info in found if info["type"] != "directory" and info["name"].rstrip("/") != root]
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            files = dict(zip(map(name_in, infos), pool.map(partial(identified, system), infos)))
    return files, tuple(folders)


def snapshot(
    url: str,
    *,
    version: str | None,
    patterns: Sequence[str],
    ignored: Sequence[str],
    to: Path | None,
    report: Advance | None = None,
) -> tuple[Path, str]:
    """Fetch the files of a store's folder that match `patterns` into `to` or the cache: (folder, version).

    `report` is told of the bytes of each file that has come.

    Raises:
        BadInputError: nothing is there.
        RemoteMovedError: the folder is not at `version` any more.
    """
    store = open_store(url, version)
    if not store.files and not store.folders:
        raise BadInputError(f"{store}: nothing is there", hint="check the name")
    folder = to or store.cached()

    def matches(name: str, patterns: Sequence[str]) -> bool:
        return any(fnmatchcase(name, pattern) for pattern in patterns)

    nested = any("/" in pattern for pattern in patterns)
    for name in [item.path for item in store.items() if not item.odd] if nested else store.files:
        if matches(name, patterns) and not matches(name, ignored) and not (folder / name).exists():
            store.get(name, folder)
            if report is not None:
                report(store.entries([name])[0].size)
    return folder, store.version
