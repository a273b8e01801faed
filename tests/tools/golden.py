"""The golden folders: one for each format version."""

from __future__ import annotations

VERSIONS = ["2.0", "3.0"]
