"""How the Hub's client asks: not for ever, again where that can help, and with no words of its own."""

from __future__ import annotations

import contextlib
import functools
import logging
import re
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

__all__ = ["BUSY", "client", "is_unreachable"]

BUSY = (408, 429, 500, 502, 503, 504)  # statuses of a Hub that may well answer a moment later

_PATIENCE = 6  # times the client's own timeout of a download, for what is asked once
_PAUSES = (1, 2, 4)  # seconds before a question is asked again
# Seconds of a pause that the Hub asks for. The client makes five of them for a download, which together outlast the
# five minutes in which the Hub counts requests.
_LONGEST_PAUSE = 60
_FAILED = (500, 502, 503, 504)  # of these, those that end a download of the client's, which breaks and pauses do not
# What changes nothing, and the client asks only once; it tries uploads again by itself.
_QUESTIONS = (
    "GET /api/models/[^/]+(/[^/]+)?(/revision/[^/]+)?",
    "POST /api/models/.+/paths-info/.+",
    "POST /api/validate-yaml",
)
_TREES = "GET /api/models/.+/tree/.+"  # asked for again since huggingface_hub 2

# Said by our own error if it comes to that. At import: filters of a while are not for several threads.
warnings.filterwarnings("ignore", message="Not enough free disk space to download the file", category=UserWarning)


@contextlib.contextmanager
def client() -> Iterator[None]:
    """Around calls of huggingface_hub: it is patient but not for ever, asks again, and keeps its advice to itself.

    Bars are shown only on a terminal.
    """
    from huggingface_hub.utils import disable_progress_bars

    if not sys.stderr.isatty():
        disable_progress_bars()
    _prepare()
    with _quiet:
        yield


def is_unreachable(error: BaseException) -> bool:
    """Whether the Hub gave no answer, or one that may be another in a moment."""
    response = getattr(error, "response", None)
    if response is not None:
        return response.status_code in BUSY
    # By name: the client is made with httpx before huggingface_hub 2, and with httpx2 since.
    kinds = {"TimeoutException", "NetworkError", "RemoteProtocolError"}
    return not kinds.isdisjoint(kind.__name__ for kind in type(error).__mro__)


class _Quiet:
    """No warnings of the client's logger while somebody is inside, in any thread. A level that somebody has chosen, to
    see more, stays."""

    def __init__(self) -> None:
        self._lock, self._inside, self._raised = threading.Lock(), 0, False

    def __enter__(self) -> None:
        logger = logging.getLogger("huggingface_hub")
        with self._lock:
            self._inside += 1
            if self._inside == 1 and logger.level == logging.WARNING:
                logger.setLevel(logging.ERROR)
                self._raised = True

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._inside -= 1
            if self._inside == 0 and self._raised:
                logging.getLogger("huggingface_hub").setLevel(logging.WARNING)
                self._raised = False


_quiet = _Quiet()
_preparing = threading.Lock()


def _prepare() -> None:
    """Have every session be ours: the client closes its own now and then, and makes another."""
    from huggingface_hub.utils import _http, get_session

    with _preparing:
        if _be_patient not in get_session().event_hooks["request"]:
            make = getattr(_http, "_GLOBAL_CLIENT_FACTORY", _http.default_client_factory)  # which can be the user's
            _http.set_client_factory(functools.partial(_session, make))


def _session(make: Callable[[], Any]) -> Any:
    """A session of the client's, made by another factory, that does as this module says."""
    session = make()
    hooks = session.event_hooks
    if _be_patient not in hooks["request"]:
        hooks["request"].append(_be_patient)
        hooks["response"].append(_shorten_pause)
        session.send = functools.partial(_send, session, session.send)
    return session


def _be_patient(request: Any) -> None:
    """Before a request is sent: many calls of the client's ask for no timeout at all."""
    from huggingface_hub import constants

    timeout = request.extensions.get("timeout", {})
    longest = (1 if _is_question(request) else _PATIENCE) * constants.HF_HUB_DOWNLOAD_TIMEOUT
    bounded = {of: timeout.get(of) or longest for of in ("connect", "read", "write", "pool")}
    request.extensions = {**request.extensions, "timeout": bounded}


def _shorten_pause(response: Any) -> None:
    """Before the client reads how long it is to pause: it would do so for as long as it is told."""
    if response.status_code in BUSY and _asked_pause(response) > _LONGEST_PAUSE:
        response.headers.pop("ratelimit", None)
        response.headers["retry-after"] = str(_LONGEST_PAUSE)


def _asked_pause(response: Any) -> int:
    """Seconds that the Hub wants to be left in peace; 0 if it says nothing, or not in seconds."""
    from huggingface_hub.utils import parse_ratelimit_headers

    limit = parse_ratelimit_headers(response.headers)
    after = response.headers.get("retry-after", "").strip()
    return max(limit.reset_in_seconds if limit else 0, int(after) if re.fullmatch(r"[0-9]+", after) else 0)


def _send(session: Any, send: Callable[..., Any], request: Any, **options: Any) -> Any:
    """Send a request; where it is a question or a download, again after a pause if there is no answer."""
    question = _is_question(request)
    download = request.method == "GET" and options.get("stream", False)
    if not question and not download:
        return send(request, **options)
    for pause in _PAUSES:
        try:
            response = send(request, **options)
        except Exception as error:
            if not question or not is_unreachable(error):
                raise
        else:
            if response.status_code not in (BUSY if question else _FAILED):
                return response
            response.close()
            pause = max(pause, _asked_pause(response))
        time.sleep(pause)
        if session.is_closed:  # by the client, in another thread
            from huggingface_hub.utils import get_session

            return get_session().send(request, **options)
    return send(request, **options)


def _is_question(request: Any) -> bool:
    import huggingface_hub

    path = str(request.url).partition("?")[0].removeprefix(huggingface_hub.constants.ENDPOINT)
    known = [*_QUESTIONS, _TREES] if huggingface_hub.__version__.startswith("1.") else _QUESTIONS
    return any(re.fullmatch(question, f"{request.method} {path}") for question in known)
