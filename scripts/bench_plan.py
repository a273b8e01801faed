"""Planning at scale: time and memory of `reshard.plan` on checkpoints whose files are sparse, so they cost no disk.

    .venv/bin/python scripts/bench_plan.py [--repeat 3]

Each case runs in a process of its own. `plan` is the time of `reshard.plan` after the imports, `imports` what those
take (the model's own module included), `memory` the largest anonymous memory of the process.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import click

LLAMA_70B = {
    **{"architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "bfloat16", "vocab_size": 128256},
    **{"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64},
    **{"num_key_value_heads": 8, "head_dim": 128, "tie_word_embeddings": False},
}
DEEPSEEK_V3 = {
    **{"architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3", "dtype": "bfloat16"},
    **{"vocab_size": 129280, "hidden_size": 7168, "intermediate_size": 18432, "moe_intermediate_size": 2048},
    **{"num_hidden_layers": 61, "num_attention_heads": 128, "num_key_value_heads": 128, "n_routed_experts": 256},
    **{"n_shared_experts": 1, "num_experts_per_tok": 8, "first_k_dense_replace": 3, "n_group": 8, "topk_group": 4},
    **{"q_lora_rank": 1536, "kv_lora_rank": 512, "qk_rope_head_dim": 64, "qk_nope_head_dim": 128, "v_head_dim": 128},
    "tie_word_embeddings": False,
}
Tensors = Iterator[tuple[str, str, list[int]]]

MEASURE = """
import json, resource, sys, time
start = time.perf_counter()
import reshard, torch, transformers
from reshard.conversion import plan, plan_layouts
from importlib import import_module
kind = json.load(open(sys.argv[1] + "/config.json"))["model_type"]
import_module(f"transformers.models.{kind}.modeling_{kind}")
imported = time.perf_counter()
planned = plan(sys.argv[1], **json.loads(sys.argv[2]))
done = time.perf_counter()
plan_layouts(planned)
laid = time.perf_counter()
anonymous = next(int(line.split()[1]) for line in open("/proc/self/smaps_rollup") if line.startswith("Anonymous:"))
print(json.dumps([imported - start, done - imported, laid - done, anonymous / 1024]))
"""


def llama(config: dict) -> Tensors:
    """Name, dtype and shape of every tensor, in order."""
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    heads, kv = (config[f"num_{kind}_heads"] * config["head_dim"] for kind in ("attention", "key_value"))
    yield "model.embed_tokens.weight", "BF16", [config["vocab_size"], hidden]
    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}"
        for name, rows in (("q_proj", heads), ("k_proj", kv), ("v_proj", kv)):
            yield f"{at}.self_attn.{name}.weight", "BF16", [rows, hidden]
        yield f"{at}.self_attn.o_proj.weight", "BF16", [hidden, heads]
        yield from mlp(f"{at}.mlp", hidden, inner)
        yield from norms(at, hidden)
    yield "model.norm.weight", "BF16", [hidden]
    yield "lm_head.weight", "BF16", [config["vocab_size"], hidden]


def mlp(at: str, hidden: int, inner: int) -> Tensors:
    for name in ("gate_proj", "up_proj"):
        yield f"{at}.{name}.weight", "BF16", [inner, hidden]
    yield f"{at}.down_proj.weight", "BF16", [hidden, inner]


def norms(at: str, hidden: int) -> Tensors:
    for name in ("input_layernorm", "post_attention_layernorm"):
        yield f"{at}.{name}.weight", "BF16", [hidden]


def deepseek(config: dict) -> Tensors:
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    q_rank, kv_rank, rope = config["q_lora_rank"], config["kv_lora_rank"], config["qk_rope_head_dim"]
    nope, value, small = config["qk_nope_head_dim"], config["v_head_dim"], config["moe_intermediate_size"]
    yield "model.embed_tokens.weight", "BF16", [config["vocab_size"], hidden]
    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}"
        yield f"{at}.self_attn.q_a_proj.weight", "BF16", [q_rank, hidden]
        yield f"{at}.self_attn.q_a_layernorm.weight", "BF16", [q_rank]
        yield f"{at}.self_attn.q_b_proj.weight", "BF16", [heads * (nope + rope), q_rank]
        yield f"{at}.self_attn.kv_a_proj_with_mqa.weight", "BF16", [kv_rank + rope, hidden]
        yield f"{at}.self_attn.kv_a_layernorm.weight", "BF16", [kv_rank]
        yield f"{at}.self_attn.kv_b_proj.weight", "BF16", [heads * (nope + value), kv_rank]
        yield f"{at}.self_attn.o_proj.weight", "BF16", [hidden, heads * value]
        yield from norms(at, hidden)
        if layer < config["first_k_dense_replace"]:
            yield from mlp(f"{at}.mlp", hidden, config["intermediate_size"])
            continue
        yield f"{at}.mlp.gate.weight", "BF16", [config["n_routed_experts"], hidden]
        yield f"{at}.mlp.gate.e_score_correction_bias", "F32", [config["n_routed_experts"]]
        yield from mlp(f"{at}.mlp.shared_experts", hidden, small)
        for expert in range(config["n_routed_experts"]):
            yield from mlp(f"{at}.mlp.experts.{expert}", hidden, small)
    yield "model.norm.weight", "BF16", [hidden]
    yield "lm_head.weight", "BF16", [config["vocab_size"], hidden]


def write(folder: Path, config: dict, tensors: Tensors, files: int) -> int:
    """A checkpoint of `files` sparse files and an index. Returns the number of tensors."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    listed = list(tensors)
    share = -(-len(listed) // files)
    weight_map = {}
    for number in range(files):
        name = f"model-{number + 1:05d}-of-{files:05d}.safetensors"
        header, at = {}, 0
        for tensor, dtype, shape in listed[number * share : (number + 1) * share]:
            size = (4 if dtype == "F32" else 2) * (shape[0] * shape[1] if len(shape) == 2 else shape[0])
            header[tensor] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + size]}
            weight_map[tensor] = name
            at += size
        text = json.dumps(header).encode()
        with open(folder / name, "wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            file.truncate(8 + len(text) + at)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return len(listed)


@click.command()
@click.option("--repeat", default=3, show_default=True, help="Runs of each case; medians are printed.")
def main(repeat: int) -> None:
    """Plan a 70B llama and a DeepSeek-V3 and print how long it takes."""
    with tempfile.TemporaryDirectory() as root:
        cases = [
            ("llama 70B", write(Path(root, "llama"), LLAMA_70B, llama(LLAMA_70B), 30), "llama", {"tp_size": 8}),
            ("DeepSeek-V3", write(Path(root, "v3"), DEEPSEEK_V3, deepseek(DEEPSEEK_V3), 163), "v3", {"tp_size": 16}),
            ("DeepSeek-V3", len(list(deepseek(DEEPSEEK_V3))), "v3", {"tp_size": 16, "ep_size": 16}),
        ]
        click.echo(f"{'case':14} {'tensors':>8}  {'mesh':28} {'imports':>8} {'plan':>8} {'layout':>8} {'memory':>9}")
        for name, tensors, folder, sizes in cases:
            command = [sys.executable, "-c", MEASURE, str(Path(root, folder)), json.dumps(sizes)]
            runs = [json.loads(subprocess.check_output(command, text=True)) for _ in range(repeat)]
            imports, plan, layout, memory = map(statistics.median, zip(*runs))
            mesh = ", ".join(f"{key} {size}" for key, size in sizes.items())
            click.echo(
                f"{name:14} {tensors:8,}  {mesh:28} {imports:6.2f} s {plan:6.2f} s {layout:6.2f} s {memory:6.0f} MiB"
            )


if __name__ == "__main__":
    main()
