"""The work of the training benchmarks and the ways to do it: a stack of transformer blocks, and a distillation step on it.

An arm is named `WAY[, lean][, compiled]`. `lean` is what a recipe can set to hold less, the same for every way: the teacher's
weights in int8 (`train.teacher.dtype`), AdamW's state in 8 bits, its update compiled (`train.optimizer`), and blocks that keep
the results of their matrix products alone (`train.activation_checkpointing`).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

LEARNING_RATE = 1e-4


@dataclass(frozen=True)
class Work:
    """What every arm does.

    Args:
        width: of the tokens.
        tokens: per sample.
        batch: samples.
        blocks: of the stack.
        weights: dtype of the student's weights.
        autocast: `bfloat16`, or `none`: everything in the dtype of the weights, the teacher's too.
    """

    width: int
    tokens: int
    batch: int
    blocks: int
    weights: str
    autocast: str = "bfloat16"


class Block(nn.Module):
    """A pre-norm transformer block as in DiT: attention with biases, then a GELU network four times as wide."""

    def __init__(self, width: int):
        super().__init__()
        self.heads = max(1, width // 64)
        self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.to_q, self.to_k, self.to_v = (nn.Linear(width, width) for _ in range(3))
        self.to_out = nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """[N, T, C] to the same."""
        normed = self.norm_1(x)
        q, k, v = (
            layer(normed).unflatten(-1, (self.heads, -1)).transpose(1, 2) for layer in (self.to_q, self.to_k, self.to_v)
        )
        x = x + self.to_out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm_2(x)), approximate="tanh"))


class Stack(nn.Module):
    """Blocks one after the other."""

    def __init__(self, width: int, num_blocks: int):
        super().__init__()
        self.blocks = nn.ModuleList(Block(width) for _ in range(num_blocks))

    def forward(self, x: Tensor) -> Tensor:
        """[N, T, C] to the same."""
        for block in self.blocks:
            x = block(x)
        return x


def build(work: Work) -> nn.Module:
    """The stack, the same weights in every process."""
    torch.manual_seed(0)
    return Stack(work.width, work.blocks).to(getattr(torch, work.weights))


class NaiveFakeQuantLinear(nn.Linear):
    """The straightforward way: both operands rounded in floating point at every call, gradients straight through."""

    def forward(self, input: Tensor) -> Tensor:
        """[..., I] to [..., O]."""
        scale = input.detach().abs().amax(-1, keepdim=True).clamp(min=1e-8) / 127
        x = input + (torch.round(input / scale).clamp(-128, 127) * scale - input).detach()
        scale = self.weight.detach().abs().amax(1, keepdim=True).clamp(min=1e-8) / 7
        weight = self.weight + (torch.round(self.weight / scale).clamp(-8, 7) * scale - self.weight).detach()
        return F.linear(x, weight, self.bias)


@dataclass
class Arm:
    """A student and what surrounds its step."""

    student: nn.Module
    before_update: Callable[[], None] = lambda: None
    after_update: Callable[[], None] = lambda: None


def _plain(model: nn.Module) -> Arm:
    return Arm(model)


def _ours(model: nn.Module, engine: str) -> Arm:
    from fraqat.kernels import EngineName
    from fraqat.nn import EngineSpec, IntegerLayers, quantize_

    quantize_(model)
    if engine == "reference":
        return Arm(model)
    layers = IntegerLayers(model, EngineSpec(EngineName(engine)))
    return Arm(model, layers.finish_gradients_, layers.refresh_)


def _torchao(model: nn.Module) -> Arm:
    from torchao.quantization import quantize_
    from torchao.quantization.qat import IntxFakeQuantizeConfig, QATConfig
    from torchao.quantization.qat.api import QATStep

    activation = IntxFakeQuantizeConfig(torch.int8, "per_token", is_symmetric=False)
    weight = IntxFakeQuantizeConfig(torch.int4, "per_channel")  # pyright: ignore[reportAttributeAccessIssue]
    quantize_(model, QATConfig(activation_config=activation, weight_config=weight, step=QATStep.PREPARE))
    return Arm(model)


def _modelopt(model: nn.Module) -> Arm:
    """Symmetric weights with the scales of the calibration, which is its way; inputs scaled per token at every call."""
    import modelopt.torch.quantization as mtq  # pyright: ignore[reportMissingImports]

    rules: list[dict[str, Any]] = [
        {"quantizer_name": "*", "enable": False},
        {"quantizer_name": "*weight_quantizer", "cfg": {"num_bits": 4, "axis": 0}},
        {"quantizer_name": "*input_quantizer", "cfg": {"num_bits": 8, "axis": (0, 1), "type": "dynamic"}},
    ]
    width = next(model.parameters()).shape[0]
    sample = torch.zeros(1, 1, width, dtype=next(model.parameters()).dtype)
    return Arm(
        mtq.quantize(model, {"quant_cfg": rules, "algorithm": "max"}, forward_loop=lambda called: called(sample))
    )


def _naive(model: nn.Module) -> Arm:
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = NaiveFakeQuantLinear
    return Arm(model)


WAYS: dict[str, Callable[[nn.Module], Arm]] = {
    "plain": _plain,
    "ours": partial(_ours, engine="auto"),
    "ours, reference": partial(_ours, engine="reference"),
    "torchao QAT": _torchao,
    "naive fake quantization": _naive,
    "ModelOpt": _modelopt,
}
NAMES = tuple(
    f"{way}{lean}{mode}"
    for way in WAYS
    for lean in (("", ", lean") if way in ("plain", "ours", "torchao QAT") else ("",))
    for mode in ("", ", compiled")
)


class Training:
    """One arm at work.

    Args:
        name: One of `NAMES`.
        work: What to do.
        device: Where.
    """

    def __init__(self, name: str, work: Work, device: torch.device):
        is_compiled, is_lean = name.endswith(", compiled"), ", lean" in name
        way = name.removesuffix(", compiled").removesuffix(", lean")
        self.work, self.device = work, device
        teacher_dtype = torch.bfloat16 if work.autocast == "bfloat16" else getattr(torch, work.weights)
        teacher = build(work).to(device, teacher_dtype).eval().requires_grad_(False)
        self.arm = WAYS[way](build(work).to(device))
        parameters = list(self.arm.student.parameters())
        if is_lean:
            self._make_lean_(teacher, parameters)
        else:
            self.optimizer: Any = torch.optim.AdamW(parameters, LEARNING_RATE, fused=True)
        self.teacher: Any = torch.compile(teacher) if is_compiled else teacher
        self.student: Any = torch.compile(self.arm.student) if is_compiled else self.arm.student
        generator = torch.Generator(device).manual_seed(1)
        inputs = torch.randn(work.batch, work.tokens, work.width, generator=generator, device=device)
        self.inputs = inputs.to(teacher_dtype)

    def _make_lean_(self, teacher: nn.Module, parameters: list[nn.Parameter]) -> None:
        from fraqat.distill import TrainSpec, checkpoint_blocks_, store_weights_
        from fraqat.distill.optimizers import make_optimizer
        from fraqat.schedules import LearningRateSpec

        store_weights_(teacher, "int8")
        checkpoint_blocks_(self.arm.student)
        rate = LearningRateSpec(peak=LEARNING_RATE)
        spec = TrainSpec(learning_rate=rate, optimizer="adamw_8bit", compile="default", weight_decay=1e-2)
        self.optimizer = make_optimizer(parameters, spec)
        self.optimizer.set_learning_rate_(LEARNING_RATE)

    def step(self) -> float:
        """Teacher, student, backward pass, update; the loss."""
        loss = self._loss()
        loss.backward()
        self.arm.before_update()
        self.optimizer.step()
        for parameter in self.arm.student.parameters():
            parameter.grad = None
        self.arm.after_update()
        return loss.item()

    def _loss(self) -> Tensor:
        with torch.no_grad(), self._autocast():
            target = self.teacher(self.inputs)
        with self._autocast():
            return F.mse_loss(self.student(self.inputs).float(), target.float())

    def _autocast(self) -> AbstractContextManager[Any]:
        return nullcontext() if self.work.autocast == "none" else torch.autocast(self.device.type, torch.bfloat16)
