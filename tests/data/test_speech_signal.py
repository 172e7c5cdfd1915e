"""Laws of waveforms and log-mel spectrograms."""

from __future__ import annotations

import math
import wave
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fraqat.data.speech_signal import LogMelSpec, griffin_lim, log_mel, mel_filters, read_wav, resample, write_wav
from fraqat.errors import ConfigError


def tone(hertz: float, rate: int = 16_000, seconds: float = 0.5, amplitude: float = 0.3) -> Tensor:
    return amplitude * torch.sin(2 * math.pi * hertz * torch.arange(round(rate * seconds)) / rate)


def voiced(seconds: float = 0.6) -> Tensor:
    """Harmonics of a falling pitch and some noise: more like speech than a tone."""
    time = torch.arange(round(16_000 * seconds)) / 16_000
    phase = 2 * math.pi * (180 * time - 40 * time**2)
    harmonics = sum(torch.sin(k * phase) / k for k in range(1, 20))
    noise = torch.randn(len(time), generator=torch.Generator().manual_seed(0))
    return 0.1 * torch.as_tensor(harmonics) + 0.01 * noise


@pytest.mark.parametrize("num_samples", [600, 4096, 5000, 9601])
def test_features_are_those_of_speecht5(num_samples: int) -> None:
    from transformers import SpeechT5FeatureExtractor

    waveform = voiced()[:num_samples]
    extracted = SpeechT5FeatureExtractor()(audio_target=waveform.numpy(), sampling_rate=16_000)["input_values"][0]
    mel = log_mel(waveform)
    assert mel.shape == extracted.shape == (1 + num_samples // 256, 80)
    assert torch.allclose(mel, torch.from_numpy(extracted), atol=1e-4)


def test_features_of_other_rates_are_those_of_speecht5() -> None:
    from transformers import SpeechT5FeatureExtractor

    settings = {"num_mel_bins": 40, "hop_length": 12, "win_length": 32, "fmin": 60, "fmax": 7000}
    extracted = SpeechT5FeatureExtractor(**settings)(audio_target=voiced().numpy(), sampling_rate=16_000)
    spec = LogMelSpec(num_mels=40, hop_length=192, window_length=512, min_hz=60, max_hz=7000)
    assert torch.allclose(log_mel(voiced(), spec), torch.from_numpy(extracted["input_values"][0]), atol=1e-4)


def test_silence_is_the_floor() -> None:
    assert torch.equal(log_mel(torch.zeros(4000)), torch.full((16, 80), -10.0))


def test_a_batch_is_its_waveforms_one_by_one() -> None:
    waveforms = torch.stack([voiced(), voiced().flip(0)])
    assert torch.allclose(log_mel(waveforms)[1], log_mel(waveforms[1]), atol=1e-5)


def test_ten_times_the_amplitude_adds_one() -> None:
    assert torch.allclose(log_mel(10 * voiced()), log_mel(voiced()) + 1, atol=1e-4)


def test_a_tone_is_loudest_in_its_own_band() -> None:
    centers = mel_filters(LogMelSpec()).argmax(0) * 16_000 / 1024
    loudest = log_mel(tone(2000.0))[10].argmax()
    assert abs(float(centers[loudest]) - 2000) < 60


def test_griffin_lim_gives_sound_with_the_wanted_spectrogram() -> None:
    mel = log_mel(voiced())
    waveform = griffin_lim(mel)
    assert waveform.shape == ((len(mel) - 1) * 256,)
    error = (log_mel(waveform) - mel).abs().mean()
    wrong_phases = (log_mel(griffin_lim(mel, num_iterations=0)) - mel).abs().mean()
    assert error < 0.15
    assert error < 0.7 * wrong_phases


def test_griffin_lim_is_the_same_for_the_same_seed() -> None:
    mel = log_mel(voiced(0.2))
    assert torch.equal(griffin_lim(mel, num_iterations=3, seed=4), griffin_lim(mel, num_iterations=3, seed=4))
    assert not torch.equal(griffin_lim(mel, num_iterations=3, seed=4), griffin_lim(mel, num_iterations=3, seed=5))


@pytest.mark.parametrize(("old", "new"), [(22_050, 16_000), (8_000, 16_000), (48_000, 16_000), (16_000, 22_050)])
def test_resampling_keeps_a_tone(old: int, new: int) -> None:
    resampled = resample(tone(440.0, old), old, new)
    expected = tone(440.0, new)
    assert len(resampled) == math.ceil(round(old * 0.5) * new / old)
    inner = slice(200, min(len(expected), len(resampled)) - 200)
    assert torch.allclose(resampled[inner], expected[inner], atol=2e-3)


def test_resampling_removes_what_the_lower_rate_cannot_hold() -> None:
    assert resample(tone(9000.0, 22_050), 22_050, 16_000)[200:-200].abs().max() < 0.01


def test_resampling_to_the_same_rate_changes_nothing() -> None:
    assert torch.equal(resample(voiced(), 16_000, 16_000), voiced())


def test_wav_files_keep_16_bits(tmp_path: Path) -> None:
    write_wav(tmp_path / "a.wav", voiced().clamp(-1, 1), 16_000)
    waveform, rate = read_wav(tmp_path / "a.wav")
    assert rate == 16_000
    assert torch.allclose(waveform, voiced(), atol=1 / 16_000)


def test_channels_are_averaged(tmp_path: Path) -> None:
    with wave.open(str(tmp_path / "stereo.wav"), "wb") as stream:
        stream.setnchannels(2)
        stream.setsampwidth(2)
        stream.setframerate(8000)
        stream.writeframes(b"\x00\x10\x00\x30" * 5)
    waveform, rate = read_wav(tmp_path / "stereo.wav")
    assert rate == 8000
    assert torch.equal(waveform, torch.full((5,), 0x2000 / 32768))


def test_other_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.wav").write_text("no sound")
    with pytest.raises(ConfigError, match="a WAV file"):
        read_wav(tmp_path / "a.wav")
    with wave.open(str(tmp_path / "bytes.wav"), "wb") as stream:
        stream.setnchannels(1)
        stream.setsampwidth(1)
        stream.setframerate(8000)
        stream.writeframes(b"\x00" * 5)
    with pytest.raises(ConfigError, match="16 bits per sample, not 8"):
        read_wav(tmp_path / "bytes.wav")


@pytest.mark.parametrize(
    ("values", "message"),
    [({"hop_length": 0}, "mel.hop_length = 0"), ({"max_hz": 9000.0}, r"mel.max_hz = 9000.0 .* at most half")],
)
def test_impossible_spectrograms_are_refused(values, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        LogMelSpec(**values)


def test_too_short_waveforms_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"samples of a waveform = 512 .* more than 512"):
        log_mel(torch.zeros(512))
    with pytest.raises(ConfigError, match=r"shape of a log-mel spectrogram = \(4, 80\)"):
        griffin_lim(torch.zeros(4, 80))
