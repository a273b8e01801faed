"""A module path without the current folder: no process of ours runs code from there.

Python puts the current folder first on its path for `python -m` and `python -c`, and takes an empty entry of PYTHONPATH
for it (https://docs.python.org/3/using/cmdline.html#envvar-PYTHONSAFEPATH). That folder can hold anything: it may have
been downloaded, or have a `runtime.py` or a `torch.py` of its own.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

from ..errors import UsageError
from ..text import printable

__all__ = ["check_runtime", "keep_children_out", "leave"]

_HOME = str(Path(__file__).absolute().parents[2])  # the folder of the packages `reshard` and `runtime`


def keep_children_out() -> None:
    """Keep the current folder off the module path of every Python that this process or its children start.

    The environment does it, since libraries start processes too. Absolute entries of PYTHONPATH stay.
    """
    entries = [entry for entry in _python_path() if os.path.isabs(entry)]
    if _HOME not in (*entries, *sys.path[1:]):  # reshard was found only because this is, or was, the current folder
        entries.append(_HOME)
    os.environ["PYTHONPATH"] = os.pathsep.join(entries)
    if not entries:
        del os.environ["PYTHONPATH"]  # an empty PYTHONPATH counts as an empty entry
    os.environ["PYTHONSAFEPATH"] = "1"


def leave() -> None:
    """Take the current folder off this process's own path too. Modules that are imported already stay.

    The folder stays if an absolute entry of PYTHONPATH names it, or `reshard` itself lies there.
    """
    try:
        here = os.getcwd()
    except FileNotFoundError:  # it was removed
        here = ""
    relative = {os.path.normpath(os.path.join(here, entry)) for entry in _python_path() if not os.path.isabs(entry)}
    first = {here} if not sys.flags.safe_path and sys.path[:1] == [here] else set()
    wanted = {_HOME, *filter(os.path.isabs, _python_path())}
    keep_children_out()
    sys.path[:] = [entry for entry in sys.path if entry in wanted or (entry and entry not in relative | first)]


def check_runtime() -> None:
    """Check that `import runtime` finds the package beside `reshard`.

    Raises UsageError if it finds another module, or none.
    """
    spec = importlib.util.find_spec("runtime")
    if spec is None:
        raise UsageError(f"{printable(_HOME)}: holds no package `runtime`", hint="install reshard again")
    ours = os.path.join(_HOME, "runtime", "__init__.py")
    if spec.origin is None or not os.path.exists(ours) or not os.path.samefile(spec.origin, ours):
        found = spec.origin or next(iter(spec.submodule_search_locations or ()), "runtime")
        raise UsageError(
            f"{printable(found)}: Python takes it for `runtime`, which is a package of reshard",
            hint="rename it, or take its folder out of PYTHONPATH",
        )


def _python_path() -> list[str]:
    given = os.environ.get("PYTHONPATH")
    return given.split(os.pathsep) if given else []
