"""Laws of the teacher's training that are cheap enough to check."""

from pathlib import Path
from typing import Any

import pytest
import torch

from fraqat.zoo import transformer_training
from fraqat.zoo.color_digits_models import build_pipeline
from fraqat.zoo.transformer_training import TransformerSettings, load_average, train_transformer

SETTINGS = TransformerSettings(num_steps=4, batch_size=4, num_warmup_steps=1, checkpoint_every=2)
LATENTS = torch.randn(8, 8, 8, 8, generator=torch.Generator().manual_seed(0))
PROMPTS = ["a red two on blue", "a green one on black"] * 4


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def weights(pipeline: Any) -> list[torch.Tensor]:
    return [*pipeline.transformer.parameters(), *pipeline.text_encoder.parameters()]


def test_resumed_training_equals_uninterrupted_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = build_pipeline(0)
    before = [value.clone() for value in weights(whole)]
    result = train_transformer(whole, LATENTS, PROMPTS, SETTINGS, tmp_path / "whole.pt")
    assert result.num_steps == 4
    assert any(not torch.equal(old, new) for old, new in zip(before, weights(whole), strict=True))

    save = transformer_training._Run.save

    def save_and_stop(run: transformer_training._Run, path: Path) -> None:
        save(run, path)
        raise KeyboardInterrupt

    monkeypatch.setattr(transformer_training._Run, "save", save_and_stop)
    with pytest.raises(KeyboardInterrupt):
        train_transformer(build_pipeline(0), LATENTS, PROMPTS, SETTINGS, tmp_path / "parts.pt")
    assert load_average(build_pipeline(0), tmp_path / "parts.pt") == 2
    monkeypatch.setattr(transformer_training._Run, "save", save)
    resumed = build_pipeline(0)
    again = train_transformer(resumed, LATENTS, PROMPTS, SETTINGS, tmp_path / "parts.pt")
    assert again.loss == result.loss
    assert all(torch.equal(a, b) for a, b in zip(weights(whole), weights(resumed), strict=True))
