"""Exponential moving average of the trained parameters."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


class ParameterAverage:
    """average <- decay * average + (1 - decay) * parameter, after every optimizer step, in float32.

    The decay rises as min(decay, (1 + n) / (10 + n)) over the first updates n, so that the start is forgotten.

    Args:
        parameters: What is averaged, by name.
        decay: In [0, 1).
    """

    def __init__(self, parameters: Mapping[str, Tensor], decay: float):
        self.decay = decay
        self.num_updates = 0
        self._parameters = dict(parameters)
        self._averages = {name: p.detach().float().clone() for name, p in self._parameters.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Takes the current parameters in."""
        decay = min(self.decay, (1 + self.num_updates) / (10 + self.num_updates))
        for name, average in self._averages.items():
            average.lerp_(self._parameters[name].detach().float(), 1 - decay)
        self.num_updates += 1

    @contextmanager
    def applied(self) -> Generator[None]:
        """The model holds the averages inside this context, and its own parameters again after it."""
        kept = {name: parameter.detach().clone() for name, parameter in self._parameters.items()}
        self.copy_to_model()
        try:
            yield
        finally:
            self._copy(kept)

    def copy_to_model(self) -> None:
        """Replaces the parameters by their averages."""
        self._copy(self._averages)

    def state_dict(self) -> dict[str, Any]:
        """Averages and count."""
        return {"num_updates": self.num_updates, "averages": self._averages}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Undoes `state_dict`."""
        averages = state["averages"]
        self.num_updates = state["num_updates"]
        for name, average in self._averages.items():
            average.copy_(averages[name])

    @torch.no_grad()
    def _copy(self, source: dict[str, Tensor]) -> None:
        for name, parameter in self._parameters.items():
            parameter.copy_(source[name])
