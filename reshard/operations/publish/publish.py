"""A resharded folder as one commit of a Hub repo: files, manifest and card together, or nothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ...checkpoint.kinds import is_weights
from ...checkpoint.source import MANIFEST_NAME
from ...errors import BadInputError, DestinationExistsError, IntegrityError, PolicyError, RemoteMovedError, UsageError
from ...process import Progress, silent
from ...resharded.manifest import Manifest, read_manifest
from ...storage.disk import discard
from ...storage.hub.address import Place
from ...storage.hub.errors import doing
from ...storage.hub.session import RETRIES, again
from ...storage.locate import local_folder
from ...storage.stores import is_url
from ...text import listed, printable
from ..arguments import checked
from ..verify.verify import verify
from .card import is_ours, render
from .licence import Terms, agreed, agreed_by_hand, check_public, source_terms
from .pictures import drawn, is_drawn
from .upload import Change, LocalFile, holds, upload

__all__ = ["Published", "publish"]

_CARD = "README.md"


@dataclass(frozen=True, slots=True)
class Published:
    """A publication that was made, or would be. `size` is in bytes; `card` says whether the repo's page is written.

    `commit` and `url` are None for a dry run; `url` is the page of the commit, or of the pull request if one was made.
    """

    repo_id: str
    path: str
    revision: str
    private: bool
    licence: str | None
    files: int
    size: int
    deleted: tuple[str, ...]
    card: bool
    commit: str | None = None
    url: str | None = None


@dataclass(frozen=True, slots=True)
class _Remote:
    """The repo as it is: `head`, the parent of the commit to come (None: there is no repo), and its files by path."""

    private: bool
    head: str | None
    new_branch: bool
    files: Mapping[str, Any]


@checked
def publish(
    out: str | Path,
    place: str,
    *,
    revision: str | None = None,
    private: bool = False,
    licence: str | None = None,
    create_pr: bool = False,
    dry_run: bool = False,
    progress: Progress = silent,
) -> Published:
    """Publish a resharded folder as `place`: a Hub repo, `org/name`, or a folder of one, `org/name/tp4`.

    The folder's digests are checked first. The repo and the branch `revision` are created if they are missing. One
    commit, onto the head found at the start, makes everything visible; then the Hub's files are compared with the local
    ones. If the same call is made again after an interruption, only what is missing is sent.

    `licence` is the user's word that the model may be public. It is needed if the source is gated or private, names no
    licence, or cannot be asked.

    Raises:
        IntegrityError: a file here, or on the Hub afterwards, is not what it should be.
        PolicyError: that word is missing, the repo is public though `private` is given, it holds models of other
            sources under another licence, or its hand-written page states another licence.
        DestinationExistsError: the repo holds other weights there, or other files of the same names.
        BadInputError: `place` names no owner, or the Hub refuses the card.
        UsageError: `place` is the URL of a store, or `out` is a URL.
        NetworkError: the Hub cannot be reached, or refuses; the message says which right is missing.
        RemoteMovedError: somebody else has changed the repo meanwhile.
    """
    if is_url(place):
        raise UsageError(
            f"{printable(place)}: not a place on the Hub, such as org/name",
            hint="reshard convert writes into a store, with its URL as OUT",
        )
    folder, where = local_folder(out), Place.parse(place)
    if "/" not in where.repo_id:
        raise BadInputError(f"{printable(place)}: not a repo id", hint=f"name its owner too: OWNER/{where.repo_id}")
    manifest = read_manifest(folder)
    names = [*(record.name for record in manifest.files()), MANIFEST_NAME]
    files = {where.inside(name): LocalFile.now(folder / name) for name in names if (folder / name).exists()}
    verify(folder, progress=progress)

    remote = _look(where.repo_id, revision, private)
    if private and not remote.private:
        raise PolicyError(f"{where.repo_id}: is public", hint="make it private in its settings, or take another name")
    page = _page(where, remote)
    ours = page is None or is_ours(page)
    there = _manifests(where, remote, every=ours)
    terms = source_terms(manifest, licence)
    if page is not None and not ours:
        terms = agreed_by_hand(where, terms, page)
    else:
        terms = agreed(where, terms, page, manifest, there)
    if not remote.private:
        check_public(str(where), terms)
    deleted = _obsolete(where, remote, manifest, there.get(where.path), files)
    texts = _card(where, remote, {**there, where.path: manifest}, terms, revision, files) if ours else {}
    plan = Published(
        repo_id=where.repo_id,
        path=where.path,
        revision=revision or "main",
        private=remote.private,
        licence=terms.licence,
        files=len(files) + len(texts),
        size=sum(file.size for file in files.values()) + sum(len(text.encode()) for text in texts.values()),
        deleted=deleted,
        card=bool(texts),
    )
    if dry_run:
        return plan
    try:
        remote = _create(where, remote, revision)
        commit, url = upload(
            Change(
                repo_id=where.repo_id,
                parent=str(remote.head),
                revision=revision,
                new_branch=remote.new_branch,
                files=files,
                texts=texts,
                deleted=plan.deleted,
                message=f"{where.path or 'model'} for {manifest.topology}, by reshard",
                create_pr=create_pr,
            )
        )
    except BaseException as error:
        if not isinstance(error, Exception):
            error.__dict__.setdefault("hint", "the same command goes on, and sends only what is missing")
        raise
    return replace(plan, commit=commit, url=url)


def _look(repo_id: str, revision: str | None, private: bool) -> _Remote:
    """Look the repo up. If there is none, return what it would be."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError
    from huggingface_hub.hf_api import RepoFile

    api = HfApi()
    with doing("look it up", repo_id):
        try:
            info = again(lambda: api.model_info(repo_id))
        except RepositoryNotFoundError:
            return _Remote(private, None, False, {})
        head, new_branch = info.sha, False
        if revision is not None:
            try:
                head = again(lambda: api.model_info(repo_id, revision=revision)).sha
            except RevisionNotFoundError:
                new_branch = True
        tree = again(lambda: list(api.list_repo_tree(repo_id, recursive=True, revision=head)))
        files = {entry.path: entry for entry in tree if isinstance(entry, RepoFile)}
    return _Remote(bool(info.private), head, new_branch, files)


def _create(where: Place, remote: _Remote, revision: str | None) -> _Remote:
    """Create the repo if there is none. Raises RemoteMovedError if another one has just appeared."""
    from huggingface_hub import HfApi

    if remote.head is not None:
        return remote
    with doing("create the repo", where.repo_id):
        HfApi().create_repo(where.repo_id, private=remote.private or None)
    made = _look(where.repo_id, revision, remote.private)
    if made.private < remote.private:
        raise RemoteMovedError(f"{where.repo_id}: was made private, and is public")
    return made


def _obsolete(
    where: Place, remote: _Remote, manifest: Manifest, known: Manifest | None, files: Mapping[str, LocalFile]
) -> tuple[str, ...]:
    """Return the paths that an earlier publication (manifest `known`) has in the repo and this one has not.

    Raises DestinationExistsError if other weights are there, or other files that `files` would replace.
    """
    from huggingface_hub import CommitOperationAdd

    earlier = set()
    if known is not None:
        earlier = {where.inside(name) for name in (*(record.name for record in known.files()), MANIFEST_NAME)}
    hint = f"name a folder of the repo: {where.repo_id}/tp{manifest.world_size}"
    if where.path == f"tp{manifest.world_size}":
        hint = "name another folder of the repo, or remove them there first"
    beside = [path for path in remote.files if path.rpartition("/")[0] == where.path]
    there = {*beside, *(remote.files.keys() & {*earlier, *files})}  # subfolders too
    foreign = [path for path in beside if is_weights(path) and path not in earlier]
    if foreign:
        raise DestinationExistsError(f"{where}: holds other weights: {listed(foreign)}", hint=hint)
    replaced = [
        path
        for path in sorted(files.keys() & there - earlier)
        if not holds(remote.files[path], CommitOperationAdd(path, str(files[path].path)))
    ]
    if replaced:
        raise DestinationExistsError(f"{where}: holds other files of these names: {listed(replaced)}", hint=hint)
    return tuple(path for path in sorted(there) if path in earlier - files.keys())


def _page(where: Place, remote: _Remote) -> str | None:
    """Return the text of the repo's page, ours or written by hand; None if it has none."""
    return _text(where, remote, _CARD) if _CARD in remote.files else None


def _text(where: Place, remote: _Remote, name: str) -> str:
    from huggingface_hub import hf_hub_download

    with doing("read its card", where.repo_id):
        path = again(lambda: hf_hub_download(where.repo_id, name, revision=remote.head))
        return Path(path).read_text(errors="replace")


def _card(
    where: Place,
    remote: _Remote,
    manifests: Mapping[str, Manifest],
    terms: Terms,
    revision: str | None,
    files: Mapping[str, LocalFile],
) -> dict[str, str]:
    """Return the page for all resharded folders in the repo, checked by the Hub, and its pictures, each by its path.

    A file of `files` that has a picture's name is the folder's own, and stays.
    Raises DestinationExistsError if another file in the repo has a picture's name.
    """
    ordered = dict(sorted(manifests.items(), key=lambda item: (item[1].world_size, item[0])))
    pictures = {path: picture for path, picture in drawn(ordered).items() if picture.name not in files}
    foreign = [
        picture.name
        for picture in pictures.values()
        if picture.name in remote.files and not is_drawn(_text(where, remote, picture.name))
    ]
    if foreign:
        raise DestinationExistsError(
            f"{where}: holds other files of these names: {listed(foreign)}", hint="rename them there first"
        )
    card = render(where.repo_id, ordered, terms, revision=revision, pictures=pictures)
    _check_card(where, card)
    return {_CARD: card, **{picture.name: picture.text for picture in pictures.values()}}


def _check_card(where: Place, card: str) -> None:
    """Have the Hub check the card, before anything is uploaded. Raises BadInputError.

    `ModelCard.validate` does so too, but asks huggingface.co whatever HF_ENDPOINT says until huggingface_hub 2.
    """
    from huggingface_hub import constants
    from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, http_backoff

    url, content = f"{constants.ENDPOINT}/api/validate-yaml", {"repoType": "model", "content": card}
    with doing("have its card checked", where.repo_id):
        answer = http_backoff("POST", url, json=content, headers=build_hf_headers(), max_retries=RETRIES)
        if answer.status_code == 400:
            raise BadInputError(f"{where}: the Hub does not take its card: {printable(answer.text)}")
        hf_raise_for_status(answer)


def _manifests(where: Place, remote: _Remote, *, every: bool) -> dict[str, Manifest]:
    """Return the manifests in the repo by folder: `every` one, or only the one at `where`."""
    found = {}
    for path in remote.files:
        folder, _, name = path.rpartition("/")
        if name == MANIFEST_NAME and (every or folder == where.path):
            found[folder] = _manifest_there(where.repo_id, path, remote)
    return found


def _manifest_there(repo_id: str, path: str, remote: _Remote) -> Manifest:
    """Read a manifest from the Hub, even if a local folder has the repo's name."""
    from huggingface_hub import hf_hub_download

    with doing(f"read {printable(path)}", repo_id):
        file = Path(again(lambda: hf_hub_download(repo_id, path, revision=remote.head)))
        try:
            return read_manifest(file.parent)
        except IntegrityError:
            discard(file)
            raise
