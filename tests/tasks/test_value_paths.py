"""Attentions between whose layers a rotation can be merged: found in every family, exact, refused where it is not known."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from tiny_language import tiny_model
from tiny_pipelines import BUILDERS, tiny_sampler
from torch import nn

from fraqat.errors import ConfigError
from fraqat.nn import RotationSpec, rotate_value_paths_
from fraqat.tasks.conditioning import nested, record_calls
from fraqat.tasks.speech_loading import build_speech_model
from fraqat.tasks.value_paths import find_value_paths

NUM_PATHS = {"sana": 6, "sd3": 4, "pixart": 10, "flux": 4}
SPEECHT5: dict[str, Any] = {
    "vocab_size": 31,
    "hidden_size": 32,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "speech_decoder_prenet_units": 32,
    "speech_decoder_postnet_units": 32,
    "speech_decoder_postnet_layers": 2,
    "speaker_embedding_dim": 8,
}


def rotated(model: nn.Module) -> nn.Module:
    """With every value and every reader changed."""
    found = find_value_paths(model)
    assert found.refused == {}
    turned = copy.deepcopy(model)
    rotate_value_paths_(turned, found.paths, RotationSpec())
    for path in found.paths:
        for name in (*path.values, *(reader for reader, _ in path.readers)):
            assert not torch.equal(turned.get_submodule(name).weight, model.get_submodule(name).weight)
    return turned


@pytest.mark.parametrize("name", list(NUM_PATHS))
def test_diffusion_transformers_compute_what_they_did(name: str) -> None:
    pipeline = BUILDERS[name]()
    model = pipeline.transformer.eval()
    for parameter in model.parameters():  # an output layer that starts at zero shows nothing
        nn.init.normal_(parameter, std=0.1) if parameter.abs().max() == 0 else None
    assert len(find_value_paths(model).paths) == NUM_PATHS[name]
    sampler = tiny_sampler(name)
    pipeline.set_progress_bar_config(disable=True)
    call = record_calls(pipeline, ["a red seven", "a blue two"], sampler, guidance_scale=1.0, num_calls=1)[0]
    with torch.no_grad():
        expected, output = (each(**nested(call.tensors), return_dict=False)[0] for each in (model, rotated(model)))
    assert torch.allclose(output, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


def test_a_language_model_with_grouped_heads_computes_what_it_did() -> None:
    model = tiny_model("Gemma2")
    ids = torch.arange(3, 13)[None]
    with torch.no_grad():
        expected, output = (each(ids).logits for each in (model, rotated(model)))
    assert torch.allclose(output, expected, atol=1e-4)


def test_a_speech_model_computes_what_it_did() -> None:
    torch.manual_seed(0)
    model = build_speech_model("SpeechT5ForTextToSpeech", SPEECHT5).eval()
    inputs = {
        "input_ids": torch.arange(3, 13)[None],
        "decoder_input_values": torch.randn(1, 6, 80),
        "speaker_embeddings": torch.randn(1, 8),
    }

    def spectrogram(each: Any) -> torch.Tensor:
        torch.manual_seed(1)  # its prenet drops out in evaluation too
        with torch.no_grad():
            return each(**inputs).spectrogram

    assert torch.allclose(spectrogram(rotated(model)), spectrogram(model), atol=1e-4)


@pytest.mark.parametrize("name", ["lumina2", "wan"])
def test_a_processor_that_is_not_known_is_refused_with_its_name(name: str) -> None:
    with pytest.raises(ConfigError, match=r"quantization\.rotation = .*Processor.* is not known to leave values"):
        find_value_paths(BUILDERS[name]().transformer)


def test_a_model_without_attention_is_refused() -> None:
    with pytest.raises(ConfigError, match="no attention was found"):
        find_value_paths(nn.Sequential(nn.Linear(4, 4)))
