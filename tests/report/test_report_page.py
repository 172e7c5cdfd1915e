"""Laws of the HTML page."""

import dataclasses
import html
import re
from html.parser import HTMLParser
from types import SimpleNamespace

import pytest

from fraqat.errors import ConfigError
from fraqat.report import ImageRow, LossCurve, ReportData, render_report
from fraqat.table import Table

VOID = {"meta", "img", "br", "link", "hr", "input"}
HOSTILE = "<script>alert(1)</script>\"'&{{ 7 * 7 }}$x^2$"


class Outline(HTMLParser):
    """Collects elements, attributes and text, and fails on a tag that closes nothing."""

    def __init__(self, text: str):
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.text: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_startendtag(tag, attrs)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)

    def values(self, name: str) -> list[str]:
        """All values of one attribute."""
        return [value for key, value in self.attributes if key == name]


def test_page_is_balanced_with_one_heading_and_unique_ids(page: str) -> None:
    outline = Outline(page)
    assert page.startswith("<!DOCTYPE html>")
    assert [outline.tags.count(tag) for tag in ("html", "main", "h1")] == [1, 1, 1]
    ids = outline.values("id")
    assert len(ids) == len(set(ids))


def test_links_stay_inside_the_page(page: str) -> None:
    outline = Outline(page)
    ids = set(outline.values("id"))
    links = {*outline.values("href"), *re.findall(r"url\(([^)]*)\)", page)}
    assert {link.removeprefix("#") for link in links} <= ids
    assert all(source.startswith("data:image/png;base64,") for source in outline.values("src"))
    for forbidden in ("http://", "https://", "//cdn", "@import", "<script", "<link", "<iframe", "javascript:"):
        assert forbidden not in page.lower()
    assert not [name for name, _ in outline.attributes if name.startswith("on")]


def test_page_shows_every_prompt_model_and_image(page: str, report: ReportData) -> None:
    text = Outline(page).text
    for expected in (*report.prompts, *(row.label for row in report.image_rows), report.title, report.summary):
        assert expected in text
    assert Outline(page).tags.count("img") == 32
    assert set(Outline(page).values("alt")) == {f"{r.label}: {p}" for r in report.image_rows for p in report.prompts}


def test_page_has_both_color_schemes_and_stays_small(page: str) -> None:
    assert "@media (prefers-color-scheme: dark)" in page
    assert "#000" not in re.sub(r"&#\d+;", "", page)  # no stand-in colour of a plot is left
    assert len(page.encode()) < 400_000


def test_equal_data_gives_equal_pages(page: str, factory: SimpleNamespace) -> None:
    assert render_report(factory.report()) == page


def test_hostile_text_is_shown_as_text(factory: SimpleNamespace, report: ReportData) -> None:
    table = Table(
        HOSTILE, ("layer", "family", "output SQNR dB", HOSTILE), ((HOSTILE, HOSTILE, 3.0, HOSTILE),), (HOSTILE,)
    )
    curve = dataclasses.replace(factory.curve("x", 0.01, (4.0,), (3,)), label=HOSTILE)
    rows = tuple(dataclasses.replace(row, label=HOSTILE) for row in report.image_rows[:1])
    texts = dict.fromkeys(("title", "summary", "settings"), HOSTILE)
    tables = dict.fromkeys(("quality", "layers", "sizes", "versions"), table)
    prompts = (HOSTILE,) * len(report.prompts)
    page = render_report(factory.report(prompts=prompts, image_rows=rows, curves=(curve,), **texts, **tables))
    outline = Outline(page)
    assert "script" not in outline.tags
    assert "<script" not in page
    assert page.count(html.escape(HOSTILE).replace("&quot;", "&#34;").replace("&#x27;", "&#39;")) >= 20
    assert outline.text.count(HOSTILE) >= 20


def test_post_training_run_has_no_loss_plot(factory: SimpleNamespace) -> None:
    page = render_report(factory.report(curves=()))
    Outline(page)
    assert "Nothing was trained" in page
    assert "loss-wide" not in page.partition("</style>")[2]


@pytest.mark.parametrize("losses", [(), (float("nan"), 0.0, float("inf"))])
def test_curves_without_drawable_values_leave_the_plot_out(factory: SimpleNamespace, losses: tuple[float, ...]) -> None:
    page = render_report(factory.bare_report(curves=(LossCurve("FraQAT", tuple(range(len(losses))), losses),)))
    assert "No loss was recorded" in page
    assert "<figcaption>Distillation loss" not in page


def test_page_without_images_leaves_the_grid_out(factory: SimpleNamespace) -> None:
    page = render_report(factory.bare_report(prompts=(), image_rows=()))
    assert 'id="images"' not in page
    assert 'href="#images"' not in page


def test_gaps_and_nan_in_tables_are_shown(factory: SimpleNamespace) -> None:
    rows = (("a", float("nan"), None), ("b", float("inf"), 1))
    layers = Table("L", ("layer", "weight SQNR dB", "output SQNR dB"), rows)
    page = render_report(factory.bare_report(quality=layers, layers=layers))
    assert '<td class="num">nan</td>' in page
    assert '<td class="num">inf</td>' in page
    assert '<td class="num">-</td>' in page
    assert "Not drawn: 1 without a finite value." in page


def test_number_columns_are_aligned_and_others_are_not(factory: SimpleNamespace) -> None:
    columns = ("name", "count", "flag", "mixed", "gap")
    table = Table("Size", columns, (("a", 12_345, True, 1, None), ("b", 0.5, False, "W4", 2)))
    page = render_report(factory.bare_report(sizes=table))
    heads = re.findall(r'<th scope="col"( class="num")?>(\w+)</th>', page[page.index('id="size"') :])[:5]
    assert [name for is_number, name in heads if is_number] == ["count", "gap"]
    assert '<td class="num">12,345</td>' in page


@pytest.mark.parametrize(
    ("values", "texts"),
    [
        ((48.2134, 6.713, 0.0, None), ("48.213", "6.713", "0.000", "-")),
        ((100.0, 61.1), ("100.0", "61.1")),
        ((1.5, float("nan"), 12_345), ("1.5", "nan", "12,345")),
        ((1e-7, 2.0), ("1e-07", "2")),
        ((0.0000123, 2.0), ("1.23e-05", "2")),
        ((0.01234, 1000.0), ("0.01234", "1000")),
    ],
)
def test_decimal_points_of_a_column_are_aligned(
    factory: SimpleNamespace, values: tuple, texts: tuple[str, ...]
) -> None:
    table = Table("Size", ("x", "y"), tuple(("row", value) for value in values))
    page = render_report(factory.bare_report(sizes=table))
    section = page[page.index('id="size"') : page.index('id="settings"')]
    assert re.findall(r'<td class="num">([^<]*)</td>', section) == list(texts)


def test_empty_table_shows_its_columns(factory: SimpleNamespace) -> None:
    page = render_report(factory.bare_report(sizes=Table("Size", ("nothing here",), ())))
    assert '<th scope="col">nothing here</th>' in page


def test_layers_are_folded_from_forty_on(factory: SimpleNamespace) -> None:
    table = factory.layers()
    for num_rows, is_open in ((39, True), (40, False)):
        cut = Table("Layers", ("layer",), tuple(row[:1] for row in table.rows[:num_rows]))
        page = render_report(factory.bare_report(layers=cut))
        assert ("<details open>" in page) == is_open
        assert f"<summary>All {num_rows} layers</summary>" in page


def test_tiny_images_are_pixelated_and_large_ones_are_not(factory: SimpleNamespace, page: str) -> None:
    large = (factory.digit(3, "red", "blue", 0.0, size=256),)
    rows = (ImageRow("original", large), ImageRow("FraQAT", large))
    large_page = render_report(factory.bare_report(prompts=("a red three on blue",), image_rows=rows))
    assert 'class="grid pixelated"' in page
    assert "--cell: 96px" in page  # three times 32
    assert 'class="grid"' in large_page
    assert "--cell: 208px" in large_page


def test_long_prompts_are_also_listed_in_full(factory: SimpleNamespace, page: str, report: ReportData) -> None:
    prompts = ("a very long prompt " * 20, *report.prompts[1:])
    assert "Prompts in full" in render_report(factory.bare_report(prompts=prompts))
    assert "Prompts in full" not in page


def test_row_of_the_main_method_is_set_apart(page: str) -> None:
    assert re.findall(r'<tr class="main">\s*<th scope="row">([^<]*)</th>', page) == ["FraQAT"]


def test_wrong_number_of_images_raises(factory: SimpleNamespace, report: ReportData) -> None:
    with pytest.raises(ConfigError, match=r"image_rows\['original'\].images = '8 images'.*each of the 1 prompts"):
        factory.bare_report(prompts=("only one",), image_rows=report.image_rows)


def test_image_of_another_format_raises() -> None:
    with pytest.raises(ConfigError, match=r"images\[0\] of row 'x'.*PNG"):
        ImageRow("x", (b"\xff\xd8\xff jpeg",))


def test_losses_without_steps_raise() -> None:
    with pytest.raises(ConfigError, match=r"losses of curve 'x' = '2 values'.*each of the 1 steps"):
        LossCurve("x", (0,), (1.0, 2.0))
