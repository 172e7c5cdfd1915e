"""Models with their caches as inputs and outputs: the same as the models by themselves."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import FastSpeech2ConformerModel

from fraqat.config import load_recipe
from fraqat.errors import ModelError
from fraqat.tasks.language_parts import LanguageStep, stop_tokens
from fraqat.tasks.speech import SpeechTask, example_batch
from fraqat.tasks.speech_parts import (
    FRAMES,
    IDS,
    KEPT,
    MASK,
    SPEAKER,
    SpeechDecoder,
    SpeechEncoder,
    check_has_steps,
    decoder_inputs,
)
from fraqat.workflows.sessions import open_session

EXACT_DB = 100.0


@pytest.fixture(scope="module")
def gemma() -> Any:
    return open_session(load_recipe("gemma-2-2b-it-tiny")).load_model(torch.float32).eval()


@pytest.fixture(scope="module")
def speecht5() -> Any:
    return open_session(load_recipe("speecht5-tiny")).load_model(torch.float32).eval()


@pytest.mark.xdist_group("language")
class TestLanguageStep:
    @pytest.mark.parametrize("num_past", [0, 1, 150])
    def test_equals_the_model_on_all_tokens(self, gemma: Any, num_past: int, sqnr_db: Any) -> None:
        """150 tokens do not fit into the sliding window of 128."""
        rows = torch.randint(3, 1000, (2, num_past + 7))
        step = LanguageStep(gemma)
        found = step(**step.inputs_after(rows, num_past))
        with torch.no_grad():
            wanted = gemma(input_ids=rows, use_cache=False).logits[:, -1]
        assert sqnr_db(wanted, found[0]) > EXACT_DB
        assert all(tensor.shape[2] == num_past + 7 for tensor in found[1:])

    def test_padding_on_the_left_changes_nothing(self, gemma: Any, sqnr_db: Any) -> None:
        rows = torch.randint(3, 1000, (1, 9))
        step = LanguageStep(gemma)
        alone = step(**step.inputs_after(rows, 0))[0]
        padded = step.inputs_after(torch.cat([torch.zeros(1, 4, dtype=torch.int64), rows], 1), 0)
        padded[MASK][:, :4] = 0
        assert sqnr_db(alone, step(**padded)[0]) > EXACT_DB

    def test_stop_tokens_are_the_models(self, gemma: Any) -> None:
        assert stop_tokens(gemma, SimpleNamespace(eos_token_id=7)) == [1]
        gemma.generation_config.eos_token_id = [1, 5]
        assert stop_tokens(gemma, SimpleNamespace(eos_token_id=7)) == [1, 5]
        gemma.generation_config.eos_token_id = None
        assert stop_tokens(gemma, SimpleNamespace(eos_token_id=7)) == [7]


@pytest.mark.xdist_group("speech")
class TestSpeechSteps:
    def test_steps_equal_the_model_on_all_frames(self, speecht5: Any, sqnr_db: Any) -> None:
        batch = example_batch(speecht5, 2, num_tokens=9, num_frames=24)
        batch |= {"log_mel": torch.randn(2, 24, 80), IDS: torch.randint(4, 31, (2, 9)), SPEAKER: torch.randn(2, 32)}
        batch[MASK][1, 6:] = 0
        task = SpeechTask(speecht5, None)  # type: ignore[arg-type]
        inputs = task.make_inputs(batch, torch.Generator().manual_seed(0))
        with torch.no_grad():
            wanted = task.predict(speecht5, inputs)
            encoder, decoder = SpeechEncoder(speecht5), SpeechDecoder(speecht5)
            given = decoder_inputs(encoder, decoder, inputs)
            spectrogram, stop = decoder(**given)[:2]
        num = spectrogram.shape[1]
        assert num == 12
        assert sqnr_db(wanted["spectrogram"][:, -num:], spectrogram) > EXACT_DB
        assert sqnr_db(wanted["stop"][:, -num:], stop) > EXACT_DB

    def test_model_leaves_no_trace_of_a_step(self, speecht5: Any) -> None:
        prenet = speecht5.speecht5.decoder.prenet
        assert "forward" not in prenet.encode_positions.__dict__
        assert "_consistent_dropout" not in prenet.__dict__
        assert {FRAMES, KEPT} <= set(SpeechDecoder(speecht5).axes)

    def test_model_without_steps_is_refused(self) -> None:
        model = FastSpeech2ConformerModel.__new__(FastSpeech2ConformerModel)
        with pytest.raises(ModelError, match="FastSpeech2ConformerModel cannot be exported as graphs"):
            check_has_steps(model)
