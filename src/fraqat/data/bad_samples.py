"""Samples that cannot be used: counted by reason, named, skipped up to a limit, and never skipped in silence."""

from __future__ import annotations

import math
import warnings
from typing import Any

from fraqat.errors import ConfigError

NUM_EXAMPLES = 3
"""Samples of each reason that are named."""

_MIN_NUM_READ = 1000


class BadSampleError(Exception):
    """A sample cannot be used; the text is the reason, the same for all samples with the same fault."""


class SkippedSamplesWarning(UserWarning):
    """Samples were skipped."""


class BadSamples:
    """Counts the bad samples of one pass over the data after another.

    Args:
        what: The data, for messages.
        max_share: Share of a pass that may be bad.
        max_number: Number of a pass that may be bad; None sets no limit.
        num_samples: Samples of a pass, None if unknown: then the share is taken of what was read, of 1000 at the least.
    """

    def __init__(self, what: str, max_share: float, max_number: int | None, num_samples: int | None):
        self._what, self._max_share, self._max_number, self._num_samples = what, max_share, max_number, num_samples
        self._epoch, self._num_read = 0, 0
        self._counts: dict[str, int] = {}
        self._examples: dict[str, list[str]] = {}

    @property
    def counts(self) -> dict[str, int]:
        """Bad samples of this pass by reason."""
        return dict(self._counts)

    def add(self, epoch: int, key: str, reason: str | None) -> None:
        """Notes that a sample was read.

        Args:
            epoch: Pass over the data.
            key: Name of the sample.
            reason: What is wrong with it; None if nothing is.

        Raises:
            ConfigError: There are more bad samples than allowed.
        """
        if epoch != self._epoch:
            self.finish()
            self._epoch, self._num_read, self._counts, self._examples = epoch, 0, {}, {}
        self._num_read += 1
        if reason is None:
            return
        self._counts[reason] = self._counts.get(reason, 0) + 1
        examples = self._examples.setdefault(reason, [])
        if len(examples) < NUM_EXAMPLES:
            examples.append(key)
            if epoch == 0:
                self._warn(f"{self._what}: sample {key} is skipped: {reason}")
        self._check(self._num_samples or max(self._num_read, _MIN_NUM_READ))

    def finish(self) -> None:
        """Ends a pass: the totals are said after the first one.

        Raises:
            ConfigError: There are more bad samples than allowed.
        """
        if self._counts and self._epoch == 0:
            self._warn(
                f"{self._what}: {sum(self._counts.values())} of {self._num_read} samples skipped: {self._listing()}"
            )
        self._check(self._num_samples or self._num_read)

    def state_dict(self) -> dict[str, Any]:
        """The counts of this pass as plain values."""
        return {
            "epoch": self._epoch,
            "num_read": self._num_read,
            "counts": dict(self._counts),
            "examples": {reason: list(keys) for reason, keys in self._examples.items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Undoes `state_dict`."""
        self._epoch, self._num_read = state["epoch"], state["num_read"]
        self._counts = dict(state["counts"])
        self._examples = {reason: list(keys) for reason, keys in state["examples"].items()}

    def _check(self, num_samples: int) -> None:
        limits = {f"max_bad_share = {self._max_share:g}": math.floor(self._max_share * num_samples)}
        if self._max_number is not None:
            limits[f"max_bad = {self._max_number}"] = self._max_number
        name, limit = min(limits.items(), key=lambda item: item[1])
        num_bad = sum(self._counts.values())
        if num_bad > limit:
            raise ConfigError(
                f"{self._what}: {num_bad} of the first {self._num_read} samples cannot be used, more than the {limit} that "
                f"data.records.{name} allows: {self._listing()}. "
                "Fix: mend or remove these samples, or raise data.records.max_bad_share (and max_bad where it is set)."
            )

    def _listing(self) -> str:
        parts: list[str] = []
        for reason, count in sorted(self._counts.items(), key=lambda item: -item[1]):
            more = ", ..." if count > len(self._examples[reason]) else ""
            parts.append(f"{count} {reason} ({', '.join(self._examples[reason])}{more})")
        return "; ".join(parts)

    def _warn(self, text: str) -> None:
        warnings.warn(text, SkippedSamplesWarning, stacklevel=3)
