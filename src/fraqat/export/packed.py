"""The home format: one safetensors file with packed codes, scales and the complete description of the model.

Tensors: `NAME.weight.codes` uint8 [O, bytes] (codes of one output channel, little-endian bit order), `NAME.weight.scale`,
`NAME.weight.offset` (Eq. 2), `NAME.weight.multiplier` uint8 [O, G, 1] (integer group scales: the scale of a group is
`NAME.weight.scale` [O, 1, 1] times it, rounded to float32), `NAME.activation.scale` and `.zero_point` (static), and every other
parameter and buffer under its own name. The file's metadata holds one JSON text, `fraqat`: format version, model class and
configuration, base pipeline, the distinct layer specifications, layer -> specification, and tied tensors, which are stored
once.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from fraqat.errors import ModelError
from fraqat.export.codes import codes_of
from fraqat.export.manifest import MANIFEST_FILE
from fraqat.export.target import FLOAT_DTYPES, FloatDtype, ModelDescription
from fraqat.files import atomic_folder, save_tensors, sha256_of, write_json_atomic, write_text_atomic
from fraqat.nn import ActivationSpec, QuantizedLayer, QuantSpec, WeightSpec, quantized_layers, to_packed_
from fraqat.numerics import GroupScales, QParams, pack_codes, unpack_codes

FORMAT_VERSION = 2
"""2 added `multiplier` and the field `group_scale` of a weight's specification; files of format 1 are read too."""
WEIGHTS_FILE = "model.safetensors"
_METADATA_KEY = "fraqat"
_LAYER_SUFFIXES = (
    ".weight.codes",
    ".weight.scale",
    ".weight.offset",
    ".weight.multiplier",
    ".activation.scale",
    ".activation.zero_point",
)
_MAX_PACKED_BITS = 8


@dataclass(frozen=True)
class PackedSize:
    """Bytes of an export. `bits_per_weight` counts codes, scales, names and description over the quantized weights."""

    num_file_bytes: int
    num_quantized_weights: int
    num_other_bytes: int
    bits_per_weight: float


@dataclass(frozen=True)
class PackedModel:
    """A packed file that was read: description, specification of every quantized layer, tensors."""

    description: ModelDescription
    specs: dict[str, QuantSpec]
    tensors: dict[str, Tensor]


def write_packed(
    model: nn.Module,
    description: ModelDescription,
    folder: Path,
    *,
    float_dtype: FloatDtype = "float32",
    extra_files: Mapping[str, str] | None = None,
    overwrite: bool = False,
) -> PackedSize:
    """Writes a trained student.

    Args:
        model: A model changed by `quantize_`, at its final width.
        description: How to build its float form again.
        folder: Created; holds `model.safetensors` and `manifest.json` with a checksum.
        float_dtype: Precision of everything that is not quantized. float32 loses nothing.
        extra_files: Texts to put beside them, by file name.
        overwrite: Replace an existing folder.

    Raises:
        OutputError: The folder exists, the disk is full, or it is not writable.
    """
    with atomic_folder(folder, replace=overwrite) as temporary:
        size = write_packed_files(model, description, temporary, float_dtype=float_dtype)
        for name, text in (extra_files or {}).items():
            write_text_atomic(temporary / name, text)
    return size


def write_packed_files(
    model: nn.Module, description: ModelDescription, folder: Path, *, float_dtype: FloatDtype = "float32"
) -> PackedSize:
    """Writes `model.safetensors` and `manifest.json` into an existing folder; see `write_packed`."""
    layers = dict(quantized_layers(model))
    tensors: dict[str, Tensor] = {}
    for name, layer in layers.items():
        tensors |= _layer_tensors(name, layer)
    quantized_bytes = sum(t.numel() * t.element_size() for t in tensors.values())
    others, tied = float_tensors(model, FLOAT_DTYPES[float_dtype]), tied_names(model)
    metadata = json.dumps(_metadata(description, layers) | {"tied": tied}, separators=(",", ":"))
    path = folder / WEIGHTS_FILE
    save_tensors(tensors | others, path, {_METADATA_KEY: metadata})
    num_weights = sum(layer.weight.numel() for layer in layers.values())
    num_other_bytes = sum(t.numel() * t.element_size() for t in others.values())
    num_file_bytes = path.stat().st_size
    assert num_file_bytes >= quantized_bytes + num_other_bytes
    bits_per_weight = 8 * (num_file_bytes - num_other_bytes) / num_weights
    size = PackedSize(num_file_bytes, num_weights, num_other_bytes, bits_per_weight)
    checked = {"format_version": FORMAT_VERSION, "float_dtype": float_dtype, "sha256": sha256_of(path)}
    manifest = {**checked, **dataclasses.asdict(size)}
    write_json_atomic(folder / MANIFEST_FILE, manifest)
    return size


def read_packed(folder: Path) -> PackedModel:
    """Reads and checks a folder of `write_packed`.

    Raises:
        ModelError: A file is missing, damaged, changed, or of a newer format.
    """
    path, manifest_path = folder / WEIGHTS_FILE, folder / MANIFEST_FILE
    try:
        manifest = json.loads(manifest_path.read_text(encoding="utf-8"))
        digest, version = manifest["sha256"], int(manifest["format_version"])
        if version > FORMAT_VERSION:
            raise ModelError(
                f"{folder} has format {version}, this program reads up to {FORMAT_VERSION}. Fix: update fraqat."
            )
        if sha256_of(path) != digest:
            raise ModelError(f"{path} was changed or cut after it was written (checksum). Fix: export again.")
        with safe_open(path, framework="pt") as stream:
            metadata = json.loads((stream.metadata() or {})[_METADATA_KEY])
            tensors = {name: stream.get_tensor(name) for name in stream.keys()}  # noqa: SIM118
        tensors |= {name: tensors[first] for name, first in metadata.get("tied", {}).items()}
        specs = [_spec_from_json(value) for value in metadata["specs"]]
        layer_specs = {name: specs[index] for name, index in metadata["layers"].items()}
        description = ModelDescription(**metadata["model"])
    except (
        OSError,
        ValueError,
        KeyError,
        TypeError,
        IndexError,
        AttributeError,
        OverflowError,
        SafetensorError,
    ) as error:
        if isinstance(error, ModelError):
            raise
        raise ModelError(
            f"{folder} is no packed export: {error!r}. Fix: pass a folder written by `fraqat export`."
        ) from error
    return PackedModel(description, layer_specs, tensors)


def load_packed_(model: nn.Module, packed: PackedModel) -> nn.Module:
    """Puts a packed export into a float model of the same class and configuration, in place.

    The result computes bit for bit what the exported student computed in float32: the codes are the same integers, the
    scales the same floats, and scale * code is one rounding in both.

    Raises:
        ModelError: The tensors do not fit the model.
    """
    others = {name: t for name, t in packed.tensors.items() if not _belongs_to_layer(name, packed.specs)}
    try:
        for name, spec in packed.specs.items():
            _load_layer_(model.get_submodule(name), name, spec, packed.tensors)
        reference = model.state_dict()
        missing, unexpected = model.load_state_dict(
            {n: t.to(reference[n].dtype) if n in reference else t for n, t in others.items()}, strict=False
        )
        own = {key for name in packed.specs for key in reference if key.startswith(name + ".") and key not in others}
        if unexpected or set(missing) - own:
            raise ModelError(
                f"tensors do not fit: missing {sorted(set(missing) - own)[:3]}, unknown {list(unexpected)[:3]}"
            )
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError, OverflowError) as error:
        if isinstance(error, ModelError):
            raise
        raise ModelError(
            f"the export does not fit {type(model).__name__}: {error}. Fix: use the model it names."
        ) from error
    return model.eval()


def _load_layer_(module: nn.Module, name: str, spec: QuantSpec, tensors: dict[str, Tensor]) -> None:
    shape = tuple(module.weight.shape)  # pyright: ignore[reportArgumentType, reportGeneralTypeIssues]
    grid = spec.weight.grid(spec.weight.bits)
    stored = tensors[f"{name}.weight.codes"]
    if grid.storage_bits <= _MAX_PACKED_BITS:
        length = int(torch.Size(shape[1:]).numel())
        stored = unpack_codes(stored, grid.storage_bits, length, signed=grid.qmin < 0)
    offset = tensors.get(f"{name}.weight.offset")
    static: QParams | None = None
    if f"{name}.activation.scale" in tensors:
        static = QParams(tensors[f"{name}.activation.scale"], tensors.get(f"{name}.activation.zero_point"))
    scale = tensors[f"{name}.weight.scale"]
    groups = None
    if spec.weight.group_scale == "integer":
        scale = scale.to(torch.promote_types(scale.dtype, torch.float32))
        groups = GroupScales(scale, tensors[f"{name}.weight.multiplier"].to(scale.dtype))
        scale = groups.product
    wanted = spec.weight.layout().scale_shape(shape)
    _check_shape(f"{name}.weight.scale", scale, wanted)
    if offset is not None:
        _check_shape(f"{name}.weight.offset", offset, wanted)
    to_packed_(module, spec, stored.reshape(shape), QParams(scale, offset=offset), static, groups)


def _check_shape(name: str, found: Tensor, wanted: tuple[int, ...]) -> None:
    if tuple(found.shape) != wanted:
        raise ModelError(f"{name} has the shape {list(found.shape)} instead of {list(wanted)}. Fix: export again.")


def _layer_tensors(name: str, layer: QuantizedLayer) -> dict[str, Tensor]:
    layer_codes = codes_of(name, layer)
    num_bits = layer_codes.grid.storage_bits
    rows, qparams, groups = layer_codes.matrix, layer_codes.qparams, layer_codes.groups
    scale = qparams.scale if groups is None else groups.channel
    tensors = {
        f"{name}.weight.codes": pack_codes(rows, num_bits) if num_bits <= _MAX_PACKED_BITS else rows,
        f"{name}.weight.scale": scale.to(layer_codes.spec.weight.rounding_dtype or scale.dtype),
    }
    if groups is not None:
        tensors[f"{name}.weight.multiplier"] = groups.multiplier.to(torch.uint8)
    if qparams.offset is not None:
        tensors[f"{name}.weight.offset"] = qparams.offset
    activation = layer_codes.activation
    if activation is not None:
        tensors[f"{name}.activation.scale"] = activation.scale
        if activation.zero_point is not None:
            tensors[f"{name}.activation.zero_point"] = activation.zero_point
    return tensors


def float_tensors(model: nn.Module, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """Everything of a student that is no quantized weight and no part of a quantizer; tied tensors once.

    Args:
        model: Changed by `quantize_`.
        dtype: Of what is floating-point; None leaves it.
    """
    layers = [name for name, _ in quantized_layers(model)]
    skipped = {f"{name}.weight" for name in layers} | set(tied_names(model))
    prefixes = tuple(f"{name}.{part}." for name in layers for part in ("weight_quantizer", "activation_quantizer"))
    return {
        name: t.to(dtype) if dtype is not None and t.is_floating_point() else t
        for name, t in model.state_dict().items()
        if name not in skipped and not name.startswith(prefixes)
    }


def tied_names(model: nn.Module) -> dict[str, str]:
    """Unquantized parameters that are another one under a second name, as a head tied to the embeddings: name -> first."""
    quantized = {f"{name}.weight" for name, _ in quantized_layers(model)}
    first: dict[int, str] = {}
    tied: dict[str, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if name in quantized:
            continue
        if id(parameter) in first:
            tied[name] = first[id(parameter)]
        else:
            first[id(parameter)] = name
    return tied


def _metadata(description: ModelDescription, layers: dict[str, QuantizedLayer]) -> dict[str, Any]:
    specs: list[QuantSpec] = []
    index: dict[str, int] = {}
    for name, layer in layers.items():
        if layer.spec not in specs:
            specs.append(layer.spec)
        index[name] = specs.index(layer.spec)
    return {
        "format_version": FORMAT_VERSION,
        "model": dataclasses.asdict(description),
        "specs": [dataclasses.asdict(spec) for spec in specs],
        "layers": index,
    }


def _spec_from_json(value: dict[str, Any]) -> QuantSpec:
    activation = value["activation"]
    return QuantSpec(WeightSpec(**value["weight"]), ActivationSpec(**activation) if activation else None)


def _belongs_to_layer(name: str, layers: dict[str, QuantSpec]) -> bool:
    return any(name.endswith(suffix) and name.removesuffix(suffix) in layers for suffix in _LAYER_SUFFIXES)
