"""Laws of the Sana teacher alone; those that all teachers share are in `test_color_digits`."""

from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline

from fraqat.zoo import zoo_path

# diffusers' DPM-Solver hands tensors to numpy in a way that numpy 2 deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")


@pytest.fixture(scope="module")
def pipeline() -> Any:
    pipeline = DiffusionPipeline.from_pretrained(zoo_path("color-digits-sana"))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def draw(pipeline: Any, max_sequence_length: int) -> torch.Tensor:
    return pipeline(
        ["a red seven on white", "a blue zero on yellow"],
        height=32,
        width=32,
        latents=torch.randn(2, 8, 8, 8, generator=torch.Generator().manual_seed(1)),
        num_inference_steps=4,
        max_sequence_length=max_sequence_length,
        use_resolution_binning=False,
        complex_human_instruction=None,
        output_type="pt",
    ).images


def test_padding_does_not_change_the_picture(pipeline: Any) -> None:
    short, long = draw(pipeline, 16), draw(pipeline, 300)
    assert (short - long).abs().max() < 1e-3
    assert short.std() > 0.1


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
