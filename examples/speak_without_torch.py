"""Speech from an exported SpeechT5, without PyTorch: onnxruntime, numpy and tokenizers are all that it needs.

python examples/speak_without_torch.py EXPORT "good morning" speech.wav

EXPORT is a folder that `fraqat export RUN --format onnx` wrote; docs/targets/onnx.md describes its files.
"""

from __future__ import annotations

import argparse
import json
import wave
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from tokenizers import Tokenizer

Array = np.ndarray[Any, Any]
_MOMENTUM = 0.99


class Export:
    """The graphs of an export and what `parts.json` says of them.

    Args:
        folder: Of the export.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.parts: dict[str, Any] = json.loads((folder / "parts.json").read_text(encoding="utf-8"))
        self._sessions = {
            name: onnxruntime.InferenceSession(str(folder / f"{name}.onnx"), providers=["CPUExecutionProvider"])
            for name in self.parts
        }

    def constants(self, part: str) -> dict[str, Any]:
        """What a program around a part needs to know."""
        return self.parts[part]["constants"]

    def run(self, part: str, inputs: dict[str, Array]) -> dict[str, Array]:
        """Calls one graph."""
        session = self._sessions[part]
        feeds = {item.name: inputs[item.name] for item in session.get_inputs()}
        names = self.parts[part]["outputs"]
        return dict(zip(names, session.run(names, feeds), strict=True))


def speak(export: Export, text: str, kept_DlU: Array) -> Array:
    """The log-mel spectrogram [L, M] of a text.

    Args:
        export: Of a SpeechT5.
        text: What to say.
        kept_DlU: Units of the decoder's prenet that are kept in each step, bool; the model was trained to need this noise.
    """
    constants = export.constants("decoder")
    tokenizer = Tokenizer.from_file(str(export.folder / export.constants("encoder")["tokenizer"]))
    ids = np.array([tokenizer.encode(text).ids], np.int64)
    fixed = {"attention_mask": np.ones_like(ids), "speaker": np.array([constants["speaker"]], np.float32)}
    fixed |= export.run("encoder", {"input_ids": ids, **fixed})
    heads, width = constants["heads"], constants["head_width"]
    cache_names = [name for name in export.parts["decoder"]["inputs"] if name.startswith("past_key_values.")]
    cache = {name: np.zeros((1, heads, 0, width), np.float32) for name in cache_names}
    frame = np.zeros((1, 1, constants["num_mels"]), np.float32)
    spoken: list[Array] = []
    for kept in kept_DlU[: ids.size * constants["frames_per_token"] // constants["reduction_factor"]]:
        found = export.run("decoder", {"frames": frame, "prenet_kept": kept[None, :, None], **fixed, **cache})
        cache = {name: found[name.replace("past_key_values", "present")] for name in cache_names}
        spoken.append(found["spectrogram"])
        frame = found["spectrogram"][:, -1:]
        if (1 / (1 + np.exp(-found["stop"]))).sum() >= constants["stop_threshold"]:
            break
    return export.run("postnet", {"spectrogram": np.concatenate(spoken, 1)})["refined"][0]


def draw_kept(export: Export, num_steps: int, seed: int) -> Array:
    """Units of the prenet to keep in each step."""
    constants = export.constants("decoder")
    shape = (num_steps, constants["prenet_layers"], constants["prenet_units"])
    return np.random.default_rng(seed).random(shape) < constants["prenet_kept_share"]


def to_waveform(export: Export, log_mel: Array) -> Array:
    """Sound [T] in [-1, 1] of a spectrogram, by the exported vocoder or Griffin-Lim."""
    if "vocoder" in export.parts:
        return export.run("vocoder", {"spectrogram": log_mel})["waveform"].flatten()
    return griffin_lim(log_mel, export.constants("postnet")["mel"])


def griffin_lim(log_mel: Array, mel: dict[str, Any], num_iterations: int = 48, seed: int = 0) -> Array:
    """A waveform with about the given spectrogram (Perraudin, Balazs, Sondergaard, 2013)."""
    inverse = np.linalg.pinv(mel_filters(mel))
    magnitude = (10 ** log_mel.astype(np.float64) @ inverse).clip(0)
    phase = np.exp(2j * np.pi * np.random.default_rng(seed).random(magnitude.shape))
    previous = np.zeros_like(phase)
    for _ in range(num_iterations):
        rebuilt = _stft(_istft(magnitude * phase, mel), mel)
        accelerated = rebuilt + _MOMENTUM / (1 + _MOMENTUM) * (rebuilt - previous)
        phase, previous = accelerated / np.abs(accelerated).clip(1e-12), rebuilt
    waveform = _istft(magnitude * phase, mel)
    return waveform / max(1, np.abs(waveform).max())


def mel_filters(mel: dict[str, Any]) -> Array:
    """Triangular bands on Slaney's mel scale, of equal area. [window_length // 2 + 1, num_mels]."""

    def to_mel(hz: float) -> float:
        return 15 + np.log(hz / 1000) * 27 / np.log(6.4) if hz >= 1000 else 3 * hz / 200

    places = np.linspace(to_mel(mel["min_hz"]), to_mel(mel["max_hz"]), mel["num_mels"] + 2)
    edges = np.where(places >= 15, 1000 * np.exp(np.log(6.4) / 27 * (places - 15)), 200 * places / 3)
    frequencies = np.linspace(0, mel["sample_rate"] / 2, mel["window_length"] // 2 + 1)
    distance, width = edges[None] - frequencies[:, None], np.diff(edges)
    triangles = np.minimum(-distance[:, :-2] / width[:-1], distance[:, 2:] / width[1:]).clip(0)
    return triangles * (2 / (edges[2:] - edges[:-2]))


def _window(mel: dict[str, Any]) -> Array:
    return np.hanning(mel["window_length"] + 1)[:-1]


def _stft(waveform: Array, mel: dict[str, Any]) -> Array:
    length, hop = mel["window_length"], mel["hop_length"]
    padded = np.pad(waveform, length // 2, mode="reflect")
    frames = np.lib.stride_tricks.sliding_window_view(padded, length)[::hop]
    return np.fft.rfft(frames * _window(mel))


def _istft(spectrum: Array, mel: dict[str, Any]) -> Array:
    length, hop, window = mel["window_length"], mel["hop_length"], _window(mel)
    frames = np.fft.irfft(spectrum, length) * window
    total = length + hop * (len(frames) - 1)
    sound, weight = np.zeros(total), np.zeros(total)
    for i, frame in enumerate(frames):
        sound[i * hop : i * hop + length] += frame
        weight[i * hop : i * hop + length] += window**2
    inside = slice(length // 2, total - length // 2)
    return sound[inside] / weight[inside]


def write_wav(path: Path, waveform: Array, sample_rate: int) -> None:
    """Writes a mono 16-bit WAV file."""
    with wave.open(str(path), "wb") as stream:
        stream.setnchannels(1)
        stream.setsampwidth(2)
        stream.setframerate(sample_rate)
        stream.writeframes((waveform.clip(-1, 1) * 32767).round().astype("<i2").tobytes())


def main() -> None:
    """Speaks one text."""
    parser = argparse.ArgumentParser(description="Speaks a text with an export, without PyTorch.")
    parser.add_argument("export", type=Path, help="folder of the export")
    parser.add_argument("text")
    parser.add_argument("sound", type=Path, help="WAV file to write")
    parser.add_argument("--seed", type=int, default=0, help="of the noise in the decoder's prenet")
    parser.add_argument("--max-steps", type=int, default=1000)
    arguments = parser.parse_args()
    export = Export(arguments.export)
    log_mel = speak(export, arguments.text, draw_kept(export, arguments.max_steps, arguments.seed))
    rate = export.constants("postnet")["sample_rate"]
    write_wav(arguments.sound, to_waveform(export, log_mel), rate)


if __name__ == "__main__":
    main()
