"""A Hugging Face folder in the compressed-tensors format, for vLLM: language models, W4A8 and W4A16."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, final

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from fraqat.errors import ModelError, config_error
from fraqat.export.codes import LayerCodes, layer_codes
from fraqat.export.packed import float_tensors
from fraqat.export.packed_target import OpenedModel
from fraqat.export.rounded import round_inputs_, round_to_int8_per_token
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
from fraqat.files import save_tensors, write_json_atomic
from fraqat.nn import QuantSpec, WeightSpec, quantized_layers, unquantize_
from fraqat.numerics import Granularity, pack_codes

WEIGHTS_FILE = "model.safetensors"
CONFIG_FILE = "config.json"
FORMAT = "pack-quantized"
_HEAD = "lm_head"
_GROUP_SIZES = (32, 64, 128)
"""Of vLLM's kernels; a multiple of 32 beyond these is written as groups of 32 with equal scales."""
_NARROW_BITS, _WIDE_BITS, _INPUT_BITS = 4, 8, 8
_COPIED = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "chat_template*",
    "generation_config.json",
)
_FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Layers that vLLM joins into one, which therefore must be quantized alike."""
_PARTS = ("weight_packed", "weight_scale", "weight_shape")


@final
class CompressedTensorsTarget(Target):
    """`config.json`, `model.safetensors` and the tokenizer. Weights are exact; vLLM measures the scale of the inputs itself."""

    name = "vllm"
    summary = "compressed-tensors folder for vLLM and transformers: language models, W4A8 and W4A16"
    extra = "vllm"
    requires = ("compressed_tensors",)
    tasks = ("language",)
    defaults = MappingProxyType(
        {
            "weight": {"bits": 4, "granularity": "group", "group_size": 32, "scale_dtype": "bfloat16"},
            "activation": {"bits": 8, "granularity": "token"},
        }
    )
    bound = Bound(
        50.0,
        60.0,
        "the weights are equal, and inputs are rounded as in training; a float that rounds the other way can change a code",
    )

    def nearest(self, place: LayerPlace, spec: QuantSpec) -> QuantSpec | None:
        """Symmetric codes of up to 8 bits with scales that bfloat16 holds, per tensor, channel or groups of a multiple of 32.

        The head stays float, as vLLM wants it. Inputs of more than 8 bits stay float: W4A16.
        """
        if place.type_name != "Linear" or place.name.split(".")[-1] == _HEAD:
            return None
        return QuantSpec(_nearest_weight(spec.weight, place.shape[1]), token_int8(spec.activation))

    def write(self, job: ExportJob) -> None:
        """Writes the folder."""
        class_name = job.description.class_name
        if not class_name.endswith("ForCausalLM"):
            raise config_error(
                "model",
                class_name,
                allowed="language models (...ForCausalLM)",
                fix="use another target, such as packed",
            )
        layers = layer_codes(job.student)
        if not layers:
            raise config_error("student", "no quantized layer", allowed="at least one", fix="train with quantization")
        schemes = {name: _scheme_of(layer) for name, layer in layers.items()}
        _check_fused(job.student, schemes)
        dtype = FLOAT_DTYPES[job.float_dtype]
        tensors = float_tensors(job.student, dtype)
        for name, layer in layers.items():
            tensors |= _layer_tensors(name, layer, schemes[name], dtype)
        save_tensors(tensors, job.folder / WEIGHTS_FILE, {"format": "pt"})
        config = {
            **job.description.config,
            "architectures": [class_name],
            "dtype": job.float_dtype,
            "quantization_config": quantization_config(job.student, schemes),
        }
        write_json_atomic(job.folder / CONFIG_FILE, config)
        num_copied = _copy_tokenizer(job.origin, job.folder)
        job.say(
            f"{WEIGHTS_FILE}: {len(layers)} layers packed, {len(tensors)} tensors; {num_copied} files of the tokenizer"
        )
        if num_copied == 0:
            job.say("the original is not on this machine: give vLLM its tokenizer with --tokenizer")

    def open(self, folder: Path, student: nn.Module) -> OpenedExport:
        """The weights as the library compressed-tensors unpacks them, and vLLM's rounding of the inputs."""
        config, tensors = _read(folder)
        model = copy.deepcopy(student)
        unquantize_(model)
        names = [name for name, _ in quantized_layers(student)]
        codes: dict[str, Tensor] = {}
        rounded: list[str] = []
        for name in names:
            try:
                parts = {part: tensors.pop(f"{name}.{part}") for part in _PARTS}
            except KeyError as error:
                raise ModelError(f"{folder} has no tensor {error}. Fix: export again.") from error
            scheme = _stored_scheme(config, name)
            codes[name], tensors[f"{name}.weight"] = _unpacked(parts, scheme)
            if scheme.get("input_activations"):
                rounded.append(name)
        state = model.state_dict()
        unknown = [name for name in tensors if name not in state]
        if unknown:
            raise ModelError(f"{folder} has a tensor {unknown[0]} that the model lacks. Fix: open it with its own run.")
        model.load_state_dict({n: t.to(state[n].dtype) for n, t in tensors.items()}, strict=False)
        round_inputs_(model, rounded, round_to_int8_per_token)
        return OpenedModel(model.eval(), student, codes)


@dataclass(frozen=True)
class Scheme:
    """How layers are stored.

    Args:
        bits: 4 or 8.
        group_size: None: per channel.
        has_input: Whether the input is quantized.
    """

    bits: int
    group_size: int | None
    has_input: bool

    def to_json(self, targets: Sequence[str]) -> dict[str, Any]:
        """A `config_groups` entry."""
        weights = {
            "num_bits": self.bits,
            "type": "int",
            "symmetric": True,
            "strategy": "channel" if self.group_size is None else "group",
            "group_size": self.group_size,
            "dynamic": False,
        }
        inputs = {"num_bits": _INPUT_BITS, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
        return {
            "targets": list(targets),
            "weights": weights,
            "input_activations": inputs if self.has_input else None,
            "output_activations": None,
            "format": FORMAT,
        }


def quantization_config(student: nn.Module, schemes: Mapping[str, Scheme]) -> dict[str, Any]:
    """`quantization_config` of `config.json`: a group for every scheme, and the linear layers that stay float."""
    distinct = list(dict.fromkeys(schemes.values()))
    by_scheme = [(scheme, [name for name, found in schemes.items() if found == scheme]) for scheme in distinct]
    ignored = [n for n, m in student.named_modules() if isinstance(m, nn.Linear) and n not in schemes]
    is_single = len(distinct) == 1
    return {
        "quant_method": "compressed-tensors",
        "format": FORMAT,
        "quantization_status": "compressed",
        "ignore": ignored,
        "kv_cache_scheme": None,
        "config_groups": {
            f"group_{i}": scheme.to_json(["Linear"] if is_single else names)
            for i, (scheme, names) in enumerate(by_scheme)
        },
    }


def pack_int32(codes_OI: Tensor, bits: int) -> Tensor:
    """Codes plus 2^(bits-1), low bits first, in int32 words [O, ceil(I * bits / 32)], as compressed-tensors packs them."""
    packed = pack_codes(codes_OI.to(torch.int16) + 2 ** (bits - 1), bits)
    return nn.functional.pad(packed, (0, -packed.shape[1] % 4)).contiguous().view(torch.int32)


def _nearest_weight(weight: WeightSpec, num_inputs: int) -> WeightSpec:
    changes: dict[str, Any] = {
        "symmetric": True,
        "group_scale": "float",
        "granularity": weight.granularity,
        "scale_dtype": "bfloat16",
    }
    if weight.bits > _WIDE_BITS:
        changes["bits"] = float(_WIDE_BITS)
    if weight.granularity is Granularity.GROUP and (weight.group_size or 0) % _GROUP_SIZES[0]:
        if num_inputs % _GROUP_SIZES[0]:
            changes["granularity"] = Granularity.CHANNEL
        else:
            changes["group_size"] = _GROUP_SIZES[0]
    return fitted_weight(weight, **changes)


def _scheme_of(layer: LayerCodes) -> Scheme:
    spec = layer.spec
    if spec.weight.bits > _WIDE_BITS or layer.qparams.offset is not None or layer.type_name != "Linear":
        raise config_error(
            layer.name, layer.type_name, allowed="Linear, symmetric, at most 8 bits", fix="train with target: vllm"
        )
    bits = _NARROW_BITS if spec.weight.bits <= _NARROW_BITS else _WIDE_BITS
    size = spec.weight.group_size
    if size is not None and size % _GROUP_SIZES[0]:
        raise config_error(
            f"{layer.name}.weight.group_size", size, allowed="multiples of 32", fix="train with group_size: 32"
        )
    stored = size if size is None or size in _GROUP_SIZES else _GROUP_SIZES[0]
    return Scheme(bits, stored, spec.activation is not None and spec.activation.bits <= _INPUT_BITS)


def _check_fused(student: nn.Module, schemes: Mapping[str, Scheme]) -> None:
    linears = {name for name, module in student.named_modules() if isinstance(module, nn.Linear)} | set(schemes)
    for name in sorted(linears):
        parent, _, child = name.rpartition(".")
        group = next((names for names in _FUSED if child == names[0]), ())
        for other in (f"{parent}.{sibling}" for sibling in group):
            if other in linears and schemes.get(other) != schemes.get(name):
                raise config_error(
                    other,
                    schemes.get(other, "floating point"),
                    allowed=f"the same as {name} ({schemes.get(name, 'floating point')}): vLLM joins them",
                    fix="give both the same rule",
                )


def _layer_tensors(name: str, layer: LayerCodes, scheme: Scheme, dtype: torch.dtype) -> dict[str, Tensor]:
    num_rows, num_inputs = layer.matrix.shape
    scale = layer.qparams.scale.detach().float().flatten(1)
    num_groups = 1 if scheme.group_size is None else num_inputs // scheme.group_size
    stored = scale.repeat_interleave(num_groups // scale.shape[1], dim=1).expand(num_rows, num_groups)
    inexact = stored.to(torch.bfloat16).float() != stored
    if bool(inexact.any()):
        raise config_error(
            f"{name}.weight.scale",
            float(stored[inexact][0]),
            allowed="numbers that bfloat16 holds exactly",
            fix="train with scale_dtype: bfloat16",
        )
    return {
        f"{name}.weight_packed": pack_int32(layer.matrix, scheme.bits),
        f"{name}.weight_scale": stored.to(dtype),
        f"{name}.weight_shape": torch.tensor([num_rows, num_inputs]),
    }


def _copy_tokenizer(origin: Path | None, folder: Path) -> int:
    files = {path for pattern in _COPIED for path in origin.glob(pattern) if path.is_file()} if origin else set[Path]()
    for path in files:
        shutil.copyfile(path, folder / path.name)
    return len(files)


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    try:
        config: dict[str, Any] = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))["quantization_config"]
        with safe_open(folder / WEIGHTS_FILE, framework="pt") as stream:
            tensors = {name: stream.get_tensor(name) for name in stream.keys()}  # noqa: SIM118
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise ModelError(f"{folder} is no compressed-tensors folder: {error!r}. Fix: export again.") from error
    return config, tensors


def _stored_scheme(config: Mapping[str, Any], name: str) -> dict[str, Any]:
    for group in config["config_groups"].values():
        if name in group["targets"] or "Linear" in group["targets"]:
            return group
    raise ModelError(f"{CONFIG_FILE} has no scheme for {name}. Fix: export again.")


def _unpacked(parts: Mapping[str, Tensor], scheme: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """Codes and weight of a layer, by the library that vLLM's checkpoints are made with."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32
    from compressed_tensors.quantization import QuantizationScheme

    compressor: Any = BaseCompressor.get_value_from_registry(FORMAT)
    shape = torch.Size(parts["weight_shape"].tolist())
    codes = unpack_from_int32(parts["weight_packed"], scheme["weights"]["num_bits"], shape)
    exact = {**parts, "weight_scale": parts["weight_scale"].float()}
    return codes, compressor.decompress(exact, QuantizationScheme.model_validate(dict(scheme)))["weight"]
