"""A rank as a process: it runs our own `runtime`, whatever the current folder holds. torchrun can start it too:

torchrun --no-python --nproc-per-node N reshard-rank generate|check|bench OUT …
"""

from __future__ import annotations

import importlib
import os
import sys
import time

from ..errors import UsageError
from ..process import end_on_interrupt
from .current_folder import check_runtime, leave
from .failures import report_failure, wants_json

__all__ = ["entry"]

_TO_SPEAK = 1.0  # seconds for rank 0 to say what all ranks find, before torchrun ends it because another one ended


def entry() -> None:
    """Run the runtime's command line on this rank."""
    leave()
    end_on_interrupt()  # before the imports of the runtime, which take seconds
    try:
        check_runtime()
    except UsageError as error:
        if os.environ.get("RANK", "0") != "0":
            time.sleep(_TO_SPEAK)
            sys.exit(error.exit_code)
        sys.exit(report_failure(error, verbose=False, as_json=wants_json(sys.argv)))
    importlib.import_module("runtime.__main__").entry()


if __name__ == "__main__":
    entry()
