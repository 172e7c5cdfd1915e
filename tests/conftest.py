"""Every test is seeded, single-threaded and derandomized, so that a failure is the same on every machine and every day."""

import math
from collections.abc import Callable, Iterator

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


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Encoded data goes to a folder of the test session, not to the user's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FRAQAT_CACHE", str(tmp_path_factory.mktemp("encoded")))
        yield


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
