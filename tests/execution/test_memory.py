"""Memory does not grow with the model: anonymous memory of a whole `reshard convert`, above its imports."""

from __future__ import annotations

import contextlib
import subprocess
import time
from pathlib import Path

import pytest
import warm_commands
from big_checkpoints import LLAMA_1B, write

LIMIT = 300 << 20


def anonymous_peak(*arguments: str) -> int:
    """Peak of RssAnon, in bytes, of one run of the command (sampled every 5 ms)."""
    peak = 0
    with subprocess.Popen([warm_commands.python(), "-m", "reshard", *arguments], stdout=subprocess.DEVNULL) as process:
        while process.poll() is None:
            with contextlib.suppress(ValueError, FileNotFoundError, ProcessLookupError):  # not yet, or no more
                status = Path(f"/proc/{warm_commands.own_id(process)}/status").read_text()
                lines = [line for line in status.splitlines() if line.startswith("RssAnon:")]
                if lines:
                    peak = max(peak, int(lines[0].split()[1]) * 1024)
            time.sleep(0.005)
    assert process.returncode == 0
    assert peak
    return peak


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
def test_convert_of_two_gigabytes_stays_flat(tmp_path: Path) -> None:
    _, total = write(tmp_path / "source", {**LLAMA_1B, "num_hidden_layers": 10})
    assert total >= 2 << 30
    command = ["convert", str(tmp_path / "source"), str(tmp_path / "out"), "-tp", "4"]
    planning = anonymous_peak(*command, "--dry-run")
    whole = anonymous_peak(*command)
    assert whole - planning < LIMIT, f"{(whole - planning) >> 20} MB above the imports"
    for options in (["--quantize", "nf4"], ["--quantize", "fp8"]):
        quantizing = anonymous_peak(*command, "--overwrite", *options)
        assert quantizing - planning < LIMIT, f"{options}: {(quantizing - planning) >> 20} MB above the imports"
