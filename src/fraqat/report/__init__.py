"""From plain data to one self-contained HTML page: tables, plots, and what every model made: images, texts or sounds."""

from fraqat.report.data import LossCurve, ReportData, StageSpan
from fraqat.report.page import render_report
from fraqat.report.plots import loss_svg, sqnr_svg
from fraqat.report.samples import SampleKind, SampleRow, Samples

__all__ = [
    "LossCurve",
    "ReportData",
    "SampleKind",
    "SampleRow",
    "Samples",
    "StageSpan",
    "loss_svg",
    "render_report",
    "sqnr_svg",
]
