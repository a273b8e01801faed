"""The page of a plan in a real browser: what it shows, and what a hostile file cannot make it do."""

from __future__ import annotations

import dataclasses
import html
import json
import re
import shlex
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import engine_tools
import pytest
from big_checkpoints import DEEPSEEK_V3_FP8, LLAMA_70B, write
from browser import CHROMIUM, Browser, Page, browser
from cli_tools import Checkpoint, Cli, Refused, single_file
from fake_hub import FakeHub

import reshard
from reshard.showing.page.drawing import card_drawing
from reshard.showing.page.facts import advice
from reshard.showing.page.page import plan_page
from reshard.showing.tables import gigabytes

IN_BROWSER = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium")
EVIL = (
    "</script <script>hacked=1</script><img src=x onerror='hacked=1'><!--<script \"'`\u2028\u202e{{7*7}}&lt;</style>]]>"
)
STORED = 'JSON.parse(document.getElementById("report").textContent)'


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with browser(tmp_path_factory.mktemp("profile")) as started:
        yield started


@pytest.fixture
def shown(chromium: Browser, tmp_path: Path) -> Callable[[str], Page]:
    """`shown(text)`: the page of this text, loaded."""

    def load(text: str) -> Page:
        path = tmp_path / "page.html"
        path.write_text(text, encoding="utf-8")
        return chromium.open(path.as_uri())

    return load


def assert_quiet(page: Page) -> None:
    """Nothing failed, nothing was refused, and nothing but the page itself was asked for."""
    assert page.failures == []
    assert len(page.requests) == 1, page.requests


@pytest.fixture(scope="module")
def uneven(checkpoint: Checkpoint) -> dict[str, Any]:
    """The report of a plan for 3 ranks: 8 query heads and 4 KV heads do not divide."""
    return reshard.plan(checkpoint("llama"), tp_size=3).to_dict()


BIG = {
    "llama 70B": (LLAMA_70B, {"tp_size": 8}),
    "DeepSeek-V3 in fp8": (DEEPSEEK_V3_FP8, {"tp_size": 16, "ep_size": 16}),
}


@IN_BROWSER
@pytest.mark.parametrize(("config", "sizes"), BIG.values(), ids=BIG)
def test_big_models(
    config: dict[str, Any],
    sizes: dict[str, int],
    shown: Callable[[str], Page],
    tmp_path: Path,
) -> None:
    """It is small, opens at once, and says what is uneven and what is replicated."""
    write(tmp_path / "model", config, files=4)
    report = reshard.plan(tmp_path / "model", **sizes).to_dict()
    text = plan_page(report)
    assert len(text.encode()) < 2_000_000
    seconds = "performance.getEntriesByType('navigation')[0].loadEventEnd"
    page, opened = shown(text), []
    for _ in range(3):  # other tests may hold it up once
        opened.append(page.evaluate(seconds))
        if opened[-1] >= 1000:
            page = shown(text)
    assert min(opened) < 1000
    assert_quiet(page)
    found = page.evaluate("document.querySelector('.findings').innerText")
    held = {sum(row["rank_bytes"][rank] for row in report["parameters"]) for rank in range(len(report["ranks"]))}
    whole = sum(row["rank_bytes"][0] for row in report["parameters"] if row["placement"] == "Replicate()")
    assert len(held) == 1
    assert f"Even: every rank holds {gigabytes(held.pop())}." in found
    assert f"Replicated: {gigabytes(whole)} in each file" in found
    drawn = page.evaluate("new Set([...document.querySelectorAll('figure svg')].map(one => one.dataset.p)).size")
    assert drawn == len(report["parameters"])
    figures = "[...document.querySelectorAll('figure svg')]"
    grey = page.evaluate(f"{figures}.filter(one => one.querySelector('.whole')).map(one => +one.dataset.p)")
    assert set(grey) == {at for at, row in enumerate(report["parameters"]) if row["placement"] == "Replicate()"}


@IN_BROWSER
def test_its_figures_are_those_of_the_plan(uneven: dict[str, Any], shown: Callable[[str], Page]) -> None:
    page = shown(plan_page(uneven, commands=[("Cut it:", "reshard convert SOURCE OUT")]))
    assert_quiet(page)
    assert json.loads(page.evaluate(f"JSON.stringify({STORED})")) == uneven
    bars = page.evaluate(
        "[...document.querySelectorAll('svg.bar')].map(bar => [...bar.querySelectorAll('rect')]"
        ".map(part => [part.classList[0], part.width.baseVal.value]))"
    )
    longest = max(
        sum(row["rank_bytes"][rank] for row in uneven["parameters"]) + uneven["ranks"][rank]["kv_bytes"]
        for rank in range(3)
    )
    for rank, parts in enumerate(bars):
        widths = dict(parts)
        cache = uneven["ranks"][rank]["kv_bytes"]
        assert widths.pop("cache") == pytest.approx(1000 * cache / longest, abs=0.06)
        for kind, width in widths.items():
            rows = [
                row["rank_bytes"][rank]
                for row in uneven["parameters"]
                if kind == ("replicated" if row["placement"] == "Replicate()" else row["kind"])
            ]
            assert width == pytest.approx(1000 * sum(rows) / longest, abs=0.06), (rank, kind)
    areas = page.evaluate(
        "[...document.querySelectorAll('figure svg')].map(svg => [+svg.dataset.p, svg.getAttribute('width') *"
        " svg.getAttribute('height'), [...svg.querySelectorAll('[data-r]')].map(cell => [cell.dataset.r.split(' ')"
        ".map(Number), cell.width.baseVal.value * cell.height.baseVal.value])])"
    )
    assert {at for at, _, _ in areas} == set(range(len(uneven["parameters"])))
    for at, whole, cells in areas:
        row = uneven["parameters"][at]
        for rank in range(3):
            held = sum(area for ranks, area in cells if rank in ranks)
            part = row["rank_bytes"][rank] / row["count"] / row["bytes"]
            assert held / whole == pytest.approx(part, abs=0.02), (row["parameter"], rank)
    lines = page.evaluate("[...document.querySelectorAll('tbody tr')].map(tr => [...tr.cells].map(td => td.innerText))")
    for line, row in zip(lines, uneven["parameters"], strict=True):
        assert line[:3] == [row["parameter"], str(row["count"]), "×".join(map(str, row["shape"]))]
        assert line[4:6] == [row["reason"] or row["style"], row["placement"]]
    sizes = page.evaluate(
        "[...document.querySelectorAll('.sizes li')].map(li => [li.innerText, li.title, li.className])"
    )
    assert {size: why or None for size, why, _ in sizes} == uneven["tp_sizes"]
    assert [size for size, _, classes in sizes if "this" in classes] == ["3"]
    assert page.evaluate("document.querySelector('pre').innerText") == "reshard convert SOURCE OUT"


@IN_BROWSER
def test_by_mouse_and_by_keyboard(uneven: dict[str, Any], shown: Callable[[str], Page]) -> None:
    """The same words come by pointing and by arrow keys; a rank's button shows its parts."""
    page = shown(plan_page(uneven))
    page.size(1280)
    at = next(n for n, row in enumerate(uneven["parameters"]) if row["parameter"].endswith("q_proj.weight"))
    info, figure = "document.getElementById('info').innerText", f"figure svg[data-p='{at}']"
    page.point(f'{figure} [data-r="1"]')
    pointed = page.evaluate(info)
    assert "model.layers.*.self_attn.q_proj.weight" in pointed
    assert "32 × 32 · float32 · 2 of them · 4.1 kB each · Ranges(0, 16|8|8) · colwise" in pointed
    assert "rank 1 holds 16–23 of dim 0 (heads 4–5 of 8): 2.0 kB in all" in pointed
    page.press("Escape")
    assert page.evaluate("document.getElementById('info').hidden")
    page.evaluate(f'document.querySelector("{figure}").focus()')
    page.press("ArrowRight")
    page.press("ArrowRight")
    assert page.evaluate(info) == pointed
    page.press("Tab")
    assert "model.layers.*.self_attn.k_proj.weight" in page.evaluate(info)
    page.point("button[data-rank='2']", click=True)
    dim = "[...document.querySelectorAll('figure .off')].map(cell => cell.dataset.r)"
    assert set(page.evaluate(dim)) == {"0", "1"}
    page.point("button[data-rank='2']", click=True)
    assert page.evaluate(dim) == []
    page.evaluate("search.value = 'Q_PROJ layers'; search.dispatchEvent(new Event('input'))")
    assert page.evaluate("document.getElementById('count').innerText") == "1 of 12"
    assert page.evaluate("document.querySelectorAll('tbody tr:not([hidden])').length") == 1
    assert_quiet(page)


@IN_BROWSER
def test_on_a_phone_and_in_the_dark(uneven: dict[str, Any], shown: Callable[[str], Page]) -> None:
    page = shown(plan_page(uneven, commands=[("Cut it:", "reshard convert " + "long " * 40)]))
    seen = set()
    for width in (1280, 400):
        for scheme in ("light", "dark"):
            page.size(width)
            page.scheme(scheme)
            assert page.evaluate("document.documentElement.scrollWidth") <= width
            assert page.evaluate("getComputedStyle(document.body).backgroundColor") == (
                "rgb(253, 253, 252)" if scheme == "light" else "rgb(19, 20, 23)"
            )
            seen.add(page.screenshot())
    assert len(seen) == 4
    assert_quiet(page)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_words_stand_out(scheme: str, uneven: dict[str, Any]) -> None:
    """Text has a contrast of 4.5 at least: https://www.w3.org/TR/WCAG22/#contrast-minimum."""
    colours = dict(re.findall(r"--([\w-]+):(#\w+)", plan_page(uneven).split(":root{")[1 if scheme == "light" else 2]))
    for front in ("text", "soft", "accent", "good", "look"):
        for back in ("back", "card"):
            light, dark = sorted((luminance(colours[front]), luminance(colours[back])), reverse=True)
            assert (light + 0.05) / (dark + 0.05) >= 4.5, (front, back)


def luminance(colour: str) -> float:
    digits = colour[1:] if len(colour) == 7 else "".join(2 * digit for digit in colour[1:])
    parts = [int(digits[at : at + 2], 16) / 255 for at in (0, 2, 4)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def spoilt(value: Any, at: str = "") -> Any:
    """Put hostile words into every text of a report that comes from files, keys too."""
    if isinstance(value, dict):
        names = {key: (f"{EVIL}{key}" if at in ("tied", "custom_strategies") else key) for key in value}
        return {names[key]: spoilt(one, key) for key, one in value.items()}
    if isinstance(value, list):
        return [spoilt(one, at) for one in value]
    return value + EVIL if isinstance(value, str) and at != "kind" else value


@IN_BROWSER
@pytest.mark.fault(38)
def test_hostile_names_run_nothing(uneven: dict[str, Any], shown: Callable[[str], Page]) -> None:
    evil = spoilt(
        {**uneven, "tied": {"a": "b"}, "custom_strategies": {"c": "d"}, "unused": ["e"], "runtime_only": ["f"]}
    )
    page = shown(plan_page(evil, commands=[(EVIL, EVIL)]))
    assert_quiet(page)
    assert page.evaluate("typeof hacked") == "undefined"
    assert page.evaluate("[document.scripts.length, document.images.length]") == [2, 0]
    assert json.loads(page.evaluate(f"JSON.stringify({STORED})")) == evil
    for at in range(len(evil["parameters"])):
        page.evaluate(f"document.querySelector(\"figure svg[data-p='{at}']\").dispatchEvent(new Event('focus'))")
    assert "<img src=x" in page.evaluate("document.getElementById('info').innerText")
    assert "\u202e" not in page.evaluate("document.body.innerText")
    assert page.evaluate("typeof hacked") == "undefined"
    assert page.evaluate("document.images.length") == 0
    assert_quiet(page)


@IN_BROWSER
@pytest.mark.fault(38)
def test_the_policy_holds_even_if_markup_got_in(uneven: dict[str, Any], shown: Callable[[str], Page]) -> None:
    """What a mistake of ours might let through is refused by the browser: scripts, handlers, styles and requests."""
    bad = (
        "<script>hacked=1</script><img src='data:,' onerror='hacked=1'><p id='styled' style='color:red'>x</p>"
        "<iframe src='https://example.org/'></iframe><link rel='stylesheet' href='https://example.org/x.css'>"
    )
    page = shown(plan_page(uneven).replace("<main>", f"<main>{bad}"))
    assert page.evaluate("typeof hacked") == "undefined"
    assert page.evaluate("getComputedStyle(document.getElementById('styled')).color") != "rgb(255, 0, 0)"
    assert len([words for words in page.failures if "Content Security Policy" in words]) >= 4
    assert page.evaluate("performance.getEntriesByType('resource').filter(one => one.transferSize).length") == 0


@IN_BROWSER
@pytest.mark.fault(38)
def test_a_hostile_checkpoint(source: Path, tmp_path: Path, cli: Cli, chromium: Browser) -> None:
    """Names of tensors and files, as a checkpoint brings them, through the command."""
    single_file(source, lambda tensors: tensors.update({EVIL[:40]: tensors["model.norm.weight"].clone()}))
    (source / "<img src=x onerror=hacked=1>.bin").write_bytes(b"weights")
    result = cli("plan", source, "--tp-size", 2, "--html", tmp_path / "plan.html")
    assert result.code == 0, result
    page = chromium.open((tmp_path / "plan.html").as_uri())
    assert_quiet(page)
    assert page.evaluate("[typeof hacked, document.images.length]") == ["undefined", 0]
    assert "</script <script>" in page.evaluate("document.body.innerText")


def test_the_same_plan_gives_the_same_bytes(checkpoint: Checkpoint, resharded: Path) -> None:
    for report in (reshard.plan(checkpoint("llama"), tp_size=2).to_dict(), reshard.inspect(resharded).to_dict()):
        again = json.loads(json.dumps(report))
        assert plan_page(report) == plan_page(again)
        assert card_drawing(report) == card_drawing(again)


def test_the_command_writes_it(source: Path, tmp_path: Path, cli: Cli) -> None:
    page = tmp_path / "plan.html"
    result = cli("plan", source, "-tp", 3, "--format", "json", "--dtype", "bf16", "--html", page, aloud=True)
    assert result.code == 0, result
    assert f"written: {page}, {page.stat().st_size:,} bytes" in result.err
    [stored] = re.findall(r'<script type="application/json" id="report">(.*?)</script>', page.read_text())
    assert json.loads(stored) == json.loads(result.out)
    assert f"reshard convert {source} OUT --tp-size 3 --dtype bfloat16" in page.read_text()
    assert [path.name for path in tmp_path.iterdir() if path.name != "source"] == ["plan.html"]
    first = page.read_bytes()
    assert cli("plan", source, "-tp", 2, "--html", page).code == 0
    assert page.read_bytes() != first


def commands_of(page: Path) -> list[list[str]]:
    return [
        shlex.split(html.unescape(line)) for line in re.findall(r"<code>(reshard .*)</code></pre>", page.read_text())
    ]


def test_commands_of_a_plan(source: Path, tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    """They have the plan's own options, and work."""
    (source / "it's.yaml").write_text("steps: 1")
    page = tmp_path / "plan.html"
    given = ["--dtype", "bf16", "--drop-unused", "--include", "it's.*", "--include", "it*"]
    cut = ["--dtype", "bfloat16", "--drop-unused", "--include", "it's.*", "--include", "it*"]
    assert cli("plan", source, "--gpu-memory", "1MB", "--batch-size", 2, "--html", page, *given).code == 0
    convert, run, verify, plan = commands_of(page)
    assert convert == ["reshard", "convert", str(source), "OUT", "--tp-size", "1", *cut]
    assert run == ["reshard", "run", "OUT", "--prompt", "Once upon a time"]
    assert verify == ["reshard", "verify", "OUT", "--against", str(source)]
    assert plan == ["reshard", "plan", str(source), *cut]
    monkeypatch.chdir(tmp_path)
    for command in (convert, verify, plan):
        result = cli(*command[1:])
        assert result.code == 0, result
    assert (tmp_path / "OUT" / "it's.yaml").exists()


def test_commands_of_a_folder(
    resharded: Path, checkpoint: Checkpoint, tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = tmp_path / "out.html"
    result = cli("inspect", resharded, "--html", page, "--format", "json")
    assert result.code == 0, result
    text = page.read_text()
    assert all(record["file"] in text for record in json.loads(result.out)["ranks"])
    assert "KV cache" not in text.split("<main>")[1].split("<script")[0]
    monkeypatch.chdir(tmp_path)
    run, *others = commands_of(page)
    assert run[1:3] == ["run", str(resharded)]
    for command in others:
        result = cli(*command[1:])
        assert result.code == 0, result
    for path in checkpoint("llama").glob("*.safetensors"):
        assert (tmp_path / "DEST" / path.name).read_bytes() == path.read_bytes()


def test_commands_of_a_repo(here: FakeHub, resharded: Path, tmp_path: Path, cli: Cli) -> None:
    reshard.publish(resharded, "me/two", private=True, revision="next")
    assert cli("inspect", "me/two", "--revision", "next", "--html", tmp_path / "page.html").code == 0
    run, pull, *_ = commands_of(tmp_path / "page.html")
    assert run[1:3] == ["run", "me/two"]
    assert run[-2:] == ["--revision", "next"]
    assert Path(cli(*pull[1:]).out.strip()).is_dir()


def test_advice_on_numbers_of_ranks(checkpoint: Checkpoint) -> None:
    """A number that the page calls even gives all ranks as many heads; no other number does."""
    even = set()
    for size in range(1, 9):
        report = reshard.plan(checkpoint("llama"), tp_size=size).to_dict()
        if len({json.dumps(rank["heads"]) for rank in report["ranks"]}) == 1:
            even.add(size)
    assert even == {1, 2, 4, 8}
    assert advice(report) == [
        "heads divide evenly over 1, 2, 4 ranks",
        "query heads divide evenly over 8 ranks, with each KV head on several",
    ]
    assert advice(reshard.plan(checkpoint("phi3"), tp_size=2).to_dict()) == []


def test_what_is_no_page_of_ours_stays(source: Path, resharded: Path, tmp_path: Path, refused: Refused) -> None:
    (tmp_path / "notes.html").write_text("<p>mine</p>")
    plan, inspect = ["plan", source, "-tp", 2, "--html"], ["inspect", resharded, "--html"]
    for command in (plan, inspect):
        refused(7, [*command, tmp_path / "notes.html"], "is not a page of ours", hint="choose another name")
        refused(7, [*command, tmp_path], "is not a page of ours")
        refused(2, [*command, tmp_path / "none" / "x.html"], "no such folder")
    refused(2, ["plan", source, "--html", tmp_path / "x.html"], "one number of ranks", hint="add --tp-size 2")


@IN_BROWSER
@pytest.mark.parametrize("name", ["llama-tp2", "qwen3_moe-ep2"])
def test_rank_files_of_an_engine(name: str, tmp_path: Path, shown: Callable[[str], Page]) -> None:
    """Its rows have boxes, not cuts, and its folder no plan."""
    source = engine_tools.checkpoint(name, tmp_path / "source")
    report = reshard.export(source, tmp_path / "out", plan=engine_tools.plan_of(name), sync=False).to_dict()
    page = shown(plan_page(report))
    assert_quiet(page)
    assert "rank files of vllm" in page.evaluate("document.querySelector('header').innerText")
    assert page.evaluate("document.querySelectorAll('figure svg').length") > 5


@IN_BROWSER
def test_the_drawing_of_a_card(resharded: Path, chromium: Browser, tmp_path: Path) -> None:
    """It is sound XML without scripts, and a browser shows it as an image."""
    from xml.etree import ElementTree

    manifest = dataclasses.replace(reshard.inspect(resharded), architecture=EVIL)
    for report in (manifest.to_dict(), spoilt(reshard.inspect(resharded).to_dict())):
        text = card_drawing(report)
        root = ElementTree.fromstring(text)
        tags = {element.tag.split("}")[1] for element in root.iter()}
        assert tags <= {"svg", "title", "style", "defs", "pattern", "rect", "line", "circle", "text", "g"}
        assert not [key for element in root.iter() for key in element.attrib if "href" in key or key.startswith("on")]
        assert "onerror" in "".join(root.itertext())
        (tmp_path / "card.svg").write_text(text, encoding="utf-8")
        (tmp_path / "card.html").write_text("<!doctype html><img src='card.svg'>")
        page = chromium.open((tmp_path / "card.html").as_uri())
        assert page.failures == []
        assert page.evaluate("document.images[0].naturalWidth") == 880
        shutil.rmtree(tmp_path / "page", ignore_errors=True)
