"""What differs between text-to-speech models, as a table: one entry per class of transformers.

To add an architecture, write its `SpeechCalls` (how it is prepared, called with the teacher's history, and made to speak), add
an entry to `SPEECH_ARCHITECTURES`, and a test on a tiny random model of its class.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from fraqat.data.speech_signal import LogMelSpec
from fraqat.errors import ModelError
from fraqat.nn import LayerFamilies, LayerRule
from fraqat.tasks.layer_patterns import exceptions, named_families
from fraqat.tasks.speech_calls import SpeechCalls
from fraqat.tasks.speech_fastspeech2 import FASTSPEECH2_CALLS
from fraqat.tasks.speech_speecht5 import SPEECHT5_CALLS


@dataclass(frozen=True)
class SpeechArchitecture:
    """One text-to-speech model.

    Args:
        calls: How it is called.
        last_layers: The output layers as patterns; their inputs stay at 16 bits (the paper's W4A16 last layer) unless the
            recipe says otherwise.
        skipped: Patterns of layers that stay in floating point unless the recipe says otherwise.
        weights: Output -> weight of its distance in the loss. Outputs differ in scale: stop logits and predicted durations must
            not outweigh the spectrogram.
        families: Layer families FF, Attn and TF.
        sample_rate: Of the sound that its vocoder makes.
        mel: The spectrograms that it speaks in; None for a kind of its own, which only its own vocoder can turn into sound.
        hub_tokenizer: Package that its tokenizer on the hub needs.
    """

    calls: SpeechCalls
    last_layers: tuple[str, ...]
    skipped: tuple[str, ...]
    weights: Mapping[str, float]
    families: LayerFamilies = field(default_factory=LayerFamilies)
    sample_rate: int = 16_000
    mel: LogMelSpec | None = None
    hub_tokenizer: str = ""

    def default_rules(self) -> tuple[LayerRule, ...]:
        """The table's exceptions as rules, to be put before the recipe's own."""
        return exceptions(self.last_layers, self.skipped)


SPEECH_ARCHITECTURES: Mapping[str, SpeechArchitecture] = MappingProxyType(
    {
        # The stop decision has one output per frame and ends the speech; the postnet's convolutions are no linear layers.
        "SpeechT5ForTextToSpeech": SpeechArchitecture(
            calls=SPEECHT5_CALLS,
            last_layers=("speech_decoder_postnet.feat_out",),
            skipped=("speech_decoder_postnet.prob_out",),
            weights=MappingProxyType({"spectrogram": 1.0, "refined": 1.0, "stop": 0.02}),
            families=named_families(
                FF=("*.layers.*.feed_forward.*",),
                Attn=("*.layers.*.attention.*", "*.layers.*.self_attn.*", "*.layers.*.encoder_attn.*"),
                TF=("*.wrapped_encoder.layers.*", "*.wrapped_decoder.layers.*"),
            ),
            mel=LogMelSpec(),
            hub_tokenizer="sentencepiece",
        ),
        # Feed-forward layers are convolutions of width 3 here and stay in floating point, like all Conv1d; the predictors end
        # in one number per token.
        "FastSpeech2ConformerModel": SpeechArchitecture(
            calls=FASTSPEECH2_CALLS,
            last_layers=("speech_decoder_postnet.feat_out",),
            skipped=("duration_predictor.linear", "pitch_predictor.linear", "energy_predictor.linear"),
            weights=MappingProxyType(
                {"spectrogram": 1.0, "refined": 1.0, "log_duration": 0.1, "pitch": 0.1, "energy": 0.1}
            ),
            families=named_families(
                FF=("*.conformer_layers.*.feed_forward*",),
                Attn=("*.conformer_layers.*.self_attn.*",),
                TF=("*.conformer_layers.*",),
            ),
            sample_rate=22_050,
            hub_tokenizer="g2p_en",
        ),
    }
)


def speech_architecture_of(model: object) -> SpeechArchitecture:
    """The table's entry for a text-to-speech model.

    Raises:
        ModelError: Its class has no entry yet.
    """
    return speech_architecture_named(type(model).__name__)


def speech_architecture_named(class_name: str) -> SpeechArchitecture:
    """The table's entry for a text-to-speech class; see `speech_architecture_of`."""
    if class_name not in SPEECH_ARCHITECTURES:
        known = ", ".join(SPEECH_ARCHITECTURES)
        raise ModelError(
            f"text-to-speech class {class_name} has no entry in the table of architectures: allowed is {known}. Fix: add "
            f'"{class_name}": SpeechArchitecture(calls=..., last_layers=(...,), skipped=(...,), weights={{...}}) to '
            "SPEECH_ARCHITECTURES in fraqat/tasks/speech_architectures.py, with functions that prepare, call and generate as "
            "in fraqat/tasks/speech_speecht5.py."
        )
    return SPEECH_ARCHITECTURES[class_name]
