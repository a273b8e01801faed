"""What can go wrong with a request. Each of these gives a fault, for `FakeHub.fail`."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Callable

from .server import Handler, Reply

Fault = Callable[[Handler, Callable[[], Reply]], "Reply | None"]  # None: nothing is left to be sent


def status(code: int, *, retry_after: int | None = None, error: str = "") -> Fault:
    """Another answer, the work not done. With `retry_after` seconds the client is told when to ask again."""
    headers = {} if retry_after is None else {"Retry-After": str(retry_after)}
    return lambda handler, answer: Reply({"error": error or f"status {code}"}, code, headers)


def corrupt(position: int = -1) -> Fault:
    """A bit of the body flipped, its size kept."""

    def spoil(data: bytes) -> bytes:
        spoilt = bytearray(data)
        spoilt[position] ^= 1
        return bytes(spoilt)

    return change(spoil)


def change(make: Callable[[bytes], bytes]) -> Fault:
    """Another body of the same size."""

    def fault(handler: Handler, answer: Callable[[], Reply]) -> Reply:
        reply = answer()
        reply.body = make(reply.body)
        return reply

    return fault


def drop(after: int) -> Fault:
    """The connection breaks after so many bytes of the body."""

    def fault(handler: Handler, answer: Callable[[], Reply]) -> None:
        handler.send(answer(), most=after)
        _break(handler)

    return fault


def stall(after: int = 0, *, seconds: float = 30) -> Fault:
    """Nothing comes after so many bytes of the body, until the client gives up, the Hub closes or time is up."""

    def fault(handler: Handler, answer: Callable[[], Reply]) -> None:
        handler.send(answer(), most=after)
        handler.server.closing.wait(seconds)
        _break(handler)

    return fault


def ignore_range() -> Fault:
    """The whole file with status 200, whatever part was asked for."""

    def fault(handler: Handler, answer: Callable[[], Reply]) -> Reply:
        del handler.headers["Range"]
        return answer()

    return fault


def hang_up() -> Fault:
    """The connection breaks before anything is done."""
    return lambda handler, answer: _break(handler)


def lose_answer() -> Fault:
    """The work is done, but the connection breaks before the answer."""

    def fault(handler: Handler, answer: Callable[[], Reply]) -> None:
        answer()
        _break(handler)

    return fault


def _break(handler: Handler) -> None:
    handler.close_connection = True
    with contextlib.suppress(OSError):  # the client was faster
        handler.connection.shutdown(socket.SHUT_RDWR)
