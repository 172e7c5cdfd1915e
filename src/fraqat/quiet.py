"""Keeps what libraries say at their import from users, and nothing else."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Generator
from contextlib import contextmanager

_TORCHAO_LOGGERS = ("torchao", "torch.utils._pytree")


@contextmanager
def quiet_torchao() -> Generator[None]:
    """torchao warns at its import about libraries that we do not use."""
    loggers = [logging.getLogger(name) for name in _TORCHAO_LOGGERS]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="torchao")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
