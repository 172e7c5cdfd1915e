"""Makes the espeak SpeechT5 of the zoo, from nothing but the program espeak-ng.

    python -m fraqat.zoo.train_espeak_speecht5 --work DIR --out DIR

lets espeak-ng speak, trains the model and the recognizer that judges it, writes the model folder, measures it and writes its
card. The same command resumes: what `--work` already holds is not made again.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerFast, SpeechT5ForTextToSpeech

from fraqat.data.speech import Speech, load_speech, save_speakers, save_speech
from fraqat.data.speech_signal import LogMelSpec
from fraqat.data.spoken_phrases import held_out_phrases, training_phrases
from fraqat.evaluation.phrase_recognizer import load_recognizer, save_recognizer
from fraqat.zoo.espeak import record
from fraqat.zoo.recognizer_training import random_utterances, train_recognizer
from fraqat.zoo.speech_card import write_card
from fraqat.zoo.speech_models import SPEAKERS, build_feature_extractor, build_model, build_tokenizer, speaker_embeddings
from fraqat.zoo.speech_quality import RECOGNIZER_FOLDER, SPEECH_FOLDER, measure_folder
from fraqat.zoo.speech_training import SpeechTrainingResult, SpeechTrainingSettings, train_speech_model

SEED = 0
NUM_STEPS = 4500
NUM_TRAINING = 3200
NUM_SHIPPED_TRAINING = 224
NUM_HELD_OUT = 64
NUM_RECOGNIZER_UTTERANCES = 2400
NUM_RECOGNIZER_STEPS = 1500
LICENCE = "Speech made with espeak-ng; the recordings are under Apache-2.0."


def recorded(path: Path, texts: tuple[str, ...], seed: int) -> Speech:
    """Says texts, half of them by each voice, or reads what an earlier run has said.

    Args:
        path: file of the recordings.
        texts: what to say.
        seed: seed of the order of the voices and of the noise.

    Returns:
        The utterances.
    """
    if not path.exists():
        embeddings = speaker_embeddings()
        order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(seed)) % len(SPEAKERS)
        voices = [SPEAKERS[index] for index in order.tolist()]
        speakers = torch.stack([embeddings[voice] for voice in voices])
        save_speech(path, record(texts, voices, speakers, LogMelSpec(), seed=seed), {"licence": LICENCE})
    return load_speech(path)


def train(
    work: Path, num_steps: int = NUM_STEPS
) -> tuple[SpeechT5ForTextToSpeech, PreTrainedTokenizerFast, SpeechTrainingResult]:
    """Trains the text-to-speech model, or takes up a training where it was left.

    Args:
        work: folder of recordings and checkpoints; made when missing.
        num_steps: optimiser steps.

    Returns:
        Model, tokenizer, and what the training came to.
    """
    work.mkdir(parents=True, exist_ok=True)
    speech = recorded(work / "training.safetensors", training_phrases()[:NUM_TRAINING], SEED)
    tokenizer = build_tokenizer()
    model = build_model(len(tokenizer), LogMelSpec().num_mels, SEED)
    settings = SpeechTrainingSettings(num_steps, seed=SEED)
    return model, tokenizer, train_speech_model(model, tokenizer, speech, settings, work / "speech.pt")


def make_recognizer(work: Path, out: Path) -> None:
    """Trains the judge into the folder `out`, or copies the one that an earlier run has left.

    Args:
        work: folder of recordings and of the trained recognizer.
        out: folder to write.
    """
    kept = work / RECOGNIZER_FOLDER
    if not (kept / "model.safetensors").exists():
        path = work / "random_words.safetensors"
        if not path.exists():
            save_speech(path, random_utterances(NUM_RECOGNIZER_UTTERANCES, SPEAKERS, SEED + 2))
        speech = load_speech(path)
        save_recognizer(train_recognizer(speech, num_steps=NUM_RECOGNIZER_STEPS, batch_size=32, seed=SEED), kept)
    save_recognizer(load_recognizer(kept), out)


def write_model(model: SpeechT5ForTextToSpeech, tokenizer: PreTrainedTokenizerFast, work: Path, out: Path) -> None:
    """Writes the model folder: weights rounded to bfloat16, tokenizer, feature extractor, voices, and the small data set.

    Args:
        model: what to write; rounded in place.
        tokenizer: of its texts.
        work: folder of the training recordings; the held-out phrases are said here when they are missing.
        out: folder to write; made when missing.
    """
    tokenizer.backend_tokenizer.no_padding()  # padding of the last call would be stored too
    tokenizer.backend_tokenizer.no_truncation()
    model.bfloat16().save_pretrained(out)
    tokenizer.save_pretrained(out)
    build_feature_extractor(LogMelSpec()).save_pretrained(out)
    save_speakers(out / "speakers.safetensors", speaker_embeddings())
    (out / SPEECH_FOLDER).mkdir(exist_ok=True)
    training = load_speech(work / "training.safetensors").subset(range(NUM_SHIPPED_TRAINING))
    held_out = recorded(work / "held_out.safetensors", held_out_phrases()[:NUM_HELD_OUT], SEED + 1)
    for name, speech in (("training", training), ("held_out", held_out)):
        save_speech(out / SPEECH_FOLDER / f"{name}.safetensors", speech, {"licence": LICENCE})


def main() -> None:
    """Trains, writes, measures and describes the model."""
    parser = argparse.ArgumentParser(description="Make the espeak SpeechT5.")
    parser.add_argument("--work", type=Path, required=True, help="folder of recordings and checkpoints, to resume from")
    parser.add_argument("--out", type=Path, required=True, help="model folder to write")
    parser.add_argument("--steps", type=int, default=NUM_STEPS, help="optimiser steps of the text-to-speech model")
    arguments = parser.parse_args()
    model, tokenizer, result = train(arguments.work, arguments.steps)
    write_model(model, tokenizer, arguments.work, arguments.out)
    make_recognizer(arguments.work, arguments.out / RECOGNIZER_FOLDER)
    figures = measure_folder(arguments.out)
    card = write_card(result, figures, model.num_parameters(), NUM_TRAINING, NUM_SHIPPED_TRAINING)
    (arguments.out / "README.md").write_text(card)
    print(card)


if __name__ == "__main__":
    main()
