"""A file for --strategies, which every rank runs before it loads: it makes one rank fail in one phase of the load.

FAULT is "RANK PHASE KIND". Every rank writes its process id to a file in FAULT_LOG named by its rank. The load begins
when all have done so, and imports nothing more, so that a deadline of seconds is enough on a busy machine.
"""

import os
import signal
import time
from pathlib import Path

import torch.distributed as dist
import transformers.models.llama.modeling_llama  # noqa: F401

import runtime.loading.load
import runtime.loading.prepare
from reshard.errors import IntegrityError
from reshard.strategies import ALL_PARALLEL_STYLES, ColwiseParallel

PHASES = {
    "handshake": (dist, "rendezvous"),
    "open": (runtime.loading.prepare, "locate_together"),
    "import": (runtime.loading.prepare, "model_class"),
    "build": (runtime.loading.prepare, "on_meta"),
    "read": (runtime.loading.prepare, "_begin"),
    "agree": (runtime.loading.load, "agree"),
    "mesh": (runtime.loading.load, "make_mesh"),
    "group": (dist, "init_process_group"),
    "wrap": (runtime.loading.load, "distribute"),
}


def fail(kind: str) -> None:
    if kind == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif kind == "kill torchrun":
        os.kill(os.getppid(), signal.SIGKILL)
    elif kind == "stop":
        signal.raise_signal(signal.SIGSTOP)  # to this thread: it does nothing more before all threads stop
    elif kind == "sleep":
        time.sleep(3600)
    else:
        raise {"raise": IntegrityError("injected", hint="mend it"), "crash": RuntimeError("injected")}[kind]


def break_phase(phase: str, kind: str) -> None:
    module, name = PHASES[phase]
    real = getattr(module, name)

    def faulty(*arguments, **options):
        setattr(module, name, real)
        if phase != "read":
            fail(kind)
            return real(*arguments, **options)
        arriving = real(*arguments, **options)
        return lambda: (fail(kind), arriving())[1]

    setattr(module, name, faulty)


def begin(rank: str, world_size: int) -> None:
    folder = Path(os.environ["FAULT_LOG"])
    (folder / f"{rank}.part").write_text(str(os.getpid()))
    (folder / f"{rank}.part").rename(folder / rank)
    while len([path for path in folder.iterdir() if not path.suffix]) < world_size:
        time.sleep(0.01)


ALL_PARALLEL_STYLES.register_strategy("faulty", ColwiseParallel())  # a file of strategies must register one
guilty, phase, kind = os.environ["FAULT"].split(maxsplit=2)
if guilty == os.environ["RANK"]:
    break_phase(phase, kind)
begin(os.environ["RANK"], int(os.environ["WORLD_SIZE"]))
