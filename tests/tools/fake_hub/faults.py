"""Faults of a request. Each function returns one, for `FakeHub.fail`."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Callable

from .server import Handler, Reply

Fault = Callable[[Handler, Callable[[], Reply]], "Reply | None"]  # None: nothing is left to be sent


def status(code: int, *, retry_after: int | None = None, error: str = "") -> Fault:
    """Answer with a status, without doing the work. `retry_after` (seconds) tells the client when to ask again."""
    headers = {} if retry_after is None else {"Retry-After": str(retry_after)}
    return lambda handler, answer: Reply({"error": error or f"status {code}"}, code, headers)


def corrupt(position: int = -1) -> Fault:
    """Flip a bit of the body, and keep its size."""

    def spoil(data: bytes) -> bytes:
        spoilt = bytearray(data)
        spoilt[position] ^= 1
        return bytes(spoilt)

    return change(spoil)


def change(make: Callable[[bytes], bytes]) -> Fault:
    """Send another body, of the same size."""

    def fault(handler: Handler, answer: Callable[[], Reply]) -> Reply:
        reply = answer()
        reply.body = make(reply.body)
        return reply

    return fault


def drop(after: int) -> Fault:
    """Break the connection after that many bytes of the body."""

    def fault(handler: Handler, answer: Callable[[], Reply]) -> None:
        handler.send(answer(), most=after)
        _break(handler)

    return fault


def stall(after: int = 0, *, seconds: float = 30) -> Fault:
    """Send nothing after that many bytes of the body, until the client gives up, the Hub closes or time is up."""

    def fault(handler: Handler, answer: Callable[[], Reply]) -> None:
        handler.send(answer(), most=after)
        handler.server.closing.wait(seconds)
        _break(handler)

    return fault


def ignore_range() -> Fault:
    """Send the whole file with status 200, whatever range was asked for."""

    def fault(handler: Handler, answer: Callable[[], Reply]) -> Reply:
        del handler.headers["Range"]
        return answer()

    return fault


def hang_up() -> Fault:
    """Break the connection before anything is done."""
    return lambda handler, answer: _break(handler)


def lose_answer() -> Fault:
    """Do the work, but break the connection before the answer."""

    def fault(handler: Handler, answer: Callable[[], Reply]) -> None:
        answer()
        _break(handler)

    return fault


def _break(handler: Handler) -> None:
    handler.close_connection = True
    with contextlib.suppress(OSError):  # the client was faster
        handler.connection.shutdown(socket.SHUT_RDWR)
