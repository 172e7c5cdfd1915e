"""Whether quantizers search the scales and clippings of a weight, or wait for a saved state."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from contextvars import ContextVar

from torch import Tensor

_searches = ContextVar("_searches", default=True)


@contextmanager
def without_search() -> Generator[None]:
    """Weight quantizers that are made in this context have ones where they would search scales or clippings.

    A search is 80 passes over the weight, in vain where a saved state is loaded next.
    """
    token = _searches.set(False)
    try:
        yield
    finally:
        _searches.reset(token)


def can_search(weight: Tensor) -> bool:
    """Whether the values of a weight are there and asked for."""
    return _searches.get() and not weight.is_meta
