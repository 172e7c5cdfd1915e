"""Text from an exported language model, without PyTorch: onnxruntime, numpy and tokenizers are all that it needs.

python examples/generate_text_without_torch.py EXPORT "The with statement"

EXPORT is a folder that `fraqat export RUN --format onnx` wrote; docs/targets/onnx.md describes its files.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from tokenizers import Tokenizer


def generate(folder: Path, prompt_tokens: list[int], max_new_tokens: int | None = None) -> Iterator[int]:
    """Tokens after a prompt, each the most probable one; one that ends a text is not given any more.

    The prompt is read at once into an empty cache, and every token alone after that.
    """
    part: dict[str, Any] = json.loads((folder / "parts.json").read_text(encoding="utf-8"))["model"]
    session = onnxruntime.InferenceSession(str(folder / "model.onnx"), providers=["CPUExecutionProvider"])
    sizes = {"batch": 1, "past": 0}
    cache = {
        name: np.zeros([sizes.get(size, size) for size in given["shape"]], given["dtype"])
        for name, given in part["inputs"].items()
        if name.startswith("past_key_values.")
    }
    tokens, num_read = prompt_tokens, 0
    for _ in range(max_new_tokens or part["constants"]["max_new_tokens"]):
        num_read += len(tokens)
        feeds = {
            "input_ids": np.array([tokens], np.int64),
            "attention_mask": np.ones((1, num_read), np.int64),
            **cache,
        }
        logits, *present = session.run(part["outputs"], feeds)
        cache = dict(zip(cache, present, strict=True))
        tokens = [int(logits[0].argmax())]
        if tokens[0] in part["constants"]["stop_tokens"]:
            return
        yield tokens[0]


def main() -> None:
    """Continues a text."""
    parser = argparse.ArgumentParser(description="Continues a text with an export, without PyTorch.")
    parser.add_argument("export", type=Path, help="folder of the export")
    parser.add_argument("prompt")
    parser.add_argument("--max-new-tokens", type=int)
    arguments = parser.parse_args()
    tokenizer = Tokenizer.from_file(str(arguments.export / "tokenizer.json"))
    prompt = tokenizer.encode(arguments.prompt).ids
    found = generate(arguments.export, prompt, arguments.max_new_tokens)
    print(tokenizer.decode(list(found)))


if __name__ == "__main__":
    main()
