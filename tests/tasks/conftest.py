"""Tiny random pipelines of every architecture of the table, saved and loaded as users' are."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

from tiny_pipelines import BUILDERS

from fraqat.tasks import ModelSpec
from fraqat.tasks.pipelines import load_pipeline


@pytest.fixture(autouse=True)
def hub_asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The hub answers, whatever network there is; the list holds what was asked for."""
    asked: list[str] = []
    monkeypatch.setattr("huggingface_hub.utils.http_backoff", lambda method, url, **_: asked.append(url))
    return asked


@pytest.fixture(scope="session")
def saved_pipeline(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Folder of a tiny random pipeline, by architecture."""
    root = tmp_path_factory.mktemp("pipelines")

    def save(name: str) -> Path:
        folder = root / name
        if not folder.exists():
            torch.manual_seed(0)
            pipeline = BUILDERS[name]()
            for parameter in pipeline.transformer.parameters():  # an output layer that starts at zero shows nothing
                torch.nn.init.normal_(parameter, std=0.1) if parameter.abs().max() == 0 else None
            pipeline.save_pretrained(folder)
        return folder

    return save


@pytest.fixture(params=[pytest.param(name, marks=pytest.mark.xdist_group(f"pipeline-{name}")) for name in BUILDERS])
def architecture_name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def tiny_pipeline(architecture_name: str, saved_pipeline: Callable[[str], Path]) -> Any:
    return load_pipeline(ModelSpec(str(saved_pipeline(architecture_name))))
