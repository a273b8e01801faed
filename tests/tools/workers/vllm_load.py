"""Run by vLLM's Python: the seconds in which vLLM's own loaders fill a model on several ranks, the slowest rank's, as a
line "SECONDS [...]". `python vllm_load.py JOBS.json TP`; each job is {"folder", "format", "cold"}."""

import json
import os
import sys
import tempfile
import time
from pathlib import Path

import torch


def load(rank: int, tp: int, meet: str, jobs: list[dict]) -> None:
    import torch.distributed as dist
    from vllm.config import set_current_vllm_config
    from vllm.distributed.parallel_state import init_distributed_environment, initialize_model_parallel
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.model_loader import get_model_loader
    from vllm.model_executor.model_loader.utils import initialize_model
    from vllm.utils.torch_utils import set_default_torch_dtype

    os.environ["VLLM_DIST_IDENT"] = Path(meet).parent.name  # the engine's executor sets it
    torch.set_num_threads(1)
    seconds = []
    for number, job in enumerate(jobs):
        args = EngineArgs(
            model=job["folder"],
            skip_tokenizer_init=True,
            tensor_parallel_size=tp,
            load_format=job["format"],
            dtype="bfloat16",
            enforce_eager=True,
        )
        config = args.create_engine_config()
        with set_current_vllm_config(config):
            if number == 0:
                init_distributed_environment(tp, rank, f"file://{meet}", rank, backend="gloo")
                initialize_model_parallel(tp, 1, backend="gloo")
            with set_default_torch_dtype(torch.bfloat16), torch.device("cpu"):
                model = initialize_model(config, model_config=config.model_config)
                for parameter in model.parameters():
                    parameter.data.zero_()  # memory is handed out before the clock runs
            if job["cold"] and rank == 0:
                for path in Path(job["folder"]).iterdir():
                    with open(path, "rb") as file:
                        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            dist.barrier()
            start = time.perf_counter()
            with set_default_torch_dtype(torch.bfloat16), torch.device("cpu"):
                get_model_loader(config.load_config).load_weights(model, config.model_config)
            dist.barrier()
            seconds.append(time.perf_counter() - start)
            del model
    if rank == 0:
        print("SECONDS", json.dumps(seconds), flush=True)


if __name__ == "__main__":
    jobs, tp = json.loads(Path(sys.argv[1]).read_text()), int(sys.argv[2])
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(load, (tp, f"{folder}/meet", jobs), nprocs=tp)
