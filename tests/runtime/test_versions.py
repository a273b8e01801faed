"""A folder made by one transformers and loaded by another: it computes what the loading one does, or says why not.

The folders in tests/data were made once, each by the release in its name:
    PYTHONPATH=tests/tools:tests/runtime .venv-compat/bin/python -c 'import test_versions; test_versions.make()'
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pico
import pytest
import torch
import transformers
from cli_tools import reseal
from places import DATA
from single_process import logits

import reshard
import runtime
from reshard.errors import VersionError

MADE = sorted(path.name.removeprefix("made-by-") for path in DATA.glob("made-by-*"))
SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "vocab_size": 130, "num_attention_heads": 4, "head_dim": 4}
OTHER = "5.0.0"  # an unsupported release


def make() -> None:
    """Make the folders of the installed transformers: a checkpoint in bfloat16, and one in float32 that is cast.

    In this family, 5.17 keeps a bias of the router in float32, and 5.24 its weight too.
    """
    folder = DATA / f"made-by-{'.'.join(transformers.__version__.split('.')[:2])}"
    shutil.rmtree(folder, ignore_errors=True)
    for name, dtype, cast in (("as-it-is", torch.bfloat16, None), ("cast", torch.float32, "bfloat16")):
        source = pico.save("glm4_moe", folder / "source", dtype=dtype, shard_bytes="1GB", **SIZES)
        reshard.convert(source, folder / name, tp_size=1, dtype=cast)
        shutil.rmtree(source)


def load(folder: Path, caplog: pytest.LogCaptureFixture) -> tuple[Any, list[str]]:
    """Return the model, and the warnings of its load."""
    with caplog.at_level(logging.WARNING, "runtime"):
        model = runtime.load(folder)
    return model, [record.getMessage() for record in caplog.records if record.name.startswith("runtime")]


def test_there_are_folders_of_both_ends() -> None:
    assert MADE == ["5.17", "5.24"]


@pytest.mark.parametrize("version", MADE)
def test_it_computes_what_this_transformers_does(
    version: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = DATA / f"made-by-{version}" / "as-it-is"
    reshard.merge(folder, tmp_path / "source")
    expected = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "source")
    loaded, said = load(folder, caplog)
    assert said == []
    for name, value in expected.state_dict().items():
        whole = runtime.full_tensor(loaded, name)
        assert whole.dtype == value.dtype, name
        assert torch.equal(whole, value), name
    assert torch.equal(logits(loaded), logits(expected))


@pytest.mark.parametrize("version", MADE)
def test_bits_that_are_wanted_and_no_longer_there_are_named(version: str, caplog: pytest.LogCaptureFixture) -> None:
    folder = DATA / f"made-by-{version}" / "cast"
    loaded, said = load(folder, caplog)
    gate = loaded.get_parameter("model.layers.1.mlp.gate.weight")
    stored = {target.name: target.dtype for target in reshard.inspect(folder).parameters}
    rounded = gate.dtype == torch.float32 and stored["model.layers.1.mlp.gate.weight"] == "bfloat16"
    assert rounded == (version == "5.17" and not transformers.__version__.startswith("5.17."))
    assert len(said) == int(rounded)
    for line in said:
        assert "\n" not in line
        assert all(word in line for word in (str(folder), "5.17.0", transformers.__version__, "mlp.gate.weight"))
    assert logits(loaded).isfinite().all()


@pytest.fixture
def made(resharded: Path, tmp_path: Path) -> Path:
    """A folder whose manifest names another transformers."""
    out = Path(shutil.copytree(resharded, tmp_path / "out"))
    reshard.convert(out, tmp_path / "one", tp_size=1)
    reseal(tmp_path / "one", lambda content: content["tool"].update(transformers=OTHER))
    return tmp_path / "one"


def test_a_difference_that_does_not_matter_is_not_told(made: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Another plan does not matter, for one: the folder's own is used."""
    reseal(made, lambda content: content["hooks"].pop("lm_head", None))
    assert load(made, caplog)[1] == []


def test_another_class_is_named(made: Path, caplog: pytest.LogCaptureFixture) -> None:
    reseal(made, lambda content: content["model"].update(architecture="OtherForCausalLM"))
    (line,) = load(made, caplog)[1]
    assert all(word in line for word in (OTHER, "OtherForCausalLM", "LlamaForCausalLM", transformers.__version__))


def rename(content: dict[str, Any]) -> None:
    content["parameters"][3]["name"] += "_of_old"


def reshape(content: dict[str, Any]) -> None:
    norm = next(item for item in content["parameters"] if item["name"] == "model.norm.weight")
    norm["shape"], norm["from"] = [1, *norm["shape"]], [["model.norm.weight", 0, [0, 1], [1, *norm["shape"]], [0, 0]]]


OTHERS: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "a parameter of another name": (rename, "_of_old"),
    "a shape": (reshape, "model.norm.weight"),
    "a module": (lambda content: content["hooks"].update({"model.of_old": "rowwise"}), "model.of_old"),
}


@pytest.mark.parametrize("change", OTHERS)
def test_other_parameters_are_refused(change: str, made: Path) -> None:
    alter, name = OTHERS[change]
    reseal(made, alter)
    with pytest.raises(VersionError, match=f"transformers {OTHER}.*LlamaForCausalLM of .*{name}") as refused:
        runtime.load(made)
    assert "reshard convert" in str(refused.value.hint)
