"""Which precision `train.autocast` leads to."""

from __future__ import annotations

import pytest
import torch

from fraqat.distill import Autocast, TrainSpec, autocast, autocast_dtype, precision
from fraqat.errors import ConfigError


@pytest.mark.parametrize(("has_bfloat16", "expected"), [(True, torch.bfloat16), (False, None)])
def test_auto_follows_the_hardware(
    has_bfloat16: bool, expected: torch.dtype | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precision, "_has_bfloat16", lambda device_type: has_bfloat16)
    assert autocast_dtype("auto", "cpu") is expected
    with autocast("auto", "cpu"):
        assert torch.is_autocast_enabled("cpu") is has_bfloat16


@pytest.mark.parametrize(("choice", "expected"), [("bfloat16", torch.bfloat16), ("none", None)])
def test_a_named_precision_is_taken_on_any_hardware(
    choice: Autocast, expected: torch.dtype | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for has_bfloat16 in (True, False):
        monkeypatch.setattr(precision, "_has_bfloat16", lambda device_type, has=has_bfloat16: has)
        assert autocast_dtype(choice, "cpu") is expected


def test_a_cpu_is_asked_what_it_multiplies_in() -> None:
    has_wide_vectors = "AVX512" in torch.backends.cpu.get_cpu_capability()
    if torch.backends.cpu.get_cpu_capability() in ("DEFAULT", "AVX2") or has_wide_vectors:
        assert (autocast_dtype("auto", "cpu") is torch.bfloat16) == has_wide_vectors


def test_a_gpu_that_is_not_here_is_taken_for_a_recent_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert autocast_dtype("auto", "cuda") is torch.bfloat16


def test_another_word_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"train\.autocast"):
        TrainSpec(autocast="float16")  # pyright: ignore[reportArgumentType]
