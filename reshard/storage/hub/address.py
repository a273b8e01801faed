"""Names and URLs of Hub repos, and of folders in them."""

from __future__ import annotations

import re
from dataclasses import dataclass

from ...errors import BadInputError, UsageError
from ...text import printable

__all__ = ["Place", "is_hub_url"]


_NAME = r"[A-Za-z0-9][\w.-]*"


_PLACE = re.compile(rf"({_NAME}(?:/{_NAME})?)((?:/{_NAME})*)")


_SCHEME = "hf://"


_NO_MODELS = ("datasets", "spaces", "buckets")  # the path of a URL begins so if it is no model's


@dataclass(frozen=True, slots=True)
class Place:
    """A Hub repo, or a folder of one: `org/name`, or `org/name/path`."""

    repo_id: str
    path: str = ""

    @classmethod
    def parse(cls, text: str) -> Place:
        """Parse an id, the address of its page, or `hf://org/name`.

        Raises:
            BadInputError: it is none of these.
            UsageError: the address is that of a revision, or of a file.
        """
        match = _PLACE.fullmatch(_address(text) if is_hub_url(text) else text.rstrip("/"))
        if match is None or (is_hub_url(text) and match[1].split("/")[0] in _NO_MODELS):
            raise BadInputError(f"{printable(text)}: no such folder, and not a Hub id such as org/name")
        return cls(match[1], match[2].lstrip("/"))

    def inside(self, name: str) -> str:
        """Return a file's path in the repo."""
        return f"{self.path}/{name}" if self.path else name

    def __str__(self) -> str:
        return f"{self.repo_id}/{self.path}" if self.path else self.repo_id


def is_hub_url(text: str) -> bool:
    """Whether a text is a URL of the Hub, and so means the same as a Hub id."""
    return text.startswith(_SCHEME) or (text.startswith("http") and text.startswith(_endpoints()))


def _endpoints() -> tuple[str, ...]:
    from huggingface_hub import constants

    return f"{constants.ENDPOINT.rstrip('/')}/", "https://huggingface.co/", "https://hf.co/"


def _address(url: str) -> str:
    """Return the id in a URL of the Hub. Raises UsageError if the URL names more than a repo or a folder."""
    start = next(start for start in (_SCHEME, *_endpoints()) if url.startswith(start))
    path = re.sub(r"[?#].*", "", url.removeprefix(start), flags=re.DOTALL).strip("/")
    path = re.sub(rf"^({_NAME}/{_NAME})/tree/main(?=/|$)", r"\1", path)
    further = re.match(rf"({_NAME}/{_NAME})(?:@|/(?:tree|blob|resolve|commit)/)", path)
    if further:
        raise UsageError(
            f"{printable(url)}: names a revision, or a file", hint=f"give {further[1]}, and a branch with --revision"
        )
    return path
