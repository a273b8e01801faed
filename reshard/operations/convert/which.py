"""Which part a process makes: as it is told, or as the engine that started it says in its environment."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from ...errors import UsageError
from ...execution.parts.share import Part
from ...text import printable

__all__ = ["AUTO_PART", "which_part"]

AUTO_PART = "auto"
_Found = tuple[int, int | None]  # the number of a process, from 0, and of how many, if it is told


def which_part(text: str, environment: Mapping[str, str]) -> Part:
    """Return the part that `text` names: 3/8; or auto, for what torchrun, MPI, Slurm or Kubernetes say in the
    environment; or auto/8 where they do not say how many there are.

    Raises UsageError.
    """
    first, _, second = text.partition("/")
    if first != AUTO_PART:
        try:
            return Part.parse(text)
        except ValueError as error:
            raise UsageError(f"--part: {printable(error)}", hint="give 3/8, or auto") from None
    if second and not (second.isdecimal() and 0 < int(second) < 100_000):
        raise UsageError(f"--part: {printable(text)!r} is no number of parts", hint="give auto/8")
    for name, look in _ENGINES.items():
        try:
            found = look(environment)
            if found is None:
                continue
            number, count = found
            of = int(second) if second else count
        except (KeyError, ValueError, ZeroDivisionError) as error:
            raise UsageError(
                f"--part auto: the variables of {name} make no sense: {printable(error)}", hint="give 3/8"
            ) from None
        if of is None:
            raise UsageError(
                f"--part auto: {name} does not say how many parts there are", hint="give the number: --part auto/8"
            )
        if count is not None and count != of:
            raise UsageError(f"--part {printable(text)}: {name} has started {count} processes")
        if not 0 <= number < of:
            raise UsageError(f"--part auto: {name} says process {number + 1} of {of}", hint="give 3/8")
        return Part(number + 1, of)
    raise UsageError(
        "--part auto: neither torchrun, MPI, Slurm nor Kubernetes has started this process",
        hint="give the part, such as 3/8",
    )


def _pair(number: str, count: str) -> Callable[[Mapping[str, str]], _Found | None]:
    def look(environment: Mapping[str, str]) -> _Found | None:
        return (int(environment[number]), int(environment[count])) if number in environment else None

    return look


def _slurm(environment: Mapping[str, str]) -> _Found | None:
    """Return the task of a job array, each with its own tasks that srun has started."""
    array = environment.get("SLURM_ARRAY_TASK_ID")
    if array is None and "SLURM_PROCID" not in environment:
        return None
    tasks = int(environment.get("SLURM_STEP_NUM_TASKS", environment.get("SLURM_NTASKS", "1")))
    number = int(environment.get("SLURM_PROCID", "0"))
    if array is None:
        return number, tasks
    first, step = int(environment["SLURM_ARRAY_TASK_MIN"]), int(environment.get("SLURM_ARRAY_TASK_STEP", "1"))
    index, off = divmod(int(array) - first, step)
    if off:
        raise ValueError
    return index * tasks + number, int(environment["SLURM_ARRAY_TASK_COUNT"]) * tasks


def _kubernetes(environment: Mapping[str, str]) -> _Found | None:
    number = environment.get("JOB_COMPLETION_INDEX")
    return None if number is None else (int(number), None)


# What was started last comes first: torchrun may run inside of a task of Slurm.
_ENGINES: dict[str, Callable[[Mapping[str, str]], _Found | None]] = {
    "torchrun": _pair("RANK", "WORLD_SIZE"),
    "Open MPI": _pair("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
    "MPI": _pair("PMI_RANK", "PMI_SIZE"),
    "Slurm": _slurm,
    "Kubernetes": _kubernetes,
}
