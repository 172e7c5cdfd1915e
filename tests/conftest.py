"""Every test is seeded, single-threaded and derandomized, so that a failure is the same on every machine and every day."""

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import HealthCheck, settings
from torch import Tensor

settings.register_profile(
    "laws",
    derandomize=True,
    deadline=None,
    database=None,
    max_examples=60,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("laws")
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(1234)


@pytest.fixture(scope="session")
def sqnr_db() -> Callable[[Tensor, Tensor], float]:
    """Signal to quantization noise in dB. Unlike a cosine it sees a wrong scale."""

    def measure(reference: Tensor, value: Tensor) -> float:
        signal = reference.double().square().sum().item()
        noise = (reference.double() - value.double()).square().sum().item()
        return math.inf if noise == 0 else 10 * math.log10(signal / noise)

    return measure
