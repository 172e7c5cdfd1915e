"""One export of each small model of the zoo, shared by all tests that run it: tracing takes longest."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fraqat.config import load_recipe
from fraqat.export import ExportJob, OpenedExport, Part, target_named
from fraqat.workflows.sessions import Session, open_session

_SETTINGS = ("train.calibration_samples=8", "data.num_validation=16")
_PICTURES = ("data.num_train=64",)
"""Enough for calibration: all of the recipe's pictures would be encoded for the first batch."""


@dataclass(frozen=True)
class Exported:
    """A shortened student, quantized but not trained, and its export to "onnx"."""

    session: Session[Any]
    student: nn.Module
    parts: tuple[Part, ...]
    folder: Path

    @cached_property
    def opened(self) -> OpenedExport:
        """The graphs in ONNX Runtime."""
        return target_named("onnx").open(self.folder, self.student)

    def part(self, name: str) -> Part:
        """A part by name."""
        return next(part for part in self.parts if part.name == name)


@pytest.fixture(scope="session")
def export_onnx(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Exported]:
    """Exports the student of a recipe, with fewer layers of each kind: that is as good for these tests and traced sooner."""

    def export(recipe_name: str, shorten_: Callable[[Any], None], *settings: str) -> Exported:
        pytest.importorskip("onnxscript")
        pytest.importorskip("onnxruntime")
        recipe = load_recipe(recipe_name, (*_SETTINGS, *settings))
        session = open_session(recipe)
        torch.manual_seed(0)
        student, _ = session.new_student(recipe)
        shorten_(student.eval().requires_grad_(False))
        parts = session.export_parts(student)
        folder = tmp_path_factory.mktemp(recipe_name)
        job = ExportJob(student, lambda: parts, session.description(), None, folder, say=lambda line: None)
        target_named("onnx").write(job)
        return Exported(session, student, parts, folder)

    return export


@pytest.fixture(scope="session")
def sana(export_onnx: Callable[..., Exported]) -> Exported:
    """The demo's Sana: transformer, text encoder, decoder."""

    def shorten_(student: Any) -> None:
        student.transformer_blocks = student.transformer_blocks[:1]

    return export_onnx("color-digits", shorten_, *_PICTURES)


@pytest.fixture(scope="session")
def gemma(export_onnx: Callable[..., Exported]) -> Exported:
    """The small Gemma-2 with its key-value cache: a layer with a sliding window, and one without."""

    def shorten_(student: Any) -> None:
        student.model.layers = student.model.layers[:2]
        student.config.num_hidden_layers = 2
        student.config.layer_types = student.config.layer_types[:2]

    return export_onnx("gemma-2-2b-it-tiny", shorten_)


@pytest.fixture(scope="session")
def speecht5(export_onnx: Callable[..., Exported]) -> Exported:
    """The small SpeechT5: decoder, encoder, postnet."""

    def shorten_(student: Any) -> None:
        for part in (student.speecht5.encoder.wrapped_encoder, student.speecht5.decoder.wrapped_decoder):
            part.layers = part.layers[:1]
        student.config.encoder_layers = student.config.decoder_layers = 1

    return export_onnx("speecht5-tiny", shorten_)
