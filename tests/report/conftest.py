"""A report with the shape of a real one: nine stages in 250 steps, 45 layers, eight prompts, four models."""

import io
import math
import random
import sys
import wave
from array import array
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image, ImageDraw, ImageFont

from fraqat.report import LossCurve, ReportData, SampleKind, SampleRow, Samples, StageSpan, render_report
from fraqat.table import Table

sys.path.insert(0, str(Path(__file__).parent))

PALETTE = {
    "red": (222, 28, 32),
    "green": (24, 150, 58),
    "blue": (28, 72, 226),
    "yellow": (252, 222, 24),
    "purple": (146, 34, 186),
}
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
SCENES = (
    (7, "red", "green"),
    (2, "blue", "yellow"),
    (9, "yellow", "purple"),
    (0, "green", "red"),
    (4, "purple", "yellow"),
    (5, "red", "blue"),
    (8, "yellow", "green"),
    (3, "blue", "red"),
)
BITS = (8.0, 7.0, 6.0, 5.5, 5.0, 4.75, 4.5, 4.25, 4.0)
EPOCHS = (1, 1, 1, 1, 1, 2, 2, 2, 14)
MODELS = {"original": 0.0, "dynamic": 60.0, "vanilla QAT": 22.0, "FraQAT": 8.0}
CONTINUATIONS = {
    "The with statement is used to wrap the execution of a block with": (
        "methods defined by a context manager.\n\nThis allows common try...except...finally usage patterns to be "
        "encapsulated for convenient reuse. If the suite was exited due to an exception, and the return value from the "
        "__exit__() method was false, the exception is reraised.",
        "the the a value of object is the is a call to the the sequence of is an the the exception is is raised.",
        "methods defined by a context manager.\n\nThis allows common try...except...finally statement to be encapsulated "
        "for the target list. If the suite was exited due to an exception, the exception is reraised.",
        "methods defined by a context manager.\n\nThis allows common try...except...finally usage patterns to be "
        "encapsulated for convenient reuse. If the suite was exited due to an exception, the return value from the "
        "__exit__() method was false, and the exception is reraised.",
    ),
    "A list display yields a new list object, the contents being specified by": (
        'either a list of expressions or a comprehension.\n\n   list_display ::= "[" [flexible_expression_list] "]"',
        "",
        'either a list of expressions or a list comprehension.\n\n   list_display ::= "[" [expression_list] "]"',
        'either a list of expressions or a comprehension.\n\n   list_display ::= "[" [flexible_expression_list] "]"',
    ),
}
PHRASES = ("seven green birds sleep", "two red boats turn slowly past the old stone bridge", "nine")


def png_bytes(image: Image.Image) -> bytes:
    """The image as a PNG file."""
    stream = io.BytesIO()
    image.save(stream, format="PNG")
    return stream.getvalue()


@cache
def draw_digit(digit: int, color: str, ground: str, noise: float, size: int = 32) -> bytes:
    """One picture of the demo's kind; `noise` is the standard deviation in levels."""
    generator = random.Random(f"{digit}{color}{ground}{noise}")
    image = Image.new("RGB", (size, size), PALETTE[ground])
    font = ImageFont.load_default(size * 0.8)
    ImageDraw.Draw(image).text((size / 2, size / 2), str(digit), fill=PALETTE[color], font=font, anchor="mm")
    if noise:
        image.putdata(
            [tuple(round(v + generator.gauss(0, noise)) for v in pixel) for pixel in image.get_flattened_data()]
        )
    return png_bytes(image)


def wav_bytes(values: array, rate: int = 16_000, width: int = 2, num_channels: int = 1) -> bytes:
    """The samples as a WAV file."""
    stream = io.BytesIO()
    with wave.open(stream, "wb") as file:
        file.setsampwidth(width)
        file.setnchannels(num_channels)
        file.setframerate(rate)
        file.writeframes(values.tobytes())
    return stream.getvalue()


@cache
def speak(phrase: str, noise: float, rate: int = 8_000) -> bytes:
    """A tone with overtones for every letter, on a falling pitch; `noise` is the standard deviation in thousandths."""
    generator = random.Random(f"{phrase}{noise}")
    values, phase, letter_length = array("h"), 0.0, int(rate * (0.055 + noise / 4000))
    for index, letter in enumerate(phrase):
        color = ord(letter) % 7 + 1
        for place in range(letter_length):
            phase += 2 * math.pi * (150 - 45 * index / len(phrase)) / rate
            level = 0 if letter == " " else math.sin(math.pi * place / letter_length)
            tone = sum(math.sin(k * phase) / (1 + abs(k - 3 * color)) for k in (1, 2, 3 * color, 3 * color + 1))
            value = 0.3 * level * tone + generator.gauss(0, noise / 1000)
            values.append(max(-32767, min(32767, round(32767 * value))))
    return wav_bytes(values, rate)


def make_images() -> Samples:
    """Eight digits of every model."""
    prompts = tuple(f"a {color} {DIGITS[digit]} on {ground}" for digit, color, ground in SCENES)
    rows = tuple(
        SampleRow(label, tuple(draw_digit(*scene, noise) for scene in SCENES)) for label, noise in MODELS.items()
    )
    return Samples(SampleKind.IMAGES, prompts, rows)


def make_texts() -> Samples:
    """Two continuations of every model; the last model's second one is the original's."""
    columns = zip(*CONTINUATIONS.values(), strict=True)
    rows = tuple(
        SampleRow(label, tuple(text.encode() for text in texts)) for label, texts in zip(MODELS, columns, strict=True)
    )
    return Samples(SampleKind.TEXTS, tuple(CONTINUATIONS), rows)


def make_sounds() -> Samples:
    """Three phrases of every model, noisier and slower with the model's error."""
    rows = tuple(SampleRow(label, tuple(speak(phrase, noise) for phrase in PHRASES)) for label, noise in MODELS.items())
    return Samples(SampleKind.SOUNDS, PHRASES, rows)


def make_curve(
    label: str, floor: float, bits: tuple[float, ...], epochs: tuple[int, ...], epoch_steps: int = 10
) -> LossCurve:
    """A noisy loss that rises with every stage and falls inside it."""
    generator = random.Random(label)
    stages: list[StageSpan] = []
    for width, length in zip(bits, epochs, strict=True):
        first = stages[-1].end_step if stages else 0
        stages.append(StageSpan(width, first, length * epoch_steps))

    def loss_at(step: int) -> float:
        stage = next(stage for stage in reversed(stages) if stage.first_step <= step)
        level = floor * 4 ** (4.0 - stage.bits) + 2e-4
        return level * (1 + 2.5 * math.exp(-(step - stage.first_step) / (2.5 * epoch_steps)))

    steps = tuple(range(stages[-1].end_step))
    losses = tuple(loss_at(step) * math.exp(generator.gauss(0, 0.22)) for step in steps)
    every = max(1, len(steps) // 25)
    validation = tuple(
        (step + 1, loss_at(step) * math.exp(generator.gauss(0, 0.03))) for step in steps[every - 1 :: every]
    )
    return LossCurve(label, steps, losses, validation, tuple(stages))


def make_layers(num_blocks: int = 3) -> Table:
    """The layers of a small Sana transformer."""
    generator = random.Random(num_blocks)
    inner = [(f"attn{i}.{name}", "Attn", "192x192") for i in (1, 2) for name in ("to_q", "to_k", "to_v", "to_out.0")]
    inner += [
        ("ff.conv_inverted", "FF", "768x192x1x1"),
        ("ff.conv_point", "FF", "192x384x1x1"),
        ("ff.conv_depth", "FF", "768x1x3x3"),
    ]
    inner += [("norm1.gate", "TF", "192x192"), ("norm2.gate", "TF", "192x192")]
    layers = [("patch_embed.proj", "-", "192x8x1x1"), ("time_embed.emb.timestep_embedder.linear_1", "-", "192x256")]
    layers += [
        (f"transformer_blocks.{block}.{name}", f, shape) for block in range(num_blocks) for name, f, shape in inner
    ]
    layers += [("time_embed.linear", "-", "1152x192"), ("caption_projection.linear_1", "-", "192x64")]
    layers += [("caption_projection.linear_2", "-", "192x192"), ("proj_out", "-", "8x192")]
    rows = []
    for name, family, shape in layers:
        is_float = name.startswith("patch_embed")
        weight_db = None if is_float else generator.gauss(20.4, 1.3)
        output_db = None if is_float else weight_db + generator.gauss(1.5 if family == "Attn" else -2.5, 1.6)
        bits = "float (kept)" if is_float else "W4A16" if name == "proj_out" else "W4A8"
        count = math.prod(map(int, shape.split("x")))
        granularity = None if is_float else "channel / token"
        rows.append((name, family, shape, bits, granularity, family != "-", weight_db, output_db, count))
    columns = (
        "layer",
        "family",
        "shape",
        "bits",
        "granularity",
        "trainable",
        "weight SQNR dB",
        "output SQNR dB",
        "parameters",
    )
    return Table(
        "Layers", columns, tuple(rows), ("44 layers quantized, 1,696,128 weights, 97.1 % of 1,746,184 parameters",)
    )


def make_report(**changes: object) -> ReportData:
    """The report; keyword arguments replace fields."""
    quality = Table(
        "Against the original model's images, 512 held-out prompts",
        ("model", "bits", "follows prompt %", "Fréchet distance", "PSNR dB", "size MB", "step ms", "trained s"),
        (
            ("original", "W32A32", 97.46, 0.0, None, 6.985, 21.37, None),
            ("dynamic", "W4A8", 61.13, 48.21, 14.02, 0.998, 24.11, None),
            ("vanilla QAT", "W4A8", 92.77, 6.713, 19.87, 0.998, 24.08, 184.2),
            ("FraQAT", "W4A8", 95.31, 3.094, 21.46, 0.998, 24.1, 186.9),
        ),
        ("Time of one forward step of the transformer, batch 8, median of 20 on two cores.",),
    )
    sizes = Table(
        "Bytes of the transformer",
        ("file", "bytes", "share of original"),
        (
            ("model.safetensors, float32", 6_984_736, 1.0),
            ("packed, 4 bits", 997_824, 0.1429),
            ("of that, scales", 41_216, 0.0059),
        ),
    )
    versions = Table(
        "Versions", ("part", "version"), (("fraqat", "0.1.0"), ("torch", "2.13.0"), ("cpu", "2 cores, AVX2"))
    )
    settings = "model: color-digits-sana\nweights:\n  bits: 4\n  granularity: channel\nschedule:\n  kind: fractional\n"
    fields = {
        "title": "Color digits, Sana 1.7 M: W4A8 with FraQAT",
        "summary": "At 4-bit weights and 8-bit activations FraQAT follows 95.3 % of the prompts (original: 97.5 %) at a "
        "seventh of the size; the same budget of vanilla QAT reaches 92.8 %.",
        "quality": quality,
        "samples": make_images(),
        "curves": (make_curve("FraQAT", 0.011, BITS, EPOCHS), make_curve("vanilla QAT", 0.016, (4.0,), (25,))),
        "layers": make_layers(),
        "sizes": sizes,
        "settings": settings,
        "versions": versions,
    }
    return ReportData(**(fields | changes))


def make_bare_report(**changes: object) -> ReportData:
    """The report without plots, which take most of the time."""
    return make_report(**({"curves": (), "layers": Table("Layers", ("layer",), (("a",),))} | changes))


@pytest.fixture(scope="session")
def factory() -> SimpleNamespace:
    """The functions above: tests do not import from each other."""
    return SimpleNamespace(
        bare_report=make_bare_report,
        curve=make_curve,
        digit=draw_digit,
        images=make_images,
        layers=make_layers,
        report=make_report,
        sounds=make_sounds,
        speech=speak,
        texts=make_texts,
        wav=wav_bytes,
    )


@pytest.fixture(scope="session")
def report() -> ReportData:
    """The demo's report."""
    return make_report()


@pytest.fixture(scope="session")
def page(report: ReportData) -> str:
    """The demo's page."""
    return render_report(report)
