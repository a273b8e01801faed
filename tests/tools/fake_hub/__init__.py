"""A stand-in for the Hugging Face Hub on loopback, for the real client. Standard library only.

huggingface_hub reads HF_ENDPOINT at import, so use the stand-in from subprocesses, with `FakeHub.environment`. A test
makes requests fail with `FakeHub.fail` and one of the faults.
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
