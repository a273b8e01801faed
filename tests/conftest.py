"""Pico checkpoints shared by the whole run, and an environment apart from the user's."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

# At import: huggingface_hub reads its environment once, when it is first imported.
_HOME = tempfile.TemporaryDirectory(prefix="reshard-hf-")
_ENVIRONMENT = {"HF_HOME": _HOME.name, "HF_HUB_DISABLE_TELEMETRY": "1", "TOKENIZERS_PARALLELISM": "false"}
os.environ.update(_ENVIRONMENT)


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in _ENVIRONMENT.items():
        monkeypatch.setenv(name, value)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`checkpoint(family, **options)`: the folder of `pico.save`, made once per run. Do not change it."""
    import pico

    made: dict[str, Path] = {}

    def make(family: str, **options: Any) -> Path:
        key = f"{family} {sorted(options.items())}"
        if key not in made:
            made[key] = pico.save(family, tmp_path_factory.mktemp(family), **options)
        return made[key]

    return make
