"""Matplotlib figures as SVG that lives inside an HTML page and takes its colours and font from the page's CSS.

A figure is drawn with stand-in colours that no plot would use otherwise. They become CSS variables afterwards, so that one
drawing serves light and dark mode. Text stays text, in the page's font.
"""

from __future__ import annotations

import io
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from xml.etree.ElementTree import Element

import matplotlib
from markupsafe import Markup
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

if TYPE_CHECKING:
    from matplotlib.typing import RcKeyType

INK = "#000101"
MUTED = "#000102"
GRID = "#000103"
BAND = "#000104"
SURFACE = "#000105"
NUM_SERIES_COLORS = 6
_SERIES = tuple(f"#0002{index:02x}" for index in range(NUM_SERIES_COLORS))
_CSS_COLORS = {
    INK: "var(--ink)",
    MUTED: "var(--muted)",
    GRID: "var(--grid)",
    BAND: "var(--band)",
    SURFACE: "var(--surface)",
    **{color: f"var(--series-{index})" for index, color in enumerate(_SERIES)},
}
_STYLE: dict[RcKeyType, Any] = {
    "svg.hashsalt": "fraqat",
    "svg.fonttype": "none",
    "font.family": ["DejaVu Sans"],  # comes with matplotlib and is wide: what it has room for, the page's font has too
    "font.size": 12.0,
    "text.parse_math": False,
    "path.simplify": False,
}
_POINTS_PER_INCH = 72
_COLOR = re.compile(r"#[0-9a-f]{6}")
_NUMBER = re.compile(r"-?\d+\.\d+")
_FONT_FAMILY = re.compile(r"font-family:[^;]*;?\s*")
_LOCAL_LINK = re.compile(r"url\(#([^)]+)\)")


def series_color(index: int) -> str:
    """The stand-in colour of the curve or family `index`; it repeats after `NUM_SERIES_COLORS`."""
    return _SERIES[index % NUM_SERIES_COLORS]


def series_variable(index: int) -> str:
    """The CSS colour that `series_color` becomes."""
    return _CSS_COLORS[series_color(index)]


@contextmanager
def new_figure(width_px: float, height_px: float) -> Generator[Figure]:
    """Yields an empty figure whose unit is the CSS pixel, under settings that no matplotlibrc changes."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_STYLE)
        figure = Figure(figsize=(width_px / _POINTS_PER_INCH, height_px / _POINTS_PER_INCH), dpi=_POINTS_PER_INCH)
        FigureCanvasSVG(figure)
        yield figure


def to_inline_svg(
    figure: Figure,
    *,
    prefix: str,
    label: str,
    titles: Mapping[str, Sequence[str]] | None = None,
    names: Mapping[str, str] | None = None,
) -> Markup:
    """Writes a figure of `new_figure` as an `<svg>` element for a page.

    Args:
        figure: The drawing; call this inside `new_figure`'s block.
        prefix: Start of all ids, different for every drawing of a page, and its CSS class.
        label: What the drawing shows, for people who do not see it.
        titles: gid of a scatter -> one text per point, shown when the pointer rests on the point.
        names: Text drawn in the figure -> text that takes its place: names given by users, which matplotlib never sees.

    Returns:
        The element, safe to put into HTML: equal text for equal drawings, without scripts, styles or links out of itself.
    """
    stream = io.StringIO()
    metadata = {"Date": None, "Creator": None, "Format": None, "Type": None}
    figure.savefig(stream, format="svg", transparent=True, metadata=metadata)
    root = ElementTree.fromstring(stream.getvalue())  # noqa: S314  # matplotlib's own output
    for gid, texts in (titles or {}).items():
        _add_titles(root, gid, texts)
    for element in root.iter():
        if _local(element.tag) == "text" and element.text in (names or {}):
            element.text = (names or {})[element.text or ""]
    used_ids = {link for element in root.iter() for link in _links(element)}
    for parent in list(root.iter()):
        for child in list(parent):
            if _local(child.tag) in ("style", "metadata"):
                parent.remove(child)
    for element in root.iter():
        _clean(element, prefix, used_ids)
    for key in ("width", "height", "version"):
        root.attrib.pop(key, None)
    root.attrib.update({"class": f"plot {prefix}", "role": "img", "aria-label": label})
    return Markup(ElementTree.tostring(root, encoding="unicode"))  # noqa: S704  # the serializer escapes


def standalone_svg(drawing: Markup, style: str) -> str:
    """A drawing of `to_inline_svg` as the text of a file that needs no page.

    Args:
        drawing: One `<svg>` element.
        style: CSS that sets the page's colours and font.
    """
    root = ElementTree.fromstring(drawing)  # noqa: S314  # our own
    root.set("xmlns", "http://www.w3.org/2000/svg")
    element = ElementTree.Element("style")
    element.text = style
    root.insert(0, element)
    return ElementTree.tostring(root, encoding="unicode") + "\n"


def _local(name: str) -> str:
    """A tag or attribute name without its namespace."""
    return name.rpartition("}")[2]


def _links(element: Element) -> Iterator[str]:
    for name, value in element.attrib.items():
        if _local(name) == "href":
            yield value.removeprefix("#")
        yield from _LOCAL_LINK.findall(value)


def _add_titles(root: Element, gid: str, texts: Sequence[str]) -> None:
    groups = [element for element in root.iter() if element.get("id") == gid]
    marks = [mark for group in groups for mark in group.iter() if _local(mark.tag) == "use"]
    for mark, text in zip(marks, texts, strict=True):
        ElementTree.SubElement(mark, "title").text = text


def _clean(element: Element, prefix: str, used_ids: set[str]) -> None:
    """Shortens one element and lets the page's CSS colour it."""
    element.tag = _local(element.tag)
    attributes = {_local(name): value for name, value in element.attrib.items()}
    element.attrib.clear()
    if attributes.get("id") not in used_ids:
        attributes.pop("id", None)
    if attributes.get("transform", "").startswith("rotate(-0 "):
        del attributes["transform"]
    for name, value in attributes.items():
        element.set(name, _clean_value(name, value, prefix))
    if element.tag not in ("text", "tspan", "title"):
        element.text = None
    element.tail = None


def _clean_value(name: str, value: str, prefix: str) -> str:
    if name == "id":
        return f"{prefix}-{value}"
    if name == "href":
        return f"#{prefix}-{value.removeprefix('#')}"
    value = _LOCAL_LINK.sub(rf"url(#{prefix}-\1)", value)
    if name == "style":
        value = _FONT_FAMILY.sub("", value)
        value = _COLOR.sub(lambda match: _CSS_COLORS.get(match[0], match[0]), value)
    elif name not in ("clip-path", "aria-label"):
        value = _NUMBER.sub(lambda match: f"{float(match[0]):.2f}".rstrip("0").rstrip("."), value)
    return " ".join(value.split())
