"""From plain data to one self-contained HTML page: tables, images of every model, and plots."""

from fraqat.report.data import ImageRow, LossCurve, ReportData, StageSpan
from fraqat.report.page import render_report
from fraqat.report.plots import loss_svg, sqnr_svg

__all__ = [
    "ImageRow",
    "LossCurve",
    "ReportData",
    "StageSpan",
    "loss_svg",
    "render_report",
    "sqnr_svg",
]
