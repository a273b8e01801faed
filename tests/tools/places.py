"""Paths of the project, the tests' data and the scripts that run on ranks."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).parents[2]
DATA = ROOT / "tests" / "data"
WORKERS = Path(__file__).parent / "workers"
