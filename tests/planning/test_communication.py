"""Laws of the model of what processes send each other; benchmarks/parallel_step.py compares it with real ones."""

from __future__ import annotations

import pytest
from torch import nn

from fraqat.distill import ParallelSpec
from fraqat.planning.communication import Links, Traffic, padded_numel, parameter_groups, step_time, step_traffic


def model() -> nn.Module:
    blocks = nn.ModuleList(nn.Linear(10, 6, bias=False) for _ in range(3))
    return nn.ModuleDict({"blocks": blocks, "head": nn.Linear(6, 5)})


FLOATS = parameter_groups(model())
CODES = parameter_groups(model(), [f"blocks.{i}.weight" for i in range(3)])


def test_groups_are_the_blocks_and_the_rest() -> None:
    assert [group.is_block for group in FLOATS] == [True, True, True, False]
    assert [group.gathered_bytes(1) for group in FLOATS] == [240, 240, 240, 4 * 35]
    assert [group.gathered_bytes(1) for group in CODES] == [6 * 14, 6 * 14, 6 * 14, 4 * 35]


def test_rows_are_filled_up_to_equal_shares() -> None:
    assert padded_numel((6, 10), 4) == 80
    assert padded_numel((6, 10), 3) == 60


@pytest.mark.parametrize(
    ("groups", "parallel", "num", "wanted"),
    [
        (FLOATS, ParallelSpec("ddp"), 1, Traffic()),
        (FLOATS, ParallelSpec("ddp"), 2, Traffic(reduced=4 * 215)),
        (FLOATS, ParallelSpec("fsdp2"), 2, Traffic(gathered=2 * (2 * 720 + 4 * 42), scattered=4 * (180 + 42))),
        (CODES, ParallelSpec("fsdp2", gather="codes"), 2, Traffic(gathered=3 * 84 + 4 * 42, scattered=4 * (180 + 42))),
        (
            CODES,
            ParallelSpec("hybrid", shards=2, gather="codes", reduce="part"),
            4,
            Traffic(gathered=3 * 84 + 4 * 42, scattered=2 * 4 * (180 + 42), reduced=4 * (180 + 42)),
        ),
    ],
)
def test_bytes_of_a_step_of_two_parts(groups, parallel: ParallelSpec, num: int, wanted: Traffic) -> None:
    assert step_traffic(groups, FLOATS, parallel, num, 2) == wanted


def test_a_sharded_teacher_is_gathered_for_every_part() -> None:
    found = step_traffic(FLOATS, FLOATS, ParallelSpec("ddp", teacher="shard"), 2, 3)
    assert found.teacher == 3 * 720


def test_a_step_takes_the_longer_of_computing_and_sending() -> None:
    links = Links(node_size=2, inside_bytes_per_s=1e3, outside_bytes_per_s=1e2)
    traffic = Traffic(gathered=2000, scattered=1000)
    time = step_time(traffic, ParallelSpec("fsdp2"), 2, links, 1.0)
    assert (time.gather_s, time.reduce_s, time.step_s) == (1.0, 0.5, 1.5)
    assert step_time(traffic, ParallelSpec("fsdp2"), 4, links, 1.0).gather_s == pytest.approx(15)
    grouped = step_time(Traffic(2000, 0, 1000, 500), ParallelSpec("hybrid", shards=2), 4, links, 1.0)
    assert grouped.reduce_s == pytest.approx(0.5 + 2 * 0.5 * 500 / 100)
    assert step_time(Traffic(reduced=1000), ParallelSpec("ddp"), 2, links, 0.1).reduce_s == pytest.approx(1.0)
