"""ExecuTorch's `.pte` file with the XNNPACK delegate: 4-bit or 8-bit weights, inputs quantized per token at run time."""

from __future__ import annotations

import hashlib
import json
import logging
import warnings
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any, final

import torch
from torch import Tensor, nn

from fraqat.errors import ModelError, config_error
from fraqat.export.codes import LayerCodes, layer_codes
from fraqat.export.packed_target import replaced
from fraqat.export.target import (
    Bound,
    ExportJob,
    Inputs,
    LayerPlace,
    OpenedExport,
    Outputs,
    Part,
    PositionalPart,
    Target,
    fitted_weight,
    samples_of,
)
from fraqat.export.torchao_target import token_inputs
from fraqat.export.torchao_tensors import with_torchao_weights
from fraqat.files import write_json_atomic
from fraqat.nn import QuantSpec, WeightSpec
from fraqat.numerics import Granularity, ZeroPoint
from fraqat.quiet import quiet_torchao

LAYERS_FILE = "layers.json"
"""Names of inputs and outputs, and layer -> where its integers lie in the `.pte` file."""
_BLOCK = 32
"""XNNPACK's 4-bit kernels take groups, or rows, of a multiple of this."""
_NARROW_BITS = 4
_WIDE_BITS = 8


@final
class ExecutorchTarget(Target):
    """XNNPACK's `qd8` x `qb4w` or `qc8w` products."""

    name = "executorch-xnnpack"
    summary = "ExecuTorch program (.pte) for ARM and x86 CPUs, by XNNPACK"
    extra = "executorch"
    requires = ("executorch", "torchao")
    defaults = MappingProxyType(
        {
            "weight": {"scale_dtype": "bfloat16"},
            "activation": {"symmetric": False, "range_method": "min_max", "zero_point": "xnnpack"},
        }
    )
    float_dtypes = ("float32",)
    bound = Bound(
        35.0,
        35.0,
        "sums in another order and other exponentials move a few inputs of later layers to the neighbouring code",
    )

    def nearest(self, place: LayerPlace, spec: QuantSpec) -> QuantSpec | None:
        """Linear layers with 8-bit inputs per token; up to 4 bits with bf16 scales, up to 8 bits per output channel."""
        activation = token_inputs(spec.activation, ZeroPoint.XNNPACK)
        if place.type_name != "Linear" or activation is None:
            return None
        return QuantSpec(_nearest_weight(place, spec.weight), activation)

    def write(self, job: ExportJob) -> None:
        """Writes `PART.pte` and `layers.json`."""
        with _quiet_executorch():
            program, description = _lowered(job)
        (job.folder / f"{description['part']}.pte").write_bytes(program)
        write_json_atomic(job.folder / LAYERS_FILE, description)
        job.say(f"{len(description['layers'])} layers of integers, {description['num_delegated']} nodes in XNNPACK")
        if description["not_delegated"]:
            job.say(f"computed by ExecuTorch's portable kernels: {', '.join(description['not_delegated'])}")

    def open(self, folder: Path, student: nn.Module) -> OpenedExport:
        """The program in ExecuTorch's runtime."""
        try:
            description = json.loads((folder / LAYERS_FILE).read_text(encoding="utf-8"))
            part = str(description["part"])
            if Path(part).name != part:
                raise ValueError(f"part {part!r} lies outside of the export")
            program = (folder / f"{part}.pte").read_bytes()
        except (OSError, ValueError, KeyError) as error:
            raise ModelError(f"{folder} is no ExecuTorch export: {error!r}. Fix: export again.") from error
        return OpenedProgram(program, description)


@final
class OpenedProgram:
    """A `.pte` file.

    Args:
        content: Of the file.
        description: What `layers.json` holds.
    """

    def __init__(self, content: bytes, description: Mapping[str, Any]):
        self._content, self._description = content, description
        self._method: Any = None

    def codes(self) -> Mapping[str, Tensor]:
        """Integers by layer, from the delegate's constants."""
        constants = _constants(self._content)
        layers: dict[str, Tensor] = {}
        for name, layer in self._description["layers"].items():
            if layer["key"] not in constants or layer["scale_key"] not in constants:
                raise ModelError(f"the program lacks the integers or scales of {name}. Fix: export again.")
            layers[name] = _unpacked(constants[layer["key"]], layer["bits"], layer["shape"])
        return layers

    def run(self, part: Part, inputs: Inputs) -> Outputs:
        """Runs one part, one element of the batch at a time; the runtime does not show layers."""
        if part.name != self._description["part"]:
            raise config_error("part", part.name, allowed=self._description["part"], fix="run the quantized part")
        if self._method is None:
            with _quiet_executorch():
                from executorch.runtime import Runtime  # pyright: ignore[reportMissingImports]

                self._program = Runtime.get().load_program(self._content)
                self._method = self._program.load_method("forward")
        calls = [self._method.execute(call) for call in _calls(part, inputs, self._description["shapes"])]
        outputs = [torch.cat([call[index] for call in calls]) for index in range(len(part.outputs))]
        return Outputs(dict(zip(part.outputs, outputs, strict=True)))


def _nearest_weight(place: LayerPlace, weight: WeightSpec) -> WeightSpec:
    width = place.shape[1]
    has_blocks = width % _BLOCK == 0
    bits = min(weight.bits, float(_WIDE_BITS))
    if weight.grid(bits).storage_bits > _NARROW_BITS or not has_blocks:
        is_group = weight.granularity is Granularity.GROUP
        changes: dict[str, Any] = {"granularity": Granularity.CHANNEL} if is_group else {}
        return fitted_weight(weight, bits=bits, symmetric=True, **changes)
    changes = {"group_scale": "float"}
    if weight.group_size is not None and (weight.group_size % _BLOCK or width % weight.group_size):
        changes |= {"granularity": Granularity.GROUP, "group_size": _BLOCK}
    return fitted_weight(weight, bits=bits, symmetric=True, scale_dtype="bfloat16", **changes)


def _stored_bits(layer: LayerCodes) -> int:
    """4 or 8, the width that the layer's integers have in the file.

    Raises:
        ConfigError: XNNPACK would compute another weight.
    """
    weight, width = layer.spec.weight, layer.matrix.shape[1]
    fix = "train with target: executorch-xnnpack, or add a rule that skips the layer"
    if layer.type_name != "Linear":
        raise config_error(f"{layer.name}.type", layer.type_name, allowed="Linear", fix=fix)
    if layer.spec.activation is None:
        raise config_error(f"{layer.name}.activation", None, allowed="inputs of 8 bits", fix=fix)
    if not weight.symmetric or layer.codes.dtype != torch.int8:
        raise config_error(f"{layer.name}.weight", weight, allowed="symmetric, at most 8 bits", fix=fix)
    scale = layer.qparams.scale
    is_rounded = torch.equal(scale.to(torch.bfloat16).to(scale.dtype), scale)
    has_blocks = (weight.group_size or width) % _BLOCK == 0
    if layer.grid.storage_bits <= _NARROW_BITS and has_blocks and is_rounded:
        return _NARROW_BITS
    if weight.group_size is not None:
        raise config_error(
            f"{layer.name}.weight",
            weight,
            allowed="groups of a multiple of 32, at most 4 bits, bfloat16 scales",
            fix=fix,
        )
    return _WIDE_BITS


def _packed(codes_OK: Tensor, bits: int) -> bytes:
    """The bytes of a weight as XNNPACK takes them: int8, or two 4-bit codes + 8 in a byte, the first one low."""
    if bits == _WIDE_BITS:
        return codes_OK.contiguous().numpy().tobytes()
    shifted = (codes_OK + 8).to(torch.uint8)
    return (shifted[:, 1::2] << 4 | shifted[:, ::2]).contiguous().numpy().tobytes()


def _unpacked(content: bytes, bits: int, shape: list[int]) -> Tensor:
    stored = torch.frombuffer(bytearray(content), dtype=torch.uint8)
    if bits == _WIDE_BITS:
        return stored.view(torch.int8).reshape(shape)
    return torch.stack([stored & 15, stored >> 4], dim=-1).reshape(shape).to(torch.int8) - 8


def _constants(content: bytes) -> dict[str, bytes]:
    """Key -> constant of the delegates of a program; a key is the constant's SHA-256."""
    from executorch.exir._serialize._program import deserialize_pte_binary  # pyright: ignore[reportMissingImports]

    data: Any = deserialize_pte_binary(content).named_data
    return (
        {} if data is None else {key: bytes(data.buffers[entry.buffer_index]) for key, entry in data.pte_data.items()}
    )


def _lowered(job: ExportJob) -> tuple[bytes, dict[str, Any]]:
    """The program, and what `layers.json` holds."""
    with quiet_torchao():
        from executorch.backends.xnnpack.partition.xnnpack_partitioner import (  # pyright: ignore[reportMissingImports]
            XnnpackPartitioner,
        )
        from executorch.devtools.backend_debug import get_delegation_info  # pyright: ignore[reportMissingImports]
        from executorch.exir import EdgeCompileConfig, to_edge_transform_and_lower  # pyright: ignore[reportMissingImports]
    layers = layer_codes(job.student)
    bits = {name: _stored_bits(layer) for name, layer in layers.items()}
    model = with_torchao_weights(job.student, bits=bits)
    part = job.parts()[0]
    first = part.batches()[0]
    call = next(iter(_calls(part, first, None)))
    module = PositionalPart(replaced(part.module, job.student, model), tuple(first)).eval()
    with torch.no_grad():
        exported = torch.export.export(module, tuple(call), strict=False)
    edge = to_edge_transform_and_lower(
        exported,
        partitioner=[XnnpackPartitioner()],
        compile_config=EdgeCompileConfig(_check_ir_validity=False),
    )
    info = get_delegation_info(edge.exported_program().graph_module)
    content = bytes(edge.to_executorch().buffer)
    places = {name: _place(layer, bits[name]) for name, layer in layers.items()}
    _check_taken(content, places)
    rest = {name: count for name, count in _not_delegated(info).items() if "getitem" not in name}
    return content, {
        "part": part.name,
        "shapes": {name: list(tensor.shape) for name, tensor in zip(first, call, strict=True)},
        "outputs": list(part.outputs),
        "num_delegated": info.num_delegated_nodes,
        "not_delegated": [f"{name} x {count}" for name, count in sorted(rest.items())],
        "layers": places,
    }


def _place(layer: LayerCodes, bits: int) -> dict[str, Any]:
    """Where the delegate keeps a layer: its constants are named by their SHA-256."""
    num_rows = layer.matrix.shape[0]
    scale = layer.qparams.scale.float().flatten()
    scale = scale if layer.spec.weight.group_size else scale.expand(num_rows)
    content = scale.to(torch.bfloat16).view(torch.int16) if bits == _NARROW_BITS else scale
    return {
        "key": hashlib.sha256(_packed(layer.matrix, bits)).hexdigest(),
        "scale_key": "scale_" + hashlib.sha256(content.contiguous().numpy().tobytes()).hexdigest(),
        "bits": bits,
        "shape": list(layer.codes.shape),
    }


def _check_taken(content: bytes, places: Mapping[str, Mapping[str, Any]]) -> None:
    constants = _constants(content)
    for name, place in places.items():
        if place["key"] not in constants or place["scale_key"] not in constants:
            raise config_error(
                f"{name}.weight",
                "not in the program",
                allowed="layers that the exported part calls once with a tensor",
                fix="add a rule that skips this layer",
            )


def _not_delegated(info: Any) -> dict[str, int]:
    return {name: counts.non_delegated for name, counts in info.delegation_by_operator.items() if counts.non_delegated}


def _calls(part: Part, inputs: Inputs, shapes: Mapping[str, list[int]] | None) -> Generator[list[Tensor]]:
    """The calls, of one element of the batch each, that a call with a whole batch is cut into.

    Raises:
        ConfigError: Another shape than the program was made for.
    """
    for call in samples_of(part, inputs):
        for name, x in call.items():
            if shapes is not None and list(x.shape) != shapes.get(name):
                raise config_error(
                    name, tuple(x.shape), allowed=f"{shapes.get(name)}, the shape of the export", fix="export again"
                )
        yield [x.contiguous() for x in call.values()]


@contextmanager
def _quiet_executorch() -> Generator[None]:
    """ExecuTorch logs every pass, and its use of torch is due to be deprecated."""
    logger = logging.getLogger()
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=FutureWarning)
            warnings.filterwarnings("ignore", category=DeprecationWarning)
            yield
    finally:
        logger.setLevel(level)
