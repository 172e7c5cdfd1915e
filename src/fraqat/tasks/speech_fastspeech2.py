"""How `FastSpeech2ConformerModel` is distilled and made to speak.

It predicts durations, pitch and energy of the text tokens, and from them all frames at once. In training both models are given
the durations, pitch and energy that the teacher predicts, so that their frames match one to one; no recordings are needed.

Shape suffixes: N samples, T text tokens, L frames, M mel bands.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from fraqat.distill import Batch, Prediction
from fraqat.tasks.speech_calls import SpeechCalls, captured_output, evaluation_mode, valid_frames

_TEXT_COLUMNS = ("input_ids", "attention_mask", "speaker")
_PADDING = -100.0  # what the model takes for padded frames


@torch.no_grad()
def prepare(teacher: nn.Module, columns: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What the teacher predicts for every token: `duration` [N, T] int64 frames, `pitch` and `energy` [N, T, 1].

    One text at a time: the predictors' convolutions would otherwise see the padding, and predict otherwise than at run time.
    """
    device = next(teacher.parameters()).device
    num, length = columns["input_ids"].shape
    duration = torch.zeros(num, length, dtype=torch.long)
    pitch, energy = torch.zeros(num, length, 1), torch.zeros(num, length, 1)
    with _callable(teacher):
        for row, rows in enumerate(_single_texts({name: columns[name].to(device) for name in _TEXT_COLUMNS})):
            output = cast(Any, teacher)(**_text_arguments(teacher, rows), return_dict=True)
            size = rows["input_ids"].shape[1]
            duration[row, :size] = output.duration_outputs[0]
            pitch[row, :size], energy[row, :size] = output.pitch_outputs[0], output.energy_outputs[0]
    duration[duration.sum(1) == 0, 0] = 1  # an utterance has at least one frame
    return {"duration": duration, "pitch": pitch, "energy": energy, "num_frames": duration.sum(1)}


def draw(config: Any, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
    """Nothing is random."""
    return {}


def predict(model: nn.Module, inputs: Batch) -> Prediction:
    """Spectrogram before and after the postnet [N, L, M], log durations [N, T], pitch and energy [N, T, 1]."""
    speech_model = cast(Any, model)
    num_frames = inputs["duration"].sum(1)
    length = int(num_frames.max())
    frames = valid_frames(num_frames, length)
    dtype = next(model.parameters()).dtype
    labels = torch.zeros(len(frames), length, speech_model.config.num_mel_bins, dtype=dtype, device=frames.device)
    with _callable(model), captured_output(speech_model.speech_decoder_postnet) as outputs:
        # "In training" these two modules take the given durations, pitch and energy, and give durations as logarithms.
        model.training = speech_model.duration_predictor.training = True
        output = speech_model(
            **_text_arguments(model, inputs),
            spectrogram_labels=labels.masked_fill(~frames[..., None], _PADDING),
            duration_labels=inputs["duration"],
            pitch_labels=inputs["pitch"].to(dtype),
            energy_labels=inputs["energy"].to(dtype),
            return_dict=True,
        )
    spectrogram, refined = outputs[0]
    return {
        "spectrogram": spectrogram,
        "refined": refined,
        "log_duration": output.duration_outputs,
        "pitch": output.pitch_outputs,
        "energy": output.energy_outputs,
    }


def masks(inputs: Batch) -> Mapping[str, Tensor]:
    """The frames of each utterance, and its tokens."""
    num_frames = inputs["duration"].sum(1)
    frames = valid_frames(num_frames, int(num_frames.max()))
    tokens = inputs["attention_mask"].bool()
    return {"spectrogram": frames, "refined": frames, "log_duration": tokens, "pitch": tokens, "energy": tokens}


def generate(model: nn.Module, input_ids: Tensor, attention_mask: Tensor, speakers: Tensor) -> list[Tensor]:
    """Speaks, N times [L, M], one text at a time."""
    columns = {"input_ids": input_ids, "attention_mask": attention_mask, "speaker": speakers}
    with _callable(model):
        outputs = [
            cast(Any, model)(**_text_arguments(model, rows), return_dict=True) for rows in _single_texts(columns)
        ]
    return [output.spectrogram[0] for output in outputs]


def _single_texts(columns: Mapping[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """The rows one by one, [1, T] without padding."""
    for row, num_tokens in enumerate(columns["attention_mask"].sum(1).tolist()):
        cut = {name: columns[name][row : row + 1, :num_tokens] for name in ("input_ids", "attention_mask")}
        yield {**cut, "speaker": columns["speaker"][row : row + 1]}


@contextmanager
def _callable(model: nn.Module) -> Generator[None]:
    """In evaluation, and in any precision: the model makes its frames in float32, which bfloat16 weights do not take."""
    dtype = next(model.parameters()).dtype

    def cast_frames(module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        return (arguments[0].to(dtype), *arguments[1:])

    handle = cast(Any, model).decoder.register_forward_pre_hook(cast_frames)
    try:
        with evaluation_mode(model):
            yield
    finally:
        handle.remove()


def _text_arguments(model: nn.Module, rows: Batch) -> dict[str, Tensor]:
    arguments = {"input_ids": rows["input_ids"], "attention_mask": rows["attention_mask"]}
    if cast(Any, model).config.speaker_embed_dim:
        arguments["speaker_embedding"] = rows["speaker"].to(next(model.parameters()).dtype)
    return arguments


FASTSPEECH2_CALLS = SpeechCalls(prepare, draw, predict, masks, generate, needs_recordings=False)
