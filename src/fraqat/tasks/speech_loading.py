"""Loads text-to-speech models of transformers from a folder or the hub, and makes them speak.

Shape suffixes: T samples, L frames, M mel bands, S width of a speaker embedding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from torch import Tensor, nn

from fraqat.data.speech_signal import griffin_lim
from fraqat.errors import ModelError, config_error
from fraqat.tasks.loading import check_complete, check_component, explain_loading, is_folder
from fraqat.tasks.spec import ModelSpec
from fraqat.tasks.speech import check_speakers
from fraqat.tasks.speech_architectures import speech_architecture_named, speech_architecture_of


@dataclass(frozen=True)
class SpeechModel:
    """A text-to-speech model and where it came from.

    Args:
        model: In evaluation mode.
        spec: What was loaded; the tokenizer is loaded from there when it is first used.
    """

    model: nn.Module
    spec: ModelSpec

    @cached_property
    def tokenizer(self) -> Any:
        """The tokenizer of transformers.

        Raises:
            ModelError: It cannot be had, or a package that it needs is not installed.
        """
        try:
            with explain_loading(self.spec):
                return transformers.AutoTokenizer.from_pretrained(
                    self.spec.source, revision=self.spec.revision, trust_remote_code=False
                )
        except ImportError as error:
            package = speech_architecture_of(self.model).hub_tokenizer
            raise ModelError(
                f"the tokenizer of {self.spec.source} needs a package that is not installed. Fix: pip install {package}, or "
                "pass input ids of your own."
            ) from error

    def tokenize(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """`input_ids` and `attention_mask` [N, tokens], padded on the right."""
        encoded = self.tokenizer(list(texts), padding=True, padding_side="right", return_tensors="pt")
        return {name: encoded[name] for name in ("input_ids", "attention_mask")}


def load_speech_model(spec: ModelSpec, dtype: torch.dtype = torch.float32) -> SpeechModel:
    """Loads a text-to-speech model to the device that `spec` asks for: safetensors only, no code from its repository.

    Args:
        spec: `source` must be a folder or a hub id (`zoo:` names are resolved by the caller).
        dtype: Precision of the weights.

    Raises:
        ModelError: Missing, truncated or pickled files, a hub id that cannot be had, or a class without an entry in
            `SPEECH_ARCHITECTURES`; the message says what to do.
    """
    if is_folder(spec):
        if not (Path(spec.source) / "config.json").is_file():
            raise ModelError(
                f"{spec.source} is no model of transformers: config.json is missing. Fix: pass the folder that holds it."
            )
        check_component(Path(spec.source))
    with explain_loading(spec):
        config = transformers.AutoConfig.from_pretrained(spec.source, revision=spec.revision, trust_remote_code=False)
    class_name = (config.architectures or ["(none in config.json)"])[0]
    speech_architecture_named(class_name)
    with explain_loading(spec):
        model = getattr(transformers, class_name).from_pretrained(
            spec.source, revision=spec.revision, variant=spec.variant, dtype=dtype, use_safetensors=True
        )
    check_complete(model, spec.source)
    return SpeechModel(model.to(spec.torch_device).eval(), spec)


def build_speech_model(class_name: str, config: dict[str, Any]) -> nn.Module:
    """Builds an untrained model of a supported class, float32, on torch's default device.

    Args:
        class_name: A key of `SPEECH_ARCHITECTURES`.
        config: The class's configuration, as transformers saves it.

    Raises:
        ModelError: The class is not supported.
    """
    speech_architecture_named(class_name)
    model_class = getattr(transformers, class_name)
    return model_class(model_class.config_class.from_dict(config)).eval()


@torch.no_grad()
def synthesize(
    model: nn.Module,
    tokenize: Callable[[Sequence[str]], dict[str, Tensor]],
    texts: Sequence[str],
    speakers: Tensor,
    *,
    seed: int = 0,
    batch_size: int = 16,
    on_done: Callable[[int], None] = lambda num_done: None,
) -> tuple[Tensor, ...]:
    """Speaks texts freely. Every text drops the same prenet units, whatever its batch, and so do teacher and student.

    Args:
        model: The teacher or a student of the same class.
        tokenize: Texts -> `input_ids` and `attention_mask`; see `SpeechModel.tokenize`.
        texts: N texts.
        speakers: Speaker embedding of each, [N, S]; S = 0 for a model without.
        seed: Seed of SpeechT5's prenet dropout.
        batch_size: Texts spoken at a time.
        on_done: Called with the number of finished texts after every batch.

    Returns:
        N spectrograms [L, M] float32 on the CPU; L differs.

    Raises:
        ConfigError: Embeddings of another number or width.
    """
    calls = speech_architecture_of(model).calls
    if len(speakers) != len(texts):
        raise config_error(
            "speakers",
            tuple(speakers.shape),
            allowed=f"one row for each of {len(texts)} texts",
            fix="give one per text",
        )
    parameter = next(model.parameters())
    rows = check_speakers(cast(Any, model).config, speakers).to(parameter.device, parameter.dtype)
    was_training = model.training
    model.eval()
    spoken: list[Tensor] = []
    try:
        for start in range(0, len(texts), batch_size):
            tokens = tokenize(texts[start : start + batch_size])
            ids, mask = (tokens[name].to(parameter.device) for name in ("input_ids", "attention_mask"))
            with torch.random.fork_rng([parameter.device] if parameter.device.type == "cuda" else []):
                torch.manual_seed(seed)
                part = calls.generate(model, ids, mask, rows[start : start + batch_size])
            spoken += [mel.float().cpu() for mel in part]
            on_done(len(spoken))
    finally:
        model.train(was_training)
    return tuple(spoken)


@torch.no_grad()
def to_waveforms(model: nn.Module, log_mels: Sequence[Tensor], vocoder: nn.Module | None = None) -> tuple[Tensor, ...]:
    """Turns a model's spectrograms into sound.

    Args:
        model: The model that spoke them; gives the kind of spectrogram.
        log_mels: N spectrograms [L, M].
        vocoder: For example `SpeechT5HifiGan`, called with one spectrogram at a time; None uses Griffin-Lim, which needs no
            training and sounds metallic.

    Returns:
        N waveforms [T] float32 on the CPU.

    Raises:
        ConfigError: No vocoder for a model with spectrograms of its own kind.
    """
    if vocoder is not None:
        parameter = next(vocoder.parameters())
        return tuple(vocoder(mel.to(parameter.device, parameter.dtype)).float().cpu().flatten() for mel in log_mels)
    mel_spec = speech_architecture_of(model).mel
    if mel_spec is None:
        raise config_error(
            "vocoder",
            None,
            allowed=f"the model's own vocoder for {type(model).__name__}, whose spectrograms are scaled in its own way",
            fix="pass for example FastSpeech2ConformerHifiGan.from_pretrained(...)",
        )
    return tuple(griffin_lim(mel, mel_spec) for mel in log_mels)
