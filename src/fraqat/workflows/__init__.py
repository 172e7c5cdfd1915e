"""One function per verb of the command line, on top of everything else."""

from fraqat.workflows.analyzing import AnalysisKind, analyze
from fraqat.workflows.comparing import CompareOptions, Comparison, compare
from fraqat.workflows.demo import demo
from fraqat.workflows.evaluating import evaluate, quality_table
from fraqat.workflows.exporting import Exported, check_packed, export, generate
from fraqat.workflows.inspecting import inspect
from fraqat.workflows.layer_widths import chosen_widths_table
from fraqat.workflows.planning import ComputeQuestions, plan, plan_tables
from fraqat.workflows.progress import Progress, SilentProgress
from fraqat.workflows.reporting import report
from fraqat.workflows.runs import RunFolder
from fraqat.workflows.sessions import Session, open_session
from fraqat.workflows.status import RunStatus, status
from fraqat.workflows.training import layers, resolve_schedule, stages, train
from fraqat.workflows.verdict import Verified
from fraqat.workflows.verifying import verify

__all__ = [
    "AnalysisKind",
    "CompareOptions",
    "Comparison",
    "ComputeQuestions",
    "Exported",
    "Progress",
    "RunFolder",
    "RunStatus",
    "Session",
    "SilentProgress",
    "Verified",
    "analyze",
    "check_packed",
    "chosen_widths_table",
    "compare",
    "demo",
    "evaluate",
    "export",
    "generate",
    "inspect",
    "layers",
    "open_session",
    "plan",
    "plan_tables",
    "quality_table",
    "report",
    "resolve_schedule",
    "stages",
    "status",
    "train",
    "verify",
]
