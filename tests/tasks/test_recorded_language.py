"""Laws of recorded outputs of language models: hidden states are on disk, and the head stays in memory."""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

sys.path.insert(0, str(Path(__file__).parent))

from tiny_language import VOCABULARY, tiny_model

from fraqat.data.loader import RowSource, TensorRows
from fraqat.distill import Distiller, LossSpec, StepRecord, TeacherSpec, TrainSpec, read_log
from fraqat.nn import quantize_
from fraqat.schedules import LearningRateSpec, ScheduleSpec
from fraqat.tasks.language import LanguageTask
from fraqat.tasks.language_layers import head_rules, language_families
from fraqat.tasks.language_spec import LanguageSpec

pytestmark = pytest.mark.xdist_group("language")
LENGTH = 8


def rows(num: int, seed: int) -> TensorRows:
    tokens = torch.randint(3, VOCABULARY, (num, LENGTH), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(tokens)
    mask[0, 5:] = 0
    return TensorRows({"input_ids": tokens, "attention_mask": mask})


def make(folder: Path, name: str, teacher_spec: TeacherSpec, *, train: str = "All", **changes: Any) -> Distiller:
    teacher = tiny_model(name)
    student = copy.deepcopy(teacher)
    quantize_(student, rules=head_rules(student), families=language_families(student), train=train)
    task = LanguageTask(teacher, RowSource(rows(6, 3), rows(4, 5)), LanguageSpec(hidden_layers=(1,)))
    values: dict[str, Any] = {
        "batch_size": 4,
        "accumulation": 2,
        "losses": (LossSpec("kl"), LossSpec("hidden_mse", 0.1)),
        "learning_rate": LearningRateSpec(peak=3e-3),
        "validate_every": 4,
        "tensorboard": False,
        "teacher": teacher_spec,
        **changes,
    }
    schedule = ScheduleSpec("fractional").resolve(4.0, 9)
    return Distiller(task, teacher, student, schedule, TrainSpec(**values), folder)


def losses(folder: Path) -> list[tuple[Any, ...]]:
    return [(e["event"], e["step"], e["loss"]) for e in read_log(folder) if e["event"] in ("step", "validation")]


@pytest.mark.parametrize(
    ("name", "dtype", "changes"),
    [
        ("Gemma2", "model", {"autocast": "bfloat16"}),
        ("Gemma2", "int8", {"autocast": "none"}),
        ("Phi", "int8", {"autocast": "bfloat16"}),
        ("Llama", "model", {"autocast": "none", "train": "FF"}),
    ],
)
def test_a_language_model_with_recorded_outputs_is_the_same_model(
    name: str, dtype: Any, changes: dict[str, Any], tmp_path: Path
) -> None:
    for outputs in ("computed", "recorded"):
        make(tmp_path / outputs, name, TeacherSpec(dtype, outputs), **changes).run()
    assert losses(tmp_path / "recorded") == losses(tmp_path / "computed")
    assert len(losses(tmp_path / "recorded")) == 9 + 3


def test_hidden_states_are_recorded_and_logits_and_head_are_not(tmp_path: Path) -> None:
    names: set[str] = set()
    shapes: set[tuple[int, ...]] = set()

    def look(record: StepRecord) -> None:
        for path in (tmp_path / "run" / "teacher_outputs").glob("*.safetensors"):
            with safe_open(path, "pt") as file:
                names.update(key.rsplit("/", 1)[1] for key in file.keys())  # noqa: SIM118 - no dictionary
                shapes.update(tuple(file.get_slice(key).get_shape()) for key in file.keys())  # noqa: SIM118

    distiller = make(tmp_path / "run", "Gemma2", TeacherSpec(outputs="recorded"))
    distiller.on_step = look
    distiller.run()
    assert names == {"hidden", "hidden_1"}
    assert shapes == {(2, LENGTH, 32), (4, LENGTH, 32)}


def test_a_head_that_the_student_leaves_as_it_is_is_held_once(tmp_path: Path) -> None:
    distiller = make(tmp_path / "run", "Llama", TeacherSpec(outputs="recorded"), train="FF")
    head: Any = distiller.student.get_submodule("lm_head")
    places: list[bool] = []

    def look(record: StepRecord) -> None:
        inputs = next(iter(distiller.task.validation_batches(4)))
        outputs = distiller.outputs.of_held_out(0, inputs)
        places.append(outputs["head"].data_ptr() == head.weight.data_ptr())

    distiller.on_step = look
    distiller.run()
    assert places == [True] * 9
