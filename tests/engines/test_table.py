"""The table of exports: the families that vLLM lays out by copies, as `scripts/engines --write` found them."""

from __future__ import annotations

import engine_report
import engine_tools
import pytest
from places import ROOT

RECORDS = engine_report.read()


def test_the_page_is_what_the_data_make() -> None:
    assert engine_report.PAGE.read_text() == engine_report.page(RECORDS)


def test_the_page_of_engines_says_what_the_data_say() -> None:
    page = " ".join((ROOT / "reshard" / "engines" / "README.md").read_text().split())
    assert " ".join(engine_report.summary(RECORDS).split()) in page


def test_families_that_people_serve_are_copied() -> None:
    copied = {record["family"] for record in RECORDS if set(record["meshes"].values()) == {"copies"}}
    assert copied >= {"llama", "qwen2", "qwen3", "mistral", "mixtral", "qwen3_moe", "gemma2", "gemma3_text", "phi3"}


@pytest.mark.slow
@pytest.mark.skipif(not engine_tools.HERE, reason="no .venv-vllm: scripts/engine_env vllm makes it")
@pytest.mark.parametrize("record", RECORDS, ids=lambda record: f"{record['family']}-{record['format']}")
def test_every_case_again(record: dict) -> None:
    assert engine_report.record_of(record["family"], record["format"]) == record
