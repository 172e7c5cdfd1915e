"""Laws of the embedded teacher: it is small, plain, and draws what its prompt says."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline

from fraqat.data.color_digits import held_out_combinations
from fraqat.evaluation.classifier import load_classifier
from fraqat.zoo import zoo_path
from fraqat.zoo.quality import SamplerSettings, judge, sample

# diffusers' DPM-Solver hands tensors to numpy in a way that numpy 2 deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")

FOLDER = zoo_path("color-digits-sana")
HELD_OUT = (held_out_combinations() * 2)[:64]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def pipeline() -> Any:
    pipeline = DiffusionPipeline.from_pretrained(FOLDER)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def draw(pipeline: Any, **arguments: Any) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(2, 8, 8, 8, generator=generator)
    return pipeline(
        ["a red seven on white", "a blue zero on yellow"],
        height=32,
        width=32,
        latents=noise,
        use_resolution_binning=False,
        complex_human_instruction=None,
        output_type="pt",
        **arguments,
    ).images


def test_folder_is_small_and_holds_no_pickle() -> None:
    files = [path for path in FOLDER.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 8_000_000
    assert {path.suffix for path in files} <= {".json", ".safetensors", ".md"}


def test_parts_are_the_classes_of_sana(pipeline: Any) -> None:
    parts = {name: type(part).__name__ for name, part in pipeline.components.items()}
    assert parts["transformer"] == "SanaTransformer2DModel"
    assert parts["vae"] == "AutoencoderDC"
    assert parts["text_encoder"] == "Gemma2Model"
    assert parts["scheduler"] == "DPMSolverMultistepScheduler"


def test_widths_of_inner_layers_are_multiples_of_32(pipeline: Any) -> None:
    for name, module in pipeline.transformer.transformer_blocks.named_modules():
        if isinstance(module, torch.nn.Linear) or (
            isinstance(module, torch.nn.Conv2d) and module.kernel_size == (1, 1)
        ):
            assert module.weight.shape[0] % 32 == 0 and module.weight.shape[1] % 32 == 0, name


def test_weights_load_as_float32(pipeline: Any) -> None:
    for part in (pipeline.vae, pipeline.text_encoder, pipeline.transformer):
        assert {value.dtype for value in part.parameters()} == {torch.float32}


def test_held_out_prompts_are_drawn_right(pipeline: Any) -> None:
    classifier = load_classifier(zoo_path("color-digits-classifier"))
    images = sample(pipeline, [item.prompt for item in HELD_OUT], SamplerSettings(seed=11))
    shares = judge(classifier, images, HELD_OUT)
    assert shares["digit"] >= 0.90
    assert shares["color"] >= 0.95
    assert shares["ground"] >= 0.95


def test_default_call_draws_a_picture(pipeline: Any) -> None:
    image = pipeline(
        "a red seven on white",
        height=32,
        width=32,
        use_resolution_binning=False,
        complex_human_instruction=None,
        generator=torch.Generator().manual_seed(0),
    ).images[0]
    assert image.size == (32, 32)
    red, green, blue = image.getpixel((0, 0))
    assert min(red, green, blue) > 200


def test_padding_does_not_change_the_picture(pipeline: Any) -> None:
    short = draw(pipeline, max_sequence_length=16, num_inference_steps=4)
    long = draw(pipeline, max_sequence_length=300, num_inference_steps=4)
    assert (short - long).abs().max() < 1e-3
    assert short.std() > 0.1


def test_unknown_words_and_the_empty_prompt_are_tokens(pipeline: Any) -> None:
    tokens = pipeline.tokenizer(["", "a shiny seven"]).input_ids
    unknown = pipeline.tokenizer.unk_token_id
    assert tokens[0] == [pipeline.tokenizer.bos_token_id]
    assert tokens[1][2] == unknown and unknown not in (tokens[1][1], tokens[1][3])


def test_quality_file_meets_the_acceptance_and_is_on_the_card() -> None:
    figures = json.loads((FOLDER / "quality.json").read_text())
    held_out = figures["held_out"]
    assert held_out["num_images"] >= 500
    assert held_out["digit"] >= 0.95 and held_out["color"] >= 0.98 and held_out["ground"] >= 0.98
    card = (FOLDER / "README.md").read_text()
    assert f"{100 * held_out['digit']:.1f} %" in card
    assert "Apache-2.0" in card and "CC BY 4.0" in card


def test_code_on_the_card_runs() -> None:
    card = (FOLDER / "README.md").read_text()
    code = card.split("```python\n")[1].split("```")[0]
    names: dict[str, Any] = {"folder": FOLDER}
    exec(code, names)
    assert names["image"].size == (32, 32)


def test_locating_an_unknown_model_raises() -> None:
    with pytest.raises(ValueError, match="name is 'sd3'; allowed are color-digits-sana, color-digits-classifier"):
        zoo_path("sd3")


def test_zoo_path_gives_existing_folders() -> None:
    assert (zoo_path("color-digits-sana") / "model_index.json").is_file()
    assert isinstance(zoo_path("color-digits-classifier"), Path)
