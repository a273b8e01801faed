"""A load in this process, as the only rank: faults that stop it, each in one line, and a loaded model's refusals."""

from __future__ import annotations

import logging
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pico
import pytest
import torch
import torch.distributed as dist
import transformers
from cli_tools import configure, edit_json, flip

import reshard
import runtime
from reshard.errors import BadInputError, IntegrityError, ReshardError, TopologyError, UsageError
from reshard.strategies import group_of
from runtime.distributed.agreement import Deadline
from runtime.distributed.mesh import _meet
from runtime.distributed.ranks import RankInfo
from runtime.model.kernels import check_compile, check_sdpa, shares_gpu

GENERATION = "generation_config.json"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("loading")
    source = pico.save("llama", root / "source")
    reshard.convert(source, root / "out", tp_size=1, sync=False)
    return root / "out"


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "out"))


@pytest.mark.parametrize("alter", [lambda f: configure(f, rms_norm_eps=0.5), lambda f: flip(f / "config.json", 20)])
def test_the_configuration_is_the_one_that_was_written(alter: Callable[[Path], object], folder: Path) -> None:
    alter(folder)
    with pytest.raises(IntegrityError, match=r"config\.json: (expected|its content was altered|is missing)") as found:
        runtime.load(folder)
    assert "--no-digests" in str(found.value.hint)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"num_hidden_layers": 1}, r"layers\.1\.\S+: the rank files hold it, and the model of config.json has none"),
        ({"num_hidden_layers": 3}, r"layers\.2\.\S+: config.json asks for it, and the rank files do not hold it"),
        ({"attention_bias": True}, r"q_proj\.bias: config.json asks for it"),
        ({"intermediate_size": 64}, r"gate_proj\.weight: .* as \[52, 32\], and config.json asks for \[64, 32\]"),
    ],
)
def test_a_configuration_of_another_model(fields: dict[str, Any], words: str, folder: Path) -> None:
    configure(folder, **fields)
    with pytest.raises(IntegrityError, match=words):
        runtime.load(folder, check_digests=False)


@pytest.mark.parametrize("text", ["{", "[1]", '{"compile_config": 4}'])
def test_a_generation_config_that_is_none(text: str, folder: Path) -> None:
    (folder / GENERATION).write_text(text)
    with pytest.raises(BadInputError, match=rf"{GENERATION}: not usable: ") as found:
        runtime.load(folder, check_digests=False)
    assert "\n" not in found.value.message


class Lines(logging.Handler):
    """Keeps the logged lines."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def test_flags_of_generation_that_do_not_go_together_are_not_talked_of(folder: Path) -> None:
    edit_json(folder / GENERATION, lambda config: config.update(do_sample=False, temperature=0.3, typical_p=0.7))
    handler = Lines()
    level = transformers.utils.logging.get_verbosity()
    transformers.utils.logging.set_verbosity_warning()
    transformers.utils.logging.add_handler(handler)
    once: Any = logging.Logger.warning_once  # type: ignore[attr-defined]
    once.cache_clear()  # transformers says each thing once
    try:
        model = runtime.load(folder, check_digests=False)
        quiet = list(handler.lines)
        once.cache_clear()
        transformers.GenerationConfig.from_pretrained(folder)
    finally:
        transformers.utils.logging.remove_handler(handler)
        transformers.utils.logging.set_verbosity(level)
    assert model.generation_config.temperature == 0.3
    assert quiet == []
    assert any("temperature" in line for line in handler.lines)  # the handler does see warnings


def to(*arguments: Any) -> Callable[[Any], Any]:
    return lambda module: module.to(*arguments)


@pytest.mark.parametrize(
    "change", [to(torch.bfloat16), to("meta"), torch.nn.Module.half, torch.nn.Module.double, lambda m: m.bfloat16()]
)
def test_a_model_keeps_its_dtype_and_device(change: Callable[[Any], Any], made: Path) -> None:
    model = runtime.load(made)
    before = model(torch.arange(5)[None]).logits
    for module in (model, model.model, model.lm_head):
        with pytest.raises(UsageError, match="a loaded model stays float32 on cpu") as found:
            change(module)
        assert "convert with --dtype" in str(found.value.hint)
    assert torch.equal(model(torch.arange(5)[None]).logits, before)


def test_what_changes_nothing_is_allowed(made: Path) -> None:
    model = runtime.load(made)
    same = [
        to("cpu"),
        to(model.device),
        to(model.dtype),
        to("cpu", torch.float32),
        lambda m: m.float(),
        lambda m: m.cpu(),
    ]
    for change in same:
        assert change(model) is model
        assert change(model.lm_head) is model.lm_head
    assert model.model.rotary_emb.to(torch.float64).inv_freq.dtype == torch.float64  # none of it is in a file


def test_parameters_kept_in_fp32_are_no_reason_to_refuse(tmp_path: Path) -> None:
    source = pico.save("glm4_moe", tmp_path / "source")
    reshard.convert(source, tmp_path / "out", tp_size=1, sync=False, dtype="bfloat16")
    model = runtime.load(tmp_path / "out")
    assert {tensor.dtype for tensor in model.state_dict().values()} == {torch.bfloat16, torch.float32}
    assert model.to(torch.bfloat16) is model
    with pytest.raises(UsageError, match="stays bfloat16"):
        model.float()


def test_what_the_chosen_kernel_cannot_compute_is_refused_by_the_load(
    made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with runtime.sdpa("cudnn"), pytest.raises(UsageError, match="--sdpa cudnn: torch has no such kernel"):
        runtime.load(made)
    asked = []

    def attention(query: torch.Tensor, *_: Any, **__: Any) -> None:
        asked.append((query.dtype, query.shape[-1]))
        raise RuntimeError("No available kernel. Aborting execution.")

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", attention)
    with runtime.sdpa("flash"), pytest.raises(UsageError, match="--sdpa flash"):
        runtime.load(made)
    assert asked == [(torch.float32, 4)]
    with runtime.sdpa("math"), pytest.raises(UsageError, match="goes with attention sdpa, and this model uses eager"):
        runtime.load(made, attn_implementation="eager")
    runtime.load(made)  # no kernel is chosen any more


def test_a_kernel_that_there_is_not() -> None:
    with (
        pytest.raises(UsageError, match="--sdpa bogus is not known; there are flash, mem-efficient"),
        runtime.sdpa("bogus"),
    ):
        pass


def test_a_kernel_is_asked_with_a_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    """The replacement takes no mask, like a GPU's flash kernels; a CPU's take one."""

    def attention(*_: Any, attn_mask: Any = None) -> None:
        if attn_mask is not None:
            raise RuntimeError("No available kernel. Aborting execution.")

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", attention)
    check_sdpa("flash", torch.device("cpu"))
    with pytest.raises(UsageError, match="--sdpa flash"):
        check_sdpa("flash", torch.device("cpu"), masked=True)


@pytest.mark.parametrize(
    ("device", "ranks", "backend", "shared"),
    [("cuda", 2, "gloo", True), ("cuda", 2, "nccl", False), ("cuda", 1, "gloo", False), ("cpu", 2, "gloo", False)],
)
def test_cuda_graphs_hold_no_collectives_of_gloo(device: str, ranks: int, backend: str, shared: bool) -> None:
    group = SimpleNamespace(_get_backend=lambda _: SimpleNamespace(name=lambda: backend))
    mesh: Any = SimpleNamespace(device_type=device, size=lambda: ranks, get_group=lambda: group)
    model = SimpleNamespace(_device_mesh=mesh)
    assert shares_gpu(mesh) == shared
    for mode in ("reduce-overhead", "max-autotune"):
        if shared:
            with pytest.raises(UsageError, match=f"--compile {mode} captures CUDA graphs"):
                check_compile(mode, model)
        else:
            check_compile(mode, model)
    check_compile("default", model)
    check_compile(None, model)


@pytest.fixture
def stranger() -> Iterator[int]:
    """The port of a server that takes connections and never says anything."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]
        server.setblocking(False)
        taken = []
        try:
            while True:
                taken.append(server.accept()[0])
        except BlockingIOError:
            for connection in taken:  # so that waiting clients end
                connection.close()


def test_the_deadline_is_kept_with_a_stranger_on_the_port(stranger: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(stranger), "RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    started = time.monotonic()
    with pytest.raises(TopologyError, match=f"none of them answers at 127.0.0.1:{stranger}") as found:
        _meet(RankInfo(1, 2, 1), Deadline.after(1))
    assert time.monotonic() - started < 5
    assert "MASTER_PORT" in str(found.value.hint)


def test_a_group_of_some_ranks_is_not_split_off_one_that_is_bound(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The split is a collective of all ranks, and not all of them take part."""
    runtime.load(made)  # this also makes the process group
    world = dist.group.WORLD

    def split(_group: Any) -> None:
        raise AssertionError("it would wait for all ranks")

    monkeypatch.setattr(dist.distributed_c10d, "_get_split_source", split)
    monkeypatch.setattr(world, "bound_device_id", torch.device("cpu:0"))
    assert dist.get_world_size(group_of([0])) == 1
    assert world.bound_device_id == torch.device("cpu:0")


def test_a_failure_to_load_is_one_of_ours(made: Path) -> None:
    for device in ("meta", "mps", "gpu"):
        with pytest.raises(ReshardError) as found:
            runtime.load(made, device=device)
        assert found.value.exit_code == UsageError.exit_code
        assert "use --device cpu, cuda or cuda:0" in str(found.value.hint)
