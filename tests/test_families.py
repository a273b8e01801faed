"""Whatever family of model transformers can shard: resharded, it computes what one process does."""

from __future__ import annotations

from pathlib import Path

import matrix
import pytest
import transformers

# What is wrong is upstream's: one process is right, and no tensor-parallel run of these plans can be.
WRONG_PLANS = {
    "diffusion_gemma": "only the encoder's attention is cut, and the decoder appends its whole heads to the same cache",
    "doge": "dt_proj is rowwise, so every rank has the mask of all heads, and only its own heads' keys",
    "esmc": "q_norm and k_norm are over the whole hidden size, and each rank has its own heads' part",
    "gemma3n_text": "each rank's sparse activation takes the mean and deviation of its own slice",
    "glm5_next": "the linear attention's o_proj is cut, the projections before it are not",
    "glm5_next_text": "as glm5_next",
    "neomme": "the whole value embeddings are added to, and alpha scales, only this rank's heads",
}
# At least this many families must come through, so that a builder that breaks is noticed.
FEWEST = {"5.17": 74, "5.23": 234}


@pytest.mark.parametrize("world_size", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_every_family(tmp_path: Path, world_size: int) -> None:
    rows = matrix.walk(tmp_path, world_size)
    broken = [
        (row.family, row.step, row.detail, row.error, row.equal_tokens)
        for row in rows
        if row.step in ("convert", "run", "parity") and not row.ok and row.family not in WRONG_PLANS
    ]
    assert broken == []
    release = ".".join(transformers.__version__.split(".")[:2])
    assert sum(row.ok for row in rows) >= FEWEST.get(release, 74)
