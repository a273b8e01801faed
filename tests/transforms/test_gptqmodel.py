"""GPTQ and AWQ beside gptqmodel, bit for bit. It is not among the packages of the tests: see tests/README.md."""

from __future__ import annotations

from typing import Any

import pytest
import quantizing
import torch
from quantizing import KINDS, bundle_of

from reshard.sharding.placement import Replicate
from reshard.transforms.dequantise import dequantised

OUTPUTS, INPUTS, GROUP = 64, 128, 32  # groups of fewer than 16 it does not take


def theirs(kind: str, tensors: dict[str, torch.Tensor], **told: Any) -> torch.Tensor:
    """Return the matrix that gptqmodel computes with, [out, in]."""
    pytest.importorskip("gptqmodel")
    options = {"group_size": GROUP, "sym": False, "in_features": INPUTS, "out_features": OUTPUTS, "bias": False}
    if kind == "awq":
        from gptqmodel.nn_modules.qlinear.torch_awq import AwqTorchLinear

        module = AwqTorchLinear(bits=4, desc_act=False, **options)
        module.bias = None
    else:
        from gptqmodel.nn_modules.qlinear.torch import TorchLinear
        from gptqmodel.utils.model import convert_gptq_v1_to_v2_format_module

        module = TorchLinear(pack_dtype=torch.int32, **{**options, **told})
    for suffix, tensor in tensors.items():
        module.register_buffer(suffix.lstrip("."), tensor.clone())
    if kind != "awq":
        convert_gptq_v1_to_v2_format_module(module, bits=told["bits"], pack_dtype=torch.int32)
    module.post_init()
    if kind == "awq":
        return module.eval()(torch.eye(INPUTS, dtype=torch.float16)).T
    return module.eval().dequantize_weight().T


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["gptq", "gptq_8", "gptq_order", "awq"])
def test_its_values_are_ours(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    bits, by_activity = (8 if kind == "gptq_8" else 4), kind == "gptq_order"
    quantize = quantizing._awq(GROUP) if kind == "awq" else quantizing._gptq(GROUP, bits, by_activity=by_activity)
    told = {"bits": bits, "group_size": GROUP, "desc_act": by_activity}
    monkeypatch.setitem(KINDS, kind, (quantize, {**KINDS[kind][1], **told}))
    tensors = quantize(torch.randn(OUTPUTS, INPUTS, generator=torch.Generator().manual_seed(0)))
    form, bundle, seen = bundle_of(kind, tensors, (OUTPUTS, INPUTS))
    ours = dequantised(form, bundle, Replicate(), seen, dtype=torch.float16)
    assert torch.equal(theirs(kind, tensors, **told), ours)
