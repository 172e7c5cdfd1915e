"""The table of targets times what the targets' own writers wrote, and nothing that computes something else."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from onnx_latency import Block
from target_arms import ARMS, BASE, PYTORCH, Arm, Made, NotRunError, bound_of, compare
from target_latency import measure_block, to_table, write_table

pytestmark = pytest.mark.xdist_group("target-latency")  # one worker exports for all
TINY = Block("Sana tiny", "sana-600m-tiny", 128, {"num_layers": 1})
NEVER = {"executorch-xnnpack, bf16", "executorch-xnnpack, W4A16"}
CHOSEN = (BASE, "PyTorch, bf16", "packed, W4A8 per token", "onnx, W4A8 static", "torchao, W4A8 per token")
TRIED = tuple(arm for arm in ARMS if arm.name in CHOSEN or arm.target == "executorch-xnnpack")
"""Every way to write and to load once; tracing a graph takes seconds."""


@pytest.fixture(scope="module")
def record() -> dict[str, Any]:
    return measure_block(TINY, tokens=64, rounds=1, arms=TRIED, say=lambda _: None)


def test_every_arm_is_timed_or_says_why_not(record: dict[str, Any]) -> None:
    has_executorch = importlib.util.find_spec("executorch") is not None
    assert list(record["arms"]) == [arm.name for arm in TRIED]
    for arm in TRIED:
        found = record["arms"][arm.name]
        if arm.name in NEVER or (arm.target == "executorch-xnnpack" and not has_executorch):
            assert found["reason"]
            continue
        assert len(found["ratios"]) == 1 and found["ratios"][0] > 0, found
        assert found["student_db"] is None or found["student_db"] >= bound_of(arm)
        assert (found["num_layers"] > 0) == arm.width.startswith("W4")


def test_files_of_four_bits_are_smaller(record: dict[str, Any]) -> None:
    size = {name: found["num_bytes"] for name, found in record["arms"].items() if "num_bytes" in found}
    assert size["PyTorch, bf16"] < 0.6 * size[BASE]
    assert size["packed, W4A8 per token"] < 0.3 * size[BASE]
    assert size["onnx, W4A8 static"] < size["PyTorch, bf16"]


def test_the_page_has_a_row_for_every_arm(record: dict[str, Any], tmp_path: Path) -> None:
    rows = [line for line in to_table(record) if line.startswith("| ")][1:]
    assert len(rows) == 1 + len(ARMS)
    assert f"| {PYTORCH} | float32 | 1.000 | 1.00 to 1.00 | 1.000 | 1.000 | 1.000 | equal | equal |" in rows
    assert sum("left out of this run" in row for row in rows) == len(ARMS) - len(TRIED)
    path = tmp_path / "found.jsonl"
    path.write_text(json.dumps(record) + "\n" + json.dumps(record | {"rounds": 7}) + "\n")
    write_table(path)
    page = path.with_suffix(".md").read_text()
    assert page.count("## Sana tiny, 64 tokens") == 1 and "7 rounds" in page
    assert all(f"- `{name}`: " in page for name in ("gguf", "vllm", "qualcomm"))


def test_a_run_with_fewer_targets_does_not_replace_a_fuller_one(record: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    fewer = record | {"arms": {BASE: record["arms"][BASE]}, "rounds": 77}
    newer = record | {"rounds": 88}
    path.write_text("".join(json.dumps(each) + "\n" for each in (fewer, record, fewer)))
    write_table(path)
    assert "77 rounds" not in path.with_suffix(".md").read_text()
    path.write_text(path.read_text() + json.dumps(newer) + "\n")
    write_table(path)
    assert "88 rounds" in path.with_suffix(".md").read_text()


@pytest.mark.parametrize("wrong", [lambda y: 1.05 * y, lambda y: y[..., :1], lambda y: y / 0])
def test_a_wrong_program_is_not_timed(wrong: Any) -> None:
    student = torch.randn(1, 4, 8, 8)
    arm = Arm("packed", "W4A8 per token")
    right = compare(arm, Made(lambda: [student.numpy()], student, 0, 1), student)
    assert right == {"student_db": None, "float32_db": None}
    with pytest.raises(NotRunError, match="a wrong output"):
        compare(arm, Made(lambda: wrong(student), student, 0, 1), student)
