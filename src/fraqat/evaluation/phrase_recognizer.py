"""A small recognizer of the closed language of `fraqat.data.spoken_phrases`: the judge of the tiny text-to-speech models.

It shares nothing with the models that it judges, and it was trained on random orders of words, so that it cannot guess a word
from its place in the phrase.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from fraqat.evaluation.judge_files import read_judge, save_judge

_WIDTH = 96
_RECURRENT_WIDTH = 64
_PAD_FRAMES = 6


class PhraseRecognizer(nn.Module):
    """Convolutions, a bidirectional GRU, and word scores for connectionist temporal classification; class 0 is the blank.

    Args:
        words: The words in the order of the scores, from class 1 on.
        num_mels: Bands of the spectrograms.
    """

    def __init__(self, words: tuple[str, ...], num_mels: int = 80) -> None:
        super().__init__()
        self.words, self.num_mels = tuple(words), num_mels
        self.trunk = nn.Sequential(
            *_stage(num_mels, 64, stride=1), *_stage(64, _WIDTH, stride=2), *_stage(_WIDTH, _WIDTH, stride=2)
        )
        self.recurrent = nn.GRU(_WIDTH, _RECURRENT_WIDTH, batch_first=True, bidirectional=True)
        self.head = nn.Linear(2 * _RECURRENT_WIDTH, len(self.words) + 1)

    def forward(self, log_mels: Tensor) -> Tensor:
        """Scores words.

        Args:
            log_mels: [N, L, M].

        Returns:
            Log-probabilities, [N, ceil(ceil(L / 2) / 2), number of words + 1].
        """
        features = self.trunk(log_mels.transpose(1, 2)).transpose(1, 2)
        return self.head(self.recurrent(features)[0]).log_softmax(-1)

    @torch.no_grad()
    def recognize(self, log_mel: Tensor) -> str:
        """Writes down what is said, by the best class of each step.

        Args:
            log_mel: [L, M], log10 magnitudes as `fraqat.data.speech_signal.log_mel` computes them.

        Returns:
            Words separated by spaces.
        """
        silence = log_mel.new_full((_PAD_FRAMES, log_mel.shape[1]), log_mel.min().item())
        best = self(torch.cat([log_mel, silence])[None].float())[0].argmax(-1)
        classes = torch.unique_consecutive(best).tolist()
        return " ".join(self.words[index - 1] for index in classes if index)


def _stage(in_channels: int, out_channels: int, stride: int) -> tuple[nn.Module, ...]:
    return (
        nn.Conv1d(in_channels, out_channels, 5, stride, 2, bias=False),
        nn.BatchNorm1d(out_channels),
        nn.GELU(),
    )


def save_recognizer(recognizer: PhraseRecognizer, folder: Path) -> None:
    """Writes `config.json` and `model.safetensors` (weights in half precision).

    Args:
        recognizer: what to write.
        folder: where to; made when missing.
    """
    save_judge(recognizer, {"words": recognizer.words, "num_mels": recognizer.num_mels}, folder)


def load_recognizer(folder: Path | str) -> PhraseRecognizer:
    """Loads a recognizer; its method `recognize` is a `fraqat.evaluation.speech.Recognizer`.

    Args:
        folder: folder that `save_recognizer` wrote.

    Returns:
        The recognizer in evaluation mode, float32 on the CPU.

    Raises:
        ValueError: when the folder or one of its two files is missing.
    """
    config, weights = read_judge(
        Path(folder), "Pass one that save_recognizer wrote, or zoo_path('espeak-speecht5') / 'recognizer'."
    )
    recognizer = PhraseRecognizer(tuple(config["words"]), config["num_mels"])
    recognizer.load_state_dict(weights)  # copies half precision into float32
    return recognizer.eval()
