"""Laws of the HTML page."""

import dataclasses
import re
from types import SimpleNamespace

import pytest
from page_outline import ESCAPED, HOSTILE, Outline

from fraqat.errors import ConfigError
from fraqat.report import LossCurve, ReportData, SampleKind, SampleRow, Samples, render_report
from fraqat.table import Table


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
    policies = [value for value in outline.values("content") if "default-src" in value]
    assert policies == ["default-src 'none'; style-src 'unsafe-inline'; img-src data:; media-src data:"]
    for forbidden in ("http://", "https://", "//cdn", "@import", "<script", "<link", "<iframe", "javascript:"):
        assert forbidden not in page.lower()
    assert not [name for name, _ in outline.attributes if name.startswith("on")]


def test_page_shows_every_prompt_model_and_image(page: str, report: ReportData) -> None:
    text = Outline(page).text
    prompts, rows = report.samples.prompts, report.samples.rows
    for expected in (*prompts, *(row.label for row in rows), report.title, report.summary):
        assert expected in text
    assert Outline(page).tags.count("img") == 32
    assert set(Outline(page).values("alt")) == {f"{r.label}: {p}" for r in rows for p in prompts}


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
    rows = (dataclasses.replace(report.samples.rows[0], label=HOSTILE),)
    texts = dict.fromkeys(("title", "summary", "settings"), HOSTILE)
    tables = dict.fromkeys(("quality", "layers", "sizes", "versions"), table)
    samples = Samples(SampleKind.IMAGES, (HOSTILE,) * len(report.samples.prompts), rows)
    page = render_report(factory.report(samples=samples, curves=(curve,), **texts, **tables))
    outline = Outline(page)
    assert "script" not in outline.tags
    assert "<script" not in page
    assert page.count(ESCAPED) >= 20
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


def test_page_without_samples_leaves_the_section_out(factory: SimpleNamespace) -> None:
    page = render_report(factory.bare_report(samples=None))
    assert not {"images", "texts", "sounds"} & set(Outline(page).values("id"))
    assert Outline(page).values("href")[:2] == ["#quality", "#training"]


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


def test_intervals_stand_under_their_values_and_are_escaped(factory: SimpleNamespace) -> None:
    columns = ("model", "PSNR, dB", "PSNR, 95 %", "steps")
    quality = Table("Quality", columns, (("original", None, None, None), ("own", 31.5, "<29.1> to 34", 25)))
    page = render_report(factory.bare_report(quality=quality))
    assert '<td class="num">31.5<span class="below">&lt;29.1&gt; to 34</span></td>' in page
    assert 'PSNR, dB<span class="below">95 %</span></th>' in page
    assert page[page.index("own<") :].count("</td>", 0, page[page.index("own<") :].index("</tr>")) == 2


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
    rows = (SampleRow("original", large), SampleRow("FraQAT", large))
    samples = Samples(SampleKind.IMAGES, ("a red three on blue",), rows)
    large_page = render_report(factory.bare_report(samples=samples))
    assert 'class="grid pixelated"' in page
    assert "--cell: 96px" in page  # three times 32
    assert 'class="grid"' in large_page
    assert "--cell: 208px" in large_page


def test_long_prompts_are_also_listed_in_full(factory: SimpleNamespace, page: str, report: ReportData) -> None:
    prompts = ("a very long prompt " * 20, *report.samples.prompts[1:])
    samples = dataclasses.replace(report.samples, prompts=prompts)
    assert "Prompts in full" in render_report(factory.bare_report(samples=samples))
    assert "Prompts in full" not in page


def test_row_of_the_main_method_is_set_apart(page: str) -> None:
    assert re.findall(r'<tr class="main">\s*<th scope="row">([^<]*)</th>', page) == ["FraQAT"]


def test_losses_without_steps_raise() -> None:
    with pytest.raises(ConfigError, match=r"losses of curve 'x' = '2 values'.*each of the 1 steps"):
        LossCurve("x", (0,), (1.0, 2.0))
