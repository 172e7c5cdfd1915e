"""How long work tells a person where it is. The command line draws it; everything else may stay silent."""

from __future__ import annotations

from typing import Protocol

from fraqat.distill import StepRecord


class Progress(Protocol):
    """Receives what happens during long work."""

    def say(self, text: str) -> None:
        """One line about what begins or what was found."""
        ...

    def warn(self, text: str) -> None:
        """One line that a person should not miss."""
        ...

    def step(self, record: StepRecord) -> None:
        """One optimizer step."""
        ...

    def count(self, what: str, done: int, total: int) -> None:
        """`done` of `total` units of `what`."""
        ...


class SilentProgress:
    """Shows nothing."""

    def say(self, text: str) -> None:
        """Ignored."""

    def warn(self, text: str) -> None:
        """Ignored."""

    def step(self, record: StepRecord) -> None:
        """Ignored."""

    def count(self, what: str, done: int, total: int) -> None:
        """Ignored."""
