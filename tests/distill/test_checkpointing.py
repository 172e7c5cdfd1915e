"""Laws of activation checkpointing: the same gradients from fewer bytes."""

from __future__ import annotations

import copy
import gc
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from fraqat.distill import checkpoint_blocks_, repeated_blocks
from fraqat.errors import ConfigError
from fraqat.kernels import EngineName
from fraqat.nn import EngineSpec, IntegerLayers, quantize_
from fraqat.planning.recorder import StepRecorder

WIDTH, NUM_BLOCKS, LENGTH = 64, 3, 32


class Block(nn.Module):
    """Attention to itself and to a context that every block gets, and a network with a gate."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.query, self.key, self.value = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.context = nn.Linear(WIDTH, WIDTH, bias=False)
        self.out, self.up, self.down = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.point = nn.Conv2d(WIDTH, WIDTH, 1)
        self.depthwise = nn.Conv1d(WIDTH, WIDTH, 3, padding=1, groups=WIDTH)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, context: Tensor, *, extra: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        h = self.norm1(x)
        heads = [layer(h).unflatten(-1, (2, -1)).transpose(1, 2) for layer in (self.query, self.key, self.value)]
        y = nn.functional.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2)
        x = x + self.dropout(self.out(y)) + self.context(context)
        a, b = self.up(self.norm2(x) * extra["gate"]).chunk(2, -1)
        x = x + self.down(nn.functional.silu(a) * b)
        y = self.point(self.depthwise(x.transpose(1, 2)).unsqueeze(-1)).squeeze(-1).transpose(1, 2)
        return x + y, context


class Network(nn.Module):
    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(dropout) for _ in range(NUM_BLOCKS)])
        self.head = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        for block in self.blocks:
            x, context = block(x, context, extra={"gate": x.sigmoid()})
        return self.head(x)


def make(engine: EngineName, dropout: float = 0.1) -> tuple[Network, IntegerLayers | None]:
    torch.manual_seed(0)
    model = Network(dropout).train()
    quantize_(model)
    return model, None if engine is EngineName.REFERENCE else IntegerLayers(model, EngineSpec(EngineName.FLOAT32))


def inputs() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return tuple(torch.randn(2, LENGTH, WIDTH, generator=generator) for _ in range(2))  # pyright: ignore[reportReturnType]


def gradients(run: Any, model: nn.Module, autocast: bool = False) -> list[Tensor]:
    x, context = inputs()
    x.requires_grad_(True)
    model.zero_grad()
    torch.manual_seed(2)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = run(x, context)
    y.float().square().sum().backward()
    return [y.detach(), *(tensor.grad.clone() for tensor in (x, *model.parameters()) if tensor.grad is not None)]


def bytes_after_forward(model: nn.Module, autocast: bool) -> int:
    """What a forward pass leaves in memory, whoever keeps it."""
    x, context = inputs()
    gc.collect()
    recorder = StepRecorder()
    with recorder, torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = model(x, context).float().square().sum()
        gc.collect()
        left = recorder.num_bytes()
    loss.backward()
    return left


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("engine", [EngineName.REFERENCE, EngineName.FLOAT32])
def test_gradients_are_the_same_bits(engine: EngineName, autocast: bool) -> None:
    model, _ = make(engine)
    plain = gradients(model, model, autocast)
    undo = checkpoint_blocks_(model)
    thin = gradients(model, model, autocast)
    assert len(plain) == len(thin) > 1 + len(list(model.parameters())) - 1
    assert all(torch.equal(left, right) for left, right in zip(plain, thin, strict=True))
    undo()
    assert not any("forward" in block.__dict__ for block in model.blocks)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("engine", [EngineName.REFERENCE, EngineName.FLOAT32])
def test_a_forward_pass_leaves_fewer_bytes(engine: EngineName, autocast: bool) -> None:
    model, _ = make(engine)
    plain = bytes_after_forward(model, autocast)
    checkpoint_blocks_(model)
    thin = bytes_after_forward(model, autocast)
    # Here the integer path has little else to keep than results of products; docs/memory.md has whole models.
    assert thin < (0.75 if engine is EngineName.REFERENCE else 0.95) * plain, f"{thin / plain:.3f}"


def test_a_block_runs_again_with_the_caller_s_attention() -> None:
    def run(x: Tensor, context: Tensor) -> Tensor:
        with sdpa_kernel(SDPBackend.MATH):
            return model(x, context)

    model, _ = make(EngineName.FLOAT32)
    plain = gradients(run, model)
    checkpoint_blocks_(model)
    assert all(torch.equal(a, b) for a, b in zip(plain, gradients(run, model), strict=True))


def test_training_with_checkpointed_blocks_ends_bitwise_equal(make_distiller) -> None:
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down, self.dropout = nn.Linear(8, 16), nn.Linear(16, 8), nn.Dropout(0.1)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.dropout(self.down(nn.functional.silu(self.up(x))))

    class Chain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([Residual() for _ in range(3)])

        def forward(self, x: Tensor) -> Tensor:
            for block in self.blocks:
                x = block(x)
            return x

    def train(name: str, **options: Any) -> dict[str, Tensor]:
        torch.manual_seed(0)
        teacher = Chain()
        student = copy.deepcopy(teacher)
        quantize_(student)
        given = make_distiller(folder=name, ema_decay=0.5, accumulation=2, **options)
        parts = given.task, teacher, student, given.schedule, given.spec, given.folder
        type(given)(*parts).run()
        assert not any("forward" in block.__dict__ for block in student.blocks)
        return dict(student.named_parameters())

    plain, thin = train("plain"), train("thin", activation_checkpointing="blocks")
    assert all(torch.equal(plain[name], thin[name]) for name in plain)


def count_products(run: Any) -> int:
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def test_no_product_is_computed_twice() -> None:
    model, _ = make(EngineName.REFERENCE)
    plain = count_products(lambda: gradients(model, model))
    checkpoint_blocks_(model)
    assert count_products(lambda: gradients(model, model)) == plain


def test_integer_products_are_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from fraqat.kernels import PreparedWeight

    calls: list[int] = []
    product = PreparedWeight.product
    monkeypatch.setattr(PreparedWeight, "product", lambda *a: calls.append(1) or product(*a))
    model, layers = make(EngineName.FLOAT32)
    checkpoint_blocks_(model)
    gradients(model, model)
    assert layers is not None
    assert len(calls) == layers.num_layers


def test_without_gradients_nothing_is_kept_for_a_second_run() -> None:
    model, _ = make(EngineName.FLOAT32, dropout=0.0)
    with torch.no_grad():
        plain = model(*inputs())
        checkpoint_blocks_(model)
        assert torch.equal(model(*inputs()), plain)


@pytest.mark.filterwarnings("ignore:.*Function'> should not be instantiated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning")  # inductor's own
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_blocks_give_the_gradients_of_eager_ones(backend: str) -> None:
    torch._dynamo.reset()
    model, _ = make(EngineName.FLOAT32, dropout=0.0)
    plain = gradients(model, model)
    checkpoint_blocks_(model)
    thin = gradients(torch.compile(model, backend=backend), model)
    for left, right in zip(plain, thin, strict=True):
        assert torch.allclose(left, right, rtol=1e-3, atol=1e-4)
    torch._dynamo.reset()


def test_blocks_are_the_outermost_lists() -> None:
    model, _ = make(EngineName.REFERENCE)
    assert repeated_blocks(model) == list(model.blocks)


def test_a_model_without_blocks_is_refused(make_distiller) -> None:
    with pytest.raises(ConfigError, match=r"train.activation_checkpointing = 'blocks' .* none for Sequential"):
        make_distiller(activation_checkpointing="blocks").run()
