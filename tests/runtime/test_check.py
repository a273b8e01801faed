"""`check` on folders damaged on purpose: it names the layer and its damage."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pico
import pytest
import torch
from cli_tools import Cli, assert_one_error, configure, flip, reseal
from places import ROOT, WORKERS
from safetensors.torch import load_file, save
from single_process import in_file
from torchrun_tools import on_ranks, torchrun
from unplanned import UNPLANNED, unplanned

import reshard
from reshard.files.digest import digest_of
from reshard.operations.reference import distance, fixed_ids, rounding
from reshard.resharded.manifest import REFERENCE_NAME, read_manifest

Damage = Callable[[Path], object]
Found = dict[str, Any]


def hook(module: str, style: str | None) -> Damage:
    """Give a module another style than the one its parameters were cut for."""

    def change(content: dict[str, Any]) -> None:
        assert content["hooks"].pop(module)
        if style:
            content["hooks"][module] = style

    return lambda folder: reseal(folder, change)


def configured(**fields: Any) -> Damage:
    return lambda folder: configure(folder, **fields)


def swap_rows(tensor: torch.Tensor) -> torch.Tensor:
    return tensor[[1, 0, *range(2, len(tensor))]]


def swap_heads(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.unflatten(0, (-1, 4)).flip(0).flatten(0, 1)


def row_10(tensor: torch.Tensor) -> torch.Tensor:
    """Change the row of a token that is not in the fixed prompt, whether the embedding is cut or not."""
    altered = tensor.clone()
    altered[10] = -tensor[10]
    return altered


def last_element(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    def changed(tensor: torch.Tensor) -> torch.Tensor:
        altered = tensor.clone()
        altered.view(-1)[-1] = value
        return altered

    return changed


def slightly(tensor: torch.Tensor) -> torch.Tensor:
    return tensor * 1.01


LAYER = "model.layers.{}"
DOWN = "model.layers.1.mlp.down_proj"
NORM = "model.layers.1.input_layernorm"
QUERIES = "model.layers.0.self_attn.q_proj"
FILE = "shard-0000{}-model-00001-of-00001.safetensors"

# Family, damage; then module, symptom, ranks that see it, and parameters with the files they are wrong in. The ranks
# that see an embedding's damage depend on whether the plan cuts it; transformers 5.17's does not.
CASES: dict[str, tuple[str, Damage, str, str, list[int] | None, dict[str, set[str]]]] = {
    "rows of one rank's weight swapped": (
        *("llama", in_file(1, f"{DOWN}.weight", swap_rows)),
        *(DOWN, "its output", [0, 1], {f"{DOWN}.weight": {FILE.format(2)}}),
    ),
    "heads of one rank permuted": (
        *("llama", in_file(0, f"{QUERIES}.weight", swap_heads)),
        *(QUERIES, "its output", [0], {f"{QUERIES}.weight": {FILE.format(1)}}),
    ),
    "a whole weight wrong on one rank": (
        *("llama", in_file(1, f"{NORM}.weight", slightly)),
        *(NORM, "its output", [1], {f"{NORM}.weight": {FILE.format(2)}}),
    ),
    "the embedding": (
        *("llama", in_file(1, "model.embed_tokens.weight", slightly)),
        *("model.embed_tokens", "its output", None, {"model.embed_tokens.weight": {FILE.format(2)}}),
    ),
    "the head": (
        *("llama", in_file(0, "lm_head.weight", swap_rows)),
        *("lm_head", "its output", [0, 1], {"lm_head.weight": {FILE.format(1)}}),
    ),
    "a head that is the embedding": (
        *("tied", in_file(1, "model.embed_tokens.weight", row_10)),
        *("lm_head", "its output", [0, 1], {"model.embed_tokens.weight": {FILE.format(2)}}),
    ),
    "a configuration that is not the source's": (
        *("llama", configured(rms_norm_eps=0.5)),
        *("model.layers.0.input_layernorm", "its output", [0, 1], {}),
    ),
    "a sum that is not reduced": (
        *("llama", hook(DOWN, "replicate")),
        *(DOWN, "its output", [0, 1], {}),
    ),
    "a norm over heads, between what can be compared": (
        *("qwen3", in_file(0, "model.layers.1.self_attn.q_norm.weight", slightly)),
        *("model.layers.1.self_attn", "the input of model.layers.1.self_attn.o_proj", [0]),
        {"model.layers.1.self_attn.q_norm.weight": {FILE.format(1)}},
    ),
    "experts": (
        *("qwen3_moe", in_file(1, "model.layers.0.mlp.experts.down_proj", slightly)),
        *("model.layers.0.mlp.experts", "its output", [0, 1]),
        {"model.layers.0.mlp.experts.down_proj": {FILE.format(2)}},
    ),
    "an encoder": (
        *("bert", in_file(0, "bert.encoder.layer.1.intermediate.dense.bias", slightly)),
        *("bert.encoder.layer.1.intermediate.dense", "its output", [0]),
        {"bert.encoder.layer.1.intermediate.dense.bias": {FILE.format(1)}},
    ),
    "a decoder behind an encoder": (
        *("t5", in_file(1, "decoder.block.1.layer.2.DenseReluDense.wo.weight", slightly)),
        *("decoder.block.1.layer.2.DenseReluDense.wo", "its output", [0, 1]),
        {"decoder.block.1.layer.2.DenseReluDense.wo.weight": {FILE.format(2)}},
    ),
    "in half precision": (
        *("bf16", in_file(1, f"{DOWN}.weight", lambda tensor: -tensor)),
        *(DOWN, "its output", [0, 1], {f"{DOWN}.weight": {FILE.format(2)}}),
    ),
}
FAMILIES = sorted({"no numbers", *(case[0] for case in CASES.values())})


# NaN in place of a number, in a model that has NaN elsewhere.
LOST = {"NaN in a block": f"{DOWN}.weight", "NaN in a norm": "model.layers.0.post_attention_layernorm.weight"}


def make(family: str, root: Path, ranks: int) -> tuple[Path, Path]:
    """Return a source and its resharded folder, with reference logits."""
    source, out = root / f"{family}.source", root / family
    plan: dict[str, Any] = {}
    if family in UNPLANNED:
        unplanned(family).save_pretrained(source)
        plan = {"tp_plan": UNPLANNED[family][2]}
    elif family == "no numbers":
        no_numbers().save_pretrained(source)
    else:
        name, options = VARIANTS.get(family, (family, {}))
        pico.save(name, source, **options)
    reshard.convert(source, out, tp_size=ranks, sync=False, reference_logits=True, **plan)
    return source, out


VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "bf16": ("llama", {"dtype": torch.bfloat16}),
    "tied": ("llama", {"tie_word_embeddings": True}),
}


def no_numbers() -> Any:
    """Return a llama with NaN rows: for a token that is fed last, and in the head on either rank."""
    model = pico.build("llama")
    nan, inf = torch.nan, torch.inf
    with torch.no_grad():
        model.model.embed_tokens.weight[int(fixed_ids(model)[0, -1])] = nan
        model.lm_head.weight[20:24] = nan
        model.lm_head.weight[100:] = nan
        model.lm_head.weight[50] = torch.tensor([inf, *[0.0] * 31])
        model.lm_head.weight[90] = torch.tensor([-inf, *[0.0] * 31])
    return model


def stored(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Replace the reference logits, as if another machine had made them."""
    tensors = load_file(folder / REFERENCE_NAME)
    change(tensors)
    data = save(tensors)
    (folder / REFERENCE_NAME).write_bytes(data)

    def record(content: dict[str, Any]) -> None:
        (entry,) = (extra for extra in content["extras"] if extra["file"] == REFERENCE_NAME)
        entry.update(size=len(data), digest=digest_of(data))

    reseal(folder, record)


def off_by(share: float) -> Callable[[dict[str, torch.Tensor]], object]:
    """Move one logit by a share of the largest one."""
    return lambda tensors: tensors["values"].view(-1)[7].add_(share * tensors["values"].abs().max())


def last_token(change: Callable[[int], int]) -> Callable[[dict[str, torch.Tensor]], object]:
    def changed(tensors: dict[str, torch.Tensor]) -> None:
        tensors["tokens"][0, -1] = change(int(tensors["tokens"][0, -1]))

    return changed


# For a model whose tokens 2k and 2k + 1 have the same logit: a change, whether it passes on CPU, and whether on
# another device than that of the stored logits.
STORED: dict[str, tuple[Callable[[dict[str, torch.Tensor]], object], bool, bool]] = {
    "as it is": (lambda tensors: None, True, True),
    "logits within the looser limit": (off_by(5e-5), False, True),
    "logits beyond it": (off_by(3e-4), False, False),
    "a token with the same logit": (last_token(lambda token: token ^ 1), False, True),
    "another token": (last_token(lambda token: (token + 2) % 130), False, False),
}


def run(jobs: list[dict[str, Any]], root: Path, ranks: int) -> dict[str, Found]:
    (root / "jobs.json").write_text(json.dumps(jobs))
    done = on_ranks(ranks, str(WORKERS / "checking.py"), str(root / "jobs.json"), str(root / "out.json"))
    assert done.returncode == 0, done.stderr
    return json.loads((root / "out.json").read_text())


def job(
    name: str, folder: Path, source: Path | None, *, per_layer: bool = True, where: str | None = None, **load: Any
) -> dict[str, Any]:
    of = source and str(source)
    return {"name": name, "folder": str(folder), "source": of, "per_layer": per_layer, "where": where, "load": load}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Found]:
    """The results of check on two ranks, for every damaged folder and every sound one."""
    root = tmp_path_factory.mktemp("check")
    made = {family: make(family, root, 2) for family in FAMILIES}
    jobs = []
    for family, (source, out) in made.items():
        jobs += [job(f"sound {family}", out, source), job(f"stored {family}", out, None, per_layer=False)]
    for number, (name, (family, damage, *_)) in enumerate(CASES.items()):
        source, out = made[family]
        folder = Path(shutil.copytree(out, root / f"damaged-{number}"))
        damage(folder)
        jobs += [job(name, folder, source), job(f"stored: {name}", folder, None, per_layer=False)]
    source, out = made["llama"]
    bare = Path(shutil.copytree(out, root / "bare"))
    reseal(bare, lambda content: content.update(extras=[e for e in content["extras"] if e["file"] != REFERENCE_NAME]))
    altered = Path(shutil.copytree(out, root / "altered"))
    flip(altered / REFERENCE_NAME, -1)
    jobs += [
        job("nothing stored", bare, None, per_layer=False),
        job("stored, altered", altered, None, per_layer=False),
        job("layers without a source", out, None),
        job("another architecture", out, made["qwen3"][0]),
        job("no such source", out, root / "nowhere"),
        job("slow", out, source, where="one process is slow", per_layer=False),
        job("no memory to load", out, source, where="no memory to load", per_layer=False),
        job("no memory to run", out, source, where="no memory to run", per_layer=False),
    ]
    source, out = made["no numbers"]
    for rank, (name, parameter) in enumerate(LOST.items()):
        folder = Path(shutil.copytree(out, root / f"lost-{rank}"))
        in_file(rank, parameter, last_element(torch.nan))(folder)
        jobs += [job(name, folder, source), job(f"stored: {name}", folder, None, per_layer=False)]
    source, out = made["llama"]
    unseen = Path(shutil.copytree(out, root / "unseen"))
    in_file(1, "model.embed_tokens.weight", row_10)(unseen)
    jobs.append(job("unseen", unseen, source))
    twins = root / "twins"
    model = pico.build("llama")
    with torch.no_grad():
        model.lm_head.weight[1::2] = model.lm_head.weight[::2]
    model.save_pretrained(twins)
    reshard.convert(twins, root / "of twins", tp_size=2, sync=False, reference_logits=True)
    for number, (name, (change, *_)) in enumerate(STORED.items()):
        folder = Path(shutil.copytree(root / "of twins", root / f"twins-{number}"))
        stored(folder, change)
        jobs += [job(name, folder, None, per_layer=False)]
        jobs += [job(f"elsewhere: {name}", folder, None, per_layer=False, where="another device")]
    return run(jobs, root, 2)


@pytest.mark.parametrize("family", FAMILIES)
def test_of_a_sound_folder_nothing_differs(family: str, found: dict[str, Found]) -> None:
    for name in (f"sound {family}", f"stored {family}"):
        assert found[name]["ok"], found[name]
        assert found[name]["difference"] is None
        assert found[name]["max_rel"] <= (1e-5 if family != "bf16" else found[name]["tolerance"])
    assert "no module differs" in found[f"sound {family}"]["text"]
    assert found[f"stored {family}"]["tolerance"] == found[f"sound {family}"]["tolerance"]


@pytest.mark.parametrize("name", CASES)
def test_it_names_what_is_broken(name: str, found: dict[str, Found]) -> None:
    _, _, module, seen, ranks, altered = CASES[name]
    result = found[name]
    assert not result["ok"]
    difference = result["difference"]
    assert (difference["module"], difference["seen"]) == (module, seen)
    assert difference["ranks"] == ranks or (ranks is None and 1 in difference["ranks"])
    assert difference["max_rel"] > difference["tolerance"]
    assert {one["name"]: set(one["files"]) for one in difference["altered"]} == altered
    assert f"first difference: {module}" in result["text"]
    for parameter in altered:
        assert f"{parameter} is not that of the source" in result["text"]


@pytest.mark.parametrize("name", CASES)
def test_stored_logits_show_it_too(name: str, found: dict[str, Found]) -> None:
    result = found[f"stored: {name}"]
    assert not result["ok"]
    assert result["max_rel"] > 10 * result["tolerance"] or name == "in half precision"


def test_parameters_that_the_tokens_do_not_reach_are_compared(found: dict[str, Found]) -> None:
    unseen = found["unseen"]
    assert unseen["max_rel"] <= unseen["tolerance"]
    assert unseen["difference"] is None
    assert not unseen["ok"]
    assert unseen["unreached"] == [{"name": "model.embed_tokens.weight", "files": {FILE.format(2): 32}}]  # a row
    assert "no module differs, but these tokens do not reach" in unseen["text"]
    assert "model.embed_tokens.weight is not that of the source: 32 elements" in unseen["text"]


@pytest.mark.parametrize("name", LOST)
def test_nan_where_a_number_is_expected_is_a_difference(name: str, found: dict[str, Found]) -> None:
    result, parameter = found[name], LOST[name]
    assert not result["ok"]
    assert (result["max_abs"], result["max_rel"]) == (None, None)  # JSON cannot hold NaN
    assert "max abs nan" in result["text"]
    assert result["difference"]["module"] == parameter.removesuffix(".weight")
    assert [one["name"] for one in result["difference"]["altered"]] == [parameter]
    assert not found[f"stored: {name}"]["ok"]


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("values", "expected", "apart"),
    [
        ([NAN, 1.0, INF, -INF], [NAN, 1.0, INF, -INF], (0.0, 0.0)),
        ([NAN, 1.5, INF, -4.0], [NAN, 1.0, INF, -4.0], (0.5, 0.125)),  # only finite numbers give the scale
        ([NAN], [NAN], (0.0, 0.0)),
        ([], [], (0.0, 0.0)),
        ([0.5], [0.0], (0.5, 0.5)),
        ([1.0], [INF], (INF, INF)),
        ([-INF], [INF], (INF, INF)),
    ],
)
def test_what_is_no_number_in_both_is_no_difference(
    values: list[float], expected: list[float], apart: tuple[float, float]
) -> None:
    assert distance(torch.tensor(values), torch.tensor(expected)) == apart


@pytest.mark.parametrize(("value", "expected"), [(NAN, 1.0), (1.0, NAN), (NAN, INF), (INF, NAN)])
def test_nan_in_one_of_two_is_a_difference(value: float, expected: float) -> None:
    apart = distance(torch.tensor([2.0, value, 3.0]), torch.tensor([2.0, expected, 3.0]))
    assert all(map(math.isnan, apart))


def test_what_overflows_in_half_precision_is_no_rounding() -> None:
    values, exact = torch.tensor([INF, NAN, 2.0]), torch.tensor([70000.0, NAN, 2.002])
    assert rounding(values, exact) == pytest.approx(3e-3, rel=1e-3)
    assert rounding(torch.tensor([NAN]), torch.tensor([NAN])) == 1e-5


@pytest.mark.parametrize("name", STORED)
def test_on_another_device_than_that_of_the_stored_logits(name: str, found: dict[str, Found]) -> None:
    _, here, elsewhere = STORED[name]
    assert (found[name]["ok"], found[name]["tolerance"]) == (here, 1e-5)
    there = found[f"elsewhere: {name}"]
    assert (there["ok"], there["tolerance"]) == (elsewhere, 1e-4)
    assert there["equal_tokens"] == found[name]["equal_tokens"] == ("token" not in name)
    assert there["tied_tokens"] == ("same logit" in name)
    assert ("tokens different, which rounding explains" in there["text"]) == there["tied_tokens"]


def test_ranks_wait_longer_for_one_process_than_in_a_collective(found: dict[str, Found]) -> None:
    assert found["slow"]["ok"]


def test_how_much_of_a_parameter_is_wrong(found: dict[str, Found]) -> None:
    (altered,) = found["rows of one rank's weight swapped"]["difference"]["altered"]
    assert altered["files"] == {FILE.format(2): 2 * 26}  # two rows of half the columns


def test_what_else_can_be_wrong_is_said(found: dict[str, Found]) -> None:
    configuration = found["a configuration that is not the source's"]
    assert configuration["difference"]["configuration"] == {"rms_norm_eps": [0.5, 1e-06]}
    assert "config.json: rms_norm_eps is 0.5 here, 1e-06 in the source" in configuration["text"]
    hooks = found["a sum that is not reduced"]
    assert hooks["difference"]["style"] == "replicate"
    assert "so a style or a kernel is wrong" in hooks["text"]


def test_what_the_page_shows(found: dict[str, Found]) -> None:
    """The page shows this output, but for figures, whose last digit may change."""
    page = (ROOT / "runtime" / "README.md").read_text()
    shown = re.search(r"^```text\n(first difference: .*?)^```", page, re.M | re.S)
    assert shown
    said = found["rows of one rank's weight swapped"]["text"].partition("\n")[2]
    assert re.sub(r"(max \w+) [\d.]+", r"\1", said) == re.sub(r"(max \w+) [\d.]+", r"\1", shown[1].rstrip())


def test_the_command(tmp_path: Path) -> None:
    source, out = make("llama", tmp_path, 2)
    in_file(1, f"{DOWN}.weight", swap_rows)(out)
    options = ["--reference", str(source), "--per-layer", "--no-digests", "--format", "json"]
    done = torchrun(2, "-m", "runtime", "check", str(out), *options, warm=True)
    assert re.findall(r"exitcode\s*: (\d+)", done.stderr)[-1] == "4"
    assert json.loads(done.stdout)["difference"]["module"] == DOWN
    (line,) = (line for line in done.stderr.splitlines() if line.startswith('{"error"'))
    assert "does not compute what" in json.loads(line)["error"]


def test_four_ranks_that_share_kv_heads_or_the_sequence_or_are_two_replicas(tmp_path: Path) -> None:
    source = pico.save("llama", tmp_path / "source", num_key_value_heads=2)
    reshard.convert(source, tmp_path / "out", tp_size=4, sync=False)
    key = "model.layers.1.self_attn.k_proj"
    jobs = [job("sound", tmp_path / "out", source)]
    for name, damage in {
        "a shared head": in_file(3, f"{key}.weight", slightly),
        "an uneven row": in_file(3, f"{DOWN}.weight", swap_rows),
    }.items():
        folder = Path(shutil.copytree(tmp_path / "out", tmp_path / name))
        damage(folder)
        jobs.append(job(name, folder, source))
    half = tmp_path / "half"
    reshard.convert(source, half, tp_size=2, sync=False)
    in_file(0, f"{QUERIES}.weight", swap_heads)(half)
    jobs.append(job("two replicas", half, source, dp_size=2))
    mixture = tmp_path / "mixture"
    reshard.convert(pico.save("qwen3_moe", tmp_path / "moe"), mixture, tp_size=2, ep_size=4, sync=False)
    in_file(3, f"{NORM}.weight", slightly)(mixture)
    jobs.append(job("a row's part of the sequence", mixture, tmp_path / "moe", sequence_parallel=True))
    found = run(jobs, tmp_path, 4)
    assert found["sound"]["ok"]
    assert found["sound"]["difference"] is None
    shared, uneven = (found[name]["difference"] for name in ("a shared head", "an uneven row"))
    assert (shared["module"], shared["ranks"]) == (key, [3])
    assert [(a["name"], a["files"].keys()) for a in shared["altered"]] == [(f"{key}.weight", {FILE.format(4)})]
    assert (uneven["module"], uneven["ranks"]) == (DOWN, [0, 1, 2, 3])
    assert [(a["name"], list(a["files"])) for a in uneven["altered"]] == [(f"{DOWN}.weight", [FILE.format(4)])]
    row = found["a row's part of the sequence"]["difference"]
    assert (row["module"], row["seen"], row["ranks"]) == (NORM, "its output", [3])
    assert [(a["name"], list(a["files"])) for a in row["altered"]] == [(f"{NORM}.weight", [FILE.format(4)])]
    both = found["two replicas"]["difference"]
    assert (both["module"], both["ranks"]) == (QUERIES, [0, 2])
    assert [(a["name"], list(a["files"])) for a in both["altered"]] == [(f"{QUERIES}.weight", [FILE.format(1)])]


@pytest.mark.parametrize(
    ("name", "error", "message", "hint"),
    [
        ("nothing stored", "UsageError", "holds no reference logits", "reshard convert … --reference-logits"),
        ("stored, altered", "IntegrityError", f"{REFERENCE_NAME}: its content was altered", ""),
        ("layers without a source", "UsageError", "layers are compared with", "--reference SOURCE"),
        ("another architecture", "IntegrityError", "of another shape or architecture", ""),
        ("no such source", "BadInputError", "no such folder", ""),
        ("no memory to load", "TopologyError", "do not fit into the memory of one process", "reshard verify"),
        ("no memory to run", "TopologyError", "do not fit into the memory of one process", "reshard verify"),
    ],
)
def test_what_cannot_be_compared_is_said_on_every_rank(
    name: str, error: str, message: str, hint: str, found: dict[str, Found]
) -> None:
    result = found[name]
    assert result["error"] == error
    assert message in result["message"]
    assert hint in (result["hint"] or "")


def test_reference_logits_are_a_file_of_the_folder(checkpoint: Any, tmp_path: Path, cli: Cli) -> None:
    """`convert` writes the file, `verify` checks it, other numbers of ranks keep it, and `merge` leaves it out."""
    source, out = checkpoint("llama"), tmp_path / "out"
    assert cli("convert", source, out, "--tp-size", 2, "--reference-logits", seconds=60).code == 0
    record = next(extra for extra in read_manifest(out).extras if extra.name == REFERENCE_NAME)
    assert record.size == (out / REFERENCE_NAME).stat().st_size
    assert reshard.verify(out, against=source).elements
    stored = load_file(out / REFERENCE_NAME)
    assert stored["values"].shape == (2, 4, 130)
    single = pico.build("llama")
    with torch.inference_mode():
        logits = single(stored["ids"]).logits
    assert torch.equal(stored["values"], logits[:, -4:])
    assert torch.equal(stored["tokens"][:, :16], stored["ids"])
    reshard.convert(out, tmp_path / "wider", tp_size=4)
    assert (tmp_path / "wider" / REFERENCE_NAME).read_bytes() == (out / REFERENCE_NAME).read_bytes()
    reshard.convert(out, tmp_path / "cast", tp_size=2, dtype="bfloat16")
    assert not (tmp_path / "cast" / REFERENCE_NAME).exists()
    assert not [extra for extra in read_manifest(tmp_path / "cast").extras if extra.name == REFERENCE_NAME]
    reshard.merge(out, tmp_path / "merged")
    assert {path.name for path in (tmp_path / "merged").iterdir()} == {path.name for path in source.iterdir()}
    again = cli("convert", out, tmp_path / "third", "--tp-size", 4, "--reference-logits", seconds=60)
    assert_one_error(again, 2, "is resharded", hint="hands them on")
    flip(out / REFERENCE_NAME, -1)
    assert_one_error(cli("verify", out), 4, f"{REFERENCE_NAME}")
