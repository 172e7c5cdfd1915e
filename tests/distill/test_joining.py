"""A process that waits for others in vain says so in words."""

from __future__ import annotations

import socket

import pytest
import torch
import torch.distributed as dist

from fraqat.distill import ParallelSpec, joined
from fraqat.errors import FraqatError


@pytest.mark.parametrize("start", [None, "1"], ids=["plain", "torchrun"])
def test_a_process_that_nobody_meets_gives_up_with_what_to_do(
    monkeypatch: pytest.MonkeyPatch, start: str | None
) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    values = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}
    values |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    values |= {} if start is None else {"TORCHELASTIC_RESTART_COUNT": start}
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    with (
        pytest.raises(FraqatError, match=r"has ended or does not answer.*Fix: mend that"),
        joined(ParallelSpec("ddp", timeout_s=1), torch.device("cpu")),
    ):
        pytest.fail("nobody was there to meet")
    assert not dist.is_initialized()
