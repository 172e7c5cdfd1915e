"""From a trained student to files for a target."""

from fraqat.export.codes import LayerCodes, layer_codes
from fraqat.export.manifest import MANIFEST_FILE, read_manifest, write_manifest
from fraqat.export.own_modules import restore_packed_, save_packed
from fraqat.export.packed import (
    PackedModel,
    PackedSize,
    load_packed_,
    read_packed,
    write_packed,
)
from fraqat.export.packed_target import run_module
from fraqat.export.target import (
    FLOAT_DTYPES,
    Bound,
    CountsSteps,
    ExportJob,
    FloatDtype,
    Inputs,
    LayerPlace,
    ModelDescription,
    OpenedExport,
    Outputs,
    Part,
    ShowsWeights,
    StepsApart,
    Target,
)
from fraqat.export.targets import (
    TARGETS,
    Mismatch,
    check_model,
    check_plain,
    first_difference,
    fitted,
    mismatches,
    target_named,
)

__all__ = [
    "FLOAT_DTYPES",
    "MANIFEST_FILE",
    "TARGETS",
    "Bound",
    "CountsSteps",
    "ExportJob",
    "FloatDtype",
    "Inputs",
    "LayerCodes",
    "LayerPlace",
    "Mismatch",
    "ModelDescription",
    "OpenedExport",
    "Outputs",
    "PackedModel",
    "PackedSize",
    "Part",
    "ShowsWeights",
    "StepsApart",
    "Target",
    "check_model",
    "check_plain",
    "first_difference",
    "fitted",
    "layer_codes",
    "load_packed_",
    "mismatches",
    "read_manifest",
    "read_packed",
    "restore_packed_",
    "run_module",
    "save_packed",
    "target_named",
    "write_manifest",
    "write_packed",
]
