"""Two hosts on one machine: network namespaces that a cable of 10.77.0.0/24 joins, each with its own loopback."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import warm_commands
import warm_ranks


@dataclass(frozen=True)
class Host:
    """A namespace, its address, and the name of its end of the cable."""

    name: str
    address: str
    interface: str

    def start(self, *command: str, **variables: str) -> subprocess.Popen[str]:
        """Start one of our commands, or torchrun, on this host. All that it starts is there too."""
        there = {**variables, warm_ranks.NETWORK: f"/run/netns/{self.name}", "GLOO_SOCKET_IFNAME": self.interface}
        return subprocess.Popen(
            [f"{os.path.dirname(warm_commands.python())}/{command[0]}", *command[1:]],
            env={**os.environ, **there},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    @contextlib.contextmanager
    def serve(self, folder: Path) -> Iterator[str]:
        """Serve a folder to the other host. The value is its URL."""
        server = ["-u", "-m", "http.server", "--bind", self.address, "--directory", str(folder), "8000"]
        command = ["ip", "netns", "exec", self.name, sys.executable, *server]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
            try:
                assert process.stdout is not None
                assert process.stdout.readline().startswith("Serving")
                yield f"http://{self.address}:8000"
            finally:
                process.kill()


def why_not() -> str | None:
    """Return why there cannot be two hosts here, if so."""
    if os.geteuid() != 0:
        return "namespaces take root"
    if shutil.which("ip") is None:
        return "iproute2 is not installed"
    try:
        with two_hosts():
            return None
    except subprocess.CalledProcessError as error:
        return f"{' '.join(error.cmd)}: {error.stderr.strip()}"


@contextlib.contextmanager
def two_hosts() -> Iterator[tuple[Host, Host]]:
    """Make two hosts. Nothing is left of them afterwards."""
    first, second = (
        Host(f"rs{os.getpid()}{end}", f"10.77.0.{number}", f"rs{end}") for number, end in ((1, "a"), (2, "b"))
    )
    try:
        for host in (first, second):
            _ip("netns", "add", host.name)
        cable = ("link", "add", first.interface, "netns", first.name)
        _ip(*cable, "type", "veth", "peer", "name", second.interface, "netns", second.name)
        for host in (first, second):
            _ip("-n", host.name, "addr", "add", f"{host.address}/24", "dev", host.interface)
            for interface in ("lo", host.interface):
                _ip("-n", host.name, "link", "set", interface, "up")
        yield first, second
    finally:
        for host in (first, second):
            subprocess.run(["ip", "netns", "del", host.name], capture_output=True)  # the cable goes with its ends


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)
