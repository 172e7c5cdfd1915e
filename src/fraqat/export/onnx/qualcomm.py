"""Qualcomm's HTP: a static QDQ graph, the float graph with encodings, and the binary that a phone loads."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, final

from torch import nn

from fraqat.errors import ConfigError, config_error
from fraqat.export.codes import LayerCodes, layer_codes
from fraqat.export.onnx.qdq import check_static, nearest_channel_weight, nearest_input
from fraqat.export.target import Bound, ExportJob, LayerPlace, OpenedExport, Part, Target, fitted_activation
from fraqat.nn import ActivationSpec, QuantSpec
from fraqat.numerics import Granularity, RangeMethod

if TYPE_CHECKING:
    from fraqat.export.onnx.encodings import Encodings
    from fraqat.export.onnx.static import FloatGraph

PARTS_FILE = "parts.json"
CALIBRATION_SAMPLES = 100
COMPILER = "onnxruntime_qnn"
FLOAT_FOLDER = ".aimet"
"""Ending of the folder that AI Hub takes: the float graph and its encodings, under the folder's name."""


@final
class QualcommTarget(Target):
    """For every part: `PART.onnx` (QDQ, fixed shapes, a batch of 1), `PART.aimet/` and, with onnxruntime-qnn, a context binary.

    A part without quantized layers is left out: it is the same in every format.
    """

    name = "qualcomm"
    summary = "static QDQ ONNX, encodings and context binary for the HTP of Snapdragon chips"
    extra = "qualcomm"
    requires = ("onnx", "onnxscript", "onnxruntime")
    tasks = ("text-to-image",)
    defaults = MappingProxyType(
        {
            "weight": {"bits": 4, "granularity": "channel", "narrow": True, "scale_dtype": "bfloat16"},
            "activation": {
                "bits": 8,
                "static": True,
                "granularity": "tensor",
                "symmetric": False,
                "range_method": "percentile",
            },
        }
    )
    float_dtypes = ("float32",)
    bound = Bound(
        sqnr_db=15.0,
        layer_sqnr_db=20.0,
        reason="the same codes; the HTP rounds the output of every operator too, layers with inputs of 8 bits to 8 bits",
        steps=1.0,
    )

    def nearest(self, place: LayerPlace, spec: QuantSpec) -> QuantSpec | None:
        """W4A8, W4A16, W8A8 or W8A16: symmetric narrow weights per output channel, static asymmetric inputs."""
        weight, activation = nearest_channel_weight(spec.weight), nearest_input(spec.activation)
        if activation is None:
            activation = ActivationSpec(bits=16, static=True, symmetric=False, granularity=Granularity.TENSOR)
        return QuantSpec(weight, fitted_activation(activation, symmetric=False))

    def write(self, job: ExportJob) -> None:
        """Writes graphs, encodings and context binaries; `parts.json` says what they take and give.

        Raises:
            ConfigError: An input has no fixed scale, or a size is not fixed.
            ModelError: The offline compiler is there and does not take the whole graph.
        """
        codes = layer_codes(job.student)
        for layer in codes.values():
            check_static(layer, self.name)
            self._check(layer)
        written = {part.name: write_part(job, part, codes) for part in job.parts() if _holds(part, job.student)}
        (job.folder / PARTS_FILE).write_text(json.dumps(written, indent=2) + "\n", encoding="utf-8")

    def _check(self, layer: LayerCodes) -> None:
        place = LayerPlace(layer.name, layer.type_name, tuple(layer.codes.shape))
        if self.nearest(place, layer.spec) != layer.spec:
            raise config_error(
                f"{layer.name}.spec",
                layer.spec,
                allowed="narrow symmetric weights per output channel, static asymmetric inputs of 8 or 16 bits",
                fix=f"train with `--set target={self.name}`",
            )

    def open(self, folder: Path, student: nn.Module) -> OpenedExport:
        """The graphs in the HTP emulator of onnxruntime-qnn."""
        if importlib.util.find_spec(COMPILER) is None:
            raise ConfigError(f"target {self.name} runs in onnxruntime-qnn. Fix: pip install 'fraqat[{self.extra}]'.")
        from fraqat.export.onnx.htp import HtpExport

        return HtpExport(folder, student)


def _holds(part: Part, student: nn.Module) -> bool:
    return any(module is student for module in part.module.modules())


@dataclasses.dataclass(frozen=True)
class StaticModel:
    """A part for the HTP.

    Args:
        graph: In floating point.
        encodings: The grid of every tensor.
        model: The QDQ graph, `onnx_ir.Model`.
    """

    graph: FloatGraph
    encodings: Encodings
    model: Any


def static_model(
    part: Part,
    student: nn.Module,
    codes: Mapping[str, LayerCodes],
    *,
    num_samples: int = CALIBRATION_SAMPLES,
    output_range: RangeMethod = RangeMethod.MIN_MAX,
) -> StaticModel:
    """Traces a part for one sample, observes every tensor and puts it on a grid.

    Args:
        part: Holds `student`, or is it.
        student: Changed by `quantize_`, with static inputs.
        codes: Of its layers.
        num_samples: How many inputs are observed.
        output_range: How the outputs of 8 bits get their range.
    """
    from fraqat.export.onnx.encodings import complete_encodings, observe, trained_encodings
    from fraqat.export.onnx.graph import LAYER_INPUTS, LAYER_OUTPUTS
    from fraqat.export.onnx.static import float_graph, single_samples
    from fraqat.export.onnx.static_qdq import with_grids

    samples = single_samples(part, num_samples)
    graph = float_graph(part, student, codes, samples)
    trained = trained_encodings(graph, codes)
    statistics = observe(with_grids(graph.model, trained), graph, samples)
    encodings = complete_encodings(graph, trained, statistics, output_range)
    model = with_grids(graph.model, encodings)
    model.metadata_props[LAYER_INPUTS] = json.dumps(dict(graph.inputs_of))
    model.metadata_props[LAYER_OUTPUTS] = json.dumps(dict(graph.products))
    return StaticModel(graph, encodings, model)


def write_part(job: ExportJob, part: Part, codes: Mapping[str, LayerCodes]) -> dict[str, Any]:
    """Writes one part; returns its description."""
    from fraqat.export.onnx.graph import save

    static = static_model(part, job.student, codes)
    path = job.folder / f"{part.name}.onnx"
    save(static.model, path)
    job.say(f"{path.name}: {len(static.model.graph)} operators")
    files = {"graph": path.name}
    if static.graph.host is not None:
        files["host"] = f"{part.name}.host.onnx"
        save(static.graph.host, job.folder / files["host"])
    files["float"] = _write_float(job.folder, part.name, static)
    if importlib.util.find_spec(COMPILER) is not None:
        from fraqat.export.onnx.htp import SM8750, compile_context

        compiled = compile_context(path, SM8750)
        files |= {"context": compiled.model.name, "context_binary": compiled.binary.name}
        num_weights = sum(layer.codes.numel() for layer in codes.values())
        bits = 8 * compiled.num_bytes / max(1, num_weights)
        job.say(f"{compiled.binary.name}: {compiled.num_bytes} bytes, {bits:.2f} bits per quantized weight")
    return {"files": files, **_description(static, part)}


def _write_float(folder: Path, name: str, static: StaticModel) -> str:
    """The float graph with its encodings, as AI Hub and qairt-converter take them; returns the folder's name."""
    from fraqat.export.onnx.encodings_json import DEFAULT_VERSION, VERSIONS, encodings_json
    from fraqat.export.onnx.graph import save

    place = folder / f"{name}{FLOAT_FOLDER}"
    others = folder / f"{name}.encodings"
    place.mkdir()
    others.mkdir()
    save(static.graph.model, place / f"{name}.onnx")
    for version in VERSIONS:
        text = json.dumps(encodings_json(static.encodings, version), indent=1) + "\n"
        target = place / f"{name}.encodings" if version == DEFAULT_VERSION else others / f"{version}.encodings"
        target.write_text(text, encoding="utf-8")
    return place.name


def _description(static: StaticModel, part: Part) -> dict[str, Any]:
    """Names, shapes and types of what the graphs take and give, and what the program around them needs."""

    def told(values: Any) -> dict[str, Any]:
        return {str(v.name): {"shape": [int(size) for size in v.shape], "dtype": str(v.dtype).lower()} for v in values}

    host = static.graph.host
    return {
        "inputs": told(static.model.graph.inputs),
        "outputs": list(part.outputs),
        "host_inputs": {} if host is None else told(host.graph.inputs),
        "constants": dict(part.constants),
    }
