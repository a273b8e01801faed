"""Facts about this machine and its Python, for a bug report: no secrets, and no failure."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from .._version import __version__
from ..text import printable, without_secrets

__all__ = ["environment"]

_PACKAGES = (
    *("torch", "transformers", "safetensors", "huggingface_hub", "hf_xet", "fsspec", "s3fs", "click", "xxhash"),
    *("tqdm", "numpy", "accelerate", "matplotlib"),
)
_PROBE_SECONDS = 20.0  # a driver that hangs is worth reporting too
_WALK_SECONDS = 1.0  # for each cache
# Runs in a process of its own: a broken torch can end its process, or hang.
_PROBE = """
import json, torch
found = {"cuda": torch.version.cuda, "hip": torch.version.hip, "gpus": []}
if torch.cuda.is_available():
    for index in range(torch.cuda.device_count()):
        of = torch.cuda.get_device_properties(index)
        found["gpus"].append({"name": of.name, "memory": of.total_memory, "capability": f"{of.major}.{of.minor}"})
    found["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
print(json.dumps(found))
"""
# Variables shown with their values. Of those in _NAMED it is only shown that they are set.
_SHOWN = re.compile(
    r"(HF_HUB_(OFFLINE|DISABLE_\w+|ENABLE_\w+|DOWNLOAD_TIMEOUT|ETAG_TIMEOUT)|HF_(HOME|ENDPOINT|XET_\w+)|HF_HUB_CACHE"
    r"|XDG_CACHE_HOME|TRANSFORMERS_\w+|(OMP|MKL|NCCL|GLOO|CUDA|TORCH|TORCHELASTIC|PYTORCH)_\w+|PYTHON\w+|LD_PRELOAD"
    r"|MALLOC_ARENA_MAX|NO_COLOR|FORCE_COLOR|TERM|COLUMNS|TMPDIR)"
)
_NAMED = re.compile(r"(AWS_\w+|FSSPEC_\w+|\w+_PROXY|HF_\w*TOKEN\w*|HUGGING_?FACE_\w+|SSL_CERT_\w+)", re.I)
_SECRET = re.compile(r"TOKEN|SECRET|PASS|CREDENTIAL|AUTH|(?<![A-Z])KEY", re.I)
_A_TOKEN = re.compile(r"\bhf_\w{6,}")


def environment() -> dict[str, Any]:
    """Return versions, devices, caches and variables, as texts, numbers, lists and dicts.

    The home folder is `~`, URLs have no passwords, and a token is only said to be there or not. What cannot be found
    out is None, or has a `problem` in words. It takes a few seconds, or half a minute if torch hangs.
    """
    with _probe() as probe:
        found = {
            "reshard": __version__,
            "python": platform.python_version(),
            "executable": _tidy(sys.executable),
            "system": platform.platform(),
            "packages": {name: _version(name) for name in _PACKAGES},
            "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
            "memory": _memory(),
            "hub": _hub(),
            "caches": [_cache(name, folder) for name, folder in _caches().items()],
            "variables": _variables(),
        }
        found["devices"] = _devices(probe)
    return found


def _tidy(text: object) -> str:
    """Remove the home folder, passwords and tokens from a text."""
    bare = _A_TOKEN.sub("hf_…", without_secrets(str(text)))
    home = os.path.expanduser("~")
    return printable(re.sub(rf"{re.escape(home)}(?=[/\s'\":]|$)", "~", bare) if len(home) > 1 else bare, 300)


def _version(name: str) -> str | None:
    try:
        return printable(version(name))
    except Exception:  # not installed, or only in part
        return None


def _memory() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None


def _hub() -> dict[str, Any]:
    try:
        from huggingface_hub import constants, get_token

        return {
            "endpoint": _tidy(constants.ENDPOINT),
            "offline": bool(constants.HF_HUB_OFFLINE),
            "token": get_token() is not None,
        }
    except Exception as error:  # whatever a broken installation raises
        return {"problem": _tidy(f"{type(error).__name__}: {error}")}


def _caches() -> dict[str, Path]:
    found = {}
    with contextlib.suppress(Exception):
        from huggingface_hub import constants

        found["hub"] = Path(constants.HF_HUB_CACHE)
    with contextlib.suppress(Exception):
        from ..storage.stores import cache_folder

        found["reshard"] = cache_folder()
    return found


def _cache(name: str, folder: Path) -> dict[str, Any]:
    """Measure a cache: its bytes (`complete` is False if there was no time to see all), and the bytes free there."""
    size, complete, until = 0, True, time.monotonic() + _WALK_SECONDS
    for root, _, files in os.walk(folder):
        for file in files:
            with contextlib.suppress(OSError):
                size += os.lstat(os.path.join(root, file)).st_size
        if time.monotonic() > until:
            complete = False
            break
    there = folder
    while not there.exists() and there != there.parent:
        there = there.parent
    free = None
    with contextlib.suppress(OSError):
        free = shutil.disk_usage(there).free
    return {"name": name, "folder": _tidy(folder), "size": size, "complete": complete, "free": free}


def _variables() -> dict[str, str]:
    found = {}
    for name, value in sorted(os.environ.items()):
        if _SHOWN.fullmatch(name) and not _SECRET.search(name):
            found[name] = _tidy(value)
        elif _SHOWN.fullmatch(name) or _NAMED.fullmatch(name):
            found[name] = "(set)"
    return found


@contextlib.contextmanager
def _probe() -> Any:
    """Start the process that asks torch. It works while the rest is found out."""
    process = subprocess.Popen(
        [sys.executable, "-P", "-c", _PROBE],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def _devices(probe: subprocess.Popen[str]) -> dict[str, Any]:
    try:
        out, err = probe.communicate(timeout=_PROBE_SECONDS)
    except subprocess.TimeoutExpired:
        return {"problem": f"torch did not answer within {_PROBE_SECONDS:.0f} s"}
    try:
        if probe.returncode == 0:
            return dict(json.loads(out.splitlines()[-1]))
    except (ValueError, IndexError):
        pass
    lines = [line for line in err.splitlines() if line.strip()]
    return {"problem": _tidy(lines[-1] if lines else f"torch ended its process ({probe.returncode})")}
