"""The runtime when it cannot run: one line, the right exit code, on every rank, before any forward."""

from __future__ import annotations

import itertools
import json
import re
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pico
import pytest
import torch
import torch.distributed as dist
import warm_commands
import warm_ranks
from torchrun_tools import on_ranks, torchrun

import reshard
from reshard.errors import IntegrityError, RemoteMovedError, TopologyError, UsageError
from reshard.resharded.targets import Target
from reshard.sharding.placement import Nested, Replicate, Shard
from reshard.sharding.topology import Topology
from runtime.distributed.agreement import Deadline, UnansweredError, agree
from runtime.distributed.mesh import backend_of, connect, pick_device
from runtime.distributed.ranks import RankInfo
from runtime.model.placing import _share_heads

PARTS = "shard-0000{}-model-00001-of-00001.safetensors"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pico.save("llama", tmp_path_factory.mktemp("runtime") / "source")


@pytest.fixture
def folder(source: Path, tmp_path: Path) -> Path:
    reshard.convert(source, tmp_path / "out", tp_size=2)
    return tmp_path / "out"


def check(world_size: int, folder: Path, source: Path, *options: str) -> warm_ranks.Done:
    arguments = ["-m", "runtime", "check", str(folder), "--reference", str(source), *options]
    return on_ranks(world_size, *arguments, timeout=120)


def errors(done: subprocess.CompletedProcess[str]) -> list[str]:
    return [line for line in done.stderr.splitlines() if line.startswith("Error: ")]


def exit_codes(done: warm_ranks.Done) -> set[int]:
    """Return the ranks' exit codes, without ranks that were stopped while waiting to speak."""
    return {*done.codes} - {-15}


@pytest.mark.fault(24)
@pytest.mark.parametrize("world_size", [1, 3])
def test_wrong_world_size(world_size: int, folder: Path, source: Path) -> None:
    done = check(world_size, folder, source)
    assert exit_codes(done) == {9}
    assert len(errors(done)) == 1
    assert "was made for 2 ranks" in errors(done)[0]
    assert "--nproc-per-node 2" in done.stderr
    assert done.stdout == ""


STRATEGIES = """
from reshard.strategies import ALL_PARALLEL_STYLES, ColwiseParallel

class {name}(ColwiseParallel):
    pass

ALL_PARALLEL_STYLES.register_strategy("{style}", {name}())
"""


@pytest.mark.parametrize(
    ("style", "options", "words"),
    [
        ("mine", None, "with a style mine that is Mine; here it is not known"),
        ("colwise", None, "with a style colwise that is Mine; here it is the built-in one"),
        ("mine", ("mine", "Other"), "with a style mine that is Mine; here it is Other"),
        ("mine", ("mine", "Mine"), None),
        ("colwise", ("colwise", "Mine"), None),
    ],
)
def test_a_style_of_ones_own_means_the_same_at_run_time(
    style: str, options: tuple[str, str] | None, words: str | None, source: Path, tmp_path: Path
) -> None:
    plan, made = tmp_path / "plan.json", tmp_path / "made.py"
    plan.write_text(json.dumps({"extends": "auto", "mlp.up_proj": style, "mlp.gate_proj": style}))
    made.write_text(STRATEGIES.format(style=style, name="Mine"))
    cut = ["--tp-size", "2", "--plan", str(plan), "--strategies", str(made)]
    out = tmp_path / "out"
    assert on_ranks(1, "-m", "reshard", "convert", str(source), str(out), *cut).returncode == 0
    if options is None:
        done = check(2, out, source)
    else:
        (tmp_path / "known.py").write_text(STRATEGIES.format(style=options[0], name=options[1]))
        done = check(2, out, source, "--strategies", str(tmp_path / "known.py"))
    if words is None:
        assert done.returncode == 0, done.stderr
        assert "tokens equal" in done.stdout
    else:
        assert exit_codes(done) == {3}
        assert words in errors(done)[0]
        assert "--strategies FILE.py" in done.stderr


@pytest.mark.fault(20)
def test_altered_tensor_in_one_rank_file_stops_all_ranks(folder: Path, source: Path) -> None:
    path = folder / PARTS.format(2)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    done = check(2, folder, source)
    assert exit_codes(done) == {4}
    assert len(errors(done)) == 1
    assert f"rank 1: {path}: tensor lm_head.weight was altered" in errors(done)[0]
    assert done.stdout == ""


@pytest.mark.fault(21)
def test_missing_rank_file_stops_all_ranks(folder: Path, source: Path) -> None:
    """The table of torchrun has the ranks' exit codes."""
    (folder / PARTS.format(1)).unlink()
    done = torchrun(2, "-m", "runtime", "check", str(folder), "--reference", str(source), warm=True)
    assert {int(code) for code in re.findall(r"exitcode\s*: (-?\d+)", done.stderr)} - {-15} == {4}
    assert len(errors(done)) == 1
    assert f"{PARTS.format(1)}: is missing" in errors(done)[0]


def test_check_finds_another_model(folder: Path, tmp_path: Path) -> None:
    other = pico.save("llama", tmp_path / "other", seed=1)
    done = check(2, folder, other)
    assert exit_codes(done) == {4}
    assert "does not compute what" in errors(done)[0]
    assert "tokens different" in done.stdout


@pytest.mark.parametrize("verbose", [[], ["-v"]])
def test_run_without_a_tokenizer(folder: Path, verbose: list[str]) -> None:
    done = subprocess.run(
        [warm_commands.python(), "-m", "reshard", *verbose, "run", str(folder), "--prompt", "hello"],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 3
    assert len(errors(done)) == 1
    assert "holds no tokenizer" in errors(done)[0]
    assert ("Traceback" in done.stderr) == bool(verbose)


def test_environment_of_torchrun() -> None:
    assert RankInfo.from_env({}) == RankInfo(0, 1, 0)
    assert RankInfo.from_env({"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1"}) == RankInfo(3, 4, 1)
    ours = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
    assert RankInfo.from_env(ours) == RankInfo(3, 4, 1, 2)
    elastic = {**ours, "TORCHELASTIC_RUN_ID": "x", "TORCHELASTIC_RESTART_COUNT": "1"}
    assert RankInfo.from_env(elastic) == RankInfo(3, 4, 1, 2, attempt=1)
    with pytest.raises(UsageError, match="WORLD_SIZE is not set"):
        RankInfo.from_env({"RANK": "3", "LOCAL_RANK": "1"})
    with pytest.raises(UsageError, match="must be numbers"):
        RankInfo.from_env({"RANK": "x", "WORLD_SIZE": "4", "LOCAL_RANK": "1"})


def test_device_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(TopologyError, match="no CUDA device"):
        pick_device("cuda", 0)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    assert str(pick_device(None, 0)) == "cuda:0"
    with pytest.raises(TopologyError, match="local rank 1 has no GPU"):
        pick_device(None, 1)
    assert str(pick_device("cuda:0", 1)) == "cuda:0"
    with pytest.raises(TopologyError, match="there is no cuda:1"):
        pick_device("cuda:1", 0)
    with pytest.raises(UsageError, match="gpu is not a device"):
        pick_device("gpu", 0)
    for kind in ("meta", "mps"):
        with pytest.raises(UsageError, match=f"models are not loaded on {kind}"):
            pick_device(kind, 0)


@pytest.mark.parametrize(
    ("wanted", "device", "world_size", "backend"),
    [
        (None, "cpu", 2, "gloo"),
        (None, "cuda:1", 2, "nccl"),
        ("cuda", "cuda:1", 2, "nccl"),
        ("cuda:0", "cuda:0", 2, "gloo"),  # both ranks on one GPU
        ("cuda:0", "cuda:0", 1, "nccl"),
    ],
)
def test_ranks_that_share_a_gpu_talk_over_gloo(wanted: str | None, device: str, world_size: int, backend: str) -> None:
    assert backend_of(wanted, torch.device(device), world_size) == backend


def test_what_an_attempt_before_a_restart_has_said_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    shared = dist.HashStore()
    monkeypatch.setattr(dist, "is_initialized", lambda: False)  # other tests of this process make a group
    monkeypatch.setattr(dist, "rendezvous", lambda *_, **__: iter([(shared, 0, 2)]))
    stores = []
    for attempt in range(2):
        monkeypatch.setattr("runtime.distributed.mesh._store", None)  # as in another process
        stores.append(connect(RankInfo(0, 2, 0, attempt=attempt), Deadline.after(5)))
    stores[0].set("key", "failed")
    assert [store.check(["key"]) for store in stores] == [True, False]


def meet(monkeypatch: pytest.MonkeyPatch, *answers: tuple[Exception | None, str]) -> list[Exception | None]:
    """Return what `agree` raises on every rank if each brings its failure and value. The ranks are threads."""
    monkeypatch.setattr("runtime.distributed.agreement._meetings", itertools.repeat(0))
    store = dist.HashStore()

    def one(rank: int) -> Exception | None:
        failure, value = answers[rank]
        try:
            agree(store, RankInfo(rank, len(answers), 0), failure, Deadline.after(5), what="loading", value=value)
        except Exception as error:
            return error
        return None

    with ThreadPoolExecutor(len(answers)) as pool:
        return list(pool.map(one, range(len(answers))))


def test_ranks_that_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    assert meet(monkeypatch, (None, "same"), (None, "same"), (None, "same")) == [None] * 3


@pytest.mark.fault(25)
def test_a_failure_is_raised_on_all_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    own = IntegrityError("broken", hint="mend it")
    zero, one, two = meet(monkeypatch, (None, ""), (own, ""), (None, ""))
    for found in (zero, one, two):
        assert isinstance(found, IntegrityError)
        assert (found.message, found.hint) == ("rank 1: broken", "mend it")
    assert one.__cause__ is own


def test_an_unexpected_failure_is_told_too(monkeypatch: pytest.MonkeyPatch) -> None:
    own = ZeroDivisionError("by\nzero")
    zero, one = meet(monkeypatch, (None, ""), (own, ""))
    assert one.__cause__ is own
    assert str(zero) == str(one) == "rank 1: unexpected ZeroDivisionError: by\\nzero"


def test_ranks_with_different_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    for found in meet(monkeypatch, (None, "a"), (None, "a"), (None, "b")):
        assert isinstance(found, RemoteMovedError)
        assert "rank 2 has another version" in found.message


@pytest.mark.fault(25)
def test_a_rank_that_never_answers_is_named() -> None:
    started = time.monotonic()
    with pytest.raises(TopologyError, match="no answer from rank 1, 2"):
        agree(dist.HashStore(), RankInfo(0, 3, 0), None, Deadline.after(0.3), what="loading")
    assert time.monotonic() - started < 5


def test_a_failure_does_not_wait_for_a_silent_rank() -> None:
    started = time.monotonic()
    with pytest.raises(IntegrityError, match="rank 0: mine"):
        agree(dist.HashStore(), RankInfo(0, 2, 0), IntegrityError("mine"), Deadline.after(60), what="loading")
    assert time.monotonic() - started < 10


def test_a_rank_that_comes_too_late_hears_what_the_others_were_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("runtime.distributed.agreement._meetings", itertools.repeat(0))
    store = dist.HashStore()
    for rank, seconds in ((0, 0.1), (1, 60)):
        with pytest.raises(TopologyError, match="no answer from rank 1 in time"):
            agree(store, RankInfo(rank, 2, 0), None, Deadline.after(seconds), what="loading")


def test_the_earliest_deadline_is_everybodys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("runtime.distributed.agreement._meetings", itertools.repeat(0))
    store = dist.HashStore()
    with ThreadPoolExecutor(2) as pool:
        ends = pool.map(
            lambda rank: agree(store, RankInfo(rank, 2, 0), None, Deadline.after(20 + 20 * rank), what="loading"),
            range(2),
        )
    assert all(0 < end.seconds() <= 20 for end in ends)


def test_a_rank_that_waited_in_vain_blames_the_silent_one() -> None:
    waited = UnansweredError("cannot join the others: timed out")
    with pytest.raises(TopologyError, match="connecting: no answer from rank 1 in time"):
        agree(dist.HashStore(), RankInfo(0, 2, 0), waited, Deadline.after(-1), what="connecting")


def test_ranks_that_all_waited_in_vain_blame_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    for found in meet(monkeypatch, *[(UnansweredError("cannot join the others: no route"), "")] * 2):
        assert str(found) == "cannot join the others: no route"


def test_ranks_that_fail_alike_name_none(monkeypatch: pytest.MonkeyPatch) -> None:
    for found in meet(monkeypatch, *[(TopologyError("made for 3 ranks"), "")] * 2):
        assert str(found) == "made for 3 ranks"


def test_own_failure_is_said_even_when_nobody_answers() -> None:
    with pytest.raises(IntegrityError, match="mine"):
        agree(dist.HashStore(), RankInfo(0, 2, 0), IntegrityError("mine"), Deadline.after(0.1), what="loading")


def test_shared_heads_that_no_attention_holds_are_refused() -> None:
    """A manifest can mark any parameter so, and the search for its attention must end."""
    model = torch.nn.Sequential(torch.nn.LayerNorm(4))
    target = Target("0.weight", (4,), "float32", Nested(Shard(0), Replicate(), 2), ())
    manifest = SimpleNamespace(topology=Topology(4), parameters=(target,), groups={})
    with pytest.raises(IntegrityError, match="no attention holds it"):
        _share_heads(model, manifest, 0)  # type: ignore[arg-type]
    for name, words in (("0", "but it is no attention"), ("1", "the model of config.json has none")):
        manifest = SimpleNamespace(topology=Topology(2), parameters=(), groups={name: (2, 1)})
        with pytest.raises(IntegrityError, match=words):
            _share_heads(model, manifest, 0)  # type: ignore[arg-type]
