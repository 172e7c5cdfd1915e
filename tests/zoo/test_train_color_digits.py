"""The whole program that makes a teacher, on sizes that take seconds."""

import dataclasses
import json
from pathlib import Path

import pytest

from fraqat.zoo import train_color_digits
from fraqat.zoo.architectures import ARCHITECTURES, Distillation, SamplerSettings
from fraqat.zoo.train_color_digits import main, train

pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight:UserWarning"),
]


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train_color_digits, "NUM_AUTOENCODER_IMAGES", 32)
    monkeypatch.setattr(train_color_digits, "NUM_LATENTS", 32)
    few = Distillation(4, teacher_steps=1, teacher_guidance=2.0, sampler_sigmas=(1.0, 0.5), num_steps=2)
    settings = {
        "num_steps": 2,
        "num_text_steps": 1,
        "autoencoder_steps": 2,
        "autoencoder_batch_size": 4,
        "batch_size": 4,
    }
    for name, architecture in list(ARCHITECTURES.items()):
        tiny = dataclasses.replace(
            architecture,
            **settings,
            sampler=SamplerSettings(1, architecture.sampler.guidance_scale),
            default_call=SamplerSettings(1, 1.0),
            distillation=few if architecture.distillation else None,
        )
        monkeypatch.setitem(ARCHITECTURES, name, tiny)


@pytest.mark.usefixtures("tiny")
def test_program_leaves_pipeline_figures_and_card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    work, out = tmp_path / "work", tmp_path / "out"
    command = ["train", "--architecture", "flux", "--work", str(work), "--out", str(out), "--num-images", "4"]
    monkeypatch.setattr("sys.argv", command)
    main()
    figures = json.loads((out / "quality.json").read_text())
    assert set(figures) == {"held_out", "trained", "held_out_default_call"}
    assert figures["held_out"]["num_images"] == 4
    card = (out / "README.md").read_text()
    assert "2 steps of 4 latents" in card and "4 pairs of noise and picture" in card
    assert (out / "model_index.json").is_file()


@pytest.mark.usefixtures("tiny")
def test_architectures_share_an_autoencoder_and_a_second_call_trains_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, record = train("sd3", tmp_path)

    def fail(*_: object, **__: object) -> None:
        raise AssertionError("trained again")

    monkeypatch.setattr(train_color_digits, "train_autoencoder", fail)
    monkeypatch.setattr("fraqat.zoo.transformer_training._Run.step", fail)
    again, same = train("sd3", tmp_path)
    assert record.autoencoder == same.autoencoder and record.transformer.loss == same.transformer.loss
    for part in ("vae", "transformer", "text_encoder_3"):
        kept, loaded = getattr(first, part).state_dict(), getattr(again, part).state_dict()
        assert all(kept[key].equal(loaded[key]) for key in kept), part
