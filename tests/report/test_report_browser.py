"""The page as a browser shows it: nothing blank, nothing cut off, no label on another."""

import dataclasses
import html
import io
import json
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from fraqat.report import ReportData, SampleKind, SampleRow, Samples, render_report
from fraqat.report.samples import read_sound

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
BROWSER = next(filter(None, map(shutil.which, NAMES)), None)
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
)
WIDTHS = (1200, 800, 400, 340)
MEASURE = """
const nearOne = 1.01;
function overlaps(a, b) {
  return a.left < b.right - nearOne && b.left < a.right - nearOne && a.top < b.bottom - nearOne && b.top < a.bottom - nearOne;
}
function measure(frame) {
  const doc = frame.contentDocument, width = frame.clientWidth;
  doc.querySelectorAll("details").forEach(item => item.open = true);
  const isShown = item => item.getBoundingClientRect().width > 0;
  const plots = [...doc.querySelectorAll("svg.plot")].filter(isShown);
  const result = {width, plots: plots.length, scrollWidth: doc.documentElement.scrollWidth, faults: []};
  result.images = [...doc.images].filter(image => image.complete && image.naturalWidth > 0 && isShown(image)).length;
  result.prompts = [...doc.querySelectorAll(".grid thead th")].filter(isShown).map(item => item.innerText);
  result.seconds = [...doc.querySelectorAll("audio")].filter(isShown).map(item => item.duration);
  result.texts = [...doc.querySelectorAll(".texts dd")].filter(isShown).map(item => item.innerText);
  result.marks = [...doc.querySelectorAll("dd mark")].filter(isShown).length;
  result.rows = [...doc.querySelectorAll("table.data tbody tr")].filter(isShown).length;
  result.dark = frame.contentWindow.matchMedia("(prefers-color-scheme: dark)").matches;
  for (const plot of plots) {
    const box = plot.getBoundingClientRect();
    const labels = [...plot.querySelectorAll("text")].map(item => [item.textContent, item.getBoundingClientRect()]);
    result.labels = (result.labels || 0) + labels.length;
    labels.forEach(([text, a], index) => {
      if (a.left < box.left - 1 || a.right > box.right + 1 || a.top < box.top - 1 || a.bottom > box.bottom + 1)
        result.faults.push(`${text} is cut off`);
      for (const [other, b] of labels.slice(index + 1))
        if (overlaps(a, b)) result.faults.push(`${text} overlaps ${other}`);
    });
  }
  for (const item of doc.querySelectorAll("main *")) {
    if (item.closest(".scroll > *, svg, pre > *") || !isShown(item)) continue;
    const box = item.getBoundingClientRect();
    if (box.right > width + 1 || box.left < -1) result.faults.push(`${item.tagName} ${item.className} leaves the page`);
  }
  for (const item of doc.querySelectorAll(".data th, .data td, .grid th"))
    if (isShown(item) && item.scrollWidth > item.clientWidth + 1) result.faults.push(`${item.innerText} leaves its cell`);
  return result;
}
window.onload = () => {
  document.body.textContent = JSON.stringify([...document.querySelectorAll("iframe")].map(measure));
};
"""

pytestmark = [
    pytest.mark.browser,
    pytest.mark.xdist_group("browser"),
    pytest.mark.skipif(BROWSER is None, reason=f"none of {', '.join(NAMES)} is installed"),
]


def browse(page: Path, *flags: str) -> str:
    """Opens a page without a window. Returns what the browser prints."""
    profile = f"--user-data-dir={page.parent / 'profile'}"
    command = (str(BROWSER), *FLAGS, profile, *flags, page.as_uri())
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout


def screenshot(text: str, folder: Path, width: int, *flags: str) -> Image.Image:
    """A picture of the top of the page."""
    page, target = folder / "page.html", folder / "page.png"
    page.write_text(text, encoding="utf-8")
    browse(page, f"--window-size={width},2400", f"--screenshot={target}", *flags)
    return Image.open(io.BytesIO(target.read_bytes())).convert("RGB")


def measure(folder: Path, pages: Sequence[tuple[str, int]]) -> list[dict[str, Any]]:
    """Lays out pages at the widths given beside them and lists for each what is there and what is wrong."""
    frames = "".join(
        f'<iframe style="border: 0; width: {width}px; height: 4000px" srcdoc="{html.escape(text)}"></iframe>'
        for text, width in pages
    )
    page = folder / "frames.html"
    page.write_text(f'<!DOCTYPE html><meta charset="utf-8"><script>{MEASURE}</script><body>{frames}', encoding="utf-8")
    dom = browse(page, "--dump-dom", "--virtual-time-budget=4000")
    return json.loads(html.unescape(dom[dom.index("[{") : dom.rindex("}]") + 2]))


def make_extreme_report(factory: SimpleNamespace) -> ReportData:
    """Words without a break, long prompts, long runs with short stages, many layers."""
    word = "unbreakable" * 12
    prompts = (word, "a painting of a lighthouse in a storm, oil on canvas, " * 8, *["x"] * 6)
    curve = factory.curve("a long run " * 9, 1e-9, (16.0, 8.0, 7.25, 6.75, 6.0, 4.125, 4.0), (1, 1, 1, 1, 1, 1, 900), 3)
    texts = {"title": word, "summary": word, "settings": f"name: {word}"}
    curves = (curve, dataclasses.replace(curve, label=word))
    rows = tuple(dataclasses.replace(row, label=f"{row.label} {word[:40]}") for row in factory.images().rows)
    samples = Samples(SampleKind.IMAGES, prompts, rows)
    return factory.report(samples=samples, curves=curves, layers=factory.layers(12), **texts)


def make_extreme_samples(samples: Samples) -> Samples:
    """Labels, prompts and texts of words without a break."""
    word = "unbreakable" * 12
    is_text = samples.kind is SampleKind.TEXTS
    rows = tuple(
        SampleRow(word + row.label, tuple(file + word.encode() * is_text for file in row.files)) for row in samples.rows
    )
    return Samples(samples.kind, (word, *samples.prompts[1:]), rows)


def colors_of(image: Image.Image) -> set[tuple[int, int, int]]:
    """All colours of a picture."""
    return {color for _, color in image.getcolors(image.width * image.height)}


@pytest.mark.parametrize(("scheme", "surface"), [("light", (255, 255, 255)), ("dark", (16, 19, 23))])
def test_screenshot_shows_the_images_in_both_schemes(
    page: str, tmp_path: Path, scheme: str, surface: tuple[int, int, int]
) -> None:
    flags = ("--blink-settings=preferredColorScheme=0",) if scheme == "dark" else ()
    image = screenshot(page, tmp_path, 1200, *flags)
    assert image.size == (1200, 2400)
    assert image.getpixel((2, 2)) == surface
    grounds = {(222, 28, 32), (24, 150, 58), (28, 72, 226), (252, 222, 24), (146, 34, 186)}
    assert grounds <= colors_of(image)  # the original's images have no noise
    dark_or_light = [sum(color) for color in colors_of(image)]
    assert max(dark_or_light) - min(dark_or_light) > 600


def test_layout_holds_at_every_width(page: str, factory: SimpleNamespace, tmp_path: Path) -> None:
    report = factory.report()
    extreme = render_report(make_extreme_report(factory))
    measured = measure(tmp_path, [*((page, width) for width in WIDTHS), (extreme, WIDTHS[0]), (extreme, WIDTHS[-1])])
    for found in measured:
        assert found["faults"] == []
        assert found["scrollWidth"] == found["width"]
        assert (found["images"], found["plots"]) == (32, 2)
        assert found["labels"] > 20
    for found in measured[: len(WIDTHS)]:
        assert found["prompts"] == list(report.samples.prompts)
        assert found["rows"] == sum(len(t.rows) for t in (report.quality, report.layers, report.sizes, report.versions))


@pytest.mark.parametrize("kind", ["texts", "sounds"])
def test_texts_and_sounds_fit_at_every_width(factory: SimpleNamespace, tmp_path: Path, kind: str) -> None:
    samples = getattr(factory, kind)()
    page, extreme = (
        render_report(factory.bare_report(samples=each)) for each in (samples, make_extreme_samples(samples))
    )
    measured = measure(tmp_path, [(page, WIDTHS[0]), (page, WIDTHS[2]), (extreme, WIDTHS[-1])])
    num_files = len(samples.prompts) * len(samples.rows)
    for found in measured:
        assert found["faults"] == []
        assert found["scrollWidth"] == found["width"]
        assert len(found[{"texts": "texts", "sounds": "seconds"}[kind]]) == num_files
        assert found["images"] == (num_files if kind == "sounds" else 0)
    if kind == "texts":
        assert all(text for found in measured for text in found["texts"])
        assert [found["marks"] for found in measured[:2]] == [15, 15]
    else:  # the page's own policy lets them play
        expected = [read_sound(row.files[i]).duration_s for i in range(len(samples.prompts)) for row in samples.rows]
        assert measured[0]["seconds"] == pytest.approx(expected, abs=0.01)
