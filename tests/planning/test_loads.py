"""What each rank holds: heads, weights and KV cache, compared with real caches and with the layouts of the files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import families
import pico
import pytest
import torch
from cli_tools import Checkpoint, Cli
from family_inputs import inputs

import reshard
from reshard.planning.model.cache import cache_layers, cached_elements
from reshard.planning.model.heads import heads_of
from reshard.planning.model.rules import AUTO, expand, model_rules
from reshard.planning.plan import plan_layouts
from reshard.sharding.topology import Topology

# Grouped heads, windows, latents, shared caches, linear attention, fused projections, blocks of heads.
CACHES = (
    *(
        "llama",
        "mistral",
        "gemma3_text",
        "gemma3n_text",
        "deepseek_v2",
        "deepseek_v3",
        "qwen3_next",
        "gpt_neox",
        "phi3",
    ),
    *("codegen", "gpt_oss", "falcon_h1", "nemotron_h", "dbrx", "hrm_text", "llama4_text", "jamba"),
)


@pytest.mark.parametrize("family", CACHES)
def test_the_cache_is_as_large_as_a_real_one(family: str) -> None:
    """After a forward, transformers' own cache has that many elements for each sequence."""
    try:
        model = families.build(family)
    except Exception as error:
        pytest.skip(f"{family}: {error}")
    if model is None:
        pytest.skip(f"{family} has no plan")
    layers = layers_of(model)
    arguments = inputs(model)
    with torch.inference_mode():
        outputs = model(**arguments, use_cache=True)
    cache = outputs["past_key_values"] if "past_key_values" in outputs else outputs["cache"]
    kept = [layer for layer in cache.layers if isinstance(getattr(layer, "keys", None), torch.Tensor)]
    sequences, tokens = arguments["input_ids"].shape
    real = sum(layer.keys.numel() + layer.values.numel() for layer in kept)
    assert real == sequences * cached_elements(layers, Topology(1), tokens)[0] > 0


def layers_of(model: Any) -> Any:
    styles = expand(model, model_rules(model, AUTO).styles, {}).parameters
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    return cache_layers(model, heads_of(model, styles, shapes))


def test_windows_are_never_outgrown() -> None:
    layers = layers_of(families.build("gemma3_text"))  # one layer with a window of 16, one without
    token = 2 * 2 * 8
    assert cached_elements(layers, Topology(1), 10) == (2 * token * 10,)
    assert cached_elements(layers, Topology(1), 1000) == (token * 16 + token * 1000,)
    assert cached_elements(layers, Topology(2), 1000) == (token * 508, token * 508)


@pytest.mark.parametrize("tp", [1, 2, 3, 4, 5, 7, 8, 9])
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_ranks_cache_what_their_projections_make(family: str, tp: int, tmp_path: Path) -> None:
    heads = {"num_attention_heads": 9, "num_key_value_heads": 3, "hidden_size": 36}
    planned = reshard.plan(pico.save(family, tmp_path / "source", **heads), tp_size=tp)
    report = planned.to_dict()
    for layout, load in zip(plan_layouts(planned), report["ranks"], strict=False):
        shapes = {slot.tensor.name: slot.tensor.shape for slot in layout.slots}
        rows = sum(s[0] for n, s in shapes.items() if n.endswith(("k_proj.weight", "v_proj.weight")))
        assert load["kv_bytes_per_token"] == rows * 4
        assert load["kv_bytes"] == rows * 4 * 64
        (held,) = load["heads"]
        assert held["query"] * 4 == shapes["model.layers.0.self_attn.q_proj.weight"][0]
        assert held["key_value"] * 4 == shapes["model.layers.0.self_attn.k_proj.weight"][0]
        assert load["weight_bytes"] == sum(slot.tensor.nbytes for slot in layout.slots)
    repeated = sum(load["heads"][0]["key_value"] for load in report["ranks"])
    said = [note for note in report["notes"] if "KV heads are held" in note]
    assert said == (
        [f"9 query heads on {tp} ranks: the 3 KV heads are held {repeated} times in all, and so is their KV cache"]
        if repeated > 3
        else []
    )
    largest = max(load["weight_bytes"] for load in report["ranks"])
    whole = sum(target.nbytes for target in planned.targets)
    assert report["even_shares"] == pytest.approx(largest * tp / whole, abs=1e-4)


def test_the_table_of_sizes(checkpoint: Checkpoint, cli: Cli) -> None:
    source = checkpoint("llama")
    sizes = reshard.sizes(source, batch_size=2)
    assert [size.topology.world_size for size in sizes] == list(range(1, 9))
    for size in sizes:
        report = reshard.plan(source, tp_size=size.topology.tp, batch_size=2).to_dict()
        fullest = max(report["ranks"], key=lambda rank: rank["weight_bytes"] + rank["kv_bytes"])
        assert {key: size.to_dict()[key] for key in fullest} == fullest
        assert size.to_dict()["even_shares"] == report["even_shares"]
    found = json.loads(cli("plan", source, "--batch-size", 2, "--format", "json").out)
    assert found == {"sizes": [size.to_dict() for size in sizes]}
    lines = cli("plan", source).out.splitlines()
    assert len(lines) == 1 + len(sizes)
    third = sizes[2].to_dict()
    shown = [f"{third['even_shares']:.2f}", f"{third['replicated_share']:.1%}", "128", "4", "with", "2", "KV"]
    assert [word for word in lines[3].split() if word in shown] == shown


def test_experts_of_every_size(checkpoint: Checkpoint) -> None:
    sizes = reshard.sizes(checkpoint("qwen3_moe"), ep_size=4)
    assert {(size.topology.tp, size.topology.ep) for size in sizes} == {(1, 4), (2, 4), (4, 4), (8, 4)}


def test_a_model_whose_cache_is_not_known_is_planned(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(_: object) -> Any:
        raise ValueError("a configuration of an unusual kind")

    monkeypatch.setattr(reshard.planning.model.cache, "_windows", unknown)
    report = reshard.plan(checkpoint("llama"), tp_size=2).to_dict()
    assert {rank["kv_bytes_per_token"] for rank in report["ranks"]} == {None}
    assert reshard.plan(checkpoint("llama"), gpu_memory=10**9).world_size == 1
