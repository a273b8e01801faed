"""Quantizing and dequantising: the origin of a conversion becomes the checkpoint that is made of it."""

from __future__ import annotations

import threading
from collections.abc import Container, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...checkpoint.quantization import quantization_of
from ...checkpoint.source import Source
from ...errors import BadInputError, UsageError
from ...execution.executor import Inputs
from ...execution.jobs import Job, run_jobs
from ...execution.measure import measure
from ...execution.origin import Origin
from ...execution.reader import SourceReader, tensor_blocks
from ...files.digest import new_digest
from ...files.untrusted import read_json
from ...process import BLOCK_BYTES, Advance, Progress, silent, worker_count
from ...resharded.as_source import written_back
from ...resharded.manifest import Manifest
from ...text import printable

if TYPE_CHECKING:
    from ...checkpoint.source import SourceFile

__all__ = ["AS_IT_IS", "Change", "change_of", "derived_origin", "given_back", "made_again"]


@dataclass(frozen=True, slots=True)
class Change:
    """What becomes of the values: quantized as `quantize`, one of the kinds, with the `options` of transformers'
    configuration of it, the experts of a mixture too if `experts`; or dequantised."""

    quantize: str | None = None
    options: Mapping[str, Any] | None = None
    experts: bool = False
    dequantize: bool = False

    @property
    def needs_whole(self) -> bool:
        """Whether a pass over all the weights comes before the planning."""
        if self.quantize is None:
            return False
        from ...planning.quantise import needs_whole

        return needs_whole(self.quantize, self.options or {})


AS_IT_IS = Change()


def change_of(
    quantize: str | None, config: Mapping[str, Any] | str | Path | None, *, experts: bool, dequantize: bool
) -> Change:
    """Return the change that arguments ask for. `config` may be a JSON file. Raises UsageError if they contradict."""
    if quantize is not None and dequantize:
        raise UsageError("--quantize and --dequantize contradict each other")
    if quantize is None and (config is not None or experts):
        raise UsageError("--quantize-config and --experts say how to quantize", hint="give --quantize too")
    if config is None or isinstance(config, Mapping):
        return Change(quantize, config, experts, dequantize)
    found = read_json(Path(config))
    options = found.get("quantization_config", found) if isinstance(found, dict) else None
    if not isinstance(options, dict):
        raise BadInputError(f"{printable(config)}: is no JSON object")
    return Change(quantize, options, experts, dequantize)


def derived_origin(
    origin: Origin,
    change: Change,
    *,
    dtype: str | None,
    drop_unused: bool = False,
    workers: int | None = None,
    progress: Progress | None = None,
) -> Origin:
    """Return the origin whose source is what a change makes of this one's; the same if there is none.

    Numbers that whole matrices decide are found by a pass over the weights, of which `progress` is told; without it
    there is no pass, and sizes may be a few bytes off.

    Raises a `ReshardError`.
    """
    if change == AS_IT_IS:
        return origin
    if drop_unused:
        raise UsageError(
            "--drop-unused goes with no other change of the weights",
            hint="leave it out, and cut the result again with it",
        )
    if change.dequantize:
        from ...planning.dequantise import dequantised

        return origin.as_derived(dequantised(origin.source, dtype=dtype))
    from ...planning.quantise import Measure, quantised

    def find(wanted: Any) -> list[float]:
        assert progress is not None
        made = origin.made
        filled = [(made.relocated_tensor(tensor) if made else tensor, function) for tensor, function in wanted]
        with progress(sum(tensor.nbytes for tensor, _ in filled), "measuring") as report:
            return measure(filled, Inputs(origin.held), workers=workers, progress=report)

    finder: Measure | None = find if progress else None
    assert change.quantize is not None
    derived = quantised(
        origin.source,
        change.quantize,
        change.options or {},
        dtype=dtype,
        experts=change.experts,
        measure=finder,
    )
    return origin.as_derived(derived)


def made_again(manifest: Manifest, config: Mapping[str, Any], source: Source, *, progress: Progress = silent) -> Origin:
    """Return the origin that a folder with this manifest and `config` (config.json) was computed from, given what
    `source` it was made of: that one itself if it has the folder's tensors already.

    Raises a `ReshardError`.
    """
    told, origin = manifest.derived, Origin(source)
    is_quantized = quantization_of(source.config) is not None
    if told is None or is_quantized == (told["quantized"] is not None):
        return origin
    change = Change(told["quantized"], quantization_of(config), told["experts"], told["dequantized"] is not None)
    return derived_origin(origin, change, dtype=told["dtype"], progress=progress)


def given_back(
    folder: Path,
    manifest: Manifest,
    names: Container[str] | None = None,
    *,
    workers: int | None = None,
    progress: Progress = silent,
) -> dict[str, str]:
    """Return the digests of the source files, all or those of these `names`, as the rank files in `folder` give them
    back: what `merge --layout hf` writes. The rank files are read for it."""
    made = written_back(folder, manifest)
    files = [file for file in made.source.files if names is None or file.name in names]
    stop, found = threading.Event(), dict[str, str]()

    def work(file: SourceFile, reader: SourceReader, report: Advance) -> None:
        digest, buffer = new_digest(), memoryview(bytearray(BLOCK_BYTES))
        digest.update(file.header.head)
        for info in file.header.tensors:
            for _, block in tensor_blocks(made.tensors[info.name], reader, buffer):
                if stop.is_set():
                    return
                digest.update(block)
                report(len(block))
        found[file.name] = digest.hexdigest()

    with SourceReader(made.held) as reader, progress(sum(file.size for file in files), "digesting") as report:
        jobs = [Job((), 0.0, partial(work, file, reader, report), False) for file in files]
        run_jobs(jobs, workers or worker_count(), stop)
    return found
