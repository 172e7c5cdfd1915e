"""Laws of the plots of several runs, of widths, of changed codes and of means with intervals."""

import math
import re
import xml.etree.ElementTree as ElementTree
from itertools import pairwise

import pytest
from page_outline import HOSTILE

from fraqat.errors import ConfigError
from fraqat.report import (
    MeanInterval,
    NamedCurve,
    StageSpan,
    bit_width_svg,
    flip_svg,
    interval_svg,
    svg_file,
    validation_svg,
)
from fraqat.report.plots import NARROW, WIDE, PlotSize

FRACTIONAL = (StageSpan(8, 0, 40), StageSpan(5.5, 40, 40), StageSpan(4, 80, 120))
SIMPLE = (StageSpan(16, 0, 70), StageSpan(4, 70, 130))
WIDTHS = (2, 3, 4, 4.25, 4.5, 4.75, 5, 5.5, 6, 7, 8)


def curve(label: str, level: float, stages: tuple[StageSpan, ...] = ()) -> NamedCurve:
    """A falling curve over 200 steps."""
    return NamedCurve(label, tuple((step, level * math.exp(-step / 100)) for step in range(20, 201, 20)), stages)


def widths(label: str = "inputs of 8 bits") -> NamedCurve:
    """A loss that doubles with every half bit."""
    return NamedCurve(label, tuple((bits, 4.0**-bits) for bits in WIDTHS))


def texts_of(svg: str) -> list[str]:
    """What is written in a drawing."""
    return ["".join(element.itertext()) for element in ElementTree.fromstring(svg).iter("text")]


def points_of(svg: str, color: str) -> list[tuple[float, float]]:
    """Places of the marks of one colour, in CSS pixels from the top left."""
    return [
        (float(use.get("x", "nan")), float(use.get("y", "nan")))
        for use in ElementTree.fromstring(svg).iter("use")
        if f"fill: var(--{color})" in use.get("style", "")
    ]


def lines_of(svg: str, color: str) -> list[str]:
    """Paths that are drawn in one colour."""
    root = ElementTree.fromstring(svg)
    wanted = f"stroke: var(--{color})"
    return [
        path.get("d", "")
        for path in root.iter("path")
        if wanted in path.get("style", "") and "fill: none" in path.get("style", "")
    ]


DRAWINGS = {
    "validation": lambda size: validation_svg([curve("a", 1, FRACTIONAL), curve("b", 2, SIMPLE)], size),
    "flips": lambda size: flip_svg([curve("all layers", 5, FRACTIONAL), curve("FF", 3, FRACTIONAL)], size),
    "bits": lambda size: bit_width_svg([widths(), widths("float inputs")], size),
    "intervals": lambda size: interval_svg([MeanInterval("a", 1, 0.9, 1.2), MeanInterval("b", 2, 1.5, 2.5)], size),
}


@pytest.mark.parametrize("size", [WIDE, NARROW])
@pytest.mark.parametrize("name", list(DRAWINGS))
def test_colors_and_font_come_from_the_page_and_drawings_repeat(name: str, size: PlotSize) -> None:
    svg = DRAWINGS[name](size)
    assert not re.findall(r"#[0-9a-f]{6}", svg)
    assert "font-family" not in svg
    assert "<style" not in svg
    assert {"var(--series-0)", "var(--series-1)"} <= set(re.findall(r"var\(--series-\d\)", svg))
    assert svg == DRAWINGS[name](size)


def test_every_validation_loss_is_a_mark_in_order() -> None:
    svg = validation_svg([curve("a", 1, FRACTIONAL), curve("b", 4)])
    first, second = points_of(svg, "series-0"), points_of(svg, "series-1")
    assert len(first) == len(second) == 10
    assert [x for x, _ in first] == sorted(x for x, _ in first)
    assert all(low[1] > high[1] for low, high in zip(first, second, strict=True))  # y counts from the top
    steps = [later[0] - earlier[0] for earlier, later in pairwise(first)]
    assert max(steps) - min(steps) < 0.05


def test_stages_of_the_first_run_are_named_and_of_the_others_marked() -> None:
    with_both = validation_svg([curve("a", 1, FRACTIONAL), curve("b", 2, SIMPLE)])
    texts = texts_of(with_both)
    assert [text for text in texts if text in {"8", "5.5", "4", "16", "bits"}] == ["8", "5.5", "4", "bits"]
    without = validation_svg([curve("a", 1, FRACTIONAL), curve("b", 2)])
    assert len(lines_of(with_both, "series-1")) == len(lines_of(without, "series-1")) + len(SIMPLE)
    assert "bits" not in texts_of(validation_svg([curve("a", 1)]))


def test_values_that_a_logarithm_does_not_have_are_left_out() -> None:
    broken = NamedCurve("a", ((1, 0.5), (2, 0.0), (3, math.nan), (4, math.inf), (5, -1.0), (6, 0.25)))
    assert len(points_of(validation_svg([broken]), "series-0")) == 2
    assert validation_svg([NamedCurve("a", ((1, 0.0),))]) == ""
    assert validation_svg([]) == bit_width_svg([]) == flip_svg([]) == interval_svg([]) == ""


def test_a_flip_rate_of_zero_is_drawn_and_lines_end_where_the_width_changes() -> None:
    svg = flip_svg([NamedCurve("all layers", ((20, 3.0), (40, 0.0), (60, 2.0), (80, 1.0), (100, 0.5)), FRACTIONAL)])
    assert len(points_of(svg, "series-0")) == 5
    assert [line.count("L") for line in lines_of(svg, "series-0")] == [1, 1, 0]
    assert len(lines_of(flip_svg([NamedCurve("all layers", ((20, 3.0), (60, 2.0)))]), "series-0")) == 1


def test_no_flips_at_all_still_have_an_axis() -> None:
    svg = flip_svg([NamedCurve("all layers", ((20, 0.0), (40, 0.0)))])
    assert {"0", "1"} <= set(texts_of(svg))


@pytest.mark.parametrize("size", [WIDE, NARROW])
def test_widths_run_from_wide_to_narrow_and_whole_ones_are_named(size: PlotSize) -> None:
    svg = bit_width_svg([widths()], size)
    named = [text for text in texts_of(svg) if text in {f"{bits:g}" for bits in WIDTHS}]
    assert named == sorted(named, key=float, reverse=True)
    assert {"8", "7", "6", "5", "4", "3", "2"} <= set(named)
    places = points_of(svg, "series-0")
    assert len(places) == len(WIDTHS)
    assert all(later[0] < earlier[0] and later[1] > earlier[1] for earlier, later in pairwise(places))


def test_one_width_alone_is_drawn() -> None:
    assert len(points_of(bit_width_svg([NamedCurve("a", ((4.0, 0.1),))]), "series-0")) == 1


def test_intervals_are_named_and_their_marks_lie_on_their_bars() -> None:
    intervals = [MeanInterval("FraQAT", 1.0, 0.8, 1.3), MeanInterval("vanilla QAT", 2.0, 1.9, 2.05)]
    svg = interval_svg(intervals, quantity="held-out loss")
    assert [text for text in texts_of(svg) if text in ("FraQAT", "vanilla QAT")] == ["FraQAT", "vanilla QAT"]
    assert "held-out loss" in texts_of(svg)
    titles = [element.text for element in ElementTree.fromstring(svg).iter("title")]
    assert titles == ["FraQAT\n1, interval 0.8 to 1.3", "vanilla QAT\n2, interval 1.9 to 2.05"]
    rows = [points_of(svg, "series-0"), points_of(svg, "series-1")]
    for (low, high, mean), interval in zip(rows, intervals, strict=True):
        assert low[1] == high[1] == mean[1]
        share = (interval.mean - interval.low) / (interval.high - interval.low)
        assert mean[0] == pytest.approx(low[0] + share * (high[0] - low[0]), abs=0.05)
    assert rows[1][2][0] > rows[0][2][0]
    assert rows[1][2][1] > rows[0][2][1]


def test_names_given_by_users_are_escaped_cut_and_kept_in_full_for_the_pointer() -> None:
    long = "method " * 40
    svg = interval_svg(
        [MeanInterval(HOSTILE, 1, 0, 2), MeanInterval(long, 1, 0, 2), MeanInterval("name-0", 1, 0, 2)], NARROW
    )
    assert "<script" not in svg
    texts = texts_of(svg)
    assert HOSTILE[:20] in "".join(texts)
    assert any(text.endswith("…") and text[:-1] in long for text in texts)
    assert "name-0" in texts
    assert any(title.text.startswith(long) for title in ElementTree.fromstring(svg).iter("title"))
    assert "<script" not in validation_svg([curve(HOSTILE, 1, FRACTIONAL)])


@pytest.mark.parametrize("values", [(1.0, 1.1, 1.2), (1.0, 0.5, 0.9), (math.nan, 0.0, 1.0), (1.0, 0.5, math.inf)])
def test_intervals_without_their_mean_raise(values: tuple[float, float, float]) -> None:
    with pytest.raises(ConfigError, match=r"interval of 'a' = .* allowed is finite numbers with low <= mean <= high"):
        MeanInterval("a", *values)


def test_an_interval_of_one_point_is_drawn() -> None:
    assert len(set(points_of(interval_svg([MeanInterval("a", 0.0, 0.0, 0.0)]), "series-0"))) == 1


def test_points_that_do_not_ascend_raise() -> None:
    with pytest.raises(ConfigError, match=r"points of curve 'a' = \[2, 1\] is not possible: allowed is ascending x"):
        NamedCurve("a", ((2, 1.0), (1, 1.0)))


def test_a_file_of_its_own_has_namespace_and_colors() -> None:
    root = ElementTree.fromstring(svg_file(bit_width_svg([widths()])))
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    (style,) = root.iter("{http://www.w3.org/2000/svg}style")
    for name in ("--ink", "--muted", "--grid", "--series-0", "prefers-color-scheme: dark"):
        assert name in style.text
    assert "http" not in style.text
