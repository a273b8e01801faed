"""What quantizes: one file for each library whose bytes are made. A recipe says what a matrix becomes, and makes any
part of it from what this takes of the matrix: the result does not depend on how it is cut, nor on the threads.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from . import bitsandbytes, fp8
from .recipe import Made, Read, Recipe

__all__ = ["RECIPES", "Made", "Read", "Recipe"]

# What makes the recipe of each kind, from transformers' configuration of it. Raises ValueError for options that nothing
# can be made by.
RECIPES: dict[str, Callable[[Any], Recipe]] = {
    "nf4": bitsandbytes.four_bits,
    "fp4": bitsandbytes.four_bits,
    "int8": bitsandbytes.eight_bits,
    "fp8": fp8.blocks,
}
