"""The architecture, executable: what may import what, how long files are, what is documented."""

from __future__ import annotations

import ast
import importlib
import inspect
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import fault_table
import pytest
from places import ROOT

MAX_LINES = 330
FILES = sorted(path for package in ("reshard", "runtime") for path in (ROOT / package).rglob("*.py"))
TORCH_FREE = [
    "reshard",
    *(
        f"reshard.{name}"
        for name in (
            *("placement", "regions", "layout", "manifest", "source", "weights", "untrusted", "header"),
            *(
                "targets",
                "report",
                "verification",
                "cli.main",
                "topology",
                "fields",
                "placement_json",
                "guard",
                "system",
            ),
            *("hub.snapshot", "hub.publishing", "hub.card", "pulling", "places", "stores", "destination"),
            *("launch.agent", "launch.asked", "launch.bench", "launch.rank", "system"),
        )
    ),
]
RUNTIME_MAY_IMPORT = {
    *("layout", "output", "outputs", "system"),
    *(
        "arguments",
        "architecture",
        "digest",
        "dtypes",
        "errors",
        "failures",
        "header",
        "hub",
        "manifest",
        "placement",
        "places",
    ),
    *(
        "output",
        "process",
        "rank_file",
        "reference",
        "regions",
        "source",
        "stores",
        "strategies",
        "switches",
        "targets",
        "topology",
        "verification",
        "weights",
    ),
    "launch",  # the benchmark starts itself on the ranks of each folder
}


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in FILES}
IMPORTABLE = [name for name in MODULES if not name.endswith("__main__")]  # those run when they are imported


def imported(module: str, *, at_import: bool) -> Iterator[str]:
    """Dotted names that a module imports; with `at_import`, only those that importing it runs."""
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


@pytest.mark.parametrize("module", TORCH_FREE)
def test_importing_it_costs_no_torch(module: str) -> None:
    heavy = python(f"import sys, {module}; print(sorted({{'torch', 'transformers', 'numpy'}} & set(sys.modules)))")
    assert heavy.strip() == "[]"


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
    """`reshard run` starts it as other processes."""
    for module in MODULES:
        if module.startswith("reshard"):
            assert not [name for name in imported(module, at_import=False) if name.split(".")[0] == "runtime"], module


def test_runtime_imports_only_the_shared_half_of_reshard() -> None:
    for module in MODULES:
        if module.startswith("runtime"):
            names = [name.split(".") for name in imported(module, at_import=False)]
            taken = {parts[1] if len(parts) > 1 else "" for parts in names if parts[0] == "reshard"}
            assert taken <= RUNTIME_MAY_IMPORT, f"{module}: {taken - RUNTIME_MAY_IMPORT}"


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
    """Errors may inherit theirs: reshard.errors tells them apart in its own docstring."""
    found = importlib.import_module(module)
    assert found.__doc__ or module.endswith("_version"), module
    for name in getattr(found, "__all__", ()):
        value = getattr(found, name)
        if inspect.isclass(value) or inspect.isroutine(value):
            assert inspect.getdoc(value), f"{module}.{name}"


def commands(path: Path) -> list[str]:
    """Functions that `@click.command()`, or that of a group, makes commands of."""
    functions = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef)]
    made = ("cli.command(", "click.command(")
    return [f.name for f in functions if any(ast.unparse(item).startswith(made) for item in f.decorator_list)]


def test_readme_mentions_every_command() -> None:
    readme = (ROOT / "README.md").read_text()
    offline = [name for home in MODULES if home.startswith("reshard.cli.") for name in commands(MODULES[home])]
    homes = [path for name, path in MODULES.items() if name.startswith("runtime.commands.")]
    online = [name for home in homes for name in commands(home)]
    assert len(offline) >= 8
    assert len(online) >= 3
    missing = [f"reshard {name}" for name in offline if f"reshard {name}" not in readme]
    missing += [f"reshard-rank {name}" for name in online if f"reshard-rank {name}" not in readme]
    assert not missing


def test_fault_table_is_that_of_the_tests() -> None:
    assert fault_table.TABLE.read_text() == fault_table.table(), "run: python scripts/fault_table.py"
