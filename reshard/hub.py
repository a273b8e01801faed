"""The Hugging Face Hub, through huggingface_hub alone."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from .errors import BadInputError, NetworkError, printable
from .source import Source, open_source

__all__ = ["SMALL_FILES", "locate", "resolve_source"]

# The small files beside the weights; never pickles, never code.
SMALL_FILES = ("*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken", "LICENSE*", "NOTICE*")
_NOT_WANTED = ["*/*", "adapter_*", "consolidated*"]
_REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


def locate(
    place: str, *, revision: str | None = None, patterns: Sequence[str] = (*SMALL_FILES, "*.safetensors")
) -> tuple[Path, str | None, str | None]:
    """A local folder, or the snapshot of a Hub repo pinned to one commit: (folder, repo id, commit).

    Files already in the cache are used from there. Raises NetworkError, or BadInputError where `place` is neither.
    """
    path = Path(place)
    if path.exists():
        return path, None, None
    if not _REPO_ID.fullmatch(place):
        raise BadInputError(f"{printable(place)}: no such folder, and not a Hub id such as org/name")

    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    try:
        folder = snapshot_download(place, revision=revision, allow_patterns=list(patterns), ignore_patterns=_NOT_WANTED)
    except RepositoryNotFoundError:
        raise NetworkError(
            f"{printable(place)}: no such folder here, and no such repo on the Hub (or it is private)",
            hint="check the name; for a private repo log in with: hf auth login",
        ) from None
    except LocalEntryNotFoundError:
        raise NetworkError(
            f"{printable(place)}: no such folder here, and the Hub cannot be reached",
            hint="check the connection, or give a local folder",
        ) from None
    except HFValidationError as error:
        raise BadInputError(f"{printable(place)}: {printable(error)}") from None
    except (HfHubHTTPError, OSError) as error:
        raise NetworkError(f"{printable(place)}: {printable(error)}") from None
    return Path(folder), place, Path(folder).name


def resolve_source(place: str, *, revision: str | None = None) -> Source:
    """Open a checkpoint: a local folder, or a Hub id fetched into the cache first."""
    root, repo_id, commit = locate(place, revision=revision)
    return open_source(root, repo_id=repo_id, commit=commit)
