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
    """Compare logits and greedy tokens of OUT with one process.

    The exit code is 4 if they differ by more than rounding. Without --reference, OUT is compared with the logits that
    `reshard convert --reference-logits` stored. They were made on CPU, so in fp32 the limit is looser on other devices.

    The logits show only what the fixed tokens reach: not the other rows of an embedding, nor experts that no token is
    routed to. With --per-layer, if no module differs, every parameter is compared. `reshard verify OUT --against
    SOURCE` does so too, without running the model.

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
