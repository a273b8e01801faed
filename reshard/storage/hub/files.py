"""The files of a checkpoint that stays on the Hub: what there is, any bytes of them, or one of them whole."""

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
    """The files at a place of the Hub at one commit."""

    place: Place
    version: str

    def __str__(self) -> str:
        return str(self.place)

    def items(self) -> list[Item]:
        """The files at the place and in its folders. Raises NetworkError."""
        return [Item(path, size) for path, size in files(self.place, self.version).items()]

    def entries(self, names: Sequence[str]) -> list[Entry]:
        """Size and, where the Hub gives one, SHA-256 of each file.

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
            if info is None or not hasattr(info, "size"):  # a folder can have such a name too
                raise lacking(self, name)
            entries.append(Entry(name, info.size, info.lfs.sha256 if info.lfs else None))
        return entries

    def read(self, name: str, start: int, end: int) -> bytes:
        """The bytes from `start` to `end` of a file. Raises NetworkError."""
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
        """What comes of the bytes from `start` to `end`: fewer where the connection breaks, and no more of the file
        also from a server that would send all of it. It is asked for again where there is no answer."""
        from huggingface_hub import hf_hub_url
        from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, http_stream_backoff

        url = hf_hub_url(self.place.repo_id, self.place.inside(name), revision=self.version)
        headers = {**build_hf_headers(), "Range": f"bytes={start}-{end - 1}", "Accept-Encoding": "identity"}
        data = bytearray()
        with http_stream_backoff("GET", url, headers=headers, follow_redirects=True, max_retries=RETRIES) as response:
            hf_raise_for_status(response)
            skip = start if response.status_code == 200 else 0
            # Not let out of here: the client would take it for a failure to connect, and come back with another answer.
            with contextlib.suppress(Exception):
                for piece in response.iter_bytes():
                    data += piece
                    if len(data) >= skip + end - start:
                        break
        return bytes(data[skip : skip + end - start])

    def get(self, name: str, folder: Path | None, given_up: GivenUp = never) -> Path:
        """Fetch a file whole, into `folder`, or the cache where that is None.

        Raises NetworkError; InterruptedError once it is given up.
        """
        from huggingface_hub import hf_hub_download
        from huggingface_hub.utils import tqdm

        class Told(tqdm):  # by every piece that arrives
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
        except Exception as error:  # which may only say that it is not in the cache either
            raise explain(error.__cause__ or error, str(self), revision=self.version) from None
        return Path(path)
