"""The golden folders: one for each format version, and for a feature that another kind of checkpoint needs."""

from __future__ import annotations

VERSIONS = ["2.0", "3.0"]
BUNDLES = "3.0-bundles"
FOLDERS = [*VERSIONS, BUNDLES]
