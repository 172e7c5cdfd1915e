"""Laws of what the models made: checks of the files, and the sections that show them."""

import base64
import io
import math
import re
from array import array
from types import SimpleNamespace

import pytest
from page_outline import ESCAPED, HOSTILE, Outline
from PIL import Image

from fraqat.errors import ConfigError
from fraqat.report import SampleKind, SampleRow, Samples, render_report
from fraqat.report.samples import Sound, read_sound
from fraqat.report.spectrogram import spectrogram_pngs

PNG = b"\x89PNG\r\n\x1a\n"
RATE = 8_000


def one_prompt(kind: SampleKind, *files: bytes) -> Samples:
    """Models a, b, c with one file each."""
    return Samples(kind, ("say",), tuple(SampleRow(label, (file,)) for label, file in zip("abc", files, strict=False)))


def darkness(picture: bytes) -> list[list[int]]:
    """Opacity of each pixel, by row."""
    image = Image.open(io.BytesIO(picture)).convert("RGBA").getchannel("A")
    return [[image.getpixel((x, y)) for x in range(image.width)] for y in range(image.height)]


@pytest.fixture
def texts_page(factory: SimpleNamespace) -> str:
    """The demo's page with texts."""
    return render_report(factory.bare_report(samples=factory.texts()))


@pytest.fixture
def sounds_page(factory: SimpleNamespace) -> str:
    """The demo's page with sounds."""
    return render_report(factory.bare_report(samples=factory.sounds()))


@pytest.mark.parametrize(
    ("kind", "file", "message"),
    [
        ("images", b"\xff\xd8\xff jpeg", r"'\\xff\\xd8\\xff jpeg'.*a PNG file.*does not begin as one"),
        ("images", PNG + b"cut", "a PNG file.*does not begin as one"),
        ("images", PNG + bytes(16), "a PNG file.*no pixels"),
        ("texts", b"caf\xe9", "UTF-8 text.*0xe9"),
        ("texts", PNG, "UTF-8 text"),
        ("sounds", b"ID3 an mp3 file", r"a WAV file of 16 bits and one channel \(file does not start with RIFF"),
        ("sounds", b"", "a WAV file of 16 bits and one channel.*ends too early"),
        ("sounds", b"RIFF\x04\0\0\0WAVE", "a WAV file of 16 bits and one channel"),
        ("sounds", b"RIFF\x04\0\0\0WEBP", "not a WAVE file"),
    ],
)
def test_file_of_another_format_raises(kind: str, file: bytes, message: str) -> None:
    with pytest.raises(ConfigError, match=rf"samples\['a'\]\[0\] = b.*{message}"):
        one_prompt(SampleKind(kind), file)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"width": 1}, "8 bits and 1 channels"),
        ({"num_channels": 2}, "16 bits and 2 channels"),
        ({"rate": 999}, "999 samples per second are not within 1000 and 384000"),
        ({"rate": 400_000}, "400000 samples per second"),
    ],
)
def test_sound_beyond_16_bits_mono_raises(factory: SimpleNamespace, changes: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        one_prompt(SampleKind.SOUNDS, factory.wav(array("h", [0, 0]), **changes))


def test_wrong_number_of_files_raises(factory: SimpleNamespace) -> None:
    rows = factory.images().rows
    with pytest.raises(ConfigError, match=r"samples\['original'\] = '8 images'.*each of the 1 prompts"):
        Samples(SampleKind.IMAGES, ("only one",), rows)


@pytest.mark.parametrize(("prompts", "rows"), [((), (SampleRow("a", ()),)), (("x",), ())])
def test_samples_of_nothing_raise(prompts: tuple[str, ...], rows: tuple[SampleRow, ...]) -> None:
    with pytest.raises(ConfigError, match=r"one or more of each.*pass None"):
        Samples(SampleKind.TEXTS, prompts, rows)


@pytest.mark.parametrize("kind", ["images", "texts", "sounds"])
def test_section_and_its_link_are_named_after_the_kind(factory: SimpleNamespace, kind: str) -> None:
    samples = getattr(factory, kind)()
    outline = Outline(render_report(factory.bare_report(samples=samples)))
    assert {"images", "texts", "sounds"} & set(outline.values("id")) == {kind}
    assert f"#{kind}" in outline.values("href")
    labels = {text for text in outline.text if text in {row.label for row in samples.rows}}
    assert labels == {"original", "dynamic", "vanilla QAT", "FraQAT"}
    assert {*samples.prompts} <= {*outline.text}


def test_words_that_depart_from_the_original_are_marked(texts_page: str) -> None:
    Outline(texts_page)
    marks = re.findall(r'<mark title="original: ([^"]*)">([^<]*)</mark>', texts_page)
    assert ("usage patterns", "statement") in marks
    assert ("[flexible_expression_list]", "[expression_list]") in marks
    assert "of expressions or a <mark>list</mark> comprehension." in texts_page
    assert '<mark class="gap" title="missing: and"></mark> the return value' in texts_page


def test_texts_say_where_they_depart(texts_page: str) -> None:
    details = re.findall(r'<dt><b>([^<]*)</b>(?: <span class="detail">([^<]*)</span>)?</dt>', texts_page)
    assert details == [
        ("original", ""),
        ("dynamic", "departs at once"),
        ("vanilla QAT", "departs after 10 words"),
        ("FraQAT", "departs after 27 words"),
        ("original", ""),
        ("dynamic", "departs at once"),
        ("vanilla QAT", "departs after 7 words"),
        ("FraQAT", "the same words"),
    ]
    assert texts_page.count("(nothing)") == 1


def test_texts_keep_every_character(factory: SimpleNamespace, texts_page: str) -> None:
    shown = [
        re.sub(r"<[^>]*>", "", text).replace("&#34;", '"')
        for text in re.findall(r"<dd[^>]*>(.*?)</dd>", texts_page, re.S)
    ]
    rows = factory.texts().rows
    expected = [row.files[i].decode() or "(nothing)" for i in range(2) for row in rows]
    assert shown == expected


def test_long_replaced_text_is_cut_in_the_tooltip(factory: SimpleNamespace) -> None:
    samples = one_prompt(SampleKind.TEXTS, b"old " * 500, b"new")
    page = render_report(factory.bare_report(samples=samples))
    assert max(map(len, Outline(page).values("title"))) < 250


def test_control_characters_become_visible(factory: SimpleNamespace) -> None:
    page = render_report(
        factory.bare_report(samples=one_prompt(SampleKind.TEXTS, b"a\x00b\x1b[31m", b"a\x00b\x1b[31m"))
    )
    assert page.count("a\u2400b\u241b[31m") == 2
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f]", page)


@pytest.mark.parametrize("kind", [SampleKind.TEXTS, SampleKind.SOUNDS])
def test_hostile_prompts_labels_and_texts_are_shown_as_text(factory: SimpleNamespace, kind: SampleKind) -> None:
    texts = (HOSTILE.encode(), f"x {HOSTILE} y".encode())
    files = texts if kind is SampleKind.TEXTS else (factory.speech("no", 0.0, RATE),) * 2
    rows = tuple(SampleRow(HOSTILE, (file,)) for file in files)
    page = render_report(factory.bare_report(samples=Samples(kind, (HOSTILE,), rows)))
    outline = Outline(page)
    assert not {"script", "iframe", "object"} & set(outline.tags)
    assert "<script" not in page
    section = page[page.index(f'id="{kind}"') : page.index('id="training"')]
    assert section.count(ESCAPED) >= 4
    assert outline.text.count(HOSTILE) >= 2
    assert not [name for name, _ in outline.attributes if name.startswith("on")]


def test_sounds_are_embedded_as_they_are(factory: SimpleNamespace, sounds_page: str) -> None:
    sources = re.findall(r'<audio controls preload="metadata" src="data:audio/wav;base64,([^"]*)"', sounds_page)
    rows = factory.sounds().rows
    assert [base64.b64decode(source) for source in sources] == [row.files[i] for i in range(3) for row in rows]
    outline = Outline(sounds_page)
    assert all(
        source.startswith(("data:image/png;base64,", "data:audio/wav;base64,")) for source in outline.values("src")
    )
    for forbidden in ("http://", "https://", "<script", "<link", "autoplay"):
        assert forbidden not in sounds_page


def test_pictures_of_sounds_share_the_time_axis(factory: SimpleNamespace) -> None:
    whole, half = (factory.wav(array("h", [1000, -1000] * n), RATE) for n in (RATE, RATE // 2))
    page = render_report(factory.bare_report(samples=one_prompt(SampleKind.SOUNDS, whole, half)))
    assert re.findall(r"--share: ([\d.]+)%", page) == ["100.0", "50.0"]
    assert re.findall(r'<span class="detail">([^<]*)</span>', page) == ["2.00 s", "1.00 s"]


def test_silent_and_empty_sounds_say_so(factory: SimpleNamespace) -> None:
    samples = one_prompt(SampleKind.SOUNDS, factory.wav(array("h", [0] * RATE), RATE), factory.wav(array("h"), RATE))
    page = render_report(factory.bare_report(samples=samples))
    assert re.findall(r'<span class="detail">([^<]*)</span>', page) == ["1.00 s, silent", "0.00 s, silent"]
    pictures = spectrogram_pngs([read_sound(row.files[0]) for row in samples.rows])
    assert {value for picture in pictures for row in darkness(picture) for value in row} == {0}


def test_sound_cut_short_gives_what_is_there(factory: SimpleNamespace) -> None:
    file = factory.wav(array("h", [5, -6, 7]), RATE)
    assert read_sound(file).values == array("h", [5, -6, 7])
    assert read_sound(file[:-1]).values == array("h", [5, -6])


@pytest.mark.parametrize("rate", [1_000, 8_000, 22_050, 48_000, 384_000])
def test_tone_is_a_dark_line_at_its_pitch(rate: int) -> None:
    pitches = (100.0, 400.0)
    tones = [
        Sound(array("h", [round(8000 * math.sin(2 * math.pi * hz * i / rate)) for i in range(rate // 2)]), rate)
        for hz in pitches
    ]
    rows = []
    for picture in spectrogram_pngs(tones):
        columns = list(zip(*darkness(picture), strict=True))
        middle = columns[len(columns) // 2]
        assert max(middle) > 230
        assert min(middle) < 60
        rows.append(middle.index(max(middle)))
    assert rows[0] > rows[1]  # the lower tone lies lower


def test_quieter_sound_is_fainter(factory: SimpleNamespace) -> None:
    loud = read_sound(factory.speech("seven", 0.0))
    quiet = Sound(array("h", [value // 30 for value in loud.values]), loud.sample_rate)
    dark, faint = (sum(map(sum, darkness(picture))) for picture in spectrogram_pngs([loud, quiet]))
    assert 0 < faint < 0.8 * dark


def test_long_sound_has_a_small_picture() -> None:
    (picture,) = spectrogram_pngs([Sound(array("h", [3000, 500, -3000]) * 16_000 * 20, 16_000)])
    image = Image.open(io.BytesIO(picture))
    assert image.height == 64
    assert image.width <= 401
    assert len(picture) < 15_000


def test_equal_samples_give_equal_pages(factory: SimpleNamespace, sounds_page: str) -> None:
    assert render_report(factory.bare_report(samples=factory.sounds())) == sounds_page
