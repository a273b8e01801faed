"""OPT, which transformers has no plan for: its 350M shape, random, on 2 and 3 ranks, with a chosen attention kernel."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from places import WORKERS
from torchrun_tools import on_ranks

import reshard

IDS = torch.randint(3, 5000, (2, 12), generator=torch.Generator().manual_seed(3))
NEW_TOKENS = 6


def opt_350m(layers: int) -> Any:
    """Make a model of the shape of facebook/opt-350m: embeddings are narrower than the hidden states, norms come after
    the blocks. With fewer layers than its 24 the vocabulary is smaller too."""
    config = transformers.OPTConfig(
        **{"hidden_size": 1024, "ffn_dim": 4096, "num_attention_heads": 16, "word_embed_proj_dim": 512},
        **{"num_hidden_layers": layers, "vocab_size": 50272 if layers == 24 else 5000, "do_layer_norm_before": False},
    )
    torch.manual_seed(0)
    model = transformers.OPTForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn(parameter.shape) * 0.1)
    return model


@pytest.mark.parametrize("layers", [2, pytest.param(24, marks=pytest.mark.slow)])
def test_opt_computes_what_one_process_does(layers: int, tmp_path: Path) -> None:
    model = opt_350m(layers)
    model.save_pretrained(tmp_path / "source")
    with torch.inference_mode():
        logits = model(IDS).logits
        tokens = model.generate(IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=NEW_TOKENS, do_sample=False)
    for ranks in (2, 3):
        out = tmp_path / f"tp{ranks}"
        manifest = reshard.convert(tmp_path / "source", out, tp_size=ranks, sync=False)
        shares = [record.size for record in manifest.rank_files]
        assert max(shares) < (1 / ranks + 0.03) * sum(tensor.nbytes for tensor in model.parameters())
        job = {"name": "opt", "folder": str(out), "ids": IDS.tolist(), "new_tokens": NEW_TOKENS, "sdpa": "math"}
        (tmp_path / "jobs.json").write_text(json.dumps([job]))
        result = tmp_path / f"tp{ranks}.json"
        on_ranks(ranks, str(WORKERS / "parity.py"), str(tmp_path / "jobs.json"), str(result), timeout=300)
        found = torch.load(f"{result}.opt.pt")["logits"]
        assert (found - logits).abs().max() <= 1e-5 * logits.abs().max()
        assert json.loads(result.read_text())["opt"]["tokens"] == tokens.tolist()


def test_opt_quantized_while_cutting_computes_what_a_process_that_quantizes_at_its_start_does(tmp_path: Path) -> None:
    """In nf4, by bitsandbytes itself on the ranks too, which have 6, 5 and 5 of the 16 heads at tp 3."""
    opt_350m(1).save_pretrained(tmp_path / "source")
    config = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
    )
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "source", quantization_config=config)
    for module in model.modules():  # some CPUs have a kernel that computes in bf16
        module.__dict__["support_avx512bf16_for_cpu"] = False
    with torch.inference_mode():
        logits = model(IDS).logits
    tokens = model.generate(IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=NEW_TOKENS, do_sample=False)
    for ranks in (2, 3):
        out, result = tmp_path / f"tp{ranks}", tmp_path / f"tp{ranks}.json"
        reshard.convert(tmp_path / "source", out, tp_size=ranks, quantize="nf4", sync=False)
        job = {"name": "opt", "folder": str(out), "ids": IDS.tolist(), "new_tokens": NEW_TOKENS, "sdpa": "math"}
        (tmp_path / "jobs.json").write_text(json.dumps([{**job, "compute": "native"}]))
        done = on_ranks(ranks, str(WORKERS / "parity.py"), str(tmp_path / "jobs.json"), str(result), timeout=300)
        assert done.returncode == 0, done.stderr
        found = torch.load(f"{result}.opt.pt")["logits"]
        assert (found - logits).abs().max() <= 1e-5 * logits.abs().max()
        assert json.loads(result.read_text())["opt"]["tokens"] == tokens.tolist()


def test_the_general_plan_gathers_what_a_library_computes(tmp_path: Path) -> None:
    opt_350m(1).save_pretrained(tmp_path / "source")
    ids, result = {"ids": IDS.tolist(), "new_tokens": NEW_TOKENS, "sdpa": "math"}, tmp_path / "out.json"
    reshard.convert(tmp_path / "source", tmp_path / "out", tp_size=3, quantize="nf4", tp_plan="general", sync=False)
    jobs = [{"name": one, "folder": str(tmp_path / "out"), "compute": one, **ids} for one in ("native", "dequantised")]
    (tmp_path / "jobs.json").write_text(json.dumps(jobs))
    done = on_ranks(3, str(WORKERS / "parity.py"), str(tmp_path / "jobs.json"), str(result), timeout=300)
    assert done.returncode == 0, done.stderr
    native, plain = (torch.load(f"{result}.{job['name']}.pt")["logits"] for job in jobs)
    assert (native - plain).abs().max() <= 1e-5 * plain.abs().max()
