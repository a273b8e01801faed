"""The table of quantized checkpoints: printed for some formats, or written for all, as data and as a page."""

from __future__ import annotations

import json
import shutil
import tempfile
import textwrap
from pathlib import Path
from typing import Any

import click
import quantized_cases
import quantized_matrix
from family_report import release
from places import DATA, ROOT

from reshard.operations.reference import EXACT

PAGE = ROOT / "tests" / "QUANTIZED.md"
RELEASE = "5.24"  # of transformers: that of the page's data
NEAR = 1e-3  # largest relative error of transformers' own that is called right
MODELS = {"even": "dense", "ragged": "dense, ragged", "experts": "experts", "gpt_oss": "experts of gpt-oss"}
# How each kind is called on the page.
NAMES = {
    "none": "not quantized, fp32",
    "fp8": "fp8, blocks of 16 × 16",
    "fp8_e8m0": "fp8, blocks of 16 × 16, E8M0 scales",
    "fp8_tensor": "fp8, one scale",
    "mxfp8": "mxfp8",
    "fbgemm": "FBGEMM fp8",
    "nf4": "bitsandbytes nf4",
    "nf4_nested": "bitsandbytes nf4, nested",
    "fp4_bf16": "bitsandbytes fp4, stored as bf16",
    "int8": "bitsandbytes int8",
    "awq": "AWQ, groups of 8",
    "gptq": "GPTQ, groups of 8",
    "gptq_8": "GPTQ, 8 bits, one group",
    "gptq_order": "GPTQ, groups of 8, in order of activity",
    "ct_w4": "compressed-tensors int4, groups of 8",
    "ct_w4_zero": "compressed-tensors int4, zero points",
    "ct_w8": "compressed-tensors int8, by row",
    "ct_fp8": "compressed-tensors fp8, by row",
    "ct_fp8_block": "compressed-tensors fp8, blocks of 16 × 16",
    "ct_nvfp4": "compressed-tensors nvfp4",
    "modelopt_fp8": "modelopt fp8",
    "modelopt_nvfp4": "modelopt nvfp4",
    "torchao_int8": "torchao int8",
    "torchao_float8": "torchao float8",
    "torchao_intx": "torchao int4 in int8, groups of 32",
    "mxfp4": "mxfp4",
}
_HEAD = """# Quantized checkpoints

Every format that `reshard` cuts, on small dense models and on mixtures of experts. `scripts/quantized --write` measures
it with transformers {release}, and writes this page and
[data/quantized-{release}.jsonl](data/quantized-{release}.jsonl). A test fails if the page is out of date.

- **Bits** are those in the files for each quantized weight, scales included. The matrices, groups and blocks are small,
  so scales weigh more here than in a big model.
- **tp 2, tp 3, tp 2 × ep 2**: the largest relative error of the logits in fp32, against one process that dequantises
  the checkpoint as `reshard` does. The limit is 1e-5. Greedy tokens are equal wherever an error is given.
- **By its library**: the same on 2 and 3 ranks, where the library of the format computes with the quantized weights,
  and how many of them it takes, if not all. Only bitsandbytes int8 quantizes activations. There rounding can move a
  number by a step, so the process that it is compared with uses the library too, and the limit, given behind the error,
  is what a little noise in the activations changes in that process. The kernels of bitsandbytes for CPUs with
  AVX512-BF16 compute in bf16: they are used in models in bf16 only.
- **Merge**: whether merges give back the weight files and config.json byte for byte, on all these meshes.
- **transformers alone** is transformers in one process, against ours. Where it differs, it computes something else:
  bitsandbytes int8 and torchao int4 quantize activations too, compressed-tensors rounds weights to the dtype of their
  scales, bf16, and what is marked so runs in bf16 only. It reads the experts of nvfp4 wrongly, and those of mxfp8,
  whose rows are 1 1/2 blocks.
- **transformers on 2 ranks** is its own `tp_plan="auto"`, against transformers alone. It is right up to 1e-3, or in
  bf16, up to the distance of bf16 from fp32.

The matrices of ragged models are no whole number of blocks, nor are the experts' 48 rows on 2 ranks. Everything ran on
CPU, where formats whose kernels need a GPU or another package raise that error. modelopt's formats are for other
engines: they are converted, verified and merged only.

{summary}
"""
_COLUMNS = ("format", "model", "bits", *("tp 2", "tp 3", "tp 2 × ep 2", "merge", "by its library"))
_THEIRS = ("transformers alone", "transformers on 2 ranks")


def path_of(version: str) -> Path:
    return DATA / f"quantized-{version}.jsonl"


def read(version: str) -> list[dict[str, Any]]:
    """Read the written data: one record for each case."""
    return [json.loads(line) for line in path_of(version).read_text().splitlines()]


def page(version: str) -> str:
    """Return the page that the written data make."""
    records = read(version)
    why = [f"{number}. {reason}" for number, reason in enumerate(_reasons(records), 1)]
    told = ["", "Why a library takes no weight of a format, or of a model:", "", *why]
    return "\n".join([_HEAD.format(release=version, summary=summary(records)), *table(records), *told]) + "\n"


def _reasons(records: list[dict[str, Any]]) -> list[str]:
    """Return why libraries take no parameter of a case, in the order of the table."""
    cases = [record["native"] for record in _in_order(records) if "native" in record]
    return list(dict.fromkeys(native["tp2"]["reason"] for native in cases if "library" not in native))


def _in_order(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    order = {kind: place for place, kind in enumerate(NAMES)}
    return sorted(records, key=lambda record: order[record["kind"]])


def summary(records: list[dict[str, Any]]) -> str:
    """Return the counts of quantized cases, as sentences for pages."""
    cases = [record for record in records if record["kind"] != quantized_cases.PLAIN]
    ran = [record["upstream"] for record in cases if "upstream" in record]
    exact = sum(map(quantized_matrix.is_exact, cases))
    alone = [upstream for upstream in ran if not isinstance(upstream["single"], str)]
    finished = [upstream for upstream in alone if not isinstance(upstream["tp2"], str)]
    right = sum(upstream["tp2"] <= _limit(upstream) for upstream in finished)
    said = (
        f"{exact} of {len(cases)} cases are exact: {len(ran)} ran on every mesh, and the others are merged byte for"
        f' byte. transformers alone runs {len(alone)} of them on CPU. Of these its `tp_plan="auto"` computes {right} as'
        f" one process does and {len(finished) - right} wrongly, and fails on {len(alone) - len(finished)}."
    )
    return textwrap.fill(said, 120)


def table(records: list[dict[str, Any]]) -> list[str]:
    """Return the lines of the table, format by format."""
    columns = (*_COLUMNS, *_THEIRS)
    reasons = _reasons(records)
    rows = [_row(record, reasons) for record in _in_order(records)]
    return [_line(columns), _line(["---"] * len(columns)), *map(_line, rows)]


def _line(cells: Any) -> str:
    return f"| {' | '.join(cells)} |"


def _row(record: dict[str, Any], reasons: list[str]) -> list[str]:
    meshes = record["meshes"]
    merged = "equal" if all(result["merged"] for result in meshes.values()) else "**differs**"
    ours = [_ours(meshes.get(mesh)) for mesh in quantized_matrix.MESHES]
    return [
        *(NAMES[record["kind"]], MODELS[record["model"]], f"{record['bits']:g}", *ours, merged),
        _natively(record.get("native"), reasons),
        *_theirs(record.get("upstream")),
    ]


def _ours(result: dict[str, Any] | None) -> str:
    if result is None:
        return "–"
    if "error" not in result:
        return "not run"
    return _number(result["error"]) + ("" if result["tokens"] else ", **tokens differ**")


def _natively(native: dict[str, Any] | None, reasons: list[str]) -> str:
    """Return what the page says of a library: its errors on 2 and 3 ranks, or the number of the reason why it takes no
    parameter."""
    if native is None:
        return "–"
    on = [native["tp2"], native["tp3"]]
    if "library" not in native:
        return f"dequantised ({reasons.index(on[0]['reason']) + 1})"
    said = []
    for ranks in on:
        part = "" if ranks["taken"] == ranks["of"] else f" ({ranks['taken']} of {ranks['of']})"
        far = "" if ranks["limit"] <= EXACT else f" of {_number(ranks['limit'])}"
        said.append(_number(ranks["error"]) + far + part if ranks["taken"] else "dequantised")
    return f"{native['library']}: {', '.join(said)}"


def _theirs(upstream: dict[str, Any] | None) -> tuple[str, str]:
    if upstream is None:
        return "cannot load it", "–"
    single = upstream["single"]
    if isinstance(single, str):
        return _ended(single), "–"
    alone = _judged(single, NEAR, "as ours", "differs") + (", in bf16" if upstream["dtype"] == "bfloat16" else "")
    both = upstream["tp2"]
    return alone, _ended(both) if isinstance(both, str) else _judged(both, _limit(upstream), "right", "**wrong**")


def _limit(upstream: dict[str, Any]) -> float:
    """Return the largest error on 2 ranks that is called right."""
    return max(NEAR, upstream["single"]) if upstream["dtype"] == "bfloat16" else NEAR


def _judged(error: float, limit: float, near: str, far: str) -> str:
    return f"{near if error <= limit else far}: {_number(error)}"


def _number(error: float) -> str:
    return f"{error:.1e}" if error else "0"


def _ended(words: str) -> str:
    """Return what the page says of a job without a result, from its last words: the first sentence of an error."""
    name, _, text = words.partition(": ")
    said = textwrap.shorten(text.split(". ")[0].rstrip("."), 100, placeholder=" …")
    return f"raises `{name}`: {said}" if text else words


@click.command()
@click.option("--write", is_flag=True, help="Measure all cases, and write the data and the page.")
@click.option("--page", "only_page", is_flag=True, help="Write the page again, from the data.")
@click.argument("kinds", nargs=-1)
def main(write: bool, only_page: bool, kinds: tuple[str, ...]) -> None:
    """Measure quantized checkpoints, and report how exact they are on ranks."""
    if write:
        kept = ROOT / f".quantized-{release()}"
        records = [_kept_on(kept, *case) for case in quantized_cases.OF_TABLE]
        path_of(release()).write_text("".join(json.dumps(record) + "\n" for record in records))
        shutil.rmtree(kept)
    if write or only_page:
        PAGE.write_text(page(RELEASE))
        return
    for name, kind in quantized_cases.OF_TABLE:
        if kind in kinds:
            click.echo("\n".join(table([_measured(name, kind)])))


def _measured(name: str, kind: str) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        return quantized_matrix.record_of(name, kind, Path(folder))


def _kept_on(kept: Path, name: str, kind: str) -> dict[str, Any]:
    """Measure a case, or read what an earlier, stopped walk has kept of it."""
    path = kept / f"{name}-{kind}.json"
    if not path.exists():
        kept.mkdir(exist_ok=True)
        record = _measured(name, kind)
        path.with_suffix(".part").write_text(json.dumps(record))
        path.with_suffix(".part").rename(path)
        click.echo("\n".join(table([record])), err=True)
    return json.loads(path.read_text())


if __name__ == "__main__":
    main()
