"""How far a student's speech is from its teacher's: spectral distances, lengths, and what a recognizer understands.

Shape suffixes: L and R frames of the two spectrograms, M mel bands, K cepstral coefficients.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from fraqat.errors import config_error
from fraqat.evaluation.bootstrap import BootstrapSpec, Interval, mean_interval, ratio_interval

NUM_CEPSTRA = 13
_DB_PER_CEPSTRUM = 10 / math.log(10)


class Recognizer(Protocol):
    """Anything that writes down what is said in a log-mel spectrogram; see `from_waveforms` for one that takes sound."""

    def __call__(self, log_mel: Tensor, /) -> str:
        """The words in log_mel [L, M], separated by spaces."""
        ...


def from_waveforms(recognize: Callable[[Tensor], str], vocoder: Callable[[Tensor], Tensor]) -> Recognizer:
    """A `Recognizer` out of one that listens to waveforms, such as a speech recognition pipeline.

    Args:
        recognize: Waveform [T] -> text.
        vocoder: Log-mel spectrogram [L, M] -> waveform [T], such as `fraqat.data.speech_signal.griffin_lim`.
    """
    return lambda log_mel: recognize(vocoder(log_mel))


@dataclass(frozen=True)
class SpeechQuality:
    """The student's speech against the teacher's, means over utterances.

    Args:
        num_utterances: Compared pairs.
        mel_cepstral_distortion_db: Of the shape of the spectrum, aligned in time.
        log_spectral_distance_db: Of the spectrum with its loudness, aligned in time.
        length_difference: |student's frames - teacher's| as a share of the teacher's.
        word_error_rate, character_error_rate: Of the student's speech against the texts; None without a recognizer.
        teacher_word_error_rate, teacher_character_error_rate: Of the teacher's speech, the same way.
    """

    num_utterances: int
    mel_cepstral_distortion_db: float
    log_spectral_distance_db: float
    length_difference: float
    word_error_rate: float | None = None
    character_error_rate: float | None = None
    teacher_word_error_rate: float | None = None
    teacher_character_error_rate: float | None = None


@dataclass(frozen=True)
class SpeechRows:
    """The same by utterance; sequences of equal length.

    Args:
        mel_cepstral_distortion_db, log_spectral_distance_db, length_difference: As in `SpeechQuality`.
        word_errors, character_errors: Of the student's speech, (errors, words or characters of the text); empty without a
            recognizer.
        teacher_word_errors, teacher_character_errors: Of the teacher's speech, the same way.
    """

    mel_cepstral_distortion_db: tuple[float, ...]
    log_spectral_distance_db: tuple[float, ...]
    length_difference: tuple[float, ...]
    word_errors: tuple[tuple[int, int], ...] = ()
    character_errors: tuple[tuple[int, int], ...] = ()
    teacher_word_errors: tuple[tuple[int, int], ...] = ()
    teacher_character_errors: tuple[tuple[int, int], ...] = ()

    def quality(self) -> SpeechQuality:
        """Means over utterances, and errors per word or character of all texts."""
        return SpeechQuality(
            len(self.length_difference),
            _mean(self.mel_cepstral_distortion_db),
            _mean(self.log_spectral_distance_db),
            _mean(self.length_difference),
            *(_rate(pairs) if pairs else None for pairs in self._errors().values()),
        )

    def intervals(self, spec: BootstrapSpec) -> dict[str, Interval]:
        """95 % intervals of `SpeechQuality`'s figures by name, over utterances; empty where the spec asks for none."""
        names = ("mel_cepstral_distortion_db", "log_spectral_distance_db", "length_difference")
        found = {name: mean_interval(getattr(self, name), spec) for name in names}
        for name, pairs in self._errors().items():
            if pairs:
                found[name] = ratio_interval([a for a, _ in pairs], [b for _, b in pairs], spec)
        return {name: interval for name, interval in found.items() if interval is not None}

    def _errors(self) -> dict[str, tuple[tuple[int, int], ...]]:
        """In the order of `SpeechQuality`'s rates."""
        return {
            "word_error_rate": self.word_errors,
            "character_error_rate": self.character_errors,
            "teacher_word_error_rate": self.teacher_word_errors,
            "teacher_character_error_rate": self.teacher_character_errors,
        }


def speech_quality(
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    texts: Sequence[str] = (),
    recognizer: Recognizer | None = None,
) -> SpeechQuality:
    """`speech_rows` over all utterances."""
    return speech_rows(student, teacher, texts, recognizer).quality()


def speech_rows(
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    texts: Sequence[str] = (),
    recognizer: Recognizer | None = None,
) -> SpeechRows:
    """Compares what student and teacher say for the same texts.

    Args:
        student: N log10-mel spectrograms, [L, M].
        teacher: N, in the same order, [R, M].
        texts: What they should say; needed with a recognizer.
        recognizer: Writes down what is said.

    Raises:
        ConfigError: Different numbers of utterances, or none.
    """
    counts = (len(student), len(teacher), len(texts) if recognizer else len(teacher))
    if len(set(counts)) != 1 or not student:
        raise config_error(
            "numbers of student's and teacher's utterances and texts",
            counts,
            allowed="the same number, 1 or more",
            fix="pass one spectrogram of each model (and, with a recognizer, one text) per utterance",
        )
    pairs = list(zip(student, teacher, strict=True))
    paths = [align(mel, reference) for mel, reference in pairs]
    errors: dict[str, tuple[tuple[int, int], ...]] = {}
    if recognizer is not None:
        heard, heard_teacher = [recognizer(mel) for mel in student], [recognizer(mel) for mel in teacher]
        errors = {
            "word_errors": _errors(_words(heard), _words(texts)),
            "character_errors": _errors(_characters(heard), _characters(texts)),
            "teacher_word_errors": _errors(_words(heard_teacher), _words(texts)),
            "teacher_character_errors": _errors(_characters(heard_teacher), _characters(texts)),
        }
    return SpeechRows(
        tuple(_distortion_db(mel[i], ref[j]) for (mel, ref), (i, j) in zip(pairs, paths, strict=True)),
        tuple(_distance_db(mel[i], ref[j]) for (mel, ref), (i, j) in zip(pairs, paths, strict=True)),
        tuple(abs(len(mel) - len(reference)) / len(reference) for mel, reference in pairs),
        **errors,
    )


def mel_cepstral_distortion_db(
    mel: Tensor, reference: Tensor, *, aligned: bool = True, num_cepstra: int = NUM_CEPSTRA
) -> float:
    """Mel-cepstral distortion: (10 / ln 10) sqrt(2 sum_{k=1..K} (c_k - c'_k)^2), mean over frames (Kubichek, 1993,
    "Mel-cepstral distance measure for objective speech quality assessment").

    Here c_k are the coefficients of the cosine series of the natural logarithm of the mel magnitudes over the bands (a scaled
    DCT-II), so that the distortion is the root mean square difference in dB of the smoothed spectra without their loudness
    (k = 0). Cepstra of a vocoder such as WORLD have other absolute values: compare figures of one kind only.

    Args:
        mel: log10 mel magnitudes, [L, M].
        reference: [R, M].
        aligned: Whether frames are matched by dynamic time warping; otherwise L must be R.
        num_cepstra: K, less than M.

    Raises:
        ConfigError: Different numbers of bands, or of frames without alignment.
    """
    i, j = align(mel, reference, num_cepstra) if aligned else _same_frames(mel, reference)
    return _distortion_db(mel[i], reference[j], num_cepstra)


def log_spectral_distance_db(mel: Tensor, reference: Tensor, *, aligned: bool = True) -> float:
    """Log-spectral distance: per frame the root mean square over the bands of 20 (log10 m - log10 m'), mean over frames.

    Args:
        mel: log10 mel magnitudes, [L, M].
        reference: [R, M].
        aligned: Whether frames are matched by dynamic time warping; otherwise L must be R.

    Raises:
        ConfigError: Different numbers of bands, or of frames without alignment.
    """
    i, j = align(mel, reference) if aligned else _same_frames(mel, reference)
    return _distance_db(mel[i], reference[j])


def _distortion_db(mel: Tensor, reference: Tensor, num_cepstra: int = NUM_CEPSTRA) -> float:
    return (_scaled_cepstra(mel, num_cepstra) - _scaled_cepstra(reference, num_cepstra)).norm(dim=1).mean().item()


def _distance_db(mel: Tensor, reference: Tensor) -> float:
    return (20 * (mel.double() - reference.double())).square().mean(1).sqrt().mean().item()


def _scaled_cepstra(log_mel: Tensor, num_cepstra: int) -> Tensor:
    """Cepstra 1 to K of [L, M], scaled so that their Euclidean distance is the distortion in dB. [L, K] float64."""
    num_mels = log_mel.shape[1]
    if not 1 <= num_cepstra < num_mels:
        raise config_error("num_cepstra", num_cepstra, allowed=f"1 to {num_mels - 1}, below the bands", fix="use 13")
    order = torch.arange(1, num_cepstra + 1, dtype=torch.float64)
    place = (torch.arange(num_mels, dtype=torch.float64) + 0.5) / num_mels
    basis = torch.cos(math.pi * place[:, None] * order[None]) * (2 / num_mels)  # [M, K]
    return (math.sqrt(2) * _DB_PER_CEPSTRUM * math.log(10)) * (log_mel.double().cpu() @ basis)


def align(mel: Tensor, reference: Tensor, num_cepstra: int = NUM_CEPSTRA) -> tuple[Tensor, Tensor]:
    """Matches frames by dynamic time warping on the cepstral distance: steps of one frame in either or both.

    Args:
        mel: [L, M].
        reference: [R, M].
        num_cepstra: Cepstral coefficients that are compared.

    Returns:
        Indices into the frames of `mel` and of `reference`, of equal length; both run from the first to the last frame.

    Raises:
        ConfigError: Different numbers of bands, or no frame.
    """
    _check_bands(mel, reference)
    cost: list[list[float]] = torch.cdist(
        _scaled_cepstra(mel, num_cepstra), _scaled_cepstra(reference, num_cepstra)
    ).tolist()
    total = [[math.inf] * len(reference) for _ in cost]
    for i, row in enumerate(cost):
        for j, value in enumerate(row):
            total[i][j] = value + (total[before[0]][before[1]] if (before := _before(total, i, j)) else 0.0)
    path = [(len(mel) - 1, len(reference) - 1)]
    while before := _before(total, *path[-1]):
        path.append(before)
    indices = torch.tensor(path[::-1])
    return indices[:, 0], indices[:, 1]


def _before(total: list[list[float]], i: int, j: int) -> tuple[int, int] | None:
    """The cheapest cell that a path can come from to (i, j), diagonals first; None at the start."""
    if i == 0 or j == 0:
        return None if i == j else (max(0, i - 1), max(0, j - 1))
    return min(((i - 1, j - 1), (i - 1, j), (i, j - 1)), key=lambda cell: total[cell[0]][cell[1]])


def _same_frames(mel: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
    _check_bands(mel, reference)
    if len(mel) != len(reference):
        raise config_error(
            "frames of mel and reference",
            (len(mel), len(reference)),
            allowed="the same number without alignment",
            fix="pass aligned=True",
        )
    frames = torch.arange(len(mel))
    return frames, frames


def _check_bands(mel: Tensor, reference: Tensor) -> None:
    shapes = (tuple(mel.shape), tuple(reference.shape))
    if mel.ndim != 2 or reference.ndim != 2 or mel.shape[1] != reference.shape[1] or 0 in (*shapes[0], *shapes[1]):
        raise config_error(
            "shapes of mel and reference",
            shapes,
            allowed="[frames, bands] with the same number of bands",
            fix="pass two spectrograms made with the same settings",
        )


def word_error_rate(heard: Sequence[str], texts: Sequence[str]) -> float:
    """Inserted, deleted and replaced words, per word of `texts`, without case and punctuation. Can exceed 1."""
    return _rate(_errors(_words(heard), _words(texts)))


def character_error_rate(heard: Sequence[str], texts: Sequence[str]) -> float:
    """As `word_error_rate`, with characters; runs of spaces count as one."""
    return _rate(_errors(_characters(heard), _characters(texts)))


def _words(texts: Sequence[str]) -> list[list[str]]:
    return [_plain(text).split() for text in texts]


def _characters(texts: Sequence[str]) -> list[list[str]]:
    return [list(_plain(text)) for text in texts]


def _plain(text: str) -> str:
    """Words in small letters without punctuation, apostrophes within words apart: a recognizer's spelling is no error."""
    kept = "".join(character if character.isalnum() or character == "'" else " " for character in text.casefold())
    return " ".join(word.strip("'") for word in kept.split() if word.strip("'"))


def _errors(heard: Sequence[Sequence[str]], wanted: Sequence[Sequence[str]]) -> tuple[tuple[int, int], ...]:
    """Errors and length of each wanted text."""
    if len(heard) != len(wanted) or not any(wanted):
        raise config_error(
            "numbers of heard and wanted texts",
            (len(heard), len(wanted)),
            allowed="the same number, not all wanted texts empty",
            fix="pass one heard text per wanted text",
        )
    return tuple((edit_distance(a, b), len(b)) for a, b in zip(heard, wanted, strict=True))


def _rate(pairs: Sequence[tuple[int, int]]) -> float:
    return sum(errors for errors, _ in pairs) / sum(length for _, length in pairs)


def edit_distance(first: Sequence[str], second: Sequence[str]) -> int:
    """Fewest insertions, deletions and replacements that turn one sequence into the other (Levenshtein)."""
    row = list(range(len(second) + 1))
    for i, item in enumerate(first, 1):
        previous, row[0] = row[0], i
        for j, other in enumerate(second, 1):
            previous, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, previous + (item != other))
    return row[-1]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
