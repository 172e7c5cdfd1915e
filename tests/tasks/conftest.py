"""Tiny random pipelines of every architecture of the table, saved and loaded as users' are."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

from tiny_pipelines import build_lumina2, build_wan

from fraqat.tasks import ModelSpec, SamplerSpec
from fraqat.tasks.pipelines import load_pipeline
from fraqat.zoo.color_digits_models import build_flux, build_pixart, build_sana, build_sd3

BUILDERS: dict[str, Callable[[], Any]] = {
    "sana": build_sana,
    "sd3": build_sd3,
    "pixart": build_pixart,
    "flux": build_flux,
    "lumina2": build_lumina2,
    "wan": build_wan,
}
GUIDANCE = {"flux": 0.0}


def tiny_sampler(name: str, **changes: Any) -> SamplerSpec:
    """Few steps at the size of the colour digits."""
    values: dict[str, Any] = {
        "num_steps": 3,
        "guidance_scale": GUIDANCE.get(name, 4.0),
        "height": 32,
        "width": 32,
        "max_sequence_length": 40 if name == "lumina2" else 8,  # room for its system prompt
        "call_arguments": {"num_frames": 1} if name == "wan" else {},
    }
    return SamplerSpec(**{**values, **changes})


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


@pytest.fixture(params=list(BUILDERS))
def architecture_name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def tiny_pipeline(architecture_name: str, saved_pipeline: Callable[[str], Path]) -> Any:
    return load_pipeline(ModelSpec(str(saved_pipeline(architecture_name))))
