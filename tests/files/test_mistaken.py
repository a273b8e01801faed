"""Files that are not what their names promise: the error says what they are, and what can be done."""

from __future__ import annotations

from pathlib import Path

import pytest
from cli_tools import INDEX, Refused, convert, first_file, single_file

from reshard.errors import BadInputError
from reshard.files.header import header_length

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"4d" * 32 + b"\nsize 12345\n"
PAGE = b"\n<!DOCTYPE html>\n<html><head><title>Sign in</title></head></html>"
XML = b'<?xml version="1.0" encoding="UTF-8"?><Error><Code>NoSuchKey</Code></Error>'
JSON = b'{"error":"Repository not found"}'
CONTENTS = {
    "pointer": (POINTER, "git-lfs pointer", "git lfs pull"),
    "page": (PAGE, "a web page", "fetch it again"),
    "page after a mark": (b"\xef\xbb\xbf<html>", "a web page", "fetch it again"),
    "XML": (XML, "XML", "fetch it again"),
    "JSON": (JSON, "Repository not found", "fetch it again"),
    "nothing": (b"", "empty", "fetch it again"),
    "zeros": (bytes(4096), "nothing but zeros", "fetch it again"),
}
NO_WEIGHTS = {
    "zip": (b"PK\x03\x04\x00\x00\x08\x08" + bytes(100), "a zip archive", "transformers"),
    "pickle": (b"\x80\x02}q\x00" + bytes(100), "a pickle", "transformers"),
    "GGUF": (b"GGUF\x03\x00\x00\x00" + bytes(100), "GGUF", "made from"),
}


@pytest.mark.parametrize("kind", ["one file", "of several"])
@pytest.mark.parametrize("case", [*CONTENTS, *NO_WEIGHTS])
def test_in_place_of_weights(case: str, kind: str, source: Path, out: Path, refused: Refused) -> None:
    content, said, hint = {**CONTENTS, **NO_WEIGHTS}[case]
    path = single_file(source) / "model.safetensors" if kind == "one file" else first_file(source)
    path.write_bytes(content)
    refused(3, convert(source, out), path.name, said, hint=hint)


@pytest.mark.parametrize("name", ["config.json", INDEX])
@pytest.mark.parametrize("case", CONTENTS)
def test_in_place_of_json(case: str, name: str, source: Path, out: Path, refused: Refused) -> None:
    content, said, hint = CONTENTS[case]
    (source / name).write_bytes(content)
    refused(3, convert(source, out), name, said, hint=hint)


def test_a_header_by_ranges_says_it_too() -> None:
    with pytest.raises(BadInputError, match="git-lfs pointer"):
        header_length(POINTER, file="x", file_size=len(POINTER))


def test_a_length_that_is_only_wrong_stays_a_length() -> None:
    with pytest.raises(BadInputError, match="header length"):
        header_length(b"\xff" * 8 + b"{" * 100, file="x", file_size=108)


def test_a_configuration_may_have_an_error_of_its_own(source: Path, out: Path, refused: Refused) -> None:
    """A file counts as an error message only if it holds nothing else."""
    (source / "config.json").write_text('{"model_type": "nope", "error": "no"}')
    refused(8, convert(source, out), "nope")
