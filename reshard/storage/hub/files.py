"""The files of a checkpoint that stays on the Hub: a list of them, any bytes of them, or a whole one."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...checkpoint.companions import Item
from ...errors import NetworkError
from ...text import printable
from ..remote import Entry, GivenUp, lacking, never
from .address import Place
from .errors import explain
from .session import RETRIES, again, client
from .snapshot import files

__all__ = ["HubFiles"]

_ATTEMPTS = 3


@dataclass(frozen=True, slots=True)
class HubFiles:
    """The files of a Hub repo, or of a folder in it, at one commit."""

    place: Place
    version: str

    def __str__(self) -> str:
        return str(self.place)

    def items(self) -> list[Item]:
        """Return the files at the place and in its subfolders. Raises NetworkError."""
        return [Item(path, size) for path, size in files(self.place, self.version).items()]

    def entries(self, names: Sequence[str]) -> list[Entry]:
        """Return the size of each file and, if the Hub gives one, its SHA-256.

        Raises:
            BadInputError: there is none of that name.
            NetworkError: the Hub does not answer.
        """
        if not names:
            return []
        from huggingface_hub import HfApi

        paths = [self.place.inside(name) for name in names]
        try:
            infos = again(lambda: HfApi().get_paths_info(self.place.repo_id, paths, revision=self.version))
        except Exception as error:
            raise explain(error, str(self), revision=self.version) from None
        found = {info.path: info for info in infos}
        entries = []
        for name, path in zip(names, paths):
            info = found.get(path)
            if info is None or not hasattr(info, "size"):  # it can also be a folder
                raise lacking(self, name)
            entries.append(Entry(name, info.size, info.lfs.sha256 if info.lfs else None))
        return entries

    def read(self, name: str, start: int, end: int) -> bytes:
        """Return the bytes from `start` to `end` of a file. Raises NetworkError."""
        if start == end:
            return b""
        for _ in range(_ATTEMPTS):
            try:
                with client():
                    found = self._ask(name, start, end)
            except Exception as error:
                raise explain(error, str(self), revision=self.version) from None
            if len(found) == end - start:
                return found
        raise NetworkError(f"{self}: {printable(name)}: the connection breaks", hint="try again")

    def _ask(self, name: str, start: int, end: int) -> bytes:
        """Request the bytes from `start` to `end`, again if there is no answer, and return what comes.

        There are fewer if the connection breaks, and never more, even if the server would send the whole file.
        """
        from huggingface_hub import hf_hub_url
        from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, http_stream_backoff

        url = hf_hub_url(self.place.repo_id, self.place.inside(name), revision=self.version)
        headers = {**build_hf_headers(), "Range": f"bytes={start}-{end - 1}", "Accept-Encoding": "identity"}
        data = bytearray()
        with http_stream_backoff("GET", url, headers=headers, follow_redirects=True, max_retries=RETRIES) as response:
            hf_raise_for_status(response)
            skip = start if response.status_code == 200 else 0
            # No error may get out of here: the client would take it for a failure to connect, and bring another answer.
            with contextlib.suppress(Exception):
                for piece in response.iter_bytes():
                    data += piece
                    if len(data) >= skip + end - start:
                        break
        return bytes(data[skip : skip + end - start])

    def get(self, name: str, folder: Path | None, given_up: GivenUp = never) -> Path:
        """Fetch a whole file into `folder`, or the cache if that is None.

        Raises NetworkError, or InterruptedError once it is given up.
        """
        from huggingface_hub import hf_hub_download
        from huggingface_hub.utils import tqdm

        class Told(tqdm):  # told of every piece that arrives
            def update(self, n: float | None = 1) -> Any:
                if given_up():
                    raise InterruptedError
                return super().update(n)

        try:
            path = again(
                lambda: hf_hub_download(
                    self.place.repo_id,
                    self.place.inside(name),
                    revision=self.version,
                    local_dir=folder,
                    tqdm_class=Told,
                )
            )
        except InterruptedError:
            raise
        except Exception as error:  # it may only say that the file is not in the cache either
            raise explain(error.__cause__ or error, str(self), revision=self.version) from None
        return Path(path)
