"""Text-to-speech: a model of transformers that is quantized whole, but for its last layers."""

from __future__ import annotations

import io
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from fraqat.config import ORIGINAL, Recipe, SpeechRecipe
from fraqat.data.speech import Speech
from fraqat.data.speech_signal import LogMelSpec, write_wav
from fraqat.data.speech_source import default_speaker, load_speech_data
from fraqat.errors import ModelError, config_error
from fraqat.evaluation.phrase_recognizer import load_recognizer
from fraqat.evaluation.speech import Recognizer, speech_rows
from fraqat.export import ModelDescription, Part
from fraqat.nn import LayerFamilies, LayerRule
from fraqat.planning import Workload
from fraqat.tasks.speech_architectures import SpeechArchitecture, speech_architecture_named
from fraqat.workflows.progress import Progress
from fraqat.workflows.sessions.base import Measurement, QualityColumn, Session, description_of

NUM_SHOWN = 6
_RECOGNIZER_FOLDER = "recognizer"


class SpeechSession(Session[SpeechRecipe]):
    """A text-to-speech recipe in memory."""

    sample_suffix = ".wav"

    def load_model(self, dtype: torch.dtype) -> nn.Module:
        """The whole model."""
        from fraqat.tasks.speech_loading import load_speech_model

        return load_speech_model(self.model_spec, dtype).model

    def build_float(self, class_name: str, config: dict[str, Any]) -> nn.Module:
        """An untrained model."""
        from fraqat.tasks.speech_loading import build_speech_model

        return build_speech_model(class_name, config)

    @property
    def architecture(self) -> SpeechArchitecture:
        """The table's entry for the model."""
        return speech_architecture_named(self.known.class_name)

    @property
    def families(self) -> LayerFamilies:
        """As the table of architectures says."""
        return self.architecture.families

    @property
    def family_rules(self) -> tuple[LayerRule, ...]:
        """As the table of architectures says."""
        return self.architecture.default_rules()

    @cached_property
    def task(self) -> Any:
        """Utterances and the spectrograms that are distilled."""
        from fraqat.tasks.speech import SpeechTask, speech_source

        train, validation = self._speech
        return SpeechTask(self.teacher, speech_source(self.teacher, self.tokenize, train, validation))

    @cached_property
    def _speech(self) -> tuple[Speech, Speech]:
        return load_speech_data(self.recipe.data, self.folder, self.architecture.mel or LogMelSpec())

    @property
    def folder(self) -> Path | None:
        """The model's folder, None for a hub id."""
        folder = Path(self.model_spec.source)
        return folder if folder.is_dir() else None

    @property
    def _speech_model(self) -> Any:
        from fraqat.tasks.speech_loading import SpeechModel

        return SpeechModel(self.teacher, self.model_spec)

    @property
    def tokenize(self) -> Any:
        """Texts to tokens."""
        return self._speech_model.tokenize

    @property
    def tokenizer(self) -> Any:
        """The model's tokenizer."""
        return self._speech_model.tokenizer

    @property
    def held_out(self) -> Speech:
        """Utterances that training never sees."""
        return self._speech[1]

    def speak(
        self,
        model: nn.Module,
        texts: tuple[str, ...],
        speakers: Tensor,
        *,
        seed: int,
        on_done: Callable[[int], None] = lambda num_done: None,
    ) -> tuple[Tensor, ...]:
        """Log-mel spectrograms of texts."""
        from fraqat.tasks.speech_loading import synthesize

        batch_size = self.recipe.evaluation.batch_size
        return synthesize(model, self.tokenize, texts, speakers, seed=seed, batch_size=batch_size, on_done=on_done)

    @cached_property
    def vocoder(self) -> nn.Module | None:
        """The recipe's vocoder; None: Griffin-Lim."""
        from fraqat.tasks.speech_helpers import load_vocoder

        name = self.recipe.evaluation.vocoder
        return load_vocoder(name).to(self.recipe.model.torch_device) if name else None

    def to_files(self, model: nn.Module, log_mels: tuple[Tensor, ...]) -> tuple[bytes, ...]:
        """WAV files of spectrograms."""
        from fraqat.tasks.speech_loading import to_waveforms

        rate = self.architecture.sample_rate
        files: list[bytes] = []
        for waveform in to_waveforms(model, log_mels, self.vocoder):
            stream = io.BytesIO()
            write_wav(stream, waveform, rate)
            files.append(stream.getvalue())
        return tuple(files)

    def workload(self, recipe: Recipe) -> Workload:
        """One step on utterances of a usual length."""
        from fraqat.tasks.speech import SpeechTask, example_batch

        student = self.planned_student(recipe)
        task = SpeechTask(student, cast(Any, None))

        def make_inputs(num: int) -> dict[str, Any]:
            batch = example_batch(student, num)
            config, calls = cast(Any, student).config, self.architecture.calls
            return {**batch, **calls.draw(config, batch, torch.Generator().manual_seed(0))}

        return Workload(student, task.predict, make_inputs, teacher_dtype=recipe.model.dtype)

    def to_sound(self, log_mel: Tensor) -> Tensor:
        """Waveform [T] of one spectrogram [L, M], by the recipe's vocoder or Griffin-Lim."""
        from fraqat.tasks.speech_loading import to_waveforms

        return to_waveforms(self.teacher, (log_mel,), self.vocoder)[0]

    def evaluator(self, num_samples: int | None) -> SpeechEvaluator:
        """Speaks held-out texts."""
        return SpeechEvaluator(self, num_samples or self.recipe.evaluation.num_phrases)

    def generate(
        self,
        model: nn.Module,
        prompts: tuple[str, ...],
        *,
        seed: int,
        on_done: Callable[[int], None] = lambda num_done: None,
    ) -> list[bytes]:
        """WAV files."""
        speaker = default_speaker(self.recipe.data, self.folder)
        speakers = speaker.expand(len(prompts), -1)
        return list(self.to_files(model, self.speak(model, prompts, speakers, seed=seed, on_done=on_done)))

    def description(self) -> ModelDescription:
        """How to build the model again."""
        config = cast(Any, self.teacher).config.to_dict()
        return description_of(self.recipe.model, type(self.teacher).__name__, config)

    def export_parts(self, student: nn.Module) -> tuple[Part, ...]:
        """Decoder, encoder and postnet, and the vocoder that the recipe names."""
        from fraqat.workflows.sessions.speech_parts import speech_parts

        return speech_parts(
            student,
            self.task,
            self.architecture,
            tokenizer=self.tokenizer,
            speaker=default_speaker(self.recipe.data, self.folder),
            vocoder=self.vocoder,
        )

    def original_files(self) -> list[Path]:
        """The model's weight files."""
        from fraqat.tasks.loading import weight_files

        files = weight_files(self.folder, self.model_spec.variant) if self.folder is not None else []
        return [path for path in files if path.name.startswith("model")]


class SpeechEvaluator:
    """Compares free speech of held-out texts with the original's.

    Args:
        session: Gives texts and speakers.
        num_phrases: Texts per model, at most the held-out ones.
    """

    sample_suffix = ".wav"

    def __init__(self, session: SpeechSession, num_phrases: int):
        spec = session.recipe.evaluation
        if session.architecture.mel is None and spec.vocoder is None:
            raise config_error(
                "evaluation.vocoder",
                None,
                allowed=f"a vocoder for {session.known.class_name}",
                fix="name its own vocoder",
            )
        self._session = session
        held_out = session.held_out.subset(range(min(num_phrases, len(session.held_out))))
        self._texts, self._speakers = held_out.texts, held_out.speakers
        self._recognizer = _recognizer(session)
        self._reference: tuple[Tensor, ...] | None = None
        self.shown_prompts = self._texts[:NUM_SHOWN]
        heard = (QualityColumn("word_error_rate", "word errors, %", 100, 1),) if self._recognizer else ()
        self.columns = (
            QualityColumn("mel_cepstral_distortion_db", "mel-cepstral distortion, dB", decimals=2),
            QualityColumn("log_spectral_distance_db", "log-spectral distance, dB", decimals=2),
            *heard,
        )
        self.notes = (
            f"{len(self._texts)} held-out phrases spoken freely, distances to the original's speech, aligned in time."
            + (" Word errors: of a recognizer that listens to the speech." if self._recognizer else ""),
        )

    def measure(self, label: str, model: nn.Module, progress: Progress) -> Measurement:
        """Lets one model speak."""
        spoken = self._session.speak(
            model,
            self._texts,
            self._speakers,
            seed=self._session.recipe.evaluation.seed,
            on_done=lambda num_done: progress.count(f"speaking {label}", num_done, len(self._texts)),
        )
        if label == ORIGINAL:
            self._reference = spoken
        if self._reference is None:
            raise ModelError("the original has to be measured before its students. Fix: measure it first.")
        rows = speech_rows(spoken, self._reference, self._texts, self._recognizer)
        found, intervals = rows.quality(), rows.intervals(self._session.recipe.evaluation.bootstrap)
        quality: dict[str, float | None] = {
            "mel_cepstral_distortion_db": None if label == ORIGINAL else found.mel_cepstral_distortion_db,
            "log_spectral_distance_db": None if label == ORIGINAL else found.log_spectral_distance_db,
            "word_error_rate": found.word_error_rate,
        }
        shown = {key: intervals[key] for key, value in quality.items() if value is not None and key in intervals}
        return Measurement(quality, self._session.to_files(model, spoken[:NUM_SHOWN]), shown)


def _recognizer(session: SpeechSession) -> Recognizer | None:
    """The recognizer of the recipe, or the one beside a model of the zoo."""
    name = session.recipe.evaluation.recognizer
    if name is not None:
        from fraqat.tasks.speech_helpers import load_speech_recognizer

        return load_speech_recognizer(name, session.to_sound, session.architecture.sample_rate)
    folder = session.folder / _RECOGNIZER_FOLDER if session.folder is not None else None
    return load_recognizer(folder).recognize if folder is not None and folder.is_dir() else None
