"""Laws of the chunked KL: the direct formula's value and gradients, in bounded memory."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from fraqat.distill.next_token import logit_chunks, next_token_kl, token_rows

N, L, D, V = 3, 7, 16, 50
CASES = [
    {},
    {"softcap": 2.0},
    {"logit_scale": 0.25},
    {"softcap": 3.0, "logit_scale": 2.0, "head_bias": True},
]


def prediction(seed: int, width: int = D, **options: Any) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    values = {
        "hidden": torch.randn(N, L, width, generator=generator),
        "head": torch.randn(V, width, generator=generator) / 3,
    }
    if options.get("head_bias"):
        values["head_bias"] = torch.randn(V, generator=generator)
    for name in ("softcap", "logit_scale"):
        if name in options:
            values[name] = torch.tensor(options[name], dtype=torch.float64)
    return values


def direct_logits(values: dict[str, Tensor]) -> Tensor:
    logits = F.linear(values["hidden"], values["head"], values.get("head_bias"))
    logits = logits * values.get("logit_scale", torch.ones(()))
    softcap = values.get("softcap")
    return (logits if softcap is None else softcap * torch.tanh(logits / softcap)).flatten(0, 1)


def direct_kl(
    student: dict[str, Tensor], teacher: dict[str, Tensor], mask: Tensor | None, temperature: float
) -> Tensor:
    log_q, log_p = ((direct_logits(values) / temperature).log_softmax(-1) for values in (student, teacher))
    per_token = F.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1)
    weights = torch.ones(N * L) if mask is None else mask.flatten().to(per_token.dtype)
    return temperature**2 * (per_token * weights).sum() / weights.sum()


def with_gradients(values: dict[str, Tensor], dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    return {
        name: value if value.ndim == 0 else value.to(dtype).clone().requires_grad_() for name, value in values.items()
    }


@pytest.mark.parametrize("options", CASES)
@pytest.mark.parametrize("is_masked", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_chunked_kl_equals_the_direct_formula(options: dict[str, Any], is_masked: bool, temperature: float) -> None:
    teacher = prediction(1, width=24, **options)
    mask = (torch.arange(N * L).view(N, L) % 3 != 0).long() if is_masked else None
    exact = with_gradients(prediction(0, **options), torch.float64)
    wanted = direct_kl(exact, {name: value.double() for name, value in teacher.items()}, mask, temperature)
    wanted.backward()
    student = with_gradients(prediction(0, **options))
    found = next_token_kl(student, teacher, mask, temperature=temperature, chunk_tokens=4)
    (3 * found).backward()
    assert found.dtype == torch.float32 and found.ndim == 0
    torch.testing.assert_close(found.double(), wanted, rtol=1e-6, atol=1e-7)
    for name, value in student.items():
        if value.requires_grad:
            assert value.grad is not None and exact[name].grad is not None
            torch.testing.assert_close(value.grad.double(), 3 * exact[name].grad, rtol=1e-5, atol=1e-7)


def test_the_chunk_size_changes_rounding_alone() -> None:
    student, teacher = prediction(0), prediction(1)
    values = [next_token_kl(student, teacher, chunk_tokens=size) for size in (1, 5, N * L, None)]
    for value in values[1:]:
        torch.testing.assert_close(value, values[0], rtol=1e-6, atol=0)


def test_a_distribution_has_no_distance_to_itself() -> None:
    student = with_gradients(prediction(0))
    loss = next_token_kl(student, prediction(0))
    loss.backward()
    assert abs(loss.item()) < 1e-7
    assert student["hidden"].grad is not None and student["hidden"].grad.abs().max() < 1e-7


def test_masked_tokens_change_nothing() -> None:
    mask = torch.ones(N, L, dtype=torch.long)
    mask[:, 5:] = 0
    student, teacher = with_gradients(prediction(0)), prediction(1)
    other = {**teacher, "hidden": teacher["hidden"].clone()}
    other["hidden"][:, 5:] = 99.0
    loss = next_token_kl(student, teacher, mask)
    assert torch.equal(loss, next_token_kl(student, other, mask))
    loss.backward()
    assert student["hidden"].grad is not None
    assert bool((student["hidden"].grad[:, 5:] == 0).all()) and bool((student["hidden"].grad[:, :5] != 0).any())


def test_a_frozen_head_gets_no_gradient_and_no_buffer() -> None:
    student = with_gradients(prediction(0))
    student["head"].requires_grad_(False)
    teacher = prediction(1)
    largest, _ = memory_of(lambda: next_token_kl(student, teacher, chunk_tokens=1).backward(), student, teacher)
    assert student["head"].grad is None
    assert student["hidden"].grad is not None
    assert largest < V * D


def test_autocast_computes_products_in_bfloat16() -> None:
    student, teacher = prediction(0), prediction(1)
    exact = next_token_kl(student, teacher)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = next_token_kl(student, teacher)
    assert rounded.dtype == torch.float32
    assert rounded != exact
    assert rounded.item() == pytest.approx(exact.item(), rel=0.02)


def test_a_second_backward_is_refused() -> None:
    student = with_gradients(prediction(0))
    loss = next_token_kl(student, prediction(1))
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


class _Live(TorchDispatchMode):
    """Numbers held by the tensors that operations made: of the largest one, and the most at any time."""

    def __init__(self, given: Iterable[Tensor]) -> None:
        super().__init__()
        self.largest = self.most = self.now = 0
        self._known = {value.untyped_storage().data_ptr() for value in given}

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        output = function(*arguments, **(options or {}))
        for value in output if isinstance(output, tuple | list) else (output,):
            if isinstance(value, Tensor):
                self._note(value.untyped_storage())
        return output

    def _note(self, storage: torch.UntypedStorage) -> None:
        key, size = storage.data_ptr(), storage.nbytes() // 4
        if key in self._known or not size:
            return
        self._known.add(key)
        self.now += size
        self.largest, self.most = max(self.largest, size), max(self.most, self.now)
        weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


def memory_of(work: Callable[[], object], *given: dict[str, Tensor]) -> tuple[int, int]:
    """Numbers in the largest tensor that `work` makes, and in all that live at once, without those that were given."""
    with _Live(value for values in given for value in values.values()) as live:
        work()
    return live.largest, live.most


def test_memory_is_bounded_by_the_chunk_not_by_the_batch() -> None:
    torch.manual_seed(0)
    tokens, width, vocabulary, chunk = 256, 8, 2000, 8
    student = {
        "hidden": torch.randn(1, tokens, width, requires_grad=True),
        "head": torch.randn(vocabulary, width, requires_grad=True),
    }
    teacher = {"hidden": torch.randn(1, tokens, width), "head": torch.randn(vocabulary, width)}
    largest, most = memory_of(lambda: next_token_kl(student, teacher, chunk_tokens=chunk).backward(), student, teacher)
    assert largest <= vocabulary * max(chunk, width)
    fixed = 3 * vocabulary * width + 3 * tokens * width
    assert most <= fixed + 6 * chunk * vocabulary
    assert most < tokens * vocabulary / 3
    direct, _ = memory_of(lambda: F.linear(student["hidden"], student["head"]).log_softmax(-1).sum(), student)
    assert direct == tokens * vocabulary


def test_logits_of_several_models_come_in_the_same_chunks() -> None:
    student, teacher = prediction(0, softcap=2.0), prediction(1, width=24)
    mask = torch.ones(N, L)
    mask[0, 0] = 0
    rows = token_rows(student, mask)
    parts = list(logit_chunks((student, teacher), rows, chunk_tokens=6))
    assert torch.equal(torch.cat([part for part, _ in parts]), torch.arange(1, N * L))
    for index, values in enumerate((student, teacher)):
        found = torch.cat([logits[index] for _, logits in parts])
        torch.testing.assert_close(found, direct_logits(values)[1:].float())


@pytest.mark.parametrize("is_fake", [False, True])
def test_shapes_alone_are_enough(is_fake: bool) -> None:
    with FakeTensorMode() if is_fake else torch.device("meta"):
        student = {"hidden": torch.empty(N, L, D, requires_grad=True), "head": torch.empty(V, D, requires_grad=True)}
        teacher = {"hidden": torch.empty(N, L, D), "head": torch.empty(V, D), "softcap": torch.tensor(2.0)}
        loss = next_token_kl({**student, "softcap": teacher["softcap"]}, teacher, chunk_tokens=5)
        loss.backward()
    assert loss.shape == () and loss.dtype == torch.float32
    assert student["head"].grad is not None and student["head"].grad.shape == (V, D)
