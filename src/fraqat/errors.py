"""The errors a user can meet. Each names the field, the value, what is allowed and the fix, and carries an exit code."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from enum import StrEnum
from typing import Any, TypeVar

_Choice = TypeVar("_Choice", bound=StrEnum)


class FraqatError(Exception):
    """Base of every error that is the user's to mend. `exit_code` is what the command line returns."""

    exit_code = 1


class ConfigError(FraqatError, ValueError):
    """A setting, recipe or argument that cannot work."""

    exit_code = 2


class BatchSizeError(ConfigError):
    """A part of a training batch that is larger than the data.

    Args:
        num_samples: Of the part.
        num_train: Samples that there are.
    """

    def __init__(self, num_samples: int, num_train: int):
        allowed = f"at most data.num_train = {num_train}"
        super().__init__(_text("train.batch_size", num_samples, allowed, "use less"))
        self.num_train = num_train


class ModelError(FraqatError, ValueError):
    """A model folder, checkpoint of a model or export that is missing, damaged or unsafe."""

    exit_code = 3


class DataError(FraqatError):
    """Training data that is missing, damaged or does not come: a shard, or a worker process that hangs."""

    exit_code = 3


class CheckpointError(FraqatError):
    """A training checkpoint that cannot be written or read, or that belongs to another run."""

    exit_code = 4


class NonFiniteLossError(FraqatError):
    """The loss became NaN or infinite. The message names step, stage and the first layer where it shows."""

    exit_code = 5


class OutputError(FraqatError):
    """A place that cannot be written: it exists already, is not writable, or the disk is full."""

    exit_code = 6


class VerificationError(FraqatError):
    """An export that does not compute what was trained, within its bound."""

    exit_code = 7


class DeviceMemoryError(FraqatError):
    """The device's memory does not hold a training step. The message says what would make it fit."""

    exit_code = 8


class InterruptedRunError(FraqatError):
    """Training was stopped by SIGINT or SIGTERM after writing a checkpoint; exit code 128 + the signal's number."""

    def __init__(self, message: str, signal_number: int):
        super().__init__(message)
        self.exit_code = 128 + signal_number


def parse_choice(field: str, value: Any, choices: type[_Choice]) -> _Choice:
    """The member of `choices` that `value` names.

    Raises:
        ConfigError: There is none.
    """
    names = [choice.value for choice in choices]
    if value not in names:
        raise choice_error(field, value, names)
    return choices(value)


def choice_error(field: str, value: Any, names: Iterable[str], *, besides: str = "") -> ConfigError:
    """The error for a value that is none of `names`; the fix is the name that it looks like, if there is one.

    Args:
        field: What was set.
        value: What it was set to.
        names: What it may be.
        besides: What else is allowed, before the names.
    """
    known = list(names)
    close = difflib.get_close_matches(str(value), known, n=1)
    fix = f"did you mean {close[0]!r}?" if close else "choose one of these"
    return config_error(field, value, allowed=besides + ", ".join(known), fix=fix)


def check_seed(field: str, value: int) -> None:
    """Refuses a seed that the random generators cannot take.

    Raises:
        ConfigError: It is negative or 2^31 or more.
    """
    if not 0 <= value < 2**31:
        raise config_error(field, value, allowed="0 to 2^31 - 1", fix="choose another seed")


def config_error(field: str, value: Any, *, allowed: str, fix: str) -> ConfigError:
    """Builds the house's error text: `field = value: allowed is ...; fix`."""
    return ConfigError(_text(field, value, allowed, fix))


def _text(field: str, value: Any, allowed: str, fix: str) -> str:
    end = "" if fix.endswith("?") else "."
    return f"{field} = {value!r} is not possible: allowed is {allowed}. Fix: {fix}{end}"
