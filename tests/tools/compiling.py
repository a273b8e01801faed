"""What makes `torch.compile` quicker in tests, and changes nothing that it computes."""

from __future__ import annotations

from torch._dynamo import guards


def leave_guards_as_they_are() -> None:
    """Let torch write the code of guards without a search for equal parts, as it does if that code is too deep.

    The search takes half of the time that a pico model is compiled in.
    """

    def too_deep(self: object, expressions: object) -> None:
        raise RecursionError

    guards.PyExprCSEPass.count = too_deep
