"""Plans of our own, and meshes with an expert axis: under torchrun on gloo they compute what the single-process
model does, and every reassembled parameter is the source's."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pico
import pytest
import torch
from family_inputs import inputs, main_output
from places import WORKERS
from single_process import NEW_TOKENS
from torchrun_tools import on_ranks
from unplanned import UNPLANNED, unplanned

import reshard
from reshard.planning.sizes import legal_sizes

# Families of tests/pico.py, with extra rules.
PLANNED: dict[str, tuple[str, dict[str, Any], dict[str, str]]] = {
    "phi3-packed": (
        "phi3",
        {},
        {"mlp.gate_up_proj": "packed_colwise[1,1]", "mlp.down_proj": "rowwise", "model.norm": "sequence_parallel"},
    ),
    "llama-local": (
        "llama",
        {"mlp_bias": True, "attention_bias": True},
        {
            **dict.fromkeys(("mlp.up_proj", "mlp.gate_proj", "self_attn.q_proj"), "local_colwise"),
            **dict.fromkeys(("mlp.down_proj", "self_attn.o_proj"), "local_rowwise"),
            **{"input_layernorm": "local", "embed_tokens": "replicate"},
        },
    ),
    "qwen3-replicated": (
        "qwen3",
        {},
        {**dict.fromkeys(("lm_head", "mlp.gate_proj", "mlp.down_proj"), "replicate"), "mlp.up_proj": "colwise_rep"},
    ),
}
# Meshes with an expert axis, by number of ranks.
MESHES = {2: ((2, 2), (1, 2)), 4: ((4, 4), (4, 2), (2, 4), (1, 4))}
MOE = tuple(pico.MOE)

Results = dict[str, dict[str, Any]]


@pytest.fixture(scope="module")
def singles(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """Each checkpoint, and the results of one process."""
    root, found = tmp_path_factory.mktemp("sources"), {}
    models = {name: unplanned(name) for name in UNPLANNED}
    models |= {name: pico.build(family, **options) for name, (family, options, _) in PLANNED.items()}
    models |= {family: pico.build(family) for family in MOE}
    for name, model in models.items():
        model.save_pretrained(root / name)
        arguments = inputs(model)
        torch.save(arguments, root / f"{name}.inputs")
        with torch.inference_mode():
            output = main_output(model(**arguments))
        tokens = None
        if model.can_generate():
            mask = torch.ones_like(arguments["input_ids"])
            tokens = model.generate(
                **arguments, attention_mask=mask, max_new_tokens=NEW_TOKENS, do_sample=False
            ).tolist()
        parameters = {key: tensor.clone() for key, tensor in model.state_dict().items()}
        found[name] = {"output": output, "tokens": tokens, "parameters": parameters, "source": root / name}
    return found


@pytest.fixture(scope="module")
def sharded(singles: Results, tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Results]:
    """`sharded(ranks)`: the results of so many ranks, made on the first call."""
    return functools.cache(lambda ranks: run(ranks, singles, tmp_path_factory.mktemp(f"ranks{ranks}")))


def run(ranks: int, singles: Results, root: Path) -> Results:
    """Convert, check against its source and run, in one job, every plan and mesh for this number of ranks."""
    cuts: dict[str, tuple[str, dict[str, Any]]] = {
        **{name: (name, {"tp_size": ranks, "tp_plan": plan}) for name, (_, _, plan) in UNPLANNED.items()},
        **{
            name: (name, {"tp_size": ranks, "tp_plan": {"extends": "auto", **plan}})
            for name, (_, _, plan) in PLANNED.items()
        },
        **{
            f"{family} tp{tp} ep{ep}": (family, {"tp_size": tp, "ep_size": ep})
            for family in MOE
            for tp, ep in MESHES[ranks]
        },
    }
    jobs = []
    for name, (checkpoint, cut) in cuts.items():
        single = singles[checkpoint]
        reshard.convert(single["source"], root / name, **cut)
        reshard.verify(root / name, against=single["source"])
        new_tokens = None if single["tokens"] is None else NEW_TOKENS
        arguments = f"{single['source']}.inputs"
        jobs.append({"name": name, "folder": str(root / name), "inputs": arguments, "new_tokens": new_tokens})
    (root / "jobs.json").write_text(json.dumps(jobs))
    done = on_ranks(ranks, str(WORKERS / "parity.py"), str(root / "jobs.json"), str(root / "out.json"))
    assert done.returncode == 0, done.stderr
    results = json.loads((root / "out.json").read_text())
    return {
        name: {**results[name], **torch.load(root / f"out.json.{name}.pt"), "single": singles[checkpoint]}
        for name, (checkpoint, _) in cuts.items()
    }


CASES = [
    (ranks, name)
    for ranks, meshes in MESHES.items()
    for name in (*UNPLANNED, *PLANNED, *(f"{family} tp{tp} ep{ep}" for family in MOE for tp, ep in meshes))
]


@pytest.mark.parametrize(("ranks", "name"), CASES)
def test_computes_what_one_process_does(ranks: int, name: str, sharded: Callable[[int], Results]) -> None:
    found = sharded(ranks)[name]
    single = found["single"]
    error = (found["logits"] - single["output"]).abs().max() / single["output"].abs().max()
    assert error <= 1e-5
    assert found["tokens"] == single["tokens"]
    for key, tensor in single["parameters"].items():
        assert torch.equal(found["parameters"][key], tensor), key


@pytest.mark.parametrize("ranks", MESHES)
def test_parameters_are_dtensors_unless_local_was_asked_for(ranks: int, sharded: Callable[[int], Results]) -> None:
    for name, found in sharded(ranks).items():
        kept_local = set(found["plain"])
        if name == "llama-local":
            assert "model.layers.0.mlp.up_proj.weight" in kept_local
            assert "model.layers.0.self_attn.k_proj.weight" not in kept_local
        elif name == "t5":
            assert kept_local == {
                f"{s}.block.0.layer.0.SelfAttention.relative_attention_bias.weight" for s in ("encoder", "decoder")
            }
        else:
            assert not kept_local, name


def test_a_rule_that_cuts_nothing_is_refused(singles: Results) -> None:
    with pytest.raises(reshard.ReshardError, match="cuts nothing") as caught:
        reshard.plan(singles["bert"]["source"], tp_size=2, tp_plan={"bert.encoder.layer.*.attention": "colwise"})
    assert caught.value.hint == "name the modules inside it"


def test_a_model_without_a_plan_gets_ours(singles: Results) -> None:
    planned = reshard.plan(singles["bert"]["source"], tp_size=2)
    styles = {target.name: target.style for target in planned.targets}
    assert styles["bert.encoder.layer.0.attention.self.query.weight"] == "colwise"
    assert styles["bert.encoder.layer.0.attention.output.dense.weight"] == "rowwise"
    assert "bert.encoder.layer.*.attention.self.query" in planned.model.added_rules
    assert not any("of the bytes are on every rank" in note for note in planned.notes)
    assert [size for size, why in legal_sizes(planned.model).items() if why is None] == list(range(1, 9))


def test_more_ranks_than_heads_are_refused_and_the_general_plan_is_named(singles: Results) -> None:
    with pytest.raises(reshard.ReshardError, match="has only 8 query heads") as caught:
        reshard.plan(singles["bert"]["source"], tp_size=9)
    assert caught.value.exit_code == 9
    assert "--plan general" in (caught.value.hint or "")
    general = reshard.plan(singles["bert"]["source"], tp_size=9, tp_plan="general")
    assert {target.style for target in general.targets} >= {"colwise_gather_output", "embedding_rowwise"}


def test_a_plan_that_cuts_little_says_what_would_help(singles: Results, checkpoint: Any) -> None:
    little = reshard.plan(
        singles["bert"]["source"], tp_size=2, tp_plan={"encoder.layer.*.intermediate.dense": "colwise_gather_output"}
    )
    (note,) = [note for note in little.notes if "of the bytes are on every rank" in note]
    assert "--plan general" in note
    assert "bert.embeddings.word_embeddings.weight" in note
    experts = checkpoint("qwen3_moe")
    dense = reshard.plan(experts, tp_size=2, tp_plan={"layers.*.self_attn.o_proj": "rowwise_split_input"})
    assert any("--ep-size 2 spreads whole experts" in note for note in dense.notes)
    whole = reshard.plan(experts, tp_size=1, ep_size=2)
    assert any("--tp-size 2 cuts what is no expert" in note for note in whole.notes)
