"""The page of `fraqat compare`: methods side by side, with their intervals, curves and samples."""

from __future__ import annotations

from dataclasses import dataclass

from fraqat.report.axes import NARROW, WIDE
from fraqat.report.curve_plots import interval_svg, validation_svg
from fraqat.report.data import MeanInterval, NamedCurve, Samples
from fraqat.report.page import page_templates
from fraqat.report.sample_views import samples_view
from fraqat.report.views import key_view, table_view
from fraqat.table import Table


@dataclass(frozen=True)
class ComparisonData:
    """What the page shows.

    Args:
        title, summary: Heading, and the result in one sentence.
        results: A row for each method.
        rates: Losses by learning rate.
        reference: Name of the method that ratios are taken to.
        ratios: Mean ratio of every method that has an interval.
        curves: Held-out losses over steps, one curve for each method.
        samples: What the methods made; None where nothing was sampled.
        settings: The recipe as YAML.
        versions: Of packages and machine.
    """

    title: str
    summary: str
    results: Table
    rates: Table
    reference: str
    ratios: tuple[MeanInterval, ...]
    curves: tuple[NamedCurve, ...]
    samples: Samples | None
    settings: str
    versions: Table


def render_comparison(data: ComparisonData) -> str:
    """Renders the page; every text is escaped, and the page loads nothing.

    Args:
        data: What to show.
    """
    quantity = "distillation loss over the reference's"
    return (
        page_templates()
        .get_template("comparison_page.html.j2")
        .render(
            title=data.title,
            summary=data.summary,
            results=table_view(data.results, "Methods"),
            ratios={
                "caption": f"Distillation loss over that of {data.reference}, with 95 % intervals over seeds; lower is better.",
                "wide": interval_svg(data.ratios, WIDE, "ratios-wide", quantity),
                "narrow": interval_svg(data.ratios, NARROW, "ratios-narrow", quantity),
            },
            curves={
                "wide": validation_svg(data.curves, WIDE, "curves-wide"),
                "narrow": validation_svg(data.curves, NARROW, "curves-narrow"),
                "legend": [key_view(index, curve.label) for index, curve in enumerate(data.curves)],
            },
            samples=samples_view(data.samples) if data.samples else None,
            rates=table_view(data.rates, "Learning rates"),
            settings=data.settings,
            versions=table_view(data.versions, "Versions"),
        )
    )
