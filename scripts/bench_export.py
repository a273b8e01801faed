"""A benchmark of exports for vLLM: against `cp` and vLLM's own saver, and what vLLM's loaders make of the files.

    scripts/engine_env vllm --only
    .venv/bin/python scripts/bench_export.py

`export` is from a copy plan that is at hand, and `plan` is what vLLM takes to make it. `saver` is a program in vLLM's
environment that loads the checkpoint on 2 ranks and calls vLLM's saver before anything is rearranged: only so would its
files load again. The loads are those of vLLM's loaders on 2 ranks, one thread each, without imports.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import click
from bench_common import same_memory, warm
from big_checkpoints import LLAMA_1B, QWEN3_MOE, write

ROOT = Path(__file__).parent.parent
PYTHON = ROOT / ".venv-vllm" / "bin" / "python"
WORKERS = ROOT / "tests" / "tools" / "workers"
RESHARD = [sys.executable, "-P", "-m", "reshard"]
MODELS = {"llama 1B": LLAMA_1B, "experts": QWEN3_MOE}
ALONE = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_PLUGINS": "", "VLLM_LOGGING_LEVEL": "ERROR"}


def timed(*commands: list[str]) -> tuple[float, float]:
    """Return the seconds that commands take together, and the largest resident set of their processes, in MiB: mapped
    files are in it."""
    start, peak = time.perf_counter(), 0.0
    for command in commands:
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        process = subprocess.Popen(command, env={**os.environ, **ALONE}, **quiet)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            raise subprocess.CalledProcessError(process.returncode, command)
        peak = max(peak, usage.ru_maxrss / 1024)
    return time.perf_counter() - start, peak


def loads(jobs: list[dict[str, object]], folder: Path) -> list[float]:
    path = folder / "jobs.json"
    path.write_text(json.dumps(jobs))
    command = [str(PYTHON), "-P", str(WORKERS / "vllm_load.py"), str(path), "2"]
    done = subprocess.run(command, check=True, env={**os.environ, **ALONE}, capture_output=True, text=True)
    return json.loads(next(line for line in done.stdout.splitlines() if line.startswith("SECONDS "))[8:])


@click.command()
@click.option("--repeat", default=3, show_default=True, help="Runs of each; medians are printed.")
@click.option("--model", "names", multiple=True, default=tuple(MODELS), type=click.Choice(list(MODELS)))
@click.option("--layers", type=int, help="Number of layers.  [default: the configuration's]")
def main(repeat: int, names: tuple[str, ...], layers: int | None) -> None:
    """Print seconds and ratios for each model."""
    for name in names:
        config = {**MODELS[name], **({"num_hidden_layers": layers} if layers else {})}
        with tempfile.TemporaryDirectory() as root:
            folder = Path(root)
            source, out = folder / "source", folder / "out"
            count, size = write(source, config, filled=True)
            click.echo(f"\n{name}: {count:,} tensors, {size / 1e9:.2f} GB, tp 2, medians of {repeat}")
            export = [*RESHARD, "export", str(source), str(out)]
            planned, _ = timed([*export, "-tp", "2", "--engine-python", str(PYTHON), "--dry-run"])
            timed([*export, "-tp", "2", "--engine-python", str(PYTHON), "--no-sync"])
            kept = folder / "plan"
            shutil.copy(out / "reshard.copy-plan.gz", kept)
            shutil.move(out, folder / "sharded")
            contenders = {
                "cp -r, sync": [["cp", "-r", str(source), str(out)], ["sync"]],
                "export": [[*export, "--plan", str(kept)]],
            }
            took: dict[str, list[float]] = {contender: [] for contender in contenders}
            peak = 0.0
            for _ in range(repeat):
                for contender, commands in contenders.items():
                    shutil.rmtree(out, ignore_errors=True)
                    warm(source)
                    same_memory(2)
                    seconds, peak = timed(*commands)  # the last is the export's
                    took[contender].append(seconds)
            shutil.rmtree(out, ignore_errors=True)
            out.mkdir()
            (folder / "save.json").write_text(
                json.dumps([{"folder": str(source), "out": str(out), "ep": False, "dtype": "bfloat16"}])
            )
            warm(source)
            same_memory(2)
            saver, saver_peak = timed(
                [str(PYTHON), "-P", str(WORKERS / "vllm_saver.py"), str(folder / "save.json"), "2", "1"], ["sync"]
            )
            base = statistics.median(took["cp -r, sync"])
            for contender, seconds in took.items():
                click.echo(
                    f"  {contender:22} {statistics.median(seconds):6.2f} s   {statistics.median(seconds) / base:.2f}"
                )
            click.echo(f"  {'plan':22} {planned:6.2f} s   {planned / base:.2f}")
            click.echo(f"  {'saver of vLLM, sync':22} {saver:6.2f} s   {saver / base:.2f}")
            click.echo(f"  largest process: export {peak:.0f} MiB, a rank of the saver {saver_peak:.0f} MiB")
            jobs = [
                {"folder": str(place), "format": form, "cold": cold}
                for cold in (False, True)
                for place, form in ((source, "auto"), (folder / "sharded", "sharded_state"))
            ]
            for place in (source, folder / "sharded"):
                warm(place)
            found = [loads(jobs, folder) for _ in range(repeat)]  # a process keeps the models that it has loaded
            for what, seconds in zip(("auto", "sharded_state", "auto, cold", "sharded_state, cold"), zip(*found)):
                click.echo(f"  load {what:22} {statistics.median(seconds):6.2f} s")


if __name__ == "__main__":
    main()
