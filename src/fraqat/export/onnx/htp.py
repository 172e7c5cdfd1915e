"""The Qualcomm HTP on a PC: its emulator and its offline compiler, as onnxruntime-qnn brings them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import numpy as np
import onnx
import onnxruntime
import torch
from onnx import numpy_helper
from torch import Tensor, nn

from fraqat.errors import ModelError
from fraqat.export.onnx.encodings import Array, HostPart, all_feeds
from fraqat.export.onnx.graph import LAYER_INPUTS, LAYER_OUTPUTS
from fraqat.export.target import Inputs, Outputs, Part, StepsApart, samples_of
from fraqat.nn import quantized_layers

PROVIDER = "QNNExecutionProvider"
CODES, SCALE, HOST_SUFFIX = ".codes", ".scale", ".host.onnx"
BYTE_TYPES = (onnx.TensorProto.UINT8, onnx.TensorProto.INT8)
_STEPS_IN_16_BITS = 257


LayerTensors = dict[str, tuple[str, str]]
"""Layer -> names of what its product takes and gives: rows [N T, K] and [N T, O] of a linear layer."""


@dataclass(frozen=True)
class Soc:
    """A chip, by the numbers of Qualcomm's SDK."""

    name: str
    soc_model: int
    htp_arch: int


SM8750 = Soc("SM8750", 69, 79)
"""Snapdragon 8 Elite."""
BALANCED, FASTEST = 2, 3
"""Efforts of the compiler. 1 is there too and is not offered: it gave a few outputs of a wide convolution 191 steps off."""
SHOWN = ".shown"


@dataclass(frozen=True)
class ContextBinary:
    """A compiled graph.

    Args:
        model: ONNX file of one node that holds the place of the compiled graph.
        binary: What the HTP loads.
    """

    model: Path
    binary: Path

    @property
    def num_bytes(self) -> int:
        """Size of the binary."""
        return self.binary.stat().st_size


def open_htp(
    model: Path | bytes, soc: Soc = SM8750, effort: int = BALANCED, **entries: str
) -> onnxruntime.InferenceSession:
    """A session on the HTP, which is emulated where there is none.

    Args:
        model: A static QDQ graph.
        soc: The chip to compile for.
        effort: Of the compiler, `BALANCED` or `FASTEST`.
        entries: Of the session's configuration, with `_` for `.` and without the prefix `ep.`.

    Raises:
        ModelError: The HTP does not take the whole graph.
    """
    import onnxruntime_qnn  # pyright: ignore[reportMissingImports]

    if not any(device.ep_name == PROVIDER for device in onnxruntime.get_ep_devices()):
        onnxruntime.register_execution_provider_library(PROVIDER, onnxruntime_qnn.get_library_path())
    devices = [device for device in onnxruntime.get_ep_devices() if device.ep_name == PROVIDER][:1]
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 4  # its notes on tensors between its own passes; a refusal is an exception
    options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    for name, value in entries.items():
        options.add_session_config_entry(f"ep.{name}", value)
    provider = {
        "backend_path": onnxruntime_qnn.get_qnn_htp_path(),
        "soc_model": str(soc.soc_model),
        "htp_arch": str(soc.htp_arch),
        "htp_graph_finalization_optimization_mode": str(effort),
    }
    options.add_provider_for_devices(devices, provider)
    try:
        return onnxruntime.InferenceSession(str(model) if isinstance(model, Path) else model, options)
    except onnxruntime.capi.onnxruntime_pybind11_state.Fail as error:  # pyright: ignore[reportAttributeAccessIssue]
        name = model.name if isinstance(model, Path) else "the graph"
        raise ModelError(
            f"{name}: the compiler for {soc.name} does not take every operator: {str(error)[:200]}. Fix: keep the layers "
            "around it out by a rule with skip: true, or rewrite the operator in fraqat.export.onnx.rewrites."
        ) from error


def compile_context(
    model: Path, soc: Soc = SM8750, folder: Path | None = None, effort: int = BALANCED
) -> ContextBinary:
    """Compiles a static QDQ graph ahead of time.

    Args:
        model: The graph.
        soc: The chip to compile for.
        folder: Where the two files go; the graph's by default.
        effort: Of the compiler, `BALANCED` or `FASTEST`.

    Raises:
        ModelError: The compiler does not take the whole graph.
    """
    target = (folder or model.parent) / f"{model.stem}.{soc.name.lower()}.onnx"
    target.unlink(missing_ok=True)
    before = set(target.parent.glob(f"{target.stem}*.bin"))
    for path in before:
        path.unlink()
    open_htp(model, soc, effort, context_enable="1", context_file_path=str(target), context_embed_mode="0")
    binaries = sorted(target.parent.glob(f"{target.stem}*.bin"))
    if len(binaries) != 1 or not target.is_file():
        raise ModelError(
            f"the compiler left {len(binaries)} binaries of {model.name}, one is expected. Fix: compile again."
        )
    return ContextBinary(target, binaries[0])


@final
class HtpExport:
    """The static graphs of a folder on the HTP.

    Args:
        folder: Holds `PART.onnx` and `PART.host.onnx`.
        student: Gives the names of the layers and the shapes of their weights.
        soc: The chip.
    """

    def __init__(self, folder: Path, student: nn.Module, soc: Soc = SM8750):
        self._folder, self._soc = folder, soc
        self._shapes = {name: tuple(layer.weight.shape) for name, layer in quantized_layers(student)}
        self._opened: dict[str, tuple[onnxruntime.InferenceSession, HostPart | None, LayerTensors]] = {}

    def codes(self) -> Mapping[str, Tensor]:
        """Integers by layer."""
        stored = self._stored(CODES)
        return {name: torch.from_numpy(array.astype(np.int32)) for name, array in stored.items()}

    def weights(self) -> Mapping[str, Tensor]:
        """Scales times integers by layer."""
        scales, found = self._stored(SCALE), dict[str, Tensor]()
        for name, codes in self.codes().items():
            found[name] = codes * torch.tensor(scales[name]).reshape(-1, *(1 for _ in codes.shape[1:]))
        return found

    def _stored(self, suffix: str) -> dict[str, Array]:
        """Constants `LAYER + suffix` by layer, over all graphs."""
        found: dict[str, Array] = {}
        graphs = [p for p in sorted(self._folder.glob("*.onnx")) if p.is_file() and not p.name.endswith(HOST_SUFFIX)]
        for path in graphs:
            for tensor in onnx.load(path).graph.initializer:
                name = tensor.name.removesuffix(suffix)
                if name != tensor.name and name in self._shapes:
                    found[name] = numpy_helper.to_array(tensor)
        return found

    def run(self, part: Part, inputs: Inputs) -> Outputs:
        """Runs the graph once for every sample of a batch."""
        if part.name not in self._opened:
            self._opened[part.name] = self._open(part)
        session, host, layers = self._opened[part.name]
        given = [item.name for item in session.get_inputs()]
        order = [item.name for item in session.get_outputs()]
        found: dict[str, list[Tensor]] = {name: [] for name in order}
        for sample in samples_of(part, inputs):
            feeds = all_feeds(sample, host)
            for name, array in zip(order, session.run(None, {name: feeds[name] for name in given}), strict=True):
                found[name].append(torch.from_numpy(array))
        layer_inputs = {layer: torch.cat(found[given]) for layer, (given, _) in layers.items()}
        outputs = {layer: torch.cat(found[gives]) for layer, (_, gives) in layers.items()}
        return Outputs({name: torch.cat(found[name]) for name in part.outputs}, outputs, layer_inputs)

    def steps_apart(self, part: Part, found: Sequence[Outputs]) -> Mapping[str, StepsApart]:
        """The layers against ONNX Runtime's computation of the same nodes on the CPU."""
        return steps_apart(self._folder / f"{part.name}.onnx", found) if found and found[0].layers else {}

    def _open(self, part: Part) -> tuple[onnxruntime.InferenceSession, HostPart | None, LayerTensors]:
        path, host = self._folder / f"{part.name}.onnx", self._folder / f"{part.name}{HOST_SUFFIX}"
        if not path.is_file():
            raise ModelError(f"{path} is missing. Fix: export again.")
        model, layers = with_layers_shown(path)
        return open_htp(model, self._soc), HostPart(host) if host.is_file() else None, layers


def layer_tensors(model: onnx.ModelProto) -> LayerTensors:
    """What a static graph tells of its layers."""
    told = {item.key: item.value for item in model.metadata_props}
    given, gives = json.loads(told.get(LAYER_INPUTS, "{}")), json.loads(told.get(LAYER_OUTPUTS, "{}"))
    return {layer: (name, gives[layer]) for layer, name in given.items()}


def with_layers_shown(path: Path) -> tuple[Path | bytes, LayerTensors]:
    """A graph whose outputs are also what its layers take and give.

    Tensors of 8 bits are shown as a copy in 16 bits, 257 steps for one, which is exact. Shown themselves they would change
    what is looked at: the compiler then takes a kernel for some layers whose outputs are up to 2 steps off, 0.24 too high on
    average.
    A graph with its weights in a file of their own is left as it is.
    """
    model = onnx.load(path, load_external_data=False)
    if any(tensor.data_location == onnx.TensorProto.EXTERNAL for tensor in model.graph.initializer):
        return path, {}
    layers = layer_tensors(model)
    wanted = dict.fromkeys(name for names in layers.values() for name in names)
    shown = {name: found for name in wanted if (found := _shown_(model.graph, name)) is not None}
    pairs = {layer: (shown.get(given), shown.get(gives)) for layer, (given, gives) in layers.items()}
    return model.SerializeToString(), {
        layer: (given, gives) for layer, (given, gives) in pairs.items() if given is not None and gives is not None
    }


def _shown_(graph: onnx.GraphProto, name: str) -> str | None:
    """Makes a tensor an output of a graph; gives the output's name, or None where the tensor's shape is not known."""
    if name in {value.name for value in graph.output}:
        return name
    value = next((value for value in graph.value_info if value.name == name), None)
    maker = next((node for node in graph.node if name in node.output), None)
    if value is None or maker is None:
        return None
    copy = onnx.ValueInfoProto()
    copy.CopyFrom(value)
    constants = {tensor.name: tensor for tensor in graph.initializer}
    if maker.op_type == "DequantizeLinear" and constants[maker.input[2]].data_type == onnx.TensorProto.UINT8:
        copy.name = f"{name}{SHOWN}"
        scale, zero_point = (numpy_helper.to_array(constants[item]) for item in maker.input[1:3])
        grid = (f"{copy.name}.scale", f"{copy.name}.zero_point")
        graph.initializer.append(numpy_helper.from_array((scale / _STEPS_IN_16_BITS).astype(np.float32), grid[0]))
        widened = (zero_point.astype(np.int32) * _STEPS_IN_16_BITS).astype(np.uint16)
        graph.initializer.append(numpy_helper.from_array(widened, grid[1]))
        codes = f"{copy.name}.quantized"
        graph.node.append(onnx.helper.make_node("QuantizeLinear", [name, *grid], [codes]))
        graph.node.append(onnx.helper.make_node("DequantizeLinear", [codes, *grid], [copy.name]))
    graph.output.append(copy)
    return copy.name


def steps_apart(path: Path, found: Sequence[Outputs]) -> dict[str, StepsApart]:
    """Compares the layers of a graph with ONNX Runtime's computation of the same nodes on the CPU.

    Args:
        path: A static QDQ graph.
        found: What the HTP gave, with layers and their inputs.
    """
    model = onnx.load(path)
    layers = layer_tensors(model)
    extractor = onnx.utils.Extractor(model)
    makers = {name: node for node in model.graph.node for name in node.output}
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    result: dict[str, StepsApart] = {}
    for layer in found[0].layers:
        given, gives = layers[layer]
        piece = extractor.extract_model([given], [gives])
        session = onnxruntime.InferenceSession(piece.SerializeToString(), options, providers=["CPUExecutionProvider"])
        quantized = makers[gives]
        step = float(numpy_helper.to_array(constants[quantized.input[1]]))
        bits = 8 if constants[quantized.input[2]].data_type in BYTE_TYPES else 16
        apart = np.concatenate([_difference(session, piece, item, layer, step) for item in found])
        result[layer] = StepsApart(bits, float(apart.max()), float((apart == 0).mean()))
    return result


def _difference(session: Any, piece: onnx.ModelProto, found: Outputs, layer: str, step: float) -> Array:
    """In whole steps, one sample after another."""
    sizes = [dim.dim_value for dim in piece.graph.input[0].type.tensor_type.shape.dim]
    ours = found.layers[layer].numpy()
    x = found.layer_inputs[layer].numpy().reshape(-1, *sizes)
    theirs = np.concatenate([session.run(None, {piece.graph.input[0].name: row})[0].flatten() for row in x])
    return np.abs(np.round((theirs - ours.flatten()) / step))
