"""Run under torchrun: what else a loaded quantized model does.

    quantized.py FOLDER SOURCE SAVED OUT.json

Checks the model layer by layer against SOURCE, then again with a weight changed on the last rank, and saves the model
into SAVED. Rank 0 writes OUT: the results of both checks, what the load reports, and what the model says of itself.
"""

import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist

import runtime
from runtime.checking.check import check
from runtime.loading.phases import load_report


def main(folder: str, source: str, saved: str, out: str) -> None:
    model = runtime.load(folder, compute="dequantised")
    report = load_report(model)
    good = check(model, source, per_layer=True)
    model.save_pretrained(saved)
    weight = dict(model.named_parameters())["model.layers.1.mlp.down_proj.weight"]
    if dist.get_rank() == dist.get_world_size() - 1:
        with torch.no_grad():
            (weight.to_local() if hasattr(weight, "to_local") else weight)[0, 0] += 1
    bad = check(model, source, per_layer=True)
    if dist.get_rank() == 0:
        config = model.config.to_dict()
        told = {
            "good": good.to_json(),
            "bad": bad.to_json(),
            "quantization": config.get("quantization_config"),
            "report": report,
        }
        Path(out).write_text(json.dumps(told))
    dist.barrier()
    dist.destroy_process_group()


main(*sys.argv[1:])
os._exit(0)  # gloo's threads can abort the interpreter while it shuts down, when all is done
