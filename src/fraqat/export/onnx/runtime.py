"""Exported graphs in ONNX Runtime: outputs, outputs of the layers, and the integers in the file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, final

import numpy as np
import onnx
import onnxruntime
import torch
from onnx import numpy_helper
from torch import Tensor, nn

from fraqat.errors import ModelError
from fraqat.export.onnx.graph import LAYER_INPUTS, LAYER_OUTPUTS
from fraqat.export.target import Inputs, Outputs, Part
from fraqat.nn import quantized_layers


@final
class OnnxExport:
    """The graphs of a folder.

    Args:
        folder: Holds `PART.onnx`.
        student: Gives the names of the layers and the shapes of their weights.
        codes_suffix: What follows a layer's name in the name of its codes, [K, O], or [O, K, 1, 1] of a convolution.
        options: Entries of the session's configuration.
    """

    def __init__(
        self,
        folder: Path,
        student: nn.Module,
        codes_suffix: str = ".codes",
        options: Mapping[str, str] = MappingProxyType({}),
    ):
        self._folder, self._suffix, self._options = folder, codes_suffix, dict(options)
        self._shapes = {name: tuple(layer.weight.shape) for name, layer in quantized_layers(student)}
        self._sessions: dict[str, tuple[onnxruntime.InferenceSession, dict[str, tuple[str, str]]]] = {}

    def codes(self) -> Mapping[str, Tensor]:
        """Integers by layer, over all graphs."""
        found: dict[str, Tensor] = {}
        for path in sorted(self._folder.glob("*.onnx")):
            for tensor in onnx.load(path).graph.initializer:
                name = tensor.name.removesuffix(self._suffix)
                if name != tensor.name and name in self._shapes:
                    stored = numpy_helper.to_array(tensor).astype(np.int32)
                    integers = np.ascontiguousarray(stored.T if stored.ndim == 2 else stored)
                    found[name] = torch.from_numpy(integers).reshape(self._shapes[name])
        return found

    def run(self, part: Part, inputs: Inputs) -> Outputs:
        """Runs one graph; the outputs of its layers are made outputs of the graph."""
        if part.name not in self._sessions:
            self._sessions[part.name] = self._open(part)
        session, layers = self._sessions[part.name]
        wanted = {item.name for item in session.get_inputs()}
        feeds = {name: value.numpy() for name, value in inputs.items() if name in wanted}
        names = list(dict.fromkeys([*part.outputs, *(name for pair in layers.values() for name in pair)]))
        computed = [name for name in names if name not in feeds]
        found = dict(zip(computed, map(torch.from_numpy, session.run(computed, feeds)), strict=True))
        found |= {name: inputs[name] for name in names if name in feeds}
        return Outputs(
            {name: found[name] for name in part.outputs},
            {layer: found[output] for layer, (_, output) in layers.items()},
            {layer: found[given] for layer, (given, _) in layers.items()},
        )

    def _open(self, part: Part) -> tuple[onnxruntime.InferenceSession, dict[str, tuple[str, str]]]:
        """A session, and layer -> names of its input and its output for the layers that it shows."""
        path = self._folder / f"{part.name}.onnx"
        if not path.is_file():
            raise ModelError(f"{path} is missing. Fix: export again.")
        model = onnx.load(path, load_external_data=False)
        if any(tensor.data_location == onnx.TensorProto.EXTERNAL for tensor in model.graph.initializer):
            # Too large for one message: opened as it lies, without the layers' outputs.
            return open_session(path, **self._options), {}
        props = {item.key: item.value for item in model.metadata_props}
        made = {name for node in model.graph.node for name in node.output}
        given: dict[str, str] = json.loads(props.get(LAYER_INPUTS, "{}"))
        gives: dict[str, str] = json.loads(props.get(LAYER_OUTPUTS, "{}"))
        layers = {layer: (given[layer], output) for layer, output in gives.items() if output in made and layer in given}
        known = {value.name for value in (*model.graph.output, *model.graph.input)}
        names = {name: None for pair in layers.values() for name in pair}
        extra = (onnx.helper.make_empty_tensor_value_info(name) for name in names if name not in known)
        model.graph.output.extend(extra)
        return open_session(model.SerializeToString(), **self._options), layers


def open_session(model: Path | bytes, **options: Any) -> onnxruntime.InferenceSession:
    """A CPU session with as many threads as PyTorch has.

    Args:
        model: File, or the graph itself.
        options: Entries of the session's configuration.
    """
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = torch.get_num_threads()
    for name, value in options.items():
        settings.add_session_config_entry(name, str(value))
    source = str(model) if isinstance(model, Path) else model
    return onnxruntime.InferenceSession(source, settings, providers=["CPUExecutionProvider"])
