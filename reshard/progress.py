"""Progress of long work, as a function is told of it: `progress(total, what)` of every public function that takes long.

It is called once for each part of the work, with the bytes to come and a word for what is done with them ("writing",
"checking", "sending"), and returns a context manager. Its value is called with the bytes just done, from any thread. A
total of 0 is not known before. With tqdm:

    @contextlib.contextmanager
    def progress(total, what):
        with tqdm(total=total, unit="B", unit_scale=True, desc=what) as bar:
            yield bar.update
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

__all__ = ["Advance", "Progress", "silent"]

Advance = Callable[[int], object]
Progress = Callable[[int, str], contextlib.AbstractContextManager[Advance]]


@contextlib.contextmanager
def silent(_: int, __: str) -> Iterator[Advance]:
    """Tell nobody."""
    yield lambda _: None
