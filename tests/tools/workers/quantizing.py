"""Run under torchrun: quantizing.py FOLDER SOURCE OUT.json

Checks a folder that was quantized when it was made: layer by layer with SOURCE, the checkpoint before that, natively
and dequantised, and with the stored logits. Rank 0 writes the results into OUT.
"""

import json
import os
import sys
from pathlib import Path

import torch.distributed as dist

import runtime
from runtime.checking.check import check


def main(folder: str, source: str, out: str) -> None:
    found = {"native": check(runtime.load(folder), source, per_layer=True).to_json()}
    model = runtime.load(folder, compute="dequantised")
    found |= {"source": check(model, source, per_layer=True).to_json(), "stored": check(model).to_json()}
    if dist.get_rank() == 0:
        Path(out).write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


main(*sys.argv[1:])
os._exit(0)  # gloo's threads can abort the interpreter while it shuts down, when all is done
