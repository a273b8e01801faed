"""Requests of the Hub's client: with timeouts, repeated if that can help, and without words of its own."""

from __future__ import annotations

import contextlib
import functools
import logging
import re
import sys
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from ...process import Advance

__all__ = ["BUSY", "RETRIES", "again", "answer_of", "bar_that_tells", "client", "is_unreachable"]

BUSY = (408, 429, 500, 502, 503, 504)  # statuses of a Hub that may well answer a moment later
_PAUSES = (1, 2, 4)  # seconds before a request is repeated
RETRIES = len(_PAUSES)

_PATIENCE = 6  # times the client's own timeout of a download, for a request that is made only once
# Seconds, if the Hub asks for a pause. The client makes five pauses for a download, which together outlast the five
# minutes in which the Hub counts requests.
_LONGEST_PAUSE = 60
_FAILED = (500, 502, 503, 504)  # these end a download of the client; broken connections and pauses do not
# Requests that change nothing, and that the client makes only once.
_QUESTIONS = "GET /api/models/[^/]+(/[^/]+)?(/revision/[^/]+)?|POST /api/models/.+/paths-info/.+"
_TREES = "GET /api/models/.+/tree/.+"  # the client repeats these itself since huggingface_hub 2

_Found = TypeVar("_Found")

# Our own error says it if the disk is full. Filtered at import, since temporary filters are not safe with threads.
warnings.filterwarnings("ignore", message="Not enough free disk space to download the file", category=UserWarning)


@contextlib.contextmanager
def client() -> Iterator[None]:
    """Run calls of huggingface_hub with timeouts, and without the warnings that it logs.

    Progress bars are shown only on a terminal.
    """
    from huggingface_hub.utils import disable_progress_bars

    if not sys.stderr.isatty():
        disable_progress_bars()
    _prepare()
    with _quiet:
        yield


def again(call: Callable[[], _Found]) -> _Found:
    """Return what `call` returns, under `client`, after repeating requests that failed.

    Each question or download is repeated up to `RETRIES` times if the Hub gives no answer, or one that may be another
    in a moment, and the client itself would ask only once.
    """
    failures: Counter[str] = Counter()
    while True:
        try:
            with client():
                return call()
        except Exception as error:  # of the client's transport: httpx before huggingface_hub 2, httpx2 since
            failed = _to_ask_again(error)
            if failed is None or failures[failed] == RETRIES:
                raise
            pause = max(_PAUSES[failures[failed]], _asked_pause(answer_of(error)))
            failures[failed] += 1
        time.sleep(pause)


def is_unreachable(error: BaseException) -> bool:
    """Whether the Hub gave no answer, or one that may be another in a moment."""
    response = getattr(error, "response", None)
    if response is not None:
        return response.status_code in BUSY
    # By name: the client uses httpx before huggingface_hub 2, and httpx2 since.
    kinds = {"TimeoutException", "NetworkError", "RemoteProtocolError"}
    return not kinds.isdisjoint(kind.__name__ for kind in type(error).__mro__)


def answer_of(error: BaseException | None) -> Any:
    """Return the response that an error, or one of its causes, is about; None if there was none."""
    while error is not None:
        if (response := getattr(error, "response", None)) is not None:
            return response
        error = error.__cause__
    return None


class _Quiet:
    """Silences the warnings of the client's logger while any thread is inside.

    A level that somebody has chosen, to see more, stays.
    """

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
    """Give timeouts to the client's session, and to the one that it makes after closing this one."""
    from huggingface_hub.utils import get_session, set_client_factory

    with _preparing:
        session = get_session()
        asking = session.event_hooks["request"]
        if _be_patient in asking:
            return
        if len(asking) == 1 and asking[0].__module__.startswith("huggingface_hub."):
            set_client_factory(functools.partial(_like, session))
        else:  # the user's own factory made it, and makes the next one too, which our next call prepares
            _make_patient(session)


def _like(session: Any) -> Any:
    """Return a patient session that is otherwise like one of the client's own making."""
    made = type(session)(
        headers=session.headers,
        cookies=session.cookies,
        follow_redirects=session.follow_redirects,
        timeout=session.timeout,
        trust_env=session.trust_env,
        event_hooks=session.event_hooks,
    )
    _make_patient(made)
    return made


def _make_patient(session: Any) -> None:
    hooks = session.event_hooks
    session.event_hooks = {
        "request": [*hooks["request"], _be_patient],
        "response": [*hooks["response"], _shorten_pause],
    }


def _be_patient(request: Any) -> None:
    """Set the timeouts of a request before it is sent: many calls of the client have none."""
    from huggingface_hub import constants

    timeout = request.extensions.get("timeout", {})
    short = re.fullmatch(f"{_QUESTIONS}|{_TREES}", _asked(request))
    longest = (1 if short else _PATIENCE) * constants.HF_HUB_DOWNLOAD_TIMEOUT
    bounded = {of: timeout.get(of) or longest for of in ("connect", "read", "write", "pool")}
    request.extensions = {**request.extensions, "timeout": bounded}


def _shorten_pause(response: Any) -> None:
    """Shorten the pause that a response asks for: the client would pause for as long as it is told."""
    if response.status_code in BUSY and _asked_pause(response) > _LONGEST_PAUSE:
        response.headers.pop("ratelimit", None)
        response.headers["retry-after"] = str(_LONGEST_PAUSE)


def _asked_pause(response: Any) -> int:
    """Return the seconds that the Hub wants to be left in peace; 0 if it says nothing, or not in seconds."""
    from huggingface_hub.utils import parse_ratelimit_headers

    if response is None:
        return 0
    limit = parse_ratelimit_headers(response.headers)
    after = response.headers.get("retry-after", "").strip()
    return max(limit.reset_in_seconds if limit else 0, int(after) if re.fullmatch(r"[0-9]+", after) else 0)


def _to_ask_again(error: BaseException | None) -> str | None:
    """Return the request that an error is about if it may be repeated and the client has not done so itself."""
    from huggingface_hub import __version__

    request = None
    while error is not None and (request := _request_of(error)) is None:
        error = error.__cause__
    if error is None:
        return None
    asked = _asked(request)
    if re.fullmatch(_TREES, asked):
        once = __version__.startswith("1.") and is_unreachable(error)
    elif re.fullmatch(_QUESTIONS, asked):
        once = is_unreachable(error)
    else:
        response = getattr(error, "response", None)
        once = asked.startswith("GET ") and response is not None and response.status_code in _FAILED
    return asked if once else None


def _request_of(error: BaseException) -> Any:
    try:
        return getattr(error, "request", None)
    except RuntimeError:  # httpx raised the error without a request
        return None


def _asked(request: Any) -> str:
    """Return method and path of a request; the URL instead of the path if it is not to the Hub itself."""
    from huggingface_hub import constants

    return f"{request.method} {str(request.url).partition('?')[0].removeprefix(constants.ENDPOINT)}"


def bar_that_tells(report: Advance) -> type:
    """Return a class of bars for the client's downloads: they show nothing, and report the bytes that have come."""
    from tqdm import tqdm

    lock, counts, told = threading.Lock(), Counter[int](), 0

    class Bar(tqdm):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            self._of_bytes = options.get("unit") == "B"
            super().__init__(*arguments, **{**options, "disable": True})

        def update(self, n: float | None = 1) -> None:
            nonlocal told
            if not self._of_bytes:
                return
            with lock:  # the client has two bars for the same bytes: one for what is sent, one for what is written
                counts[id(self)] += int(n or 0)
                new, told = counts[id(self)] - told, max(told, counts[id(self)])
            if new > 0:
                report(new)

    return Bar
