"""Run under torchrun: load every folder of a list, and write down how each rank is refused.

    refusals.py FOLDERS.json OUT

Rank R writes OUT.R: {folder: [type, words] of the error, or null if the folder was loaded}.
"""

import json
import os
import sys
from pathlib import Path

import runtime
from reshard.errors import ReshardError


def main(folders: str, out: str) -> None:
    found = {}
    for folder in json.loads(Path(folders).read_text()):
        found[folder] = None
        try:
            runtime.load(folder, timeout=60)
        except ReshardError as error:
            found[folder] = [type(error).__name__, error.message]
    Path(f"{out}.{os.environ['RANK']}").write_text(json.dumps(found))


main(*sys.argv[1:])
os._exit(0)
