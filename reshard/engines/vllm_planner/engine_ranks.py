"""vLLM's configuration and groups, of one process that is taken for one rank after the other."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any


def engine_config(model: Path, request: dict[str, Any]) -> Any:
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.models import registry

    def inspected(registered: Any) -> Any:
        """Look at a model class in this process: vLLM starts another, which would know another platform."""
        return registry._ModelInfo.from_model_cls(registered.load_model_cls())

    registry._LazyRegisteredModel.inspect_model_cls = inspected
    chosen = {"moe_backend": request["moe_backend"]} if request["moe_backend"] else {}
    args = EngineArgs(
        model=str(model),
        skip_tokenizer_init=True,
        dtype=request["dtype"] or "auto",
        load_format="dummy",
        enforce_eager=True,
        enable_expert_parallel=request["ep"],
        trust_remote_code=False,
        **chosen,
    )
    config = args.create_engine_config()
    parallel = config.parallel_config
    parallel.tensor_parallel_size, parallel.pipeline_parallel_size = request["tp"], request["pp"]
    parallel.world_size = request["tp"] * request["pp"]
    config.model_config.verify_with_parallel_config(parallel)
    return config


def init_groups(config: Any) -> None:
    """Make the engine's groups, of this process alone."""
    from vllm.config import set_current_vllm_config
    from vllm.distributed.parallel_state import init_distributed_environment, initialize_model_parallel

    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    parallel = config.parallel_config
    meant = parallel.tensor_parallel_size, parallel.pipeline_parallel_size, parallel.world_size
    parallel.tensor_parallel_size = parallel.pipeline_parallel_size = parallel.world_size = 1
    with set_current_vllm_config(config), tempfile.TemporaryDirectory(dir=".") as folder:
        init_distributed_environment(1, 0, f"file://{Path(folder).resolve()}/meet", 0, backend="gloo")
        initialize_model_parallel(1, 1, backend="gloo")
    parallel.tensor_parallel_size, parallel.pipeline_parallel_size, parallel.world_size = meant


def be_rank(config: Any, tp: int, pp: int) -> None:
    """Have the engine take this process for one of its ranks."""
    from vllm.distributed import parallel_state as state

    parallel = config.parallel_config
    sizes = parallel.tensor_parallel_size, parallel.pipeline_parallel_size
    parallel.rank = pp * sizes[0] + tp
    for group, at, size in ((state.get_tp_group(), tp, sizes[0]), (state.get_pp_group(), pp, sizes[1])):
        group.ranks = list(range(size))
        group.world_size, group.rank_in_group, group.rank = size, at, at
    experts = getattr(state, "_EP", None)
    if experts is not None:
        experts.ranks = list(range(sizes[0]))
        experts.world_size, experts.rank_in_group, experts.rank = sizes[0], tp, tp
    config.compilation_config.static_forward_context.clear()
