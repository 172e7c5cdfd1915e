"""Inception's features for FID and KID: the network of Heusel et al. (2017) in plain torch, or torchmetrics' own.

The weights are those that TensorFlow published on 2015-12-05, in the names of torchvision's Inception v3, as the files of
pytorch-fid (`pt_inception-2015-12-05-6726825d.pth`) and torch-fidelity (`weights-inception-2015-12-05-6726825d.pth`) have
them. With torchvision's ImageNet weights the figures would be no FID, and loading them is refused.

The only home of torchmetrics, which is imported where it is used.
"""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from fraqat.errors import ConfigError, ModelError

NUM_FEATURES = 2048
_SIZE = 299
_CLASSIFIER_KEYS = ("fc.weight", "fc.bias")


class _Conv(nn.Module):
    def __init__(self, in_channels: int, out_channels: int, size: int | tuple[int, int], stride: int = 1, pad: Any = 0):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, size, stride, pad, bias=False)
        self.bn = nn.BatchNorm2d(out_channels, eps=0.001)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)), inplace=True)


def _average(x: Tensor) -> Tensor:
    """As TensorFlow averages: what was padded does not count."""
    return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)


class _BlockA(nn.Module):
    def __init__(self, in_channels: int, pool_channels: int):
        super().__init__()
        self.branch1x1 = _Conv(in_channels, 64, 1)
        self.branch5x5_1, self.branch5x5_2 = _Conv(in_channels, 48, 1), _Conv(48, 64, 5, pad=2)
        self.branch3x3dbl_1 = _Conv(in_channels, 64, 1)
        self.branch3x3dbl_2, self.branch3x3dbl_3 = _Conv(64, 96, 3, pad=1), _Conv(96, 96, 3, pad=1)
        self.branch_pool = _Conv(in_channels, pool_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        five = self.branch5x5_2(self.branch5x5_1(x))
        return torch.cat([self.branch1x1(x), five, double, self.branch_pool(_average(x))], 1)


class _BlockB(nn.Module):
    def __init__(self, in_channels: int):
        super().__init__()
        self.branch3x3 = _Conv(in_channels, 384, 3, stride=2)
        self.branch3x3dbl_1 = _Conv(in_channels, 64, 1)
        self.branch3x3dbl_2, self.branch3x3dbl_3 = _Conv(64, 96, 3, pad=1), _Conv(96, 96, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch3x3(x), double, F.max_pool2d(x, 3, stride=2)], 1)


_WIDE: dict[str, Any] = {"size": (1, 7), "pad": (0, 3)}
_TALL: dict[str, Any] = {"size": (7, 1), "pad": (3, 0)}


class _BlockC(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.branch1x1 = _Conv(768, 192, 1)
        self.branch7x7_1, self.branch7x7_2 = _Conv(768, channels, 1), _Conv(channels, channels, **_WIDE)
        self.branch7x7_3 = _Conv(channels, 192, **_TALL)
        self.branch7x7dbl_1, self.branch7x7dbl_2 = _Conv(768, channels, 1), _Conv(channels, channels, **_TALL)
        self.branch7x7dbl_3, self.branch7x7dbl_4 = (_Conv(channels, channels, **shape) for shape in (_WIDE, _TALL))
        self.branch7x7dbl_5 = _Conv(channels, 192, **_WIDE)
        self.branch_pool = _Conv(768, 192, 1)

    def forward(self, x: Tensor) -> Tensor:
        single = self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x)))
        double = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
        double = self.branch7x7dbl_5(self.branch7x7dbl_4(double))
        return torch.cat([self.branch1x1(x), single, double, self.branch_pool(_average(x))], 1)


class _BlockD(nn.Module):
    def __init__(self):
        super().__init__()
        self.branch3x3_1, self.branch3x3_2 = _Conv(768, 192, 1), _Conv(192, 320, 3, stride=2)
        self.branch7x7x3_1, self.branch7x7x3_2 = _Conv(768, 192, 1), _Conv(192, 192, **_WIDE)
        self.branch7x7x3_3, self.branch7x7x3_4 = _Conv(192, 192, **_TALL), _Conv(192, 192, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        seven = self.branch7x7x3_4(self.branch7x7x3_3(self.branch7x7x3_2(self.branch7x7x3_1(x))))
        return torch.cat([self.branch3x3_2(self.branch3x3_1(x)), seven, F.max_pool2d(x, 3, stride=2)], 1)


class _BlockE(nn.Module):
    """`pool` is `max` in the last block of the published network, where the paper has an average."""

    def __init__(self, in_channels: int, pool: Literal["average", "max"]):
        super().__init__()
        wide: dict[str, Any] = {"size": (1, 3), "pad": (0, 1)}
        tall: dict[str, Any] = {"size": (3, 1), "pad": (1, 0)}
        self._takes_average = pool == "average"
        self.branch1x1, self.branch3x3_1 = _Conv(in_channels, 320, 1), _Conv(in_channels, 384, 1)
        self.branch3x3_2a, self.branch3x3_2b = _Conv(384, 384, **wide), _Conv(384, 384, **tall)
        self.branch3x3dbl_1, self.branch3x3dbl_2 = _Conv(in_channels, 448, 1), _Conv(448, 384, 3, pad=1)
        self.branch3x3dbl_3a, self.branch3x3dbl_3b = _Conv(384, 384, **wide), _Conv(384, 384, **tall)
        self.branch_pool = _Conv(in_channels, 192, 1)

    def forward(self, x: Tensor) -> Tensor:
        single, double = self.branch3x3_1(x), self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        pooled = _average(x) if self._takes_average else F.max_pool2d(x, 3, stride=1, padding=1)
        parts = [self.branch3x3_2a(single), self.branch3x3_2b(single)]
        parts += [self.branch3x3dbl_3a(double), self.branch3x3dbl_3b(double)]
        return torch.cat([self.branch1x1(x), *parts, self.branch_pool(pooled)], 1)


class InceptionV3(nn.Module):
    """Inception v3 up to its pooled features, with TensorFlow's poolings, in torchvision's names."""

    def __init__(self):
        super().__init__()
        self.Conv2d_1a_3x3, self.Conv2d_2a_3x3 = _Conv(3, 32, 3, stride=2), _Conv(32, 32, 3)
        self.Conv2d_2b_3x3 = _Conv(32, 64, 3, pad=1)
        self.Conv2d_3b_1x1, self.Conv2d_4a_3x3 = _Conv(64, 80, 1), _Conv(80, 192, 3)
        self.Mixed_5b, self.Mixed_5c, self.Mixed_5d = _BlockA(192, 32), _BlockA(256, 64), _BlockA(288, 64)
        self.Mixed_6a, self.Mixed_6b, self.Mixed_6c = _BlockB(288), _BlockC(128), _BlockC(160)
        self.Mixed_6d, self.Mixed_6e = _BlockC(160), _BlockC(192)
        self.Mixed_7a, self.Mixed_7b, self.Mixed_7c = _BlockD(), _BlockE(1280, "average"), _BlockE(2048, "max")

    def forward(self, images: Tensor) -> list[Tensor]:
        """Outputs of four stages, 64, 192, 768 and 2048 channels, for images [N, 3, 299, 299] in [-1, 1]."""
        first = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(images)))
        first = F.max_pool2d(first, 3, stride=2)
        second = F.max_pool2d(self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(first)), 3, stride=2)
        third = self.Mixed_6a(self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(second))))
        third = self.Mixed_6e(self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(third))))
        return [first, second, third, self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(third)))]


class InceptionExtractor:
    """Pooled features [N, 2048] and stages of `InceptionV3`.

    Images are rounded to 8 bits, as the PNG files are that papers measure, and resized to 299 x 299 bilinearly without
    antialiasing, as pytorch-fid does (clean-fid, arXiv 2104.11222, resizes otherwise: its figures differ).

    Args:
        network: With its weights.
        device: Where it computes.
    """

    def __init__(self, network: InceptionV3, device: torch.device | str = "cpu"):
        self._network = network.eval().requires_grad_(False).to(device)
        self._device = torch.device(device)

    @torch.no_grad()
    def layers(self, images: Tensor) -> Sequence[Tensor]:
        """Outputs of four stages for images [N, 3, H, W] in [-1, 1]."""
        pixels = as_bytes(images).to(self._device).float() / 255
        resized = F.interpolate(pixels, size=(_SIZE, _SIZE), mode="bilinear", align_corners=False)
        return self._network(2 * resized - 1)

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """Features [N, 2048] of images [N, 3, H, W] in [-1, 1]."""
        return self.layers(images)[-1].mean((2, 3)).cpu()


class TorchmetricsExtractor:
    """torchmetrics' own Inception, which downloads its weights through torch-fidelity the first time.

    Args:
        device: Where it computes.

    Raises:
        ConfigError: torchmetrics or torch-fidelity is not installed.
    """

    def __init__(self, device: torch.device | str = "cpu"):
        try:
            make: Any = import_module("torchmetrics.image.fid").NoTrainInceptionV3
            network: Any = make(name="inception-v3-compat", features_list=[str(NUM_FEATURES)])
        except ImportError as error:
            raise ConfigError(
                f"evaluation.extractors: inception without a source needs torchmetrics and torch-fidelity ({error}). Fix: "
                "pip install 'fraqat[metrics]', or set source to a file of the weights."
            ) from error
        self._network, self._device = network.eval().to(device), torch.device(device)

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """Features [N, 2048] of images [N, 3, H, W] in [-1, 1], taken as 8 bits."""
        return self._network(as_bytes(images).to(self._device)).float().cpu()


def as_bytes(images: Tensor) -> Tensor:
    """Images in [-1, 1] as 0 to 255, rounded; values outside are clipped. uint8."""
    return ((images.float() + 1) * 127.5).clamp(0, 255).round().to(torch.uint8)


def load_inception(path: Path | str) -> InceptionV3:
    """Loads the weights of Inception.

    Args:
        path: `.safetensors`, or a state dict that `torch.save` wrote (`.pth`, `.pt`), read with weights_only=True: code in it
            is never run.

    Returns:
        The network in evaluation mode, float32 on the CPU.

    Raises:
        ModelError: The file is missing or damaged, is a whole model instead of a state dict, or holds other weights.
    """
    file = Path(path)
    if not file.is_file():
        raise ModelError(f"evaluation.extractors: source = {str(path)!r} is no file. Fix: correct the path.")
    state = _read_state(file)
    network = InceptionV3()
    for name in _CLASSIFIER_KEYS:
        state.pop(name, None)
    wanted = {name for name in network.state_dict() if not name.endswith("num_batches_tracked")}
    found = {name for name in state if not name.endswith("num_batches_tracked")}
    if wanted != found:
        example = min(wanted ^ found)
        raise ModelError(
            f"{file} does not hold FID's Inception: {len(wanted - found)} tensors are missing and {len(found - wanted)} are "
            f"others, such as {example}. Fix: use pt_inception-2015-12-05-6726825d.pth of pytorch-fid, or its tensors as "
            "safetensors."
        )
    try:
        network.load_state_dict({name: state[name] for name in found}, strict=False)
    except RuntimeError as error:
        raise ModelError(f"{file} holds tensors of other shapes: {error}. Fix: copy the file again.") from error
    return network.eval()


def _read_state(file: Path) -> dict[str, Tensor]:
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        loaded: Any = torch.load(file, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, SafetensorError, pickle.UnpicklingError) as error:
        raise ModelError(
            f"{file} cannot be read as tensors alone: {str(error).strip().splitlines()[0]}. Fix: give a safetensors file or a "
            "state dict; whole models and TorchScript files are not opened."
        ) from error
    if not isinstance(loaded, dict) or not all(isinstance(value, Tensor) for value in loaded.values()):
        raise ModelError(f"{file} is no state dict. Fix: give a file of name -> tensor.")
    return dict(loaded)
