"""Every test is seeded, single-threaded and derandomized, so that a failure is the same on every machine and every day."""

import gc
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


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--fuzz-minutes", type=float, default=5.0, help="time of every target of `-m fuzz`")
    parser.addoption("--fault-trials", type=int, default=20, help="trials of `-m faults`; see benchmarks/faults.py")


def pytest_collection_finish() -> None:
    """Modules and tests stay to the end: the garbage collector need not look through them again in every test."""
    gc.collect()
    gc.freeze()


def pytest_sessionfinish() -> None:
    gc.unfreeze()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Long runs are left out unless `-m` names them, and may take as long as they need."""
    chosen = config.getoption("-m")
    long = [
        (item, name)
        for item in items
        for name in ("faults", "fuzz", "four_processes", "compiled")
        if item.get_closest_marker(name)
    ]
    left_out = [item for item, name in long if name not in chosen]
    for item, _ in long:
        item.add_marker(pytest.mark.timeout(0))
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]


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
