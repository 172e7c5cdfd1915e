"""Laws of `train.compile: blocks`: one graph for equal blocks and all widths, whole or sharded, trains as eager ones do."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import parallel_cases
import pytest
import torch
import torch.distributed as dist
from parallel_cases import Blocks, Job, count_graphs, job_folder, losses, spawn, train_case
from safetensors.torch import load_file
from torch import Tensor, nn
from toy import ToyTask, toy_spec

from fraqat import quantize_, set_bits_
from fraqat.distill import ParallelSpec, TrainSpec, Workers, compiling
from fraqat.distill.compiling import compile_blocks_
from fraqat.distill.sharded import ShardedModels
from fraqat.distill.travel import WeightInCodes
from fraqat.errors import ConfigError
from fraqat.nn import IntegerLayers, QuantSpec, WeightSpec
from fraqat.schedules import Schedule, Stage

pytestmark = [
    # torch._dynamo instantiates torch.autograd.Function itself and warns about it.
    pytest.mark.filterwarnings("ignore:.*Function'> should not be instantiated:DeprecationWarning"),
    pytest.mark.filterwarnings(
        "ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"
    ),  # read by dynamo
    pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning"),  # inductor's own
    pytest.mark.xdist_group("parallel"),
]
TABLE_4 = (8, 7, 6, 5.5, 5, 4.75, 4.5, 4.25, 4)
GATHERS = ["weights", "codes"]
INDUCTOR_BOUND = 1e-5
"""Of a gradient's difference, of its largest magnitude: fused sums have another order."""


@pytest.fixture(autouse=True)
def _fresh_dynamo(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(compiling, "BACKEND", compiling.BACKEND)  # put back
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture(scope="module")
def group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


class Line(nn.Module):
    """A block that inductor compiles soon."""

    def __init__(self, hidden: int):
        super().__init__()
        self.inner = nn.Linear(hidden, hidden)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(x).relu()


def make(gather: Any, compile_mode: Any, method: str = "max_abs") -> tuple[ShardedModels, IntegerLayers]:
    torch.manual_seed(0)
    teacher, student = Blocks(16).eval().requires_grad_(False), Blocks(16)
    quantize_(student, QuantSpec(weight=WeightSpec(range_method=method)))
    spec = toy_spec(parallel=ParallelSpec("fsdp2", gather=gather), compile=compile_mode)
    integers = IntegerLayers(student, spec.engine)
    schedule = Schedule((Stage(0, 8.0, 0, 9),))
    models = ShardedModels(ToyTask(), teacher, student, spec, Workers(0, 1, 1), integers, schedule)
    models.compile_blocks_()
    return models, integers


def train(
    models: ShardedModels, integers: IntegerLayers, widths: tuple[float, ...] = TABLE_4
) -> list[dict[str, Tensor | None]]:
    """The output and every gradient of two parts of a step, at every width."""
    optimizer = torch.optim.SGD(models.trained_parameters().values(), lr=0.1)
    x = torch.randn(2, 4, 8, generator=torch.Generator().manual_seed(3))
    steps: list[dict[str, Tensor | None]] = []
    torch.manual_seed(1)  # of dropout
    for bits in widths:
        set_bits_(models.student.model, bits)
        models.weights_changed_()
        integers.refresh_()
        found: dict[str, Tensor | None] = {}
        for part in range(2):
            with models.part(is_last=part == 1):
                output = models.student({"x": x[part]})["output"]
                output.square().mean().backward()
            found[f"output {part}"] = output.detach()
        integers.finish_gradients_()
        models.collect_gradients_()
        gradients = {name: p.grad for name, p in models.trained_parameters().items()}
        steps.append(found | {name: g if g is None else g.clone() for name, g in gradients.items()})
        optimizer.step()
        models.zero_grad_()
    return steps


class _KeepsShape(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.shape = weight.shape
        return 2 * x

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        return 2 * gradients[0], gradients[0].sum() * torch.ones(ctx.shape)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_weight_in_codes_has_its_gradient_from_a_graph(backend: str) -> None:
    """A class with `__torch_dispatch__` that cannot be taken apart is no tensor to dynamo, and its gradient None."""
    weight = nn.Parameter(WeightInCodes(torch.Size((3, 5)), torch.empty(0)))
    x = torch.ones(4, requires_grad=True)
    run: Any = torch.compile(lambda x, weight: _KeepsShape.apply(x, weight).sum(), backend=backend, fullgraph=True)
    run(x, weight).backward()
    assert weight.grad is not None and torch.equal(weight.grad, 4 * torch.ones(3, 5))


@pytest.mark.usefixtures("group")
@pytest.mark.parametrize("gather", GATHERS)
def test_one_graph_trains_sharded_blocks_at_every_width(gather: str) -> None:
    wanted = train(*make(gather, "none", "learned"))
    graphs = count_graphs("aot_eager")
    found = train(*make(gather, "blocks", "learned"))
    for ours, theirs in zip(found, wanted, strict=True):
        assert ours.keys() == theirs.keys()
        for name, value in theirs.items():
            assert value is not None and torch.equal(ours[name], value), name
    assert graphs.frame_count == 1


@pytest.mark.compiled
@pytest.mark.usefixtures("group")
def test_inductor_gives_the_gradients_of_eager_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parallel_cases, "Block", Line)
    (wanted,) = train(*make("codes", "none"), widths=(4,))
    graphs = count_graphs("inductor")
    (found,) = train(*make("codes", "blocks"), widths=(4,))
    for name, value in wanted.items():
        ours = found[name]
        assert value is not None and ours is not None
        assert (ours - value).abs().max() <= INDUCTOR_BOUND * value.abs().max(), name
    assert graphs.frame_count == 1


COMPILED = {"compile": "blocks", "backend": "aot_eager"}
TWO_PROCESSES: list[Job] = [
    ("learned", {"mode": "fsdp2", "gather": "codes", "teacher": "shard"}, COMPILED),
    ("plain", {"mode": "hybrid", "shards": 1}, {**COMPILED, "activation_checkpointing": "blocks"}),
]


@pytest.mark.compiled
def test_two_processes_with_compiled_blocks_train_what_one_trains_without(tmp_path: Path) -> None:
    spawn(2, tmp_path, TWO_PROCESSES)
    for job in TWO_PROCESSES:
        wanted = train_case(job[0], tmp_path / job[0], ParallelSpec())
        folder = tmp_path / job_folder(*job)
        assert losses(folder) == losses(tmp_path / job[0])
        for rank in range(2):
            found = load_file(folder / f"rank{rank}.safetensors")
            assert found.keys() == wanted.keys()
            assert all(torch.equal(found[name], value) for name, value in wanted.items())
            # One trains the student at all widths, two validate it (its first block is given a view), two are the teacher's.
            assert json.loads((folder / f"graphs{rank}.json").read_text()) == 5


def test_blocks_of_one_process_are_compiled_while_it_trains(tmp_path: Path) -> None:
    wanted = train_case("plain", tmp_path / "plain", ParallelSpec())
    graphs = count_graphs("eager")
    distiller = parallel_cases.make_case(tmp_path / "compiled", ParallelSpec(), compile="blocks")
    result = distiller.run()
    assert graphs.frame_count == 5
    assert torch.tensor(result.validation_loss, dtype=torch.float64).equal(wanted["validation"])
    assert not any("forward" in module.__dict__ for module in distiller.student.modules())


def test_blocks_that_are_built_alike_share_a_graph() -> None:
    class Several(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.narrow = nn.ModuleList(Line(8) for _ in range(3))
            self.wide = nn.ModuleList(Line(16) for _ in range(2))

        def forward(self, x: Tensor) -> Tensor:
            for block in (*self.narrow, nn.Flatten(0), *self.wide):
                x = block(x)
            return x

    model, graphs = Several(), count_graphs("eager")
    x = torch.randn(2, 8, requires_grad=True)
    wanted = model(x)
    undo = compile_blocks_(model)
    assert torch.equal(model(x), wanted) and graphs.frame_count == 2
    undo()
    assert torch.equal(model(x), wanted) and not any("forward" in m.__dict__ for m in model.modules())


def test_a_model_without_blocks_is_refused(make_distiller: Any) -> None:
    with pytest.raises(ConfigError, match=r"train\.compile = 'blocks' .* none or default for Sequential"):
        make_distiller(compile="blocks")


def test_another_value_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"train\.compile = 'all' .* none, default, blocks, cuda_graphs"):
        TrainSpec(compile="all")
