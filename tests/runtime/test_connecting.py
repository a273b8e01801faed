"""A rank that cannot reach the store that the ranks share: it says why, and what to do."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading

import pytest
import torch.distributed as dist

from reshard.errors import TopologyError
from runtime.distributed.agreement import Deadline
from runtime.distributed.mesh import connect
from runtime.distributed.ranks import RankInfo


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A process that has no store and no group yet: other tests of this process make one."""
    monkeypatch.setattr("runtime.distributed.mesh._store", None)
    monkeypatch.setattr(dist, "is_initialized", lambda: False)
    return monkeypatch


def test_a_port_that_is_taken(alone: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        alone.setenv("MASTER_ADDR", "127.0.0.1")
        alone.setenv("MASTER_PORT", str(taken.getsockname()[1]))
        with pytest.raises(TopologyError, match=r"rank 0 cannot reach the others: .*port") as refused:
            connect(RankInfo(0, 2, 0), Deadline.after(5))
    assert "--master-port" in str(refused.value.hint)


def test_a_store_that_ends_while_a_rank_meets_it(alone: pytest.MonkeyPatch) -> None:
    def reset(server: socket.socket) -> None:
        with contextlib.suppress(OSError):  # the server is closed
            while True:
                caller = server.accept()[0]
                caller.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                caller.close()

    with socket.create_server(("127.0.0.1", 0)) as server:
        thread = threading.Thread(target=reset, args=(server,), daemon=True)
        thread.start()
        alone.setenv("MASTER_ADDR", "127.0.0.1")
        alone.setenv("MASTER_PORT", str(server.getsockname()[1]))
        with pytest.raises(TopologyError, match="rank 1 cannot reach the others: ") as refused:
            connect(RankInfo(1, 2, 0), Deadline.after(3))
        server.shutdown(socket.SHUT_RDWR)  # ends its accept
        thread.join(10)
    assert "torchrun has ended" in str(refused.value.hint)
