"""Writes the model card of the espeak SpeechT5 from what was measured."""

from __future__ import annotations

from collections.abc import Mapping

from fraqat.data.spoken_phrases import PHRASE_WORDS
from fraqat.zoo.espeak import WORDS_PER_MINUTE
from fraqat.zoo.speech_models import SPEAKERS
from fraqat.zoo.speech_quality import SpeechFigures
from fraqat.zoo.speech_training import SpeechTrainingResult

_ROW_NAMES = {
    "model": "the model, speaking freely",
    "model_griffin_lim": "the model, through a Griffin-Lim waveform",
    "espeak": "espeak-ng itself (errors are the judge's)",
    "other_phrase": "espeak-ng saying another phrase (how large distances get)",
}

_CARD = """\
---
license: apache-2.0
library_name: transformers
pipeline_tag: text-to-speech
---

# espeak SpeechT5: a tiny text-to-speech model

A `SpeechT5ForTextToSpeech` of {num_parameters:.2f} million parameters that says short phrases such as "draw red seven under
blue" in two voices. It is small enough to be trained, quantized and listened to on one CPU core, and a recognizer can write
down what it says, so that "did quantization hurt?" has a number for an answer.

## Use

```python
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer, SpeechT5ForTextToSpeech

from fraqat.data.speech_signal import griffin_lim

model = SpeechT5ForTextToSpeech.from_pretrained(folder, dtype=torch.float32).eval()
tokenizer = AutoTokenizer.from_pretrained(folder)
voices = load_file(f"{{folder}}/speakers.safetensors")  # {voices}
torch.manual_seed(0)  # the decoder drops units also when it speaks
spectrogram = model.generate(
    tokenizer("draw red seven under blue", return_tensors="pt").input_ids,
    speaker_embeddings=voices["{first_voice}"][None],
)
waveform = griffin_lim(spectrogram)  # 16 kHz; fraqat.data.speech_signal.write_wav saves it
```

Phrases are "VERB COLOUR DIGIT" or "VERB COLOUR DIGIT PLACE COLOUR", in lower case, of these words:
{words}.

Spectrograms are those of SpeechT5's feature extractor: 80 mel bands, log10, every 16 ms. The 16 kHz vocoder
`microsoft/speecht5_hifigan` takes them too.

## Quality

On {num_phrases} phrases that nothing was trained on, said freely (no frame of the true speech is given), against espeak-ng's
speech of the same phrase and voice. Mel-cepstral distortion (MCD, 13 cepstra) and log-spectral distance (LSD) after dynamic
time warping; word and character error rate (WER, CER) of the recognizer in `recognizer/`, which was trained on random
sequences of the same words.

| speech | MCD dB | LSD dB | length off by | WER | CER |
|---|---|---|---|---|---|
{rows}

The figures are also in `quality.json`. They were measured on the weights in this folder, as stored (bfloat16).

## Making of

```
apt-get install espeak-ng
python -m fraqat.zoo.train_espeak_speecht5 --work DIR --out DIR
```

{num_steps} steps of 32 utterances with the losses of transformers (L1 before and after the postnet, stop token, guided
attention), {minutes:.0f} minutes on one thread of a shared machine in bfloat16 autocast, final loss {loss:.3f}.
{num_training} utterances, half of them by each of the voices {voice_names}, at {words_per_minute} words per minute, with noise
at -80 dB so that silence has a finite logarithm.

## Data and licence

`speech/` holds {num_shipped_training} of the training utterances and the {num_phrases} held-out ones as 8-bit log-mel
spectrograms with their texts, written by `fraqat.data.speech.save_speech`. The speech was made with espeak-ng
(https://github.com/espeak-ng/espeak-ng). The program is under GPL-3.0-or-later; that licence covers the program, not the
sound that it makes from a user's text, and no part of the program or of its voice data is in this folder. The phrases are
our own. Weights, recognizer and spectrograms: Apache-2.0.

## Limits

It knows {num_words} words and two phrase forms. Other words give nonsense. It is meant for tests, examples and experiments on
quantization.
"""


def write_card(
    training: SpeechTrainingResult,
    figures: Mapping[str, SpeechFigures],
    num_parameters: int,
    num_training: int,
    num_shipped_training: int,
) -> str:
    """Writes the card.

    Args:
        training: what the training came to.
        figures: as `measure_folder` returns them.
        num_parameters: of the model.
        num_training: utterances that it was trained on.
        num_shipped_training: how many of them are in the folder.

    Returns:
        The text of `README.md`.
    """
    return _CARD.format(
        num_parameters=num_parameters / 1e6,
        voices=", ".join(f'"{voice}"' for voice in SPEAKERS),
        voice_names=" and ".join(f"`{voice}`" for voice in SPEAKERS),
        first_voice=SPEAKERS[0],
        words=", ".join(PHRASE_WORDS),
        num_words=len(PHRASE_WORDS),
        num_phrases=figures["model"].num_phrases,
        rows="\n".join(_row(_ROW_NAMES[name], values) for name, values in figures.items()),
        num_steps=training.num_steps,
        minutes=training.minutes,
        loss=training.loss,
        num_training=num_training,
        num_shipped_training=num_shipped_training,
        words_per_minute=WORDS_PER_MINUTE,
    )


def _row(name: str, figures: SpeechFigures) -> str:
    distances = f"{figures.mel_cepstral_distortion_db:.2f} | {figures.log_spectral_distance_db:.2f}"
    shares = (figures.length_difference, figures.word_error_rate, figures.character_error_rate)
    return f"| {name} | {distances} | " + " | ".join(f"{100 * share:.1f} %" for share in shares) + " |"
