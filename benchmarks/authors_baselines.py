"""Our smoothing and branches against the authors' own code, on the same heavy-tailed weights and inputs, layer by layer.

    git clone https://github.com/mit-han-lab/deepcompressor && git clone https://github.com/DZY122/DiTAS
    pip install omniconfig scipy
    OMP_NUM_THREADS=1 python benchmarks/authors_baselines.py --deepcompressor deepcompressor --ditas DiTAS

Prints one JSON line per layer and piece: the largest difference relative to the largest value. Their CUDA extension, and what
their scripts import for sampling images, is replaced by empty modules: nothing of it is called here. Without omniconfig the
smoothing factors are left out, and the line says so.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fraqat.nn.branch import low_rank_factors
from fraqat.nn.smoothing import smoothing_factors

SHAPES = ((96, 64), (192, 384), (768, 192))
RANK = 16
EXPONENTS = (0.25, 0.5, 0.75)
_UNUSED = (
    "deepcompressor.csrc.load",
    "torchvision",
    "torchvision.utils",
    "diffusers",
    "diffusers.models",
    "diffusion",
    "download",
    "models",
)
_UNUSED_NAMES = ("_C", "save_image", "create_diffusion", "find_model", "DiT_models", "AutoencoderKL")


def relative_difference(ours: Tensor, theirs: Tensor) -> float:
    """max |ours - theirs| / max |theirs|."""
    return float((ours.detach().double() - theirs.detach().double()).abs().max() / theirs.detach().abs().max())


def make_layer(num_outputs: int, num_inputs: int, seed: int) -> tuple[Tensor, Tensor]:
    """A weight [O, K] with heavy tails, and inputs [256, K] whose channels differ by a factor of 100."""
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(num_outputs, num_inputs, generator=generator)
    x = torch.randn(256, num_inputs, generator=generator) * torch.logspace(-1, 1, num_inputs)
    return 0.02 * normal * normal.abs().square(), x


def hide_unused() -> None:
    """Empty modules for what the authors' files import and these comparisons never call."""
    for name in _UNUSED:
        module = types.ModuleType(name)
        for attribute in _UNUSED_NAMES:
            setattr(module, attribute, None)
        sys.modules.setdefault(name, module)


def compare_svdquant(weight: Tensor, x: Tensor) -> Iterator[tuple[str, float | str]]:
    """Factors and branch of SVDQuant."""
    x_max, w_max = x.abs().amax(0), weight.abs().amax(0)
    try:
        smooth: Any = importlib.import_module("deepcompressor.calib.smooth")
    except ModuleNotFoundError as error:
        yield "SVDQuant factors", f"left out: no module {error.name}"
    else:
        for a in EXPONENTS:
            theirs = smooth.get_smooth_scale(alpha_base=x_max, beta_base=w_max, alpha=a, beta=1 - a)
            yield (
                f"SVDQuant factors, a = {a:g}",
                relative_difference(smoothing_factors(x_max, w_max, (a, 1 - a)), theirs),
            )
    smoothed = weight * smoothing_factors(x_max, w_max, (0.5, 0.5))
    branch: Any = importlib.import_module("deepcompressor.nn.patch.lowrank")
    theirs = branch.LowRankBranch(weight.shape[1], weight.shape[0], RANK, weight=smoothed).get_effective_weight()
    up, down = low_rank_factors(smoothed, RANK)
    yield "SVDQuant branch", relative_difference(up @ down, theirs)


def compare_ditas(weight: Tensor) -> Iterator[tuple[str, float | str]]:
    """Branch of DiTAS: fitted to what their quantizer loses, in turn with it."""
    theirs_module: Any = importlib.import_module("LinearQuant")
    quantizer: Any = importlib.import_module("utils_qaunt")
    product = {"ours": torch.zeros_like(weight), "theirs": torch.zeros_like(weight)}
    for iteration in range(1, 4):
        for name in product:
            quantized = quantizer.weight_quant_fn(weight - product[name], num_bits=4, quant_method="asymmetric")
            decompose = low_rank_factors if name == "ours" else theirs_module.low_rank_decomposition
            left, right = decompose(weight - quantized, RANK)
            product[name] = left @ right
        yield f"DiTAS branch, iteration {iteration}", relative_difference(product["ours"], product["theirs"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--deepcompressor", type=Path, help="clone of the authors' code of SVDQuant")
    parser.add_argument("--ditas", type=Path, help="clone of the authors' code of DiTAS")
    arguments = parser.parse_args()
    if arguments.deepcompressor is None and arguments.ditas is None:
        parser.error("pass --deepcompressor, --ditas, or both")
    hide_unused()
    for folder in (arguments.deepcompressor, arguments.ditas):
        if folder is not None:
            sys.path.insert(0, str(folder.resolve()))
    for seed, shape in enumerate(SHAPES):
        weight, x = make_layer(*shape, seed)
        found = [] if arguments.deepcompressor is None else list(compare_svdquant(weight, x))
        found += [] if arguments.ditas is None else list(compare_ditas(weight))
        for piece, value in found:
            print(json.dumps({"shape": shape, "piece": piece, "relative_difference": value}))


if __name__ == "__main__":
    main()
