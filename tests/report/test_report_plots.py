"""Laws of the inline SVG plots."""

import dataclasses
import random
import re
import time
import xml.etree.ElementTree as ElementTree
from types import SimpleNamespace

import matplotlib
import pytest

from fraqat.report import LossCurve, StageSpan, loss_svg, sqnr_svg
from fraqat.report.layer_points import OTHER_FAMILY, blocks_of, families_of, layer_points, lowest_points
from fraqat.report.plots import NARROW, WIDE, PlotSize
from fraqat.table import Table


def texts_of(svg: str) -> list[str]:
    """What is written in a drawing."""
    return ["".join(element.itertext()) for element in ElementTree.fromstring(svg).iter("text")]


@pytest.mark.parametrize("size", [WIDE, NARROW])
def test_all_nine_stages_are_labelled(factory: SimpleNamespace, report: object, size: PlotSize) -> None:
    texts = texts_of(loss_svg(report.curves, size))
    assert [text for text in texts if text in {"8", "7", "6", "5.5", "5", "4.75", "4.5", "4.25", "4"}] == [
        "8", "7", "6", "5.5", "5", "4.75", "4.5", "4.25", "4",
    ]  # fmt: skip


def test_long_curve_stays_small_and_quick(factory: SimpleNamespace) -> None:
    curve = factory.curve("long", 0.01, (8.0, 4.0), (1, 24), epoch_steps=1000)
    assert len(curve.steps) == 25_000
    start = time.perf_counter()
    svg = loss_svg([curve])
    assert time.perf_counter() - start < 5
    assert len(svg) < 60_000


def test_many_layers_stay_small(factory: SimpleNamespace) -> None:
    points = layer_points(factory.layers(40))
    assert len(points) > 500
    svg = sqnr_svg(points)
    assert len(svg) < 700 * len(points)
    assert {"0", "39"} & set(texts_of(svg))


def test_drawing_leaves_matplotlib_as_it_was_and_ignores_its_settings(report: object) -> None:
    expected = loss_svg(report.curves)
    with matplotlib.rc_context(
        {"axes.facecolor": "red", "font.size": 30, "lines.linewidth": 9, "svg.fonttype": "path"}
    ):
        before = dict(matplotlib.rcParams)
        assert loss_svg(report.curves) == expected
        assert dict(matplotlib.rcParams) == before


def test_colors_and_font_come_from_the_page(report: object) -> None:
    for svg in (loss_svg(report.curves), sqnr_svg(layer_points(report.layers))):
        assert not re.findall(r"#[0-9a-f]{6}", svg)
        assert "font-family" not in svg
        assert "<style" not in svg
        assert "var(--series-0)" in svg


def test_ids_of_two_drawings_differ(report: object) -> None:
    ids = [set(re.findall(r' id="([^"]*)"', loss_svg(report.curves, WIDE, prefix))) for prefix in ("a", "b")]
    assert ids[0]
    assert not ids[0] & ids[1]


@pytest.mark.parametrize("losses", [(0.5, 0.5), (1e-9, 1e9), (1.0, 1.0001), (1e-300, 1e300)])
def test_any_range_of_losses_has_ticks(losses: tuple[float, ...]) -> None:
    svg = loss_svg([LossCurve("x", tuple(range(len(losses))), losses)])
    assert len(texts_of(svg)) >= 4


def test_more_stages_than_room_are_thinned_to_the_last() -> None:
    stages = tuple(StageSpan(32 - 0.25 * index, index, 1) for index in range(100))
    generator = random.Random(0)
    curve = LossCurve("x", tuple(range(100)), tuple(generator.uniform(0.1, 1) for _ in range(100)), (), stages)
    texts = texts_of(loss_svg([curve], NARROW))
    assert "7.25" in texts
    assert 3 < sum("." in text and float(text) > 1 for text in texts) < 12


def test_unknown_stages_draw_no_bits(report: object) -> None:
    assert "bits" not in texts_of(loss_svg([dataclasses.replace(report.curves[0], stages=())]))


def test_every_mark_of_a_layer_names_it(factory: SimpleNamespace) -> None:
    points = layer_points(factory.layers())
    titles = [e.text for e in ElementTree.fromstring(sqnr_svg(points)).iter("title")]
    assert len(titles) == 2 * len(points)
    assert {title.partition("\n")[0] for title in titles} == {point.name for point in points}


def test_layer_points_skip_gaps_and_infinities() -> None:
    columns = ("Layer", "family", "weight_sqnr_db", "output SQNR, dB")
    rows = (
        ("a", "FF", None, None),
        ("b", "-", float("inf"), 3),
        ("c", "FF", 2.0, float("nan")),
        ("d", "FF", True, "x"),
    )
    points = layer_points(Table("", columns, rows))
    assert [(p.position, p.name, p.family, p.weight_db, p.output_db) for p in points] == [
        (1, "b", OTHER_FAMILY, None, 3.0),
        (2, "c", "FF", 2.0, None),
    ]
    assert families_of(points) == ("FF", OTHER_FAMILY)
    assert [point.name for point in lowest_points(points)] == ["b"]


def test_table_without_sqnr_has_no_plot() -> None:
    assert layer_points(Table("", ("layer",), (("a",),))) == ()
    assert sqnr_svg(()) == ""


def test_blocks_are_runs_of_equal_numbers() -> None:
    names = ("embed", "blocks.0.a", "blocks.0.b", "single.0.a", "norm", "single.1.to_out.0", "out")
    rows = tuple((name, 1.0) for name in names)
    points = layer_points(Table("", ("layer", "weight SQNR dB"), rows))
    assert [(b.number, b.first, b.last) for b in blocks_of(points)] == [("0", 1, 2), ("0", 3, 3), ("1", 5, 5)]
