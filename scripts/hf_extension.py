"""The registration of this environment's `hf-reshard` with the Hub's command line, so that `hf reshard …` runs it.

    python scripts/hf_extension.py

`hf extensions install` would do the same from a GitHub repo of that name. `hf extensions remove reshard` undoes it.
"""

from __future__ import annotations

import json
import sys
from datetime import UTC, datetime
from pathlib import Path


def register(script: Path) -> Path:
    """Make `hf reshard` run a script. Returns the file that says so."""
    folder = Path("~/.local/share/hf/extensions/hf-reshard").expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    manifest = {
        "owner": "local",
        "repo": "hf-reshard",
        "repo_id": "local/hf-reshard",
        "short_name": "reshard",
        "executable_path": str(script),
        "type": "python",
        "installed_at": datetime.now(UTC).isoformat(),
        "description": "Reshard a checkpoint offline into one file per tensor-parallel rank",
    }
    path = folder / "manifest.json"
    path.write_text(json.dumps(manifest, indent=2) + "\n")
    return path


if __name__ == "__main__":
    script = Path(sys.executable).parent / "hf-reshard"
    if not script.exists():
        sys.exit(f"{script}: missing; install reshard into this environment: pip install -e .")
    print(f"{register(script)}: hf reshard runs {script}")
