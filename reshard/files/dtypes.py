"""The dtypes that can be moved: safetensors' codes and torch's names. Sub-byte formats have no element of their own."""

from __future__ import annotations

from collections.abc import Iterable

from ..errors import BadInputError
from ..text import printable
from .header import DTYPE_BITS

__all__ = [
    "CODES",
    "FLOATING",
    "NAMES",
    "STORABLE",
    "cache_dtype",
    "floating_dtype",
    "holds",
    "is_floating",
    "itemsize",
    "torch_name",
    "widest",
]

# safetensors code → torch name
NAMES = {
    "BOOL": "bool",
    "U8": "uint8",
    "I8": "int8",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "F8_E8M0": "float8_e8m0fnu",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "I16": "int16",
    "U16": "uint16",
    "F16": "float16",
    "BF16": "bfloat16",
    "I32": "int32",
    "U32": "uint32",
    "F32": "float32",
    "I64": "int64",
    "U64": "uint64",
    "F64": "float64",
    "C64": "complex64",
}
CODES = {name: code for code, name in NAMES.items()}
STORABLE = ("float32", "float16", "bfloat16")  # the dtypes that floating parameters can be stored in
_ALIASES = {"fp32": "float32", "float": "float32", "fp16": "float16", "half": "float16", "bf16": "bfloat16"}
_FP8 = "float8_e4m3fn"
# The dtypes that --dtype may change, narrow ones first: bits of the exponent and of the fraction.
_BITS = {"float16": (5, 10), "bfloat16": (8, 7), "float32": (8, 23), "float64": (11, 52)}
FLOATING = frozenset(_BITS)


def torch_name(code: str, *, tensor: str) -> str:
    """Return torch's name of a safetensors dtype. Raises BadInputError for a sub-byte one."""
    if code not in NAMES:
        raise BadInputError(f"{printable(tensor)}: dtype {printable(code)} cannot be resharded")
    return NAMES[code]


def is_floating(name: str) -> bool:
    """Whether a dtype (torch's name) holds real numbers. Dtypes of 8 bits count: they are stored, not computed in."""
    return name in FLOATING or name.startswith("float8_")


def floating_dtype(given: object) -> str:
    """Return torch's name of a dtype to store parameters in, given as torch.bfloat16, "torch.bfloat16", "bfloat16" or
    "bf16". Raises ValueError, which lists the dtypes there are.
    """
    name = str(given).removeprefix("torch.")
    name = _ALIASES.get(name, name)
    if name not in STORABLE:
        raise ValueError(f"one of {', '.join(STORABLE)}")
    return name


def cache_dtype(given: object) -> str:
    """Return torch's name of a dtype to keep keys and values in: as `floating_dtype`, and "fp8". Raises ValueError."""
    if str(given).removeprefix("torch.") in ("fp8", _FP8):
        return _FP8
    try:
        return floating_dtype(given)
    except ValueError as error:
        raise ValueError(f"{error} and fp8") from None


def holds(wide: str, narrow: str) -> bool:
    """Whether `wide` has every value of `narrow` (torch names), so that a cast to `wide` and back changes none."""
    if wide == narrow or not {wide, narrow} <= FLOATING:
        return wide == narrow
    return all(most >= least for most, least in zip(_BITS[wide], _BITS[narrow]))


def widest(names: Iterable[str]) -> str | None:
    """Return the narrowest dtype that holds the values of all `names` (torch's); None if there is none."""
    found = set(names)
    return next((one for one in (*found, *_BITS) if all(holds(one, other) for other in found)), None)


def itemsize(name: str) -> int:
    """Return the bytes of one element of a torch dtype, by name."""
    return DTYPE_BITS[CODES[name]] // 8
