"""Ways to decode with the same tokens: without gathering logits, compiled, with a static cache."""

from __future__ import annotations

from pathlib import Path

import pico
import pytest
from places import WORKERS
from torchrun_tools import on_ranks

import reshard


@pytest.mark.parametrize(
    ("family", "layers", "gathers", "backend"),
    [
        ("llama", 1, "once", "aot_eager"),
        ("qwen3_moe", 2, "once", "aot_eager"),  # the second without experts
        ("gemma2", 2, "always", "aot_eager"),  # its logits are capped after the head
        pytest.param("llama", 2, "once", "inductor", marks=pytest.mark.slow),
    ],
)
def test_every_way_to_decode_gives_the_same_tokens(
    family: str, layers: int, gathers: str, backend: str, tmp_path: Path
) -> None:
    source = pico.save(family, tmp_path / "source", num_hidden_layers=layers)
    reshard.convert(source, tmp_path / "out", tp_size=2, sync=False)
    done = on_ranks(2, str(WORKERS / "decoding.py"), str(source), str(tmp_path / "out"), gathers, backend)
    assert done.returncode == 0, done.stderr
    assert "all ways agree" in done.stdout
