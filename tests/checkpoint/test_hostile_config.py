"""Whatever a config.json says, there is one clear line: no code of the repo, no big allocation, no long wait."""

from __future__ import annotations

import json
import re
import shutil
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import families
import pytest
from cli_tools import EVIL, Checkpoint, Cli, Refused, assert_no_controls, configure, convert
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

import reshard
from reshard.errors import ReshardError

CODES = {3, 8, 9, 11}
SECONDS = 3
MEMORY = 200 << 20
# Fields that transformers or a model reads, though a saved configuration may lack them.
MORE_FIELDS = [
    *("auto_map", "configuration_files", "text_config", "vision_config", "sub_configs", "quantization_config"),
    *("num_labels", "id2label", "label2id", "problem_type", "torch_dtype", "dtype", "head_dim", "rope_scaling"),
    *("layer_types", "mlp_only_layers", "num_experts", "n_routed_experts", "base_model_tp_plan", "_tp_plan"),
    *("_name_or_path", "name_or_path", "_attn_implementation", "attn_implementation", "experts_implementation"),
    *("attribute_map", "pruned_heads", "gguf_file", "generation_config", "transformers_version", "update", "to_dict"),
]
HUGE = [10**6, 10**9, 10**18, 10**30, -(10**18)]
SCALARS = st.one_of(
    st.sampled_from([None, True, False, 0, 1, -1, 2, 3, *HUGE, 0.5, float("nan"), float("inf"), -0.0, "", "x", EVIL]),
    st.integers(-(2**70), 2**70),
    st.text(max_size=5),  # of any characters, lone surrogates too
)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
)


@pytest.fixture(scope="module", params=["llama", "qwen3_moe"])
def source(request: pytest.FixtureRequest, checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    source = Path(shutil.copytree(checkpoint(request.param), tmp_path_factory.mktemp("config") / request.param))
    reshard.plan(source, tp_size=2)  # so that its imports are done
    return source


def memory(what: str) -> int:
    """Return VmRSS, or VmHWM (its peak), in bytes."""
    found = re.search(rf"{what}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return int(found[1]) << 10


def outcome(folder: Path) -> Any:
    """Return the exit code of a plan, whose error must be one printable line; None if the plan is made."""
    started = time.monotonic()
    try:
        reshard.plan(folder, tp_size=2)
    except ReshardError as error:
        for text in (error.message, error.hint or ""):
            assert text.isprintable(), text
            assert len(text) < 1000
        return error.exit_code
    finally:
        assert time.monotonic() - started < SECONDS
    return None


def fuzz(source: Path, examples: int) -> Counter[Any]:
    config = json.loads((source / "config.json").read_text())
    fields = st.sampled_from([*config, *MORE_FIELDS]) | st.text(max_size=5)
    counts = Counter[Any]()

    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate],  # shrinking a case that waits or allocates would take for ever
    )
    @given(st.dictionaries(fields, VALUES, min_size=1, max_size=3))
    def run(changes: dict[str, Any]) -> None:
        (source / "config.json").write_text(json.dumps({**config, **changes}))
        code = outcome(source)
        counts[code] += 1
        assert code is None or code in CODES

    try:
        run()
    finally:
        (source / "config.json").write_text(json.dumps(config))
    return counts


@pytest.fixture
def little_memory(source: Path) -> Iterator[None]:
    """Memory must stay low throughout, at its peak too."""
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("needs /proc")
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak to the present value
    before = memory("VmRSS")
    yield
    assert memory("VmHWM") - before < MEMORY


@pytest.mark.fault(14)
@pytest.mark.usefixtures("little_memory")
def test_fields_of_any_value(source: Path, capfd: pytest.CaptureFixture[str]) -> None:
    counts = fuzz(source, 150)
    assert counts.total() >= 150
    assert capfd.readouterr() == ("", "")  # transformers prints nothing either


@pytest.mark.fault(14)
@pytest.mark.slow
@pytest.mark.usefixtures("little_memory")
def test_fields_of_any_value_many_times(source: Path) -> None:
    counts = fuzz(source, 4000)
    print(f"{counts.total()} configurations of {source.name}: {dict(counts)}")


@pytest.mark.fault(14)
@pytest.mark.usefixtures("little_memory")
@pytest.mark.parametrize("value", HUGE)
def test_every_number_huge(value: int, source: Path) -> None:
    config = json.loads((source / "config.json").read_text())
    try:
        for key in (*(key for key in config if isinstance(config[key], int)), "num_labels", "num_experts"):
            (source / "config.json").write_text(json.dumps({**config, key: value}))
            assert outcome(source) in {None, *CODES}, key
    finally:
        (source / "config.json").write_text(json.dumps(config))


@pytest.mark.fault(14)
def test_a_number_that_only_one_family_has(tmp_path: Path, refused: Refused) -> None:
    """gemma3n makes a module for each of these before the model has any part."""
    families.build("gemma3n_text").save_pretrained(tmp_path / "source")
    configure(tmp_path / "source", altup_num_inputs=10**6)
    refused(3, convert(tmp_path / "source", tmp_path / "out"), "more than", "parameters")


TEXTS = {
    "nested lists": "[" * 10**6,
    "nested objects": '{"a":' * 10**6,
    "nested in a field": '{"model_type": "llama", "a": ' + "[" * 5000 + "]" * 5000 + "}",
    "a number of a million digits": '{"model_type": "llama", "hidden_size": ' + "9" * 10**6 + "}",
    "a field twice": '{"model_type": "llama", "model_type": "gpt2"}',
    "a number": "5",
    "null": "null",
    "a lone surrogate": '{"model_type": "\\ud800"}',
    "a byte order mark": "\ufeff{}",
    "a hundred megabytes": '{"a": [' + "[]," * (100 << 20 >> 2) + "0]}",
}


@pytest.mark.usefixtures("little_memory")
@pytest.mark.parametrize("name", TEXTS)
def test_texts(name: str, source: Path, out: Path, cli: Cli) -> None:
    config = (source / "config.json").read_text()
    try:
        (source / "config.json").write_text(TEXTS[name])
        result = cli(*convert(source, out), seconds=SECONDS)
    finally:
        (source / "config.json").write_text(config)
    assert result.code in CODES, result
    assert result.err.startswith("Error: ")
    assert_no_controls(result)
    assert not out.exists()


# --- code ---


CODE = "import pathlib\npathlib.Path({path!r}).touch()\nclass Evil:\n    pass\n"
AUTO_MAP = {"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"}


@pytest.mark.fault(14)
@pytest.mark.parametrize("changes", [{}, {"model_type": "evil"}, {"architectures": ["Evil"]}], ids=str)
@pytest.mark.parametrize("upstream", ["", "evil/evil--"])
def test_code_of_the_repo_is_not_run(
    changes: dict[str, Any], upstream: str, tmp_path: Path, checkpoint: Checkpoint, out: Path, cli: Cli
) -> None:
    source = Path(shutil.copytree(checkpoint("llama"), tmp_path / "source"))
    (source / "evil.py").write_text(CODE.format(path=str(tmp_path / "run")))
    configure(source, auto_map={key: upstream + name for key, name in AUTO_MAP.items()}, **changes)
    result = cli(*convert(source, out))
    assert result.code in (CODES if "model_type" in changes else {0}), result
    assert not (tmp_path / "run").exists()
    assert not (out / "evil.py").exists()


CONTENTS = {
    "garbage": b"\xff{[" * 1000,
    "nested": b"[" * 10**6,
    "empty": b"",
    "code": b'{"auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}}',
}


@pytest.mark.fault(14)
@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "generation_config.json", "added.txt"])
@pytest.mark.parametrize("content", CONTENTS.values(), ids=CONTENTS)
def test_small_files_are_copied_and_not_read(
    name: str, content: bytes, tmp_path: Path, checkpoint: Checkpoint, out: Path, cli: Cli
) -> None:
    source = Path(shutil.copytree(checkpoint("llama"), tmp_path / "source"))
    (source / name).write_bytes(content)
    assert cli(*convert(source, out)).code == 0
    assert (out / name).read_bytes() == content
