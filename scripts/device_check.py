"""The parts of scripts/gpu_check, which says how to call it. It runs from the source tree in the environment as it is:
no pytest, nothing installed, nothing fetched.

Exit codes: 0 no part failed, though some may need more GPUs or more time; 1 a part failed; 2 the environment lacks
something.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
_BUDGET = 450  # seconds
_LEAST = 15  # seconds: no part begins with less left
_GRACE = 10  # seconds for the ranks of a part that did not end in time


@dataclass(frozen=True)
class Case:
    """A part that runs `ranks` on `device`, as `runtime.load` takes it, over `backend`. It takes `gpus` GPUs."""

    name: str
    device: str
    ranks: int
    backend: str
    gpus: int = 0

    def prepare(self, folder: Path) -> list[str]:
        """Make a checkpoint and resharded folders of it. Returns the words for torchrun to start.

        The started job writes its figures into `folder`/found.json.
        """
        import pico

        import reshard

        source = pico.save("qwen3", folder / "source")  # heads of 8 numbers, which flash kernels take
        reshard.convert(source, folder / "fp32", tp_size=self.ranks, sync=False, reference_logits=True)
        reshard.convert(source, folder / "bf16", tp_size=self.ranks, sync=False, dtype="bfloat16")
        job = {"device": self.device, "backend": self.backend}
        job["compiler"] = "inductor" if self.gpus else "aot_eager"
        job |= {name: str(folder / name) for name in ("source", "fp32", "bf16")}
        job["quantized"] = quantized(folder, self.ranks) if importlib.util.find_spec("bitsandbytes") else {}
        (folder / "job.json").write_text(json.dumps(job))
        worker = ROOT / "tests" / "tools" / "workers" / "on_device.py"
        return [str(worker), str(folder / "job.json"), str(folder / "found.json")]


def quantized(folder: Path, ranks: int) -> dict[str, list[str]]:
    """Make quantized checkpoints and resharded folders of them. Returns both, by kind."""
    import pico
    from quantizing import quantize_folder

    import reshard

    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 8, "num_key_value_heads": 4}
    plain, found = pico.save("llama", folder / "plain", **sizes, head_dim=64), {}
    for kind in ("nf4_nested", "int8", "fp8"):
        source, out = quantize_folder(plain, folder / kind, kind), folder / f"{kind}-ranks"
        reshard.convert(source, out, tp_size=ranks, sync=False)
        found[kind] = [str(source), str(out)]
    return found


CASES = (
    Case("cpu", "cpu", 2, "gloo"),
    Case("one GPU, one rank", "cuda", 1, "nccl", 1),
    Case("two GPUs", "cuda", 2, "nccl", 2),
    Case("one GPU, two ranks", "cuda:0", 2, "gloo", 1),
    Case("four GPUs", "cuda", 4, "nccl", 4),
    Case("one GPU, four ranks", "cuda:0", 4, "gloo", 1),
)


class OutOfTime(Exception):
    """The time for a part is over."""


class Failed(Exception):
    """A part has failed, and its output is printed already."""


def say(line: str) -> None:
    """Print a line at once."""
    print(line, flush=True)


def lacking() -> list[str]:
    """Return the requirements of pyproject.toml that the environment lacks, or has in an unsuitable version."""
    try:
        from packaging.requirements import Requirement
    except ImportError:
        return ["packaging"]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    found = []
    for wanted in map(Requirement, project["dependencies"]):
        try:
            version = importlib.metadata.version(wanted.name)
        except importlib.metadata.PackageNotFoundError:
            found.append(str(wanted))
            continue
        if not wanted.specifier.contains(version, prereleases=True):
            found.append(f"{wanted} (there is {version})")
    return found


def run(command: list[str]) -> None:
    """Run a command; its output is shown as it comes. When this part ends, the command and its processes end too."""
    with tempfile.TemporaryFile() as words:
        child = subprocess.Popen(command, cwd=ROOT, stderr=words)
        try:
            child.wait()
        finally:
            if child.poll() is None:
                end(child)
        if child.returncode:
            words.seek(0)
            last = words.read().decode(errors="replace").splitlines()[-25:]
            say("\n".join(f"    {line}" for line in last))
            raise Failed


def end(child: subprocess.Popen[bytes]) -> None:
    """End torchrun and its ranks. It ends them itself if it is terminated, but not if it is killed."""
    signal.setitimer(signal.ITIMER_REAL, 0)
    ranks = descendants(child.pid)
    child.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        child.wait(_GRACE)
    child.kill()
    child.wait()
    for pid in ranks:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def descendants(pid: int) -> list[int]:
    """Return the descendants of a process, if the system lists them."""
    try:
        listed = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return []
    return [found for child in map(int, listed) for found in (child, *descendants(child))]


def on_ranks(case: Case) -> None:
    from bench_common import torchrun

    with tempfile.TemporaryDirectory(prefix="gpu-check-") as folder:
        run([*torchrun(case.ranks), *case.prepare(Path(folder))])


def rate(device: str) -> None:
    layers = "16" if device == "cuda" else "1"
    script = str(ROOT / "scripts" / "bench_device.py")
    run([sys.executable, "-P", script, "--device", device, "--layers", layers, "--repeat", "3"])


def parts(device: str) -> Iterator[tuple[str, int, Callable[[], None]]]:
    """Yield the name, the number of GPUs and the work of each part, the most telling part first."""
    cases = [case for case in CASES if (case.gpus > 0) == (device == "cuda")]
    most_telling = 2 if device == "cuda" else 1
    for case in cases[:most_telling]:
        yield f"{case.name}, {case.backend}", case.gpus, lambda case=case: on_ranks(case)
    yield "rate of a load", int(device == "cuda"), lambda: rate(device)
    for case in cases[most_telling:]:
        yield f"{case.name}, {case.backend}", case.gpus, lambda case=case: on_ranks(case)


def out_of_time(*_: object) -> None:
    raise OutOfTime


def main() -> int:
    started = time.monotonic()
    parser = argparse.ArgumentParser(prog="scripts/gpu_check", description="Check what needs a GPU, in parts.")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--budget", type=float, default=_BUDGET, metavar="SECONDS", help="[default: %(default)s]")
    asked = parser.parse_args()
    if missing := lacking():
        say(f"this environment lacks: {', '.join(missing)}. Unpacked elsewhere, it is found by PYTHONPATH.")
        return 2
    # Processes that this starts find reshard and runtime here, ask no network, and leave nothing behind.
    paths = [
        str(ROOT),
        str(ROOT / "tests" / "tools"),
        str(ROOT / "scripts"),
        *filter(None, [os.environ.get("PYTHONPATH")]),
    ]
    sys.path[:0] = paths[:2]  # scripts is there
    quiet = dict.fromkeys(("HF_HUB_OFFLINE", "HF_HUB_DISABLE_TELEMETRY", "PYTHONDONTWRITEBYTECODE"), "1")
    os.environ.update({**quiet, "PYTHONPATH": os.pathsep.join(paths), "TOKENIZERS_PARALLELISM": "false"})
    import torch

    others = (f"{name} {importlib.metadata.version(name)}" for name in ("transformers", "huggingface_hub"))
    say(", ".join([f"Python {sys.version.split()[0]}", f"torch {torch.__version__}", *others]))
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if asked.device == "cuda":
        if not gpus:
            say("no CUDA device is available")
            return 2
        say(f"{gpus} × {torch.cuda.get_device_name(0)}, NCCL {'.'.join(map(str, torch.cuda.nccl.version()))}")
    signal.signal(signal.SIGALRM, out_of_time)
    left_out, failed = [], []
    for name, needs, work in parts(asked.device):
        left = asked.budget - (time.monotonic() - started)
        if needs > max(gpus, int(asked.device == "cpu")):
            say(f"{name}: skipped, it needs {needs} GPUs")
            continue
        if left < _LEAST:
            left_out.append(name)
            continue
        say(f"{name}:")
        began = time.monotonic()
        signal.setitimer(signal.ITIMER_REAL, left)
        try:
            work()
            signal.setitimer(signal.ITIMER_REAL, 0)
            say(f"  passed in {time.monotonic() - began:.0f} s")
        except OutOfTime:
            left_out.append(f"{name} (begun)")
        except Exception as error:
            say(f"  FAILED after {time.monotonic() - began:.0f} s{'' if isinstance(error, Failed) else f': {error!r}'}")
            failed.append(name)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
    if left_out:
        say(f"did not fit into {asked.budget:.0f} s: {'; '.join(left_out)}")
    say(f"failed: {'; '.join(failed)}" if failed else "nothing failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
