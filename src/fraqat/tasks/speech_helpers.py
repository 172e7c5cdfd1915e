"""Models of transformers that help to judge speech: vocoders and speech recognizers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from fraqat.errors import ModelError
from fraqat.tasks.loading import explain_loading
from fraqat.tasks.spec import ModelSpec

_VOCODERS = ("SpeechT5HifiGan", "FastSpeech2ConformerHifiGan")


def load_vocoder(source: str) -> nn.Module:
    """A vocoder that is called with one spectrogram [L, M].

    Args:
        source: Folder or hub id of one of `SpeechT5HifiGan`, `FastSpeech2ConformerHifiGan`.

    Raises:
        ModelError: It cannot be loaded, or is another class.
    """
    spec = ModelSpec(source)
    with explain_loading(spec):
        config = transformers.AutoConfig.from_pretrained(source, trust_remote_code=False)
    class_name = (config.architectures or ["none"])[0]
    if class_name not in _VOCODERS:
        raise ModelError(
            f"evaluation.vocoder = {source!r} is a {class_name}: allowed is {', '.join(_VOCODERS)}. Fix: choose such a model."
        )
    with explain_loading(spec):
        model = getattr(transformers, class_name).from_pretrained(source, use_safetensors=True)
    return model.eval().requires_grad_(False)


def load_speech_recognizer(
    source: str, to_sound: Callable[[Tensor], Tensor], sample_rate: int
) -> Callable[[Tensor], str]:
    """A recognizer of log-mel spectrograms [L, M], which it hears as sound.

    Args:
        source: Folder or hub id of any speech recognition model of transformers, such as `openai/whisper-tiny`.
        to_sound: Spectrogram -> waveform [T], a vocoder.
        sample_rate: Of the waveform.

    Raises:
        ModelError: It cannot be loaded.
    """
    with explain_loading(ModelSpec(source)):
        listen: Any = transformers.pipeline(
            "automatic-speech-recognition",
            model=source,
            trust_remote_code=False,
            model_kwargs={"use_safetensors": True},
        )

    @torch.no_grad()
    def recognize(log_mel: Tensor) -> str:
        waveform = to_sound(log_mel).cpu().numpy()
        return str(listen({"raw": waveform, "sampling_rate": sample_rate})["text"]).strip()

    return recognize
