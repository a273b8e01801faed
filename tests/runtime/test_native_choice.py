"""What computes with a quantized parameter: its library, or a plain module, and the reason that is given. No ranks."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import quantized_cases
import torch
import transformers
from cli_tools import Checkpoint
from quantized_cases import MODELS
from torchrun_tools import on_ranks

import reshard
from reshard.checkpoint.architecture import meta_model
from reshard.checkpoint.quantization import quantization_of
from reshard.errors import UsageError
from reshard.transforms.libraries import LIBRARY_OF
from runtime.model.quantized.libraries import BY_FORMAT
from runtime.model.quantized.native import Computation, choose

CPU = torch.device("cpu")
Choose = Callable[..., Computation]


@pytest.fixture(scope="module")
def folder(checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    root = tmp_path_factory.mktemp("choices")

    def made(name: str, kind: str, size: int = 2, **options: Any) -> Path:
        source, out = root / f"{name}-{kind}", root / f"{name}-{kind}-{size}-{len(options)}"
        family, told = MODELS[name]
        if not source.exists():
            quantized_cases.quantized(checkpoint(family, **told), source, kind)
        if not out.exists():
            reshard.convert(source, out, tp_size=size, sync=False, **options)
        return out

    return made


@pytest.fixture
def chosen(folder: Callable[..., Path]) -> Choose:
    def choice(*case: Any, asked: str = "auto", device: torch.device = CPU, **options: Any) -> Computation:
        out = folder(*case, **options)
        manifest = reshard.inspect(out)
        return choose(manifest, meta_model(out, dtype=manifest.dtype), device, 0, asked)

    return choice


@pytest.fixture
def gptqmodel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Install a package of that name, with a content."""

    def install(content: str) -> None:
        (tmp_path / "gptqmodel").mkdir()
        (tmp_path / "gptqmodel" / "__init__.py").write_text(content)
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.delitem(sys.modules, "gptqmodel", raising=False)

    return install


NOT_LINEAR = "it is not the weight of a linear layer"
CUT = "its cut goes through scales or words"
ROWS = "a scale is for 64 values, and some rows are not whole scales"
DECOMPRESSED = "transformers decompresses it before it computes"
FETCHED = "its kernels are code that transformers fetches from the Hub"


@pytest.mark.parametrize(
    ("case", "native", "reasons"),
    [
        (("even", "nf4"), 14, {}),
        (("even", "nf4", 3), 14, {}),
        (("even", "nf4", 4), 12, {CUT: 2}),  # o_proj has 3 blocks of 64 inputs
        (("ragged", "nf4"), 0, {ROWS: 14}),
        (("ragged", "int8"), 14, {}),
        (("experts", "int8"), 11, {NOT_LINEAR: 2}),
        (("even", "torchao_int8", 3), 14, {}),
        (("even", "torchao_intx"), 0, {"it quantizes activations for each token, over all inputs": 14}),
        (("even", "ct_w4"), 0, {DECOMPRESSED: 14}),
        (("even", "fp8"), 0, {FETCHED: 14}),
    ],
)
def test_the_choice(case: tuple[Any, ...], native: int, reasons: dict[str, int], chosen: Choose) -> None:
    found = chosen(*case)
    assert (len(found.native), Counter(found.reasons.values())) == (native, reasons)
    if reasons:
        reason = next(iter(found.reasons.values()))
        with pytest.raises(UsageError, match=f"cannot be computed with natively: {reason}"):
            chosen(*case, asked="native")
    assert not chosen(*case, asked="dequantised").native
    assert found.seal() == " ".join(sorted(found.native))


def test_formats_say_which_library_it_is() -> None:
    """`plan` reads that, and must not import the runtime."""
    assert {name: library.name for name, library in BY_FORMAT.items()} == LIBRARY_OF


def test_a_library_that_is_not_there(chosen: Choose, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    found = chosen("even", "nf4")
    assert set(found.reasons.values()) == {"bitsandbytes is not installed: pip install 'reshard[bnb]'"}
    with pytest.raises(UsageError) as raised:
        chosen("even", "nf4", asked="native")
    assert "and 13 more: cannot be computed with natively: bitsandbytes is not installed" in raised.value.message
    assert raised.value.hint == "with --compute auto, such parameters are dequantised"


def test_a_library_that_cannot_be_imported(chosen: Choose, gptqmodel: Callable[[str], None]) -> None:
    gptqmodel("raise OSError('libcudart.so.13: cannot open shared object file\\nmore of it')")
    reasons = set(chosen("even", "gptq").reasons.values())
    assert reasons == {"gptqmodel cannot be imported: libcudart.so.13: cannot open shared object file"}


def test_what_gptqmodel_takes(chosen: Choose, gptqmodel: Callable[[str], None], capfd: Any) -> None:
    gptqmodel("print('hello')")
    assert set(chosen("even", "gptq").reasons.values()) == {"gptqmodel takes no groups of 8"}
    assert len(chosen("even", "gptq_8").native) == 14
    in_fp32 = {"gptqmodel computes AWQ in half precision, and the model is in float32"}
    assert set(chosen("even", "awq").reasons.values()) == in_fp32
    assert capfd.readouterr().out == ""  # a library's own words are not among the results


def test_a_device_that_a_library_does_not_compute_on(chosen: Choose) -> None:
    assert set(chosen("even", "int8", device=torch.device("xpu")).reasons.values()) == {
        "bitsandbytes does not compute on xpu"
    }


def test_modules_that_are_not_chosen_stay_plain(chosen: Choose, folder: Callable[..., Path]) -> None:
    """transformers would replace all of them."""
    found, out = chosen("even", "nf4", 4), folder("even", "nf4", 4)
    model = meta_model(out, dtype="float32")
    told = quantization_of(json.loads((out / "config.json").read_text()))
    before = dict(model.named_modules())
    found.replace(model, told or {})
    replaced = {name for name, module in model.named_modules() if before[name] is not module}
    assert replaced == {name.removesuffix(".weight") for name in found.native}
    assert {type(model.get_submodule(name)).__name__ for name in replaced} == {"Linear4bit"}
    assert model.is_quantized
    assert isinstance(model.config.quantization_config, transformers.BitsAndBytesConfig)


def test_stored_logits_are_of_dequantised_weights(folder: Callable[..., Path]) -> None:
    """So `check` dequantises, unless it is told not to."""
    out = folder("even", "int8", reference_logits=True)
    done = on_ranks(2, "-m", "runtime", "check", str(out))
    assert "tokens equal" in done.stdout, done.stderr
    refused = on_ranks(2, "-m", "runtime", "check", str(out), "--compute", "native")
    assert 2 in refused.codes
    assert "quantizes activations too" in refused.stderr


def test_ranks_with_other_libraries(folder: Callable[..., Path], tmp_path: Path) -> None:
    """A rank that lacks the library would compute something else: all end, with 8."""
    code = """
import os, sys, runtime
if os.environ["RANK"] == "1":
    sys.modules["bitsandbytes"] = None
runtime.load(sys.argv[1])
"""
    (tmp_path / "load.py").write_text(code)
    done = on_ranks(2, str(tmp_path / "load.py"), str(folder("even", "int8")))
    assert done.returncode != 0
    assert "rank 1 computes with other quantized weights by their library than rank 0" in done.stderr
    assert "Hint: install the same packages for all ranks" in done.stderr
