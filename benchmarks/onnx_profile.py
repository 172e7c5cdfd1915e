"""Where the time of a full-width block goes in ONNX Runtime on the CPU, operator by operator: float32 against static W4A8.

    python benchmarks/onnx_latency.py --keep graphs --rounds 1 --out /dev/null
    python benchmarks/onnx_profile.py --graphs graphs

The two graphs of a block take turns on one thread; a figure is the median over rounds of the time in the runtime's own profile.
Needs onnxruntime and numpy alone. Appends to `docs/results/onnx_profile.jsonl` and writes `.md`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

RESULTS = Path(__file__).parents[1] / "docs" / "results"
FLOAT, STATIC = "float32", "w4a8-static"
KINDS = ("linear layers", "attention products", "softmax", "norms and activations", "quantize", "the rest")
_NORMS = (
    "LayerNormalization",
    "SkipLayerNormalization",
    "Gelu",
    "QuickGelu",
    "Pow",
    "ReduceMean",
    "Sqrt",
    "Reciprocal",
)
_FEATURES = (("amx_int8", "AMX"), ("avx512_vnni", "AVX512 with VNNI"), ("avx_vnni", "AVX2 with VNNI"), ("avx2", "AVX2"))


def cpu_name() -> str:
    """The processor and the widest integer products that it has, from /proc/cpuinfo."""
    text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    told = dict(line.split(":", 1) for line in text.splitlines()[:40] if ":" in line)
    fields = {key.strip(): value.strip() for key, value in told.items()}
    flags = fields.get("flags", "").split()
    return (
        f"{fields.get('model name', 'unknown')}, {next((name for flag, name in _FEATURES if flag in flags), 'no AVX2')}"
    )


def kind_of(arguments: dict[str, Any]) -> str:
    """What an operator of a block is for. Products of two activations are attention's; linear layers multiply by a constant."""
    op_type = arguments["op_name"]
    shapes = [next(iter(item.values())) for item in arguments["input_type_shape"]]
    if op_type in ("Gemm", "MatMulIntegerToFloat", "MatMulNBits"):
        return "linear layers"
    if op_type in ("MatMul", "FusedMatMul"):
        return "attention products" if len(shapes) > 1 and len(shapes[1]) > 2 else "linear layers"
    if op_type == "Softmax":
        return "softmax"
    if op_type == "QuantizeLinear":
        return "quantize"
    return "norms and activations" if op_type in _NORMS else "the rest"


def open_profiled(path: Path, folder: Path) -> onnxruntime.InferenceSession:
    """A session of one thread that keeps a profile."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.enable_profiling = True
    options.profile_file_prefix = str(folder / path.stem)
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def kinds_by_run(profile: Path) -> list[dict[str, float]]:
    """Milliseconds by kind of operator, for every run of a profile but the first."""
    events = json.loads(profile.read_text(encoding="utf-8"))
    ends = sorted(event["ts"] + event["dur"] for event in events if event["name"] == "model_run")
    runs: list[dict[str, float]] = [defaultdict(float) for _ in ends]
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            index = sum(end < event["ts"] for end in ends)
            runs[index][kind_of(event["args"])] += event["dur"] / 1e3
    return [{kind: run[kind] for kind in KINDS} for run in runs[1:]]


def measure(graphs: Path, block: str, rounds: int) -> dict[str, dict[str, list[float]]]:
    """Milliseconds by way and kind, a list over rounds."""
    feeds = dict(np.load(graphs / f"{block}.inputs.npz"))
    with tempfile.TemporaryDirectory() as folder:
        sessions = {way: open_profiled(graphs / f"{block}.{way}.onnx", Path(folder)) for way in (FLOAT, STATIC)}
        for _ in range(rounds + 1):
            for session in sessions.values():
                session.run(None, {item.name: feeds[item.name] for item in session.get_inputs()})
        runs = {way: kinds_by_run(Path(session.end_profiling())) for way, session in sessions.items()}
    return {way: {kind: [run[kind] for run in found] for kind in KINDS} for way, found in runs.items()}


def write_table(path: Path) -> None:
    """The newest record of every block and processor as Markdown."""
    newest = {
        (record["block"], record["cpu"]): record for record in map(json.loads, path.read_text("utf-8").splitlines())
    }
    lines = [
        "# Where the time of a full-width block goes",
        "",
        "Made by `benchmarks/onnx_profile.py` from the graphs of `benchmarks/onnx_latency.py`: ONNX Runtime's profile, one",
        "thread, one sample of 1024 tokens, float32 and static W4A8 in turns, medians. Shares are of float32's total. The last",
        "two rows are what would be left of W4A8 if all other operators took no time.",
    ]
    for (block, cpu), record in newest.items():
        times = {way: {k: statistics.median(v) for k, v in found.items()} for way, found in record["ms"].items()}
        total = sum(times[FLOAT].values())
        lines += ["", f"## {block}, {cpu}", "", "| operators | float32, ms | W4A8, ms | share of float32's total |"]
        lines.append("| --- | --- | --- | --- |")
        for kind in KINDS:
            share = times[STATIC][kind] / total
            lines.append(f"| {kind} | {times[FLOAT][kind]:.0f} | {times[STATIC][kind]:.0f} | {share:.3f} |")
        lines.append(
            f"| all | {total:.0f} | {sum(times[STATIC].values()):.0f} | {sum(times[STATIC].values()) / total:.3f} |"
        )
        linear = times[STATIC]["linear layers"]
        both = linear + times[STATIC]["attention products"] + times[STATIC]["softmax"]
        lines.append(f"| linear layers alone | | {linear:.0f} | {linear / total:.3f} |")
        lines.append(f"| linear layers and attention alone | | {both:.0f} | {both / total:.3f} |")
    path.with_suffix(".md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def main() -> None:
    """Profiles every block of a folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--graphs", type=Path, required=True, help="what `onnx_latency.py --keep` wrote")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=RESULTS / "onnx_profile.jsonl")
    arguments = parser.parse_args()
    blocks = sorted(path.name.removesuffix(".inputs.npz") for path in arguments.graphs.glob("*.inputs.npz"))
    if not blocks:
        parser.error(f"--graphs {arguments.graphs} holds no BLOCK.inputs.npz. Fix: run onnx_latency.py --keep first.")
    for block in blocks:
        record = {
            "block": block,
            "cpu": cpu_name(),
            "ms": measure(arguments.graphs, block, arguments.rounds),
            "onnxruntime": onnxruntime.__version__,
        }
        with arguments.out.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(record) + "\n")
    write_table(arguments.out)
    print(arguments.out.with_suffix(".md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
