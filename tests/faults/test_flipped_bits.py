"""Every flipped bit in every file of a resharded folder is found, and the file named."""

from __future__ import annotations

from pathlib import Path

import pico
import pytest
from pico import TINY

import reshard
from reshard.errors import BadInputError, IntegrityError, VersionError
from reshard.resharded.manifest import read_manifest

STEP = 29  # bytes between the flips in CI; the slow sweep takes every bit


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of a few kilobytes with every kind of file."""
    root = tmp_path_factory.mktemp("bits")
    source = pico.save("llama", root / "source", **TINY)
    (source / "LICENSE").write_text("do as you please\n")
    reshard.convert(source, root / "out", tp_size=2)
    return root / "out"


def sweep(folder: Path, bits: range, step: int) -> int:
    """Flip the bits of each `step`-th byte, one at a time, and verify. Returns the number of flips."""
    # The format and its version are read before the seal can be.
    of_manifest = (IntegrityError, BadInputError, VersionError)
    flips = 0
    for path in sorted(folder.iterdir()):
        data = path.read_bytes()
        for at in range(0, len(data), step):
            for bit in bits if step == 1 else [(at // step) % 8]:
                flipped = bytearray(data)
                flipped[at] ^= 1 << bit
                path.write_bytes(flipped)
                flips += 1
                with pytest.raises(of_manifest if path.name == "reshard.json" else IntegrityError) as found:
                    reshard.verify(folder)
                assert path.name in found.value.message, (path.name, at, bit)
        path.write_bytes(data)
    reshard.verify(folder)
    return flips


@pytest.mark.fault(19)
def test_a_flipped_bit_is_found(tiny: Path) -> None:
    assert len(read_manifest(tiny).files()) >= 4
    assert sweep(tiny, range(8), STEP) > 500


@pytest.mark.fault(19)
@pytest.mark.slow
def test_every_flipped_bit_is_found(tiny: Path) -> None:
    print(sweep(tiny, range(8), 1), "bits flipped")
