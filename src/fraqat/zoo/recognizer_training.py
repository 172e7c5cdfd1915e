"""Trains the recognizer that judges the tiny text-to-speech models, on random sequences of their words."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fraqat.data.speech import Speech
from fraqat.data.speech_signal import LogMelSpec
from fraqat.data.spoken_phrases import PHRASE_WORDS
from fraqat.evaluation.phrase_recognizer import PhraseRecognizer
from fraqat.zoo.espeak import record

_SLOWEST, _FASTEST = 150, 240  # words per minute
_MAX_WORDS = 6
_PRINT_EVERY = 100


def random_utterances(num: int, voices: Sequence[str], seed: int) -> Speech:
    """Says random sequences of words, at random speeds, by voices in turn.

    Args:
        num: how many.
        voices: voices of espeak-ng.
        seed: seed of words, speeds and noise.

    Returns:
        The utterances, without speaker embeddings.
    """
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, _MAX_WORDS + 1, (num,), generator=generator).tolist()
    texts = [
        " ".join(PHRASE_WORDS[i] for i in torch.randint(len(PHRASE_WORDS), (length,), generator=generator).tolist())
        for length in lengths
    ]
    speeds = torch.randint(_SLOWEST, _FASTEST, (num,), generator=generator).tolist()
    chosen = [voices[i % len(voices)] for i in range(num)]
    return record(texts, chosen, torch.zeros(num, 0), LogMelSpec(), seed=seed, words_per_minute=speeds)


def train_recognizer(speech: Speech, *, num_steps: int, batch_size: int, seed: int) -> PhraseRecognizer:
    """Trains the recognizer from nothing. Spectrograms are made noisier, louder, and smoother in time and frequency at random,
    since synthetic ones are.

    Args:
        speech: utterances of the words.
        num_steps: optimiser steps.
        batch_size: utterances per step.
        seed: seed of the weights, the batches and the changes.

    Returns:
        The recognizer in evaluation mode.
    """
    torch.manual_seed(seed)
    recognizer = PhraseRecognizer(PHRASE_WORDS, speech.log_mels[0].shape[1]).train()
    optimizer = torch.optim.AdamW(recognizer.parameters(), lr=2e-3, weight_decay=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=2e-3, total_steps=num_steps, pct_start=0.1)
    generator = torch.Generator().manual_seed(seed)
    targets = [torch.tensor([PHRASE_WORDS.index(word) + 1 for word in text.split()]) for text in speech.texts]
    for step in range(1, num_steps + 1):
        rows = torch.randint(len(speech), (batch_size,), generator=generator).tolist()
        mels = [_changed(speech.log_mels[row], generator) for row in rows]
        log_probs = recognizer(torch.nn.utils.rnn.pad_sequence(mels, batch_first=True, padding_value=-4.0))
        steps = torch.tensor([(len(mel) + 3) // 4 for mel in mels])
        wanted = [targets[row] for row in rows]
        sizes = torch.tensor([len(target) for target in wanted])
        loss = F.ctc_loss(log_probs.transpose(0, 1), torch.cat(wanted), steps, sizes, zero_infinity=True)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(recognizer.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % _PRINT_EVERY == 0:
            print(f"recognizer step {step}/{num_steps} loss {loss.item():.4f}", flush=True)
    return recognizer.eval()


def _changed(log_mel: Tensor, generator: torch.Generator) -> Tensor:
    noise, gain, smooth_time, smooth_bands, silence = torch.rand(5, generator=generator).tolist()
    changed = log_mel[None, None]
    if smooth_time < 0.4:
        changed = F.avg_pool2d(changed, (3, 1), 1, (1, 0), count_include_pad=False)
    if smooth_bands < 0.4:
        changed = F.avg_pool2d(changed, (1, 5), 1, (0, 2), count_include_pad=False)
    changed = F.pad(changed[0, 0], (0, 0, int(8 * silence), int(8 * (1 - silence))), value=-4.0)
    changed = changed + 0.25 * noise * torch.randn(changed.shape, generator=generator)
    return (changed + 0.6 * (gain - 0.5)).clamp(-5.0, 2.0)
