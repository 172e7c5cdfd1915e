"""Laws of sharded students in a group of one process: what travels, and what is refused."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from parallel_cases import REFERENCE, Blocks
from toy import ToyTask, toy_spec

from fraqat import quantize_
from fraqat.distill import ParallelSpec, TeacherSpec, Workers, hold_teacher_
from fraqat.distill.sharded import ShardedModels
from fraqat.distill.sharding import make_mesh
from fraqat.distill.travel import WeightInCodes
from fraqat.errors import ConfigError
from fraqat.kernels import EngineName
from fraqat.nn import IntegerLayers, LowRankSpec, QuantSpec, WeightSpec
from fraqat.nn.shards import own, whole
from fraqat.schedules import Schedule, ScheduleSpec, Stage

ONE = Workers(0, 1, 1)
CONSTANT = Schedule((Stage(0, 4.0, 0, 9),))


@pytest.fixture(scope="module", autouse=True)
def _group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def make(
    parallel: ParallelSpec, weight: WeightSpec | None = None, schedule: Schedule = CONSTANT, **changes: Any
) -> ShardedModels:
    torch.manual_seed(0)
    teacher, student = Blocks(16).eval().requires_grad_(False), Blocks(16)
    quantize_(student, QuantSpec(weight=weight or WeightSpec()))
    spec = toy_spec(parallel=parallel, autocast="none", **changes)
    hold_teacher_(teacher, student, spec.teacher.dtype)
    integers = None if spec.engine.name is EngineName.REFERENCE else IntegerLayers(student, spec.engine)
    return ShardedModels(ToyTask(), teacher, student, spec, ONE, integers, schedule)


def layer_of(models: ShardedModels) -> Any:
    return models.student.model.blocks[0].inner


def assert_codes_are_those_of_the_weight(models: ShardedModels) -> None:
    layer = layer_of(models)
    models.let_go_()
    codes, scale = layer.weight_quantizer.unchecked_codes(whole(layer.weight))
    assert torch.equal(layer.integer.codes, codes.to(torch.int8))
    assert torch.equal(layer.integer.scale, scale.flatten().expand(len(codes)))


INPUTS = {"x": torch.randn(4, 8, generator=torch.Generator().manual_seed(3))}
GATHERS = [ParallelSpec("fsdp2"), ParallelSpec("fsdp2", gather="codes")]


@pytest.mark.parametrize("weight", [WeightSpec(), WeightSpec(granularity="tensor"), WeightSpec(range_method="mse")])
def test_codes_are_never_older_than_the_rows_that_they_are_made_of(weight: WeightSpec) -> None:
    models = make(ParallelSpec("fsdp2", gather="codes"), weight)
    rows = own(layer_of(models).weight.detach())
    for factor in (1.0, -2.0, 0.5):
        rows.mul_(factor).add_(0.01 * torch.randn(rows.shape))
        models.weights_changed_()
        models.student(INPUTS)["output"].sum().backward()
        assert_codes_are_those_of_the_weight(models)


def test_a_backward_pass_lets_codes_go_without_being_asked() -> None:
    models = make(ParallelSpec("fsdp2", gather="codes"))
    rows = own(layer_of(models).weight.detach())
    for _ in range(2):
        models.student(INPUTS)["output"].sum().backward()
        rows.mul_(-1.5)  # as an optimizer would, and nobody is told
    models.student(INPUTS)
    assert_codes_are_those_of_the_weight(models)


def test_a_layer_refuses_to_compute_with_codes_of_an_older_weight() -> None:
    models = make(ParallelSpec("fsdp2", gather="codes"))
    with torch.no_grad():
        models.student(INPUTS)
    layer_of(models).integer.is_current = False
    with pytest.raises(RuntimeError, match="needs the values of a weight that travels as codes"):
        models.student(INPUTS)
    models.let_go_()


@pytest.mark.parametrize("parallel", GATHERS, ids=["weights", "codes"])
def test_what_a_layer_is_given(parallel: ParallelSpec) -> None:
    models = make(parallel)
    seen: list[Any] = []
    layer_of(models).register_forward_pre_hook(lambda module, args: seen.append(module.weight.data))
    models.student(INPUTS)
    assert isinstance(seen[0], WeightInCodes) is (parallel.gather == "codes")
    assert seen[0].shape == (16, 16)
    assert models.num_as_codes == (6 if parallel.gather == "codes" else 0)


def test_one_gather_serves_all_parts_of_a_batch() -> None:
    models = make(ParallelSpec("fsdp2", gather="codes"))
    transit: Any = layer_of(models).weight._local_tensor
    count, inner = [], transit.fsdp_pre_all_gather

    def counted(mesh):
        count.append(1)
        return inner(mesh)

    transit.fsdp_pre_all_gather = counted
    for is_last in (False, False, True):
        with models.part(is_last=is_last):
            models.student(INPUTS)["output"].sum().backward()
    assert len(count) == 1


@pytest.mark.parametrize("dtype", ["model", "bfloat16", "int8"])
def test_a_sharded_teacher_predicts_the_same(dtype: Any) -> None:
    kept, sharded = (
        make(ParallelSpec("fsdp2", teacher=teacher), teacher=TeacherSpec(dtype)) for teacher in ("replicate", "shard")
    )
    with torch.no_grad():
        assert torch.equal(sharded.teacher(INPUTS)["output"], kept.teacher(INPUTS)["output"])
    assert all(hasattr(p, "to_local") for p in sharded.teacher.model.blocks.parameters())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"engine": REFERENCE}, "weights where train.engine.name is reference"),
        ({"schedule": Schedule((Stage(0, 16.0, 0, 9),))}, "weights where a stage is wider than 8 bits"),
        ({"schedule": ScheduleSpec("fractional", grid="final").resolve(4.0, 9)}, "weights with schedule.grid: final"),
        ({"low_rank": LowRankSpec()}, "weights with train.low_rank"),
    ],
)
def test_weights_without_codes_cannot_travel_as_codes(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=f"train.parallel.gather = 'codes' is not possible: allowed is {message}"):
        make(ParallelSpec("fsdp2", gather="codes"), **changes)


def test_settings_that_sharded_models_do_not_have_are_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"train\.compile = 'default' .* none or blocks with .* set train\.compile: blocks"
    ):
        make(ParallelSpec("fsdp2"), compile="default")
    weight = WeightSpec(granularity="tensor", range_method="three_sigma")
    with pytest.raises(ConfigError, match=r"ddp where one scale of a whole weight is found by three_sigma \(enter\)"):
        make(ParallelSpec("fsdp2"), weight)
    with pytest.raises(ConfigError, match=r"train\.parallel\.shards = 2 .* a divisor of the 3 processes"):
        make_mesh(ParallelSpec("hybrid", shards=2), Workers(0, 3, 3), torch.device("cpu"))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"mode": "fsdp"}, r"train\.parallel\.mode = 'fsdp' .* none, ddp, fsdp2, hybrid"),
        ({"mode": "ddp", "gather": "codes"}, r"train\.parallel\.gather = 'codes' .* weights without fsdp2 or hybrid"),
        ({"mode": "ddp", "reduce": "part"}, r"train\.parallel\.reduce = 'part' .* batch without fsdp2 or hybrid"),
        ({"teacher": "shard"}, r"train\.parallel\.teacher = 'shard' .* replicate in one process"),
        ({"mode": "fsdp2", "shards": 2}, r"train\.parallel\.shards = 2 .* null without hybrid"),
        ({"mode": "hybrid", "shards": 0}, r"train\.parallel\.shards = 0 .* 1 or more"),
        ({"timeout_s": 0}, r"train\.parallel\.timeout_s = 0 .* more than 0 seconds"),
    ],
)
def test_impossible_settings_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ParallelSpec(**values)


def test_rows_are_written_by_one_replica_alone(tmp_path: Path) -> None:
    from fraqat.distill.checkpoint_files import Rows, snapshot

    rows = torch.ones(2, 3)
    assert snapshot({"w": Rows(rows, (4, 3), 2)}).tensors.keys() == {"w"}
    assert not snapshot({"w": Rows(rows, (4, 3), 2, is_copy=True)}).tensors
