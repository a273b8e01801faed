"""The dtypes that can be moved: safetensors' codes and torch's names. Sub-byte formats have no element of their own."""

from __future__ import annotations

from .errors import BadInputError, printable
from .header import DTYPE_BITS

__all__ = ["CODES", "FLOATING", "NAMES", "STORABLE", "floating_dtype", "itemsize", "torch_name"]

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
STORABLE = ("float32", "float16", "bfloat16")  # what floating parameters can be stored in
_ALIASES = {"fp32": "float32", "float": "float32", "fp16": "float16", "half": "float16", "bf16": "bfloat16"}
FLOATING = frozenset({"float16", "bfloat16", "float32", "float64"})  # what --dtype may change


def torch_name(code: str, *, tensor: str) -> str:
    """torch's name of a safetensors dtype. Raises BadInputError for a sub-byte one."""
    if code not in NAMES:
        raise BadInputError(f"{printable(tensor)}: dtype {printable(code)} cannot be resharded")
    return NAMES[code]


def floating_dtype(given: object) -> str:
    """torch's name of a dtype to store parameters in, given as torch.bfloat16, "torch.bfloat16", "bfloat16" or "bf16".

    Raises ValueError, which says what there is.
    """
    name = str(given).removeprefix("torch.")
    name = _ALIASES.get(name, name)
    if name not in STORABLE:
        raise ValueError(f"one of {', '.join(STORABLE)}")
    return name


def itemsize(name: str) -> int:
    """Bytes of one element of a torch dtype, by name."""
    return DTYPE_BITS[CODES[name]] // 8
