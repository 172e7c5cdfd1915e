"""From plain data to one self-contained HTML page: tables, plots, and what every model made: images, texts or sounds."""

from fraqat.report.analysis_views import analysis_drawings
from fraqat.report.comparison import ComparisonData, render_comparison
from fraqat.report.curve_plots import bit_width_svg, flip_svg, interval_svg, validation_svg
from fraqat.report.data import (
    Analysis,
    AnalysisKind,
    LossCurve,
    MeanInterval,
    NamedCurve,
    ReportData,
    StageSpan,
)
from fraqat.report.layer_plots import LayerScale, layer_svg, sqnr_svg
from fraqat.report.page import render_analysis, render_report, svg_file
from fraqat.report.plots import loss_svg
from fraqat.report.samples import SampleKind, SampleRow, Samples

__all__ = [
    "Analysis",
    "AnalysisKind",
    "ComparisonData",
    "LayerScale",
    "LossCurve",
    "MeanInterval",
    "NamedCurve",
    "ReportData",
    "SampleKind",
    "SampleRow",
    "Samples",
    "StageSpan",
    "analysis_drawings",
    "bit_width_svg",
    "flip_svg",
    "interval_svg",
    "layer_svg",
    "loss_svg",
    "render_analysis",
    "render_comparison",
    "render_report",
    "sqnr_svg",
    "svg_file",
    "validation_svg",
]
