"""The writer of tests/FAULTS.md: every fault, what must happen, and the tests that show it.

    python scripts/fault_table.py

A test says which faults it is about with `@pytest.mark.fault(N, …)`.
"""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

TESTS = Path(__file__).parent.parent / "tests"
TABLE = TESTS / "FAULTS.md"

FAULTS = {
    1: ("kill -9 at any system call", "destination absent or complete; a rerun finishes it"),
    2: ("power loss", "no bad state; what was said to be done is durable"),
    3: ("resume after a kill", "at most one tensor of each writer is done again; the same bytes"),
    4: ("too little disk at the start", "5 before anything is written; bytes needed and free"),
    5: ("disk full midway", "5, clean; goes on when there is room"),
    6: ("EIO on write, fsync or close", "5; nothing of a disk that failed is gone on with"),
    7: ("short writes, EINTR, EFBIG", "the right bytes, or 5"),
    8: ("truncated source file", "3 before any output"),
    9: ("malformed header", "3; every illegal file refused, every legal one read; < 1 s, < 200 MB"),
    10: ("header or dims bomb", "3 in < 1 s, < 64 MB"),
    11: ("parsers disagree", "never looser than safetensors"),
    12: ("paths that escape, links, FIFOs, devices", "3 or 11; nothing outside the source is opened, nothing hangs"),
    13: ("index and files disagree, tensors twice", "3, listed; none is picked"),
    14: ("hostile configuration", "clean; no code is run, no large allocation"),
    15: ("source changes or shrinks meanwhile", "4; no SIGBUS, no mixed output"),
    16: ("wrong bytes from the network", "4; never kept"),
    17: ("content changed between a drop and the resumed range", "4, or fetched again"),
    18: ("stall, 429/5xx, ignored Range", "bounded retry, then 10; the next run resumes"),
    19: ("a bit flips in the output", "verify: 4, file and tensor named"),
    20: ("a flipped or zeroed file is loaded", "refused before the first forward"),
    21: ("missing, extra or swapped rank file", "4"),
    22: (
        "two writers, one destination",
        "one wins, the other ends with 6 or 7; never mixed, even where locks do nothing",
    ),
    23: ("a newer manifest", "8, what is unknown is named; a folder of each version stays readable"),
    24: ("wrong world size", "9 on every rank, before any data is read; says which size it is for"),
    25: ("a rank fails, hangs or is stopped", "all ranks end by the deadline, the culprit is named"),
    26: ("publish interrupted, or the repo moved", "no partial revision visible; 12"),
    27: ("token leak", "in no output, traceback or file"),
    28: ("control characters in names", "escaped wherever they are shown"),
    29: ("other threads, another machine, a resume", "the same bytes"),
    30: ("more files than descriptors; another refusal of the system", "works; else 5, and never integrity"),
    33: (
        "a part of a conversion dies, runs twice or at once, or is of another source, plan or version",
        "finish completes, with the bytes of one run, or refuses (4, 8) and names the part",
    ),
    34: (
        "a quantized weight with a tensor missing, of another shape or dtype, or that lies",
        "3 before any output, or 4 at the load; the tensor is named, nothing large is made",
    ),
    35: ("an engine's files for another version, backend or checkpoint", "3 before any output; inspect says for which"),
    36: ("a copy plan that lies", "3 before any output; what makes no sense is named, nothing is read beyond a tensor"),
    37: (
        "files that belong to a checkpoint are not copied",
        "said in one line, each with its reason; what is copied has a digest",
    ),
    38: ("names that would be markup, in a page", "nothing runs and nothing is fetched; they are shown as text"),
}


def marks(path: Path) -> Iterator[tuple[int, str, bool]]:
    """Yield (fault, test, whether it is a long sweep) of a test file."""
    for node in ast.parse(path.read_text()).body:
        if not isinstance(node, ast.FunctionDef):
            continue
        decorators = {ast.unparse(item) for item in node.decorator_list}
        slow = "pytest.mark.slow" in decorators
        for item in node.decorator_list:
            if isinstance(item, ast.Call) and ast.unparse(item.func) == "pytest.mark.fault":
                yield from (
                    (ast.literal_eval(number), f"{path.relative_to(TESTS)}::{node.name}", slow) for number in item.args
                )


def table() -> str:
    """Return the text of the file. Raises ValueError if a fault has no test, or a test names an unknown fault."""
    tests: dict[int, list[str]] = defaultdict(list)
    for path in sorted(TESTS.rglob("test_*.py")):
        for fault, name, slow in marks(path):
            tests[fault].append(name + (" (slow)" if slow else ""))
    if tests.keys() != FAULTS.keys():
        raise ValueError(f"faults without a test, or unknown: {sorted(tests.keys() ^ FAULTS.keys())}")
    lines = [
        "# Faults, and what must happen",
        "",
        "Written by `python scripts/fault_table.py` from the tests' own marks. Numbers are exit codes; *clean* is one",
        "line and the right code, with an earlier output untouched. CI runs all tests but the long sweeps (slow), of",
        "which it runs samples: `scripts/test -m slow` runs them.",
        "",
        "| # | fault | must happen | tests |",
        "|---|---|---|---|",
    ]
    for number, (fault, result) in FAULTS.items():
        lines.append(f"| {number} | {fault} | {result} | {'<br>'.join(f'`{name}`' for name in tests[number])} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    TABLE.write_text(table())
