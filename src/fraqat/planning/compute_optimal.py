"""How long to train with quantization, and at which width, by the law of compute-optimal QAT (arXiv 2509.22935).

The law was fitted to language models of 86 M to 2.2 B parameters that were trained on text from nothing and finished at 1 to 6
bits. Here a finished model is distilled into its quantized copy, so what it says is a first guess and its outputs name that.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fraqat.errors import config_error
from fraqat.nn import quantized_layers
from fraqat.planning.devices import DeviceKind
from fraqat.planning.fake import TraceRules, fake_batch, new_fake_mode, to_fake
from fraqat.planning.result_size import packed_size
from fraqat.planning.step import Workload
from fraqat.table import Table

SHARE_CONSTANT = 6.7297
"""a of the law; its mean absolute error on the authors' runs is 0.091."""

FITTED_PARAMETERS = (86e6, 2.2e9)
FITTED_BITS = (1.0, 6.0)
WIDTHS = (2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0)
"""Widths that are tried for a memory budget."""

_GIB = 2**30
_ORIGIN = (
    "share = exp(log S - 6.7297 / log S) / S with S tokens per byte of weights (arXiv 2509.22935, mean absolute error 0.091): "
    "fitted to language models of 86 M to 2.2 B parameters trained from nothing, 1 to 6 bits. This run distils a finished "
    "model, so take it as a first guess and try short runs (--pilot)"
)


def tokens_per_byte(num_tokens: float, num_weights: int, bits: float) -> float:
    """S = D / (N B / 8).

    Args:
        num_tokens: D, tokens seen in training, greater than 0.
        num_weights: N, weights that are quantized.
        bits: B, width of a weight.
    """
    return num_tokens / (num_weights * bits / 8)


def optimal_share(total_tokens_per_byte: float) -> float:
    """Share of all training tokens, before and with quantization, that is best spent with quantization.

    f = exp(log S - a / log S) / S = exp(-a / log S), natural logarithms, a = 6.7297 (arXiv 2509.22935).

    Args:
        total_tokens_per_byte: S of the whole training, greater than 1.

    Raises:
        ConfigError: One token per byte or fewer, where the law is not defined.
    """
    if not total_tokens_per_byte > 1:
        raise config_error(
            "total_tokens_per_byte",
            total_tokens_per_byte,
            allowed="more than 1: below that the law is not defined",
            fix="give more tokens or a smaller model",
        )
    return math.exp(-SHARE_CONSTANT / math.log(total_tokens_per_byte))


def optimal_tokens(pretraining_tokens: float, num_weights: int, bits: float) -> float:
    """Tokens of the quantized phase after which it has the optimal share of all tokens.

    Solves D_qat = f(S) (D_fp + D_qat) with S = (D_fp + D_qat) / (N B / 8), which is S (1 - f(S)) = D_fp / (N B / 8); the left
    side grows with S.

    Args:
        pretraining_tokens: D_fp, tokens that the finished model was trained on.
        num_weights: N, weights that are quantized.
        bits: B, width at the end.

    Raises:
        ConfigError: Fewer than one token of pre-training per byte of the quantized weights.
    """
    before = tokens_per_byte(pretraining_tokens, num_weights, bits)
    if not 1 < before < math.inf:
        raise config_error(
            "--pretraining-tokens",
            pretraining_tokens,
            allowed=f"more than {num_weights * bits / 8:g}, one per byte of the weights at {bits:g} bits",
            fix="give the tokens that the original model was trained on",
        )
    low, high = before, 2 * before
    while high * (1 - optimal_share(high)) < before:
        high *= 2
    for _ in range(200):
        middle = (low + high) / 2
        is_below = middle * (1 - optimal_share(middle)) < before
        low, high = (middle, high) if is_below else (low, middle)
    return (low - before) * num_weights * bits / 8


@torch.no_grad()
def tokens_per_sample(workload: Workload, kind: DeviceKind = DeviceKind.CPU) -> float:
    """Positions of one sample that the average quantized weight multiplies, from one forward pass without values.

    A linear layer multiplies each weight once for every position. A text of n tokens has n; a picture has its patches, with
    layers on the prompt and on the time step counted at their own numbers. So 2 N D is the arithmetic of a forward pass, as
    in a language model.

    Args:
        workload: The quantized student on the meta device, and how it is called.
        kind: Decides how attention is traced; it changes nothing in the result.
    """
    num_samples = 2
    mode = new_fake_mode()
    student = to_fake(workload.student, mode).eval()
    products = 0

    def count(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal products
        weight = layer.weight
        assert isinstance(weight, Tensor)
        products += output.numel() * weight[0].numel()

    layers = [layer for _, layer in quantized_layers(student)]
    handles = [layer.register_forward_hook(count) for layer in layers]
    with mode, TraceRules(kind):
        workload.predict(student, fake_batch(workload.make_inputs(num_samples), mode))
    for handle in handles:
        handle.remove()
    return products / num_samples / sum(layer.weight.numel() for layer in layers)


@dataclass(frozen=True)
class WidthPlan:
    """What the law says for one width of the weights.

    Args:
        bits: Of every layer that no rule keeps above it.
        num_bytes: Size of the exported model.
        share: Of all tokens to spend with quantization; None without the tokens of pre-training.
        num_tokens: Tokens of the quantized phase; None likewise.
        num_steps: The same in optimizer steps of the recipe's batch; None likewise.
    """

    bits: float
    num_bytes: int
    share: float | None
    num_tokens: float | None
    num_steps: int | None


@dataclass(frozen=True)
class ComputeOptimal:
    """Predicted length of the quantized phase and width for a memory budget.

    Args:
        widths: In rising order; the recipe's own is among them.
        recipe_bits: Width of the recipe.
        num_weights: Quantized weights.
        tokens_per_step: Of the recipe's batch.
        run_tokens: Of the recipe's whole run.
        memory_budget_bytes: Of the exported model; None without one.
    """

    widths: tuple[WidthPlan, ...]
    recipe_bits: float
    num_weights: int
    tokens_per_step: float
    run_tokens: float
    memory_budget_bytes: int | None

    @property
    def chosen(self) -> WidthPlan | None:
        """The widest that fits the budget; None if none does or there is no budget.

        For a given model every term of the law falls with the width, at equal tokens and at the tokens that it calls optimal,
        so the widest is the best one. Whether a smaller model with wider weights would be better needs the law's
        coefficients for this kind of model.
        """
        budget = self.memory_budget_bytes
        if budget is None:
            return None
        return max((plan for plan in self.widths if plan.num_bytes <= budget), key=lambda p: p.bits, default=None)

    def to_table(self) -> Table:
        """A row for every width."""
        rows = [
            (
                plan.bits,
                plan.num_bytes / _GIB,
                None if self.memory_budget_bytes is None else plan.num_bytes <= self.memory_budget_bytes,
                tokens_per_byte(self.run_tokens, self.num_weights, plan.bits),
                plan.share,
                plan.num_tokens,
                plan.num_steps,
            )
            for plan in self.widths
        ]
        columns = ("bits", "result, GiB", "fits", "run, tokens per byte", "best share", "best tokens", "best steps")
        return Table("Compute-optimal", columns, tuple(rows), tuple(self._notes()))

    def _notes(self) -> list[str]:
        step = f"{self.tokens_per_step:.4g} tokens a step, {self.run_tokens:.4g} in this run"
        notes = [f"{step}; a token is a position that the average quantized weight multiplies"]
        if self.memory_budget_bytes is not None:
            budget = f"{self.memory_budget_bytes / _GIB:.4g} GiB"
            found = self.chosen
            if found is not None:
                notes.append(f"widest within {budget}: {found.bits:g} bits, which the law prefers for a given model")
            else:
                notes.append(f"no width fits {budget}: choose a smaller model")
        if any(plan.share is not None for plan in self.widths):
            notes.append(_ORIGIN)
            notes += self._outside()
        return notes

    def _outside(self) -> list[str]:
        """Where the run lies outside of what the law was fitted to."""
        low, high = FITTED_PARAMETERS
        lines: list[str] = []
        if not low <= self.num_weights <= high:
            lines.append(
                f"{self.num_weights:,} quantized weights are outside of the {low:.2g} to {high:.2g} it was fitted to"
            )
        if any(plan.bits > FITTED_BITS[1] for plan in self.widths if plan.share is not None):
            lines.append(f"widths above {FITTED_BITS[1]:g} bits are outside of what it was fitted to")
        return lines


def compute_optimal(
    workload: Workload,
    batch_size: int,
    total_steps: int,
    *,
    pretraining_tokens: float | None = None,
    memory_budget_bytes: int | None = None,
    float_dtype: torch.dtype = torch.float32,
    widths: Sequence[float] = WIDTHS,
) -> ComputeOptimal:
    """What the law says about a run.

    Args:
        workload: The quantized student on the meta device, and how it is called.
        batch_size: Samples per optimizer step.
        total_steps: Of the run.
        pretraining_tokens: That the original model was trained on; None leaves share and length out.
        memory_budget_bytes: For the exported model; None leaves the choice out.
        float_dtype: Precision of what stays unquantized in the exported file.
        widths: To compare with the recipe's own.

    Raises:
        ConfigError: A budget that is not positive, or see `optimal_tokens`.
    """
    if memory_budget_bytes is not None and memory_budget_bytes <= 0:
        raise config_error("--memory-budget", memory_budget_bytes, allowed="more than 0 bytes", fix="give it in GiB")
    student = workload.student
    own_bits = min(layer.weight_quantizer.spec.bits for _, layer in quantized_layers(student))
    num_weights = packed_size(student, float_dtype).num_quantized_weights
    tokens_per_step = batch_size * tokens_per_sample(workload)

    def plan(bits: float) -> WidthPlan:
        num_bytes = packed_size(student, float_dtype, bits=bits).num_bytes
        if pretraining_tokens is None:
            return WidthPlan(bits, num_bytes, None, None, None)
        tokens = optimal_tokens(pretraining_tokens, num_weights, bits)
        share = tokens / (tokens + pretraining_tokens)
        return WidthPlan(bits, num_bytes, share, tokens, math.ceil(tokens / tokens_per_step))

    return ComputeOptimal(
        widths=tuple(plan(bits) for bits in sorted({*widths, own_bits})),
        recipe_bits=own_bits,
        num_weights=num_weights,
        tokens_per_step=tokens_per_step,
        run_tokens=tokens_per_step * total_steps,
        memory_budget_bytes=memory_budget_bytes,
    )
