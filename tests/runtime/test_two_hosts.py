"""Two hosts with a shared folder: each makes a part, takes its ranks' files, and runs them over the network."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from cli_tools import Checkpoint, tree
from places import WORKERS
from single_process import IDS, NEW_TOKENS
from transformers import AutoModelForCausalLM
from two_hosts import Host, two_hosts, why_not

import reshard


@pytest.fixture
def hosts() -> Iterator[tuple[Host, Host]]:
    if reason := why_not():
        pytest.skip(reason)
    with two_hosts() as found:
        yield found


def ended(*processes: subprocess.Popen[str]) -> list[str]:
    """Return what the processes print, once all have ended well."""
    try:
        said = [process.communicate(timeout=60) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert all(process.returncode == 0 for process in processes), said
    return [out for out, _ in said]


def test_from_a_shared_folder_to_the_logits_of_one_process(
    hosts: tuple[Host, Host], checkpoint: Checkpoint, tmp_path: Path
) -> None:
    source, shared = checkpoint("llama"), tmp_path / "shared" / "out"
    shared.parent.mkdir()
    nodes = [(host, {"SLURM_PROCID": str(number), "SLURM_NTASKS": "2"}) for number, host in enumerate(hosts)]
    convert = ("reshard", "convert", str(source), str(shared), "--tp-size", "4", "--part", "auto")
    ended(*(host.start(*convert, **variables) for host, variables in nodes))
    reshard.convert(source, tmp_path / "one", tp_size=4)
    reshard.finish(shared)  # unless one of the two has
    assert tree(shared) == tree(tmp_path / "one")

    with hosts[0].serve(shared.parent) as url:
        pull = ("reshard", "pull", f"{url}/out", "--part", "auto", "--to")
        ended(*(host.start(*pull, str(tmp_path / host.name), **variables) for host, variables in nodes))
    for host, ranks in zip(hosts, ((1, 2), (3, 4))):
        held = sorted(path.name for path in (tmp_path / host.name).glob("shard-*"))
        assert held == [f"shard-0000{rank}-model-00001-of-00001.safetensors" for rank in ranks]

    runs = []
    for host in hosts:
        jobs = tmp_path / f"{host.name}.json"
        job = {"name": "llama", "folder": str(tmp_path / host.name), "ids": IDS.tolist(), "new_tokens": NEW_TOKENS}
        jobs.write_text(json.dumps([job]))
        # The hosts have one name, by which torchrun would tell whose the endpoint is.
        at = ("--rdzv-endpoint", f"{hosts[0].address}:29400", "--rdzv-conf", f"is_host={host is hosts[0]}")
        meeting = ("--nnodes", "2", "--rdzv-backend", "c10d", *at, "--local-addr", host.address)
        command = ("torchrun", *meeting, "--nproc-per-node", "2", str(WORKERS / "parity.py"))
        runs.append(host.start(*command, str(jobs), str(tmp_path / "found.json"), PYTHONPATH=":".join(sys.path)))
    ended(*runs)
    model = AutoModelForCausalLM.from_pretrained(source).eval()
    with torch.inference_mode():
        expected = model(IDS).logits
        tokens = model.generate(IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=NEW_TOKENS, do_sample=False)
    found = torch.load(tmp_path / "found.json.llama.pt")["logits"]
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert json.loads((tmp_path / "found.json").read_text())["llama"]["tokens"] == tokens.tolist()
