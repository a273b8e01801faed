"""Whether a model may be shown to everybody: what its source says of its licence, and who may have it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from ..errors import PolicyError, UsageError, printable
from ..manifest import Manifest
from .errors import explain
from .place import Place
from .session import client, is_unreachable

__all__ = ["Terms", "check_public", "source_terms"]

_IDENTIFIER = re.compile(r"[A-Za-z0-9][A-Za-z0-9.+-]{0,99}")


@dataclass(frozen=True, slots=True)
class Terms:
    """Of the source: its licence as the Hub names it, and what stands against publishing it openly, if anything does.

    `stated` is whether the user has named the licence. `metadata` goes into the card as it is.
    """

    licence: str | None
    obstacle: str | None
    stated: bool
    metadata: dict[str, str]


def source_terms(manifest: Manifest, stated: str | None) -> Terms:
    """Ask the Hub about the source of a resharded folder; `stated` is the licence the user names, if any.

    Raises:
        UsageError: `stated` is not the identifier of a licence.
        PolicyError: the source says another licence.
        NetworkError: the Hub does not answer.
    """
    if stated is not None and not _IDENTIFIER.fullmatch(stated):
        raise UsageError(f"{printable(stated)}: not the identifier of a licence", hint="such as apache-2.0, or other")
    if manifest.repo_id is None:
        return Terms(stated, "it was made from a local folder, whose licence is not known", stated is not None, {})
    repo_id = Place.parse(manifest.repo_id).repo_id
    name = printable(repo_id)
    try:
        from huggingface_hub import HfApi

        with client():
            info = HfApi().model_info(repo_id)
    except Exception as error:
        why = explain(error, repo_id, writing="ask for its licence")
        if is_unreachable(error):  # which says nothing of the source
            raise why from None
        return Terms(stated, f"its source cannot be asked for a licence ({why.message})", stated is not None, {})
    metadata = _metadata(info)
    licence = metadata.get("license")
    if stated and licence and stated.lower() != licence.lower():
        raise PolicyError(f"its source {name} is under the licence {licence}, not {stated}")
    if info.gated:
        obstacle: str | None = f"its source {name} is gated"
    elif info.private:
        obstacle = f"its source {name} is private"
    else:
        obstacle = None if licence else f"its source {name} names no licence"
    return Terms(licence or stated, obstacle, stated is not None, metadata)


def _metadata(info: Any) -> dict[str, str]:
    """What the card takes over from the source's: identifiers and links, none of its text."""
    card = info.card_data.to_dict() if info.card_data else {}
    found = {}
    for key in ("license", "license_name", "pipeline_tag"):
        value = card.get(key) or getattr(info, key, None)
        if isinstance(value, str) and _IDENTIFIER.fullmatch(value):
            found[key] = value
    link = card.get("license_link")
    if isinstance(link, str) and link.isprintable() and " " not in link:
        found["license_link"] = link if "://" in link else f"https://huggingface.co/{info.id}/blob/{info.sha}/{link}"
    return found


def check_public(place: str, terms: Terms) -> None:
    """Raises PolicyError where it takes the user's word to publish the model openly, and there is none."""
    if terms.obstacle and not terms.stated:
        known = terms.licence or "ID"
        raise PolicyError(
            f"{printable(place)}: not published for everybody: {terms.obstacle}",
            hint=f"if its terms allow that, name its licence: --license {known}; or publish it with --private",
        )
