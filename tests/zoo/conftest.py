"""Untrained pipelines of every architecture of the table, as small as the table makes them."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from fraqat.zoo.architectures import ARCHITECTURES
from fraqat.zoo.color_digits_models import build_pipeline


@pytest.fixture
def untrained() -> Callable[[str], Any]:
    """Builds the pipeline of an architecture with an output that depends on everything."""

    def build(name: str) -> Any:
        pipeline = build_pipeline(ARCHITECTURES[name].build, seed=0)
        torch.nn.init.normal_(pipeline.transformer.proj_out.weight, std=0.2)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    return build
