"""The command that serves an engine's rank files."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["options_of", "serve_command"]


def options_of(engine: Mapping[str, Any]) -> list[str]:
    """Return the options that a server must be started with, since its files are laid out for them."""
    words = ["-tp", str(engine["tp"])]
    words += ["-pp", str(engine["pp"])] if engine["pp"] > 1 else []
    words += ["--enable-expert-parallel"] if engine["ep"] else []
    return words + (["--moe-backend", engine["moe_backend"]] if engine["moe_backend"] else [])


def serve_command(place: str, engine: Mapping[str, Any]) -> list[str]:
    """Return the words of the command that serves the rank files at a place."""
    dtype = ["--dtype", engine["dtype"]]
    return [engine["name"], "serve", place, "--load-format", "sharded_state", *options_of(engine), *dtype]
