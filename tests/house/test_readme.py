"""The pages: each one's commands and scripts run unchanged and in order on a pico model; their links."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import engine_tools
import launchers
import object_store
import pico
import pytest
import warm_commands
from cli_tools import link, tree
from fake_hub import FakeHub
from places import ROOT

import reshard

FRONT = "README.md"
COMMANDS = "reshard/cli/README.md"
RUNTIME = "runtime/README.md"
PARTS = "reshard/operations/convert/README.md"
STYLES = "reshard/strategies/README.md"
ENGINES = "reshard/engines/README.md"
PAGES = [
    *(FRONT, COMMANDS, RUNTIME, STYLES, "reshard/README.md", "reshard/resharded/README.md", "scripts/README.md"),
    *("reshard/transforms/README.md", PARTS),
    ENGINES,
    *("tests/README.md", "CONTRIBUTING.md", "CHANGELOG.md"),
]
FRONT_LINES = 200
HAVE_OUT = {COMMANDS, RUNTIME}  # pages that begin with a resharded folder
TEXTS = {page: (ROOT / page).read_text() for page in PAGES}
BLOCKS = {page: re.findall(r"^```(\w*)\n(.*?)^```", text, re.M | re.S) for page, text in TEXTS.items()}
NAMED = re.compile(r"# (\w+\.(?:py|toml))\n")
FRESH = {STYLES}  # pages whose commands are run by the real console scripts, in processes that import everything
TOLD = "Once upon a time every rank opened the whole checkpoint"  # a text that the pico model was trained on
# Options of other programs than ours and the scripts.
FOREIGN = {"--no-python", "--nproc-per-node", "--private_key", "--public_key", "--signature"}
FOREIGN |= {"--load-format", "--enable-expert-parallel"}
FOREIGN |= {"--nnodes", "--node-rank", "--master-addr", "--master-port", "--rdzv-backend", "--rdzv-endpoint"}
FOREIGN |= {
    "--local-addr",
    "--nodes",
    "--ntasks-per-node",
    "--array",
    "--job-name",
    "--requeue",
    "--cpus-per-task",
    "--mem",
}


def lines_of(page: str) -> list[str]:
    """Return a page's commands: lines of blocks without a language. The `sh` blocks need more than tests have."""
    lines = [line for language, block in BLOCKS[page] if not language for line in block.splitlines()]
    return [line.split("  #")[0].strip() for line in lines]


def scripts_of(page: str) -> list[str]:
    return [block for language, block in BLOCKS[page] if language == "python" and not NAMED.match(block)]


def run(*command: str, folder: Path, fresh: bool = False, **variables: str) -> str:
    scripts = Path(sys.executable if fresh else warm_commands.python()).parent
    path = os.pathsep.join([str(scripts), os.environ["PATH"]])
    there = {**os.environ, **variables, "PATH": path, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=folder, env=there, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, (command, done.stderr)
    return done.stdout


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with SOURCE, a pico model with a tokenizer; OUT, made of it for 2 ranks; MOE, with experts; and VARIANT,
    its weights under another name."""
    root = tmp_path_factory.mktemp("sources")
    run("python", str(ROOT / "scripts" / "make_pico.py"), "SOURCE", folder=root)
    (root / "SOURCE" / "recipe.yaml").write_text("steps: 1\n")
    (root / "nf4.json").write_text('{"bnb_4bit_compute_dtype": "float16", "bnb_4bit_use_double_quant": true}')
    reshard.convert(root / "SOURCE", root / "OUT", tp_size=2)
    pico.save("qwen3_moe", root / "MOE")
    pico.build("llama").save_pretrained(root / "VARIANT", variant="fp16")
    pico.save("llama", root / "LINKS")
    return root


@pytest.fixture
def folder_of(sources: Path, tmp_path: Path) -> Callable[[str], Path]:
    """`folder_of(page)`: a folder with a page's own files and those it starts from. LINKS has links to its weights."""

    def make(page: str) -> Path:
        folder = tmp_path / "page"
        left_out = shutil.ignore_patterns(*([] if page in HAVE_OUT else ["OUT"]))
        shutil.copytree(sources, folder, ignore=left_out)
        (folder / "store").mkdir()
        for path in (folder / "LINKS").glob("*.safetensors"):
            link(path, folder / "store" / path.name)
        for _, block in BLOCKS[page]:
            if match := NAMED.match(block):
                (folder / match[1]).write_text(block)
        shutil.copy(engine_tools.plan_of(engine_tools.PAGE), folder / "llama.copy-plan")
        return folder

    return make


def contents(folder: Path, under: str = "") -> dict[str, bytes]:
    return {under + path.name: path.read_bytes() for path in folder.iterdir()}


def folded(text: str) -> set[str]:
    """Return its lines, with a # for each number."""
    return {re.sub(r"\d[\d.,]*(e-?\d+)?", "#", line.strip()) for line in text.splitlines()}


@pytest.mark.parametrize("page", [FRONT, COMMANDS, RUNTIME, STYLES, ENGINES])
def test_commands(page: str, folder_of: Callable[[str], Path], sources: Path, hub: FakeHub) -> None:
    folder = folder_of(page)
    said = {}
    hub.create("org/llama", {**contents(sources / "SOURCE"), "README.md": b"---\nlicense: apache-2.0\n---\n"})
    if page == RUNTIME:
        hub.create("org/model", contents(sources / "OUT", "tp2/"))
    with object_store.serve() as store:
        store.put("llama", contents(sources / "SOURCE"))
        variables = {**hub.environment(folder / "home"), **store.environment(folder)}
        for command in lines_of(page):
            if command.startswith(("reshard ", "torchrun ")):
                said[command] = run(*shlex.split(command), folder=folder, fresh=page in FRESH, **variables)
        assert page != COMMANDS or "reshard.json" in store.objects("llama-tp4")
    if page in (FRONT, COMMANDS):
        assert "apache-2.0" in hub.repos["org/model"].files["README.md"].decode()
    for command, text in said.items():
        if "--prompt" in command and "--format json" not in command:
            assert text.startswith(TOLD), command
        if " check " in command:
            assert "tokens equal" in text, command
        if "--per-layer" in command:
            assert text.endswith("no module differs\n")
    if page == FRONT:
        assert {command.split()[1] for command in said} == {
            *("plan", "convert", "run", "merge", "verify", "check", "publish", "pull"),
        }
        shown = "".join(block for language, block in BLOCKS[page] if language == "text")
        assert folded(shown) <= folded("\n".join(said.values()))
    if page == RUNTIME:
        [batch] = [text for command, text in said.items() if "--format json" in command]
        found = [json.loads(line) for line in batch.splitlines()]
        assert [one["ended"] for one in found] == ["stop", "stop"]
        assert found[1]["text"] == " every rank opened the whole "
        on_ranks, one_command, *_ = (text for command, text in said.items() if " bench " in command)
        assert "reshard tp 1" in one_command
        assert all("reshard tp 2" in text for text in (one_command, on_ranks))
        assert (folder / "speed-up.png").read_bytes().startswith(b"\x89PNG")


def blocks_of(page: str, language: str) -> list[str]:
    """Return the blocks of a page that begin a recipe for several machines."""
    blocks = [block for of, block in BLOCKS[page] if of == language]
    return [block for block in blocks if block.startswith(("torchrun --nnodes", "srun", "mpirun", "#!", "apiVersion"))]


RECIPES = {"torchrun": ("sh", 0), "srun": ("sh", 1), "mpirun": ("sh", 2), "sbatch": ("bash", 0), "kubectl": ("yaml", 0)}


@pytest.fixture
def cluster(sources: Path, tmp_path: Path, hub: FakeHub) -> launchers.Cluster:
    """Some machines with a Hub that has org/llama."""
    hub.create("org/llama", contents(sources / "SOURCE"))
    return launchers.Cluster(tmp_path, hub.environment(tmp_path / "home"))


@pytest.fixture(scope="module")
def converted(sources: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that all the recipes make."""
    room = tmp_path_factory.mktemp("one")
    with FakeHub() as hub:
        hub.create("org/llama", contents(sources / "SOURCE"))
        run("reshard", "convert", "org/llama", "one", "-tp", "8", folder=room, **hub.environment(room / "home"))
    return room / "one"


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_of_converting(name: str, cluster: launchers.Cluster, converted: Path) -> None:
    """Each makes, of the text on the page, the folder that one process makes."""
    language, number = RECIPES[name]
    block = blocks_of(PARTS, language)[number]
    said = {"bash": cluster.sbatch, "yaml": cluster.kubectl}.get(language, cluster.shell)(block)
    assert len(said) == 4
    assert sorted(re.findall(r"part (\d) of 4", "".join(said))) == ["1", "2", "3", "4"]
    assert tree(cluster.shared / "llama-tp8") == tree(converted)
    assert [path.name for path in cluster.shared.iterdir()] == ["llama-tp8"]


def test_every_recipe_is_run() -> None:
    blocks = {language: len(blocks_of(PARTS, language)) for language in ("sh", "bash", "yaml")}
    assert blocks == {"sh": 3, "bash": 1, "yaml": 1}
    assert sum(language in blocks for language, _ in BLOCKS[PARTS]) == 5
    assert sum(language == "sh" for language, _ in BLOCKS[RUNTIME]) == len(blocks_of(RUNTIME, "sh")) == 2


def test_recipes_of_running(cluster: launchers.Cluster, sources: Path, hub: FakeHub, tmp_path: Path) -> None:
    """Two agents of torchrun; then two machines with folders of their own, each with the files of its ranks."""
    reshard.convert(sources / "SOURCE", tmp_path / "tp4", tp_size=4)
    hub.create("org/model", contents(tmp_path / "tp4", "tp4/"))
    for block in blocks_of(RUNTIME, "sh"):
        said = [text for text in cluster.shell(block) if "once" in text.lower()]
        assert len(said) == 1  # that of rank 0
        assert said[0].startswith(TOLD)
    for number, local in enumerate(cluster.locals):
        held = sorted(path.name[:11] for path in (local / "model" / "tp4").glob("shard-*"))
        assert held == [f"shard-0000{rank}" for rank in (2 * number + 1, 2 * number + 2)]


@pytest.mark.parametrize("page", [FRONT, COMMANDS])
def test_python(page: str, folder_of: Callable[[str], Path]) -> None:
    folder = folder_of(page)
    for number, script in enumerate(scripts_of(page)):
        name = f"script_{number}.py"
        if "import runtime" not in script:
            (folder / name).write_text(script)
            run("python", name, folder=folder)
        else:
            (folder / name).write_text(script + "\nprint(tuple(tokens.shape), tuple(weight.shape))\n")
            said = run("torchrun", "--standalone", "--nproc-per-node", "2", name, folder=folder)
            assert (said.count("(1, 7)"), said.count("(330, 64)")) == (2, 2)  # the lines of the ranks may mix


def test_nothing_else_is_to_be_run() -> None:
    """Only pages that are run have commands and scripts; our scripts exist and can be started."""
    assert {page for page in PAGES if scripts_of(page)} == {FRONT, COMMANDS}
    for page in PAGES:
        for line in filter(None, lines_of(page)):
            command = line.split()[0]
            if command in ("reshard", "torchrun"):
                assert page in (FRONT, COMMANDS, RUNTIME, STYLES, ENGINES), line
            elif command.startswith("scripts/"):  # the demo runs these commands too; scripts/test would run the tests
                assert os.access(ROOT / command, os.X_OK), line
            else:  # test_benchmarks.py runs them
                assert command == ".venv/bin/python", line
                assert (ROOT / line.split()[1]).is_file(), line


def test_options_exist() -> None:
    """Every option that a page names is one of our commands' or scripts'."""
    from reshard.cli.main import cli
    from runtime.commands.bench import bench
    from runtime.commands.check import check
    from runtime.commands.generate import generate

    commands = [*cli.commands.values(), bench, check, generate]
    known = {name for command in commands for option in command.params for name in option.opts} | {"--help"}
    known |= FOREIGN
    scripts = "".join(
        path.read_text() for path in (ROOT / "scripts").iterdir() if path.is_file() and path.suffix != ".md"
    )
    known |= set(re.findall(r"--[a-z][a-z-]+", scripts + (ROOT / "tests/tools/family_report.py").read_text()))
    for page in PAGES:
        named = set(re.findall(r"(?<![\w-])--[a-z][a-z_-]+", TEXTS[page]))
        assert named <= known, page


def anchors(text: str) -> set[str]:
    """Return the names that GitHub gives a page's headings in links."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", TEXTS[page]):
        if target.startswith("https://"):
            continue
        name, _, anchor = target.partition("#")
        path = (ROOT / page).parent / name if name else ROOT / page
        assert path.exists(), target
        assert not anchor or anchor in anchors(path.read_text()), target


def test_pages_are_layers() -> None:
    """The front page is short, and links to all others."""
    assert len(TEXTS[FRONT].splitlines()) <= FRONT_LINES
    linked = {target.partition("#")[0] for target in re.findall(r"\]\(([^)\s]+)\)", TEXTS[FRONT])}
    assert {page for page in PAGES if page != FRONT} <= linked
    rooms = [ROOT / name for name in ("reshard", "runtime", "scripts", "tests")]
    assert {path.relative_to(ROOT).as_posix() for room in rooms for path in room.rglob("README.md")} <= set(PAGES)


def test_styles_named() -> None:
    from reshard.strategies import ALL_PARALLEL_STYLES

    rows = [line for line in TEXTS[STYLES].split("## The styles")[1].splitlines() if line.startswith("| ")]
    named = {name for row in rows for name in re.findall(r"`(\w+)`", row.split(" | ")[1])}
    assert named == set(ALL_PARALLEL_STYLES)


def test_ci_runs_the_readme_test_command() -> None:
    assert "\nscripts/test" in (ROOT / ".ci" / "run").read_text()
