"""When oneDNN's product is worth trying."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fraqat.kernels import onednn
from fraqat.kernels.engine import EngineTable
from fraqat.kernels.onednn import OneDnn
from fraqat.kernels.portable import FloatCodes, IntegerMatmul
from fraqat.kernels.product import Operands

CPU = torch.device("cpu")


@pytest.fixture
def has_vnni(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: True)


@pytest.mark.usefixtures("has_vnni")
@pytest.mark.parametrize(("ratio", "reason"), [(0.8, ""), (750.0, "it takes 750 times as long as a float32 product")])
def test_plain_loops_are_not_tried(ratio: float, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onednn, "_slowness", lambda: ratio)
    assert OneDnn().why_unavailable(CPU).startswith(reason)
    assert bool(OneDnn().why_unavailable(CPU)) == bool(reason)


def operands() -> tuple[Operands, torch.Tensor]:
    codes = torch.ones(4, 8, dtype=torch.int8)
    weight_codes = torch.ones(3, 8, dtype=torch.int8)
    return Operands(codes, torch.ones(3), torch.ones(4), None, None, None, torch.float32), weight_codes


def test_an_engine_far_behind_is_called_once_after_its_first_call() -> None:
    class Slow(FloatCodes):
        name = "slow"
        num_calls = 0

        def product(self, operands: Operands, prepared: Any) -> torch.Tensor:
            type(self).num_calls += 1
            for _ in range(2000):
                super().product(operands, prepared)
            return super().product(operands, prepared)

    table = EngineTable(CPU, engines=(IntegerMatmul(), Slow()))
    given, codes = operands()
    assert table.engine_for(given, codes).name == "int_mm"
    assert Slow.num_calls == 2
