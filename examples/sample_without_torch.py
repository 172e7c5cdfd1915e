"""An image from an export, without PyTorch: onnxruntime, numpy, pillow and tokenizers are all that it needs.

python examples/sample_without_torch.py EXPORT "a red seven on blue" picture.png

EXPORT is a folder that `fraqat export RUN --format onnx` wrote; docs/targets/onnx.md describes its files.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from PIL import Image
from tokenizers import Tokenizer

Arrays = dict[str, np.ndarray[Any, Any]]


class Export:
    """The graphs of an export and what `parts.json` says of them.

    Args:
        folder: Of the export.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.parts: dict[str, Any] = json.loads((folder / "parts.json").read_text(encoding="utf-8"))
        self._sessions = {
            name: onnxruntime.InferenceSession(str(folder / f"{name}.onnx"), providers=["CPUExecutionProvider"])
            for name in self.parts
        }

    def constants(self, part: str) -> dict[str, Any]:
        """What a program around a part needs to know."""
        return self.parts[part]["constants"]

    def run(self, part: str, inputs: Arrays) -> Arrays:
        """Calls one graph."""
        session = self._sessions[part]
        feeds = {item.name: inputs[item.name] for item in session.get_inputs()}
        names = self.parts[part]["outputs"]
        return dict(zip(names, session.run(names, feeds), strict=True))


def tokenize(export: Export, prompts: list[str]) -> Arrays:
    """Inputs of the text encoder: every tokenizer's numbers, padded and cut as the pipeline does it."""
    inputs: Arrays = {}
    for name, facts in export.constants("text_encoder")["tokenizers"].items():
        tokenizer = Tokenizer.from_file(str(export.folder / facts["file"]))
        tokenizer.enable_truncation(facts["max_length"])
        pad_token = tokenizer.id_to_token(facts["pad_token_id"])
        tokenizer.enable_padding(
            direction=facts["padding_side"],
            pad_id=facts["pad_token_id"],
            pad_token=pad_token,
            length=facts["max_length"],
        )
        texts = [text.strip() if facts["strips"] else text for text in prompts]
        found = tokenizer.encode_batch([text.lower() if facts["lowers"] else text for text in texts])
        columns = {"input_ids": [row.ids for row in found], "attention_mask": [row.attention_mask for row in found]}
        inputs |= {f"{name}.{kind}": np.array(columns[kind], np.int64) for kind in facts["inputs"]}
    return inputs


def encode(export: Export, prompts: list[str]) -> Arrays:
    """The transformer's conditioning of prompts."""
    return export.run("text_encoder", tokenize(export, prompts))


def sample(export: Export, prompt: str, noise: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """A picture [height, width, 3] in [0, 1] for noise of `latent_shape`, a standard normal.

    Every latent is a sum of the noise and of the predictions so far, with coefficients that the export lists.
    """
    constants = export.constants("transformer")
    scale = constants["guidance_scale"]
    prompts = [prompt] if scale == 1 else [prompt, export.constants("text_encoder")["negative_prompt"]]
    conditioning = encode(export, prompts)
    conditioning |= {
        name: np.array(given["values"], given["dtype"]) for name, given in constants["shared_inputs"].items()
    }
    coefficients = np.array(constants["coefficients"], np.float32)
    time_dtype = export.parts["transformer"]["inputs"]["timestep"]["dtype"]
    known = [noise.astype(np.float32)]
    for step, time in enumerate(constants["timesteps"]):
        latents = np.tensordot(coefficients[step, : len(known)], np.stack(known), 1)
        rows = np.repeat(latents[None], len(prompts), 0)
        times = np.full(len(prompts), time, time_dtype)
        found = export.run("transformer", {"hidden_states": rows, "timestep": times, **conditioning})["output"]
        known.append(found[0] if scale == 1 else found[1] + scale * (found[0] - found[1]))
    latents = np.tensordot(coefficients[-1], np.stack(known), 1)
    return export.run("decoder", {"latents": latents[None]})["image"][0].transpose(1, 2, 0)


def main() -> None:
    """Samples one picture."""
    parser = argparse.ArgumentParser(description="Samples a picture from an export without PyTorch.")
    parser.add_argument("export", type=Path, help="folder of the export")
    parser.add_argument("prompt")
    parser.add_argument("picture", type=Path, help="PNG file to write")
    parser.add_argument("--seed", type=int, default=0, help="of the noise")
    parser.add_argument("--noise", type=Path, help=".npy file to take the noise from")
    arguments = parser.parse_args()
    export = Export(arguments.export)
    shape = export.constants("transformer")["latent_shape"]
    drawn = np.random.default_rng(arguments.seed).standard_normal(shape)
    noise = np.load(arguments.noise) if arguments.noise else drawn
    picture = sample(export, arguments.prompt, noise.reshape(shape))
    Image.fromarray((picture * 255).round().astype(np.uint8)).save(arguments.picture)


if __name__ == "__main__":
    main()
