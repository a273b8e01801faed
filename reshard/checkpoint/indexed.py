"""Tensors of several files as one checkpoint. If the files and their index disagree, the files count."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from ..errors import BadInputError
from ..files.header import Header, TensorInfo
from ..text import listed, printable
from .weights import Weights

__all__ = ["Read", "join"]

Read = Callable[[str, int, int], bytes]  # path of a file in the folder, first byte, end → the bytes

_AT_ONCE = 4 << 20  # bytes of each of two tensors that are compared


def join(headers: Mapping[str, Header], weights: Weights, read: Read) -> tuple[dict[str, TensorInfo], tuple[str, ...]]:
    """Return every tensor of the files, by name, and remarks on what the index says otherwise.

    transformers reads whole files and takes only their names from an index, so an entry too many, an entry too few and
    an entry with another file do no harm. The copies of a tensor in two files are compared byte for byte through
    `read`, in pieces of 4 MiB. If they are equal, the copy in the file that the index names is taken.

    Raises BadInputError if a tensor is in two files with other bytes.
    """
    copies: dict[str, list[TensorInfo]] = {}
    for header in headers.values():
        for info in header.tensors:
            copies.setdefault(info.name, []).append(info)
    twice = {name: found for name, found in copies.items() if len(found) > 1}
    different = [found for found in twice.values() if not all(_equal(found[0], other, read) for other in found[1:])]
    if different:
        names = (f"{found[0].name} ({', '.join(info.file for info in found)})" for found in different)
        raise BadInputError(
            f"tensors in two files, with other bytes in each: {listed(names)}",
            hint="take them out of the file that is not meant; transformers takes the last, whatever the index says",
        )
    tensors = {}
    for name, found in copies.items():
        tensors[name] = next((info for info in found if info.file == weights.places.get(name)), found[0])
    return tensors, tuple(_remarks(tensors, twice, weights))


def _remarks(
    tensors: Mapping[str, TensorInfo], twice: Mapping[str, list[TensorInfo]], weights: Weights
) -> Iterable[str]:
    if twice:
        names = (f"{name} ({', '.join(info.file for info in found)})" for name, found in twice.items())
        yield f"in two files, with the same bytes: {listed(names)}"
    if weights.index is None:
        return
    index = printable(weights.index)
    ghosts = [name for name in weights.places if name not in tensors]
    if ghosts:
        yield f"{index} names {len(ghosts)} tensors that no file holds: {listed(ghosts)}"
    lacking = [name for name in tensors if name not in weights.places]
    if lacking:
        yield f"{index} lacks {len(lacking)} tensors that the files hold, and they are taken: {listed(lacking)}"
    moved = [name for name, file in weights.places.items() if name in tensors and tensors[name].file != file]
    if moved:
        names = (f"{name} ({tensors[name].file})" for name in moved)
        yield f"{index} names another file for {len(moved)} tensors than the one that holds them: {listed(names)}"


def _equal(one: TensorInfo, other: TensorInfo, read: Read) -> bool:
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    for at in range(0, one.nbytes, _AT_ONCE):
        size = min(_AT_ONCE, one.nbytes - at)
        pieces = [read(info.file, info.start + at, info.start + at + size) for info in (one, other)]
        if len(pieces[0]) != size or pieces[0] != pieces[1]:
            return False
    return True
