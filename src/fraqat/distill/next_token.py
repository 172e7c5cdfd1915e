"""Next-token distributions from hidden states, in chunks of tokens: the logits of a whole batch are never in memory.

Shape suffixes: T tokens, D hidden width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fraqat.distill.task import Prediction

HIDDEN, HEAD, HEAD_BIAS, LOGIT_SCALE, SOFTCAP = "hidden", "head", "head_bias", "logit_scale", "softcap"
"""Names in a language model's prediction: hidden states [N, L, D], weight [V, D] and bias [V] of the head, and two numbers on
the CPU that not every model has: a factor of the logits, and the c of c tanh(logits / c)."""

_CHUNK_ELEMENTS = 2**26


@dataclass(frozen=True)
class _Head:
    """What makes logits out of hidden states."""

    weight: Tensor  # [V, D], in `dtype`
    bias: Tensor | None
    scale: Tensor | None
    softcap: Tensor | None
    dtype: torch.dtype

    @classmethod
    def of(cls, prediction: Prediction) -> _Head:
        weight, hidden = prediction[HEAD], prediction[HIDDEN]
        dtype = torch.promote_types(weight.dtype, hidden.dtype)
        if not weight.is_meta and torch.is_autocast_enabled(weight.device.type):
            dtype = torch.get_autocast_dtype(weight.device.type)
        return cls(
            weight=weight.detach().to(dtype),
            bias=None if HEAD_BIAS not in prediction else prediction[HEAD_BIAS].detach().float(),
            scale=prediction.get(LOGIT_SCALE),
            softcap=prediction.get(SOFTCAP),
            dtype=dtype,
        )

    def logits(self, hidden_TD: Tensor) -> Tensor:
        """Float32 logits [T, V]."""
        with _without_autocast(hidden_TD.device):
            logits_TV = (hidden_TD.to(self.dtype) @ self.weight.T).float()
        if self.bias is not None:
            logits_TV += self.bias
        if self.scale is not None:
            logits_TV *= self.scale
        if self.softcap is not None:
            logits_TV.div_(self.softcap).tanh_().mul_(self.softcap)
        return logits_TV

    def product_gradient_(self, gradient_TV: Tensor, logits_TV: Tensor) -> Tensor:
        """Gradient with respect to hidden @ weight^T + bias, from the one with respect to `logits`; changes both arguments."""
        if self.softcap is not None:
            gradient_TV *= logits_TV.div_(self.softcap).square_().neg_().add_(1)
        return gradient_TV if self.scale is None else gradient_TV.mul_(self.scale)


def token_rows(prediction: Prediction, mask: Tensor | None) -> Tensor:
    """Places of the tokens that count, in the flattened hidden states; all of them without a mask [N, L]."""
    hidden = prediction[HIDDEN]
    if mask is None:
        return torch.arange(hidden.shape[:-1].numel(), device=hidden.device)
    return mask.to(hidden.device).flatten().nonzero().squeeze(1)


def logit_chunks(
    predictions: tuple[Prediction, ...], rows_T: Tensor, chunk_tokens: int | None = None
) -> Iterator[tuple[Tensor, tuple[Tensor, ...]]]:
    """Float32 logits of some tokens by several models, a chunk at a time and without gradient.

    Args:
        predictions: One of each model, on the same inputs.
        rows_T: Places in the flattened hidden states.
        chunk_tokens: Tokens per chunk; None takes 2^26 logits.

    Yields:
        The chunk's part of `rows_T`, and the logits [chunk, V] of each model.
    """
    heads = [_Head.of(prediction) for prediction in predictions]
    hidden = [prediction[HIDDEN].detach().flatten(0, -2) for prediction in predictions]
    for part in rows_T.split(chunk_tokens or default_chunk(heads[0].weight)):
        yield part, tuple(head.logits(states[part]) for head, states in zip(heads, hidden, strict=True))


def default_chunk(weight_VD: Tensor) -> int:
    """Tokens whose logits are 2^26 numbers, at least one."""
    return max(1, _CHUNK_ELEMENTS // len(weight_VD))


def next_token_kl(
    student: Prediction,
    teacher: Prediction,
    mask: Tensor | None = None,
    *,
    temperature: float = 1.0,
    chunk_tokens: int | None = None,
) -> Tensor:
    """T^2 KL(softmax(z_teacher / T) || softmax(z_student / T)), the mean over the tokens of the mask, 0-dim float32.

    Logits of the two models exist for one chunk of tokens at a time. The gradient of a chunk is taken while its logits are
    there, so that nothing is computed twice and nothing of the vocabulary's size is kept but the gradient of the head, if it is
    trained.

    Args:
        student: With gradient.
        teacher: Without; its hidden width may differ from the student's.
        mask: [N, L], zero where a token does not count.
        temperature: T; the factor T^2 keeps the gradient's size (Hinton, Vinyals and Dean, 2015).
        chunk_tokens: Tokens per chunk; None takes 2^26 logits.

    Gradient:
        To hidden states, weight and bias of the student; not twice differentiable.

    Numerics:
        Matrix products in the dtype of autocast, otherwise in that of the operands; everything else in float32.
    """
    return _ChunkedKl.apply(
        student[HIDDEN],
        student[HEAD],
        student.get(HEAD_BIAS),
        _Job(
            _Head.of(student),
            _Head.of(teacher),
            teacher[HIDDEN].detach().flatten(0, -2),
            token_rows(student, mask),
            temperature,
            chunk_tokens or default_chunk(student[HEAD]),
            torch.is_grad_enabled(),
        ),
    )


@dataclass(frozen=True)
class _Job:
    """What is constant for one call of `next_token_kl`."""

    student: _Head
    teacher: _Head
    teacher_hidden: Tensor  # [T, D]
    rows: Tensor
    temperature: float
    chunk_tokens: int
    wants_gradient: bool


@dataclass(frozen=True)
class _Gradients:
    """Sums of gradients over the chunks, None where none is wanted."""

    hidden: Tensor | None  # [T, D]
    weight: Tensor | None
    bias: Tensor | None


class _ChunkedKl(torch.autograd.Function):
    """Computes loss and gradient together, a chunk at a time."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight_VD: Tensor, bias_V: Tensor | None, job: _Job) -> Tensor:
        wanted = [job.wants_gradient and needed for needed in ctx.needs_input_grad[:3]]
        flat_TD = hidden.flatten(0, -2)
        gradients = _Gradients(
            torch.zeros_like(flat_TD) if wanted[0] else None,
            torch.zeros_like(weight_VD) if wanted[1] else None,
            torch.zeros_like(bias_V) if wanted[2] and bias_V is not None else None,
        )
        total = torch.zeros((), dtype=torch.float64, device=hidden.device)
        for rows in job.rows.split(job.chunk_tokens):
            total += _kl_of_chunk(job, rows, flat_TD[rows], gradients)
        ctx.factor = job.temperature**2 / max(1, len(job.rows))
        ctx.shape = hidden.shape
        ctx.save_for_backward(gradients.hidden, gradients.weight, gradients.bias)
        return (total * ctx.factor).float()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grad_outputs: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        hidden_TD, weight_VD, bias_V = ctx.saved_tensors
        factor = grad_outputs[0] * ctx.factor
        hidden = None if hidden_TD is None else (hidden_TD * factor.to(hidden_TD.dtype)).view(ctx.shape)
        others = (None if value is None else value.mul_(factor.to(value.dtype)) for value in (weight_VD, bias_V))
        return hidden, *others, None


def _kl_of_chunk(job: _Job, rows: Tensor, hidden_TD: Tensor, gradients: _Gradients) -> Tensor:
    """Sum of KL over a chunk of tokens in float64; its gradients are added to `gradients`."""
    student_TV = job.student.logits(hidden_TD)
    log_q_TV = torch.log_softmax(student_TV / job.temperature, -1)
    log_p_TV = torch.log_softmax(job.teacher.logits(job.teacher_hidden[rows]) / job.temperature, -1)
    p_TV = log_p_TV.exp()
    total = log_p_TV.sub_(log_q_TV).mul_(p_TV).sum(dtype=torch.float64)
    if all(value is None for value in (gradients.hidden, gradients.weight, gradients.bias)):
        return total
    gradient_TV = log_q_TV.exp_().sub_(p_TV).div_(job.temperature)
    gradient_TV = job.student.product_gradient_(gradient_TV, student_TV)
    if gradients.bias is not None:
        gradients.bias.add_(gradient_TV.sum(0).to(gradients.bias.dtype))
    product_TV = gradient_TV.to(job.student.dtype)
    with _without_autocast(hidden_TD.device):
        if gradients.hidden is not None:
            gradients.hidden[rows] = (product_TV @ job.student.weight).to(gradients.hidden.dtype)
        if gradients.weight is not None:
            part_VD = product_TV.T @ hidden_TD.to(job.student.dtype)
            gradients.weight.add_(part_VD.to(gradients.weight.dtype))
    return total


def _without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    return nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)
