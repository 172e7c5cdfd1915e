"""Laws of the embedded teachers: they are small, plain, and draw what their prompt says."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline

from fraqat.data.color_digits import compose, held_out_combinations
from fraqat.evaluation.classifier import load_classifier
from fraqat.zoo import zoo_path
from fraqat.zoo.architectures import ARCHITECTURES, SamplerSettings
from fraqat.zoo.autoencoder_training import AutoencoderResult, encode, train_autoencoder
from fraqat.zoo.model_card import TrainingRecord, write_card
from fraqat.zoo.quality import Quality, judge, sample
from fraqat.zoo.train_color_digits import write_pipeline
from fraqat.zoo.transformer_training import TransformerResult

# diffusers' DPM-Solver hands tensors to numpy in a way that numpy 2 deprecates.
pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning"),
    pytest.mark.xdist_group("zoo"),  # one worker loads each pipeline once
]

HELD_OUT = held_out_combinations()[:48]
CLASSES = {
    "sana": ("SanaTransformer2DModel", "AutoencoderDC", "DPMSolverMultistepScheduler"),
    "sd3": ("SD3Transformer2DModel", "AutoencoderKL", "FlowMatchEulerDiscreteScheduler"),
    "pixart": ("PixArtTransformer2DModel", "AutoencoderKL", "DPMSolverMultistepScheduler"),
    "flux": ("FluxTransformer2DModel", "AutoencoderKL", "FlowMatchEulerDiscreteScheduler"),
}
GOOD = 0.93  # share of right digits on held-out prompts


@pytest.fixture(params=ARCHITECTURES, scope="module")
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def folder(name: str) -> Path:
    return zoo_path(f"color-digits-{name}")


@pytest.fixture(scope="module")
def pipeline(folder: Path) -> Any:
    pipeline = DiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def files_of(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def test_folder_is_small_and_holds_no_pickle(folder: Path) -> None:
    assert sum(path.stat().st_size for path in files_of(folder)) <= 6_000_000
    assert {path.suffix for path in files_of(folder)} <= {".json", ".safetensors", ".md"}


def test_parts_are_of_the_classes_of_the_large_model(name: str, pipeline: Any) -> None:
    parts = tuple(type(getattr(pipeline, part)).__name__ for part in ("transformer", "vae", "scheduler"))
    assert parts == CLASSES[name]


def test_weights_load_as_float32(name: str, pipeline: Any) -> None:
    for part in ("vae", "transformer", *ARCHITECTURES[name].text_encoders):
        assert {value.dtype for value in getattr(pipeline, part).parameters()} == {torch.float32}


def test_held_out_prompts_are_drawn_as_well_as_the_card_says(name: str, folder: Path, pipeline: Any) -> None:
    """Other noise and few pictures: the share may fall short of the recorded one by two standard deviations."""
    classifier = load_classifier(zoo_path("color-digits-classifier"))
    architecture = ARCHITECTURES[name]
    settings = SamplerSettings(architecture.sampler.num_steps, architecture.sampler.guidance_scale, seed=11)
    images = sample(architecture, pipeline, [item.prompt for item in HELD_OUT], settings)
    shares = judge(classifier, images, HELD_OUT)
    recorded = json.loads((folder / "quality.json").read_text())["held_out"]["digit"]
    assert shares["digit"] >= recorded - 2 * (recorded * (1 - recorded) / len(HELD_OUT)) ** 0.5
    assert shares["color"] >= 0.95
    assert shares["ground"] >= 0.95


def test_widths_of_inner_layers_are_multiples_of_32(pipeline: Any) -> None:
    blocks = [child for child in pipeline.transformer.children() if isinstance(child, torch.nn.ModuleList)]
    assert blocks
    for block in blocks:
        for path, module in block.named_modules():
            if isinstance(module, torch.nn.Linear) or (
                isinstance(module, torch.nn.Conv2d) and module.kernel_size == (1, 1)
            ):
                assert module.weight.shape[0] % 32 == 0 and module.weight.shape[1] % 32 == 0, path


def test_unknown_words_and_the_empty_prompt_are_tokens(pipeline: Any) -> None:
    for part, tokenizer in pipeline.components.items():
        if part.startswith("tokenizer"):
            empty, strange = tokenizer(["", "a shiny seven"]).input_ids
            assert 1 <= len(empty) <= 2
            assert strange.count(tokenizer.unk_token_id) == 1 and tokenizer.unk_token_id not in empty


def test_latents_have_unit_variance(name: str, pipeline: Any) -> None:
    latents = encode(pipeline.vae, compose(HELD_OUT, seed=0, split="test"))
    assert latents.std() == pytest.approx(1.0, abs=0.1)
    assert abs(latents.mean()) < 0.1
    shift = getattr(pipeline.vae.config, "shift_factor", None)
    assert (shift is not None) == ARCHITECTURES[name].shifts_latents


def test_quality_file_is_on_the_card(folder: Path) -> None:
    held_out = json.loads((folder / "quality.json").read_text())["held_out"]
    assert held_out["num_images"] >= 250
    assert held_out["color"] >= 0.98 and held_out["ground"] >= 0.98
    card = (folder / "README.md").read_text()
    assert f"{100 * held_out['digit']:.1f} %" in card
    assert "Apache-2.0" in card and "CC BY 4.0" in card
    assert ("10 % is chance" in card) == (held_out["digit"] < GOOD)


@pytest.mark.parametrize("teacher", ARCHITECTURES)
def test_digits_are_those_asked_for(teacher: str) -> None:
    figures = json.loads((zoo_path(f"color-digits-{teacher}") / "quality.json").read_text())
    assert figures["held_out"]["digit"] >= GOOD


def test_code_on_the_card_runs(folder: Path) -> None:
    card = (folder / "README.md").read_text()
    code = card.split("```python\n")[1].split("```")[0]
    names: dict[str, Any] = {"folder": folder}
    exec(code, names)
    assert names["image"].size == (32, 32)


def test_written_pipeline_samples_what_the_kept_one_samples(
    name: str, tmp_path: Path, untrained: Callable[[str], Any]
) -> None:
    pipeline, architecture = untrained(name), ARCHITECTURES[name]
    write_pipeline(pipeline, tmp_path)
    assert not [path for path in files_of(tmp_path) if path.suffix not in (".json", ".safetensors")]
    loaded = DiffusionPipeline.from_pretrained(tmp_path)
    pipeline.vae.float()
    pipeline.transformer.float()
    settings = SamplerSettings(2, architecture.sampler.guidance_scale)
    prompts = ["a red seven on white", "a blue zero on yellow"]
    kept, stored = (sample(architecture, item, prompts, settings) for item in (pipeline, loaded))
    # The kept transformer's table of positions was rounded with its weights; the loaded one computes it anew.
    torch.testing.assert_close(kept, stored, atol=5e-3, rtol=0)
    assert kept.std() > 0.01


def test_card_names_every_part_and_its_own_command(name: str, untrained: Callable[[str], Any]) -> None:
    pipeline = untrained(name)
    result = TransformerResult(10, 2.0, 0.5)
    record = TrainingRecord(AutoencoderResult(20, 1.0, 30.0), result, distilled=result if name == "flux" else None)
    quality = {"held_out": Quality(8, 12, 4.0, 0.875, 1.0, 1.0, 0.875)}
    card = write_card(name, pipeline, record, quality, {"digit": 0.9, "color": 1.0, "ground": 1.0})
    for part in ("vae", "transformer", *ARCHITECTURES[name].text_encoders):
        assert f"| {part} | `{type(getattr(pipeline, part)).__name__}` |" in card
    assert f"--architecture {name} " in card
    assert "| 8 | 12 | 4 | 87.5 % |" in card
    assert ("Distilled" in card) == (name == "flux")


@pytest.mark.parametrize("name", ["sana", "sd3"], scope="module")
def test_trained_autoencoder_gives_latents_of_unit_variance(name: str, untrained: Callable[[str], Any]) -> None:
    autoencoder = untrained(name).vae
    images = compose(HELD_OUT, seed=0)
    before = autoencoder.config.scaling_factor
    result = train_autoencoder(autoencoder, images, images[:8], num_steps=2, batch_size=4, seed=0)
    assert result.num_steps == 2 and autoencoder.config.scaling_factor != before
    assert encode(autoencoder, images).std().item() == pytest.approx(1.0, abs=1e-3)
    if name == "sd3":
        assert encode(autoencoder, images).mean().item() == pytest.approx(0.0, abs=1e-3)
        posterior = autoencoder.encode(images[:2]).latent_dist
        torch.testing.assert_close(posterior.std, torch.full_like(posterior.std, 0.15))


def test_locating_an_unknown_model_raises() -> None:
    with pytest.raises(ValueError, match=r"name is 'sd3'; allowed are color-digits-sana, color-digits-sd3, .*Pass one"):
        zoo_path("sd3")


def test_all_models_of_the_zoo_together_are_at_most_30_mb() -> None:
    from fraqat.zoo import locate

    folder = Path(locate.__file__).parent
    models = [
        path
        for path in folder.rglob("*")
        if path.is_file() and path.suffix != ".py" and "__pycache__" not in path.parts
    ]
    assert sum(path.stat().st_size for path in models) <= 30_000_000
