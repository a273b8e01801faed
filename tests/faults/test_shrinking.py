"""Files that are cut short while they are read: exit code 4, nothing kept, and no crash."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pico
import pytest
import torch
import warm_commands
import xxhash
from big_checkpoints import LLAMA_1B, write
from cli_tools import Result, assert_one_error, tree
from executor_tools import make_source
from kill_tools import server

import reshard
from reshard.errors import IntegrityError
from reshard.execution import origin, reader
from reshard.execution.executor import Inputs, write_files
from reshard.execution.journal import Journal
from reshard.execution.reader import equal_tensors
from reshard.files.mapped import MappedFile
from reshard.operations import plan as planning
from reshard.operations.verify import compare
from reshard.resharded.layout import file_layout
from reshard.resharded.targets import LocalTensor
from reshard.sharding.regions import Region

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the guard is for Linux")

PAGE = os.sysconf("SC_PAGE_SIZE")
CUTS = {"nothing": 0.0, "a third": 1 / 3, "half": 0.5, "nearly all": 0.98}


def cut(path: Path, share: float) -> None:
    os.truncate(path, int(path.stat().st_size * share))


# --- one mapping ---


SIZE = 4 << 20


def _digest(data: Any) -> object:
    return xxhash.xxh3_128(memoryview(data)).hexdigest()


def _copy(data: Any) -> object:
    return torch.empty(SIZE, dtype=torch.uint8).copy_(torch.frombuffer(data, dtype=torch.uint8))


def _strided_copy(data: Any) -> object:
    view = torch.frombuffer(data, dtype=torch.int32).view(1024, -1)
    return torch.empty(view.shape[1], view.shape[0], dtype=torch.int32).copy_(view.T)


def _cast(data: Any) -> object:
    return torch.empty(SIZE // 4, dtype=torch.bfloat16).copy_(torch.frombuffer(data, dtype=torch.float32))


def _compare(data: Any) -> object:
    return memoryview(data)[: SIZE // 2] == memoryview(data)[SIZE // 2 :]


def _bytes(data: Any) -> object:
    return bytes(data)


@pytest.mark.parametrize("threads", [1, 4])
@pytest.mark.parametrize("size", [0, PAGE, SIZE // 3 + 5, SIZE - PAGE])
@pytest.mark.parametrize("read", [_digest, _copy, _strided_copy, _cast, _compare, _bytes])
def test_reading_on_gives_zeros(read: Callable[[Any], object], size: int, threads: int, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"\x01" * SIZE)
    before = path.stat()
    mapped = MappedFile(path, size=SIZE, mtime_ns=before.st_mtime_ns)
    mapped.check()
    os.truncate(path, size)
    readers = [threading.Thread(target=read, args=(mapped.data,)) for _ in range(threads)]
    for thread in readers:
        thread.start()
    for thread in readers:
        thread.join()
    assert mapped.shrunk
    assert mapped.data[:size] == b"\x01" * size
    assert mapped.data[size:] == bytes(SIZE - size)
    with pytest.raises(IntegrityError, match="changed while it was being read"):
        mapped.check()
    path.write_bytes(b"\x01" * SIZE)
    os.utime(path, ns=(before.st_mtime_ns, before.st_mtime_ns))  # the times are as before, but zeros were read
    with pytest.raises(IntegrityError, match="was cut short while it was being read, and put right again"):
        mapped.check()


def test_each_mapping_is_its_own(tmp_path: Path) -> None:
    mapped = []
    for name in "abc":
        (tmp_path / name).write_bytes(b"\x01" * SIZE)
        mapped.append(MappedFile(tmp_path / name, size=SIZE))
    os.truncate(tmp_path / "b", PAGE)
    assert [sum(file.data[at] for at in range(0, SIZE, PAGE)) for file in mapped] == [SIZE // PAGE, 1, SIZE // PAGE]
    assert [file.shrunk for file in mapped] == [False, True, False]


def test_a_file_that_is_shorter_already(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    for size in (1, SIZE):
        with pytest.raises(IntegrityError, match="changed while it was being read"):
            MappedFile(tmp_path / "file", size=size)
    with pytest.raises(IntegrityError, match="No such file"):
        MappedFile(tmp_path / "gone", size=1)


FAULTS = {
    "a mapping of somebody else": "os.truncate(other, 0); theirs[0]",
    "a mapping of somebody else, in a thread": (
        "os.truncate(other, 0); thread = threading.Thread(target=lambda: theirs[0]); thread.start(); thread.join()"
    ),
    "sent": "os.kill(os.getpid(), signal.SIGBUS); time.sleep(5)",
    "after one of ours": "os.truncate(own, 0); ours.data[0]; os.truncate(other, 0); theirs[0]",
}


@pytest.mark.parametrize("handler", ["", "faulthandler.enable()"])
@pytest.mark.parametrize("fault", FAULTS)
def test_any_other_fault_ends_the_process_as_ever(fault: str, handler: str, tmp_path: Path) -> None:
    code = f"""
import faulthandler, mmap, os, signal, sys, threading, time
from pathlib import Path
from reshard.files.mapped import MappedFile
{handler}
own, other = Path("own"), Path("other")
for path in (own, other):
    path.write_bytes(bytes(9999))
ours = MappedFile(own, size=9999)
theirs = mmap.mmap(os.open(other, os.O_RDONLY), 9999, access=mmap.ACCESS_READ)
{FAULTS[fault]}
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=here(), capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == -signal.SIGBUS
    assert ("Fatal Python error: Bus error" in done.stderr) == bool(handler)


def here() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join(str(Path(p).resolve()) for p in sys.path if p)}


# --- the library's calls, cut at the worst moment ---


def after(calls: int, action: Callable[[], object]) -> Callable[..., None]:
    """A `progress` that does something at call number `calls`."""
    left = [calls]
    lock = threading.Lock()

    def progress(*_: object) -> None:
        with lock:
            left[0] -= 1
            if not left[0]:
                action()

    return progress


ROWS = 4096  # rows of 4 kB: the tensor is four blocks


def straight() -> LocalTensor:
    region = Region("w", 0, (1024, 1), (ROWS, 1024), (0, 0))
    return LocalTensor("w", (ROWS, 1024), "float32", (0, 0), (region,))


def gathered(dtype: str = "float32") -> LocalTensor:
    """Return the right half of every row: a rank's part of a rowwise weight."""
    region = Region("w", 512, (1024, 1), (ROWS, 512), (0, 0))
    return LocalTensor("w", (ROWS, 512), dtype, (0, 512), (region,))


@pytest.mark.fault(15)
@pytest.mark.parametrize("share", CUTS.values(), ids=CUTS)
@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("tensor", [straight(), gathered(), gathered("bfloat16")], ids=["straight", "gather", "cast"])
def test_writing(tensor: LocalTensor, workers: int, share: float, tmp_path: Path) -> None:
    source = make_source(tmp_path / "source", {"w": torch.ones(ROWS, 1024)})
    path = source.files[0].path
    layouts = [file_layout(f"{rank}.safetensors", [tensor]) for rank in range(8)]
    journal = Journal(tmp_path)
    done: list[int] = []
    told = threading.Lock()

    def progress(size: int) -> None:
        with told:  # until the cut, no thread goes on to claim what was read before
            done.append(size)
            if len(done) == 1:
                cut(path, share)

    with pytest.raises(IntegrityError, match=r"model\.safetensors: changed while it was being read"):
        write_files(tmp_path, layouts, Inputs(source), journal=journal, workers=workers, progress=progress)
    assert sum(done) < 8 * tensor.nbytes or share > 0.9  # the work ends at the next block, not at the end
    journal.close()
    assert Journal(tmp_path).claimed == {}


def test_comparing_two_tensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = make_source(tmp_path / "source", {"a": torch.ones(ROWS, 1024), "b": torch.ones(ROWS, 1024)})
    assert equal_tensors(source, "a", "b")
    real = reader.SourceReader.bytes_of
    progress = after(5, lambda: cut(source.files[0].path, 0.5))

    def bytes_of(*arguments: Any) -> memoryview:
        progress()
        return real(*arguments)

    monkeypatch.setattr(reader.SourceReader, "bytes_of", bytes_of)
    with pytest.raises(IntegrityError, match="changed while it was being read"):
        equal_tensors(source, "a", "b")


# --- whole commands ---


WIDE = {"hidden_size": 256, "intermediate_size": 1024, "vocab_size": 20_000, "num_hidden_layers": 4}
SOURCES = [f"model-{number:05d}-of-00003.safetensors" for number in (1, 2, 3)]
RANK = "shard-00002-model-00001-of-00001.safetensors"


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of 55 MB in three files, and the folder `out` made of it. Read only."""
    root = tmp_path_factory.mktemp("pristine")
    pico.save("llama", root / "source", shard_bytes="21MB", **WIDE)
    assert sorted(path.name for path in (root / "source").glob("*.safetensors")) == SOURCES
    reshard.convert(root / "source", root / "out", tp_size=2)
    return root


@pytest.fixture
def root(pristine: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pristine, tmp_path / "root"))


@pytest.mark.fault(15)
@pytest.mark.parametrize("share", CUTS.values(), ids=CUTS)
@pytest.mark.parametrize("calls", [1, 5])
def test_verify(calls: int, share: float, root: Path) -> None:
    path = root / "out" / RANK
    of_first = len(reshard.inspect(root / "out").rank_files[0].tensors) + 1  # and its header
    told = after(of_first + calls, lambda: cut(path, share))

    @contextlib.contextmanager
    def progress(*_: object) -> Iterator[Callable[[int], object]]:
        yield told

    with pytest.raises(IntegrityError, match=f"{RANK}: changed while it was being read"):
        reshard.verify(root / "out", progress=progress)


@pytest.mark.fault(15)
@pytest.mark.parametrize("calls", [1, 4, 9])
@pytest.mark.parametrize("name", [f"source/{SOURCES[1]}", f"out/{RANK}"])
def test_verify_against(name: str, calls: int, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    progress = after(calls, lambda: cut(root / name, 0.02))
    real = compare.tensor_blocks

    def tensor_blocks(*arguments: Any) -> Iterator[Any]:
        progress()
        yield from real(*arguments)

    monkeypatch.setattr(compare, "tensor_blocks", tensor_blocks)
    with pytest.raises(IntegrityError, match=f"{Path(name).name}: changed while it was being read"):
        reshard.verify(root / "out", against=root / "source")


@pytest.mark.fault(15)
@pytest.mark.parametrize("workers", [1, 3])
def test_merge(workers: int, root: Path) -> None:
    @contextlib.contextmanager
    def progress(*_: object) -> Iterator[Callable[[int], object]]:
        yield after(3, lambda: cut(root / "out" / RANK, 0.1))

    with pytest.raises(IntegrityError, match=f"{RANK}: changed while it was being read"):
        reshard.merge(root / "out", root / "again", workers=workers, progress=progress)
    assert sorted(os.listdir(root)) == ["out", "source"]


@pytest.mark.fault(15)
@pytest.mark.parametrize("share", CUTS.values(), ids=CUTS)
@pytest.mark.parametrize("digested", [True, False], ids=["digested before", "not digested"])
def test_convert_while_it_plans(digested: bool, share: float, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The thread that reads ahead uses read(2), which does not report an early end."""
    real = planning.read_model

    def read_model(*arguments: Any, **options: Any) -> Any:
        if digested:
            assert all(ahead.get(name) for name in SOURCES)
        cut(root / "source" / SOURCES[2], share)
        return real(*arguments, **options)

    ahead: Any = None
    digests_ahead = origin.DigestsAhead

    def remember(*arguments: Any) -> Any:
        nonlocal ahead
        ahead = digests_ahead(*arguments)
        return ahead

    monkeypatch.setattr(origin, "DigestsAhead", remember)
    monkeypatch.setattr(planning, "read_model", read_model)
    with pytest.raises(IntegrityError, match=f"{SOURCES[2]}: changed while it was being read"):
        reshard.convert(root / "source", root / "new", tp_size=2)
    assert sorted(os.listdir(root)) == ["out", "source"]


# --- the commands as processes, cut at any moment ---


COMMANDS = {
    "convert, one worker": ["convert", "source", "new", "--tp-size", "2", "--workers", "1", "--no-sync"],
    "convert, four workers": ["convert", "source", "new", "--tp-size", "2", "--workers", "4", "--no-sync"],
    "convert and cast": ["convert", "source", "new", "--tp-size", "4", "--dtype", "bfloat16"],
    "verify": ["verify", "out"],
    "verify against": ["verify", "out", "--against", "source"],
    "merge": ["merge", "out", "new", "--workers", "2"],
}
READS = {"convert": "source", "merge": "out", "verify": "out", "against": "source"}


def _job(arguments: list[str], folder: Path) -> None:
    """Run the command line in a process with its libraries imported. A nap at each write, or digest in a verify,
    makes it long enough; the first one leaves `begun` behind."""
    import reshard.cli.main
    import reshard.execution.executor
    import reshard.resharded.rank_file

    def slow(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            Path("begun").touch()
            time.sleep(0.005)
            return real(*arguments)

        return call

    os.chdir(folder)
    fd = os.open("said", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(fd, 1)
    os.dup2(fd, 2)
    reshard.execution.executor.pwrite = slow(reshard.execution.executor.pwrite)
    reshard.resharded.rank_file.digest_of = slow(reshard.resharded.rank_file.digest_of)
    reshard.cli.main.main(arguments)


def started(context: Any, arguments: list[str], root: Path) -> Any:
    """Start the job, and return once it reads data."""
    (root / "begun").unlink(missing_ok=True)
    process = context.Process(target=_job, args=(arguments, root))
    process.start()
    while process.is_alive() and not (root / "begun").exists():
        time.sleep(0.0005)
    return process


def sweep(command: str, rounds: int, pristine: Path, root: Path) -> dict[int, int]:
    """Cut some file that the command reads, at some moment after its begin. Returns how often each code came."""
    arguments, new, context = COMMANDS[command], root / "new", server()
    inputs = sorted(path for read in {*arguments} & {*READS} for path in (root / READS[read]).glob("*.safetensors"))
    process = started(context, arguments, root)
    begun = time.monotonic()
    process.join(60)
    seconds = time.monotonic() - begun
    assert process.exitcode == 0
    whole = tree(new)
    chance, codes = random.Random(command), Counter[int]()
    for _ in range(rounds):
        shutil.rmtree(new, ignore_errors=True)
        path, share = chance.choice(inputs), chance.choice([0, 0.5, chance.random()])
        process = started(context, arguments, root)
        time.sleep(chance.random() ** 2 * seconds)
        cut(path, share)
        process.join(60)
        codes[process.exitcode] += 1
        said = (root / "said").read_text()
        if process.exitcode:
            late = "against" in arguments and path.parent.name == "source" and process.exitcode == 3  # not yet opened
            assert_one_error(Result(process.exitcode, "", said), 3 if late else 4, path.name)
            assert late or "changed while it was being read" in said or "bytes, got" in said
            assert sorted(os.listdir(root)) == ["begun", "out", "said", "source"]
        else:  # the file was no longer needed
            assert tree(new) == whole
        shutil.copyfile(pristine / path.relative_to(root), path)
    return codes


@pytest.mark.fault(15)
@pytest.mark.parametrize("command", COMMANDS)
def test_any_moment(command: str, pristine: Path, root: Path) -> None:
    sweep(command, 4, pristine, root)


@pytest.mark.fault(15)
@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_any_moment_many_times(command: str, pristine: Path, root: Path) -> None:
    codes = sweep(command, 100, pristine, root)
    print(f"{command}: {dict(codes)}")


@pytest.mark.fault(15)
def test_the_command_line_itself(tmp_path: Path) -> None:
    write(tmp_path / "source", {**LLAMA_1B, "num_hidden_layers": 1})  # sparse: 1.2 GB of zeros
    command = [warm_commands.python(), "-m", "reshard", "convert", "source", "out", "--tp-size", "2", "--no-sync"]
    with subprocess.Popen(
        command, cwd=tmp_path, env=here(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        while process.poll() is None and not list(tmp_path.glob("out.part-*/*.safetensors")):
            time.sleep(0.001)
        for path in (tmp_path / "source").glob("*.safetensors"):
            cut(path, 0.5)
        result = Result(process.wait(60), process.stdout.read(), process.stderr.read())
    assert_one_error(result, 4, "safetensors: changed while it was being read")
    assert os.listdir(tmp_path) == ["source"]
