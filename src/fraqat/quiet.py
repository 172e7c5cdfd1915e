"""Keeps what libraries say at their import from users, and nothing else."""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Generator
from contextlib import contextmanager

_TORCHAO_LOGGERS = ("torchao", "torch.utils._pytree")
_NOTICES = {
    "torchao": re.compile(r"Failed to load \S+/torchao/_C\S*\.so: "),  # CUDA kernels that fraqat never calls
    "torch.utils._pytree": re.compile(r"<enum '\w+'> is an Enum subclass .* Calling register_constant\(\)"),
    "diffusers.quantizers.torchao.torchao_quantizer": re.compile(r"Unable to import `torchao` Tensor objects\."),
}
"""What is logged when diffusers imports torchao 0.18, by logger. All three also come where `tests/export` loads our exports."""


class _NoticeFilter(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        return _NOTICES[record.name].match(record.getMessage()) is None


_FILTER = _NoticeFilter()


def drop_torchao_notices() -> None:
    """Drops three known notices of torchao's import, wherever it is imported later, and nothing else from the same loggers."""
    for name in _NOTICES:
        logging.getLogger(name).addFilter(_FILTER)  # the same filter is not added twice


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
