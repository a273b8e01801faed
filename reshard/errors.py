"""Every failure a user can meet, with its exit code.

ReshardError                1  unexpected
├── UsageError              2  the call makes no sense
├── BadInputError           3  a source, plan or configuration that cannot be used
├── IntegrityError          4  bytes are not what they should be
├── StorageError            5  the disk said no
├── BusyError               6  another process is at work on the same destination
├── DestinationExistsError  7  something is already there
├── VersionError            8  written by a format this release does not know
├── TopologyError           9  world size or mesh does not fit
├── NetworkError           10  the Hub could not be reached, or refused
├── PolicyError            11  refused on purpose (code in a repo, paths out of the source)
└── RemoteMovedError       12  the remote repo changed meanwhile
"""

from __future__ import annotations

__all__ = [
    "BadInputError",
    "BusyError",
    "DestinationExistsError",
    "IntegrityError",
    "NetworkError",
    "PolicyError",
    "RemoteMovedError",
    "ReshardError",
    "StorageError",
    "TopologyError",
    "UsageError",
    "VersionError",
]


class ReshardError(Exception):
    """A failure with one line for the user, an optional hint, and an exit code."""

    exit_code = 1
    lost = False  # whether the bytes written before it may be wrong or lost, so that a new run must not continue them

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}\nHint: {self.hint}" if self.hint else self.message


class UsageError(ReshardError):
    exit_code = 2


class BadInputError(ReshardError):
    exit_code = 3


class IntegrityError(ReshardError):
    exit_code = 4
    lost = True


class StorageError(ReshardError):
    exit_code = 5


class BusyError(ReshardError):
    exit_code = 6


class DestinationExistsError(ReshardError):
    exit_code = 7


class VersionError(ReshardError):
    exit_code = 8


class TopologyError(ReshardError):
    exit_code = 9


class NetworkError(ReshardError):
    exit_code = 10


class PolicyError(ReshardError):
    exit_code = 11


class RemoteMovedError(ReshardError):
    exit_code = 12
