"""The matrix of quantized checkpoints: every format on every model, resharded, run on several ranks, merged, and run by
transformers itself: in one process, and with its own tensor parallelism."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
from collections import Counter
from collections.abc import Collection
from pathlib import Path
from typing import Any

import quantized_cases
import torch
import warm_ranks
from places import WORKERS
from safetensors.torch import load_file
from torchrun_tools import on_ranks

import reshard
from reshard.checkpoint.architecture import meta_model
from reshard.checkpoint.source import open_source
from reshard.operations.reference import EXACT, distance, rounding, single_model
from reshard.planning.model.quantized import Matrices
from runtime.model.quantized.libraries import BY_FORMAT
from runtime.model.quantized.native import choose
from runtime.model.quantized.single import native_model, quantizes_inputs, shaken

IDS = torch.randint(3, 130, (2, 12), generator=torch.Generator().manual_seed(7))
NEW_TOKENS = 4
MESHES = {"tp2": (2, 1), "tp3": (3, 1), "tp2 ep2": (2, 2)}  # the last for experts only
HAVE_EXPERTS = ("experts", "gpt_oss")
LIMIT = 90  # seconds after which transformers' own is given up
# Formats of which transformers runs no fp32: the files say bf16, and it multiplies by nothing else.
IN_BF16 = ("torchao_float8", "torchao_intx", "ct_nvfp4")


def record_of(name: str, kind: str, root: Path, *, upstream: bool = True) -> dict[str, Any]:
    """Return what the table says of a case, with `upstream` of transformers' own too. `root` is empty."""
    plain = quantized_cases.plain(name, root / "plain")
    source = quantized_cases.quantized(plain, root / "source", kind)
    record: dict[str, Any] = {"kind": kind, "model": name, "bits": _bits(plain, source), "meshes": {}}
    single = _single(source) if quantized_cases.is_run(kind) else None
    for mesh, (tp, ep) in MESHES.items():
        if ep == 1 or name in HAVE_EXPERTS:
            record["meshes"][mesh] = _on_mesh(source, root, tp, ep, single)
    if single is not None and kind != quantized_cases.PLAIN:
        record["native"] = natively(source, root / "2-1", root / "3-1", single)
    if upstream and single is not None:
        record["upstream"] = _upstream(source, root, kind, single["logits"])
    return record


def _bits(plain: Path, source: Path) -> float:
    """Return the bits in the files for each weight that is quantized: its own, and those of scales and the like."""
    opened = open_source(source)
    taken = Matrices(opened).taken
    if not taken:
        return 32.0
    weights = 0
    for file in plain.glob("*.safetensors"):
        named = load_file(file).items()
        weights += sum(tensor.numel() for name, tensor in named if name in taken or name not in opened.tensors)
    return round(8 * sum(opened.tensors[name].nbytes for name in taken) / weights, 2)


def _single(source: Path) -> dict[str, Any]:
    """Run the checkpoint in this process, dequantised by this package to fp32."""
    model = single_model(source, torch.float32)
    with torch.inference_mode():
        logits = model(IDS).logits
    tokens = model.generate(IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=NEW_TOKENS, do_sample=False)
    return {"logits": logits, "tokens": tokens.tolist()}


def _on_mesh(source: Path, root: Path, tp: int, ep: int, single: dict[str, Any] | None) -> dict[str, Any]:
    """Convert, verify, merge and run in fp32."""
    out = root / f"{tp}-{ep}"
    manifest = reshard.convert(source, out, tp_size=tp, ep_size=ep, sync=False)
    reshard.verify(out, against=source)
    reshard.merge(out, root / f"{out.name}-merged", sync=False)
    found: dict[str, Any] = {"merged": gives_back(root / f"{out.name}-merged", source)}
    if single is None:
        return found
    if manifest.dtype != "float32":
        shutil.rmtree(out)
        reshard.convert(source, out, tp_size=tp, ep_size=ep, dtype="float32", sync=False)
    return {**_run(out, root, tp, "dequantised", single), **found}


def _run(out: Path, root: Path, ranks: int, compute: str, single: dict[str, Any]) -> dict[str, Any]:
    """Return how far a folder on ranks is from one process."""
    job = {"name": "ours", "folder": str(out), "ids": IDS.tolist(), "new_tokens": NEW_TOKENS, "compute": compute}
    jobs, results = root / "jobs.json", root / "ours.json"
    jobs.write_text(json.dumps([job]))
    done = on_ranks(ranks, str(WORKERS / "parity.py"), str(jobs), str(results))
    assert done.returncode == 0, done.stderr
    error = _apart(torch.load(f"{results}.ours.pt")["logits"], single["logits"])
    return {"error": error, "tokens": json.loads(results.read_text())["ours"]["tokens"] == single["tokens"]}


def natively(source: Path, on_2: Path, on_3: Path, single: dict[str, Any]) -> dict[str, Any]:
    """Return what a library does with a case on 2 and 3 ranks: its name, how many parameters it takes of all and the
    most frequent reason for the others, and how far the ranks are from one process. That computes with dequantised
    weights, or with the library if it quantizes activations: then `limit` is what a little noise in these changes."""
    found: dict[str, Any] = {}
    for out in (on_2, on_3):
        manifest = reshard.inspect(out)
        chosen = choose(manifest, meta_model(out, dtype="float32"), torch.device("cpu"), 0, "auto")
        reasons = Counter(chosen.reasons.values()).most_common(1)
        ranks: dict[str, Any] = {"taken": len(chosen.native), "of": len(manifest.bundles)}
        ranks |= {"reason": reasons[0][0]} if reasons else {}
        if chosen.native:
            found["library"] = BY_FORMAT[manifest.bundles[0].quantized.format].name
            expected, limit = _with_library(source, single, chosen.native)
            ranks |= {"limit": limit, **_run(out, out.parent, manifest.world_size, "auto", expected)}
        found[f"tp{manifest.world_size}"] = ranks
    return found


def _with_library(source: Path, single: dict[str, Any], names: Collection[str]) -> tuple[dict[str, Any], float]:
    """Return what one process computes that does what ranks do with a library, and the largest error of these."""
    model = native_model(source, torch.float32, torch.device("cpu"), names)
    if not quantizes_inputs(model):
        return single, EXACT
    with torch.inference_mode():
        logits = model(IDS).logits
        with shaken(model):
            limit = rounding(logits, model(IDS).logits)
    tokens = model.generate(IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=NEW_TOKENS, do_sample=False)
    return {"logits": logits, "tokens": tokens.tolist()}, float(f"{limit:.1e}")


def gives_back(merged: Path, source: Path) -> bool:
    """Whether a merge has the source's weight files and configuration, byte for byte."""
    names = [path.name for path in source.glob("*.safetensors")] + ["config.json"]
    return all((merged / name).read_bytes() == (source / name).read_bytes() for name in names)


def _upstream(source: Path, root: Path, kind: str, ours: torch.Tensor) -> dict[str, Any]:
    """Return how far one process of transformers is from ours, and its 2 ranks from that process; its last words where
    it does not run."""
    dtype = "bfloat16" if kind in IN_BF16 else "float32"
    alone = _run_upstream(source, root, 1, None, dtype)
    if isinstance(alone, str):
        return {"single": alone}
    both = _run_upstream(source, root, 2, "auto", dtype)
    apart = both if isinstance(both, str) else _apart(both, alone)
    return {"dtype": dtype, "single": _apart(alone, ours), "tp2": apart}


def _run_upstream(source: Path, root: Path, ranks: int, plan: str | None, dtype: str) -> torch.Tensor | str:
    torch.save({"input_ids": IDS}, root / "inputs")
    job = {"name": "theirs", "source": str(source), "inputs": str(root / "inputs"), "tp_plan": plan, "dtype": dtype}
    jobs, results, noise = root / "jobs.json", root / f"theirs-{ranks}.json", root / f"theirs-{ranks}.log"
    jobs.write_text(json.dumps([job]))
    arguments = (str(WORKERS / "upstream.py"), str(jobs), str(results))
    with open(os.devnull) as nothing, noise.open("w") as log:
        files = (nothing.fileno(), log.fileno(), log.fileno())
        try:
            codes = warm_ranks.run(ranks, *arguments, timeout=LIMIT, files=files).codes
        except subprocess.TimeoutExpired:
            return f"no end within {LIMIT} s"
    if results.exists():
        told = json.loads(results.read_text())["theirs"]
        return _words(told["error"], root) if told else torch.load(f"{results}.theirs.pt")["logits"].float()
    said = [line for line in noise.read_text().splitlines() if "Error: " in line]
    return _words(said[0], root) if said else f"ends with {codes}"


def _words(error: str, root: Path) -> str:
    return error.replace(f"{root}/", "").replace("|", "/")[:160]


def _apart(values: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the largest relative error, with two digits."""
    if values.shape != expected.shape or not values.isfinite().all():
        return math.inf
    return float(f"{distance(values, expected)[1]:.1e}")


def is_exact(record: dict[str, Any]) -> bool:
    """Whether the case computed what one process does on every mesh, natively too, and every merge gave its bytes
    back."""
    ran = quantized_cases.is_run(record["kind"])
    native = [one for one in record.get("native", {}).values() if isinstance(one, dict) and one["taken"]]
    return all(one["error"] <= one["limit"] for one in native) and all(
        result["merged"] and (not ran or (result["error"] <= EXACT and result["tokens"]))
        for result in record["meshes"].values()
    )
