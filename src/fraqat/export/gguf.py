"""GGUF with Q4_0 weights, for llama.cpp (Gemma-2) and stable-diffusion.cpp (SD3, FLUX)."""

from __future__ import annotations

import copy
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, final

import torch
from torch import Tensor, nn

from fraqat.errors import ModelError, config_error
from fraqat.export.codes import LayerCodes, layer_codes
from fraqat.export.gguf_blocks import BLOCK, BLOCK_BYTES, dequantize_q4_0, pack_q4_0, round_to_q8_0, unpack_q4_0
from fraqat.export.gguf_gemma2 import (
    ARCHITECTURE,
    CLASS_NAME,
    HEAD,
    add_gemma2_settings,
    add_vocabulary,
    gemma2_tensors,
)
from fraqat.export.gguf_header import check_header
from fraqat.export.gguf_names import NAME_TABLES, FileTensor, diffusion_tensors
from fraqat.export.packed import float_tensors, tied_names
from fraqat.export.packed_target import OpenedModel
from fraqat.export.rounded import round_inputs_
from fraqat.export.target import (
    FLOAT_DTYPES,
    Bound,
    ExportJob,
    LayerPlace,
    OpenedExport,
    Target,
    fitted_weight,
    token_int8,
)
from fraqat.nn import QuantSpec, WeightSpec, quantized_layers, unquantize_
from fraqat.numerics import Granularity

FILE = "model.gguf"
_CLASSES = (CLASS_NAME, *NAME_TABLES)
_WEIGHT_BITS = 4


@final
class GgufTarget(Target):
    """One file `model.gguf`. Weights are exact; the runtime rounds inputs, per block of 32 where it multiplies integers."""

    name = "gguf"
    summary = "GGUF Q4_0, for llama.cpp (Gemma-2) and stable-diffusion.cpp (SD3, FLUX)"
    extra = "gguf"
    requires = ("gguf", "sentencepiece")
    tasks = ("text-to-image", "language")
    model_classes = _CLASSES
    defaults = MappingProxyType(
        {
            "weight": {"bits": 4, "granularity": "group", "group_size": BLOCK, "scale_dtype": "float16"},
            "activation": {"bits": 8, "granularity": "token"},
        }
    )
    bound = Bound(
        20.0,
        25.0,
        "the weights are equal; llama.cpp rounds inputs to 8 bits per block of 32 (Q8_0), training did per token, and small "
        "differences grow through the layers",
    )

    def nearest(self, place: LayerPlace, spec: QuantSpec) -> QuantSpec | None:
        """Symmetric codes of 4 bits or fewer whose scales are constant over blocks of 32 and rounded to float16 or bfloat16.

        Linear layers whose inputs are a multiple of 32; the head of a language model is the embeddings, which stay float.
        Inputs of more than 8 bits, or none, are trained in floating point; the others are 8 bits per token, the nearest to the
        runtime's 8 bits per block of 32.
        """
        if place.type_name != "Linear" or place.shape[1] % BLOCK or place.name.split(".")[-1] == HEAD:
            return None
        return QuantSpec(_nearest_weight(spec.weight), token_int8(spec.activation))

    def write(self, job: ExportJob) -> None:
        """Writes `model.gguf`."""
        import gguf

        description = job.description
        class_name = description.class_name
        layers = layer_codes(job.student)
        tensors = float_tensors(job.student)
        entries = file_tensors(class_name, [*tensors, *(f"{name}.weight" for name in layers)])
        architecture = ARCHITECTURE if class_name == CLASS_NAME else NAME_TABLES[class_name].architecture
        writer = gguf.GGUFWriter(job.folder / FILE, architecture)
        writer.add_name(description.base_pipeline)
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        if class_name == CLASS_NAME:
            if job.origin is None:
                raise ModelError(
                    f"the tokenizer of {description.base_pipeline} is not on this machine: llama.cpp needs the vocabulary. "
                    "Fix: download the model and name its folder as the recipe's source."
                )
            _check_tied_head(job.student)
            add_gemma2_settings(writer, description.config)
            add_vocabulary(writer, job.origin, description.config)
        for entry in entries:
            _add_tensor(writer, entry, layers, tensors, FLOAT_DTYPES[job.float_dtype])
        try:
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
        except (ValueError, TypeError, AttributeError, struct.error) as error:
            raise ModelError(
                f"a name or a setting of {description.base_pipeline} cannot be written to {FILE}: {error}. Fix: compare its "
                "config.json and its tokenizer's files with those that were published."
            ) from error
        finally:
            writer.close()
        job.say(f"{FILE}: {len(layers)} layers as Q4_0, {len(entries)} tensors")

    def open(self, folder: Path, student: nn.Module) -> OpenedExport:
        """The weights of the file in a copy of the student's float form; inputs are rounded to Q8_0 as llama.cpp does."""
        stored = _read_tensors(folder / FILE)
        model = copy.deepcopy(student)
        unquantize_(model)
        state = model.state_dict()
        quantized = {f"{name}.weight": name for name, _ in quantized_layers(student)}
        tied = tied_names(student)
        entries = file_tensors(type(student).__name__, [name for name in state if name not in tied])
        codes: dict[str, Tensor] = {}
        values: dict[str, Tensor] = {}
        for entry in entries:
            if entry.name not in stored:
                raise ModelError(f"{folder / FILE} has no tensor {entry.name}. Fix: export again.")
            rows = [state[source].shape[0] for source in entry.sources]
            try:
                for source, found in zip(entry.sources, _split(entry, stored[entry.name], rows), strict=True):
                    if source in quantized:
                        codes[quantized[source]] = _checked_codes(found, source).reshape(state[source].shape)
                    values[source] = (_weights(found) - entry.shift).reshape(state[source].shape)
            except (RuntimeError, IndexError) as error:
                raise ModelError(
                    f"{entry.name} of {folder / FILE} does not fit the model: {error}. Fix: open it with its own run."
                ) from error
        model.load_state_dict(values, strict=False)
        round_inputs_(model, codes, round_to_q8_0)
        ordered = {name: codes[name] for name in quantized.values()}
        return OpenedModel(model.eval(), student, ordered)


def file_tensors(class_name: str, names: Sequence[str]) -> list[FileTensor]:
    """What the file of a model holds.

    Args:
        class_name: Of the student.
        names: Its tensors.

    Raises:
        ConfigError: The class has no GGUF runtime, or a tensor no place in it.
    """
    if class_name == CLASS_NAME:
        layers = {name.split(".")[2] for name in names if name.startswith("model.layers.")}
        return gemma2_tensors(names, len(layers))
    if class_name not in NAME_TABLES:
        raise config_error(
            "model", class_name, allowed=", ".join(_CLASSES), fix="use another target, such as packed or onnx-qdq"
        )
    return diffusion_tensors(NAME_TABLES[class_name], names)


def _nearest_weight(weight: WeightSpec) -> WeightSpec:
    changes: dict[str, Any] = {"symmetric": True, "group_scale": "float", "scale_dtype": "float16"}
    if weight.bits > _WEIGHT_BITS:
        changes["bits"] = float(_WEIGHT_BITS)
    if weight.granularity is Granularity.GROUP and (weight.group_size or 0) % BLOCK:
        changes["group_size"] = BLOCK
    changes.setdefault("granularity", weight.granularity)
    return fitted_weight(weight, **changes)


def _check_tied_head(student: nn.Module) -> None:
    if f"{HEAD}.weight" not in tied_names(student):
        raise config_error(
            f"{HEAD}.weight",
            "weights of its own",
            allowed="the embeddings, which llama.cpp takes for the head of Gemma-2",
            fix="train with a tied head",
        )


def _scale_of_blocks(layer: LayerCodes) -> Tensor:
    """Scale of every block of 32, [O, B], in float64 so that nothing is rounded before the check."""
    num_rows, num_inputs = layer.matrix.shape
    scale = layer.qparams.scale.detach().double().flatten(1)
    num_blocks = num_inputs // BLOCK
    if num_blocks % scale.shape[1]:
        raise config_error(
            f"{layer.name}.weight.group_size",
            num_inputs // scale.shape[1],
            allowed="multiples of 32",
            fix="train with group_size: 32",
        )
    return scale.repeat_interleave(num_blocks // scale.shape[1], dim=1).expand(num_rows, num_blocks)


def _q4_0(layer: LayerCodes) -> Tensor:
    if layer.qparams.offset is not None or layer.type_name != "Linear":
        raise config_error(
            layer.name, layer.type_name, allowed="Linear with symmetric weights", fix="train with target: gguf"
        )
    return pack_q4_0(layer.matrix, _scale_of_blocks(layer), layer.name)


def _add_tensor(
    writer: Any, entry: FileTensor, layers: Mapping[str, LayerCodes], tensors: Mapping[str, Tensor], dtype: torch.dtype
) -> None:
    import gguf

    named = {f"{name}.weight": layer for name, layer in layers.items()}
    packed = [source for source in entry.sources if source in named]
    if packed and len(packed) < len(entry.sources):
        other = next(source for source in entry.sources if source not in named)
        raise config_error(
            other.removesuffix(".weight"),
            "in floating point",
            allowed=f"quantized as {packed[0].removesuffix('.weight')}: {entry.name} is one tensor",
            fix="quantize or skip all of them",
        )
    shapes = [tuple(named[n].codes.shape if n in named else tensors[n].shape)[1:] for n in entry.sources]
    if any(shape != shapes[0] for shape in shapes):
        raise config_error(
            " and ".join(entry.sources),
            [list(shape) for shape in shapes],
            allowed=f"the same number of inputs: {entry.name} is one tensor",
            fix="use another target",
        )
    if packed:
        rows = torch.cat([_q4_0(named[source]) for source in entry.sources])
        writer.add_tensor(entry.name, _swapped(entry, rows).numpy(), raw_dtype=gguf.GGMLQuantizationType.Q4_0)
        return
    values = torch.cat([tensors[source].detach().to("cpu", torch.float32) for source in entry.sources]) + entry.shift
    values = _swapped(entry, values).contiguous()
    if dtype is torch.bfloat16 and values.ndim == 2:  # the runtimes want vectors and kernels of convolutions in float32
        stored = values.to(torch.bfloat16).view(torch.uint8).numpy()
        writer.add_tensor(entry.name, stored, raw_dtype=gguf.GGMLQuantizationType.BF16)
    else:
        writer.add_tensor(entry.name, values.numpy())


def _swapped(entry: FileTensor, rows: Tensor) -> Tensor:
    return torch.cat(rows.chunk(2)[::-1]).contiguous() if entry.swaps_halves else rows


def _read_tensors(path: Path) -> dict[str, Tensor]:
    """Tensors by name: uint8 rows of Q4_0 blocks, or floats."""
    import gguf
    import numpy as np

    try:
        check_header(path)
        reader = gguf.GGUFReader(path)
    except (OSError, ValueError, KeyError, IndexError, TypeError, OverflowError) as error:
        raise ModelError(f"{path} is no GGUF file: {error!r}. Fix: export again.") from error
    found: dict[str, Tensor] = {}
    for tensor in reader.tensors:
        data = torch.from_numpy(np.array(tensor.data))
        kind = tensor.tensor_type
        if kind not in (gguf.GGMLQuantizationType.Q4_0, gguf.GGMLQuantizationType.BF16, gguf.GGMLQuantizationType.F32):
            raise ModelError(
                f"{path}: {tensor.name} is {kind.name}; this program writes Q4_0, BF16, F32. Fix: export again."
            )
        if kind is gguf.GGMLQuantizationType.BF16:
            if not data.numel():
                raise ModelError(f"{path}: {tensor.name} is empty. Fix: export again.")
            data = data.view(torch.bfloat16)
        found[tensor.name] = data
    return found


def _split(entry: FileTensor, stored: Tensor, rows: Sequence[int]) -> Sequence[Tensor]:
    if stored.shape[0] != sum(rows):
        raise ModelError(
            f"{entry.name} has {stored.shape[0]} rows, the model {sum(rows)}. Fix: open it with its own run."
        )
    return _swapped(entry, stored).split(list(rows))


def _checked_codes(stored: Tensor, source: str) -> Tensor:
    if stored.dtype is not torch.uint8 or stored.shape[1] % BLOCK_BYTES:
        raise ModelError(f"{source} is not Q4_0 in the file. Fix: export again.")
    return unpack_q4_0(stored)[0]


def _weights(stored: Tensor) -> Tensor:
    return dequantize_q4_0(*unpack_q4_0(stored)) if stored.dtype is torch.uint8 else stored.to(torch.float32)
