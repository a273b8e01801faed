"""Strategies written from the guide, for the tests that trace them."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor import Shard as TorchShard

from reshard.sharding.placement import PackedShard, Replicate, Shard
from reshard.strategies import (
    TensorParallelLayer,
    get_packed_weights,
    get_tensor_shard,
)

SHAPE = (12, 6)


def style(cut: Any, *, use_dtensor: bool = False) -> TensorParallelLayer:
    """A strategy in the guide's form whose cut is `cut(param, empty_param, rank, device_mesh)`."""

    class Mine(TensorParallelLayer):
        def partition_tensor(
            self,
            param: Any,
            empty_param: torch.Tensor,
            param_type: str,
            param_casting_dtype: torch.dtype | None,
            to_contiguous: bool,
            rank: int,
            device_mesh: Any,
        ) -> nn.Parameter:
            local = cut(param, empty_param, rank, device_mesh).to(param_casting_dtype)
            if to_contiguous:
                local = local.contiguous()
            if self.use_dtensor:
                local = DTensor.from_local(local, device_mesh, [TorchShard(0)], run_check=False)
            return nn.Parameter(local, requires_grad=local.is_floating_point())

    return Mine(use_dtensor=use_dtensor)


CUTS = {
    "rows": (lambda p, e, r, m: get_tensor_shard(p, e, m, r, 0), Shard(0)),
    "columns": (lambda p, e, r, m: get_tensor_shard(p, e, m, r, -1), Shard(1)),
    "halves": (lambda p, e, r, m: get_packed_weights(p, e, m, r, 0), PackedShard(0, (6, 6))),
    "whole": (lambda p, e, r, m: p[...], Replicate()),
    "by hand": (lambda p, e, r, m: p.tensor_split(m.size(), dim=1)[r], None),
    "round robin": (lambda p, e, r, m: p[r :: m.size()], None),
    "unequal": (lambda p, e, r, m: p[:9] if r == 0 else p[9:] if r == 1 else p[:0], None),
    "blocks 4|1|1": (lambda p, e, r, m: get_packed_weights(p, e, m, r, 0, [4, 1, 1]), None),
    "reversed": (lambda p, e, r, m: get_tensor_shard(p, e, m, m.size() - 1 - m.get_local_rank(), 0), None),
    "overlapping": (lambda p, e, r, m: p[: 12 - r], None),
}
