"""The model card: valid, in our own words, and with commands that work as it says."""

from __future__ import annotations

import dataclasses
import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from cli_tools import Result
from fake_hub import FakeHub, status
from quantizing import quantize_folder
from safetensors.torch import load_file

import reshard
from reshard.errors import BadInputError, DestinationExistsError, NetworkError
from reshard.operations.publish.card import is_ours, render
from reshard.operations.publish.licence import Terms
from reshard.resharded.manifest import Manifest
from reshard.showing.page.drawing import SVG_MARK, card_drawing

OPEN = Terms("apache-2.0", None, False, {"license": "apache-2.0"})
UNKNOWN = Terms(None, "it is not known", False, {})


@pytest.fixture(scope="module")
def manifests(checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Manifest]:
    """Manifests for two and four ranks, as if made from `org/model`."""
    root = tmp_path_factory.mktemp("card")
    found = {}
    for size in (2, 4):
        reshard.convert(checkpoint("llama"), root / str(size), tp_size=size)
        found[f"tp{size}"] = dataclasses.replace(
            reshard.inspect(root / str(size)), repo_id="org/model", commit="3f" * 20
        )
    return found


def front_matter(card: str) -> dict[str, object]:
    from huggingface_hub import ModelCard

    return ModelCard(card).data.to_dict()


def test_front_matter(manifests: dict[str, Manifest]) -> None:
    assert front_matter(render("me/two", manifests, OPEN)) == {
        "base_model": "org/model",
        "base_model_relation": "quantized",
        "library_name": "transformers",
        "license": "apache-2.0",
        "pipeline_tag": "text-generation",
        "tags": ["reshard", "tensor-parallel", "tp2", "tp4"],
    }
    local = dataclasses.replace(manifests["tp2"], repo_id=None, commit=None, architecture="LlamaModel")
    assert front_matter(render("me/two", {"": local}, UNKNOWN)) == {
        "library_name": "transformers",
        "tags": ["reshard", "tensor-parallel", "tp2"],
    }


def test_a_licence_of_its_own(manifests: dict[str, Manifest]) -> None:
    metadata = {
        "license": "other",
        "license_name": "tongyi",
        "license_link": "https://huggingface.co/org/model/LICENSE",
    }
    found = front_matter(render("me/two", manifests, Terms("other", None, False, metadata)))
    assert {key: found[key] for key in metadata} == metadata


def test_every_file_with_its_digest(manifests: dict[str, Manifest]) -> None:
    card = render("me/two", manifests, OPEN)
    for path, manifest in manifests.items():
        section = card.split(f"### {path}/")[1].split("###")[0]
        for rank, record in enumerate(manifest.rank_files):
            [line] = [line for line in section.splitlines() if line.startswith(f"| {rank} | ")]
            assert line.startswith(f"| {rank} | `{record.name}` | {record.size:,} | attention ")
            assert line.endswith(f" | `{record.digest}` |")
    assert "`org/model` | `" + "3f" * 20 in card
    assert "reshard 0." in card


def test_a_picture_of_each_folder(
    here: FakeHub, resharded: Path, manifests: dict[str, Manifest], tmp_path: Path
) -> None:
    """It stands beside the card, which shows it; a later publication draws it anew."""
    assert ".svg" not in render("me/two", manifests, OPEN)
    reshard.publish(resharded, "me/two/for/2", private=True)
    repo = here.repos["me/two"]
    assert repo.files["reshard-for--2.svg"].decode() == card_drawing(reshard.inspect(resharded).to_dict())
    assert "\n![What each of the 2 ranks of for/2/ holds](reshard-for--2.svg)\n" in repo.files["README.md"].decode()
    repo.commit({"reshard-for--2.svg": f"<svg>{SVG_MARK}</svg>".encode()})
    reshard.publish(resharded, "me/two/for/2", private=True)
    assert b"<rect" in repo.files["reshard-for--2.svg"]
    folder = reshard.pull("me/two/for/2", to=tmp_path / "here")
    assert not list((tmp_path / "here").rglob("*.svg"))
    reshard.verify(folder)


def test_a_picture_by_hand_stays(here: FakeHub, resharded: Path) -> None:
    repo = here.create("me/two", {"reshard-tp2.svg": b"<svg>mine</svg>"})
    with pytest.raises(DestinationExistsError, match="other files of these names: reshard-tp2"):
        reshard.publish(resharded, "me/two/tp2", licence="mit")
    assert len(repo.commits) == 1
    repo.commit({"README.md": b"---\nlicense: mit\n---\n# By hand\n"})  # then there is no card of ours to draw for
    reshard.publish(resharded, "me/two/tp2", licence="mit")
    assert repo.files["reshard-tp2.svg"] == b"<svg>mine</svg>"


def test_a_picture_of_the_folder_itself_stays(here: FakeHub, checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    """A file that came along with `--include` may have the picture's name."""
    source = Path(shutil.copytree(checkpoint("llama"), tmp_path / "source"))
    (source / "reshard.svg").write_text("<svg>its own</svg>")
    reshard.convert(source, tmp_path / "out", tp_size=2, include=["*.svg"])
    reshard.publish(tmp_path / "out", "me/two", private=True)
    assert here.repos["me/two"].files["reshard.svg"] == b"<svg>its own</svg>"
    assert "reshard.svg" not in here.repos["me/two"].files["README.md"].decode()


def test_formats(manifests: dict[str, Manifest], checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    """What the weights are stored as, with the elements and bytes of the source."""
    source = quantize_folder(checkpoint("llama"), tmp_path / "source", "fp8")
    made = reshard.convert(source, tmp_path / "out", tp_size=2)
    card = render("me/two", {"tp2": manifests["tp2"], "fp8": made}, OPEN)
    lines = card.split("## Formats")[1].split("## Files")[0].strip().splitlines()[2:]
    plain, quantized = (load_all(folder) for folder in (checkpoint("llama"), source))
    elements = sum(tensor.numel() for tensor in plain.values())
    scaled = {name.removesuffix("_scale_inv") for name in quantized if name.endswith("_scale_inv")}
    stored = [tensor for name, tensor in quantized.items() if name.removesuffix("_scale_inv") in scaled]
    of_fp8 = sum(plain[name].numel() for name in scaled)
    left = sum(tensor.nbytes for tensor in quantized.values()) - sum(tensor.nbytes for tensor in stored)
    assert lines == [
        f"| `tp2/` | float32 | 21 | {elements:,} | {4 * elements:,} |",
        f"| `fp8/` | float32 | {21 - len(scaled)} | {elements - of_fp8:,} | {left:,} |",
        f"| `fp8/` | fp8 | {len(scaled)} | {of_fp8:,} | {sum(tensor.nbytes for tensor in stored):,} |",
    ]


def load_all(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def test_the_same_folders_give_the_same_card(manifests: dict[str, Manifest]) -> None:
    card = render("me/two", manifests, OPEN)
    assert card == render("me/two", manifests, OPEN)
    assert is_ours(card)
    assert not is_ours("# By hand\n")


def test_what_was_cast_is_said(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    reshard.convert(checkpoint("llama"), tmp_path / "out", tp_size=2, dtype="bfloat16")
    card = render("me/two", {"": reshard.inspect(tmp_path / "out")}, UNKNOWN)
    assert "bit for bit" not in card
    assert "elements were cast" in card
    assert "--layout hf" in card


def test_nothing_of_a_manifest_is_markup(manifests: dict[str, Manifest]) -> None:
    evil = "evil`|<b>$(touch x)\n[a](b)"
    crafted = dataclasses.replace(
        manifests["tp2"], repo_id=evil, commit=evil, tool={evil: evil}, runtime_only=(evil,), custom={evil: evil}
    )
    card = render("me/two", {"": crafted}, OPEN)
    assert "evil" in card
    assert "<b>" not in card
    assert "$(touch" not in card
    assert "(b)" not in card


def test_the_hub_checks_it(here: FakeHub, manifests: dict[str, Manifest], resharded: Path) -> None:
    import huggingface_hub

    if huggingface_hub.__version__ >= "2":  # older clients ask huggingface.co, whatever the endpoint
        huggingface_hub.ModelCard(render("me/two", manifests, OPEN)).validate()
        assert here.count("POST /api/validate-yaml") == 1
    with pytest.raises(BadInputError, match="does not take its card"):
        reshard.publish(resharded, "me/two", licence="nonsense")
    here.fail("POST /api/validate-yaml", status(500), times=9)
    with pytest.raises(NetworkError, match="have its card checked"):
        reshard.publish(resharded, "me/two", private=True)
    assert "me/two" not in here.repos


def test_its_commands(
    here: FakeHub, resharded: Path, checkpoint: Callable[..., Path], out: Path, cli: Callable[..., Result]
) -> None:
    """`pull` and `merge` run as the card has them; the others are on our own pages too."""
    reshard.publish(resharded, "me/two/tp2", private=True)
    card = here.repos["me/two"].files["README.md"].decode()
    generate, pull, merge = re.findall(r"^reshard .*$", card, re.M)
    assert generate == 'reshard run me/two/tp2 --prompt "Hello"'
    assert (Path(run(cli, pull)) / "reshard.json").exists()
    run(cli, merge.replace("DEST", str(out)))
    for path in checkpoint("llama").glob("*.safetensors"):
        assert (out / path.name).read_bytes() == path.read_bytes()


def run(cli: Callable[..., Result], command: str) -> str:
    result = cli(*shlex.split(command)[1:])
    assert result.code == 0, result
    return result.out.strip()


def test_quantized_weights_are_said_to_be(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    source = quantize_folder(checkpoint("llama"), tmp_path / "source", "fp8")
    made = dataclasses.replace(
        reshard.convert(source, tmp_path / "out", tp_size=2), repo_id="org/model", commit="3f" * 20
    )
    card = render("me/two", {"": made}, OPEN)
    assert "Weights stay quantized as the source has them (fp8)" in card
    assert "Nothing is quantized" not in card
