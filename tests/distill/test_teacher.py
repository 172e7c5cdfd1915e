"""Laws of the teacher's memory: fewer bytes for its weights, and one copy of what the student leaves as it is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fraqat.distill import StoredWeight, TeacherSpec, hold_teacher_, share_frozen_, store_weights_
from fraqat.errors import ConfigError
from fraqat.nn import LayerFamilies, quantize_


class Small(nn.Module):
    """Every kind of layer that is stored, and some that are not."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 8)
        self.up = nn.Linear(8, 32)
        self.norm = nn.LayerNorm(32)
        self.mix = nn.Conv1d(32, 16, 3, padding=1)
        self.point = nn.Conv2d(16, 8, 1)
        self.head = nn.Linear(8, 5, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.norm(self.up(self.embed(ids))).transpose(1, 2)
        x = self.point(self.mix(x).unsqueeze(-1)).squeeze(-1).transpose(1, 2)
        return self.head(x)


STORED = ("up", "mix", "point")


def make(seed: int = 0) -> Small:
    torch.manual_seed(seed)
    return Small().eval().requires_grad_(False)


IDS = torch.arange(5).repeat(2, 3)


def held_bytes(model: nn.Module) -> int:
    tensors = [*model.parameters(), *model.buffers()]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def test_bfloat16_weights_change_nothing_under_autocast() -> None:
    plain, stored = make(), make()
    assert store_weights_(stored, "bfloat16") == len(STORED)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(plain(IDS), stored(IDS))
    assert plain(IDS).dtype == stored(IDS).dtype == torch.float32


def test_int8_weights_are_codes_and_scales(sqnr_db: Callable[[Tensor, Tensor], float]) -> None:
    plain, stored = make(), make()
    store_weights_(stored, "int8")
    for name in STORED:
        layer, original = stored.get_submodule(name), plain.get_submodule(name)
        assert isinstance(layer, StoredWeight)
        assert (layer.stored_weight.dtype, layer.stored_scale.dtype) == (torch.int8, torch.float32)
        scale = original.weight.flatten(1).abs().amax(1) / 127
        expected = (original.weight.flatten(1) / scale[:, None]).round() * scale[:, None]
        assert torch.allclose(layer.weight.flatten(1), expected, rtol=1e-6, atol=0)
        assert sqnr_db(original.weight, layer.weight) > 40
    assert sqnr_db(plain(IDS), stored(IDS)) > 35


@pytest.mark.parametrize(("dtype", "share"), [("bfloat16", 2), ("int8", 4)])
def test_stored_weights_need_their_share_of_bytes(dtype: Any, share: int) -> None:
    model = make()
    weights = sum(model.get_submodule(name).weight.numel() for name in STORED)
    channels = sum(len(model.get_submodule(name).weight) for name in STORED)
    before = held_bytes(model)
    store_weights_(model, dtype)
    saved = 4 * weights - 4 * weights // share - (4 * channels if dtype == "int8" else 0)
    assert held_bytes(model) == before - saved


def test_tied_weights_embeddings_and_what_is_narrow_already_stay() -> None:
    model = make()
    store_weights_(model, "int8")
    assert model.head.weight is model.embed.weight
    assert type(model.head) is nn.Linear
    assert store_weights_(model, "int8") == 0
    assert store_weights_(make().to(torch.bfloat16), "bfloat16") == 0
    assert store_weights_(make(), "model") == 0


def test_casting_and_moving_a_stored_teacher_keeps_codes_and_scales() -> None:
    model = make()
    store_weights_(model, "int8")
    model.to(torch.bfloat16)
    assert model.up.stored_weight.dtype == torch.int8
    assert model.up.stored_scale.dtype == torch.float32


def test_teachers_that_cannot_be_stored_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"train.teacher.dtype = 'int8' .* model for a teacher that is trained"):
        store_weights_(make().requires_grad_(True), "int8")
    broken = make()
    broken.up.weight[0, 0] = float("nan")
    with pytest.raises(ConfigError, match=r"train.teacher.dtype = 'int8' .* NaN"):
        store_weights_(broken, "int8")
    with pytest.raises(ConfigError, match=r"train.teacher.dtype = 'int4' .* model, bfloat16, int8"):
        TeacherSpec("int4")  # pyright: ignore[reportArgumentType]


def selective_student(teacher: nn.Module) -> nn.Module:
    student = Small()
    student.load_state_dict(teacher.state_dict())
    quantize_(student, families=LayerFamilies({"FF": ("up", "up.*"), "Attn": ("mix*", "point*")}), train="FF")
    return student


def test_what_is_frozen_and_equal_is_held_once() -> None:
    teacher = make()
    student = selective_student(teacher)
    with torch.no_grad():
        student.norm.bias[0] += 1.0
    apart = held_bytes(teacher) + held_bytes(student)
    shared = share_frozen_(teacher, student)
    theirs = dict(teacher.named_parameters())
    for name, mine in student.named_parameters():
        is_shared = mine.data_ptr() == theirs[name].data_ptr()
        assert is_shared == (name in shared), name
        assert is_shared == (not mine.requires_grad and name != "norm.bias"), name
    assert student.head.weight is student.embed.weight
    both = nn.ModuleList([teacher, student])
    saved = sum(theirs[name].numel() * 4 for name in shared)
    assert held_bytes(both) == apart - saved
    assert saved > 0


def test_shared_memory_survives_the_loading_of_a_checkpoint() -> None:
    teacher = make()
    student = selective_student(teacher)
    shared = share_frozen_(teacher, student)
    state = {name: value.clone() for name, value in student.state_dict().items()}
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    state["up.weight"] += 1.0
    student.load_state_dict(state)
    for name in shared:
        assert student.get_parameter(name).data_ptr() == teacher.get_parameter(name).data_ptr()
    for name, value in teacher.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_what_is_trained_or_has_another_dtype_is_not_shared() -> None:
    teacher = make()
    student = Small()
    student.load_state_dict(teacher.state_dict())
    assert share_frozen_(teacher, student) == ()
    assert share_frozen_(make().to(torch.bfloat16), selective_student(teacher)) == ()


def test_a_shared_weight_is_not_stored_a_second_time() -> None:
    teacher = make()
    student = selective_student(teacher)
    memory = hold_teacher_(teacher, student, "int8")
    assert memory.num_stored == 1  # what the student trains: up
    assert isinstance(teacher.up, StoredWeight)
    assert type(teacher.mix) is nn.Conv1d
    assert memory.num_bytes == held_bytes(teacher)
    assert held_bytes(nn.ModuleList([teacher, student])) == (
        held_bytes(teacher) + held_bytes(student) - memory.shared_bytes
    )


def test_training_with_a_shared_teacher_leaves_the_teacher_alone(make_distiller) -> None:
    distiller = make_distiller(steps=9)
    student = distiller.student
    student[3].weight.requires_grad_(False)
    before = {name: value.clone() for name, value in distiller.teacher.state_dict().items()}
    fresh = type(distiller)(
        distiller.task, distiller.teacher, student, distiller.schedule, distiller.spec, distiller.folder
    )
    assert fresh.teacher_memory.shared_bytes == student[3].weight.numel() * 4
    fresh.run()
    for name, value in fresh.teacher.state_dict().items():
        assert torch.equal(value, before[name]), name


@pytest.mark.parametrize("options", [{}, {"ema_decay": 0.5}])
def test_a_bfloat16_teacher_trains_the_same_student(make_distiller, options: dict[str, Any]) -> None:
    plain = make_distiller(folder="plain", autocast="bfloat16", **options)
    stored = make_distiller(folder="stored", teacher=TeacherSpec("bfloat16"), autocast="bfloat16", **options)
    plain.run()
    stored.run()
    for (name, left), right in zip(plain.student.named_parameters(), stored.student.parameters(), strict=True):
        assert torch.equal(left, right), name
