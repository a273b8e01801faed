"""The table of exports: which families vLLM lays out by copies alone, as `scripts/engines --write` found."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import engine_tools
import families
import pico
from places import DATA, ROOT, WORKERS
from quantizing import Kind, _awq, _compressed, _fp8, _gptq, _groups, quantize_folder

from reshard.checkpoint.source import open_source
from reshard.engines import tracing
from reshard.engines.resolve import resolve
from reshard.engines.tracing import Asked, traced
from reshard.errors import ReshardError

VERSION = "0.32.0"
PAGE = ROOT / "tests" / "ENGINES.md"
MESHES = {"tp 2": (2, False), "tp 4": (4, False), "tp 2, experts": (2, True)}
_GPU = {"platform": "cuda", "capability": (9, 0), "dtype": "bfloat16"}
_W4 = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32, "symmetric": True}
_F8 = {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True}
_DYNAMIC = {"num_bits": 8, "type": "float", "strategy": "token", "symmetric": True, "dynamic": True}
_CT_FP8 = _groups("float-quantized", **_F8)
_CT_FP8["config_groups"]["group_0"]["input_activations"] = _DYNAMIC
_FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic"}
_GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True, "lm_head": False}
FORMATS: dict[str, Kind | str] = {
    "fp8 in blocks": (_fp8((128, 128)), {**_FP8, "weight_block_size": [128, 128]}),
    "compressed-tensors fp8": (_compressed("float-quantized", **_F8), _CT_FP8),
    "compressed-tensors int4": (_compressed("pack-quantized", **_W4), _groups("pack-quantized", **_W4)),
    "AWQ": (_awq(32), {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm", "zero_point": True}),
    "GPTQ": (_gptq(32), {**_GPTQ, "desc_act": False}),
    "GPTQ by activity": (_gptq(32, by_activity=True), {**_GPTQ, "desc_act": True}),
    "mxfp4": "mxfp4",
}  # fmt: skip
_WIDE = {
    "hidden_size": 256,
    "head_dim": 64,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "intermediate_size": 512,
}
_LATENT = {"hidden_size": 256, "intermediate_size": 512, "moe_intermediate_size": 256, "first_k_dense_replace": 1}
_ROUTED = {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "topk_method": "noaux_tc"}
QUANTIZED: dict[str, dict[str, Any]] = {
    "llama": _WIDE,
    "qwen3_moe": {**_WIDE, "moe_intermediate_size": 512},
    "deepseek_v3": {**_LATENT, **_ROUTED},
    "gpt_oss": {**_WIDE, "intermediate_size": 256, "num_local_experts": 4},
}
_HEAD = """\
# Exports for vLLM

What `reshard export` makes of small models of every text family that both transformers and vLLM {version} have, for
GPUs of compute capability 9.0, planned on a CPU (`scripts/engines --write`). **Copies** says that vLLM's loader only
copies: the rank files can be written, and every source tensor is used. Otherwise the cell has what vLLM, or `reshard`,
says.

That the bytes are those of vLLM's own saver, and that its engine answers as transformers does, is tested for ten
families beside vLLM on a CPU (`scripts/engine_env vllm`). Small models are not large ones: heads of odd sizes are
refused here that no published model has.

{summary}
"""


def cases() -> Iterator[tuple[str, str]]:
    """Yield every case: a family that vLLM has, and a format of QUANTIZED models, or none."""
    known = set(json.loads(engine_tools.run_worker("vllm_architectures.py").splitlines()[-1]))
    for model_type in families.MODEL_TYPES:
        try:
            with warnings.catch_warnings(action="ignore"):
                model_class = families._model_class(families.small_config(model_type))
        except Exception:
            continue
        name = getattr(model_class, "__name__", "")
        if name.endswith("ForCausalLM") and name in known:
            yield model_type, ""
    for family in QUANTIZED:
        for form in FORMATS:
            if (form == "mxfp4") == (family == "gpt_oss"):
                yield family, form


def made(family: str, form: str, folder: Path) -> Path:
    if not form:
        if family in pico.FAMILIES or family in QUANTIZED:
            return pico.save(family, folder, **QUANTIZED.get(family, {}))
        model = families.build(family)
        if model is None:
            raise LookupError("has no plan")
        return families.save(model, folder)
    plain = pico.save(family, folder.with_name("plain"), **QUANTIZED[family])
    quantize_folder(plain, folder, FORMATS[form])
    config = json.loads((folder / "config.json").read_text())
    told, layers = config["quantization_config"], config["num_hidden_layers"]
    if family in ("qwen3_moe", "deepseek_v3"):
        gates = [f"model.layers.{layer}.mlp.gate" for layer in range(layers)]
        key = "ignore" if told["quant_method"] == "compressed-tensors" else "modules_to_not_convert"
        told[key] = ["lm_head", *gates]
    (folder / "config.json").write_text(json.dumps(config))
    return folder


class _Planner:
    """A planner that has imported vLLM already. It takes the place of `tracing._run`."""

    def __init__(self) -> None:
        command = [str(engine_tools.PYTHON), "-P", str(WORKERS / "vllm_plan_server.py"), str(tracing._PLANNER)]
        environment = {**os.environ, **engine_tools.ALONE}
        self._process = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )

    def run(self, command: list[str], folder: Path) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{folder}\n")
        self._process.stdin.flush()
        code = int(self._process.stdout.readline())
        if code:
            raise tracing._refusal(folder / "said", code)


def outcome(source: Path, tp: int, ep: bool) -> str:
    """Return "copies", or why there are no rank files."""
    checkpoint = open_source(source)
    try:
        files = ("config.json", *checkpoint.extras)
        plan = traced(Asked(tp, ep=ep, **_GPU), checkpoint.tensors, source, files, python=engine_tools.PYTHON)
        resolve(plan, checkpoint.tensors, checkpoint.config)
    except ReshardError as error:
        return error.message.replace("|", "/")[:160]
    return "copies"


def record_of(family: str, form: str) -> dict[str, Any] | None:
    """Return the record of a case; None if it has no small model."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            with warnings.catch_warnings(action="ignore"):
                source = made(family, form, Path(folder) / "source")
        except Exception:
            return None
        experts = any(".experts." in name for name in open_source(source).tensors)
        found = {mesh: outcome(source, tp, ep) for mesh, (tp, ep) in MESHES.items() if experts or not ep}
    return {"family": family, "format": form, "meshes": found}


def path_of() -> Path:
    return DATA / f"engines-{VERSION}.jsonl"


def read() -> list[dict[str, Any]]:
    return [json.loads(line) for line in path_of().read_text().splitlines()]


def page(records: list[dict[str, Any]]) -> str:
    """Return the page that the data make."""
    lines = ["| family | format | " + " | ".join(MESHES) + " |", "| --- | --- |" + " --- |" * len(MESHES)]
    for record in records:
        cells = [
            record["family"],
            record["format"] or "as published",
            *(record["meshes"].get(mesh, "–") for mesh in MESHES),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([_HEAD.format(version=VERSION, summary=summary(records)), *lines]) + "\n"


def summary(records: list[dict[str, Any]]) -> str:
    plain = [record for record in records if not record["format"]]
    quantized = [record for record in records if record["format"]]
    copied = [sum(set(record["meshes"].values()) == {"copies"} for record in of) for of in (plain, quantized)]
    return (
        f"{copied[0]} of {len(plain)} families are copied on every mesh, and {copied[1]} of {len(quantized)} quantized"
        " models."
    )


@click.command()
@click.option("--write", is_flag=True, help="Walk over all cases, and write the data and the page.")
@click.option("--page", "only_page", is_flag=True, help="Write the page again, from the data.")
@click.argument("names", nargs=-1)
def main(write: bool, only_page: bool, names: tuple[str, ...]) -> None:
    """Find out which families vLLM lays out by copies alone. NAMES are families to print."""
    kept = ROOT / f".engines-{VERSION}"  # what a stopped walk has found
    tracing._run = _Planner().run
    if not only_page:
        for family, form in cases():
            if names and family not in names:
                continue
            path = kept / f"{family}-{form.replace(' ', '-')}.json"
            if names or not path.exists():
                record = record_of(family, form)
                click.echo(json.dumps(record) if record else f"{family}: no small model")
                if write:
                    kept.mkdir(exist_ok=True)
                    path.write_text(json.dumps(record))
    if write:
        found = [json.loads((kept / f"{f}-{form.replace(' ', '-')}.json").read_text()) for f, form in cases()]
        path_of().write_text("".join(json.dumps(record) + "\n" for record in found if record))
        shutil.rmtree(kept)
    if write or only_page:
        PAGE.write_text(page(read()))


if __name__ == "__main__":
    main()
