"""`save_pretrained` of a loaded model: a standard checkpoint, its tensors assembled one by one from all ranks."""

from __future__ import annotations

import inspect
import json
import os
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from huggingface_hub import split_state_dict_into_shards_factory

from reshard.checkpoint.weights import INDEX_NAME
from reshard.errors import DestinationExistsError, StorageError, UsageError
from reshard.files.system import by_errno
from reshard.resharded.layout import Slot, file_layout
from reshard.resharded.targets import LocalTensor
from reshard.storage.disk import pwrite
from reshard.storage.locate import local_folder
from reshard.storage.outputs import OutputFiles
from reshard.text import printable

from ..distributed.agreement import Deadline, from_first, spoken, words_of
from ..distributed.mesh import connect
from ..distributed.ranks import RankInfo, this_rank
from .full_tensor import part_of, whole_of
from .keeping import check_views
from .shares import replicas_of
from .source_tensors import Group, groups

__all__ = ["save_pretrained"]

_PART = ".part"  # suffix of an unfinished file
_HAPPENS = {"safe_serialization": True}  # accepted too, beside the defaults of transformers' own arguments
_rounds: Counter[str] = Counter()  # by the ranks that take part: how often they have reported failures to each other


def save_pretrained(
    model: Any, save_directory: str | Path, *, max_shard_size: int | str = "50GB", **others: Any
) -> None:
    """Write a loaded model into a folder that `from_pretrained` can open. This is `model.save_pretrained(DIR)`.

    The tensors are those of the source checkpoint that the model uses, by name, and in their dtype unless they were
    cast. So an unchanged model gives the same bytes. If libraries compute with quantized weights, these are written as
    the source has them. Else they are written dequantised, and `reshard merge` gives the quantized ones back.

    Call it on every rank: the ranks of one replica assemble each parameter in turn. Only its first rank writes, with
    one parameter in memory and one tensor made from it. The weights appear when all are written; a failure is raised on
    all ranks.

    Arguments of transformers' own are accepted if they ask for what happens anyway, as their defaults do.

    Raises:
        UsageError: an argument asks for something else, which a model on several ranks cannot do; or the folder is a
            URL.
        DestinationExistsError: the folder holds weights already.
        StorageError: the disk refused a write.
    """
    check_views(model)
    quantized = model._reshard_quantized
    plan = groups(model._reshard_manifest, quantized=bool(quantized.tensors))
    group = replicas_of(model).group
    writes, first = dist.get_rank(group) == 0, dist.get_global_rank(group, 0)
    refused = _refused(model, others, writes=writes)
    with _Writer(local_folder(save_directory)) as writer:
        tensors = [tensor for one in plan for tensor in one.sources]
        metadata = quantized.metadata() if quantized.tensors else {}
        begins = writes and not refused
        _raise_together(model, _failure(writer.begin, tensors, metadata, max_shard_size) if begins else refused)
        failure = None
        if first in model._device_mesh.mesh.tolist():  # this replica's parameters are written
            for one in plan:  # all of it, even if a write fails: the other ranks wait for this one
                wholes = {}
                for target in one.targets:
                    kept = quantized.tensors.get(target.name)  # a quantized weight may be called like its parameter
                    part = part_of(model, target.name) if kept is None else kept
                    wholes[target.name] = whole_of(part, target, model)
                if writes and failure is None:
                    failure = _failure(writer.write, one, wholes)
        if writes and failure is None:
            failure = _failure(writer.finish, model)
        _raise_together(model, failure)


def _refused(model: Any, others: Mapping[str, Any], *, writes: bool) -> UsageError | None:
    """Return the error, if an argument asks for something else than happens without it."""
    own = inspect.signature(type(model).save_pretrained).parameters
    happens = {name: parameter.default for name, parameter in own.items()} | _HAPPENS
    refused = [name for name, value in others.items() if name not in happens or happens[name] is not value]
    if not writes:  # each rank may tell truly whether it is the main one
        refused = [name for name in refused if name != "is_main_process"]
    if not refused:
        return None
    return UsageError(
        f"save_pretrained of a resharded model does not take {printable(', '.join(sorted(refused)))}",
        hint="save it, and open what was saved with from_pretrained in one process",
    )


class _Writer:
    """The files of the folder, on the rank that writes them."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._files: OutputFiles | None = None
        self._names: list[str] = []  # final names of the files
        self._slots: dict[str, Slot] = {}
        self._file_of: dict[str, str] = {}  # by the name of a tensor

    def __enter__(self) -> _Writer:
        return self

    def __exit__(self, *_: object) -> None:
        if self._files is not None:
            self._files.close()
        for name in self._names:
            self._part(name).unlink(missing_ok=True)

    def _part(self, name: str) -> Path:
        return self._folder / f"{name}{_PART}"

    def begin(self, tensors: list[LocalTensor], metadata: Mapping[str, str], max_shard_size: int | str) -> None:
        """Create the files and write their headers, with `metadata` in each."""
        self._folder.mkdir(parents=True, exist_ok=True)
        there = sorted([*self._folder.glob("*.safetensors"), *self._folder.glob(INDEX_NAME)])
        if there:
            raise DestinationExistsError(f"{printable(there[0])} is there already", hint="choose another folder")
        by_name = {tensor.name: tensor for tensor in tensors}
        split = split_state_dict_into_shards_factory(
            by_name,
            get_storage_size=lambda tensor: tensor.nbytes,
            filename_pattern="model{suffix}.safetensors",
            max_shard_size=max_shard_size,
        )
        self._file_of = split.tensor_to_filename
        self._names = list(split.filename_to_tensors)
        layouts = [
            file_layout(self._part(name).name, [by_name[one] for one in names], metadata=metadata)
            for name, names in split.filename_to_tensors.items()
        ]
        self._slots = {slot.tensor.name: slot for layout in layouts for slot in layout.slots}
        self._files = OutputFiles(self._folder, layouts, anew=False)

    def write(self, group: Group, wholes: Mapping[str, torch.Tensor]) -> None:
        """Write the source tensors of a group, from its full parameters."""
        here = {name: whole.cpu() for name, whole in wholes.items()}
        assert self._files is not None
        for made in group.sources:
            data = group.source(made, here).view(-1).view(torch.uint8).numpy()
            with self._files.opened(self._names.index(self._file_of[made.name])) as fd:
                pwrite(fd, memoryview(data), self._slots[made.name].offset)

    def finish(self, model: Any) -> None:
        """Write the configuration, rename the files to their final names, and write the index last."""
        model.config.dtype = model._reshard_manifest.dtype
        model.config.architectures = [type(model).__name__]
        model.config.save_pretrained(self._folder)
        if model.can_generate():
            model.generation_config.save_pretrained(self._folder)
        assert self._files is not None
        self._files.sync()
        for name in self._names:
            os.replace(self._part(name), self._folder / name)
        if len(self._names) > 1:
            total = sum(slot.tensor.nbytes for slot in self._slots.values())
            index = {"metadata": {"total_size": total}, "weight_map": self._file_of}
            (self._folder / INDEX_NAME).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def _failure(step: Callable[..., object], *arguments: Any) -> Exception | None:
    """Run a step. Return the error that it raises, an OSError as a StorageError; None if it raises none."""
    try:
        step(*arguments)
    except OSError as error:
        return by_errno(error, f"{printable(error.filename or 'save_pretrained')}: {error.strerror}", StorageError)
    except Exception as error:
        return error
    return None


def _raise_together(model: Any, failure: Exception | None) -> None:
    """Raise the failure of the first rank, which writes, on every rank. The others wait for as long as it writes."""
    group = replicas_of(model).group
    ranks = dist.get_process_group_ranks(group)
    who = "-".join(map(str, ranks))  # not all ranks of the job, if there are several meshes
    _rounds[who] += 1
    store = connect(this_rank(), Deadline.after(0))
    info = RankInfo(dist.get_rank(group), len(ranks), 0)
    told = from_first(store, info, lambda: failure and words_of(failure), key=f"saving {who} {_rounds[who]}")
    if failure is not None:
        raise failure
    if told is not None:
        raise spoken(told, f"rank {ranks[0]}: ")
