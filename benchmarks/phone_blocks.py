"""Do full-width blocks compile for a Snapdragon 8 Elite, and how large do they get?

One block of each model, built from its configuration with random weights, W4A8 with static inputs, batch 1, at the tokens of a
512 pixel image. The offline compiler of onnxruntime-qnn writes the context binary that a phone loads; it fails if one operator
is left to the CPU. With `--emulate` the block also runs in the emulator, and every layer is compared with ONNX Runtime's
computation of the same node for the same input. Appends one JSON line per block.

    python benchmarks/phone_blocks.py --out docs/results/phone_blocks.jsonl
    python benchmarks/phone_blocks.py --out docs/results/phone_blocks.jsonl --models sana-600m --emulate
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import json
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from fraqat import ActivationSpec, QuantSpec, WeightSpec, __version__, calibrate_, quantize_
from fraqat.analysis.layer_error import sqnr_db
from fraqat.export import Inputs, LayerCodes, Part, layer_codes, run_module
from fraqat.numerics import Granularity, RangeMethod
from fraqat.tasks.known import build_on_meta, known_model

NUM_SAMPLES = 2
TEXT_TOKENS = 300
SD3_TEXT_TOKENS = 333


class SanaBlock(nn.Module):
    """Linear attention, cross attention and Mix-FFN on 16 x 16 tokens."""

    def __init__(self, block: nn.Module):
        super().__init__()
        self.block = block

    def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor, timestep: Tensor) -> Tensor:
        """The block's output."""
        return self.block(hidden_states, None, encoder_hidden_states, None, timestep, 16, 16)


class PixArtBlock(nn.Module):
    """Self attention, cross attention and a feed-forward network."""

    def __init__(self, block: nn.Module):
        super().__init__()
        self.block = block

    def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor, timestep: Tensor) -> Tensor:
        """The block's output."""
        return self.block(hidden_states, encoder_hidden_states=encoder_hidden_states, timestep=timestep)


class Sd3Block(nn.Module):
    """Joint attention of image and text, a second attention of the image, two feed-forward networks."""

    def __init__(self, block: nn.Module):
        super().__init__()
        self.block = block

    def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor, timestep: Tensor) -> tuple[Tensor, Tensor]:
        """Text, image."""
        return self.block(hidden_states, encoder_hidden_states, timestep)


@dataclasses.dataclass(frozen=True)
class Case:
    """A model's block.

    Args:
        hub_id: Gives the configuration.
        wrap: The module that is exported.
        width: Channels.
        tokens: Of the image at 512 pixels.
        text: Shape of the text's states without the batch.
        step: Size of the step's embedding.
        outputs: Names.
    """

    hub_id: str
    wrap: Callable[[nn.Module], nn.Module]
    width: int
    tokens: int
    text: tuple[int, int]
    step: int
    outputs: tuple[str, ...] = ("output",)

    def sample(self) -> Inputs:
        """Random inputs."""
        return {
            "hidden_states": torch.randn(1, self.tokens, self.width),
            "encoder_hidden_states": torch.randn(1, *self.text),
            "timestep": torch.randn(1, self.step),
        }


CASES = {
    "sana-600m": Case(
        "Efficient-Large-Model/Sana_600M_512px_diffusers", SanaBlock, 1152, 256, (TEXT_TOKENS, 1152), 6 * 1152
    ),
    "pixart-sigma": Case(
        "PixArt-alpha/PixArt-Sigma-XL-2-512-MS", PixArtBlock, 1152, 1024, (TEXT_TOKENS, 1152), 6 * 1152
    ),
    "sd3.5-medium": Case(
        "stabilityai/stable-diffusion-3.5-medium",
        Sd3Block,
        1536,
        1024,
        (SD3_TEXT_TOKENS, 1536),
        1536,
        ("text_output", "output"),
    ),
}


def build(case: Case) -> nn.Module:
    """The first block with random weights, quantized and calibrated."""
    known = known_model(case.hub_id)
    assert known is not None
    blocks: Any = build_on_meta(known.class_name, {**known.config, "num_layers": 2}).transformer_blocks
    block = blocks[0].to_empty(device="cpu")
    for name, parameter in block.named_parameters():
        nn.init.normal_(parameter, std=0.02)
        if "norm" in name and name.endswith("weight") and parameter.ndim == 1:
            nn.init.ones_(parameter)
    module = case.wrap(block).eval().requires_grad_(False)
    activation = ActivationSpec(
        static=True, granularity=Granularity.TENSOR, symmetric=False, range_method=RangeMethod.THREE_SIGMA
    )
    quantize_(module, QuantSpec(WeightSpec(narrow=True, scale_dtype="bfloat16"), activation))
    samples = [case.sample() for _ in range(NUM_SAMPLES)]
    with torch.no_grad():
        calibrate_(module, lambda x: module(**cast(Inputs, x)), samples)
    return module


def emulated(folder: Path, part: Part, module: nn.Module, codes: Mapping[str, LayerCodes]) -> dict[str, Any]:
    """One sample in the emulator: steps of every layer, and the whole output against ONNX Runtime and the student."""
    import onnxruntime

    from fraqat.export.onnx.htp import HtpExport

    sample = {name: value[:1] for name, value in part.batches()[0].items()}
    export = HtpExport(folder, module)
    start = time.perf_counter()
    found = export.run(part, sample)
    run_s = time.perf_counter() - start
    apart = export.steps_apart(part, [found])
    assert apart.keys() == codes.keys(), "a layer is not shown"
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(
        str(folder / f"{part.name}.onnx"), options, providers=["CPUExecutionProvider"]
    )
    feeds = {item.name: sample[item.name].numpy() for item in session.get_inputs()}
    exact = dict(zip(part.outputs, map(torch.from_numpy, session.run(list(part.outputs), feeds)), strict=True))
    student = run_module(module, module, [], part, sample).outputs
    return {
        "steps": {layer: item.largest for layer, item in apart.items()},
        "share_equal": {layer: round(item.share_equal, 4) for layer, item in apart.items()},
        "output_db": {name: sqnr_db(exact[name], found.outputs[name]) for name in part.outputs},
        "student_db": {name: sqnr_db(student[name], found.outputs[name]) for name in part.outputs},
        "run_s": round(run_s, 1),
    }


def measure(name: str, *, emulate: bool) -> dict[str, Any]:
    """Builds, exports, compiles, and runs in the emulator if asked to."""
    from fraqat.export.onnx.graph import save
    from fraqat.export.onnx.htp import SM8750, compile_context
    from fraqat.export.onnx.qualcomm import static_model

    torch.manual_seed(0)
    case = CASES[name]
    module = build(case)
    samples = [case.sample() for _ in range(NUM_SAMPLES)]
    codes = layer_codes(module)
    part = Part("block", module, case.outputs, lambda: samples, {n: {0: "batch"} for n in samples[0]})
    start = time.perf_counter()
    static = static_model(part, module, codes)
    export_s = time.perf_counter() - start
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "block.onnx"
        save(static.model, path)
        graph_bytes = sum(item.stat().st_size for item in path.parent.iterdir())
        start = time.perf_counter()
        compiled = compile_context(path, SM8750)
        compile_s = time.perf_counter() - start
        num_bytes = compiled.num_bytes
        emulator = {"emulator": emulated(Path(folder), part, module, codes)} if emulate else {}
    num_weights = sum(layer.codes.numel() for layer in codes.values())
    return {
        "benchmark": "phone_blocks",
        "model": name,
        "soc": SM8750.name,
        "tokens": case.tokens,
        "num_layers": len(codes),
        "num_weights": num_weights,
        "nodes_on_cpu": 0,
        "graph_bytes": graph_bytes,
        "context_bytes": num_bytes,
        "context_bits_per_weight": round(8 * num_bytes / num_weights, 3),
        "export_s": round(export_s, 1),
        "compile_s": round(compile_s, 1),
        "fraqat": __version__,
        "torch": torch.__version__,
        "onnxruntime_qnn": importlib.metadata.version("onnxruntime-qnn"),
        "machine": platform.machine(),
        "commit": _commit(),
        **emulator,
    }


def _commit() -> str:
    command = ["git", "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


def main() -> None:
    """One process per model, so that one model's memory is free for the next."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--models", nargs="*", default=list(CASES), choices=list(CASES))
    parser.add_argument(
        "--emulate", action="store_true", help="run one sample in the emulator (minutes for the large blocks)"
    )
    arguments = parser.parse_args()
    if len(arguments.models) == 1:
        record = measure(arguments.models[0], emulate=arguments.emulate)
        with arguments.out.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        print(json.dumps(record, indent=1))
        return
    for name in arguments.models:
        command = [sys.executable, __file__, "--out", str(arguments.out), "--models", name]
        command += ["--emulate"] * arguments.emulate
        subprocess.run(command, check=True)


if __name__ == "__main__":
    main()
