"""`reshard env`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import click

from .common import format_option, print_report

__all__ = ["env"]


@click.command()
@format_option
def env(style: str) -> None:
    """Print versions, devices, caches and settings for a bug report.

    Tokens, passwords and the name of your home folder are not printed.

    \b
    Examples:
      reshard env
      reshard env --format json
    """
    from ..operations.environment import environment

    print_report(environment(), style, _text)


def _text(found: Mapping[str, Any]) -> str:
    from ..showing.tables import gigabytes

    def size(value: int | None) -> str:
        return "unknown" if value is None else gigabytes(value)

    packages = ", ".join(f"{name} {version}" for name, version in found["packages"].items() if version)
    missing = ", ".join(name for name, version in found["packages"].items() if version is None)
    devices, hub = found["devices"], found["hub"]
    lines = [
        ("reshard", found["reshard"]),
        ("python", f"{found['python']} ({found['executable']})"),
        ("system", found["system"]),
        ("packages", packages),
        ("not installed", missing),
        ("CPUs", f"{found['cpus']}, memory {size(found['memory'])}"),
        ("GPUs", devices.get("problem") or _gpus(devices)),
        ("Hub", hub.get("problem") or _hub(hub)),
    ]
    for cache in found["caches"]:
        more = "" if cache["complete"] else "at least "
        lines.append(
            (f"cache ({cache['name']})", f"{cache['folder']}: {more}{size(cache['size'])}, {size(cache['free'])} free")
        )
    lines += [(name, value) for name, value in found["variables"].items()]
    widest = max(len(name) for name, _ in lines)
    return "\n".join(f"{name.ljust(widest)}  {value}" for name, value in lines if value)


def _gpus(devices: Mapping[str, Any]) -> str:
    from ..showing.tables import gigabytes

    kinds = [f"{gpu['name']} ({gigabytes(gpu['memory'])}, {gpu['capability']})" for gpu in devices["gpus"]]
    counted = [f"{kinds.count(kind)} × {kind}" for kind in dict.fromkeys(kinds)]
    built = ", ".join(f"{name} {devices[name]}" for name in ("cuda", "hip", "nccl") if devices.get(name))
    return f"{', '.join(counted) or 'none'}; torch is built for {built or 'CPU'}"


def _hub(hub: Mapping[str, Any]) -> str:
    offline = ", offline" if hub["offline"] else ""
    return f"{hub['endpoint']}{offline}, token: {'yes' if hub['token'] else 'no'}"
