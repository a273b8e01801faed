"""The architecture, executable: allowed imports, lengths of files, documentation."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import fault_table
import pytest
from places import ROOT

MAX_LINES = 330
MOST_ENTRIES = 12  # per room; the command line has a file for each command
FILES = sorted(path for package in ("reshard", "runtime") for path in (ROOT / package).rglob("*.py"))
# Every module of reshard may import these.
SHARED = {"errors", "text", "process", "_version"}
# The floors of each package, from the ground up: a room, and the rooms below it that it may import from.
ROOMS: dict[str, set[str]] = {
    "files": set(),
    "sharding": set(),
    "transforms": {"sharding"},
    "showing": {"sharding"},
    "checkpoint": {"files"},
    "strategies": {"files", "sharding"},
    "resharded": {"files", "sharding", "transforms", "checkpoint"},
    "planning": {"files", "sharding", "transforms", "checkpoint", "strategies", "resharded"},
    "engines": {"files", "sharding", "checkpoint", "resharded"},
    "storage": {"files", "checkpoint", "resharded"},
    "execution": {"files", "sharding", "checkpoint", "resharded", "storage"},
    "operations": {
        *("files", "sharding", "transforms", "showing", "checkpoint", "strategies", "resharded", "planning"),
        *("engines", "storage", "execution"),
    },
    "launch": {"files", "checkpoint", "resharded", "storage"},
    "cli": {"files", "showing", "checkpoint", "resharded", "storage", "operations", "launch"},
}
RUNTIME_ROOMS: dict[str, set[str]] = {
    "distributed": set(),
    "model": {"distributed"},
    "generation": {"distributed", "model"},
    "loading": {"distributed", "model", "generation"},
    "checking": {"distributed", "model", "generation"},
    "benchmark": {"distributed", "generation"},
    "commands": {"distributed", "model", "generation", "loading", "checking", "benchmark"},
}
FRONT = {"cli": {""}}  # the commands call what the package `reshard` itself exports
# The rooms and two modules of reshard that the runtime may import.
RUNTIME_MAY_TAKE = {"files", "sharding", "transforms", "checkpoint", "resharded", "strategies", "storage", "launch"}
RUNTIME_MAY_TAKE_TOO = {f"reshard.operations.{name}" for name in ("arguments", "reference", "values.in_memory")}
HEAVY = {"torch", "transformers", "numpy"}
NEEDS_TORCH = {"reshard.checkpoint.architecture"}  # it imports transformers' model classes
TORCH_FREE_ROOMS = [
    "files",
    "sharding",
    "showing",
    "checkpoint",
    "resharded",
    "engines",
    "storage",
    "execution",
    "launch",
    "cli",
]
TORCH_FREE = [
    *("reshard", "reshard.strategies.registry", "reshard.planning.recut"),
    *(
        f"reshard.operations.{name}"
        for name in ("publish.publish", "pull", "verify.verify", "inspect", "convert.convert", "merge")
    ),
]


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in FILES}
IMPORTABLE = [name for name in MODULES if not name.endswith("__main__")]  # a __main__ runs when it is imported


def imported(module: str, *, at_import: bool) -> Iterator[str]:
    """Yield the dotted names that a module imports; with `at_import`, only those imported when it is imported."""
    path = MODULES[module]
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]

    def walk(node: ast.AST) -> Iterator[str]:
        for child in ast.iter_child_nodes(node):
            if at_import and isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)):
                continue
            if at_import and isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
                continue
            if isinstance(child, ast.Import):
                yield from (alias.name for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                base = child.module or ""
                if child.level:
                    above = package.split(".")[: len(package.split(".")) - child.level + 1]
                    base = ".".join([*above, *filter(None, [child.module])])
                for alias in child.names:
                    full = f"{base}.{alias.name}"
                    yield full if full in MODULES else base
            else:
                yield from walk(child)

    yield from walk(ast.parse(path.read_text()))


def python(code: str) -> str:
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def room(module: str) -> str:
    """Return the room of its package that a module is in, or its own name if it is in none."""
    return (*module.split("."), "")[1]


def in_rooms(package: str) -> list[str]:
    return [
        module for module, path in MODULES.items() if module.split(".")[0] == package and path.parent.parent != ROOT
    ]


@pytest.mark.parametrize("name", TORCH_FREE_ROOMS)
def test_these_rooms_cost_no_torch(name: str) -> None:
    there = [m for m in in_rooms("reshard") if room(m) == name and m in IMPORTABLE and m not in NEEDS_TORCH]
    assert len(there) > 1
    lines = "\n".join(f"import {module}" for module in there)
    assert python(f"import sys\n{lines}\nprint(sorted({HEAVY} & set(sys.modules)))").strip() == "[]"


@pytest.mark.parametrize("module", TORCH_FREE)
def test_importing_it_costs_no_torch(module: str) -> None:
    assert python(f"import sys, {module}; print(sorted({HEAVY} & set(sys.modules)))").strip() == "[]"


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["run", "--help"], ["verify", "--help"]])
def test_asking_for_help_costs_no_torch(arguments: list[str]) -> None:
    code = f"""
import sys
from reshard.cli.main import main
try:
    main({arguments})
except SystemExit as ended:
    assert not ended.code, ended.code
print("heavy:", sorted({{"torch", "transformers", "numpy"}} & set(sys.modules)))
"""
    assert python(code).strip().endswith("heavy: []")


def test_reshard_never_imports_runtime() -> None:
    """`reshard run` starts the runtime as other processes."""
    for module in MODULES:
        if module.startswith("reshard"):
            assert not [name for name in imported(module, at_import=False) if name.split(".")[0] == "runtime"], module


@pytest.mark.parametrize(("package", "rooms"), [("reshard", ROOMS), ("runtime", RUNTIME_ROOMS)])
def test_a_room_takes_only_from_rooms_below_it(package: str, rooms: dict[str, set[str]]) -> None:
    """No import goes up, and there is no cycle, not even of imports within functions."""
    below: set[str] = set()
    for name, taken in rooms.items():
        assert taken <= below, f"{package}.{name} would take from a room above it"
        below.add(name)
    assert {room(module) for module in in_rooms(package)} == below
    for module in in_rooms(package):
        own = room(module)
        taken = {room(name) for name in imported(module, at_import=False) if name.split(".")[0] == package}
        assert taken <= rooms[own] | {own} | SHARED | FRONT.get(own, set()), module


def test_what_all_take_from_takes_from_no_room() -> None:
    for name in SHARED:
        names = imported(f"reshard.{name}", at_import=False)
        assert {room(taken) for taken in names if taken.split(".")[0] == "reshard"} <= SHARED


def test_runtime_takes_only_what_both_halves_share() -> None:
    for module in MODULES:
        if module.split(".")[0] == "runtime":
            names = {name for name in imported(module, at_import=False) if name.split(".")[0] == "reshard"}
            foreign = {name for name in names if room(name) not in RUNTIME_MAY_TAKE | SHARED}
            assert foreign <= RUNTIME_MAY_TAKE_TOO, module


def test_a_room_is_seen_at_a_glance() -> None:
    for folder in {path.parent for path in FILES} - {ROOT / "reshard", ROOT / "runtime", ROOT / "reshard" / "cli"}:
        entries = {entry.name for entry in folder.iterdir()} - {"__init__.py", "__pycache__", "README.md"}
        assert len(entries) <= MOST_ENTRIES, f"{folder}: {sorted(entries)}"


@pytest.mark.parametrize("package", ["reshard", "runtime"])
def test_no_import_cycles(package: str) -> None:
    graph = {
        module: {name for name in imported(module, at_import=True) if name in MODULES and name != module}
        for module in MODULES
        if module.split(".")[0] == package
    }
    TopologicalSorter(graph).prepare()  # raises CycleError, which shows the cycle


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_files_are_short(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= MAX_LINES


def test_nothing_is_printed_but_through_click() -> None:
    for module, path in MODULES.items():
        calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
        assert not [c.lineno for c in calls if isinstance(c.func, ast.Name) and c.func.id == "print"], module


@pytest.mark.parametrize("module", IMPORTABLE)
def test_public_names_are_documented(module: str) -> None:
    """Errors may inherit a docstring: that of reshard.errors tells them apart."""
    found = importlib.import_module(module)
    assert found.__doc__ or module.endswith("_version"), module
    for name in getattr(found, "__all__", ()):
        value = getattr(found, name)
        if inspect.isclass(value) or inspect.isroutine(value):
            assert inspect.getdoc(value), f"{module}.{name}"


def commands(path: Path) -> list[str]:
    """Return the functions that `@click.command()` or `@cli.command()` makes commands."""
    functions = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef)]
    made = ("cli.command(", "click.command(")
    return [f.name for f in functions if any(ast.unparse(item).startswith(made) for item in f.decorator_list)]


def test_pages_name_every_command() -> None:
    offline = [name for home in MODULES if home.startswith("reshard.cli.") for name in commands(MODULES[home])]
    homes = [path for name, path in MODULES.items() if name.startswith("runtime.commands.")]
    online = [name for home in homes for name in commands(home)]
    assert len(offline) >= 8
    assert len(online) >= 3
    page = (ROOT / "reshard" / "cli" / "README.md").read_text()
    assert not [name for name in offline if f"`reshard {name}" not in page]
    page = (ROOT / "runtime" / "README.md").read_text()
    assert not [name for name in online if f"reshard-rank {name}" not in page]


@pytest.mark.parametrize(("package", "rooms"), [("reshard", ROOMS), ("runtime", RUNTIME_ROOMS)])
def test_pages_have_the_rooms(package: str, rooms: dict[str, set[str]]) -> None:
    """The rooms are in order, each with the rooms it may import from."""
    page = (ROOT / package / "README.md").read_text()
    listed: dict[str, set[str]] = {}
    for name, taken in re.findall(r"^\| `(\w+)/` \| .* \| ?(.*?) ?\|$", page, re.M):
        listed[name] = set(listed) if taken == "all above" else set(re.findall(r"`(\w+)`", taken))
    assert list(listed.items()) == list(rooms.items())


def test_fault_table_is_that_of_the_tests() -> None:
    assert fault_table.TABLE.read_text() == fault_table.table(), "run: python scripts/fault_table.py"
