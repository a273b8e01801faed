"""Exports from recorded plans: what is written, kept, checked and refused, without the engine."""

from __future__ import annotations

import gzip
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import engine_tools
import pytest
import torch
from cli_tools import Cli, rewrite
from safetensors.torch import load_file

import reshard
from reshard.engines.constants import CONSTANTS_NAME
from reshard.engines.copy_plan import PLAN_NAME
from reshard.errors import BadInputError, IntegrityError, UsageError
from reshard.operations.publish.card import render
from reshard.operations.publish.licence import Terms
from reshard.resharded.manifest import sealed_text
from reshard.showing.engines import serve_command

NAMES = list(engine_tools.RECORDED)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    root = tmp_path_factory.mktemp("sources")

    def made(name: str) -> Path:
        folder = root / name
        return folder if folder.exists() else engine_tools.checkpoint(name, folder)

    return made


def exported(source: Path | str, out: Path, name: str, **options: Any) -> reshard.Manifest:
    return reshard.export(source, out, plan=engine_tools.plan_of(name), sync=False, **options)


def checkpoint_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def part(tensor: torch.Tensor, rank: int, ranks: int, dim: int = 0) -> torch.Tensor:
    return tensor.chunk(ranks, dim)[rank]


@pytest.mark.parametrize(("name", "tp", "ep"), [("llama-tp2", 2, 1), ("qwen3_moe-tp2", 2, 1), ("qwen3_moe-ep2", 2, 2)])
def test_rank_files_are_what_vllm_lays_out(name: str, tp: int, ep: int, source: Any, tmp_path: Path) -> None:
    """The rules of vLLM 0.32, written down once more, tensor by tensor."""
    manifest = exported(source(name), tmp_path / "out", name)
    plain = checkpoint_of(source(name))
    assert [record.name for record in manifest.rank_files] == [
        f"model-rank-{rank}-part-0.safetensors" for rank in (0, 1)
    ]
    for rank in range(tp):
        held = load_file(tmp_path / "out" / f"model-rank-{rank}-part-0.safetensors")
        for word in ("embed_tokens", "lm_head"):
            (key,) = [key for key in held if word in key]
            table = plain[key]
            padded = torch.cat([table, torch.zeros(-len(table) % 64, table.shape[1])])
            assert torch.equal(held.pop(key), part(padded, rank, tp))
        for layer in range(2):
            at, attention = f"model.layers.{layer}.", f"model.layers.{layer}.self_attn."
            qkv = [part(plain[f"{attention}{one}_proj.weight"], rank, tp) for one in "qkv"]
            assert torch.equal(held.pop(f"{attention}qkv_proj.weight"), torch.cat(qkv))
            assert torch.equal(
                held.pop(f"{attention}o_proj.weight"), part(plain[f"{attention}o_proj.weight"], rank, tp, 1)
            )
            for scale in "kqv":
                assert held.pop(f"{attention}attn._{scale}_scale").item() == 1.0
            assert held.pop(f"{attention}attn._prob_scale").item() == 1.0
            gate = f"{at}mlp.gate_proj.weight"
            if gate in plain:
                both = [part(plain[f"{at}mlp.{one}_proj.weight"], rank, tp) for one in ("gate", "up")]
                assert torch.equal(held.pop(f"{at}mlp.gate_up_proj.weight"), torch.cat(both))
                assert torch.equal(
                    held.pop(f"{at}mlp.down_proj.weight"), part(plain[f"{at}mlp.down_proj.weight"], rank, tp, 1)
                )
                continue
            experts = len([key for key in plain if key.startswith(f"{at}mlp.experts.") and "down" in key])
            own = range(rank * experts // ep, (rank + 1) * experts // ep) if ep > 1 else range(experts)
            cut = 1 if ep > 1 else tp
            (w13,), (w2,) = (
                [k for k in held if k.startswith(at) and k.endswith(end)] for end in ("w13_weight", "w2_weight")
            )
            for number, expert in enumerate(own):
                of = f"{at}mlp.experts.{expert}."
                both = [part(plain[f"{of}{one}_proj.weight"], rank % cut, cut) for one in ("gate", "up")]
                assert torch.equal(held[w13][number], torch.cat(both))
                assert torch.equal(held[w2][number], part(plain[f"{of}down_proj.weight"], rank % cut, cut, 1))
            assert len(held.pop(w13)) == len(held.pop(w2)) == len(own)
        for key in list(held):
            assert torch.equal(held.pop(key), plain[key.replace(".experts.gate.", ".gate.")]), key


@pytest.mark.parametrize("name", NAMES)
def test_the_folder_is_checked_against_its_source(name: str, source: Any, tmp_path: Path) -> None:
    exported(source(name), tmp_path / "out", name)
    report = reshard.verify(tmp_path / "out", against=source(name))
    assert report.elements
    altered = Path(shutil.copytree(source(name), tmp_path / "altered"))
    (file,) = [f for f in altered.glob("*.safetensors") if any("o_proj" in key for key in load_file(f))][:1]
    key = next(key for key in load_file(file) if "o_proj" in key)
    rewrite(file, lambda tensors: tensors[key].add_(1))
    with pytest.raises(IntegrityError, match=r"o_proj.*differs from the source"):
        reshard.verify(tmp_path / "out", against=altered)


@pytest.mark.parametrize("name", NAMES)
def test_a_resharded_folder_gives_the_same_bytes(name: str, source: Any, tmp_path: Path) -> None:
    direct = exported(source(name), tmp_path / "direct", name)
    reshard.convert(source(name), tmp_path / "resharded", tp_size=3, sync=False)
    through = exported(tmp_path / "resharded", tmp_path / "through", name)
    assert direct == through
    for record in direct.files():
        assert (tmp_path / "direct" / record.name).read_bytes() == (tmp_path / "through" / record.name).read_bytes()


@pytest.mark.fault(35)
def test_only_the_engine_reads_them(source: Any, tmp_path: Path, cli: Cli) -> None:
    exported(source("llama-tp2"), tmp_path / "out", "llama-tp2")
    for command in (
        ["merge", tmp_path / "out", tmp_path / "merged"],
        ["convert", tmp_path / "out", tmp_path / "x", "-tp", 2],
    ):
        result = cli(*command)
        assert result.code == 3
        assert "has rank files that only vllm reads" in result.err
    result = cli("run", tmp_path / "out", "--prompt", "x")
    assert (result.code, result.error) == (3, f"Error: {tmp_path / 'out'}: has rank files that only vllm reads")
    told = json.loads(cli("inspect", tmp_path / "out", "--format", "json").out)["engine"]
    assert (told["name"], told["version"], told["platform"], told["tp"]) == ("vllm", "0.32.0", "cpu", 2)
    text = cli("inspect", tmp_path / "out").out
    assert "for vllm 0.32.0 on cpu: -tp 2" in text


@pytest.mark.fault(35)
def test_a_plan_for_another_checkpoint_is_refused(source: Any, tmp_path: Path) -> None:
    with pytest.raises(BadInputError, match="is no tensor of the checkpoint"):
        exported(source("llama-tp2"), tmp_path / "out", "qwen3_moe-tp2")
    with pytest.raises(BadInputError, match="is no tensor of the checkpoint"):
        exported(source("qwen3_moe-tp2"), tmp_path / "out", "llama-tp2")
    more = Path(shutil.copytree(source("llama-tp2"), tmp_path / "more"))
    rewrite(next(more.glob("*.safetensors")), lambda tensors: tensors.update({"model.extra.weight": torch.ones(2)}))
    with pytest.raises(BadInputError, match=r"does not read 1 tensors of the checkpoint: model\.extra\.weight"):
        exported(more, tmp_path / "out", "llama-tp2")
    assert [path.name for path in tmp_path.iterdir()] == ["more"]


def test_the_command_says_what_to_run_next(source: Any, tmp_path: Path, cli: Cli) -> None:
    out, plan = tmp_path / "out", engine_tools.plan_of("qwen3_moe-ep2")
    dry = cli("export", source("qwen3_moe-ep2"), out, "--plan", plan, "--dry-run")
    assert dry.code == 0, dry.err
    assert "model-rank-1-part-0.safetensors" in dry.out
    assert list(tmp_path.iterdir()) == []
    result = cli("export", source("qwen3_moe-ep2"), out, "--plan", plan, "--no-sync")
    assert result.code == 0, result.err
    engine = json.loads(cli("inspect", out, "--format", "json").out)["engine"]
    serve = "vllm serve OUT --load-format sharded_state -tp 2 --enable-expert-parallel --dtype float32"
    assert " ".join(serve_command("OUT", engine)) == serve
    assert {path.name for path in out.iterdir()} >= {PLAN_NAME, CONSTANTS_NAME, "config.json", "reshard.json"}
    again = cli("export", source("qwen3_moe-ep2"), tmp_path / "again", "--plan", out / PLAN_NAME, "--no-sync")
    assert again.code == 0, again.err
    assert (tmp_path / "again" / "reshard.json").read_bytes() == (out / "reshard.json").read_bytes()


def test_arguments_that_lack_or_clash(source: Any, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="takes the number of ranks, or a plan"):
        reshard.export(source("llama-tp2"), tmp_path / "out")
    with pytest.raises(UsageError, match="vLLM is not installed here"):
        reshard.export(source("llama-tp2"), tmp_path / "out", tp_size=2)
    with pytest.raises(UsageError, match="no Python to run"):
        reshard.export(source("llama-tp2"), tmp_path / "out", tp_size=2, engine_python=tmp_path / "none")
    with pytest.raises(UsageError, match="--capability"):
        reshard.export(source("llama-tp2"), tmp_path / "out", tp_size=2, engine_python=sys.executable, platform="cuda")
    with pytest.raises(UsageError, match="no platform that can be planned"):
        reshard.export(source("llama-tp2"), tmp_path / "out", tp_size=2, platform="rocm", capability=(9, 0))
    with pytest.raises(UsageError, match="a plan says for which ranks"):
        exported(source("llama-tp2"), tmp_path / "out", "llama-tp2", moe_backend="triton")
    with pytest.raises(BadInputError, match="has no vLLM"):
        reshard.export(source("llama-tp2"), tmp_path / "out", tp_size=2, engine_python=sys.executable)
    assert list(tmp_path.iterdir()) == []


def changed(name: str, change: Callable[[list[Any]], object], path: Path) -> Path:
    lines = [json.loads(line) for line in gzip.decompress(engine_tools.plan_of(name).read_bytes()).splitlines()]
    change(lines)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def first_copy(lines: list[Any]) -> list[Any]:
    """The write that copies a source tensor into embed_tokens."""
    return next(write for write in lines[1]["writes"] if write[5] == "copy" and "embed" in write[6])


HOSTILE: dict[str, tuple[Callable[[list[Any]], object], str]] = {
    "no ranks": (lambda lines: lines.pop(), "1 ranks for tp 2"),
    "another engine": (lambda lines: lines[0]["engine"].update(name="other"), "unknown 'other'"),
    "a newer version": (lambda lines: lines[0].update(version=2), "version 2 of copy plans"),
    "a negative size": (lambda lines: first_copy(lines)[2].__setitem__(0, -1), "at least 0"),
    "beyond the source": (lambda lines: first_copy(lines).__setitem__(8, 10**9), "reads beyond"),
    "as a wider dtype": (lambda lines: first_copy(lines).__setitem__(7, "float64"), "as float64"),
    "cast to whole numbers": (
        lambda lines: (
            [write.__setitem__(1, "int32") for write in lines[1]["writes"] if "embed" in str(write)]
            and lines[1]["tensors"]["model.embed_tokens.weight"].__setitem__(1, "int32")
        ),
        "is cast from float32 to int32",
    ),
    "computed": (
        lambda lines: first_copy(lines).__setitem__(slice(5, None), ["computed", "aten::mul"]),
        "computes values for it .aten::mul",
    ),
    "a part left out": (lambda lines: lines[1]["writes"].remove(first_copy(lines)), "does not load all of it"),
    "strides that do not fit": (lambda lines: first_copy(lines).__setitem__(4, [127, 2]), "cannot be followed"),
    "a tensor of nowhere": (lambda lines: first_copy(lines).__setitem__(6, "s:nowhere"), "no tensor of the checkpoint"),
    "a constant that is text": (
        lambda lines: lines[1]["writes"].append(["t:1", "float32", [1], 0, [1], "constant", "x"]),
        "a constant 'x'",
    ),
    "an unknown kind": (lambda lines: first_copy(lines).__setitem__(5, "guess"), "of the kind 'guess'"),
    "a huge tensor": (
        lambda lines: lines[1]["tensors"]["model.norm.weight"].__setitem__(2, [1 << 50]),
        "does not load all of it",
    ),
    "dtypes that differ": (
        lambda lines: lines[2]["tensors"]["model.norm.weight"].__setitem__(1, "int32"),
        "different dtypes|cast",
    ),
}


@pytest.mark.fault(36)
@pytest.mark.parametrize("what", HOSTILE)
def test_a_plan_that_makes_no_sense_is_refused(what: str, source: Any, tmp_path: Path) -> None:
    change, words = HOSTILE[what]
    plan = changed("llama-tp2", change, tmp_path / "plan")
    with pytest.raises(reshard.ReshardError, match=words) as refused:
        reshard.export(source("llama-tp2"), tmp_path / "out", plan=plan)
    assert refused.value.exit_code in (3, 8)
    assert [path.name for path in tmp_path.iterdir()] == ["plan"]


@pytest.mark.fault(36)
@pytest.mark.parametrize(
    "data", [b"", b"{}", b"[1]\n", b"\x1f\x8b", b"\x1f\x8b" + bytes(50), b"[" * 100_000, b"\xff\xfe"]
)
def test_a_file_that_is_no_plan(data: bytes, source: Any, tmp_path: Path) -> None:
    (tmp_path / "plan").write_bytes(data)
    with pytest.raises(BadInputError, match="plan: "):
        reshard.export(source("llama-tp2"), tmp_path / "out", plan=tmp_path / "plan")


def test_layers_for_multi_token_prediction_are_left_out(source: Any, tmp_path: Path) -> None:
    """vLLM does not read DeepSeek-V3's layer 61 of 61, and says nothing of it. The export does."""
    more, said = Path(shutil.copytree(source("llama-tp2"), tmp_path / "more")), []
    rewrite(
        next(more.glob("*.safetensors")), lambda tensors: tensors.update({"model.layers.2.x.weight": torch.ones(2)})
    )
    manifest = exported(more, tmp_path / "out", "llama-tp2", say=said.append)
    assert manifest.dropped == ("model.layers.2.x.weight",)
    assert "vLLM does not read 1 tensors: model.layers.2.x.weight" in said
    reshard.verify(tmp_path / "out", against=more)


def test_from_the_hub(source: Any, tmp_path: Path, hub: Any, python: Any) -> None:
    """A dry run fetches headers only."""
    hub.create("org/llama", {path.name: path.read_bytes() for path in source("llama-tp2").iterdir()})
    command = (
        "-m",
        "reshard",
        "export",
        "org/llama",
        str(tmp_path / "out"),
        "--plan",
        engine_tools.plan_of("llama-tp2"),
    )
    dry = python(*map(str, command), "--dry-run")
    assert dry.returncode == 0, dry.stderr
    assert not list((tmp_path / "home").rglob("*.safetensors"))
    done = python(*map(str, command), "--no-sync")
    assert done.returncode == 0, done.stderr
    assert list((tmp_path / "home").rglob("*.safetensors"))
    manifest = reshard.inspect(tmp_path / "out")
    assert manifest.repo_id == "org/llama"
    direct = exported(source("llama-tp2"), tmp_path / "direct", "llama-tp2")
    assert manifest.rank_files == direct.rank_files


def test_the_card_of_a_published_repo_says_how_to_serve(source: Any, tmp_path: Path) -> None:
    manifest = exported(source("llama-tp2"), tmp_path / "out", "llama-tp2")
    card = render("org/model", {"": manifest}, Terms("mit", None, False, {}))
    assert "vllm serve org/model --load-format sharded_state -tp 2 --dtype float32" in card
    assert "runtime.load" not in card
    assert "reshard merge" not in card
    assert "Every element equals the source's, bit for bit." in card


@pytest.mark.fault(1)
def test_an_interrupted_export_goes_on(source: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was written before is kept, and the folder is that of an export at one go."""
    import reshard.operations.export as module

    whole = exported(source("llama-tp2"), tmp_path / "whole", "llama-tp2")
    with monkeypatch.context() as patch:
        patch.setattr(module, "copy_file", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            exported(source("llama-tp2"), tmp_path / "out", "llama-tp2")
    assert not (tmp_path / "out").exists()
    assert any(path.name.startswith("out.part-") for path in tmp_path.iterdir())
    assert exported(source("llama-tp2"), tmp_path / "out", "llama-tp2") == whole
    assert {path.name for path in tmp_path.iterdir()} == {"out", "whole"}
    for record in whole.files():
        assert (tmp_path / "out" / record.name).read_bytes() == (tmp_path / "whole" / record.name).read_bytes()


@pytest.mark.fault(35)
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda m: m["engine"].pop("platform"), "incomplete or malformed"),
        (lambda m: m["engine"].update(capability=[9]), "incomplete or malformed"),
        (lambda m: m["engine"].update(name="other"), "incomplete or malformed"),
        (lambda m: m["engine"].update(taken_for={"lm_head.weight": "float99"}), "incomplete or malformed"),
        (lambda m: m["engine"].update(taken_for=[]), "incomplete or malformed"),
        (lambda m: m["extras"].pop(), "does not belong to this folder"),
        (lambda m: m["parameters"][0]["from"][0].__setitem__(1, 1 << 40), "has no such elements"),
        (lambda m: m["parameters"][0]["from"][0].__setitem__(0, "nowhere"), "has no such elements"),
    ],
)
def test_a_manifest_that_lies_about_its_engine(
    change: Callable[[Any], object], words: str, source: Any, tmp_path: Path
) -> None:
    exported(source("llama-tp2"), tmp_path / "out", "llama-tp2")
    content = json.loads((tmp_path / "out" / "reshard.json").read_text())
    content.pop("seal")
    change(content)
    (tmp_path / "out" / "reshard.json").write_bytes(sealed_text(content))
    with pytest.raises(IntegrityError, match=words):
        reshard.verify(tmp_path / "out", against=source("llama-tp2"))
