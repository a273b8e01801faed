"""Run by vLLM's Python: what each rank's model holds once vLLM has loaded a checkpoint, saved by vLLM itself before it
processes the weights any further. `python vllm_saver.py JOBS.json TP PP`; each job is {"folder", "out", "ep", "dtype"}.
"""

import json
import os
import sys
import tempfile
from pathlib import Path

import torch


def save(rank: int, tp: int, pp: int, meet: str, jobs: list[dict]) -> None:
    from vllm.config import set_current_vllm_config
    from vllm.distributed.parallel_state import init_distributed_environment, initialize_model_parallel
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.model_loader import get_model_loader
    from vllm.model_executor.model_loader.sharded_state_loader import ShardedStateLoader
    from vllm.model_executor.model_loader.utils import initialize_model
    from vllm.utils.torch_utils import set_default_torch_dtype

    os.environ["VLLM_DIST_IDENT"] = Path(meet).parent.name  # the engine's executor sets it
    for number, job in enumerate(jobs):
        args = EngineArgs(
            model=job["folder"],
            skip_tokenizer_init=True,
            tensor_parallel_size=tp,
            pipeline_parallel_size=pp,
            enable_expert_parallel=job["ep"],
            dtype=job["dtype"],
            enforce_eager=True,
        )
        config = args.create_engine_config()
        with set_current_vllm_config(config):
            if number == 0:
                init_distributed_environment(tp * pp, rank, f"file://{meet}", rank, backend="gloo")
                initialize_model_parallel(tp, pp, backend="gloo")
            with set_default_torch_dtype(config.model_config.dtype), torch.device("cpu"):
                model = initialize_model(config, model_config=config.model_config)
                get_model_loader(config.load_config).load_weights(model, config.model_config)
            ShardedStateLoader.save_model(model, job["out"])


if __name__ == "__main__":
    jobs, tp, pp = json.loads(Path(sys.argv[1]).read_text()), int(sys.argv[2]), int(sys.argv[3])
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(save, (tp, pp, f"{folder}/meet", jobs), nprocs=tp * pp)
