"""How `SpeechT5ForTextToSpeech` is distilled and made to speak.

It predicts frames from the frames before them: in training both models are given the recorded ones (teacher forcing). The
decoder's prenet drops half of its units at every call, also in evaluation. Here the mask is an input, drawn by the trainer's
generator, so that student and teacher drop the same units; transformers draws one mask for all samples of a batch, here every
sample has its own.

Shape suffixes: N samples, T text tokens, L frames, D decoder steps (L / reduction factor), M mel bands, U prenet units.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fraqat.distill import Batch, Prediction
from fraqat.tasks.speech_calls import SpeechCalls, captured_output, evaluation_mode, valid_frames


def prepare(teacher: nn.Module, columns: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Cuts recordings to whole decoder steps, [N, L, M] with L a multiple of the reduction factor."""
    factor = cast(Any, teacher).config.reduction_factor
    length = columns["log_mel"].shape[1]
    padded = F.pad(columns["log_mel"], (0, 0, 0, -length % factor))
    return {"log_mel": padded, "num_frames": (columns["num_frames"] // factor).clamp_min(1) * factor}


def draw(config: Any, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
    """Units of the prenet that are kept, [N, layers, D, U] bool.

    A unit is kept with probability `speech_decoder_prenet_dropout`, as transformers takes it; published models have 0.5.
    """
    num, length = batch["log_mel"].shape[:2]
    layers, units = config.speech_decoder_prenet_layers, config.speech_decoder_prenet_units
    shape = (num, layers, length // config.reduction_factor, units)
    return {"prenet_kept": torch.rand(shape, generator=generator) < config.speech_decoder_prenet_dropout}


def predict(model: nn.Module, inputs: Batch) -> Prediction:
    """Spectrogram before ([N, L, M]) and after the postnet, and stop logits [N, L], from the recorded history."""
    speech_model = cast(Any, model)
    factor = speech_model.config.reduction_factor
    history_NDM = F.pad(inputs["log_mel"][:, factor - 1 :: factor], (0, 0, 1, -1))
    with (
        evaluation_mode(model),
        given_dropout(speech_model.speecht5.decoder.prenet, inputs["prenet_kept"]),
        captured_output(speech_model.speech_decoder_postnet) as outputs,
    ):
        speech_model(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            decoder_input_values=history_NDM.to(next(model.parameters()).dtype),
            speaker_embeddings=inputs["speaker"].to(next(model.parameters()).dtype),
            use_cache=False,
        )
    spectrogram, refined, stop = outputs[0]
    return {"spectrogram": spectrogram, "refined": refined, "stop": stop}


def masks(inputs: Batch) -> Mapping[str, Tensor]:
    """The frames of each utterance."""
    frames = valid_frames(inputs["num_frames"], inputs["log_mel"].shape[1])
    return {"spectrogram": frames, "refined": frames, "stop": frames}


def generate(model: nn.Module, input_ids: Tensor, attention_mask: Tensor, speakers: Tensor) -> list[Tensor]:
    """Speaks, N times [L, M]; the prenet's dropout comes from torch's global generator, the same for all N."""
    spectrograms, lengths = cast(Any, model).generate(
        input_ids, attention_mask=attention_mask, speaker_embeddings=speakers, return_output_lengths=True
    )
    return [spectrogram[:length] for spectrogram, length in zip(spectrograms, lengths, strict=True)]


@contextmanager
def given_dropout(prenet: Any, kept_NlDU: Tensor) -> Generator[None]:
    """Makes the prenet's dropout use `kept_NlDU`, layer by layer."""
    masks = iter(kept_NlDU.unbind(1))

    def dropout(inputs_embeds: Tensor, p: float) -> Tensor:
        return torch.where(next(masks), inputs_embeds, 0) / (1 - p)

    prenet._consistent_dropout = dropout
    try:
        yield
    finally:
        del prenet._consistent_dropout


SPEECHT5_CALLS = SpeechCalls(prepare, draw, predict, masks, generate, needs_recordings=True)
