"""The terms of a model to publish: its licence, from the source and the user, and whether it may be public."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from ...errors import BadInputError, PolicyError, UsageError
from ...resharded.manifest import Manifest
from ...storage.hub.address import Place
from ...storage.hub.errors import explain
from ...storage.hub.session import again, is_unreachable
from ...text import printable

__all__ = ["Terms", "agreed", "agreed_by_hand", "check_public", "source_terms"]

_IDENTIFIER = re.compile(r"[A-Za-z0-9][A-Za-z0-9.+-]{0,99}")


@dataclass(frozen=True, slots=True)
class Terms:
    """The source's licence as the Hub names it, and the obstacle to publishing the model openly, if there is one.

    `stated` says whether the user has named the licence. `metadata` goes into the card unchanged.
    """

    licence: str | None
    obstacle: str | None
    stated: bool
    metadata: dict[str, str]


def source_terms(manifest: Manifest, stated: str | None) -> Terms:
    """Ask the Hub about the source of a resharded folder; `stated` is the licence the user names, if any.

    Raises:
        UsageError: `stated` is not the identifier of a licence.
        PolicyError: the source states another licence.
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

        info = again(lambda: HfApi().model_info(repo_id))
    except Exception as error:
        why = explain(error, repo_id, writing="ask for its licence")
        if is_unreachable(error):  # so nothing is known about the source
            raise why from None
        return Terms(stated, f"its source cannot be asked for a licence ({why.message})", stated is not None, {})
    metadata = _of_source(info)
    licence = metadata.get("license")
    if stated and licence and stated.lower() != licence.lower():
        raise PolicyError(
            f"its source {name} is under the licence {licence}, not {stated}",
            hint=f"leave out --license, or say the same: --license {licence}",
        )
    if info.gated:
        obstacle: str | None = f"its source {name} is gated"
    elif info.private:
        obstacle = f"its source {name} is private"
    else:
        obstacle = None if licence else f"its source {name} names no licence"
    return Terms(licence or stated, obstacle, stated is not None, metadata)


def _of_source(info: Any) -> dict[str, str]:
    """Return what our card takes over from the source's card."""
    card = info.card_data.to_dict() if info.card_data else {}
    beside = {"pipeline_tag": info.pipeline_tag}
    return _metadata({**beside, **card}, f"https://huggingface.co/{info.id}/blob/{info.sha}/")


def _metadata(card: Mapping[str, Any], folder: str) -> dict[str, str]:
    """Return what the next card can take from a card's front matter: identifiers and a link, none of its text.

    A link that is no URL is to a file in `folder`.
    """
    found = {}
    for key in ("license", "license_name", "pipeline_tag"):
        value = card.get(key)
        if isinstance(value, str) and _IDENTIFIER.fullmatch(value):
            found[key] = value
    link = card.get("license_link")
    if isinstance(link, str) and link.isprintable() and " " not in link:
        found["license_link"] = link if "://" in link else folder + link
    return found


def agreed(place: Place, terms: Terms, card: str | None, manifest: Manifest, there: Mapping[str, Manifest]) -> Terms:
    """Return the terms for a repo's one card, for the manifests `there` (by path) and the one to be published.

    If one of them has the same source, what the repo's `card` says stays unless something newer is known.

    Raises:
        PolicyError: models of other sources are there, under another licence.
        BadInputError: the front matter of `card` cannot be read.
    """
    before = {} if card is None else _metadata(_front_matter(place.repo_id, card), "")
    licence = before.get("license")
    if licence and terms.licence in (None, licence) and any(_same_source(manifest, other) for other in there.values()):
        terms = replace(terms, licence=licence, metadata={**before, **terms.metadata})
    others = (other for path, other in there.items() if path != place.path)
    if terms.licence != licence and not all(_same_source(manifest, other) for other in others):
        raise PolicyError(
            f"{printable(place.repo_id)}: its card states {_words(licence)} for models of other sources, and this one"
            f" has {_words(terms.licence)}",
            hint="a repo has one licence: take another repo"
            + (f", or if that is the licence of this one too: --license {licence}" if licence else ""),
        )
    return terms


def agreed_by_hand(place: Place, terms: Terms, card: str) -> Terms:
    """Return the terms for a repo whose card somebody wrote. The card stays, so its licence is the one shown.

    Raises:
        PolicyError: it states another licence.
        BadInputError: its front matter cannot be read.
    """
    licence = _metadata(_front_matter(place.repo_id, card), "").get("license")
    if licence and terms.licence and licence.lower() != terms.licence.lower():
        whose = "--license" if terms.stated else "the source"
        raise PolicyError(
            f"{printable(place.repo_id)}: its README.md says the licence {licence}, and {whose} {terms.licence}",
            hint="that page stays as it is: correct it there"
            + (f", or give --license {licence}" if terms.stated else ""),
        )
    return replace(terms, licence=terms.licence or licence)


def _words(licence: str | None) -> str:
    return f"the licence {licence}" if licence else "no licence"


def _front_matter(repo_id: str, card: str) -> dict[str, Any]:
    from huggingface_hub import ModelCard

    try:
        return dict(ModelCard(card, ignore_metadata_errors=True).data.to_dict())
    except Exception as error:  # from the YAML parser, or from reading what it returns
        words = printable(next(iter(str(error).splitlines()), ""))
        raise BadInputError(
            f"{printable(repo_id)}: README.md: the front matter cannot be read: {words}", hint="mend it there"
        ) from None


def _same_source(one: Manifest, other: Manifest) -> bool:
    """Whether both were made from the same repo, or from the same files."""
    if one.repo_id and other.repo_id and _repo(one) == _repo(other):
        return True
    return _digests(one) == _digests(other)


def _repo(manifest: Manifest) -> list[str]:
    return str(manifest.repo_id).split("/")[:2]


def _digests(manifest: Manifest) -> set[str]:
    """Return the digests of the files that a folder was made of, before they were quantized or dequantised."""
    files = manifest.derived["files"] if manifest.derived else manifest.source_files
    return {str(file["digest"]) for file in files}


def check_public(place: str, terms: Terms) -> None:
    """Raise PolicyError if publishing the model openly takes the user's word, and there is none."""
    if terms.obstacle and not terms.stated:
        known = terms.licence or "ID"
        raise PolicyError(
            f"{printable(place)}: not published for everybody: {terms.obstacle}",
            hint=f"if its terms allow that, name its licence: --license {known}; or publish it with --private",
        )
