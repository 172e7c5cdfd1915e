"""The bytes of a whole transformer in the `onnx` target's file, by count of its parameters at full depth.

    python benchmarks/onnx_size.py

A model of full depth is built without weights and quantized to W4A8 with scales per output channel. Counted are 4 bits for a
code, 4 bytes for a scale, 5 for a static input's constants and 4 for any other parameter (2 with `--float-dtype bfloat16`), and
the rows of a table of positions that a picture of 1024 pixels reads: the graph holds no others. Names and operators of a
graph, about 0.1 MB for a block, are left out. Writes `docs/results/onnx_size.jsonl` and `.md`.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fraqat import ActivationSpec, QuantSpec, WeightSpec, __version__, quantize_
from fraqat.nn import quantized_layers
from fraqat.tasks.known import build_on_meta, known_model

RESULTS = Path(__file__).parents[1] / "docs" / "results"
MODELS = {
    "Sana 600M": "Efficient-Large-Model/Sana_600M_512px_diffusers",
    "PixArt-Sigma": "PixArt-alpha/PixArt-Sigma-XL-2-512-MS",
    "SD3.5 Medium": "stabilityai/stable-diffusion-3.5-medium",
}
PICTURE_TOKENS = 64 * 64
FLOAT_BYTES, HALF_BYTES, STATIC_BYTES = 4, 2, 5


def count(title: str) -> dict[str, Any]:
    """Bytes of one model in float32 and in W4A8."""
    known = known_model(MODELS[title])
    assert known is not None
    model: nn.Module = build_on_meta(known.class_name, known.config)
    table = sum(b.numel() for n, b in model.named_buffers() if n.endswith("pos_embed"))
    channels = known.config["num_attention_heads"] * known.config["attention_head_dim"]
    read = min(table, PICTURE_TOKENS * channels)
    num_parameters = sum(p.numel() for p in model.parameters())
    activation = ActivationSpec(static=True, granularity="tensor", symmetric=False, range_method="three_sigma")  # pyright: ignore[reportArgumentType]
    quantize_(model, QuantSpec(WeightSpec(range_method="max_abs"), activation))  # pyright: ignore[reportArgumentType]
    layers = [layer for _, layer in quantized_layers(model)]
    codes = sum(layer.weight.numel() for layer in layers)
    scales = sum(layer.weight.shape[0] for layer in layers)
    biases = sum(layer.bias.numel() for layer in layers if isinstance(layer.bias, torch.Tensor))
    others = num_parameters - codes - biases
    fixed = codes // 2 + scales * FLOAT_BYTES + len(layers) * STATIC_BYTES
    return {
        "model": title,
        "num_parameters": num_parameters,
        "num_layers": len(layers),
        "codes": codes,
        "table": table,
        "table_read": read,
        "float32": FLOAT_BYTES * (num_parameters + read),
        "w4a8": fixed + FLOAT_BYTES * (others + biases + read),
        "w4a8_bfloat16": fixed + HALF_BYTES * (others + biases + read),
        "w4a8_whole_table": fixed + FLOAT_BYTES * (others + biases + table),
        "float32_whole_table": FLOAT_BYTES * (num_parameters + table),
        "torch": torch.__version__,
        "fraqat": __version__,
    }


def write_table(records: list[dict[str, Any]], path: Path) -> None:
    """The records as Markdown."""
    lines = [
        "# Bytes of whole transformers in the `onnx` target's file",
        "",
        "Counted by `benchmarks/onnx_size.py` at full depth, all linear layers and 1x1 convolutions in 4 bits with scales per",
        "channel. A share is of the float32 file with the same tables. Of the table of positions the graph holds the rows that",
        "a picture of 1024 pixels reads; the last column is the share of a file with the whole table.",
        "",
        "| model | parameters, million | in 4 bits | float32, GB | W4A8, GB | share | floats in bfloat16 | whole table |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for r in records:
        shares = [r["w4a8"] / r["float32"], r["w4a8_bfloat16"] / r["float32"]]
        whole = r["w4a8_whole_table"] / r["float32_whole_table"]
        in_4_bits = r["codes"] / r["num_parameters"]
        lines.append(
            f"| {r['model']} | {r['num_parameters'] / 1e6:.0f} | {in_4_bits:.2%} | {r['float32'] / 1e9:.3f} "
            f"| {r['w4a8'] / 1e9:.3f} | {shares[0]:.4f} | {shares[1]:.4f} | {whole:.4f} |"
        )
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def main() -> None:
    """Counts all models."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS / "onnx_size.jsonl")
    arguments = parser.parse_args()
    records = [count(title) for title in MODELS]
    arguments.out.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    write_table(records, arguments.out.with_suffix(".md"))
    print(arguments.out.with_suffix(".md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
