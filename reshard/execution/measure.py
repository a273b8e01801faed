"""The pass before the planning, for what is quantized by a number that a whole matrix decides."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from functools import partial

from ..process import Advance, one_thread_each, worker_count
from ..resharded.derived import ReadInput
from ..resharded.targets import LocalTensor
from .executor import Inputs, reads_of
from .jobs import Job, run_jobs
from .reader import SourceReader

__all__ = ["measure"]


def measure(
    wanted: Sequence[tuple[LocalTensor, Callable[[ReadInput], float]]],
    inputs: Inputs,
    *,
    workers: int | None = None,
    progress: Advance = lambda _: None,
) -> list[float]:
    """Return what each function makes of its matrix, given one that reads boxes of it. `progress` is told of bytes.

    Every thread takes whole matrices, in the order of the files. Memory is what a function needs beside the boxes that
    it reads. Raises IntegrityError if a source file changed meanwhile, and what the functions do.
    """
    found = [0.0] * len(wanted)
    stop = threading.Event()

    def work(number: int, reader: SourceReader) -> None:
        tensor, find = wanted[number]
        found[number] = find(lambda _, start, extent: reader.box(tensor, start, extent))
        progress(tensor.nbytes)

    with SourceReader(inputs.source, None, stop.is_set) as reader, one_thread_each():
        jobs = [
            Job(*reads_of(tensor, inputs), partial(work, number, reader), False)
            for number, (tensor, _) in enumerate(wanted)
        ]
        jobs.sort(key=lambda job: (job.files[0] if job.files else "", job.at))
        run_jobs(jobs, workers or worker_count(), stop, release=reader.release)
    return found
