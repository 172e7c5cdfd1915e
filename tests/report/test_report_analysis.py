"""Laws of the page of an analysis, and of its place in the report of a run."""

import re
from types import SimpleNamespace

import pytest
from page_outline import ESCAPED, HOSTILE, Outline

from fraqat.errors import ConfigError
from fraqat.report import Analysis, NamedCurve, StageSpan, analysis_drawings, render_analysis, render_report
from fraqat.report.analysis_views import KURTOSIS, LOSSES, TAIL, bit_width_curves
from fraqat.table import Table, format_value

VERSIONS = Table("Versions", ("part", "version"), (("torch", "2.13.0"),))
BITS = Analysis(
    "bits",
    (
        Table(
            "Loss over widths",
            ("bits", "loss, inputs of 8 bits", "loss, float inputs", "weight SQNR, dB"),
            ((8.0, 1e-3, 1e-4, 43.0), (4.0, 2e-2, 1.9e-2, 20.0), (2.0, 0.5, 0.49, 8.0)),
            ("What it means.",),
        ),
    ),
)
OUTLIERS = Analysis(
    "outliers",
    (
        Table(
            "Outliers",
            ("layer", "family", KURTOSIS[1], TAIL[1], KURTOSIS[0], TAIL[0]),
            (
                ("blocks.0.a", "FF", 55.0, 5.0, 3.1, 1.5),
                ("blocks.1.b", "Attn", 9.0, 2.0, 2.9, 1.2),
                ("c", "-", None, None, 3, 1),
            ),
        ),
        Table("By family", ("family", "largest kurtosis"), (("FF", 55.0),)),
    ),
)
SENSITIVITY = Analysis(
    "sensitivity",
    (
        Table(
            "Sensitivity",
            ("layer", "family", "place", LOSSES[1], LOSSES[0]),
            (("late", "FF", 2, 0.02, 0.03), ("early", "Attn", 0, 0.01, 0.04), ("free", "-", 1, 0.0, 0.05)),
        ),
    ),
)
ALL = [BITS, OUTLIERS, SENSITIVITY]


def page_of(analysis: Analysis, title: str = "Analysis") -> str:
    return render_analysis(title, "One sentence.", analysis, "name: x\n", VERSIONS)


@pytest.mark.parametrize("analysis", ALL, ids=lambda analysis: analysis.kind)
def test_a_page_holds_its_tables_and_drawings_and_loads_nothing(analysis: Analysis) -> None:
    page = page_of(analysis)
    outline = Outline(page)
    assert outline.tags.count("table") == len(analysis.tables) + 1
    assert page.count('role="img"') == 2 * len(analysis_drawings(analysis)) > 0
    assert "script" not in outline.tags
    assert not [url for name in ("src", "href") for url in outline.values(name) if not url.startswith("#")]
    ids = re.findall(r' id="([^"]*)"', page)
    assert len(ids) == len(set(ids))
    for table in analysis.tables:
        for row in table.rows:
            assert format_value(row[0]) in outline.text


@pytest.mark.parametrize("analysis", ALL, ids=lambda analysis: analysis.kind)
def test_names_from_outside_are_escaped(analysis: Analysis) -> None:
    main = analysis.tables[0]
    layer = [HOSTILE if "layer" in main.columns else main.rows[0][0], *main.rows[0][1:]]
    hostile = Table(HOSTILE, main.columns, (layer, *main.rows[1:]), (HOSTILE,))
    page = render_analysis(HOSTILE, HOSTILE, Analysis(analysis.kind, (hostile,)), HOSTILE, VERSIONS)
    assert "<script" not in page
    assert page.count(ESCAPED) >= 4


def test_curves_of_widths_are_the_loss_columns() -> None:
    curves = bit_width_curves(BITS.tables[0])
    assert [curve.label for curve in curves] == ["inputs of 8 bits", "float inputs"]
    assert curves[0].points == ((2.0, 0.5), (4.0, 2e-2), (8.0, 1e-3))


def test_layers_are_drawn_in_model_order_whatever_the_rows_order() -> None:
    (drawing,) = analysis_drawings(SENSITIVITY)
    backwards = Table("", SENSITIVITY.tables[0].columns, tuple(reversed(SENSITIVITY.tables[0].rows)))
    assert analysis_drawings(Analysis("sensitivity", (backwards,))) == (drawing,)
    titles = re.findall(r"<title>([^<]*)</title>", drawing)
    assert "late\nloss, only this layer 0.02" in titles
    assert not [title for title in titles if title.startswith("free\nloss, only")]  # zero has no logarithm


def test_the_legend_has_the_families_that_are_drawn_in_their_colors() -> None:
    rows = (("quiet", "FF", 0, 0.0, 0.0), ("loud", "Attn", 1, 0.2, 0.3))
    page = page_of(Analysis("sensitivity", (Table("S", SENSITIVITY.tables[0].columns, rows),)))
    legend = re.findall(r'style="color: (var\(--series-\d\))".*?<b>([^<]*)</b>', page, re.S)
    assert legend == [("var(--series-0)", "Attn")]


def test_nothing_to_draw_leaves_the_table() -> None:
    rows = (("a", "FF", 0, 0.0, 0.0),)
    page = page_of(Analysis("sensitivity", (Table("S", SENSITIVITY.tables[0].columns, rows),)))
    assert 'role="img"' not in page
    assert Outline(page).tags.count("table") == 2


def test_a_table_without_its_columns_raises() -> None:
    with pytest.raises(
        ConfigError, match=r"columns of analysis outliers = \['layer'\].* a table with \['family', .*Fix: analyze"
    ):
        page_of(Analysis("outliers", (Table("x", ("layer",), (("a",),)),)))
    with pytest.raises(ConfigError, match=r"columns of analysis bits = \[\]"):
        page_of(Analysis("bits", ()))


def test_a_report_shows_analyses_and_changed_codes_where_there_are_any(factory: SimpleNamespace) -> None:
    stages = (StageSpan(4.0, 0, 40),)
    flips = (
        NamedCurve("all layers", ((20, 2.5), (40, 1.25)), stages),
        NamedCurve("FF", ((20, 3.0), (40, 1.5)), stages),
    )
    page = render_report(factory.bare_report(analyses=tuple(ALL), code_flips=flips))
    outline = Outline(page)
    assert "analysis" in outline.values("id")
    assert "#analysis" in outline.values("href")
    assert "1.25 % in the last record" in page
    assert page.count("plot flips-") == 2
    for heading in ("Loss over the width of the weights, without training", "Outliers of inputs and weights"):
        assert heading in page
    plain = render_report(factory.bare_report())
    assert "analysis" not in Outline(plain).values("id")
    assert "plot flips-" not in plain
