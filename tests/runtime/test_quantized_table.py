"""The table of quantized checkpoints: every format on ranks, as `scripts/quantized --write` measured it."""

from __future__ import annotations

from pathlib import Path

import pytest
import quantized_cases
import quantized_matrix
import quantized_report
from places import ROOT

TABLES = sorted(path.stem.removeprefix("quantized-") for path in quantized_report.DATA.glob("quantized-*.jsonl"))


def test_the_page_is_what_the_data_make() -> None:
    assert quantized_report.PAGE.read_text() == quantized_report.page(quantized_report.RELEASE)


def test_the_scripts_page_says_what_the_data_say() -> None:
    page = " ".join((ROOT / "scripts" / "README.md").read_text().split())
    said = quantized_report.summary(quantized_report.read(quantized_report.RELEASE))
    assert " ".join(said.split()) in page


def test_the_page_is_of_the_newest_data() -> None:
    assert TABLES[-1] == quantized_report.RELEASE


@pytest.mark.parametrize("version", TABLES)
def test_every_case_is_there_and_exact(version: str) -> None:
    records = quantized_report.read(version)
    assert [(record["model"], record["kind"]) for record in records] == quantized_cases.OF_TABLE
    assert [record for record in records if not quantized_matrix.is_exact(record)] == []


@pytest.mark.parametrize("version", TABLES)
def test_transformers_itself_is_right_where_nothing_is_quantized(version: str) -> None:
    """Otherwise its errors would say nothing of quantization."""
    plain = [record for record in quantized_report.read(version) if record["kind"] == quantized_cases.PLAIN]
    theirs = [record["upstream"][which] for record in plain for which in ("single", "tp2")]
    assert plain
    assert all(isinstance(error, float) and error <= quantized_report.NEAR for error in theirs)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "kind"), quantized_cases.OF_TABLE)
def test_every_case_again(name: str, kind: str, tmp_path: Path) -> None:
    assert quantized_matrix.is_exact(quantized_matrix.record_of(name, kind, tmp_path, upstream=False))
