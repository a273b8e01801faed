"""A hint names the known cause, and no other."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from cli_tools import Cli, assert_one_error
from object_store import ObjectStore, error

from reshard.checkpoint.architecture import model_class
from reshard.errors import BadInputError, NetworkError, ReshardError, VersionError
from reshard.storage.filesystems import doing
from runtime.benchmark.engines import _tensor_parallel
from runtime.generation.prompts import load_tokenizer

CONFIGURATIONS: dict[str, tuple[dict[str, Any], type[ReshardError], str, str | None]] = {
    "of no model": ({"model_type": "quux"}, VersionError, "does not know model type quux", "another release"),
    "of a known model": ({"model_type": "llama", "hidden_size": "x"}, BadInputError, "hidden_size", None),
    "without a model type": ({"hidden_size": 64}, BadInputError, "model_type", None),
}


@pytest.mark.parametrize("case", CONFIGURATIONS)
def test_a_configuration(case: str, tmp_path: Path) -> None:
    config, kind, words, hint = CONFIGURATIONS[case]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ReshardError, match=words) as refused:
        model_class(tmp_path)
    assert type(refused.value) is kind
    assert hint in (refused.value.hint or "") if hint else refused.value.hint is None


def test_a_folder_without_a_tokenizer(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BadInputError, match="holds no tokenizer") as refused:
        load_tokenizer(folder)
    assert "put the model's own there" in str(refused.value.hint)
    (folder / "tokenizer.model").write_bytes(b"-")

    def lacks(*_: object, **__: object) -> None:
        raise ImportError("needs sentencepiece")

    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", lacks)
    with pytest.raises(BadInputError, match="needs sentencepiece") as refused:
        load_tokenizer(folder)
    assert refused.value.hint is None


def test_an_engine_that_cannot_be_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine that is missing gets another hint than one that fails to import."""
    with pytest.raises(BadInputError) as refused:
        _tensor_parallel(tmp_path, 2, None)  # type: ignore[arg-type]
    assert refused.value.hint == "pip install tensor_parallel"
    (tmp_path / "tensor_parallel.py").write_text("import a_package_that_is_not_there")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(BadInputError, match="a_package_that_is_not_there") as refused:
        _tensor_parallel(tmp_path, 2, None)  # type: ignore[arg-type]
    assert refused.value.hint is None


class ConnectTimeoutError(Exception):
    """An error with botocore's name."""


@pytest.mark.parametrize("kind", [ConnectionResetError, TimeoutError, ConnectTimeoutError])
def test_a_store_that_does_not_answer(kind: type[Exception]) -> None:
    with pytest.raises(NetworkError) as refused, doing("read", "s3://bucket/x"):
        raise kind("no answer")
    assert refused.value.hint == "check the connection, and try again"


def test_a_store_that_refuses_for_a_reason_of_its_own(store: ObjectStore, cli: Cli) -> None:
    with pytest.raises(NetworkError) as refused, doing("read", "s3://bucket/x"):
        raise RuntimeError("the bucket is in another region")
    assert refused.value.hint is None
    store.fault = lambda call: error("403 Forbidden", "AccessDenied")
    assert_one_error(cli("inspect", "s3://bucket/x"), 10, "may not list", hint="credentials")
