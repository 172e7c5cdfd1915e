"""Text-to-speech models as a task for the trainer: teacher-forced distillation on spectrograms.

Shape suffixes: N samples, T text tokens, L frames, M mel bands, S width of a speaker embedding.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from fraqat.data.loader import RowSource, TensorRows
from fraqat.data.speech import Speech
from fraqat.distill import OUTPUT_LOSSES, Batch, LossSpec, Prediction
from fraqat.distill.micro_batch import shares_of, split_batch
from fraqat.errors import config_error
from fraqat.tasks.row_task import BatchSource, RowTask
from fraqat.tasks.speech_architectures import speech_architecture_of

_MAIN_OUTPUT = "spectrogram"

Tokenize = Callable[[Sequence[str]], Mapping[str, Tensor]]
"""Texts -> `input_ids` and `attention_mask` [N, T], padded on the right."""


class SpeechTask(RowTask):
    """Distils what a text-to-speech model predicts from a given history, over the frames and tokens that are not padding.

    Both models are called without dropout and with fixed running statistics; the dropout that SpeechT5's prenet has even in
    evaluation is drawn in `make_inputs` and shared.

    Args:
        teacher: A model whose class is in `SPEECH_ARCHITECTURES`; it gives the class and its configuration.
        source: Utterances, encoded for this teacher.
    """

    def __init__(self, teacher: nn.Module, source: BatchSource):
        self.architecture = speech_architecture_of(teacher)
        super().__init__(source)
        self._config = cast(Any, teacher).config

    def make_inputs(self, batch: Batch, generator: torch.Generator) -> Batch:
        """Cuts the batch to its longest text and utterance, and draws dropout masks from `generator`."""
        trimmed = _trimmed(batch)
        return {**trimmed, **self.architecture.calls.draw(self._config, trimmed, generator)}

    def predict(self, model: nn.Module, inputs: Batch) -> Prediction:
        """The outputs that the table of architectures weighs, such as `spectrogram`, `refined` and `stop`."""
        device = next(model.parameters()).device
        moved = {name: value.to(device) for name, value in inputs.items()}
        return self.architecture.calls.predict(model, moved)

    def loss(self, student: Prediction, teacher: Prediction, inputs: Batch, terms: Sequence[LossSpec]) -> Tensor:
        """Weighted sum over terms and outputs of the mean distance over valid frames or tokens, 0-dim float32.

        Raises:
            ConfigError: A term is no distance of outputs.
        """
        masks = self.architecture.calls.masks(inputs)
        total = torch.zeros((), device=next(iter(student.values())).device)
        for term in terms:
            if term.name not in OUTPUT_LOSSES:
                names = ", ".join(OUTPUT_LOSSES)
                raise config_error(
                    "losses.name", term.name, allowed=f"{names} for a text-to-speech model", fix="use mse or l1"
                )
            for name, weight in self.architecture.weights.items():
                mask = masks[name].to(total.device)
                distance = OUTPUT_LOSSES[term.name](student[name][mask].float(), teacher[name][mask].float())
                total = total + term.weight * weight * distance
        return total

    def split_inputs(self, inputs: Batch, num_parts: int) -> list[tuple[Batch, float]]:
        """Pieces with their share of the frames; terms over tokens are then weighed by frames too."""
        parts = split_batch(inputs, num_parts)
        counts = [int(self.architecture.calls.masks(part)[_MAIN_OUTPUT].sum()) for part in parts]
        return list(zip(parts, shares_of(counts), strict=True))


def speech_source(teacher: nn.Module, tokenize: Tokenize, train: Speech, validation: Speech) -> RowSource:
    """Encodes utterances for a teacher, once, and keeps them in memory.

    Args:
        teacher: A model whose class is in `SPEECH_ARCHITECTURES`.
        tokenize: Of the teacher's texts; see `SpeechModel.tokenize`.
        train: Utterances that the student learns from.
        validation: Utterances that it never sees.

    Raises:
        ConfigError: Recordings are missing, or have other mel bands or speaker embeddings than the teacher.
    """
    return RowSource(encode_speech(teacher, tokenize, train), encode_speech(teacher, tokenize, validation))


def encode_speech(teacher: nn.Module, tokenize: Tokenize, speech: Speech) -> TensorRows:
    """Utterances as rows: tokens, speakers, recorded or predicted history; see `speech_source`."""
    architecture = speech_architecture_of(teacher)
    config = cast(Any, teacher).config
    columns = {**tokenize(speech.texts), "speaker": check_speakers(config, speech.speakers)}
    if architecture.calls.needs_recordings:
        if not speech.log_mels or speech.log_mels[0].shape[1] != config.num_mel_bins:
            raise config_error(
                "speech.log_mels",
                f"{speech.log_mels[0].shape[1]} bands" if speech.log_mels else "none",
                allowed=f"log-mel spectrograms with the teacher's {config.num_mel_bins} bands",
                fix="compute them with fraqat.data.speech_signal.log_mel, or let the teacher speak the texts (synthesize)",
            )
        columns |= speech.columns()
    return TensorRows({**columns, **architecture.calls.prepare(teacher, columns)})


def check_speakers(config: Any, speakers: Tensor) -> Tensor:
    """Speaker embeddings [N, S] that fit a model.

    Raises:
        ConfigError: Their width is not the model's.
    """
    width = getattr(config, "speaker_embedding_dim", None) or getattr(config, "speaker_embed_dim", None) or 0
    if width and speakers.shape[1] != width:
        raise config_error(
            "speech.speakers", tuple(speakers.shape), allowed=f"[N, {width}]", fix=f"give embeddings of width {width}"
        )
    return speakers


def _trimmed(batch: Batch) -> dict[str, Tensor]:
    """Without columns of tokens and frames that are padding in every row, and in float32."""
    num_tokens = int(batch["attention_mask"].sum(1).max())
    num_frames = int(batch["num_frames"].max())
    ends = {"log_mel": num_frames}
    ends |= dict.fromkeys(("input_ids", "attention_mask", "duration", "pitch", "energy"), num_tokens)
    cut = {name: value[:, : ends[name]] if name in ends else value for name, value in batch.items()}
    return {name: value.float() if value.is_floating_point() else value for name, value in cut.items()}


def example_batch(model: nn.Module, num: int, *, num_tokens: int = 96, num_frames: int = 384) -> dict[str, Tensor]:
    """A batch as `encode_speech` makes it, of utterances of a usual length (six seconds), without content. For plans.

    Args:
        model: Gives class and configuration; the meta device is enough.
        num: Utterances.
        num_tokens, num_frames: Length of texts and spectrograms.
    """
    config = cast(Any, model).config
    width = getattr(config, "speaker_embedding_dim", None) or getattr(config, "speaker_embed_dim", None) or 0
    bands = int(config.num_mel_bins)
    durations = torch.full((num, num_tokens), num_frames // num_tokens)
    return {
        "input_ids": torch.zeros(num, num_tokens, dtype=torch.int64),
        "attention_mask": torch.ones(num, num_tokens, dtype=torch.int64),
        "speaker": torch.zeros(num, width),
        "log_mel": torch.zeros(num, num_frames, bands),
        "num_frames": torch.full((num,), num_frames),
        "duration": durations,
        "pitch": torch.zeros(num, num_tokens, 1),
        "energy": torch.zeros(num, num_tokens, 1),
    }
