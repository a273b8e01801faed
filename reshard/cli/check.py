"""`reshard check`."""

from __future__ import annotations

from typing import Any

import click

from ..launch.options import check_options
from .common import on_ranks

__all__ = ["check"]


@click.command()
@check_options
def check(out: str, reference: str | None, per_layer: bool, **options: Any) -> None:
    """Compare logits and greedy tokens of OUT with the single-process model; exit 4 where more than rounding differs.

    Without --reference, with what `reshard convert --reference-logits` has stored of it: made on CPU, so that on
    another device the limit is looser in fp32.

    The logits show only what the fixed tokens reach: not the other rows of an embedding, nor experts that none is
    routed to. With --per-layer, where no module differs, every parameter is compared, as `reshard verify OUT --against
    SOURCE` does without running anything.

    \b
    Examples:
      reshard check llama-tp2 --reference ./llama
      reshard check llama-tp2 --reference ./llama --per-layer --no-digests
    """
    from ..launch.asked import check_model_options, check_per_layer, look_at_folder, look_at_reference

    check_model_options(options)
    check_per_layer(reference, per_layer=per_layer)
    manifest = look_at_folder(out, options["revision"])
    look_at_reference(out, manifest, reference)
    on_ranks("check", manifest.world_size * options["dp_size"])
