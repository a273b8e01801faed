"""A stand-in for the Hugging Face Hub on loopback, for the real client. Standard library only.

HF_ENDPOINT is read when huggingface_hub is imported, so use it from subprocesses, with `FakeHub.environment`. What a
test wants to go wrong it says with `FakeHub.fail` and one of the faults.
"""

from .faults import Fault, change, corrupt, drop, hang_up, ignore_range, lose_answer, stall, status
from .hub import FakeHub, Request
from .repo import Repo, etag, is_lfs
from .server import Handler, Reply

__all__ = [
    "FakeHub",
    "Fault",
    "Handler",
    "Reply",
    "Repo",
    "Request",
    "change",
    "corrupt",
    "drop",
    "etag",
    "hang_up",
    "ignore_range",
    "is_lfs",
    "lose_answer",
    "stall",
    "status",
]
