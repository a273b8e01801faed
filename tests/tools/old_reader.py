"""The reader of an earlier release, kept as a zip that Python imports from: the modules that `read_manifest` needed.

python tests/tools/old_reader.py 2.0 aaddda2    # makes tests/data/reader-2.0.zip of that commit, reproducibly
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from places import DATA

# The modules that `reshard.manifest` imports in that commit.
LIST = (
    "import sys, json, reshard.manifest; print(json.dumps(sorted(n for n in sys.modules if n.startswith('reshard'))))"
)
READ = """
import sys
from pathlib import Path
import reshard
assert ".zip/" in reshard.__file__, reshard.__file__
from reshard.errors import ReshardError
from reshard.manifest import read_manifest
try:
    print(read_manifest(Path(sys.argv[1])).architecture)
except ReshardError as error:
    print(error.message)
    sys.exit(error.exit_code)
"""


def make(version: str, commit: str) -> None:
    def git(*arguments: str) -> bytes:
        return subprocess.run(["git", *arguments], check=True, capture_output=True, cwd=DATA.parent.parent).stdout

    with tempfile.TemporaryDirectory() as folder:
        archive = Path(folder) / "all.zip"
        archive.write_bytes(git("archive", "--format=zip", commit, "reshard"))
        command, paths = [sys.executable, "-c", LIST], {"PYTHONPATH": str(archive)}
        found = subprocess.run(command, env=paths, cwd=folder, capture_output=True, check=True)
    with zipfile.ZipFile(path_of(version), "w", zipfile.ZIP_DEFLATED) as made:
        for module in json.loads(found.stdout):
            name = module.replace(".", "/")
            name += "/__init__.py" if module == "reshard" else ".py"
            info = zipfile.ZipInfo(name)
            info.compress_type = zipfile.ZIP_DEFLATED
            made.writestr(info, git("show", f"{commit}:{name}"))


def path_of(version: str) -> Path:
    return DATA / f"reader-{version}.zip"


def read(version: str, folder: Path) -> tuple[int, str]:
    """Read a folder with the release that wrote `version`. Return its exit code and output line."""
    done = subprocess.run(
        [sys.executable, "-c", READ, str(folder)],
        env={"PYTHONPATH": str(path_of(version))},
        cwd=DATA,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    return done.returncode, done.stdout + done.stderr


if __name__ == "__main__":
    make(*sys.argv[1:])
